"""GGUF's block formats decode to the same bits everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusedllm.qarray import QuantArray
from fusedllm.quant.blocks import SCHEMES, BlockScheme

gguf = pytest.importorskip("gguf")


def random_blocks(scheme: BlockScheme, rows: int, blocks_per_row: int, seed: int = 0) -> np.ndarray:
    shape = (rows, blocks_per_row * scheme.block_bytes)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def library_decode(scheme: BlockScheme, values: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(values, gguf.GGMLQuantizationType[scheme.name])


def as_quant_array(scheme: BlockScheme, values: np.ndarray, shape: tuple[int, ...]) -> QuantArray:
    return QuantArray(jnp.asarray(values), None, None, scheme, shape)


def assert_same_bits(found: np.ndarray, wanted: np.ndarray) -> None:
    # Random float16 scales are sometimes NaN or infinite; a NaN's sign and payload are nobody's promise.
    assert found.dtype == wanted.dtype == np.float32
    assert found.shape == wanted.shape
    nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found.view(np.uint32)[~nan], wanted.view(np.uint32)[~nan])


every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)


@every_scheme
def test_numpy_decoding_equals_the_gguf_library_bit_for_bit(scheme):
    values = random_blocks(scheme, rows=64, blocks_per_row=5)
    shape = (64, 5 * scheme.block_size)
    assert_same_bits(scheme.decode_numpy(values, shape), library_decode(scheme, values))


@every_scheme
def test_jitted_decoding_equals_the_gguf_library_bit_for_bit(scheme):
    values = random_blocks(scheme, rows=64, blocks_per_row=5, seed=1)
    array = as_quant_array(scheme, values, (64, 5 * scheme.block_size))
    decoded = jax.jit(lambda array: array.dequantize())(array)
    assert_same_bits(np.asarray(decoded), library_decode(scheme, values))


@every_scheme
def test_decoding_in_chunks_equals_decoding_at_once(scheme, monkeypatch):
    values = random_blocks(scheme, rows=7, blocks_per_row=3)
    shape = (7, 3 * scheme.block_size)
    at_once = scheme.decode_numpy(values, shape)
    monkeypatch.setattr("fusedllm.quant.blocks._CHUNK_WEIGHTS", 4 * scheme.block_size)
    assert_same_bits(scheme.decode_numpy(values, shape), at_once)


@every_scheme
def test_block_sizes_and_bits_per_weight_are_those_of_the_gguf_library(scheme):
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[scheme.name]]
    assert (scheme.block_size, scheme.block_bytes) == sizes
    assert scheme.bits_per_weight == 8 * sizes[1] / sizes[0]


@every_scheme
def test_a_scheme_is_a_hashable_part_of_a_program_key(scheme):
    array = as_quant_array(scheme, random_blocks(scheme, 2, 1), (2, scheme.block_size))
    leaves, structure = jax.tree.flatten(array)
    assert [leaf.dtype for leaf in leaves] == [np.uint8]
    assert hash(structure) == hash(jax.tree.structure(array))


def test_decoding_to_bfloat16_rounds_the_float32_values():
    scheme = SCHEMES["Q8_0"]
    array = as_quant_array(scheme, np.full((1, 34), 17, np.uint8), (1, 32))
    assert array.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
    assert array.dequantize(jnp.bfloat16)[0, 0] == array.dequantize()[0, 0].astype(jnp.bfloat16)
