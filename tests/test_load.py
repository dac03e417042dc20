"""Loading: what is copied is counted, what does not fit is named; and random weights."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from packing import grouped

from fusedllm.backend import kept_codes
from fusedllm.config import ModelConfig
from fusedllm.engine.config import EngineConfig
from fusedllm.errors import CheckpointError
from fusedllm.kernels import native
from fusedllm.kernels.choose import traced_for
from fusedllm.kernels.dequantize import dequantize
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.kernels.packed import PackedScheme
from fusedllm.llm import LLM
from fusedllm.model.params import specs
from fusedllm.qarray import QuantArray
from fusedllm.weights import arena, load, random
from fusedllm.weights.arena import aligned_empty
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor
from fusedllm.weights.load import load_params
from fusedllm.weights.open import open_checkpoint
from fusedllm.weights.random import random_checkpoint, random_params

CONFIG = ModelConfig("llama", 64, 32, 48, 2, 4, 2, 8, 128, tie_embeddings=True, attention_bias=True)
NORM = "model.norm.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def altered(name: str, values: np.ndarray | None, **changes: object) -> Checkpoint:
    """The random checkpoint with one tensor replaced, added or (for `None`) left out."""
    base = random_checkpoint(CONFIG, "float32", seed=1)
    tensors = dict(base.tensors)
    if values is None:
        del tensors[name]
    else:
        tensor = LazyTensor(name, values.shape, values.dtype, values.nbytes, lambda: values)
        tensors[name] = dataclasses.replace(tensor, **changes)
    return dataclasses.replace(base, tensors=tensors)


def aligned(values: np.ndarray, *, shift: int = 0, writeable: bool = False) -> np.ndarray:
    memory = aligned_empty((values.nbytes + shift,), np.dtype(np.uint8))[shift:]
    placed = memory.view(values.dtype).reshape(values.shape)
    placed[...] = values
    placed.flags.writeable = writeable
    return placed


GATE_VALUES = np.random.default_rng(0).standard_normal((48, 32)).astype(np.float32)


def test_read_only_aligned_memory_is_used_as_it_lies():
    values = aligned(GATE_VALUES)
    params, report = load_params(altered(GATE, values))
    assert params.layers[1].gate.unsafe_buffer_pointer() == values.ctypes.data
    assert (report.bytes_copied, report.copies) == (0, {})


def test_unaligned_memory_is_copied_and_counted():
    params, report = load_params(altered(GATE, aligned(GATE_VALUES, shift=8)))
    assert report.copies == {"not 64-byte aligned": GATE_VALUES.nbytes}
    assert report.bytes_copied == GATE_VALUES.nbytes
    np.testing.assert_array_equal(params.layers[1].gate, GATE_VALUES)


def test_memory_that_somebody_may_still_write_to_is_never_shared():
    values = aligned(GATE_VALUES, writeable=True)
    params, report = load_params(altered(GATE, values))
    assert values.flags.writeable
    values[...] = 0
    np.testing.assert_array_equal(params.layers[1].gate, GATE_VALUES)
    assert report.copies == {"writeable memory": GATE_VALUES.nbytes}


def test_a_cast_is_one_copy_of_the_result():
    checkpoint = random_checkpoint(CONFIG, "float32", seed=1)
    params, report = load_params(checkpoint, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}
    assert report.copies == {"cast from float32 to bfloat16": report.bytes}
    expected = checkpoint.tensors[GATE].read().astype(ml_dtypes.bfloat16)
    assert np.asarray(params.layers[1].gate).tobytes() == expected.tobytes()


@dataclasses.dataclass(frozen=True)
class Doubled:
    name = "doubled"
    bits_per_weight = 8.0

    def decode(self, array: QuantArray) -> jax.Array:
        return array.values.astype(jnp.float32) * array.scales


def quantized() -> Checkpoint:
    codes, scale = aligned(np.arange(48 * 32, dtype=np.uint8).reshape(48, 32)), np.full((48, 1), 2, np.float16)
    return altered(
        GATE,
        codes.astype(np.float32) * 2,
        quantization="doubled",
        read_quantized=lambda: QuantArray(codes, scale, None, Doubled(), (48, 32)),
    )


def test_dequantized_weights_are_counted_by_their_scheme():
    _, report = load_params(quantized())
    assert report.copies == {"dequantized from doubled": 48 * 32 * 4}


def test_quantized_matrices_stay_quantized_where_that_is_asked_for():
    params, report = load_params(quantized(), keep_quantized=True, dtype="float32")
    gate = params.layers[1].gate
    assert isinstance(gate, QuantArray)
    assert isinstance(gate.values, jax.Array)
    assert gate.scales.dtype == np.float16
    np.testing.assert_array_equal(gate.dequantize(), quantized().tensors[GATE].read())
    assert report.bytes_copied <= 48 * 2


def test_on_a_gpu_those_stay_quantized_that_its_kernels_read():
    base = random_checkpoint(CONFIG, "float32", seed=1)
    doubled = dataclasses.replace(quantized().tensors[GATE], name=UP)
    checkpoint = dataclasses.replace(base, tensors={**in_codes("int4-g32", (GATE,)).tensors, UP: doubled})
    params, _ = load_params(checkpoint, keep_quantized="codes", dtype="bfloat16")
    assert isinstance(params.layers[1].gate, QuantArray)
    assert params.layers[1].up.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("platform", "capability", "implementation", "kept"),
    [
        ("gpu", 9.0, None, "codes"),
        ("gpu", 8.0, "pallas", "codes"),
        ("gpu", 9.0, "xla", False),
        ("gpu", 7.5, None, False),
        ("cpu", None, None, False),
    ],
)
def test_codes_are_kept_where_kernels_read_them(platform, capability, implementation, kept):
    with traced_for(platform, capability):
        assert kept_codes(implementation) == kept


needs_native = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


def in_codes(scheme: str, names: tuple[str, ...] | None = None, **changes: object) -> Checkpoint:
    """The random checkpoint with its matrices, or those of `names`, as random codes of a scheme of ours."""
    base = random_checkpoint(CONFIG, "float32", seed=1)
    tensors = dict(base.tensors)
    rng = np.random.default_rng(2)
    for name, tensor in base.tensors.items():
        if len(tensor.shape) == 2 and (names is None or name in names):
            array = grouped(scheme, *tensor.shape, rng, scale=0.02).replace(**changes)
            tensors[name] = dataclasses.replace(
                tensor,
                read=lambda array=array: np.asarray(dequantize(array)),
                quantization=array.scheme.name,
                read_quantized=lambda array=array: jax.tree.map(np.asarray, array),
            )
    return dataclasses.replace(base, tensors=tensors)


@needs_native
@pytest.mark.parametrize("scheme", ["int4-g32", "int3-g64-sym", "int8", "w8a8"])
def test_grouped_codes_are_packed_for_the_native_kernels(scheme):
    checkpoint = in_codes(scheme, (GATE,))
    params, report = load_params(checkpoint, keep_quantized=True, pack=True)
    gate = params.layers[1].gate
    assert isinstance(gate.scheme, PackedScheme)
    np.testing.assert_array_equal(dequantize(gate), checkpoint.tensors[GATE].read())
    assert report.copies == {f"packed from {scheme}": gate.nbytes}


@needs_native
def test_packed_matrices_lie_beside_each_other(monkeypatch):
    checkpoint = in_codes("int4-g32")
    for size in (arena.ARENA_BYTES, 1000):
        monkeypatch.setattr(arena, "ARENA_BYTES", size)
        params, _ = load_params(checkpoint, keep_quantized=True, pack=True)
        arrays = [getattr(layer, name) for layer in params.layers for name in ("q", "k", "v", "o", "gate", "up")]
        names = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up")
        wanted = [f"model.layers.{i}.{name}_proj.weight" for i in range(2) for name in names]
        spans = sorted((a.values.unsafe_buffer_pointer(), a.values.nbytes) for a in [*arrays, params.embedding])
        assert all(start % arena.ALIGNMENT == 0 for start, _ in spans)
        assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(spans))
        if size > 1000:
            assert spans[-1][0] + spans[-1][1] - spans[0][0] == sum(nbytes for _, nbytes in spans)
        for array, name in zip(arrays, wanted, strict=True):
            np.testing.assert_array_equal(dequantize(array), checkpoint.tensors[name].read())


@needs_native
@pytest.mark.parametrize(
    ("scheme", "name", "changes"),
    [
        ("fp8", GATE, {}),
        ("int4-g32", "model.layers.1.mlp.down_proj.weight", {}),  # 48 columns
        ("int4-g32-sym", GATE, {"scales": jnp.full((48, 1), 0.1, jnp.float32)}),
    ],
)
def test_grouped_codes_that_cannot_be_packed_stay_codes(scheme, name, changes):
    checkpoint = in_codes(scheme, (name,), **changes)
    params, report = load_params(checkpoint, keep_quantized=True, pack=True)
    kept = params.layers[1].down if "down" in name else params.layers[1].gate
    assert isinstance(kept.scheme, GroupedScheme)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(kept))
    assert kept.scales.dtype == checkpoint.tensors[name].read_quantized().scales.dtype
    np.testing.assert_array_equal(dequantize(kept), checkpoint.tensors[name].read())
    assert not any(reason.startswith(("packed", "dequantized")) for reason in report.copies)


@needs_native
@pytest.mark.parametrize("scheme", ["int4-g32", "int3-g32-sym", "int8", "w8a8", "fp8"])
def test_a_model_in_grouped_codes_gives_the_logits_of_its_values(scheme):
    checkpoint, ids = in_codes(scheme), list(range(20))
    sizes = EngineConfig(max_context=64, cache_tokens=64, prefill_buckets=(32,))

    def logits(**keywords: bool) -> np.ndarray:
        return LLM(CONFIG, load_params(checkpoint, **keywords)[0], engine=sizes, activation_bits=16).logits(ids)

    expected = logits()
    found = logits(keep_quantized=True, pack=True)
    # Activations of 8 bits are off by up to 1/254 of the largest, those of 16 by a 256th of that; what a layer makes of
    # it adds up to ten times as much here.
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < (10 / 254 * 2 if scheme == "w8a8" else 10 / 254 / 256 * 2)


def test_codes_of_another_shape_than_the_tensor_are_refused():
    wrong = grouped("int4-g32", 32, 48, np.random.default_rng(0))
    checkpoint = altered(GATE, GATE_VALUES, quantization="int4-g32", read_quantized=lambda: wrong)
    with pytest.raises(CheckpointError, match=r"was read as \[32, 48\] and not as \[48, 32\]"):
        load_params(checkpoint, keep_quantized=True)


def test_the_report_is_readable():
    report = load.LoadReport(3, 2_000_000_000, 1000, {"cast from float32 to bfloat16": 1000}, 0.5)
    assert str(report) == (
        "3 tensors, 2.000 GB in 0.500 s (4.0 GB/s), 1,000 bytes copied (cast from float32 to bfloat16: 1,000)"
    )


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (altered(NORM, None), r"no tensor 'model.norm.weight'; the model needs one of shape \[32\]"),
        (altered(NORM, np.ones(31, np.float32)), r"'model.norm.weight' has the shape \[31\], and .* asks for \[32\]"),
        (altered(NORM, np.ones((1, 32), np.float32)), r"shape \[1, 32\], and its configuration asks for \[32\]"),
        (altered(NORM, np.ones(32, np.int32)), "is int32; weights must be floating-point"),
        (altered("model.layers.2.extra", np.ones(2, np.float32)), "has the tensor 'model.layers.2.extra', which"),
    ],
)
def test_tensors_that_do_not_fit_the_configuration_are_named(checkpoint, message):
    with pytest.raises(CheckpointError, match=message):
        load_params(checkpoint)


@pytest.mark.parametrize(
    "name", ["model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"]
)
def test_known_buffers_and_the_head_of_a_tied_model_are_passed_over(name):
    params, report = load_params(altered(name, np.ones((64, 32), np.float32)))
    assert params.head is None
    assert report.tensors == len(specs(CONFIG))


def test_an_error_while_reading_reaches_the_caller():
    def fail() -> np.ndarray:
        raise CheckpointError("the disk is gone")

    with pytest.raises(CheckpointError, match="the disk is gone"):
        load_params(altered(GATE, GATE_VALUES, read=fail))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights_depend_on_seed_and_name_and_not_on_threads(dtype, monkeypatch):
    params = random_params(CONFIG, dtype, seed=7)
    monkeypatch.setattr(load, "THREADS", 1)
    again = random_params(CONFIG, dtype, seed=7)
    other = random_params(CONFIG, dtype, seed=8)
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), params, again)
    assert all(jax.tree.leaves(same))
    first, second = params.layers
    assert not np.array_equal(first.q, second.q)
    assert not np.array_equal(first.q, other.layers[0].q)


def test_random_weights_keep_the_scale_of_a_normed_input():
    config = dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=4096, vocab_size=9000)
    checkpoint = random_checkpoint(config, "float32", seed=0)
    matrix = checkpoint.tensors["model.layers.0.mlp.down_proj.weight"].read()
    # A million samples: the standard error of both figures is below a thousandth of the deviation.
    assert abs(matrix.std() * np.sqrt(4096) - 1) < 0.01
    assert abs(matrix.mean() * np.sqrt(4096)) < 0.01
    assert abs(checkpoint.tensors["model.embed_tokens.weight"].read().std() - 0.02) < 2e-4
    assert (checkpoint.tensors[NORM].read() == 1).all()
    assert (checkpoint.tensors["model.layers.0.self_attn.q_proj.bias"].read() == 0).all()


def test_random_weights_in_bfloat16_are_those_in_float32_rounded():
    full, half = (random_checkpoint(CONFIG, dtype, 3).tensors[GATE].read() for dtype in ("float32", "bfloat16"))
    assert full.astype(ml_dtypes.bfloat16).tobytes() == half.tobytes()


def test_random_weights_are_shared_with_the_device_and_not_copied():
    _, report = load_params(random_checkpoint(CONFIG, "bfloat16", seed=0))
    assert report.bytes_copied == 0


def test_random_weights_of_an_integer_type_are_refused():
    with pytest.raises(CheckpointError, match="not in int8"):
        random_checkpoint(CONFIG, "int8")


def test_a_chunk_that_ends_inside_a_word_is_filled(monkeypatch):
    monkeypatch.setattr(random, "_CHUNK", 12)
    spec = specs(dataclasses.replace(CONFIG, vocab_size=7, hidden_size=5))["model.embed_tokens.weight"]
    values = random._draw(spec, np.dtype(np.float32), 0)
    assert len(np.unique(values)) > 25


MEMORY = """
import resource, sys
from fusedllm.backend import kept_codes
from fusedllm.config import ModelConfig
from fusedllm.weights.load import load_params
from fusedllm.weights.random import random_checkpoint

config = ModelConfig("llama", 32_000, 1024, 4096, 8, 16, 8, 64, 4096, tie_embeddings=True)
small = ModelConfig("llama", 64, 32, 48, 1, 4, 2, 8, 128)
load_params(random_checkpoint(small, "float32"))
unit = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
params, report = load_params(random_checkpoint(config, "float32"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before) / report.bytes)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no getrusage")
def test_making_random_weights_takes_little_more_memory_than_the_weights():
    ran = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 1.1


def test_what_is_not_a_checkpoint_is_described(tmp_path):
    def refused(name: str, content: bytes | None = None) -> str:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        return str(caught.value)

    assert refused("nothing") == f"there is no file or directory {tmp_path / 'nothing'}."
    assert "an empty file" in refused("empty", b"")
    assert "begins with b'what is '" in refused("text", b"what is this?")
    assert "zip archive" in refused("pytorch_model.bin", b"PK\x03\x04rest")
    assert "pickle" in refused("old.pt", b"\x80\x02rest")
    assert "git lfs pull" in refused("model.gguf", b"version https://git-lfs.github.com/spec/v1")
    (tmp_path / "directory").mkdir()
    assert "it is empty" in refused("directory")
    (tmp_path / "directory" / "weights.bin").touch()
    assert "it holds weights.bin" in refused("directory")


def test_a_directory_with_one_checkpoint_file_is_that_checkpoint(tmp_path):
    from fusedllm.weights import arrow

    arrow.write(random_checkpoint(CONFIG, "bfloat16"), tmp_path / "model.arrow")
    (tmp_path / "README.md").touch()
    assert open_checkpoint(Path(tmp_path)).format == "arrow"
