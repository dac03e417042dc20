"""Three forms of one crossing: equal answers, the order that the trusted side knows, ends that hang nobody."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY, TINY_ENGINE
from test_engine import ids

from fusedllm.cli.main import main
from fusedllm.cli.options import CROSSINGS as CLI_CROSSINGS
from fusedllm.errors import BoundaryError, IntegrityError, PadExhaustedError, PolicyError
from fusedllm.kernels import native
from fusedllm.llm import LLM, load
from fusedllm.model.placement import Site
from fusedllm.partition import in_program
from fusedllm.partition.in_program import VIAS, InProgram
from fusedllm.partition.integer import integer_product
from fusedllm.partition.link import Driven
from fusedllm.partition.meeting import NativeMeeting
from fusedllm.partition.policies import CROSSINGS
from fusedllm.quantizing import quantize
from fusedllm.weights.random import random_params

ROOT = Path(__file__).parent.parent
WIDTH = 64
LAYERS = 2
needs_native = pytest.mark.skipif(native.why_unavailable() is not None, reason="the native kernels are not there")
# A form of this machine.
FORMS = [pytest.param(via, marks=[needs_native] if via == "ffi" else []) for via in VIAS]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The tiny model in w8a8, with a head of its own."""
    from reference import tiny

    return quantize(tiny.write("llama3", tmp_path_factory.mktemp("model")), "w8a8")


def under(table, policy, crossing) -> LLM:
    if policy == "split":
        return LLM(TINY, random_params(TINY, "float32", seed=1), engine=TINY_ENGINE, policy=policy, crossing=crossing)
    return load(table, policy=policy, crossing=crossing, engine=TINY_ENGINE)


def boundary_of(llm):
    return llm._applied.placement.boundary


def answers(llm, prompts, **parameters):
    return [found.token_ids for found in llm.generate(prompts, max_tokens=6, ignore_eos=True, **parameters)]


# Of ids that both vocabularies have.
PROMPTS = [[token % 80 for token in ids(length, seed=length)] for length in (1, 16, 37)]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a model answers, and what crossed for it."""

    tokens: list
    logits: np.ndarray
    crossed: list

    @classmethod
    def of(cls, llm) -> Found:
        tokens, logits = answers(llm, PROMPTS), llm.logits(PROMPTS[2])
        sites = sorted(llm.boundary.sites.items())
        return cls(tokens, logits, [(name, s.count, s.bytes_to_device, s.bytes_to_host) for name, s in sites])


@pytest.fixture(scope="module")
def driven(table):
    """By policy; all those of integers give what `masked+verify` does."""
    made = {policy: under(table, policy, "driven") for policy in ("split", "masked+verify")}
    yield {policy: Found.of(llm) for policy, llm in made.items()}
    for llm in made.values():
        boundary_of(llm).close()


@pytest.mark.parametrize("via", FORMS)
@pytest.mark.parametrize("policy", ["split", "verify", "masked", "masked+verify"])
def test_every_policy_gives_the_same_bits_over_every_form_with_as_many_crossings(table, driven, policy, via):
    llm = under(table, policy, via)
    expected, found = driven["split" if policy == "split" else "masked+verify"], Found.of(llm)
    assert found.tokens == expected.tokens
    np.testing.assert_array_equal(found.logits, expected.logits)
    assert found.crossed == expected.crossed
    boundary_of(llm).close()


def weights(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(-127, 128, (8, WIDTH)).astype(np.int8)


def linked(via, product=None, **options) -> tuple[InProgram, list]:
    """A link with the sites of a small model, in the order of a pass: the head comes last."""
    device = jax.devices("cpu")[1]
    product = product or integer_product(implementation="xla")
    link = Driven(device, product) if via == "driven" else InProgram(device, product, via=via, **options)
    sites = [Site(name, layer) for layer in range(LAYERS) for name in ("qkv", "o", "gate_up", "down")]
    placed = [link.place(site, (weights(number),)) for number, site in enumerate([*sites, Site("head")])]
    return link, placed


def numbers(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**31), 2**31, (rows, WIDTH)).astype(np.int32)


def run_pass(link, placed, rows=2) -> None:
    """A whole pass, each product compared with NumPy's."""
    for index, site in enumerate(placed):
        # In the last layer but its first product, and in the head, there may be fewer rows.
        sent = numbers(rows if index <= 4 * (LAYERS - 1) else 1, seed=index)
        (found,) = link.exchange(site, sent)
        expected = sent.astype(np.int64) @ weights(index).T.astype(np.int64)
        np.testing.assert_array_equal(found, expected.astype(np.uint64).astype(np.uint32).view(np.int32))


@pytest.mark.parametrize("via", ["driven", *FORMS])
def test_a_pass_of_any_number_of_rows_has_the_products_of_numpy(via):
    link, placed = linked(via)
    for rows in (2, 1, 2, 5):
        run_pass(link, placed, rows)
    link.close()


@pytest.mark.parametrize("via", FORMS)
def test_a_pass_is_three_launches(via):
    link, placed = linked(via)
    run_pass(link, placed)
    assert {first: len(sites) for first, sites in link._cut().items()} == {0: 5, 5: 3, 8: 1}
    assert len(link._compiled) == 3
    run_pass(link, placed)
    assert len(link._compiled) == 3
    link.close()


@pytest.mark.parametrize("via", FORMS)
@pytest.mark.parametrize("wrong", ["a later site", "the same site again", "other rows", "other numbers"])
def test_what_is_not_next_ends_the_pass_and_the_next_one_is_good(via, wrong):
    link, placed = linked(via)
    link.exchange(placed[0], numbers(2))
    link.exchange(placed[1], numbers(2))
    site, sent = {
        "a later site": (placed[3], numbers(2)),
        "the same site again": (placed[1], numbers(2)),
        "other rows": (placed[2], numbers(3)),
        "other numbers": (placed[2], numbers(2).astype(np.float32)),
    }[wrong]
    with pytest.raises(BoundaryError, match=r"not what comes next, which is gate_up of layer 0 of 2 rows"):
        link.exchange(site, sent)
    with pytest.raises(BoundaryError, match="which is a pass"):
        link.exchange(placed[2], numbers(2))
    run_pass(link, placed)
    link.close()


class Lying:
    """A device whose program says of a product what it should not."""

    def __init__(self, meeting, lie) -> None:
        self._ask, self._lie = meeting.ask, lie

    def ask(self, last, results, number, operand):
        return self._ask(*self._lie(last, results, number, operand))


LIES = {
    "asks for a later product": (
        lambda last, results, number, operand: (last, results, 3 if number == 2 else number, operand),
        "another product than the next",
    ),
    "gives results of another product": (
        lambda last, results, number, operand: (0 if last == 1 else last, results, number, operand),
        "another product than the next",
    ),
    "asks twice": (
        lambda last, results, number, operand: (None if last == 1 else last, results, number, operand),
        "another product than the next",
    ),
    "asks for more rows": (
        lambda last, results, number, operand: (
            last,
            results,
            number,
            jax.ShapeDtypeStruct((operand.shape[0] + 1, operand.shape[1]), operand.dtype) if number == 2 else operand,
        ),
        "another number of rows or columns",
    ),
    "gives fewer rows": (
        lambda last, results, number, operand: (
            last,
            tuple(result[:-1] for result in results) if last == 1 else results,
            number,
            operand,
        ),
        "another number of rows or columns",
    ),
    "gives one result too many": (
        lambda last, results, number, operand: (last, results * 2 if last == 1 else results, number, operand),
        "another number of rows or columns",
    ),
}


@pytest.mark.parametrize("via", FORMS)
@pytest.mark.parametrize("lie", LIES)
def test_a_device_that_asks_for_something_else_is_not_followed(monkeypatch, via, lie):
    link, placed = linked(via)
    told, words = LIES[lie]
    with monkeypatch.context() as patch:
        patch.setattr(link._meeting, "ask", Lying(link._meeting, told).ask)
        link.exchange(placed[0], numbers(2))
        with pytest.raises(BoundaryError, match=words):
            [link.exchange(site, numbers(2)) for site in placed[1:3]]
    # The program that lies is gone with its device; another one is honest.
    link._compiled.clear()
    run_pass(link, placed)
    link.close()


@pytest.mark.parametrize("via", FORMS)
def test_a_device_that_does_not_answer_is_given_up(via):
    release = threading.Event()

    def stuck(x):
        release.wait(20)
        return np.asarray(x)

    def product(x, weight):
        return (jax.experimental.io_callback(stuck, x, x)[:, : len(weight)],)

    link, placed = linked(via, product, answer_seconds=0.3)
    with pytest.raises(BoundaryError, match=r"did not answer for 0.3 seconds, at qkv of layer 0"):
        link.exchange(placed[0], numbers(2))
    with pytest.raises(BoundaryError, match="has not ended its last program"):
        link.exchange(placed[0], numbers(2))
    release.set()
    np.testing.assert_array_equal(link.exchange(placed[0], numbers(2))[0], numbers(2)[:, :8])
    link.close()


@pytest.mark.parametrize("via", FORMS)
def test_a_program_that_fails_is_told_of(via):
    def fail(x):
        raise RuntimeError("no memory")

    link, placed = linked(via, lambda x, weight: (jax.experimental.io_callback(fail, x, x),))
    with pytest.raises(BoundaryError, match="ended before its time"):
        link.exchange(placed[0], numbers(2))
    link.close()


@pytest.mark.parametrize("via", FORMS)
@pytest.mark.parametrize("error", [IntegrityError, PadExhaustedError, KeyboardInterrupt])
def test_a_failure_of_the_trusted_side_in_the_middle_leaves_the_next_answer_good(table, driven, via, error):
    llm = under(table, "masked+verify", via)
    boundary = boundary_of(llm)
    exchange = boundary.link.exchange

    def failing(placed, sent):
        if placed.site == Site("gate_up", 0):
            raise error("in the middle")
        return exchange(placed, sent)

    boundary.link.exchange = failing
    with pytest.raises(error):
        llm.generate([PROMPTS[1]], max_tokens=4)
    # Nothing waits until then.
    boundary.link._running.exception(5)
    del boundary.link.exchange
    assert answers(llm, [PROMPTS[1]]) == driven["masked+verify"].tokens[1:2]
    boundary.close()


@pytest.mark.parametrize("via", FORMS)
def test_closing_ends_a_program_that_waits(via):
    link, placed = linked(via)
    link.exchange(placed[0], numbers(2))
    running, thread = link._running, link._thread
    assert not running.done()
    link.close()
    assert running.done()
    assert not thread.is_alive()
    with pytest.raises(BoundaryError, match="closed"):
        link.exchange(placed[0], numbers(2))
    link.close()


@needs_native
def test_places_are_given_back():
    for _ in range(3):
        opened = [NativeMeeting() for _ in range(40)]
        for meeting in opened:
            meeting.close()
    many = [NativeMeeting() for _ in range(64 - len([link for link in in_program._links if _is_native(link)]))]
    with pytest.raises(PolicyError, match="every place"):
        NativeMeeting()
    for meeting in many:
        meeting.close()


def _is_native(link) -> bool:
    return isinstance(link._meeting, NativeMeeting) and link._meeting._place >= 0


# In a process of its own, which imports no more than it needs: a link whose program waits for its second product.
WAITING = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
if {one_core}:
    os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
import jax
import numpy as np
from fusedllm.model.placement import Site
from fusedllm.partition.in_program import InProgram
from fusedllm.partition.integer import integer_product
link = InProgram(jax.devices("cpu")[1], integer_product(implementation="xla"), via={via!r})
placed = [link.place(Site(name, 0), (np.ones((8, 64), np.int8),)) for name in ("qkv", "o", "gate_up", "down")]
x = np.ones((2, 64), np.int32)
link.exchange(placed[0], x)
link.exchange(placed[1], x)
"""


def run_alone(via, code, one_core=False) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WAITING.format(via=via, one_core=one_core) + code],
        cwd=ROOT, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")


@pytest.mark.parametrize("via", FORMS)
@pytest.mark.parametrize("end", ["", "del link"])
def test_a_process_ends_while_its_program_waits(via, end):
    run_alone(via, f'{end}\nprint("over", flush=True)')


@pytest.mark.parametrize("via", FORMS)
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores can't be chosen here")
def test_one_core_is_enough_where_xla_would_share_a_segment_among_threads(via):
    code = """
segment = jax.jit(lambda x: (x @ x.T @ x).sum())
y = np.ones((512, 512), np.float32)
for _ in range(3):
    for one in placed:
        assert float(segment(y)) == 512.0**4
        assert int(link.exchange(one, x)[0][0, 0]) == 64
print("over")
"""
    run_alone(via, code, one_core=True)


@pytest.mark.parametrize("via", FORMS)
def test_two_models_answer_at_once_in_one_process(table, driven, via):
    models = [under(table, "masked", via) for _ in range(2)]
    prompts, expected = PROMPTS[1:], [[tokens] for tokens in driven["masked+verify"].tokens[1:]]
    found = [None, None]

    def ask(index: int) -> None:
        found[index] = [answers(models[index], [prompts[index]]) for _ in range(3)]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [[answer] * 3 for answer in expected]
    for llm in models:
        boundary_of(llm).close()


@pytest.mark.parametrize("via", FORMS)
def test_models_at_once_leave_xla_the_threads_that_their_segments_need(via):
    width, count = 512, 3
    weight, x = np.ones((width, width), np.int8), np.ones((64, width), np.int32)
    # Too much for XLA to compute it in the thread that launches it, and so is the product.
    segment = jax.jit(lambda y: (y @ y.T @ y).sum())
    y = np.ones((width, width), np.float32)
    segment(y)
    done = []

    def run() -> None:
        link = InProgram(jax.devices("cpu")[1], integer_product(implementation="xla"), via=via)
        placed = [link.place(Site(name, layer), (weight,)) for layer in range(2) for name in ("qkv", "o", "gate_up")]
        for _ in range(3):
            for site in placed:
                assert link.exchange(site, x)[0][0, 0] == width
                assert float(segment(y)) == width**4
        link.close()
        done.append(True)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == count


def test_forms_that_can_not_be_are_refused_by_name(monkeypatch):
    params = random_params(TINY, "float32", seed=1)

    def refused(policy, crossing):
        return LLM(TINY, params, engine=TINY_ENGINE, policy=policy, crossing=crossing)

    with pytest.raises(PolicyError, match="no crossing 'rpc'; known are driven, callback, ffi"):
        refused("split", "rpc")
    for policy in ("plain", "trusted"):
        with pytest.raises(PolicyError, match=f"'{policy}' nothing crosses, and the crossing 'driven' was asked for"):
            refused(policy, "driven")
    with pytest.raises(PolicyError, match="known are callback, ffi"):
        InProgram(jax.devices("cpu")[1], integer_product(implementation=None), via="driven")

    @dataclasses.dataclass
    class Accelerator:
        platform: str = "gpu"

    with pytest.raises(PolicyError, match=r"'ffi' .* is no CPU; use the crossing 'driven' or 'callback'"):
        InProgram(Accelerator(), integer_product(implementation=None), via="ffi")
    monkeypatch.setattr(native, "why_unavailable", lambda: "they were not built")
    with pytest.raises(PolicyError, match="needs the native kernels, and they were not built"):
        refused("split", "ffi")
    assert CLI_CROSSINGS == CROSSINGS


def test_the_command_line_passes_the_crossing_on(capfd, tmp_path):
    from reference import tiny

    checkpoint = tiny.write("llama2", tmp_path / "model")
    arguments = ["generate", "--ckpt", str(checkpoint), "--max-tokens", "3", "--ignore-eos", "--max-context", "64"]
    assert main([*arguments, "--policy", "split", "--crossing", "callback", "--stats"]) == 0
    assert "crossing: callback" in capfd.readouterr().err
    assert main([*arguments, "--crossing", "callback"]) == 2
    assert "under the policy 'plain' nothing crosses" in capfd.readouterr().err


@pytest.mark.parametrize("via", ["driven", *FORMS])
def test_what_is_sent_lies_on_a_boundary_of_64_bytes_and_always_in_the_same_memory(via):
    link, _ = linked(via)
    first = link.outgoing((3, WIDTH), np.int32)
    assert (first.shape, first.dtype) == ((3, WIDTH), np.int32)
    assert first.ctypes.data % 64 == 0
    assert link.outgoing((2, WIDTH), np.int32).ctypes.data == first.ctypes.data
    link.close()
