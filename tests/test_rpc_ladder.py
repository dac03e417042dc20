"""`benchmarks/rpc_ladder.py`: codecs lose nothing, all rungs compute the same, and the accounts add up."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis.extra.numpy as arrays
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("zmq", reason="needs pyzmq of the extra `bench`")
pytest.importorskip("msgpack", reason="needs msgpack of the extra `bench`")
if not hasattr(os, "memfd_create"):
    pytest.skip("needs shared memory of Linux", allow_module_level=True)

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import rpc_codecs
import rpc_integers
import rpc_ladder
import rpc_model
import rpc_musts
import rpc_report
import rpc_transport
from common import Spread
from conftest import TINY
from rpc_client import PHASES, Account, Call, Channel, DeviceServer, TrustedClient, largest_message

from fusedllm.kernels.quantize import quantize
from fusedllm.partition.pad_pool import PadPool
from fusedllm.partition.pad_supply import PoolLimits
from fusedllm.weights.random import random_checkpoint

ROOT = Path(__file__).parent.parent
SEQ = 16
SETTING = rpc_ladder.Setting(TINY, "float32", SEQ)
ARENA_BYTES = 1 << 16
# The policies with a boundary.
CROSSING = ("split", "masked", "masked+verify")
# All but one: each policy is a process that compiles everything again.
MEASURED = tuple(rung for rung in rpc_ladder.RUNGS if rung.name != "verify")

ANY_ARRAYS = st.lists(
    st.one_of(
        arrays.arrays(np.float32, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)),
        arrays.arrays(np.int32, arrays.array_shapes(max_dims=3, max_side=5)),
    ),
    max_size=3,
)


def pair() -> tuple[dict[str, rpc_codecs.Codec], dict[str, rpc_codecs.Codec]]:
    """The codecs of a trusted side, and of the side that it talks to."""
    there, back = os.memfd_create("there"), os.memfd_create("back")
    for descriptor in (there, back):
        os.ftruncate(descriptor, ARENA_BYTES)
    outgoing, incoming = rpc_codecs.Arena(there, ARENA_BYTES), rpc_codecs.Arena(back, ARENA_BYTES)
    os.close(there)
    os.close(back)
    return rpc_codecs.codecs(outgoing, incoming, trusted=True), rpc_codecs.codecs(incoming, outgoing, trusted=False)


TRUSTED, UNTRUSTED = pair()


@settings(max_examples=60)
@given(sent=ANY_ARRAYS, header=st.dictionaries(st.sampled_from(["name", "layer"]), st.integers(0, 99)))
@pytest.mark.parametrize("letter", ["a", "b", "d"])
def test_arrays_arrive_as_they_were_sent_both_ways(letter, sent, header):
    for sender, receiver in ((TRUSTED, UNTRUSTED), (UNTRUSTED, TRUSTED)):
        arrived_header, arrived = receiver[letter].unpack(sender[letter].pack(header, sent))
        assert arrived_header == header
        assert [array.dtype for array in arrived] == [array.dtype for array in sent]
        for one, other in zip(arrived, sent, strict=True):
            np.testing.assert_array_equal(one, other, strict=True)


@settings(max_examples=60)
@given(sent=ANY_ARRAYS)
def test_in_bfloat16_numbers_are_rounded_once_and_integers_are_not(sent):
    _, arrived = TRUSTED["c"].unpack(UNTRUSTED["c"].pack({}, sent))
    with np.errstate(over="ignore", invalid="ignore"):  # A number beyond bfloat16's range becomes infinite.
        rounded = [a.astype(rpc_codecs.BFLOAT16).astype(np.float32) if a.dtype == np.float32 else a for a in sent]
    for one, other in zip(arrived, rounded, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_what_the_trusted_side_has_read_the_other_side_cannot_change():
    _, (first,) = TRUSTED["d"].unpack(UNTRUSTED["d"].pack({}, [np.arange(8)]))
    UNTRUSTED["d"].pack({}, [np.zeros(8, np.int64)])
    np.testing.assert_array_equal(first, np.arange(8))


def test_a_message_larger_than_the_shared_memory_is_refused():
    with pytest.raises(ValueError, match=r"take 70,000 bytes or more, and 65,536 are shared\."):
        TRUSTED["d"].pack({}, [np.zeros(70_000, np.uint8)])


def test_each_moment_of_a_call_belongs_to_one_phase():
    call = Call(None, client=(0, 1, 3, 33, 39), sent=10, received=20, server=(6, 10, 15, 21, 22, 25))
    expected = {"trusted": 1, "serialize": 2 + 3, "send": 3, "deserialize": 4 + 6, "copy": 5 + 1, "compute": 6}
    assert call.phases() == {**expected, "receive": 8}
    assert sum(call.phases().values()) == 39


def test_measured_layers_stand_for_all_and_the_others_for_nothing():
    stamps, server = (0, 1, 2, 8, 9), (3, 4, 5, 6, 7, 7.5)
    calls = [Call(layer, stamps, sent=10, received=1, server=server) for layer in (None, 0, 1, 2, 3)]
    account = Account(calls, rests=[(0, 1.0), (3, 100.0)], measured_layers=2, layers=4)
    assert account.latency == pytest.approx(9 + 4 * 9 + 2 * 1.0)
    assert (account.sent, account.received, account.count) == (50, 5, 5)


@pytest.fixture(scope="module")
def ladder_processes() -> Iterator[tuple]:
    """The device server and the policies' processes, which import this checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        with rpc_ladder.processes() as made:
            yield made


@pytest.fixture(scope="module")
def result(ladder_processes) -> dict:
    """The whole ladder on the tiny model, its first rung scaled from one layer of two."""
    setting = rpc_ladder.Setting(TINY, "float32", SEQ, frozenset("a"), 1, limit_size=64)
    found = rpc_ladder.run(setting, MEASURED, 2, *ladder_processes)
    found |= {"ckpt": "tiny", "device": {"platform": "cpu", "kind": "cpu"}, "all_layers": TINY.num_layers}
    return {**found, "verdicts": rpc_musts.verdicts(found)}


def rows(result: dict) -> dict[str, dict]:
    return {row["name"]: row for row in result["rows"]}


def test_all_rungs_have_the_same_logits(result):
    assert set(rows(result)) == {rung.name for rung in MEASURED}
    assert not result["left_out"]
    for row in result["rows"]:
        assert row["distance"] <= row["tolerance"], row["title"]
    # The comparison would see a rung that computed something else.
    for name in ("c", "masked"):
        assert rows(result)[name]["distance"] > rpc_ladder.TOLERANCE_FLOAT32
    # A check changes no bit.
    assert rows(result)["masked"]["distance"] == rows(result)["masked+verify"]["distance"]


def test_the_predecessor_makes_six_calls_a_layer_and_two(result):
    found = {name: row["calls"].median for name, row in rows(result).items()}
    assert {found[name] for name in ("a", "b", "b-tcp", "c", "d")} == {6 * TINY.num_layers + 2}
    assert found["e"] == TINY.num_layers + 2
    assert found["plain"] == 0
    assert {found[name] for name in CROSSING} == {4 * TINY.num_layers + 1}
    assert {result["decode"][name]["calls"].median for name in CROSSING} == {4 * TINY.num_layers + 1}


def test_pads_of_a_prompt_are_made_beforehand_and_counted_once(result):
    with_pads = {name: row for name, row in rows(result).items() if "offline" in row}
    assert set(with_pads) == {"masked", "masked+verify"}
    width, narrow = TINY.num_heads * TINY.head_dim, TINY.num_kv_heads * TINY.head_dim
    hidden, ffn = TINY.hidden_size, TINY.intermediate_size
    qkv, others = hidden + width + 2 * narrow, width + hidden + hidden + 2 * ffn + ffn + hidden
    # Behind the last layer's attention there is one row, and the head has one.
    numbers = SEQ * (TINY.num_layers * qkv + (TINY.num_layers - 1) * others) + others + hidden + TINY.vocab_size
    for name, row in with_pads.items():
        assert row["pad_bytes"].median == 4 * numbers
        assert row["made_meanwhile"].median == row["made_meanwhile"].iqr == 0
        assert row["offline"].median > 0
        assert result["decode"][name]["offline"].median > 0


def test_lists_take_two_to_three_times_the_bytes_and_bfloat16_half(result):
    moved = {name: row["sent"].median + row["received"].median for name, row in rows(result).items()}
    # Nine bytes for a number of four; small integers and headers move the ratio a little.
    assert 2.1 < moved["a"] / moved["b"] < 2.4
    assert 0.5 < moved["c"] / moved["b"] < 0.6
    assert moved["d"] == pytest.approx(moved["b"], rel=0.05)
    assert moved["e"] < moved["d"] / 4


def test_phases_add_up_to_the_latency(result):
    for row in result["rows"]:
        # Of two samples the median is the mean, so that the sum of medians is the median of sums.
        assert sum(phase.median for phase in row["phases"].values()) == pytest.approx(row["latency"].median)


def test_the_account_of_a_forward_is_all_of_it(ladder_processes):
    server, _ = ladder_processes
    server.share(largest_message(TINY, SEQ))
    server.ask("load", TINY.to_dict(), "float32", 0)
    client = TrustedClient(TINY, server, 0)
    client.forward(SETTING.tokens, Channel("b"))
    began = time.perf_counter()
    _, account = client.forward(SETTING.tokens, Channel("b"))
    whole = time.perf_counter() - began
    # Outside of it are two small messages, for the server's stamps; on a busy machine they wait for their turn.
    assert account.latency < whole < account.latency + 0.5
    assert set(account.phases) == set(PHASES)
    # One clock for both processes: nothing arrives before it was sent.
    assert all(seconds >= 0 for call in account.calls for seconds in call.phases().values())
    assert sum(account.phases[name] > 0 for name in PHASES) == len(PHASES)


def test_a_call_that_does_not_exist_ends_the_program_with_the_servers_words(ladder_processes):
    server, _ = ladder_processes
    frame = server.codecs["b"].pack({"name": "nonsense", "layer": 0}, [])
    with pytest.raises(SystemExit, match=r"the device server refuses: AttributeError: .*nonsense"):
        server.exchange(server.sockets["ipc"], "b", frame)


def test_a_pool_has_room_for_a_prompt_and_says_where_it_was_short():
    weights = {"one": np.ones((3, 4), np.int8), "other": np.ones((5, 4), np.int8)}
    rows = 2 * PoolLimits().capacity
    with PadPool(weights, background=False) as pool:
        pads = rpc_integers.Pads(pool, rows)
        pads.fill()
        for _ in range(2):
            with pool.take("one", rows // 2):
                used = pads.used()
        assert used["pad_bytes"] == rows * 4 * (3 + 4)
        assert used["offline"] > 0
        assert used["made_meanwhile"] == 0
        with pool.take("one", 1):
            assert pads.used()["made_meanwhile"] > 0


def test_products_are_timed_without_the_time_of_what_they_wait_behind(monkeypatch):
    monkeypatch.setattr(rpc_model, "PLUG_SIZE", 8)
    products = rpc_model.Products(TINY, "float32", 0)
    assert len(list(products._runs("calls", SEQ))) == 9 * TINY.num_layers + 2
    assert len(list(products._runs("last", SEQ))) == len(list(products._ring_runs(SEQ))) == 8 * TINY.num_layers + 2
    for kind in ("calls", "layers", "last", "ring"):
        assert products.arithmetic(kind, SEQ) > 0
    waits: list[float] = []
    # A run that keeps the host as long as a launch would: it is in the time behind the plug, and not in the plug's own.
    assert products._queued([lambda: waits.append(time.sleep(0.2) or 1.0)]) > 0.2 > products._queued([])
    assert waits == [1.0]


def test_the_report_says_what_was_scaled_and_that_nothing_is_claimed(result):
    text = rpc_report.report(result)
    assert "(a) msgpack of lists, ipc [scaled from 1 layer]" in text
    assert "(b) msgpack of bytes, ipc [scaled" not in text
    assert "no confidentiality claim: a, b, b-tcp, c, d, e, split, plain show the device" in text
    for name in ("masked", "masked+verify"):
        assert f"{name} claims: prompt, activations and output are secret" in text
        assert f"{name}: the pads of this prompt took" in text
    assert "(a) was measured on 1 layer and scaled." in text
    left_out = rpc_report.report({**result, "left_out": {"masked": "masked: because."}})
    assert "Left out: masked: because." in left_out


def test_the_operations_of_a_prompt_are_those_that_have_to_be():
    attention = 4 * TINY.num_heads * TINY.head_dim
    norms = TINY.hidden_size * (2 * TINY.num_layers + 1)
    one = 2 * (rpc_ladder.product_weights(TINY) - norms) + attention * TINY.num_layers
    assert rpc_ladder.needed_operations(TINY, 1) == one
    # What a whole prompt needs, but for the queries, the rest of the layer and the attention of all but one token of
    # the last layer.
    width, ffn = TINY.num_heads * TINY.head_dim, TINY.intermediate_size
    saved = 2 * (SEQ - 1) * TINY.hidden_size * (2 * width + 3 * ffn) + attention * SEQ * (SEQ - 1) / 2
    whole = 2 * SEQ * (rpc_ladder.product_weights(TINY) - norms - TINY.vocab_size * TINY.hidden_size)
    whole += 2 * TINY.vocab_size * TINY.hidden_size + attention * TINY.num_layers * SEQ * (SEQ + 1) / 2
    assert rpc_ladder.needed_operations(TINY, SEQ) == whole - saved


def test_a_limit_is_what_no_rung_exceeds(result):
    limits = result["limits"]
    assert all(limits[name] > 0 for name in ("operations_per_second", "integer_operations_per_second", "read_rate"))
    table = rpc_report._limits(result).splitlines()
    assert len(table) >= 2 + len(result["rows"])
    for line in table[2 : 2 + len(result["rows"])]:
        operations, read, copied, least = (float(cell.replace(",", "")) for cell in line.split("|")[2:6])
        # Printed with three digits.
        assert least == pytest.approx(max(operations, read) + copied, rel=0.02, abs=1e-3)


def spread(*samples: float) -> Spread:
    return Spread.of(samples)


def of_rungs(platform: str, **rungs: dict) -> dict:
    """A result with as much of each rung as verdicts look at."""
    names = {"a": 1.0, "b": 1.0, **rungs}
    made = [
        {
            "name": name,
            "calls": spread(9, 9),
            "overhead_share": {"a": spread(*given["share"])} if "share" in given else {},
            "speedup": {other: spread(*given["speedup"]) for other in ("a", "b")} if "speedup" in given else {},
            "worst": {
                "overhead_share": {"a": max(given.get("share", [0]))},
                "speedup": dict.fromkeys(("a", "b"), min(given.get("speedup", [0]))),
            },
        }
        for name, given in names.items()
        if isinstance(given, dict)
    ]
    made += [{"name": name, "calls": spread(14, 14)} for name in ("a", "b")]
    return {"rows": made, "layers": 2, "all_layers": 2, "seq": 16, "decode": {}, "device": {"platform": platform}}


def test_musts_are_judged_by_the_median_and_the_worst_repetition():
    plain = {"share": [-0.002, 0.004, 0.02], "speedup": [8.5, 9, 7.5]}
    split = {"share": [0.051, 0.052, 0.04], "speedup": [3, 3, 3]}
    found = {one["must"]: one for one in rpc_musts.verdicts(of_rungs("cpu", plain=plain, split=split))}
    assert [(one["passed"], one["always"]) for one in found.values()] == [
        (True, False),
        (False, False),
        (True, False),
        (True, True),
    ]
    assert found["plain's overhead at most 1 % of (a)'s"]["found"] == "0.40 %"
    assert found["plain at least 8 times as fast as (a)"]["worst"] == "7.50 x"


def test_elsewhere_the_whole_is_judged_and_a_part_decides_nothing():
    result = of_rungs("gpu", plain={"speedup": [30, 32, 34]})
    (verdict,) = rpc_musts.verdicts(result)
    assert verdict["must"] == "plain at least 33 times as fast as (b)"
    assert not verdict["passed"]
    assert not rpc_musts.is_whole(result)
    assert rpc_musts.is_whole({**result, "seq": 1024})
    assert not rpc_musts.is_whole({**of_rungs("cpu"), "all_layers": 16})


def test_what_is_quantized_when_it_is_read_is_what_quantize_makes(monkeypatch):
    # In several parts.
    monkeypatch.setattr(rpc_integers, "QUANTIZED_WEIGHTS", 1000)
    checkpoint = random_checkpoint(TINY, "float32", 1)
    name = "model.layers.0.mlp.down_proj.weight"
    found = rpc_integers.quantized(checkpoint).tensors[name].read_quantized()
    whole = quantize(jnp.asarray(checkpoint.tensors[name].read()), rpc_integers.W8A8)
    np.testing.assert_array_equal(found.values, whole.values)
    np.testing.assert_array_equal(found.scales, whole.scales)


def test_the_picture_has_every_rung_and_phase(result, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib of the extra `bench`")
    from matplotlib import rc_context
    from rpc_plot import COLORS, plot

    assert set(COLORS) == {phase for row in result["rows"] for phase in row["phases"]} | {"crossings", "program"}
    with rc_context({"svg.fonttype": "none"}):  # Text stays text.
        plot(tmp_path / "ladder.svg", result)
    drawn = (tmp_path / "ladder.svg").read_text()
    for row in result["rows"]:
        assert row["title"] in drawn
    assert "no confidentiality claim" in drawn


def test_the_transport_diagnosis_needs_no_model(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    server = DeviceServer()
    try:
        server.share(40_000)
        monkeypatch.setattr(rpc_transport, "COPY_BYTES", 1 << 20)
        found = rpc_transport.diagnose(server, 1, message_bytes=40_000)
    finally:
        server.close()
    assert [row["way"] for row in found["rows"]] == list(rpc_transport.WAYS)
    assert all(row[step].median > 0 for row in found["rows"] for step in rpc_transport.STEPS)
    assert "0 MB to another process and as much back" in rpc_transport.report(found)
