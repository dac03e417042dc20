"""Typed reading of attributes that a stranger wrote: a checkpoint's JSON or metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from fusedllm.errors import ConfigError

# No model is near these; a damaged file may claim anything, and a claim must not become an allocation.
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 4096

_Default = TypeVar("_Default")


class Attributes:
    """A mapping whose entries are taken one by one, each checked; what is left was not understood by anybody.

    `what` names the mapping in messages. Taking a key that is absent or `None` gives the default. Every method
    raises `ConfigError` where the value has the wrong type or an impossible size.
    """

    def __init__(self, values: Mapping[str, Any], what: str) -> None:
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise ConfigError(f"{what} must be an object with named attributes, got {shortened(values)}.")
        self.what = what
        self._left = {key: value for key, value in values.items() if value is not None}

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as it is."""
        return self._left.pop(key, default)

    def integer(self, key: str, default: _Default, low: int = 1, high: int = MAX_SIZE) -> int | _Default:
        """An integer from `low` to `high`."""
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self._refuse(key, value, f"an integer from {low} to {high}")
        return cast(int, value)

    def number(self, key: str, default: _Default, above: float = -math.inf) -> float | _Default:
        """A finite number greater than `above`."""
        value = self.raw(key)
        if value is None:
            return default
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
        if not fits or not value > above:
            self._refuse(key, value, "a finite number" if above == -math.inf else f"a finite number above {above}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.raw(key, default)
        if not isinstance(value, bool):
            self._refuse(key, value, "true or false")
        return cast(bool, value)

    def string(self, key: str, default: _Default) -> str | _Default:
        """A text."""
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self._refuse(key, value, "a text")
        return cast(str, value)

    def token_ids(self, key: str) -> tuple[int, ...] | None:
        """One token id, or a list of them; `None` where absent."""
        value = self.raw(key)
        if value is None:
            return None
        ids = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token <= MAX_SIZE for token in ids):
            self._refuse(key, value, "a token id or a list of token ids")
        return tuple(ids)

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuse any other value than `allowed`: the mathematics behind it is not implemented."""
        value = self.raw(key)
        # 1 == True in Python, yet a file that says 1 where a boolean belongs was not understood.
        if value is not None and not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed
        ):
            only = " or ".join(repr(one) for one in allowed) or "its absence"
            raise ConfigError(f"{self.what} sets {shortened(key)} to {shortened(value)}; only {only} is implemented.")

    def drop(self, keys: frozenset[str]) -> None:
        """Forget `keys`, which are known not to change the mathematics."""
        for key in keys & self._left.keys():
            del self._left[key]

    def finish(self) -> None:
        """Refuse, by name, everything that was not taken."""
        for key, value in self._left.items():
            raise ConfigError(
                f"{self.what} sets {shortened(key)} to {shortened(value)}, which this version does not know; it may "
                "change the mathematics of the model, so the model is refused."
            )

    def _refuse(self, key: str, value: object, wanted: str) -> None:
        raise ConfigError(f"{shortened(key)} in {self.what} must be {wanted}, got {shortened(value)}.")


def shortened(value: object) -> str:
    """How a value appears in a message: its `repr`, cut where it would flood the terminal."""
    if isinstance(value, int) and not -(10**30) < value < 10**30:
        return "an enormous integer"  # repr would refuse more than 4300 digits
    if isinstance(value, (list, tuple, dict)) and len(value) > 20:
        return f"a {type(value).__name__} of {len(value)} entries"
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
