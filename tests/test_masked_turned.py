"""Models whose o and down take turned inputs: under every policy, as tables, and in formats that can't say it."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_ENGINE

from fusedllm.cli.main import main
from fusedllm.errors import PolicyError, QuantizationError
from fusedllm.kernels.quantize import quantize as quantize_matrix
from fusedllm.llm import load
from fusedllm.model.placement import Site
from fusedllm.partition.integer import IntegerBoundary, integer_product
from fusedllm.partition.link import Driven
from fusedllm.quant.schemes import SCHEMES
from fusedllm.quantizing import quantize
from fusedllm.weights.convert import convert

PROMPT = np.random.default_rng(4).integers(3, 80, 37).tolist()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The tiny model; its o is 64 wide, its down 112, of which sixteen are turned together."""
    from reference import tiny

    return tiny.write("llama3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def table(source):
    return quantize(source, "w8a8-turned")


def test_every_policy_gives_the_same_bits(source, table):
    found = {}
    for policy in ("verify", "masked", "masked+verify", "split"):
        llm = load(table, policy=policy, engine=TINY_ENGINE)
        found[policy] = llm.logits(PROMPT)
        if policy not in ("split", "plain"):
            llm._applied.placement.boundary.close()
    for policy, logits in found.items():
        np.testing.assert_array_equal(logits, found["verify"], err_msg=policy)
    # One program for all contracts products and additions that segments of their own can't; of logits of some 10.
    np.testing.assert_allclose(load(table, engine=TINY_ENGINE).logits(PROMPT), found["verify"], atol=1e-4)
    unturned = load(quantize(source, "w8a8"), policy="verify", engine=TINY_ENGINE)
    assert (unturned.logits(PROMPT) != found["verify"]).mean() > 0.9
    unturned._applied.placement.boundary.close()


def test_a_site_of_both_kinds_is_refused():
    link = Driven(jax.devices()[0], integer_product(implementation=None))
    boundary = IntegerBoundary(link, masked=False, verified=False)
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((8, 32)), jnp.float32)
    plain, turned = (quantize_matrix(matrix, SCHEMES[name]) for name in ("w8a8", "w8a8-h"))
    site = Site("gate_up", 0)
    with pytest.raises(PolicyError, match="gate_up of layer 0 share their activations, and some want them turned"):
        boundary.place(site, (plain, turned))
    assert boundary.place(site, (turned, turned)).turned
    assert not boundary.place(site, (plain, plain)).turned


@pytest.mark.parametrize("name", ["q.gguf", "q.safetensors"])
def test_formats_that_can_not_say_it_refuse_before_and_after_it_is_made(source, table, tmp_path, capsys, name):
    for arguments in (["--scheme", "w8a8-turned"], ["--scheme", "int8", "--rule", "down=w8a8-h"]):
        assert main(["quantize", str(source), str(tmp_path / name), *arguments]) == 2
        message = capsys.readouterr().err
        assert re.search(rf"products with w8a8-h turn their inputs .*{name} has no way to say", message)
    assert main(["quantize", str(source), str(tmp_path / "q.arrow"), "--scheme", "w8a8-turned"]) == 0
    with pytest.raises(QuantizationError, match=r"o_proj\.weight \(w8a8-h.* turn their inputs"):
        convert(tmp_path / "q.arrow", tmp_path / name)
    np.testing.assert_array_equal(
        load(tmp_path / "q.arrow", engine=TINY_ENGINE).logits(PROMPT), load(table, engine=TINY_ENGINE).logits(PROMPT)
    )
    # As floats it is the same model, of which nothing is turned any more.
    convert(tmp_path / "q.arrow", tmp_path / name, dtype="float32")
    floats = load(tmp_path / name, engine=TINY_ENGINE).logits(PROMPT)
    exact = load(source, engine=TINY_ENGINE).logits(PROMPT)
    # What int8 weights move the logits of this random model by.
    np.testing.assert_allclose(floats, exact, atol=0.15 * np.abs(exact).max())
