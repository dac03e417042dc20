"""What tests of kernels share: codes that no quantizer makes, steps of numbers, and a GPU that is not here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fusedllm.qarray import QuantArray

# Half of the last bit's step, of a number just below a power of two, relative to it: what errors of many stay below.
HALF_STEP = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-12}


def random_codes(scheme, shape, seed, scale_dtype="float16"):
    """Any bytes, as a quantizer need not make them, with scales of both signs and zero points between codes."""
    rng = np.random.default_rng(seed)
    rows, width = shape
    values = rng.integers(0, 256, (rows, scheme.row_bytes(width))).astype(np.uint8)
    if scheme.codes == "float8":
        values[values & 127 == 127] = 1
    grid = (rows, scheme.groups(width))
    scales = (rng.uniform(0.5, 1, grid) * rng.choice([-0.01, 0.01], grid)).astype(scale_dtype)
    zeros = None if scheme.symmetric else jnp.asarray(rng.uniform(0, scheme.highest, grid).astype(scale_dtype))
    return QuantArray(jnp.asarray(values), jnp.asarray(scales), zeros, scheme, shape)


def lowered(function, *arguments, platform="cuda", **named):
    """The program for a GPU that is not here."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return function.trace(*arguments, **named).lower(lowering_platforms=(platform,)).as_text()
