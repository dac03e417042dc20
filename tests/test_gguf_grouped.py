"""Grouped codes as GGUF's blocks: the same values, in a file that our reader and llama.cpp's library decode alike."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from test_calibrate import CONFIG

import fusedllm
from fusedllm.errors import QuantizationError
from fusedllm.quant.blocks import SCHEMES as BLOCKS
from fusedllm.quant.schemes import SCHEMES
from fusedllm.weights.convert import convert
from fusedllm.weights.gguf_grouped import block_name, blocks_of
from fusedllm.weights.open import open_checkpoint
from fusedllm.weights.quantized import of_table
from fusedllm.weights.random import random_checkpoint


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if block_name(SCHEMES[name], 96)])
def test_blocks_have_the_values_of_the_codes(scheme):
    weights = np.random.default_rng(0).standard_normal((6, 96)).astype(np.float32)
    weights[1] = 0
    array = fusedllm.quantize_array(weights, scheme)
    name = block_name(SCHEMES[scheme], 96)
    decoded = BLOCKS[name].decode_numpy(blocks_of(array, name), weights.shape)
    if name == "Q4_1":
        # The minimum, up to fifteen steps, is rounded to eleven bits.
        step = np.repeat(np.asarray(array.scales, np.float32), SCHEMES[scheme].group_size, 1)[:, :96]
        assert (np.abs(decoded - array.dequantize()) <= step * 15 * 2**-11).all()
    else:
        np.testing.assert_array_equal(decoded, array.dequantize())


@pytest.mark.parametrize(("scheme", "scale_dtype"), [("int4-g32", "float16"), ("int4-g32-sym", "float32")])
def test_what_is_beyond_the_float16_of_a_block_is_refused_by_its_tensor(scheme, scale_dtype, tmp_path):
    """Q4_1 stores its minimum, fifteen times a scale; before, both became infinite in silence."""
    checkpoint = random_checkpoint(CONFIG, "float32")
    weights = {name: np.asarray(tensor.read()) for name, tensor in checkpoint.tensors.items()}
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = -np.abs(weights[name]) * np.float32(8e5 / np.abs(weights[name]).max())
    table = fusedllm.quantize(
        weights,
        scheme,
        scale_dtype=scale_dtype,
        rules={"embed": "keep"},
        model=convert(checkpoint, tmp_path / "m.arrow"),
    )
    with pytest.raises(QuantizationError, match=rf"{name}: Q4_. has scales and minimums of float16"):
        convert(of_table(table), tmp_path / "q.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.arrow"]


def test_a_scale_that_float16_would_make_zero_is_refused():
    array = fusedllm.quantize_array(np.full((2, 64), 1e-9, np.float32), "int8-g32", scale_dtype="float32")
    with pytest.raises(QuantizationError, match=r"Q8_0 has scales of float16, and 7\.87e-12 would become zero"):
        blocks_of(array, "Q8_0")


def test_other_codes_have_no_blocks():
    assert block_name(SCHEMES["fp8"], 96) is None
    assert block_name(SCHEMES["int4-g64"], 100) is None


def test_a_quantized_table_becomes_a_gguf_of_the_same_model(tmp_path):
    table = fusedllm.quantize(random_checkpoint(CONFIG, "float32"), "int4-g64-sym", rules={"embed|head": "int8"})
    with pa.ipc.new_file(tmp_path / "q.arrow", table.schema) as writer:
        writer.write_table(table)
    convert(open_checkpoint(tmp_path / "q.arrow"), tmp_path / "q.gguf")
    made = open_checkpoint(tmp_path / "q.gguf")
    kinds = {tensor.quantization for tensor in made.tensors.values()}
    assert kinds == {"Q4_0", "Q8_0", None}
    before = fusedllm.load(table, dtype="float32", max_context=64).logits(list(range(20)))
    after = fusedllm.load(tmp_path / "q.gguf", dtype="float32", max_context=64).logits(list(range(20)))
    # Rows of q and k are in another order in the file, and come back.
    np.testing.assert_allclose(after, before, atol=1e-4)
