"""The words of a mesh, the rules that split arrays over it, and matrices cut into parts."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import socket
import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from packing import NAMES, blocks, grouped, raw
from reference import tiny
from sharding_peer import CONFIG

from fusedllm.cli.main import main
from fusedllm.engine.config import EngineConfig
from fusedllm.engine.lockstep import Lockstep
from fusedllm.engine.replicas import least_loaded, share_of
from fusedllm.errors import RequestError, ShardingError
from fusedllm.model.params import describe, specs
from fusedllm.partition.sharded import GATHERED, SUMMED
from fusedllm.sharding import processes
from fusedllm.sharding.cut import piece
from fusedllm.sharding.layout import lay_out
from fusedllm.sharding.mesh import MeshShape, check_model, grid_of, parse_mesh
from fusedllm.sharding.processes import connect
from fusedllm.sharding.rules import CACHE_AXES, RULES, spec_of
from fusedllm.sizing import CacheSize, fitting_engine


@given(tp=st.integers(1, 10**6 - 1), dp=st.integers(1, 10**6 - 1))
def test_a_mesh_reads_back_from_its_words(tp, dp):
    shape = MeshShape(tp=tp, dp=dp)
    assert parse_mesh(str(shape)) == shape == parse_mesh(f" dp = {dp} , tp = {tp}")


def test_what_a_mesh_does_not_name_is_one():
    assert parse_mesh("tp=2") == MeshShape(tp=2, dp=1)
    assert parse_mesh("dp=3") == MeshShape(tp=1, dp=3)
    assert MeshShape(tp=2, dp=3).devices == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "is written as in tp=2,dp=2"),
        ("2x2", "is written as in tp=2,dp=2"),
        ("tp=2,", "is written as in tp=2,dp=2"),
        ("pp=2", "the axis 'pp'; known are tp and dp"),
        ("tp=2,tp=2", "the axis tp twice"),
        ("tp=0", "tp the size '0'; it must be an integer of at least 1"),
        ("tp=-1", "the size '-1'"),
        ("tp=1.5", "the size '1.5'"),
        ("tp=", "the size ''"),
        ("dp=1234567", "the size '1234567'"),
    ],
)
def test_a_mesh_in_other_words_is_refused(words, message):
    with pytest.raises(ShardingError, match=message):
        parse_mesh(words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 2}, r"tp=4 does not divide the 6 attention heads .* tp can be 1, 2\."),
        ({"num_kv_heads": 2}, r"tp=4 does not divide the 2 key and value heads .* tp can be 1, 2\."),
        ({"intermediate_size": 90}, r"the 90 columns of the feed-forward part .* tp can be 1, 2\."),
        ({"vocab_size": 99}, r"the 99 tokens of the vocabulary .* tp can be 1\."),
    ],
)
def test_a_size_that_can_not_be_split_is_named(change, message):
    with pytest.raises(ShardingError, match=message):
        check_model(MeshShape(tp=4), dataclasses.replace(CONFIG, **change))


def test_groups_do_not_ask_the_model_for_anything():
    check_model(MeshShape(dp=7), dataclasses.replace(CONFIG, vocab_size=97))


def test_too_few_devices_are_counted():
    with pytest.raises(ShardingError, match=r"the mesh tp=8,dp=2 needs 16 devices, and jax has 2 \(cpu\); XLA_FLAGS="):
        grid_of(MeshShape(tp=8, dp=2))


def test_rows_of_the_mesh_are_neighbours():
    grid = grid_of(MeshShape(dp=2)).devices
    assert grid.shape == (2, 1)
    assert [device.id for device in grid.flat] == [0, 1]


def test_every_axis_of_every_parameter_has_a_rule():
    found = {spec.name: spec_of(spec.axes, what=spec.name) for spec in specs(CONFIG).values()}
    layer = {name.removeprefix("model.layers.0."): how for name, how in found.items() if "layers.0" in name}
    rows, columns, whole = PartitionSpec("tp", None), PartitionSpec(None, "tp"), PartitionSpec(None)
    assert found["model.embed_tokens.weight"] == rows
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert layer[f"{name}.weight"] == rows
        assert layer[f"{name}.bias"] == PartitionSpec("tp")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert layer[f"{name}.weight"] == columns
        assert layer[f"{name}.bias"] == whole
    assert layer["self_attn.q_norm.weight"] == layer["input_layernorm.weight"] == whole
    assert spec_of(CACHE_AXES) == PartitionSpec("dp", "tp", None, None)


def test_what_is_summed_and_gathered_is_what_the_rules_split():
    description = describe(dataclasses.replace(CONFIG, tie_embeddings=False))
    layer = description.layers[0]
    sites = {
        "qkv": (layer.q, layer.k, layer.v), "o": (layer.o,), "gate_up": (layer.gate, layer.up), "down": (layer.down,),
        "head": (description.head,),
    }  # fmt: skip
    for site, weights in sites.items():
        for weight in weights:
            rows, columns = spec_of(weight.axes)
            assert (columns is not None) == (site in SUMMED)
            assert (rows is not None and weight.axes[0] == "vocab") == (site in GATHERED)


def test_static_arguments_have_programs_of_their_own():
    def scaled(x, by=1) -> tuple[jax.Array, jax.Array]:
        return x * by, x + by

    layout = lay_out("tp=2", CONFIG)
    program = layout.compile(scaled, static_argnames=("by",))
    x = layout.everywhere(np.arange(3))
    assert [np.asarray(made).tolist() for made in program(x, by=2)] == [[0, 2, 4], [2, 3, 4]]
    assert [np.asarray(made).tolist() for made in program(x, by=3)] == [[0, 3, 6], [3, 4, 5]]


def test_an_axis_without_a_rule_is_refused():
    with pytest.raises(ShardingError, match="a bias has the axis 'experts', for which there is no rule"):
        spec_of(("hidden", "experts"), what="a bias")


def test_two_axes_for_one_of_the_mesh_are_refused():
    with pytest.raises(ShardingError, match="two axes for 'tp' of the mesh, 'ffn' and 'vocab'"):
        spec_of(("ffn", "vocab"))


def test_a_rule_for_no_axis_of_the_mesh_is_refused():
    with pytest.raises(ShardingError, match="the rule for 'ffn' names 'pp', which is no axis of the mesh"):
        spec_of(("ffn",), rules={**RULES, "ffn": "pp"})


def on_host(array):
    return jax.tree.map(np.asarray, array)


@pytest.mark.parametrize("counts", [(1, 1), (4, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize(
    "name", ["Q4_1", "Q8_0", "int8", "int4-g128", "int4-g64-sym", "int3-g64", "fp8", "w8a8", "w8a8-h"]
)
def test_a_part_of_a_matrix_decodes_to_that_part(name, counts):
    # Parts between groups of 128. Of 576 columns 64 are turned together, and so they are of a third.
    rows, width, counts = (24, 576, (counts[0], counts[1] * 3 // 2)) if name == "w8a8-h" else (24, 512, counts)
    rng = np.random.default_rng(1)
    array = raw(name, width, blocks(name, rows, width, rng)) if name in NAMES else grouped(name, rows, width, rng)
    array = on_host(array)
    whole = np.asarray(array.dequantize())
    high, wide = rows // counts[0], width // counts[1]
    for i in range(counts[0]):
        for j in range(counts[1]):
            part = piece(array, (i, j), counts)
            assert part.shape == (high, wide)
            expected = whole[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
            assert np.array_equal(np.asarray(part.dequantize()), expected)


@pytest.mark.parametrize(
    ("name", "width", "counts", "message"),
    [
        ("int4-g64", 192, (1, 2), "q has 192 columns, quantized as int4-g64 in groups of 64, and tp=2 would cut"),
        ("int3-g64", 64, (1, 2), "in groups of 64"),
        ("Q4_0", 96, (1, 2), "quantized as Q4_0 in groups of 32, and tp=2"),
        ("w8a8-h", 128, (1, 2), "which turns 128 columns together, and tp=2 would cut through them; .* as w8a8"),
        ("int8", 64, (5, 1), "the 16 rows of q can't be cut into 5 equal parts"),
        ("int8", 63, (1, 2), "the 63 columns of q can't be cut into 2 equal parts"),
    ],
)
def test_a_cut_through_a_group_is_refused(name, width, counts, message):
    rng = np.random.default_rng(1)
    array = raw(name, width, blocks(name, 16, width, rng)) if name in NAMES else grouped(name, 16, width, rng)
    with pytest.raises(ShardingError, match=message):
        piece(on_host(array), (0, 0), counts, what="q")


def test_a_model_is_laid_out_with_its_own_sizes():
    layout = lay_out("tp=2", CONFIG)
    assert (layout.tp, layout.dp, layout.lockstep) == (2, 1, False)
    assert layout.counts(("hidden", "ffn")) == (1, 2)
    assert [replica.mesh.devices.shape for replica in lay_out("dp=2", CONFIG).replicas()] == [(1, 1), (1, 1)]
    whole = layout.everywhere(np.arange(3))
    assert whole.is_fully_replicated
    assert len(whole.addressable_shards) == 2


@settings(max_examples=200)
@given(
    groups=st.integers(1, 9),
    context=st.integers(1, 100),
    more=st.integers(0, 1000),
    buckets=st.sets(st.integers(1, 40), min_size=1, max_size=5),
)
def test_groups_divide_seats_and_pages_and_each_holds_a_request(groups, context, more, buckets):
    whole = EngineConfig(max_context=context, cache_tokens=context + more, batch_buckets=tuple(sorted(buckets)))
    share = share_of(whole, groups)
    assert whole.max_batch <= share.max_batch * groups < whole.max_batch + groups
    assert share.max_context == whole.max_context
    assert share.cache_tokens * groups >= whole.cache_tokens
    assert share.cache_tokens == context or share.cache_tokens * groups < whole.cache_tokens + groups
    assert groups > 1 or share == whole


@dataclasses.dataclass
class Busy:
    load: int
    pages_in_use: int


def test_a_request_goes_where_the_fewest_are():
    engines = [Busy(2, 0), Busy(1, 9), Busy(1, 3), Busy(1, 3)]
    assert least_loaded(engines) is engines[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost", 2, 0), "is written as host:port, got 'localhost'"),
        (("localhost:x", 2, 0), "is written as host:port"),
        ((":99", 2, 0), "is written as host:port"),
        (("localhost:0", 2, 0), "is written as host:port"),
        (("localhost:99", 0, 0), "must be from 1 to 65536, got 0"),
        (("localhost:99", 2, 2), "the ids go from 0 to 1, got 2"),
        # Devices have been asked for in this process.
        (("localhost:99", 2, 1), "the process 1 can't join those at localhost:99"),
    ],
)
def test_processes_that_can_not_join_say_why(arguments, message):
    with pytest.raises(ShardingError, match=message):
        connect(*arguments)


def test_a_port_that_is_taken_is_refused_before_jax_asks_for_it(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **options: pytest.fail("jax was asked"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ShardingError, match=f"the process 0 can't listen at port {port} \\(address already in use"):
            connect(f"127.0.0.1:{port}", 2, 0)


@pytest.fixture
def alone(monkeypatch):
    """jax waits for others who never come, deaf to signals; what is put into the list is called as it begins."""
    released, begun = threading.Event(), []

    def initialize(*arguments, **options):
        with contextlib.suppress(KeyboardInterrupt):
            for function in begun:
                function()
            # Before a test hangs it fails.
            released.wait(10)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    yield begun
    released.set()


def test_who_waits_in_vain_for_other_processes_hears_of_it(alone, monkeypatch):
    monkeypatch.setattr(processes, "JOIN_SECONDS", 0.1)
    with pytest.raises(ShardingError, match=r"process 1 has waited 0.1 seconds at localhost:9999 for 2 processes"):
        connect("localhost:9999", 2, 1)


def test_the_wait_for_other_processes_can_be_interrupted(alone):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        alone.append(lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            connect("localhost:9999", 2, 1)
    finally:
        signal.signal(signal.SIGINT, before)


TWO = ("--coordinator", "a:1", "--processes", "2", "--process-id", "0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--mesh", "tp=2", "--processes", "2"), "need --coordinator, --processes and --process-id"),
        (("perplexity", "--text", __file__, *TWO), "several processes share a --mesh"),
        (("serve", "--mesh", "tp=2", *TWO), "requests come to one process"),
        (("generate", "--mesh", "pp=2", "--random-weights"), "the axis 'pp'"),
        (("generate", "--mesh", "pp=2", *TWO), "the axis 'pp'"),
    ],
)
def test_the_command_line_says_what_a_mesh_lacks(arguments, message, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_several_processes_have_no_engine_in_a_thread(tiny_llm, monkeypatch):
    monkeypatch.setattr(tiny_llm.engine, "_lockstep", Lockstep(1))
    with pytest.raises(RequestError, match="answers who waits for it, not in a thread"):
        tiny_llm.engine.start()


@pytest.mark.parametrize(
    ("policy", "asked", "expected"),
    [("plain", 0, (1024, 4)), ("plain", 64, (64, 4)), ("split", 0, (256, 0)), ("trusted", 64, (64, 0))],
)
def test_a_server_on_a_gpu_has_the_sizes_of_where_its_layers_run(policy, asked, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    asked_for: list = []
    monkeypatch.setattr("fusedllm.sizing.available_bytes", lambda device=None: asked_for.append(device) or 10**9)
    sizes = {"batch_buckets": (1, 2), "token_budget": asked, "max_context": 64}
    _, engine = fitting_engine(tiny.write("llama3", tmp_path), CacheSize(), **sizes, policy=policy)
    assert (engine.token_budget, engine.free_steps) == expected
    assert asked_for == [None if policy == "plain" else jax.devices("cpu")[0]]


@pytest.mark.parametrize(("tokens", "expected"), [(None, 4 * 64), (300, 300), (301, 302)])
def test_a_server_sizes_the_cache_of_all_groups_together(tokens, expected, tmp_path):
    path = tiny.write("llama3", tmp_path)
    sizes = {"batch_buckets": (1, 2, 4), "token_budget": 0, "max_context": 64}
    _, engine = fitting_engine(path, CacheSize(tokens=tokens), **sizes, mesh="dp=2")
    assert engine.cache_tokens == expected
    assert share_of(engine, 2).cache_tokens * 2 == expected
    with pytest.raises(RequestError, match="a request of 64 tokens needs"):
        # For each of the groups half of it.
        fitting_engine(path, CacheSize(tokens=100), **sizes, mesh="dp=2")
