"""Models on meshes of eight simulated devices say what they say on one, and exchange what one expects."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from sharding_peer import CONFIG, ENGINE, IDS, PROMPTS, answers, checkpoint, compiled, runner_of

import fusedllm
from fusedllm.engine.programs import Programs
from fusedllm.engine.replicas import Replicas
from fusedllm.errors import PolicyError, ShardingError
from fusedllm.kernels import native
from fusedllm.kernels.choose import traced_for
from fusedllm.llm import load
from fusedllm.partition.sharded import Sharded
from fusedllm.weights import gguf_write
from fusedllm.weights.random import random_checkpoint

HERE = Path(__file__).parent
MESHES = ("tp=2", "tp=4", "tp=2,dp=2")
LAYERS = CONFIG.num_layers

# Sums over a row in another order, in float32: a few units of 2^-24 of logits of about 0.6, times the layers.
SUMS = 3e-6


def start(arguments: list[str], devices: int, **environment: str) -> subprocess.Popen[str]:
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    paths = os.pathsep.join([str(HERE.parent), str(HERE), *sys.path])
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **flags, **environment, "PYTHONPATH": paths},
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        out, error = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, error
    return out, error


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What the tiny model does on each mesh."""
    out = tmp_path_factory.mktemp("sharding") / "found.json"
    finish(start([str(HERE / "sharding_peer.py"), str(out), "one", *MESHES], 8))
    return json.loads(out.read_text())


@pytest.mark.parametrize("mesh", MESHES)
def test_logits_are_those_of_one_device(found, mesh):
    np.testing.assert_allclose(found[mesh]["logits"], found["one"]["logits"], rtol=0, atol=SUMS)


@pytest.mark.parametrize("mesh", MESHES)
def test_tokens_are_those_of_one_device(found, mesh):
    assert found[mesh]["greedy"] == found["one"]["greedy"]
    assert found[mesh]["drawn"] == found["one"]["drawn"]


@pytest.mark.parametrize(("mesh", "tp"), [("one", 1), ("tp=2", 2), ("tp=4", 4), ("tp=2,dp=2", 2)])
def test_programs_exchange_two_sums_a_layer_one_of_the_embedding_and_the_logits(found, mesh, tp):
    sums = {"all-reduce": 2 * LAYERS + 1} if tp > 1 else {}
    # The last layer of a prefill leaves out the vocabulary, which is the admission's.
    assert found[mesh]["exchanged"] == {"decode": sums | ({"all-gather": 1} if tp > 1 else {}), "prefill": sums}


@pytest.mark.parametrize(("mesh", "tp", "dp"), [("one", 1, 1), ("tp=4", 4, 1), ("tp=2,dp=2", 2, 2)])
def test_weights_cache_seats_and_pages_are_divided(found, mesh, tp, dp):
    made = found[mesh]
    assert made["gate"] == [[CONFIG.intermediate_size // tp, CONFIG.hidden_size]] * tp
    pages = ENGINE.cache_tokens // dp // ENGINE.page_size + 1
    assert made["pages"] == [pages] * dp
    assert made["cache"] == [[pages, CONFIG.num_kv_heads // tp, ENGINE.page_size, CONFIG.head_dim]] * tp
    assert made["seats"] == [ENGINE.max_batch // dp] * dp
    assert made["devices"] == [list(range(at * tp, (at + 1) * tp)) for at in range(dp)]


def test_groups_share_the_requests(found):
    # Twice five prompts go to who has fewest, and then two.
    assert sorted(found["tp=2,dp=2"]["finished"]) == [5, 7]


@pytest.mark.parametrize("mesh", MESHES)
def test_the_cache_is_updated_where_it_lies(found, mesh):
    aliased, cache = found[mesh]["aliased"]
    assert aliased >= cache


# For weights whose programs take long to compile; and what a GGUF of a LLaMA has no place for is left out.
SMALL = dataclasses.replace(
    CONFIG,
    num_layers=1,
    sliding_windows=(None,),
    attention_bias=False,
    attention_output_bias=False,
    mlp_bias=False,
    qk_norm=False,
)


def small():
    return random_checkpoint(SMALL, "float32", seed=4)


def on_one_and_on_two(source, **options) -> tuple[np.ndarray, np.ndarray]:
    """Logits on one device, and with the weights on two."""
    one, two = (load(source, dtype="float32", engine=ENGINE, mesh=mesh, **options) for mesh in (None, "tp=2"))
    return one.logits(IDS), two.logits(IDS)


needs_native = pytest.mark.skipif(not native.available(), reason="the native kernels are not built")


@pytest.mark.parametrize(
    ("scheme", "implementation"),
    [
        ("int4-g32", "xla"),
        pytest.param("int8", "ffi", marks=needs_native),
        pytest.param("int4-g32", "ffi", marks=needs_native),
    ],
)
def test_quantized_weights_are_split_as_they_are(scheme, implementation):
    table = fusedllm.quantize(small(), scheme)
    one, two = on_one_and_on_two(table, keep_quantized=True, implementation=implementation)
    # Native products round activations to sixteen bits, in groups that are the same on two devices; but what comes out
    # of one rounding differs in its last bit now and then, and so may the next rounding's code: 2^-15 of a number.
    np.testing.assert_allclose(two, one, rtol=0, atol=SUMS if implementation == "xla" else 2e-4)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8", "bfloat16"])
def test_a_cache_of_small_numbers_is_split_with_its_scales(kv_dtype):
    one, two = on_one_and_on_two(small(), kv_dtype=kv_dtype)
    # What is rounded differs in its last bit now and then and may become the next code: of e4m3, 1/16 of one number.
    np.testing.assert_allclose(two, one, rtol=0, atol=2e-3)


def test_integers_are_split_and_lose_no_more_than_on_one_device():
    table = fusedllm.quantize(small(), "w8a8")
    one, two = on_one_and_on_two(table, keep_quantized=True)
    exact = load(table, dtype="float32", engine=ENGINE, keep_quantized=False).logits(IDS)
    # Of o and down each device rounds its own part of a token, by a scale of its own that is no larger.
    assert np.sqrt(np.mean((two - exact) ** 2)) <= 1.05 * np.sqrt(np.mean((one - exact) ** 2))
    assert not np.array_equal(one, two)


@needs_native
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_blocks_of_a_file_are_packed_for_each_device(kind, tmp_path):
    path = tmp_path / "model.gguf"
    gguf_write.write(small(), path, type_of=lambda name, shape: kind)
    one, two = on_one_and_on_two(path, keep_quantized=True)
    np.testing.assert_allclose(two, one, rtol=0, atol=2e-4)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_kernels_of_a_gpu_run_on_the_parts():
    llm = load(
        fusedllm.quantize(small(), "int4-g32"),
        dtype="float32",
        engine=ENGINE,
        mesh="tp=2",
        implementation="xla",
        keep_quantized=True,
    )
    runner, layout = runner_of(llm), llm.mesh
    assert layout is not None
    programs = Programs(SMALL, Sharded(), np.dtype(np.float32))
    tokens = np.zeros((1, 16), np.int32)
    arguments = (runner._params, runner._cache, tokens, np.zeros(1, np.int32), runner._table(()), np.int32(0))
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with (
        traced_for("gpu", 9.0),
        jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)),
    ):
        traced = layout.compile(programs.prefill).jitted(*arguments).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # XLA has no way to cut such a call, which is why nothing is left for it to cut.
    assert "custom_call @__gpu$xla.gpu.triton" in text
    assert text.count("stablehlo.all_reduce") == 2 * SMALL.num_layers + 1


def test_each_device_holds_its_part_and_groups_of_a_cpu_share_memory():
    tp = load(checkpoint(), dtype="float32", engine=ENGINE, mesh="tp=2")
    down = runner_of(tp)._params.layers[1].down
    whole = np.asarray(down)
    for index, shard in enumerate(down.addressable_shards):
        assert np.array_equal(np.asarray(shard.data), whole[:, index * 64 : (index + 1) * 64])
    dp = load(checkpoint(), dtype="float32", engine=ENGINE, mesh="dp=2")
    assert isinstance(dp.engine, Replicas)
    first, second = (engine.runner._params.layers[1].down for engine in dp.engine.engines)
    assert first.devices() != second.devices()
    assert first.addressable_data(0).unsafe_buffer_pointer() == second.addressable_data(0).unsafe_buffer_pointer()


def test_groups_of_one_device_say_the_same_bits_and_run_in_threads(found):
    llm = load(checkpoint(), dtype="float32", engine=ENGINE, mesh="dp=2")
    assert np.array_equal(llm.logits(IDS), np.asarray(found["one"]["logits"], np.float32))
    assert compiled(llm)["exchanged"] == {"decode": {}, "prefill": {}}
    assert answers(llm, PROMPTS) == list(map(tuple, found["one"]["greedy"]))
    llm.engine.start(max_queue=8)
    try:
        assert llm.engine.alive
        assert answers(llm, PROMPTS) == list(map(tuple, found["one"]["greedy"]))
        stats = llm.engine.stats()
    finally:
        llm.engine.stop()
    assert stats.generated_tokens == 2 * 8 * len(PROMPTS)
    assert stats.pages_total == 2 * 8
    assert not llm.engine.alive
    assert not llm.engine.pages_in_use


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mesh": "tp=3"}, ShardingError, "tp=3 does not divide the 8 attention heads"),
        ({"mesh": "tp=4"}, ShardingError, r"the mesh tp=4,dp=1 needs 4 devices, and jax has 2 \(cpu\)"),
        ({"mesh": "tp=2", "policy": "split"}, PolicyError, "a mesh was asked for under the policy 'split'"),
        ({"mesh": "dp=2", "policy": "trusted"}, PolicyError, "a mesh was asked for under the policy 'trusted'"),
    ],
)
def test_a_mesh_that_can_not_be_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        load(checkpoint(), **options)


def test_weights_that_can_not_be_cut_are_refused_by_name():
    table = fusedllm.quantize(checkpoint(), "int4-g128")
    with pytest.raises(ShardingError, match=r"o_proj.weight has 128 columns, quantized as int4-g128 in groups of 128"):
        load(table, mesh="tp=2", keep_quantized=True)
    turned = fusedllm.quantize(checkpoint(), "w8a8-turned")
    with pytest.raises(ShardingError, match=r"o_proj.weight is quantized as w8a8-h, which turns 128 columns together"):
        load(turned, mesh="tp=2", keep_quantized=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_two_processes_say_what_one_says(found, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    outs = [tmp_path / f"{index}.json" for index in range(2)]
    started = [
        start([str(HERE / "sharding_peer.py"), str(out), "tp=2,dp=2"], 2, PEERS=f"{address},2,{index}")
        for index, out in enumerate(outs)
    ]
    for process in started:
        finish(process)
    first, second = (json.loads(out.read_text())["tp=2,dp=2"] for out in outs)
    for made in (first, second):
        assert made["greedy"] == found["one"]["greedy"]
        assert made["drawn"] == found["one"]["drawn"]
        np.testing.assert_allclose(made["logits"], found["one"]["logits"], rtol=0, atol=SUMS)
        # Each has one device of each group.
        assert made["gate"] == [[CONFIG.intermediate_size // 2, CONFIG.hidden_size]]
    # Nobody gave a seed for these: one process's chance is everybody's.
    assert first["unseeded"] == second["unseeded"]


def test_the_command_line_runs_in_two_processes_and_the_first_one_speaks(tmp_path):
    from reference import tiny

    path = tiny.write("llama3", tmp_path)
    llm = load(path, dtype="float32")
    expected = llm.generate([[byte % 80 for byte in b"Once"]], max_tokens=5, ignore_eos=True)[0].token_ids
    command = ["-m", "fusedllm", "generate", "--ckpt", str(path), "--prompt", "Once", "--max-tokens", "5"]
    command += ["--ignore-eos", "--dtype", "float32", "--mesh", "tp=2", "--processes", "2"]
    command += ["--coordinator", f"127.0.0.1:{free_port()}"]
    started = [start([*command, "--process-id", str(index)], 1) for index in range(2)]
    (first, _), (second, _) = map(finish, started)
    assert first.split() == [str(token) for token in expected]
    assert second == ""
