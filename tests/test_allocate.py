"""Bits where they matter: the budget is kept, what is spent is spent best, and sensitivity is what it says."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_calibrate import CONFIG, TOKENS, divergence, logits

import fusedllm
from fusedllm.calibrate import sensitivity
from fusedllm.calibrate.run import Run
from fusedllm.calibrate.sensitivity import choose_schemes, expected_losses
from fusedllm.errors import QuantizationError
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.kernels.quantize import quantize as quantize_kernel
from fusedllm.quant.allocate import Choice, allocate
from fusedllm.quant.methods import method_named
from fusedllm.quant.schemes import SCHEMES
from fusedllm.weights.checkpoint import Checkpoint
from fusedllm.weights.random import random_checkpoint

choices = st.lists(
    st.builds(Choice, st.uuids().map(str), st.integers(1, 50), st.floats(0, 10, allow_nan=False)),
    min_size=1,
    max_size=4,
)


@given(st.dictionaries(st.text(min_size=1, max_size=2), choices, min_size=1, max_size=4), st.integers(0, 200))
def test_a_budget_is_never_exceeded_and_refused_only_if_nothing_fits(tensors, budget):
    least = sum(min(one.bits for one in some) for some in tensors.values())
    if least > budget:
        with pytest.raises(QuantizationError, match="bits, and"):
            allocate(tensors, budget)
        return
    found = allocate(tensors, budget)
    taken = {name: next(one for one in some if one.name == found[name]) for name, some in tensors.items()}
    assert sum(one.bits for one in taken.values()) <= budget
    # As good as the best of all combinations, but for what one step of a tensor's hull could still save.
    best = min(
        sum(one.loss for one in combination)
        for combination in itertools.product(*tensors.values())
        if sum(one.bits for one in combination) <= budget
    )
    slack = max(max(one.loss for one in some) for some in tensors.values())
    assert sum(one.loss for one in taken.values()) <= best + slack + 1e-9


def test_the_tensor_that_matters_gets_the_bits():
    def options(weight: float) -> list[Choice]:
        return [Choice("three", 3, weight), Choice("four", 4, weight / 4), Choice("eight", 8, weight / 1000)]

    found = allocate({"minor": options(1.0), "major": options(100.0)}, 11)
    assert found == {"minor": "three", "major": "eight"}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return random_checkpoint(CONFIG, "float32")


def expected(checkpoint: Checkpoint, names: list[str], schemes: list[GroupedScheme]) -> dict[str, list[float]]:
    run = Run(checkpoint, TOKENS, lambda name, shape: schemes[0], method_named("rtn"))
    return expected_losses(run, names, schemes)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_the_expected_loss_is_the_divergence_that_is_found(checkpoint, name):
    """Within a factor: inputs and gradients are not independent, and gradients are drawn for 128 tokens."""
    values = {one: np.asarray(tensor.read()) for one, tensor in checkpoint.tensors.items()}
    exact = logits(checkpoint, values)
    scheme = SCHEMES["int4-g32"]
    ((loss,),) = expected(checkpoint, [name], [scheme]).values()
    rounded = np.asarray(fusedllm.quantize_array(values[name], scheme).dequantize())
    found = divergence(exact, logits(checkpoint, {**values, name: rounded}))
    assert found / 2.5 < loss < found * 2.5


def test_a_matrix_that_is_embedding_and_head_loses_in_both_places(checkpoint):
    tied = random_checkpoint(dataclasses.replace(CONFIG, tie_embeddings=True), "float32")
    shared = tied.tensors["model.embed_tokens.weight"]
    apart = dataclasses.replace(
        checkpoint, tensors={**tied.tensors, "lm_head.weight": dataclasses.replace(shared, name="lm_head.weight")}
    )
    schemes = [SCHEMES["int3-g64"], SCHEMES["int8-g128"]]
    (both,) = expected(tied, ["model.embed_tokens.weight"], schemes).values()
    parts = expected(apart, ["model.embed_tokens.weight", "lm_head.weight"], schemes)
    # Sums of two float32, in two orders.
    np.testing.assert_allclose(both, np.sum(list(parts.values()), axis=0), rtol=1e-6)
    assert all(loss > 0 for losses in parts.values() for loss in losses)


def test_second_moments_of_one_layer_are_in_memory_at_a_time(monkeypatch):
    deep = random_checkpoint(dataclasses.replace(CONFIG, num_layers=5, sliding_windows=()), "float32")
    width = CONFIG.intermediate_size
    alive = []

    def counted(*arguments, **options):
        alive.append(sum(array.shape == (width, width) for array in jax.live_arrays()))
        return quantize_kernel(*arguments, **options)

    monkeypatch.setattr(sensitivity, "quantize", counted)
    losses = expected(deep, [name for name in deep.tensors if "_proj" in name], [SCHEMES["int4-g32"]])
    assert len(losses) == len(alive) == 5 * 7
    # Of the one matrix of a layer that has inputs of this width.
    assert max(alive) == 1


def test_a_target_is_kept_and_more_bits_are_better(checkpoint):
    values = {name: np.asarray(tensor.read()) for name, tensor in checkpoint.tensors.items()}
    exact = logits(checkpoint, values)
    found = []
    # float32 norms are 0.7 bits per weight of this small model.
    for target in (4.5, 8.0):
        table = fusedllm.quantize(checkpoint, method="clip", target_bpw=target, calibration=TOKENS)
        report = fusedllm.quantize_report(table)
        assert target - 0.6 < report.bits_per_weight <= target
        llm = fusedllm.load(table, dtype="float32", max_context=64)
        found.append(divergence(exact, np.stack([llm.logits(row.tolist()) for row in TOKENS])))
    assert found[1] < found[0] / 2


def test_rules_hold_under_a_target(checkpoint):
    table = fusedllm.quantize(
        checkpoint, target_bpw=9.0, calibration=TOKENS, rules={"lm_head": "int8", "o_proj": "keep"}
    )
    schemes = dict(zip(table["layer_name"].to_pylist(), table["scheme"].to_pylist(), strict=True))
    assert schemes["lm_head.weight"] == "int8"
    assert schemes["model.layers.0.self_attn.o_proj.weight"] == "float32"
    assert fusedllm.quantize_report(table).bits_per_weight <= 9.0
    # Vectors stay, and count as what they are, though a rule finds them.
    table = fusedllm.quantize(checkpoint, target_bpw=5.0, calibration=TOKENS, rules={"norm": "int8"})
    assert fusedllm.quantize_report(table).bits_per_weight <= 5.0


def test_a_target_that_nothing_meets_is_refused(checkpoint):
    run = Run(checkpoint, TOKENS, lambda name, shape: SCHEMES["int4-g32"], method_named("rtn"))
    with pytest.raises(QuantizationError, match="from 0 to 32, got -1"):
        choose_schemes(run, -1)
    with pytest.raises(QuantizationError, match="from 0 to 32, got '4'"):
        choose_schemes(run, "4")
    with pytest.raises(QuantizationError, match="allow more bits per weight"):
        fusedllm.quantize(checkpoint, target_bpw=2.0, calibration=TOKENS)
