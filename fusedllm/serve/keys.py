"""API keys as salted digests, and the rate at which each of them may ask."""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# Of this process: digests in its memory say nothing about the keys to anybody who has other digests of them.
_SALT = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True)
class KeyDigest:
    """A key that can be recognized and not be read."""

    digest: bytes = field(repr=False)

    @staticmethod
    def of(key: str | KeyDigest) -> KeyDigest:
        """The digest of a key: BLAKE2b (RFC 7693), keyed with a salt of this process. A digest passes through."""
        if isinstance(key, KeyDigest):
            return key
        return KeyDigest(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), key=_SALT, digest_size=32).digest())


class Keys:
    """Recognizes any of several API keys. Without keys everybody is welcome, as the caller `""`."""

    def __init__(self, keys: Sequence[str | KeyDigest]) -> None:
        self._digests = tuple(KeyDigest.of(key).digest for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None) -> str | None:
        """Who asks, by an `Authorization` header: `key-1` for the first key, ...; `None` for nobody we know.

        The time it takes depends on how many keys there are, and on neither which one it is nor how much of one was
        guessed: digests are compared in constant time, and all of them.
        """
        if not self._digests:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        given = KeyDigest.of(key.strip()).digest
        found = 0
        for number, digest in enumerate(self._digests, start=1):
            found = max(found, number * hmac.compare_digest(given, digest))
        return f"key-{found}" if found and scheme.lower() == "bearer" else None


class Rates:
    """A token bucket (Turner's leaky bucket as a meter) for each caller: it holds a minute's requests, and refills
    evenly. A caller who was quiet may send a whole minute's requests at once.

    Not for several threads: the event loop's alone.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        # Of each caller: requests left, and when that was so. Callers are keys that we know, so that this stays small.
        self._left: dict[str, tuple[float, float]] = {}

    def admit(self, caller: str) -> int:
        """0 if `caller` may ask now, which counts as a request; otherwise after how many seconds it may."""
        now = self._clock()
        left, since = self._left.get(caller, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - since) * self._per_minute / 60)
        if left < 1:
            self._left[caller] = (left, now)
            return max(1, math.ceil((1 - left) * 60 / self._per_minute))
        self._left[caller] = (left - 1, now)
        return 0
