"""Which implementation each operation takes by itself, on every kind of device: the whole table."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from fusedllm.kernels import native
from fusedllm.kernels.attention import paged_attention
from fusedllm.kernels.cached_attention import cached_attention
from fusedllm.kernels.choose import traced_for
from fusedllm.kernels.dequantize import dequantize
from fusedllm.kernels.draw import draw
from fusedllm.kernels.embed import embed
from fusedllm.kernels.hadamard import hadamard
from fusedllm.kernels.linear import linear
from fusedllm.kernels.norm_linear import norm_linear, norm_swiglu
from fusedllm.kernels.quantize import quantize
from fusedllm.kernels.ring_linear import ring_linear
from fusedllm.kernels.rms_norm import rms_norm
from fusedllm.kernels.swiglu import swiglu
from fusedllm.quant.schemes import SCHEMES

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

# By the name of jax's platform and the compute capability, which AMD's GPUs have none of.
CPU, HOPPER, AMPERE, TURING, AMD, TPU = (
    ("cpu", None),
    ("gpu", 9.0),
    ("gpu", 8.0),
    ("gpu", 7.5),
    ("gpu", None),
    ("tpu", None),
)
ALL_XLA = dict.fromkeys((CPU, HOPPER, AMPERE, TURING, AMD, TPU), "xla")
NATIVE = {**ALL_XLA, CPU: "ffi"}
KERNEL = {**ALL_XLA, HOPPER: "pallas", AMPERE: "pallas", AMD: "pallas"}
BOTH = {**KERNEL, CPU: "ffi"}
# Tiles of more shared memory than AMD's GPUs have.
NVIDIA = {**BOTH, AMD: "xla"}

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 2048, 8192, 32, 8, 64


def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def codes(name: str, rows: int, width: int) -> Any:
    return jax.eval_shape(lambda w: quantize(w, SCHEMES[name], implementation="xla"), array(rows, width))


def attention(seq: int, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
    pages = (array(33, KV_HEADS, 16, HEAD_DIM, dtype=dtype),) * 2
    pages += (array(33, KV_HEADS, 16, dtype=jnp.float32),) * (2 if dtype == jnp.int8 else 0)
    heads = [array(1, seq, count, HEAD_DIM) for count in (HEADS, KV_HEADS, KV_HEADS)]
    angles = [array(1, seq, HEAD_DIM // 2, dtype=jnp.float32)] * 2
    return (*heads, *angles, pages, array(1, 32, dtype=jnp.int32), array(1, dtype=jnp.int32))


def paged(q: Any, k: Any, v: Any, cos: Any, sin: Any, pages: Any, *places: Any) -> jax.Array:
    return paged_attention(q, *pages, *places)


def normed(x: Any, norm: Any, *weights: Any) -> Any:
    return norm_linear(x, norm, *weights, eps=1e-5)


def gated(x: Any, norm: Any, gate: Any, up: Any) -> Any:
    return norm_swiglu(x, norm, gate, up, eps=1e-5)


PLAIN = array(FFN, HIDDEN)
NORM = array(HIDDEN)
FLOATS = array(1, HIDDEN, dtype=jnp.float32)
ONE = array(1, dtype=jnp.float32)
TABLE = {
    "attention of one new position": (cached_attention, attention(1), BOTH),
    "the same over int8": (cached_attention, attention(1, jnp.int8), BOTH),
    "attention of a prompt": (cached_attention, attention(512), BOTH),
    "attention alone": (paged, attention(512), KERNEL),
    "a plain product of a token": (linear, (array(1, HIDDEN), PLAIN), BOTH),
    "of eight": (linear, (array(8, HIDDEN), PLAIN), NVIDIA),
    "of a prompt": (linear, (array(512, HIDDEN), PLAIN), NATIVE),
    "codes of four bits, a token": (linear, (array(1, HIDDEN), codes("int4-g64", FFN, HIDDEN)), KERNEL),
    "of a prompt in four bits": (linear, (array(512, HIDDEN), codes("int4-g64", FFN, HIDDEN)), KERNEL),
    "of a prompt in integers": (linear, (array(512, HIDDEN), codes("w8a8", FFN, HIDDEN)), KERNEL),
    "norm and products of a token": (normed, (array(1, HIDDEN), NORM, PLAIN, PLAIN), BOTH),
    "norm, products and SwiGLU of a token": (gated, (array(1, HIDDEN), NORM, PLAIN, PLAIN), BOTH),
    "norm": (lambda x, norm: rms_norm(x, norm, 1e-5), (array(512, HIDDEN), NORM), KERNEL),
    "norm in float32": (lambda x, norm: rms_norm(x, norm, 1e-5), (FLOATS, NORM), BOTH),
    "SwiGLU": (swiglu, (array(512, FFN),) * 2, ALL_XLA),
    "SwiGLU in float32": (swiglu, (FLOATS, FLOATS), NATIVE),
    "rows of a table": (lambda t, ids: embed(t, ids, jnp.bfloat16), (PLAIN, array(4, dtype=jnp.int32)), ALL_XLA),
    "the draw": (draw, (FLOATS, ONE, array(1, dtype=jnp.int32), ONE, ONE, ONE), NATIVE),
    "quantizing": (lambda w: quantize(w, SCHEMES["int4-g64"]), (PLAIN,), BOTH),
    "decoding": (lambda w: dequantize(w, jnp.bfloat16), (codes("int4-g64", FFN, HIDDEN),), BOTH),
    "limbs": (ring_linear, (array(1, 64, dtype=jnp.int32), array(32, 64, dtype=jnp.int8)), BOTH),
    "a Hadamard transform": (hadamard, (FLOATS,), NATIVE),
}  # fmt: skip


@pytest.mark.parametrize("where", ALL_XLA, ids=str)
@pytest.mark.parametrize("case", TABLE)
def test_the_automatic_choice_is_the_intended_one(case, where):
    function, operands, wanted = TABLE[case]
    if wanted[where] == "ffi" and not native.available():
        pytest.skip("the native kernels were not built")
    with traced_for(*where):
        # A function of its own, as jax remembers what it has traced for another device.
        program = str(jax.make_jaxpr(lambda *x: function(*x))(*operands))
    found = {name for name, mark in (("ffi", "ffi_call["), ("pallas", "pallas_call[")) if mark in program}
    assert found == ({wanted[where]} - {"xla"}), program[:2000]
    assert "mosaic" not in program
