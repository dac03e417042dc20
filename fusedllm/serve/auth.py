"""Who asks: API keys and request rates, decided before anything of a request's body is read."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from fusedllm.serve.errors import APIError
from fusedllm.serve.keys import Keys, Rates
from fusedllm.serve.refusal import Refusal
from fusedllm.serve.settings import ServerSettings

__all__ = ["Authentication", "Keys", "caller", "is_open"]

# Probes have no key; neither has a browser that opens the page (which sends the key that its user types in).
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/favicon.ico"})
OPEN_PREFIX = "/page/"

# A scraper should not use up its key's requests.
UNCOUNTED = frozenset({"/metrics"})

NO_KEY = Refusal(
    401,
    "this server needs an API key: send one as Authorization: Bearer KEY.",
    code="invalid_api_key",
    headers={"WWW-Authenticate": "Bearer"},
)
WRONG_KEY = Refusal(
    401, "this API key is not one that this server knows.", code="invalid_api_key", headers=NO_KEY.headers
)


def is_open(scope: Scope) -> bool:
    """Whether a request needs no key: probes and the page, which only can be read."""
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in OPEN_PATHS or path.startswith(OPEN_PREFIX))


def too_many(seconds: int, per_minute: int) -> Refusal:
    """The answer to a caller who asks too often, and may again after `seconds`."""
    return Refusal(
        429,
        f"more than {per_minute} requests a minute came with this key; try again in {seconds} s.",
        type="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds)},
    )


class Authentication:
    """Lets a request in that has a key, or that needs none, as often as it may come; notes the caller on its state."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        self._keys = Keys(settings.api_keys)
        self._per_minute = settings.requests_per_minute
        self._rates = None if self._per_minute is None else Rates(self._per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or is_open(scope):
            await self.app(scope, receive, send)
            return
        given = _authorization(scope)
        who = self._keys.check(given)
        if who is None:
            await (NO_KEY if given is None else WRONG_KEY).send(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = who
        if self._rates is not None and self._per_minute is not None and scope["path"] not in UNCOUNTED:
            wait = self._rates.admit(who)
            if wait:
                await too_many(wait, self._per_minute).send(scope, receive, send)
                return
        await self.app(scope, receive, send)


def caller(request: Request) -> str:
    """The id of the request's key, `""` without keys; a dependency of every endpoint that needs one.

    Where the app runs without `Authentication` around it, the key is checked here.

    Raises:
      APIError: 401, without a key or with one that is not known.
    """
    who = getattr(request.state, "caller", None)
    if who is None:
        given = request.headers.get("authorization")
        who = Keys(request.app.state.server.settings.api_keys).check(given)
        if who is None:
            refusal = NO_KEY if given is None else WRONG_KEY
            raise APIError(
                refusal.status, refusal.message, refusal.type, code=refusal.code, headers=dict(refusal.headers)
            )
    return str(who)


def _authorization(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"authorization":
            return str(value.decode("latin-1"))
    return None
