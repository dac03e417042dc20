"""The scheduler without a model: pages, seats, turns and order under random arrivals, cancels and preemptions."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedllm.config import Sampler, SamplingParams
from fusedllm.engine.config import EngineConfig
from fusedllm.engine.lockstep import Lockstep
from fusedllm.engine.pages import Pages
from fusedllm.engine.prefix import PrefixCache
from fusedllm.engine.replicas import least_loaded, share_of
from fusedllm.engine.request import Sequence
from fusedllm.engine.scheduler import PRIORITY_SECONDS, STEPS_WHILE_WAITING, Plan, Scheduler
from fusedllm.errors import RequestError

SMALL = EngineConfig(
    max_context=64, page_size=4, cache_tokens=96, prefill_buckets=(4, 8, 16), batch_buckets=(1, 2, 4), decode_steps=6,
    token_budget=8,
)  # fmt: skip


def request(prompt, budget=8, *, at=0.0, priority=0, salt="", deadline=None, **options) -> Sequence:
    made = Sequence(
        tuple(prompt), SamplingParams(max_tokens=budget), frozenset({-5}), budget, priority=priority, cache_salt=salt,
        deadline=deadline, **options,
    )  # fmt: skip
    made.timings.arrived = at
    return made


def next_token(ids) -> int:
    """The fake model: its next token follows from all tokens before."""
    return (sum(ids) * 31 + len(ids) * 7) % 97


class FakeDevice:
    """Runs plans as the device would, with the KV cache as tokens in pages, and checks what each launch may do."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.pages: dict[int, list[int | None]] = {page: [None] * config.page_size for page in range(config.num_pages)}
        self.slots: dict[int, dict] = {}
        self.flights: list = []
        self.answers: dict[Sequence, list[int]] = {}
        self.idle = 0

    def step(self, steps: int = 6, ahead: int = 1) -> Plan | None:
        plan = self.scheduler.plan(steps)
        if plan is not None:
            self.flights.append(self.launch(plan))
        while len(self.flights) > (ahead if plan is not None else 0):
            for job, turn, tokens in self.flights.pop(0):
                chunk = self.scheduler.accept(job, turn, tuple(tokens), ())
                if chunk is not None:
                    self.answers.setdefault(job.sequence, []).extend(chunk.tokens)
        self.check()
        return plan

    def launch(self, plan: Plan) -> list:
        made = []
        seats = [row.job.seat for row in plan.rows]
        assert None not in seats
        assert len(set(seats)) == len(seats) <= self.config.max_batch
        for row in plan.rows:
            slot = self.slots[row.job.seat]
            assert len(row.pages) <= self.config.new_pages
            slot["table"][row.entry : row.entry + len(row.pages)] = row.pages
            tokens = []
            while slot["active"] and len(tokens) < plan.steps:
                self.write(slot["table"], len(slot["ids"]) - 1, slot["ids"][-1])
                tokens.append(self.draw(slot))
            made.append((row.job, row.job.turn, tokens))
        spent = 0
        for chunk in plan.chunks:
            job = chunk.job
            # A chunk with log-probabilities has one size, whatever the budget.
            spent += 0 if job.scored else chunk.bucket
            assert chunk.length <= chunk.bucket in (*self.config.prefill_buckets, 64)
            for position in range(chunk.position, chunk.position + chunk.length):
                self.write(job.holding.pages, position, job.ids[position])
            if chunk.last:
                slot = {
                    "ids": list(job.ids), "table": list(job.holding.pages), "active": True,
                    "left": job.sequence.budget - job.sequence.generated,
                }  # fmt: skip
                self.slots[job.seat] = slot
                made.append((job, job.turn, [self.draw(slot)]))
        if plan.rows:
            assert spent <= self.config.token_budget
        return made

    def draw(self, slot) -> int:
        """Attends to everything before, which must be in the slot's pages."""
        size = self.config.page_size
        ids = slot["ids"]
        read = [self.pages[slot["table"][at // size]][at % size] for at in range(len(ids))]
        assert read == ids
        ids.append(next_token(ids))
        slot["left"] -= 1
        slot["active"] = slot["left"] > 0
        return ids[-1]

    def write(self, table, position, token) -> None:
        page = table[position // self.config.page_size]
        assert page > 0
        self.pages[page][position % self.config.page_size] = token

    def check(self) -> None:
        """No page is lost, none has two owners, and what the tree says of a page is what is in it."""
        pages, jobs = self.scheduler.pages, self.scheduler._running
        nodes = {node.page: node for node in pages._prefixes.nodes()}
        owned = [page for job in jobs for page in job.holding.pages if page not in nodes]
        free = pages._pool._free
        everything = [*owned, *nodes, *free]
        assert sorted(everything) == list(range(1, self.config.num_pages))
        assert pages.in_use + pages.cached + len(free) == self.config.num_pages - 1
        assert pages.cached == sum(not node.users for node in nodes.values())
        for page, node in nodes.items():
            assert self.pages[page] == list(node.tokens)
            assert node.users >= max((child.users for child in node.children.values()), default=0)
        seats = [job.seat for job in jobs]
        assert sorted([*seats, *self.scheduler._seats]) == list(range(self.config.max_batch))

    def run(self, limit: int = 3000) -> None:
        for _ in range(limit):
            if not self.scheduler.sequences() and not self.flights:
                return
            flies = len(self.flights)
            assert self.step() is not None or flies
        raise AssertionError("requests starve")


def expected(sequence: Sequence) -> list[int]:
    ids = list(sequence.prompt)
    for _ in range(sequence.budget):
        ids.append(next_token(ids))
    return ids[len(sequence.prompt) :]


@settings(max_examples=400)
@given(
    seed=st.integers(0, 2**32),
    share=st.booleans(),
    cache_tokens=st.sampled_from([64, 96, 300]),
    free_steps=st.sampled_from([0, 3]),
)
def test_every_token_is_accounted_for_under_random_arrivals_cancels_and_preemptions(
    seed, share, cache_tokens, free_steps
):
    rng = random.Random(seed)
    config = EngineConfig(
        max_context=64, page_size=4, cache_tokens=cache_tokens, prefill_buckets=(4, 8, 16), batch_buckets=(1, 2, 4),
        decode_steps=6, token_budget=8, prefix_cache=share, free_steps=free_steps,
    )  # fmt: skip
    device = FakeDevice(config)
    starts = [[rng.randrange(90) for _ in range(40)] for _ in range(2)]
    requests, cancelled = [], set()
    for moment in range(rng.randrange(10, 60)):
        if rng.random() < 0.5:
            prompt = rng.choice(starts)[: rng.randrange(40)] + [rng.randrange(90) for _ in range(rng.randrange(1, 12))]
            budget = rng.randrange(1, 64 - len(prompt) + 1)
            scored = 1 if rng.random() < 0.1 and len(prompt) > 1 else None
            made = request(
                prompt, budget, at=float(moment), priority=rng.randrange(-2, 3), prompt_logprobs=scored,
                salt=rng.choice(["", "a"]),
            )  # fmt: skip
            requests.append(made)
            device.scheduler.add(made)
        if requests and rng.random() < 0.1:
            victim = rng.choice(requests)
            if not victim.finished:
                cancelled.add(victim)
            before = device.scheduler.pages.in_use
            device.scheduler.end(victim, "cancelled")
            assert device.scheduler.pages.in_use <= before
        device.step(rng.randrange(1, 7), ahead=rng.randrange(2))
    device.run()
    for sequence in requests:
        answer = device.answers.get(sequence, [])
        if sequence in cancelled:
            assert answer == expected(sequence)[: len(answer)]
        else:
            assert answer == expected(sequence)
            assert sequence.finish_reason == "length"
    assert device.scheduler.pages.in_use == 0
    assert device.scheduler.num_waiting == device.scheduler.num_running == 0
    assert sum(device.scheduler.finished.values()) == len(requests)
    assert share or device.scheduler.counts["prefix_hits"] == 0


def test_when_pages_run_out_the_one_that_came_last_is_computed_again():
    device = FakeDevice(SMALL)
    requests = [request(range(10 * n, 10 * n + 20), 40, at=float(n)) for n in range(3)]
    for sequence in requests:
        device.scheduler.add(sequence)
    device.run()
    assert device.scheduler.counts["preemptions"] > 0
    assert [device.answers[sequence] for sequence in requests] == [expected(sequence) for sequence in requests]


def test_the_first_request_is_never_preempted():
    device = FakeDevice(SMALL)
    first = request(range(20), 44, at=0.0)
    device.scheduler.add(first)
    for n in range(1, 9):
        device.scheduler.add(request(range(n, n + 20), 40, at=float(n)))
    seats = set()
    while not first.finished:
        device.step()
        seats |= {job.seat for job in device.scheduler._running if job.sequence is first}
        assert all(job.turn == 0 for job in device.scheduler._running if job.sequence is first)
    assert len(seats) == 1


def test_requests_that_begin_alike_share_pages_and_their_prefill():
    device = FakeDevice(SMALL)
    shared = list(range(17))
    first, second, third = (request([*shared, tail], 4, salt=salt) for tail, salt in ((50, ""), (51, ""), (51, "key")))
    for sequence in (first, second, third):
        device.scheduler.add(sequence)
    device.step()
    device.run()
    assert (first.cached_tokens, second.cached_tokens, third.cached_tokens) == (0, 16, 0)
    again = request([*shared, 50, *device.answers[first], 3], 4)
    device.scheduler.add(again)
    device.run()
    # The answer's pages too: all but the last token had been written.
    assert again.cached_tokens == 20
    assert device.answers[again] == expected(again)


def test_a_prompt_that_is_cached_whole_still_runs_its_last_token():
    device = FakeDevice(SMALL)
    prompt = list(range(16))
    for sequence in (request(prompt, 2), again := request(prompt, 2)):
        device.scheduler.add(sequence)
        device.run()
    assert again.cached_tokens == 12
    assert device.answers[again] == expected(again)


def test_decoding_goes_on_between_the_chunks_of_a_long_prompt():
    device = FakeDevice(SMALL)
    device.scheduler.add(first := request([1], 40))
    device.step()
    device.step()
    device.scheduler.add(request(range(2, 50), 4, at=1.0))
    plans = []
    while len(plans) < 40 and not any(plan.chunks and plan.chunks[-1].last for plan in plans):
        plans.append(device.step())
    assert sum(chunk.length for plan in plans for chunk in plan.chunks) == 48
    assert all(sum(chunk.bucket for chunk in plan.chunks) <= SMALL.token_budget for plan in plans)
    assert all([row.job.sequence for row in plan.rows] == [first] and plan.steps == 1 for plan in plans)


def test_launches_are_long_only_while_nobody_waits():
    device = FakeDevice(SMALL)
    device.scheduler.add(request([1], 40))
    device.step()
    assert device.step().steps == 6
    for n in range(4):
        device.scheduler.add(request([n + 2], 40, at=1.0))
    device.step()
    plans = [device.step() for _ in range(3)]
    assert plans[-1].steps == STEPS_WHILE_WAITING


class Anything:
    def mask(self):
        return np.full(4, 2**32 - 1, np.uint32)

    def accept(self, token):
        self.taken = [*getattr(self, "taken", []), token]


def test_steps_that_nobody_is_asked_for_are_whole_turns_but_with_a_grammar():
    config = dataclasses.replace(SMALL, free_steps=3)
    for options, wanted in (({}, [3, 6]), ({"constraint": Anything()}, [1])):
        device = FakeDevice(config)
        device.scheduler.add(request(range(5), budget=20, **options))
        plans = [device.step(steps) for steps in (6, 1, 2, 4, 6)]
        assert sorted({plan.steps for plan in plans if plan.rows}) == wanted
        assert {plan.sampler is Sampler.FULL for plan in plans if plan.rows} == {bool(options)}


def test_a_lower_priority_goes_first_and_waiting_makes_up_for_it():
    config = EngineConfig(max_context=64, page_size=4, prefill_buckets=(4,), batch_buckets=(1,), token_budget=4)
    device = FakeDevice(config)
    late = request([3], 1, at=PRIORITY_SECONDS + 1, priority=-1)
    usual = request([2], 1, at=0.5)
    urgent = request([1], 1, at=1.0, priority=-1)
    for sequence in (late, usual, urgent):
        device.scheduler.add(sequence)
    device.run()
    assert list(device.answers) == [urgent, usual, late]


def test_a_request_past_its_deadline_is_named():
    scheduler = Scheduler(SMALL)
    waiting, patient = request([1], deadline=5.0), request([1])
    scheduler.add(waiting)
    scheduler.add(patient)
    assert scheduler.overdue(4.9) == []
    assert scheduler.overdue(5.0) == [waiting]
    scheduler.end(waiting, "deadline")
    assert (waiting.finish_reason, scheduler.num_waiting) == ("deadline", 1)


def test_a_step_with_a_grammar_is_one_step():
    device = FakeDevice(SMALL)
    grammar = Anything()
    device.scheduler.add(sequence := request([1], 5, constraint=grammar))
    while not sequence.finished:
        plan = device.step(ahead=0)
        assert plan is None or plan.steps == 1
        assert device.scheduler.constrained != sequence.finished
    assert grammar.taken == expected(sequence)[:4]


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_a_grammar_that_gives_up_ends_its_request_alone_with_its_sentence(tokens):
    class GivesUp:
        left = tokens

        def mask(self):
            if not self.left:
                raise RequestError("the grammar takes too long to follow.")
            self.left -= 1
            return np.full(4, 2**32 - 1, np.uint32)

        def accept(self, token):
            pass

    device = FakeDevice(SMALL)
    hard, easy = request([1], 5, constraint=GivesUp()), request([2], 5)
    assert device.scheduler.add(hard) == (tokens > 0)
    assert device.scheduler.add(easy)
    device.run()
    assert device.answers[easy] == expected(easy)
    assert device.answers.get(hard, []) == expected(hard)[:tokens]
    assert (hard.finish_reason, hard.error) == ("error", "the grammar takes too long to follow.")
    assert device.scheduler.finished == {"error": 1, "length": 1}


def test_prefixes_are_given_up_least_recently_used_first_and_from_their_ends():
    cache = PrefixCache(2)
    held = []
    for branch in (5, 6):
        start = cache.add(None, (1, 2), 1)
        held.append([start, cache.add(start, (branch, branch), branch)])
    assert cache.unused == 0
    assert cache.evict(5) == []
    for nodes in held:
        for node in reversed(nodes):
            cache.release(node)
    assert [node.page for node in cache.match((1, 2, 6, 6, 9))] == [1, 6]
    assert (cache.unused, cache.evict(2), cache.unused) == (3, [5, 6], 1)
    assert (cache.evict(9), cache.unused, cache.match((1, 2))) == ([1], 0, [])


def test_the_order_of_eviction_stays_small_however_often_a_page_is_used():
    cache = PrefixCache(1)
    cache.release(node := cache.add(None, (1,), 1))
    for _ in range(10_000):
        cache.use(node)
        cache.release(node)
    assert len(cache._order) < 200
    assert cache.evict(1) == [1]


def test_pages_that_two_requests_made_of_the_same_tokens_are_kept_once():
    pages = Pages(9, 2)
    first, second = pages.hold_prefix([1, 2, 3], ""), pages.hold_prefix([1, 2, 3], "")
    assert pages.grow(first, 3)
    assert pages.grow(second, 3)
    for holding in (first, second):
        pages.publish(holding, [1, 2, 3], "")
    assert pages.in_use == 4
    pages.release(first)
    # The second one uses its own page, so that the first one's can go.
    assert (pages.in_use, pages.cached, pages.free) == (2, 1, 6)
    pages.publish(second, [1, 2, 3], "", last=True)
    pages.release(second)
    assert (pages.in_use, pages.cached, pages.free) == (0, 1, 8)


def test_a_request_that_reads_its_prompt_anew_is_not_starved_by_the_cached_one():
    config = EngineConfig(max_context=64, page_size=4, cache_tokens=64, prefill_buckets=(16,), batch_buckets=(1,))
    device = FakeDevice(config)
    prompt = list(range(48))
    for logprobs in (None, 1):
        device.scheduler.add(sequence := request(prompt, 16, prompt_logprobs=logprobs))
        device.run(limit=60)
        assert device.answers[sequence] == expected(sequence)


@pytest.mark.parametrize("positions", [0, 1, 2, 3])
def test_a_holding_grows_to_what_is_asked_or_not_at_all(positions):
    pages = Pages(2, 2)
    holding = pages.hold_prefix([1], "")
    assert pages.grow(holding, positions) == (positions <= 2)
    assert len(holding.pages) == (-(-positions // 2) if positions <= 2 else 0)


def test_who_came_and_went_while_others_wait_leaves_nothing_in_the_queue():
    scheduler = Scheduler(SMALL)
    kept = [request([1, 2, 3], at=0.0) for _ in range(6)]
    for sequence in kept:
        scheduler.add(sequence)
    while scheduler.num_running < SMALL.max_batch:
        scheduler.plan(1)
    for at in range(1000):
        sequence = request(range(20), at=float(at + 1))
        scheduler.add(sequence)
        scheduler.end(sequence, "cancelled")
    assert len(scheduler._waiting) < 100
    assert {job.sequence for _, job in scheduler._waiting} >= set(kept[SMALL.max_batch :])


def answers(seed: int, clock: float, random_seed: int = 9) -> tuple[list[Plan | None], list[int]]:
    """The plans, as far as they can be compared, and the seeds of a process whose clock runs `clock` times as fast."""
    rng = random.Random(seed)
    config = EngineConfig(
        max_context=64, page_size=4, cache_tokens=64, prefill_buckets=(4, 8, 16), batch_buckets=(1, 2, 4),
        decode_steps=6, token_budget=8,
    )  # fmt: skip
    device, lockstep = FakeDevice(config), Lockstep(random_seed)
    plans, seeds = [], []
    for moment in range(30):
        for _ in range(rng.randrange(3)):
            prompt = [rng.randrange(90) for _ in range(rng.randrange(1, 30))]
            made = request(prompt, rng.randrange(1, 30), at=moment * clock, priority=rng.randrange(-2, 3))
            lockstep.settle(made)
            seeds.append(made.seed)
            device.scheduler.add(made)
        plan = device.step(6)
        plans.append(plan and (
            plan.steps, [(row.job.ids, row.job.seat, row.pages) for row in plan.rows],
            [(chunk.job.ids, chunk.job.holding.pages[:], chunk.position, chunk.bucket) for chunk in plan.chunks],
        ))  # fmt: skip
    return plans, seeds


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32))
def test_processes_plan_alike_whatever_their_clocks_say(seed):
    assert answers(seed, clock=0.001) == answers(seed, clock=500.0)
    assert answers(seed, clock=1.0)[1] != answers(seed, clock=1.0, random_seed=8)[1] or not answers(seed, 1.0)[1]


def test_processes_keep_a_seed_that_was_given_and_take_no_deadlines():
    lockstep = Lockstep(1)
    seeded = Sequence((1,), SamplingParams(seed=5), frozenset(), 1)
    lockstep.settle(seeded)
    assert seeded.seed == 5
    with pytest.raises(RequestError, match="takes no deadlines"):
        lockstep.settle(request([1, 2], deadline=5.0))


class FakeEngine:
    """A group of devices: what `least_loaded` asks, and what `FakeDevice` does."""

    def __init__(self, config: EngineConfig) -> None:
        self.device = FakeDevice(config)

    @property
    def load(self) -> int:
        return len(self.device.scheduler.sequences())

    @property
    def pages_in_use(self) -> int:
        return self.device.scheduler.pages.in_use


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), groups=st.integers(2, 4))
def test_groups_answer_every_request_and_none_waits_where_another_is_idle(seed, groups):
    rng = random.Random(seed)
    whole = EngineConfig(
        max_context=64, page_size=4, cache_tokens=256, prefill_buckets=(4, 8, 16), batch_buckets=(1, 2, 4),
        decode_steps=6, token_budget=8,
    )  # fmt: skip
    engines = [FakeEngine(share_of(whole, groups)) for _ in range(groups)]
    requests = []
    for _ in range(rng.randrange(5, 30)):
        for _ in range(rng.randrange(3)):
            prompt = [rng.randrange(90) for _ in range(rng.randrange(1, 30))]
            requests.append(request(prompt, rng.randrange(1, 64 - len(prompt) + 1)))
            chosen = least_loaded(engines)
            assert chosen.load == min(engine.load for engine in engines)
            chosen.device.scheduler.add(requests[-1])
        for engine in engines:
            engine.device.step(rng.randrange(1, 7))
    for engine in engines:
        engine.device.run()
    answered = {sequence: ids for engine in engines for sequence, ids in engine.device.answers.items()}
    assert answered == {sequence: expected(sequence) for sequence in requests}
