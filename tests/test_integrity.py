"""Integrity: every tampered product is noticed, no honest one is."""

from __future__ import annotations

import inspect
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedllm.errors import BoundaryError, IntegrityError
from fusedllm.kernels import native_ring
from fusedllm.model.placement import Site
from fusedllm.partition import integrity, ring
from fusedllm.partition.integrity import PRIME, Verifier
from fusedllm.partition.keystream import KeyStream

QKV, DOWN = Site("qkv", 3), Site("down", 3)
TOKENS, WIDTH, OUTPUTS = 3, 24, 20
# Of each way to tamper; seven ways.
TRIALS = 16_000
NATIVE = [False, pytest.param(True, marks=pytest.mark.skipif(not native_ring.available(), reason="not built"))]


def matrix(rows: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-127, 128, (rows, width)).astype(np.int8)


WEIGHTS = {QKV: matrix(OUTPUTS, WIDTH, 1), DOWN: matrix(OUTPUTS, WIDTH, 2)}


def honest(trials: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes `[trials, tokens, in]` and their products `[trials, tokens, out]`, with pads added and removed."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (trials, TOKENS, WIDTH)).astype(np.int8)
    codes[::7] = 0
    codes[1::7] = 127 * np.sign(WEIGHTS[QKV][rng.integers(OUTPUTS)])
    pads = rng.integers(-(2**31), 2**31, codes.shape).astype(np.int32)
    flat = (trials * TOKENS, WIDTH)
    sent = ring.add(codes.astype(np.int32), pads).reshape(flat)
    sums = ring.subtract(ring.product(sent, WEIGHTS[QKV]), ring.product(pads.reshape(flat), WEIGHTS[QKV]))
    return codes, sums.reshape(trials, TOKENS, OUTPUTS)


def somewhere(sums: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """One place in each trial."""
    count = len(sums)
    return np.arange(count), rng.integers(0, TOKENS, count), rng.integers(0, OUTPUTS, count)


def flip_bits(sums, rng):
    place = somewhere(sums, rng)
    sums[place] ^= np.int32(1) << rng.integers(0, 32, len(sums)).astype(np.int32)


def add_half_the_ring(sums, rng):
    sums.view(np.uint32)[somewhere(sums, rng)] += np.uint32(2**31)


def add_the_prime(sums, rng):
    sums.view(np.uint32)[somewhere(sums, rng)] += rng.choice(np.uint32([PRIME, 2**32 - PRIME]), len(sums))


def swap_rows(sums, rng):
    first = rng.integers(0, TOKENS, len(sums))
    second = (first + rng.integers(1, TOKENS, len(sums))) % TOKENS
    trial = np.arange(len(sums))
    sums[trial, first], sums[trial, second] = sums[trial, second], sums[trial, first]


def zeros(sums, rng):
    sums[np.arange(len(sums)), rng.integers(0, TOKENS, len(sums))] = 0


def replay(sums, rng):
    """The answer to another question."""
    sums[:] = sums[rng.permutation(len(sums))]


def another_site(sums, rng):
    codes, _ = honest(len(sums), 5)
    sums[:] = ring.product(codes.astype(np.int32).reshape(-1, WIDTH), WEIGHTS[DOWN]).reshape(sums.shape)


TAMPERING = (flip_bits, add_half_the_ring, add_the_prime, swap_rows, zeros, replay, another_site)


def passes(verifier: Verifier, codes: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Whether each trial passes, by the arithmetic of `check`, all of them at once."""
    assert verifier._secrets is not None
    secret = verifier._secrets[QKV]
    bound = verifier.bound(QKV)
    inside = ((sums >= -bound) & (sums <= bound)).all((1, 2))
    left = verifier._residues(sums.reshape(-1, OUTPUTS), secret.outputs)
    right = verifier._residues(codes.reshape(-1, WIDTH), secret.inputs)
    return inside & (left == right).reshape(len(sums), -1).all(1)


def check(verifier: Verifier, codes: np.ndarray, sums: np.ndarray) -> bool:
    try:
        verifier.check(QKV, 0, codes, sums)
    except IntegrityError:
        verifier.rotate()
        return False
    return True


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("tamper", TAMPERING, ids=lambda way: way.__name__)
def test_tampering_is_always_noticed(tamper, native):
    """Of 112,000 trials and as many natively; a product of honest sums that changed nothing passes."""
    rng = np.random.default_rng(3)
    verifier = Verifier(WEIGHTS, native=native)
    codes, sums = honest(TRIALS, 5)
    tampered = sums.copy()
    tamper(tampered, rng)
    unchanged = (tampered == sums).all((1, 2))
    assert unchanged.mean() < 0.5
    np.testing.assert_array_equal(passes(verifier, codes, tampered), unchanged)
    # And through the front door, one by one.
    for trial in range(0, TRIALS, TRIALS // 50):
        assert check(verifier, codes[trial], tampered[trial]) == unchanged[trial]


@pytest.mark.parametrize("native", NATIVE)
def test_honest_products_never_raise_an_alarm(native):
    trials = len(TAMPERING) * TRIALS
    verifier = Verifier(WEIGHTS, native=native)
    codes, sums = honest(trials, 11)
    assert passes(verifier, codes, sums).all()
    for trial in range(0, trials, trials // 200):
        verifier.check(QKV, trial, codes[trial], sums[trial])
    verifier.check(QKV, 0, codes[0][:0], sums[0][:0])


def test_every_bit_of_every_sum_counts():
    verifier = Verifier(WEIGHTS)
    codes, sums = honest(1, 2)
    flipped = np.repeat(sums, TOKENS * OUTPUTS * 32, axis=0).reshape(TOKENS * OUTPUTS, 32, TOKENS * OUTPUTS)
    for bit in range(32):
        flipped[np.arange(TOKENS * OUTPUTS), bit, np.arange(TOKENS * OUTPUTS)] ^= np.uint32(1 << bit).view(np.int32)
    flipped = flipped.reshape(-1, TOKENS, OUTPUTS)
    assert not passes(verifier, np.repeat(codes, len(flipped), axis=0), flipped).any()


def test_one_round_would_find_them_too_and_modulo_2_to_the_32_would_not():
    """Why the field: an error of 2^31 passes a check over the ring for every even secret."""
    codes, sums = honest(2000, 3)
    tampered = sums.copy()
    add_half_the_ring(tampered, np.random.default_rng(0))
    secret = np.random.default_rng(1).integers(0, 2**32, OUTPUTS, np.uint32)
    over_ring = [(y.view(np.uint32) * secret).sum(-1, dtype=np.uint32) for y in (sums, tampered)]
    missed = (over_ring[0] == over_ring[1]).all(1).mean()
    assert 0.1 < missed < 0.9
    assert not passes(Verifier(WEIGHTS, rounds=1), codes, tampered).any()


def test_a_failure_names_site_and_step_and_ends_the_session_until_secrets_rotate():
    verifier = Verifier(WEIGHTS)
    codes, sums = (part[0] for part in honest(1, 4))
    before = verifier._secrets[QKV]
    kept = before.outputs.copy()
    verifier.check(QKV, 16, codes, sums)
    with pytest.raises(IntegrityError) as caught:
        verifier.check(QKV, 17, codes, sums + 1)
    assert str(caught.value) == (
        "the product of qkv of layer 3 in step 17 is not the one that was asked for: what it was part of ends here."
    )
    assert not before.outputs.any()
    assert not before.inputs.any()
    for site in WEIGHTS:
        with pytest.raises(BoundaryError, match="its secrets are gone"):
            verifier.check(site, 18, codes, sums)
    verifier.rotate()
    verifier.check(QKV, 18, codes, sums)
    assert (verifier._secrets[QKV].outputs != kept).any()


def test_shapes_and_ranges_that_are_wrong_are_failures_like_any_other():
    codes, sums = (part[0] for part in honest(1, 4))
    for other in (sums[:2], sums[:, :4], np.concatenate([sums, sums])):
        with pytest.raises(IntegrityError):
            # Below the annotations, which the tests check and users don't.
            inspect.unwrap(Verifier.check)(Verifier(WEIGHTS), QKV, 1, codes, other)
    with pytest.raises(IntegrityError):
        Verifier(WEIGHTS).check(QKV, 1, codes, sums, in_range=False)


def test_secrets_are_uniform_over_the_field_and_drawn_again_where_they_are_outside():
    class Stream(KeyStream):
        def __init__(self) -> None:
            super().__init__()
            self.draws = [np.int32([PRIME, -1, 5, -(2**31)]), np.int32([PRIME, 7]), np.int32([9])]

        def numbers(self, shape: tuple[int, ...]) -> np.ndarray:
            return self.draws.pop(0).reshape(shape)

    # 2^31 - 1 twice, of which one is drawn twice more; the highest bit does not count.
    np.testing.assert_array_equal(integrity._uniform(Stream(), (1, 4)), [[9, 7, 5, 0]])
    first, second = (Verifier(WEIGHTS)._secrets[QKV].outputs for _ in range(2))
    assert (first != second).any()
    assert max(first.max(), second.max()) < PRIME


@given(st.integers(1, 400), st.integers(0, 2**32 - 1))
def test_numpy_residues_are_those_of_whole_numbers(width, seed):
    rng = np.random.default_rng(seed)
    secrets = rng.integers(0, PRIME, (2, width)).astype(np.uint32)
    secrets[:, ::3] = PRIME - 1
    sums = rng.integers(-(2**31), 2**31, (2, width)).astype(np.int32)
    sums[:, ::4] = -(2**31)
    for numbers in (sums, sums.astype(np.int8)):
        wanted = [[sum(map(int.__mul__, row, s)) % PRIME for s in secrets.tolist()] for row in numbers.tolist()]
        np.testing.assert_array_equal(integrity.residues(numbers, secrets), wanted)


def test_secrets_times_weights_are_exact_for_a_vocabulary():
    """As many outputs as LLaMA 3 has tokens, secrets and weights at their ends, in several parts."""
    rows, width = 128_256, 48
    weight = np.full((rows, width), -128, np.int8)
    weight[:, 1::2] = 127
    secrets = np.full((2, rows), PRIME - 1, np.uint32)
    wanted = [(PRIME - 1) * rows * value % PRIME for value in (-128, 127)] * (width // 2)
    np.testing.assert_array_equal(integrity.times(secrets, weight), [wanted, wanted])
    sums = np.full((1, rows), -(2**30) + 1, np.int32)
    assert (integrity.residues(sums, secrets) == (PRIME - 1) * (1 - 2**30) * rows % PRIME).all()


def test_checks_of_several_threads_never_pass_with_secrets_that_were_overwritten():
    codes, sums = (part[0] for part in honest(1, 4))
    passed = []
    for _ in range(20):
        verifier = Verifier(WEIGHTS)

        def checking(verifier: Verifier = verifier) -> None:
            try:
                verifier.check(QKV, 0, codes, sums + 1)
                passed.append(True)
            except BoundaryError:
                pass

        threads = [threading.Thread(target=checking) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not passed


def test_a_verifier_has_rounds():
    with pytest.raises(ValueError, match="one round or more, got 0"):
        Verifier(WEIGHTS, rounds=0)
