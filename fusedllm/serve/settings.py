"""`ServerSettings`: every limit and option of the server, validated once, here."""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fusedllm.attesting import Manifest
from fusedllm.errors import SettingsError
from fusedllm.serve.keys import KeyDigest

# Where keys are looked for that are neither in a file nor on the command line, separated by commas or blanks.
KEYS_VARIABLE = "FUSEDLLM_API_KEYS"

MIB = 2**20
LogFormat = Literal["human", "json"]


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How the server listens, whom it answers, and how much of everything one of them may take.

    Attributes:
      host, port: where to listen; port 0 takes one that is free.
      api_keys: who may ask; without any, everybody who can connect. Only digests are kept.
      cors_origins: of web pages that may ask from a browser, `*` for all; none by default.
      certificate, private_key: PEM files, for TLS; the key may be in the certificate's file.
      max_queue: requests that may wait for a slot; further ones get 503.
      max_body_bytes: of a request.
      max_prompt_tokens, max_tokens: of a request; `None` leaves the limit to the context.
      max_n: answers to one prompt.
      min_priority: the lowest, most urgent priority that a request may ask for; 0 lets nobody go before others.
      request_seconds: deadline of a request, from its arrival.
      body_seconds: until the headers of a request must have come, and then until its body must.
      send_seconds: until a client must have taken what was sent to it.
      drain_seconds: what requests in flight are given to end when the server stops.
      requests_per_minute: of one key (without keys: of all callers together); further ones get 429.
      max_connections: open at once; further ones are closed.
      log_prompts: write the bodies of requests to the log.
      log_format: `human`, or `json` with an object a line.
      model_name: the name under which the model is served; `None` leaves it to the app.
      prefix_cache_per_key: callers don't share pages of their prompts, so that nobody learns by the clock what another
        key has asked.
      manifest: what `/v1/attestation` vouches for (`fusedllm.attesting.manifest_of`); `None` for nothing.

    Raises:
      SettingsError: a value out of its range, or one that contradicts another.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str | KeyDigest, ...] = field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    certificate: str | Path | None = None
    private_key: str | Path | None = None
    max_queue: int = 64
    max_body_bytes: int = 4 * MIB
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    max_n: int = 8
    min_priority: int = 0
    request_seconds: float = 600.0
    body_seconds: float = 10.0
    send_seconds: float = 30.0
    drain_seconds: float = 30.0
    requests_per_minute: int | None = None
    max_connections: int = 4096
    log_prompts: bool = False
    log_format: LogFormat = "human"
    model_name: str | None = None
    prefix_cache_per_key: bool = True
    manifest: Manifest | None = None

    def __post_init__(self) -> None:
        _ask(isinstance(self.host, str) and bool(self.host.strip()), "host", self.host, "an address or a name")
        _ask(_is_integer(self.port) and 0 <= self.port <= 65535, "port", self.port, "an integer from 0 to 65535")
        for name in ("max_queue", "max_body_bytes", "max_n", "max_connections"):
            self._count(name)
        for name in ("max_prompt_tokens", "max_tokens", "requests_per_minute"):
            if getattr(self, name) is not None:
                self._count(name)
        _ask(_is_integer(self.min_priority), "min_priority", self.min_priority, "an integer")
        for name in ("request_seconds", "body_seconds", "send_seconds"):
            self._seconds(name, above_zero=True)
        self._seconds("drain_seconds", above_zero=False)
        for name in ("log_prompts", "prefix_cache_per_key"):
            _ask(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        _ask(self.log_format in ("human", "json"), "log_format", self.log_format, "human or json")
        named = self.model_name is None or (isinstance(self.model_name, str) and _is_printable(self.model_name))
        _ask(named, "model_name", self.model_name, "a name of printable characters, or None")
        vouched = self.manifest is None or isinstance(self.manifest, Manifest)
        _ask(vouched, "manifest", self.manifest, "a Manifest, or None")
        self._check_tls()
        self._check_origins()
        object.__setattr__(self, "api_keys", tuple(map(_checked_key, _as_tuple("api_keys", self.api_keys))))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"

    def _count(self, name: str) -> None:
        value = getattr(self, name)
        _ask(_is_integer(value) and 1 <= value < 2**31, name, value, f"an integer from 1 to {2**31 - 1}")

    def _seconds(self, name: str, *, above_zero: bool) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        fits = number and (value > 0 if above_zero else value >= 0)
        _ask(fits, name, value, "a finite number of seconds " + ("above 0" if above_zero else "from 0"))

    def _check_tls(self) -> None:
        if self.private_key is not None and self.certificate is None:
            raise SettingsError(f"the private key {self.private_key} was given without a certificate; give both.")
        for what, path in (("certificate", self.certificate), ("private key", self.private_key)):
            if path is not None and not Path(path).is_file():
                raise SettingsError(f"the {what} must be a file in PEM format, and there is none at {path}.")

    def _check_origins(self) -> None:
        origins = _as_tuple("cors_origins", self.cors_origins)
        object.__setattr__(self, "cors_origins", origins)
        for origin in origins:
            fits = isinstance(origin, str) and (origin == "*" or re.fullmatch(r"https?://[^/\s?#]+", origin))
            _ask(bool(fits), "a CORS origin", origin, "* or scheme, host and port as in https://chat.example.org")


def read_keys(
    given: Sequence[str] = (), file: str | Path | None = None, environment: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """The API keys from the command line, a file (one a line, `#` begins a comment) and `FUSEDLLM_API_KEYS`.

    `environment` is `os.environ` unless given.

    Raises:
      SettingsError: a place that was named and has no key in it: nobody means to run an open server that way.
    """
    keys = list(given)
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"the file of API keys {file} can't be read: {error}.") from error
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise SettingsError(f"the file of API keys {file} has none in it; write one a line.")
        keys += found
    variable = (os.environ if environment is None else environment).get(KEYS_VARIABLE)
    if variable is not None:
        found = [key for key in re.split(r"[,\s]+", variable) if key]
        if not found:
            raise SettingsError(f"{KEYS_VARIABLE} is set and has no key in it; put keys there or unset it.")
        keys += found
    return tuple(dict.fromkeys(keys))


def _checked_key(key: object) -> KeyDigest:
    if isinstance(key, KeyDigest):
        return key
    if not isinstance(key, str) or not re.fullmatch(r"[!-~]+", key):
        # The key itself is nobody's business, least of all a log's.
        raise SettingsError("an API key must be a text of printable ASCII characters without blanks.")
    return KeyDigest.of(key)


def _as_tuple(name: str, value: object) -> tuple[object, ...]:
    if not isinstance(value, (tuple, list)):
        raise SettingsError(f"{name} must be a list of texts, got a {type(value).__name__}.")
    return tuple(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_printable(text: str) -> bool:
    return bool(text.strip()) and text.isprintable()


def _ask(holds: bool, what: str, found: object, wanted: str) -> None:
    if not holds:
        raise SettingsError(f"{what} must be {wanted}, got {found!r}.")
