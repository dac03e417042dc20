"""Pads under a running engine: none is used twice, whatever fails, and where there are none it is said."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from test_masked import boundary_of, under

from fusedllm.errors import BoundaryError, PadExhaustedError, PadReuseError
from fusedllm.partition import ring
from fusedllm.partition.pad_ledger import PadLedger
from fusedllm.partition.pad_pool import PadPool
from fusedllm.partition.pad_supply import PoolLimits
from fusedllm.partition.policies import POLICIES


@pytest.fixture
def llm(w8a8):
    made = under(w8a8, "masked")
    yield made
    boundary_of(made).close()


def answers(llm, **parameters):
    prompt = list(range(3, 12))
    return [answer.token_ids for answer in llm.generate([prompt] * 2, max_tokens=6, ignore_eos=True, **parameters)]


def limited(llm, **limits) -> PadPool:
    """Gives `llm` a session with other limits."""
    boundary = boundary_of(llm)
    boundary.pool.close()
    boundary.pool = PadPool(boundary._weights, PoolLimits(**limits), ledger=PadLedger(keep_events=True))
    return boundary.pool


def check_nothing_was_used_twice(pool: PadPool) -> None:
    sent: dict[str, set[int]] = {}
    for event in pool.ledger.events:
        if event.kind == "sent":
            rows = set(range(event.first, event.first + event.rows))
            assert not rows & sent.setdefault(event.site, set())
            sent[event.site] |= rows


def test_pads_that_run_out_under_load_end_the_requests_with_a_sentence_and_no_others(llm):
    expected = answers(llm)
    pool = limited(llm, capacity=20, low_water=0, exhausted="raise")
    pool.fill()
    with pytest.raises(PadExhaustedError, match=r"rows of pads are needed for .*; fill the pool"):
        answers(llm)
    # Filled again, it goes on where it can.
    with pytest.raises(PadExhaustedError, match="open the session with a larger capacity"):
        llm.generate([list(range(3, 30))], max_tokens=1)
    pool.fill()
    assert llm.generate([[5]], max_tokens=2, ignore_eos=True)[0].token_ids
    check_nothing_was_used_twice(pool)
    limited(llm, capacity=64, exhausted="wait")
    assert answers(llm) == expected


def test_waiting_for_pads_under_load_is_the_same_answer_later(llm):
    expected = answers(llm)
    pool = limited(llm, capacity=32, low_water=4, batch=8, exhausted="wait", seconds=60)
    assert answers(llm) == expected
    check_nothing_was_used_twice(pool)


def test_a_crash_between_burn_and_send_loses_the_pads(llm, monkeypatch):
    expected = answers(llm)
    pool = limited(llm, capacity=64, exhausted="make")
    encode, crossings = ring.encode, []

    def crashing(rows, pads=None, **options):
        crossings.append(len(rows))
        if len(crossings) == 7:
            raise KeyboardInterrupt
        return encode(rows, pads, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ring, "encode", crashing)
        with pytest.raises(KeyboardInterrupt):
            answers(llm)
    assert answers(llm) == expected
    burned, sent, wiped = np.sum(
        [pool.ledger.counts(pool.session, supply.name) for supply in pool._supplies.values()], axis=0
    )
    assert burned == wiped >= sent
    check_nothing_was_used_twice(pool)


def test_a_pool_that_hands_out_the_same_rows_again_is_found_out(llm, monkeypatch):
    pool = boundary_of(llm).pool
    supply = next(iter(pool._supplies.values()))
    pop, first = type(supply).pop, {}

    def again(self, rows):
        pieces = pop(self, rows)
        return first.setdefault((self.name, rows), pieces)

    monkeypatch.setattr(type(supply), "pop", again)
    with pytest.raises(PadReuseError, match="burned before"):
        answers(llm)


def test_two_sessions_at_once_have_nothing_in_common(llm, w8a8, monkeypatch):
    other = under(w8a8, "masked+verify")
    expected = answers(llm)
    encode, rows_of_pads, lock = ring.encode, [], threading.Lock()

    def recording(rows, pads=None, **options):
        with lock:
            rows_of_pads.extend(row.tobytes() for row in pads)
        return encode(rows, pads, **options)

    monkeypatch.setattr(ring, "encode", recording)
    found: dict[int, list[list[list[int]]]] = {0: [], 1: []}

    def ask(which, model):
        for _ in range(3):
            found[which].append(answers(model))

    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate((llm, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    boundary_of(other).close()
    assert found[0] == found[1] == [expected] * 3
    assert len(set(rows_of_pads)) == len(rows_of_pads) > 500


@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy.crosses])
def test_a_closed_session_answers_nothing(w8a8, policy):
    llm = under(w8a8, policy)
    answers(llm)
    llm.close()
    with pytest.raises(BoundaryError, match="this session is closed, and nothing crosses any more"):
        answers(llm)
    llm.close()
    assert llm.boundary_report()
