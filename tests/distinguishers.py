"""What an adversary at the device computes from what it sees: statistics, a classifier, and attacks on wrong masks.

A forward is a list of arrays, one a crossing, `[rows, width]` each: int32 of the ring, or the floats of a scheme that
hides with floats. The statistics give p-values, which are uniform from 0 to 1 where all that is seen is uniform over
the ring and independent of the prompt.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.optimize
import scipy.stats

Forward = Sequence[np.ndarray]

# Of the columns of a crossing the classifier sees so many as they are; norms, cosines and bytes are of all of them.
SEEN_COLUMNS = 32


def byte_chi_square(forwards: Sequence[Forward]) -> float:
    """The p-value of Pearson's chi-square for bytes of all values alike, each of a number's four bytes on its own."""
    counts = sum(histogram(array) for forward in forwards for array in forward)
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # Four sums are given, one for each byte of a number.
    return float(scipy.stats.chi2.sf(statistic, counts.size - len(counts)))


def histogram(array: np.ndarray) -> np.ndarray:
    """How often each value is taken by the first byte of a number, by the second, and so on: `[4, 256]`."""
    bytes_ = np.ascontiguousarray(array).view(np.uint8).reshape(-1, 4)
    return np.stack([np.bincount(column, minlength=256) for column in bytes_.T])


def serial_correlations(forwards: Sequence[Forward]) -> dict[str, float]:
    """z-scores of the correlation of numbers, and of their magnitudes, with what comes next in three directions.

    The correlation of n pairs of independent numbers has a mean of 0 and a standard deviation of 1 / sqrt(n).
    """
    pairs = {
        "column": [(array[:, :-1], array[:, 1:]) for forward in forwards for array in forward],
        "row": [(array[:-1], array[1:]) for forward in forwards for array in forward],
        "forward": [pair for before, after in itertools.pairwise(forwards) for pair in zip(before, after, strict=True)],
    }
    return {
        f"{what} and the next {direction}": _combined(
            [_pearson_z(of(_real(left)), of(_real(right))) for left, right in both]
        )
        for what, of in (("numbers", np.positive), ("magnitudes", np.abs))
        for direction, both in pairs.items()
    }


def two_sided(z: float) -> float:
    """The p-value of a z-score."""
    return math.erfc(abs(z) / math.sqrt(2))


def classify(forwards: Sequence[Forward], labels: np.ndarray) -> dict[str, tuple[float, float]]:
    """How often which of two prompts a forward is of is guessed right, by kind of feature, and the p-value of that.

    Learnt on the first half of `forwards`, guessed on the second. Where labels are coin flips and views tell nothing of
    them, each guess is right with a probability of exactly 1/2, whatever the guesses.
    """
    half = len(forwards) // 2
    found = {}
    for name, of in FEATURES.items():
        features = np.stack([of(forward, forwards[index - 1]) for index, forward in enumerate(forwards) if index])
        train, test = features[: half - 1], features[half - 1 :]
        right = int((_discriminant(train, labels[1:half])(test) == labels[half:]).sum())
        trials = len(test)
        p = scipy.stats.binomtest(right, trials, 0.5).pvalue
        found[name] = (right / trials, float(p))
    return found


def _discriminant(features: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The linear discriminant of two normal clouds with independent coordinates."""
    low, high = (features[labels == label] for label in (0, 1))
    spread = (low.var(axis=0) * len(low) + high.var(axis=0) * len(high)) / len(features)
    between = high.mean(axis=0) - low.mean(axis=0)
    # A coordinate that varies between classes alone would have an infinite weight; one that never varies has none.
    whole = features.var(axis=0)
    weights = np.divide(between, spread + 1e-6 * whole, out=np.zeros_like(between), where=whole > 0)
    middle = (low.mean(axis=0) + high.mean(axis=0)) / 2
    return lambda seen: ((seen - middle) @ weights > 0).astype(int)


def _bytes(forward: Forward, before: Forward) -> np.ndarray:
    return np.concatenate([histogram(array).ravel() for array in forward])


def _norms(forward: Forward, before: Forward) -> np.ndarray:
    """In order of size, so that it is nothing to them in what order rows are."""
    return np.concatenate([np.sort(np.log(np.linalg.norm(_real(array), axis=1) + 1e-9)) for array in forward])


def _cosines(forward: Forward, before: Forward) -> np.ndarray:
    """Of each row with each other of its crossing, in order of size."""
    found = []
    for array in forward:
        rows = _real(array)
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        found.append(np.sort((rows @ rows.T)[np.triu_indices(len(rows), 1)]))
    return np.concatenate(found)


def _differences(forward: Forward, before: Forward) -> np.ndarray:
    """From the forward before: modulo 2^32 where numbers are of the ring."""
    both = zip(forward, before, strict=True)
    return np.concatenate([_real(_minus(new, old)[:, :SEEN_COLUMNS]).ravel() for new, old in both])


def _values(forward: Forward, before: Forward) -> np.ndarray:
    return np.concatenate([_real(array[:, :SEEN_COLUMNS]).ravel() for array in forward])


FEATURES = {
    "bytes": _bytes,
    "norms": _norms,
    "cosines": _cosines,
    "differences": _differences,
    "values": _values,
}


def undo_reuse(known: Forward, forward: Forward, activations: Forward) -> list[np.ndarray]:
    """The activations of `forward` where it has the mask of `known`, whose `activations` the adversary knows."""
    return [_real(_minus(new, old)) + x for new, old, x in zip(forward, known, activations, strict=True)]


def undo_stack(seen: np.ndarray, deviation: float) -> np.ndarray:
    """Q of [Q + R; aR], R normal of a known deviation: the size of the lower half is a, and R is that half over a."""
    upper, lower = np.split(_real(seen), 2)
    return upper - lower * (deviation / np.sqrt((lower**2).mean()))


def undo_permuted_stack(seen: np.ndarray, deviation: float) -> np.ndarray:
    """The rows of Q, in some order, of the rows of [Q + R; aR] in some order.

    All rows of aR are of about the same length. Of each half of the rows that could be aR by that, the mean product of
    two that belong together says whether it is: for aR of size s it is deviation * s. Which belong together is an
    assignment, as the products of those that do not are about 0.
    """
    rows = _real(seen)
    lengths = np.linalg.norm(rows, axis=1)
    rows, lengths = rows[np.argsort(lengths)], np.sort(lengths)
    count, width = len(rows) // 2, rows.shape[1]
    best, found = (True, math.inf), rows[:count]
    for first in range(len(rows) - count + 1):
        lower = rows[first : first + count]
        upper = np.concatenate([rows[:first], rows[first + count :]])
        size = np.sqrt((lower**2).mean())
        products = upper @ lower.T / width
        pairs = scipy.optimize.linear_sum_assignment(products, maximize=True)
        # The logarithm of the length of a normal row varies by 1 / sqrt(2 * width).
        varies = np.log(lengths[first : first + count]).std() > 2 / math.sqrt(2 * width)
        fit = bool(varies), abs(products[pairs].mean() / (deviation * size) - 1)
        if fit < best:
            best, found = fit, upper[pairs[0]] - lower[pairs[1]] * (deviation / size)
    return found


def undo_rank_one(known: np.ndarray, seen: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What undoes M = D + alpha beta^T, from three rows or more that are `known` and what was `seen` of them.

    Column j of what is seen is d_j times the known column plus beta_j times u = X alpha, the same u for all columns. So
    u is what is nearest to all the planes that the two columns span, and then d and beta are least squares. Of a row x
    that is unknown only the number alpha^T x is left, along one direction out of as many as the row is wide: that is
    chosen so that nothing of x lies in it.
    """
    x, y = known.astype(np.float64).T, _real(seen).T
    planes = np.stack([x, y], axis=2)
    bases, _ = np.linalg.qr(planes)
    within = np.einsum("jki,jli->kl", bases, bases)
    u = np.linalg.eigh(within)[1][:, -1]
    columns = np.stack([x, np.broadcast_to(u, x.shape)], axis=2)
    d, beta = np.moveaxis((np.linalg.pinv(columns) @ y[:, :, None])[:, :, 0], 1, 0)
    direction = beta / d

    def undo(seen: np.ndarray) -> np.ndarray:
        rows = _real(seen) / d
        return rows - np.outer(rows @ direction / (direction @ direction), direction)

    return undo


def likeness(found: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> tuple[float, float]:
    """The mean correlation of rows that were found with the true ones, and the p-value of all of them together.

    Of ranks: what an attack finds where there is nothing may have a few huge numbers, of which alone a correlation of
    values would be.
    """
    both = list(zip(found, truth, strict=True))
    of_rows = [(ranks(one) * ranks(other)).sum(axis=1) for one, other in both]
    z = [correlations * math.sqrt(one.shape[1]) for correlations, (one, _) in zip(of_rows, both, strict=True)]
    return float(np.concatenate(of_rows).mean()), two_sided(_combined(np.concatenate(z)))


def likeness_in_any_order(found: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> tuple[float, float]:
    """The mean correlation of rows that were found, each with a true one of its own so that the sum is the largest, and
    the p-value of the largest correlation of any with any, of as many as there are.
    """
    matched, p, count = [], 1.0, 0
    for one, other in zip(found, truth, strict=True):
        table = ranks(one) @ ranks(other).T
        matched.append(table[scipy.optimize.linear_sum_assignment(table, maximize=True)])
        p = min(p, two_sided(np.abs(table).max() * math.sqrt(one.shape[1])))
        count += table.size
    return float(np.concatenate(matched).mean()), min(1.0, p * count)


def ranks(rows: np.ndarray) -> np.ndarray:
    """Those of the numbers of each row, centred and of length 1, so that products are correlations."""
    found = scipy.stats.rankdata(rows, axis=1)
    found -= found.mean(axis=1, keepdims=True)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def _pearson_z(left: np.ndarray, right: np.ndarray) -> float:
    left, right = (x.ravel() - x.mean() for x in (left, right))
    return float(left @ right / math.sqrt((left @ left) * (right @ right)) * math.sqrt(left.size))


def _combined(z: Sequence[float] | np.ndarray) -> float:
    """One z-score of many that are independent (Stouffer's)."""
    return float(np.sum(z) / math.sqrt(len(z)))


def _real(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def _minus(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    if new.dtype == np.int32:
        return (new.view(np.uint32) - old.view(np.uint32)).view(np.int32)
    return new - old
