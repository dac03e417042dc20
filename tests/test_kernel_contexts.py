"""What operations choose at the edges of what kernels take, and in which contexts a traced program is used again."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import random_codes
from test_norm_linear import EPS, Case, matrix, on_a_gpu

from fusedllm.kernels.choose import traced_for
from fusedllm.kernels.dequantize import dequantize
from fusedllm.kernels.linear import linear
from fusedllm.kernels.norm_linear import norm_swiglu
from fusedllm.partition.plain import Plain
from fusedllm.quant.schemes import SCHEMES

# jax says so from 0.11 on, whatever the kernel.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")


def test_one_column_and_no_token_are_no_crash():
    weight = random_codes(SCHEMES["int4-g64"], (5, 1), 0)
    with on_a_gpu():
        (product,) = linear(jnp.full((1, 1), 2.0), weight)
        (nothing,) = linear(jnp.zeros((0, 1)), weight)
    # One product, rounded once or twice.
    np.testing.assert_allclose(product, 2 * matrix(weight).T, rtol=2.0**-22)
    assert nothing.shape == (0, 5)


@pytest.mark.parametrize("tokens", [2, 8])
def test_a_sum_of_two_dtypes_is_of_the_wider(tokens):
    case = Case(1, tokens, "plain", "bfloat16", heights=(37, 37))
    with on_a_gpu():
        run = functools.partial(norm_swiglu, eps=EPS, delta=case.delta.astype("float32"))
        total, active = run(case.x, case.norm, *case.weights)
    wanted = run(case.x, case.norm, *case.weights, implementation="xla")
    assert (total.dtype, active.dtype) == (jnp.float32, jnp.float32) == tuple(x.dtype for x in wanted)
    # float32, of bfloat16 weights: sums in another order.
    np.testing.assert_allclose(active, wanted[1], rtol=1e-4, atol=1e-4 * np.abs(wanted[1]).max())


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("capabilities", [(8.0, 9.0), (9.0, 8.0)])
def test_a_program_for_one_gpu_is_not_found_for_another(tokens, capabilities):
    weight = random_codes(SCHEMES["fp8"], (5 + int(capabilities[0]), 512), 0)
    x = jnp.ones((tokens, 512))
    for capability in capabilities:
        with traced_for("gpu", capability):
            for program in (jax.make_jaxpr(lambda x: linear(x, weight)), jax.make_jaxpr(lambda _: dequantize(weight))):
                assert ("f8_e4m3" in str(program(x))) == (capability == 9.0)


@pytest.mark.parametrize("placement", [Plain(), Plain(platform="gpu")])
def test_what_a_placement_compiles_is_for_where_it_is_traced(placement):
    x, weight = jnp.ones((1, 512)), jnp.ones((37, 512))

    def multiply(x):
        return linear(x, weight)

    def kernels():
        # The platform of the second is said; which GPU it is, only around it.
        return str(jax.make_jaxpr(lambda x: placement.compile(multiply)(x))(x)).count("pallas_call")

    for capability, wanted in ((9.0, 1), (7.5, 0), (8.0, 1)):
        with traced_for("gpu", capability):
            assert kernels() == wanted
    if placement.platform is None:
        assert kernels() == 0
