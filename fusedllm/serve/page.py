"""The chat page at `/`: the files of `page/`, with headers under which a browser loads nothing from anywhere else."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePosixPath

from fastapi import APIRouter, HTTPException, Request, Response

INDEX = "index.html"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# https://www.w3.org/TR/CSP3/. Trusted types without a policy: the browser itself refuses to parse text as HTML.
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)

HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # A copy may be kept, and is asked about each time: an upgrade of the server never meets half of an old page.
    "Cache-Control": "no-cache",
}

# Neither is part of the API that `/openapi.json` describes. They ask for no key: the page itself asks the user for it.
router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class Asset:
    """One file of the page: its bytes, what they are, and the strong entity tag (quoted) that names them."""

    content: bytes
    media_type: str
    etag: str


@functools.cache
def assets() -> dict[str, Asset]:
    """Every file of the page by its name; read once, nothing else can be asked for."""
    found = {}
    for entry in files("fusedllm.serve").joinpath("page").iterdir():
        media_type = MEDIA_TYPES.get(PurePosixPath(entry.name).suffix)
        if media_type is not None:
            content = entry.read_bytes()
            found[entry.name] = Asset(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """The page itself."""
    return respond(request, INDEX)


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def asset(request: Request, name: str) -> Response:
    """A style sheet, module or picture of the page."""
    return respond(request, name)


def respond(request: Request, name: str) -> Response:
    """The file called `name`, or 304 without a body where the client has it.

    Raises:
      HTTPException: 404, the page has no such file.
    """
    found = assets().get(name)
    if found is None:
        raise HTTPException(404, f"The chat page has no file {name[:80]!r}.")
    headers = {**HEADERS, "ETag": found.etag}
    if is_known(found.etag, request.headers.get("if-none-match", "")):
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.media_type, headers=headers)


def is_known(etag: str, if_none_match: str) -> bool:
    """Whether an `If-None-Match` header names `etag`, by the weak comparison that RFC 9110, 13.1.2 asks for."""
    named = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return etag in named or named == ["*"]
