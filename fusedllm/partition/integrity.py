"""Integrity: whether a product that came back from the device is the one that was asked for, without computing it.

Freivalds' check (R. Freivalds, "Probabilistic machines can use less running time", 1977) over the field of
p = 2^31 - 1 elements. With a secret row s, drawn once, and t = s W, computed once, sums y of codes q must satisfy

    y . s = q . t        modulo p

which costs as many products as q and y have elements, instead of as W has. An error e = y - q W passes where e . s is
0, for one s in p unless e is 0 modulo p. So magnitudes are compared with what honest sums reach first: below 2^30, the
difference of two sums is below p and can't be a multiple of it. (Modulo 2^32, where the sums live, there are errors,
2^31 for one, that half of all secrets miss.)

With two rounds a wrong product passes with a probability of at most p^-2 < 2^-61. Whoever sees a product pass learns
nothing of the secrets but that this error was none that they miss, so that N attempts succeed with N times as much at
most; after the first that fails the secrets are gone.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int8, Int32, UInt32

from fusedllm.errors import BoundaryError, IntegrityError
from fusedllm.kernels import native_ring
from fusedllm.partition import ring
from fusedllm.partition.keystream import KeyStream
from fusedllm.partition.pads import site_name

# A prime.
PRIME = 2**31 - 1

ROUNDS = 2

# Bits of the lower part of a sum, and of a secret, in NumPy's way: their products, and sums of as many as a vocabulary
# has tokens, are exact in float64 (15 + 16 + 17 bits, and 17 + 16 + 17).
_SUM_BITS = 15
_SECRET_BITS = 16


@dataclass(frozen=True, slots=True)
class _Secret:
    outputs: UInt32[np.ndarray, "rounds out"]  # s
    inputs: UInt32[np.ndarray, "rounds in"]  # s W


class Verifier:
    """The secrets of one session, and the check of products of its sites; any thread may check."""

    def __init__(
        self,
        weights: Mapping[Hashable, Int8[np.ndarray, "out in"]],
        *,
        rounds: int = ROUNDS,
        native: bool | None = None,
    ) -> None:
        """`native` chooses compiled code, by default where it is.

        Raises:
          ValueError: a weight has no exact product over the ring, or there is no round.
        """
        if rounds < 1:
            raise ValueError(f"products are checked in one round or more, got {rounds}.")
        self._weights, self._rounds = dict(weights), rounds
        self._native = native_ring.available() if native is None else native
        self._bounds = {site: ring.range_bound(weight) for site, weight in weights.items()}
        self._lock = threading.Lock()
        self._secrets: dict[Hashable, _Secret] | None = None
        self.rotate()

    def rotate(self) -> None:
        """Draws new secrets for all sites; products are checked with them from now on."""
        stream = KeyStream()
        secrets = {}
        for site, weight in self._weights.items():
            outputs = _uniform(stream, (self._rounds, len(weight)))
            secrets[site] = _Secret(outputs, self._times(outputs, weight))
        with self._lock:
            self._forget()
            self._secrets = secrets

    @property
    def spent(self) -> bool:
        """Whether a product was wrong since the secrets were drawn: they are gone, and `rotate` draws others."""
        return self._secrets is None

    def close(self) -> None:
        """Overwrites the secrets."""
        with self._lock:
            self._forget()

    def bound(self, site: Hashable) -> int:
        """The largest magnitude of an honest sum of `site`."""
        return self._bounds[site]

    def check(
        self,
        site: Hashable,
        step: int,
        codes: Int8[np.ndarray, "tokens in"],
        sums: Int32[np.ndarray, "tokens out"],
        *,
        in_range: bool | None = None,
    ) -> None:
        """Checks that `sums` are `codes @ weight.T`, without their pads; `in_range` is what `ring.decode` said of them.

        Raises:
          IntegrityError: they are not. The secrets are gone; nothing may be sent again under the same pad.
          BoundaryError: an earlier product was wrong, and nobody has rotated the secrets since.
        """
        # Held all along: secrets that somebody overwrites meanwhile would let everything pass.
        with self._lock:
            if self._secrets is None:
                raise BoundaryError(
                    "a product of this session was wrong: its secrets are gone, and nothing is checked."
                )
            secret = self._secrets[site]
            expected = (len(codes), secret.outputs.shape[1])
            inside = ring.in_range(sums, self._bounds[site]) if in_range is None else in_range
            # The residues are computed whatever the range said: how long a refusal takes does not tell which it was.
            if (
                codes.shape[1:] == secret.inputs.shape[1:]
                and sums.shape == expected
                and np.array_equal(self._residues(sums, secret.outputs), self._residues(codes, secret.inputs)) & inside
            ):
                return
            self._forget()
        raise IntegrityError(
            f"the product of {site_name(site)} in step {step} is not the one that was asked for: what it was part of "
            "ends here."
        )

    def _residues(self, x: np.ndarray, secrets: np.ndarray) -> np.ndarray:
        return native_ring.residues(np.ascontiguousarray(x), secrets) if self._native else residues(x, secrets)

    def _times(self, secrets: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return native_ring.weigh(secrets, np.ascontiguousarray(weight)) if self._native else times(secrets, weight)

    def _forget(self) -> None:
        for secret in (self._secrets or {}).values():
            secret.outputs.fill(0)
            secret.inputs.fill(0)
        self._secrets = None


def residues(
    x: Int32[np.ndarray, "tokens width"] | Int8[np.ndarray, "tokens width"], secrets: UInt32[np.ndarray, "rounds width"]
) -> UInt32[np.ndarray, "tokens rounds"]:
    """`x` times each of `secrets` modulo p; of at most 2^17 columns."""
    low, high = _halves(secrets)
    columns = np.concatenate([low, high]).T
    parts = [(x, 0)] if x.dtype == np.int8 else [(x & (2**_SUM_BITS - 1), 0), (x >> _SUM_BITS, _SUM_BITS)]
    total = np.zeros((len(x), len(secrets)), np.int64)
    for part, shift in parts:
        low_sums, high_sums = np.split((part.astype(np.float64) @ columns).astype(np.int64) % PRIME, 2, axis=1)
        total += (low_sums + (high_sums << _SECRET_BITS)) % PRIME << shift
    return (total % PRIME).astype(np.uint32)


def times(
    secrets: UInt32[np.ndarray, "rounds out"], weight: Int8[np.ndarray, "out in"]
) -> UInt32[np.ndarray, "rounds in"]:
    """`secrets @ weight` modulo p, in parts, as float64 takes eight times the memory of int8."""
    rows = max(1, 2**22 // weight.shape[1])
    halves = np.concatenate(_halves(secrets))
    sums = np.zeros((len(halves), weight.shape[1]))
    for first in range(0, len(weight), rows):
        # Exact: 16 bits of a secret, 7 of a weight, and 17 of their number.
        sums += halves[:, first : first + rows] @ weight[first : first + rows].astype(np.float64)
    low, high = np.split(sums.astype(np.int64) % PRIME, 2)
    return ((low + (high << _SECRET_BITS)) % PRIME).astype(np.uint32)


def _halves(secrets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lower bits of each number and the others, as float64."""
    return (secrets & (2**_SECRET_BITS - 1)).astype(np.float64), (secrets >> _SECRET_BITS).astype(np.float64)


def _uniform(stream: KeyStream, shape: tuple[int, int]) -> np.ndarray:
    """Numbers uniform over 0 to p - 1: of 31 bits, drawn again where they are p."""
    numbers = stream.numbers(shape).view(np.uint32) & np.uint32(PRIME)
    while (again := numbers == PRIME).any():
        numbers[again] = stream.numbers((int(again.sum()),)).view(np.uint32) & np.uint32(PRIME)
    return numbers
