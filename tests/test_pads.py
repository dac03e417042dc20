"""Pads: uniform, used once whatever happens, and never in two places."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedllm.errors import BoundaryError, PadExhaustedError, PadReuseError
from fusedllm.model.placement import Site
from fusedllm.partition import keystream as keystream_module
from fusedllm.partition import pad_pool, ring
from fusedllm.partition.keystream import KeyStream
from fusedllm.partition.pad_ledger import PadLedger
from fusedllm.partition.pad_pool import PadPool
from fusedllm.partition.pad_supply import PoolLimits
from fusedllm.partition.pads import site_name

QKV, DOWN = Site("qkv", 0), Site("down", 3)
CIPHERS = ("aes-256-ctr", "chacha20")


def matrix(rows: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-127, 128, (rows, width)).astype(np.int8)


WEIGHTS = {QKV: matrix(24, 16, 1), DOWN: matrix(16, 40, 2)}


def still(capacity: int = 32, low_water: int = 0, batch: int = 8, ledger: PadLedger | None = None, **limits) -> PadPool:
    """A pool without a thread, so that nothing happens but what a test does."""
    limits = PoolLimits(capacity, low_water, batch, **limits)
    return PadPool(WEIGHTS, limits, ledger=ledger or PadLedger(keep_events=True), background=False)


def burned(ledger: PadLedger) -> list[tuple[str, str, int]]:
    """Every row that was burned, one by one."""
    assert ledger.events is not None
    return [
        (event.session, event.site, row)
        for event in ledger.events
        if event.kind == "burned"
        for row in range(event.first, event.first + event.rows)
    ]


@pytest.mark.parametrize("cipher", CIPHERS)
def test_numbers_are_those_of_the_cipher_and_of_no_other_stream(cipher, monkeypatch):
    """An AES block and a ChaCha20 block of a key of zeros, as FIPS 197's and RFC 8439's authors have them elsewhere."""
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))
    known = {"aes-256-ctr": "dc95c078a2408989ad48a21492842087", "chacha20": "76b8e0ada0f13d90405d6ae55386bd28"}
    assert KeyStream(cipher).numbers((4,)).tobytes().hex() == known[cipher]
    monkeypatch.undo()
    first, second = KeyStream(cipher).numbers((8, 8)), KeyStream(cipher).numbers((8, 8))
    assert (first != second).any()


@pytest.mark.parametrize("cipher", CIPHERS)
def test_a_stream_goes_on_where_it_was(cipher, monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))
    # More than is encrypted at a time.
    whole = KeyStream(cipher).numbers((3, 2**18 + 5)).ravel()
    stream = KeyStream(cipher)
    parts = [stream.numbers((count,)) for count in (16, 2**18 + 3 * 16, whole.size - 2**18 - 4 * 16)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("cipher", CIPHERS)
def test_numbers_are_uniform_over_the_ring(cipher):
    numbers = KeyStream(cipher).numbers((2**18,))
    assert numbers.dtype == np.int32
    # Chi-square of 256 values has mean 255 and deviation 22.6; ten deviations are left to chance.
    for byte in numbers.view(np.uint8).reshape(-1, 4).T:
        counts = np.bincount(byte, minlength=256)
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 255 + 10 * 22.6
    # Of the mean, a deviation is 2^32 / sqrt(12 * 2^18).
    assert abs(numbers.astype(np.float64).mean()) < 8 * 2**32 / np.sqrt(12 * 2**18)


def test_a_key_is_replaced_before_its_stream_is_too_long(monkeypatch):
    monkeypatch.setattr(keystream_module, "MOST_STREAM_BYTES", 2**10)
    keys = []
    genuine = os.urandom
    monkeypatch.setattr(os, "urandom", lambda count: keys.append(count) or genuine(count))
    stream = KeyStream()
    drawn = [stream.numbers((2**6,)) for _ in range(8)]
    assert keys == [32, 32]
    assert len(np.unique(np.concatenate(drawn))) > 2**9 - 2


def test_a_pad_is_r_and_r_w_exactly():
    with still() as pool:
        pool.fill()
        for site, weight in WEIGHTS.items():
            # Across the batches in which they were made.
            for rows in (3, 8, 13):
                pads = pool.take(site, rows)
                r, product = pads.outgoing(), pads.incoming()
                assert r.shape == (rows, weight.shape[1])
                np.testing.assert_array_equal(product, ring.product(r, weight, native=False))


def test_a_masked_message_comes_back_and_the_pads_are_overwritten():
    weight = WEIGHTS[QKV]
    codes = matrix(5, 16, 9).astype(np.int32)
    with still() as pool:
        pool.fill()
        with pool.take(QKV, 5) as pads:
            r = pads.outgoing()
            received = ring.product(ring.add(codes, r), weight)
            product = pads.incoming()
            np.testing.assert_array_equal(ring.subtract(received, product), codes @ weight.T.astype(np.int32))
            assert r.any()
            assert product.any()
        assert not r.any()
        assert not product.any()
        assert pool.ledger.counts(pool.session, "qkv of layer 0") == (5, 5, 5)


def test_a_second_use_is_refused():
    with still() as pool:
        pool.fill()
        pads = pool.take(QKV, 2)
        with pytest.raises(PadReuseError, match="rows 0 to 1 of the pads of qkv of layer 0 are used"):
            pads.incoming()
        pads.outgoing()
        with pytest.raises(PadReuseError, match="are used"):
            pads.outgoing()
        pads.incoming()
        for again in (pads.outgoing, pads.incoming):
            with pytest.raises(PadReuseError, match="are used"):
                again()
        pads.wipe()
        pads.wipe()
        other = pool.take(QKV, 1)
        other.wipe()
        with pytest.raises(PadReuseError, match="are used"):
            other.outgoing()


def test_what_is_lost_between_burning_and_sending_is_never_used():
    ledger = PadLedger(keep_events=True)
    with still(ledger=ledger) as pool:
        pool.fill()
        lost = pool.take(QKV, 4)
        seen = lost._r.copy()
        del lost
        with pytest.raises(ZeroDivisionError), pool.take(QKV, 4) as pads:
            raise ZeroDivisionError
        assert not pads._r.any()
        assert ledger.counts(pool.session, "qkv of layer 0") == (8, 0, 4)
        following = pool.take(QKV, 4)
        assert following.first == 8
        assert not (following.outgoing() == seen).all(1).any()
    assert len(burned(ledger)) == len(set(burned(ledger))) == 12


def test_state_moves_before_pads_are_handed_out(monkeypatch):
    """Whatever fails while pads are handed out, their rows are gone."""
    with still() as pool:
        pool.fill()

        def failing(*arguments: object) -> None:
            raise MemoryError

        monkeypatch.setattr(pad_pool, "Pads", failing)
        with pytest.raises(MemoryError):
            pool.take(DOWN, 3)
        monkeypatch.undo()
        assert pool.take(DOWN, 1).first == 3


def test_pads_are_never_copied_pickled_or_checkpointed():
    with still() as pool:
        pool.fill()
        for secret in (pool.take(QKV, 1), pool, KeyStream()):
            for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(PadReuseError, match="can't be copied"):
                    attempt(secret)


FORK = """
import os
import numpy as np
from fusedllm.errors import PadReuseError
from fusedllm.partition.keystream import KeyStream
from fusedllm.partition.pad_pool import PadPool
from fusedllm.partition.pad_supply import PoolLimits

weights = {"qkv": np.ones((24, 16), np.int8)}
pool = PadPool(weights, PoolLimits(8, 4))
pool.fill()
pads, stream = pool.take("qkv", 1), KeyStream()
child = os.fork()
if child == 0:
    refused = 0
    for attempt in (lambda: pool.take("qkv", 1), pads.outgoing, lambda: stream.numbers((1,)), pool.fill):
        try:
            attempt()
        except PadReuseError as error:
            refused += "was forked from it" in str(error)
    dropped = pool.report()["qkv"].waiting == 0 and pads._r.size == 0
    pads.wipe()
    pool.close()
    with PadPool(weights, PoolLimits(8, 4)) as own:
        works = own.take("qkv", 1).outgoing().any() and own.session != pool.session
    os._exit(0 if refused == 4 and dropped and works else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), pads.outgoing().any(), pool.take("qkv", 8).first)
"""


def test_a_forked_process_has_no_pads():
    """In a process of its own, where nothing else has made threads; the parent goes on with what it had."""
    command = [sys.executable, "-W", "ignore", "-c", FORK]
    assert subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split() == [
        "0",
        "True",
        "1",
    ]


def test_exhaustion_is_an_error_where_nobody_refills():
    with still(capacity=8, exhausted="raise") as pool:
        pool.fill()
        pool.take(QKV, 7)
        with pytest.raises(PadExhaustedError, match="2 rows of pads are needed for qkv of layer 0, and 1 wait; fill"):
            pool.take(QKV, 2)
        assert pool.take(QKV, 1).first == 7
        with pytest.raises(PadExhaustedError, match=r"9 rows of pads are needed .* of 8 at most; open"):
            pool.take(QKV, 9)
    with still(capacity=8, exhausted="wait") as pool, pytest.raises(PadExhaustedError, match="fill the pool"):
        pool.take(QKV, 1)


def test_a_take_that_makes_its_own_pads_gets_as_many_as_it_asks_for():
    with still(capacity=8, exhausted="make") as pool:
        pads = pool.take(QKV, 21)
        r = pads.outgoing()
        np.testing.assert_array_equal(pads.incoming(), ring.product(r, WEIGHTS[QKV]))
        assert pool.take(QKV, 1).first == 21


def test_waiting_ends_with_the_refill_or_with_an_error(monkeypatch):
    slow = threading.Event()
    genuine = ring.product
    monkeypatch.setattr(ring, "product", lambda *operands: slow.wait(10) and genuine(*operands))
    with PadPool(WEIGHTS, PoolLimits(8, 4, 4, seconds=0.05)) as pool:
        with pytest.raises(PadExhaustedError, match=r"1 rows .* and 0 wait after 0\.05 seconds; open the session"):
            pool.take(QKV, 1)
        slow.set()
    with PadPool(WEIGHTS, PoolLimits(8, 4, 4, seconds=30)) as pool:
        # All of them, again and again: each time from below the mark, and more than a batch.
        firsts = [pool.take(DOWN, 8).first for _ in range(5)]
        assert firsts == [0, 8, 16, 24, 32]


def test_the_background_keeps_every_site_between_its_marks():
    with PadPool(WEIGHTS, PoolLimits(capacity=12, low_water=6, batch=5)) as pool:

        def waiting() -> list[int]:
            return [report.waiting for report in pool.report().values()]

        def settled(wanted: list[int]) -> bool:
            deadline = time.monotonic() + 20
            while waiting() != wanted and time.monotonic() < deadline:
                time.sleep(0.002)
            return waiting() == wanted

        assert settled([12, 12])
        # Down to the mark nothing is made, and below it up to the capacity.
        pool.take(QKV, 6)
        time.sleep(0.02)
        assert waiting() == [6, 12]
        pool.take(QKV, 1)
        assert settled([12, 12])
        report = pool.report()[QKV]
        assert report.rows == 19
        assert report.row_bytes == 4 * (16 + 24)
        assert report.rows_per_second > 0


def test_a_refill_that_fails_ends_the_session(monkeypatch):
    def failing(*operands: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ring, "product", failing)
    with (
        PadPool(WEIGHTS, PoolLimits(8, 4, seconds=20)) as pool,
        pytest.raises(BoundaryError, match="can't be refilled"),
    ):
        pool.take(QKV, 1)


def test_a_closed_session_has_overwritten_its_pads():
    pool = still()
    pool.fill()
    waiting = [segment.r for supply in pool._supplies.values() for segment in supply.segments]
    assert all(r.any() for r in waiting)
    pool.close()
    assert not any(r.any() for r in waiting)
    with pytest.raises(BoundaryError, match="this session is closed"):
        pool.take(QKV, 1)


def test_takers_at_once_never_share_a_row():
    """Four threads, two sessions and one ledger, more rows than the pools hold."""
    ledger = PadLedger(keep_events=True)
    limits = (PoolLimits(16, 8, 8, seconds=30), PoolLimits(16, 8, 8, exhausted="make"))
    pools = [PadPool(WEIGHTS, limit, ledger=ledger) for limit in limits]
    seen: list[bytes] = []
    problems: list[BaseException] = []

    def taking(pool: PadPool, seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(40):
                with pool.take(QKV if rng.random() < 0.7 else DOWN, int(rng.integers(1, 9))) as pads:
                    seen.extend(row.tobytes() for row in pads.outgoing())
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=taking, args=(pools[i % 2], i)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pool in pools:
        pool.close()
    assert not problems
    rows = burned(ledger)
    assert len(rows) == len(set(rows)) == len(seen) == len(set(seen))
    assert {session for session, _, _ in rows} == {pool.session for pool in pools}
    for pool in pools:
        for site in WEIGHTS:
            count = ledger.counts(pool.session, site_name(site))
            assert count[0] == count[1] == count[2] > 0


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=30))
def test_the_ledger_burns_every_row_once_in_any_order(ranges):
    ledger, rows = PadLedger(), set()
    for first, count in ranges:
        asked = set(range(first, first + count))
        if asked & rows:
            with pytest.raises(PadReuseError, match=f"rows {first} to {first + count - 1} .* were burned before"):
                ledger.burn("s", "qkv", first, count)
        else:
            ledger.burn("s", "qkv", first, count)
            rows |= asked
    assert ledger.counts("s", "qkv") == (len(rows), 0, 0)
    # The same numbers in another session, or at another site, are other pads.
    for first, count in ranges[:1]:
        ledger.burn("t", "qkv", first, count)
        ledger.burn("s", "o", first, count)


def test_the_ledger_lets_nobody_send_what_was_not_burned_or_was_sent():
    ledger = PadLedger()
    with pytest.raises(PadReuseError, match="can't hide a message"):
        ledger.send("s", "qkv", 0, 2)
    ledger.burn("s", "qkv", 0, 2)
    ledger.send("s", "qkv", 0, 2)
    with pytest.raises(PadReuseError, match="can't hide a message"):
        ledger.send("s", "qkv", 0, 2)
    ledger.wipe("s", "qkv", 0, 2)
    with pytest.raises(PadReuseError, match="can't hide a message"):
        ledger.send("s", "qkv", 0, 2)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="a low-water mark within the capacity"):
        PoolLimits(capacity=4, low_water=5)
    with pytest.raises(ValueError, match="int8 weight of 1 to 65536 columns"):
        PadPool({QKV: np.ones((2, 65537), np.int8)}, background=False)
    with still() as pool:
        with pytest.raises(ValueError, match="one row or more, got 0"):
            pool.take(QKV, 0)
        with pytest.raises(BoundaryError, match="no pads for head"):
            pool.take(Site("head"), 1)
