"""Random quantized matrices for the tests of kernels: GGUF blocks and grouped codes, and the packed layouts of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fusedllm.kernels import packed
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.kernels.grouped import pack as pack_codes
from fusedllm.qarray import QuantArray
from fusedllm.quant import schemes
from fusedllm.quant.blocks import SCHEMES

NAMES = tuple(packed.SCHEMES)
# Every layout that grouped codes have; those that round activations in another way are left out.
GROUPED = tuple(name for name, scheme in schemes.SCHEMES.items() if name != "fp8" and scheme.activation_bits is None)
# Of those, one a format and way of sharing scales.
SOME_GROUPED = ("int8", "int8-g64", "int4-g32", "int4-g128", "int4-g64-sym", "int3-g64", "int3-g128-sym")


def blocks(name: str, rows: int, width: int, rng: np.random.Generator, scale: float = 0.01) -> np.ndarray:
    """Blocks with random codes, scales of both signs up to `scale`, and minimums where the format has them."""
    scheme = SCHEMES[name]
    made = rng.integers(0, 256, (rows, width // 32, scheme.block_bytes)).astype(np.uint8)
    for number in range(1 + packed.SCHEMES[name].has_minimums):
        values = (rng.uniform(-scale, scale, made.shape[:2])).astype(np.float16)
        made[..., 2 * number : 2 * number + 2] = values[..., None].view(np.uint8)
    return made.reshape(rows, -1)


def raw(name: str, width: int, made: np.ndarray) -> QuantArray:
    """The blocks as they are in a file."""
    return QuantArray(jax.device_put(made), None, None, SCHEMES[name], (len(made), width))


def pack(name: str, width: int, made: np.ndarray) -> QuantArray:
    """The blocks in the layout of the native kernels."""
    return pack_array(raw(name, width, made))


def pack_array(array: QuantArray) -> QuantArray:
    """Blocks or grouped codes in the layout of the native kernels."""
    layout = packed.layout_of(array)
    assert layout is not None
    out = np.empty(layout.packed_shape(array.shape), np.uint8)
    packed.pack(array, layout, out)
    return QuantArray(jax.device_put(out), None, None, layout, array.shape)


def grouped(
    scheme: str | GroupedScheme,
    rows: int,
    width: int,
    rng: np.random.Generator,
    scale: float = 0.01,
    scales: np.ndarray | None = None,
    zeros: np.ndarray | None = None,
) -> QuantArray:
    """Every code there is for a number, scales of both signs up to `scale`, and zero points that are no integers."""
    scheme = schemes.scheme_named(scheme)
    size = (rows, scheme.groups(width))
    # What fills the last group is part of the file, and no value may depend on it.
    codes = rng.integers(0, 2**scheme.bits, (rows, scheme.padded(width)))
    if scheme.codes == "float8":
        # All ones but the sign are no number.
        codes -= codes % 128 == 127
    if scales is None:
        scales = rng.uniform(-scale, scale, size).astype(np.float16)
    if zeros is None and not scheme.symmetric:
        zeros = rng.uniform(-2, scheme.highest + 2, size).astype(np.float16)
    values = pack_codes(np, codes.astype(np.uint8), scheme.bits)
    return QuantArray(*map(as_device, (values, scales, zeros)), scheme, (rows, width))


def as_device(array: np.ndarray | None) -> jax.Array | None:
    """On jax's device, or `None` as it is."""
    return None if array is None else jnp.asarray(array)


def random_packed(name: str, rows: int, width: int, rng: np.random.Generator, scale: float = 0.01) -> QuantArray:
    """A random packed matrix made of GGUF's blocks or of the codes of a scheme of ours, whichever has that name."""
    if name in NAMES:
        return pack(name, width, blocks(name, rows, width, rng, scale))
    return pack_array(grouped(name, rows, width, rng, scale))
