"""Rewrites of the weights: other numbers in another shape or basis, the same logits, and nothing read too early."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import tiny

import fusedllm
from fusedllm.calibrate import rotate as rotate_module
from fusedllm.calibrate.norms import fold_norms
from fusedllm.calibrate.rotate import residual_rotation, rotate, times, value_rotation
from fusedllm.calibrate.widen import wide_twin, widen
from fusedllm.cli.main import main
from fusedllm.config import ModelConfig
from fusedllm.engine.config import EngineConfig
from fusedllm.errors import CheckpointError, ConfigError
from fusedllm.model.cache import empty_cache
from fusedllm.model.families import config_from_hf, config_to_hf
from fusedllm.model.params import Params, specs
from fusedllm.model.transformer import forward, vocabulary_logits
from fusedllm.partition.plain import Plain
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor
from fusedllm.weights.convert import convert
from fusedllm.weights.load import load_params
from fusedllm.weights.open import open_checkpoint
from fusedllm.weights.random import random_checkpoint
from fusedllm.weights.registry_models import MODELS

# Of the logits' range. Each rewritten weight and each sum is rounded anew, which moves these logits by up to 1e-6 of
# it; what a rewrite may get wrong moves them by 6e-3 and more (`test_the_comparison_would_notice`).
TOLERANCE = 1e-5
# Far above a model's own (1e-5 and 1e-6), so that a wrong epsilon shows in the logits.
EPSILON = 0.1
# More tokens than the shortest window, 24.
TOKENS = 32
PAGE = 16
PINNED = [
    [-0.48268125161637, 0.837865725415308, 0.254950653092582],
    [-0.106206723776784, 0.232959784888993, -0.966669473216712],
    [0.86933246871531, 0.493670704821294, 0.023458346885281],
]
# A few thousand roundings of float64.
EXACT = 1e-12

LAYER = "model.layers.1."
HEAD, EMBEDDING, FINAL_NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
DOWN, GATE = f"{LAYER}mlp.down_proj.weight", f"{LAYER}mlp.gate_proj.weight"

Rewrite = Callable[[Checkpoint], Checkpoint]


def grown(checkpoint: Checkpoint) -> Checkpoint:
    """Wider in every way, by sizes that no block or group suggests."""
    config = checkpoint.config
    kv_heads = config.num_kv_heads + 2
    heads = kv_heads * config.num_heads // config.num_kv_heads
    return widen(checkpoint, config.hidden_size + 7, heads, kv_heads, config.intermediate_size + 5)


REWRITES: dict[str, Rewrite] = {"fold": fold_norms, "rotate": rotate, "widen": grown, "twin": wide_twin}


def checkpoint(name: str) -> Checkpoint:
    """A tiny checkpoint of `tiny.CASES`: norms away from one, biases away from zero."""
    config = dataclasses.replace(config_from_hf(tiny.CASES[name]), rms_norm_eps=EPSILON)
    return of_arrays(config, tiny.weights(name))


def of_arrays(config: ModelConfig, arrays: dict[str, np.ndarray]) -> Checkpoint:
    def tensor(name: str, values: np.ndarray) -> LazyTensor:
        return LazyTensor(name, values.shape, values.dtype, values.nbytes, lambda: values)

    return Checkpoint(config, {name: tensor(name, a) for name, a in arrays.items()}, None, "test", Path("arrays"))


def arrays_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in checkpoint.tensors.items()}


@functools.partial(jax.jit, static_argnums=0)
def run(config: ModelConfig, params: Params, ids: jax.Array) -> jax.Array:
    """Logits of all `ids`, by a program that models of one shape share."""
    cache = empty_cache(config, 1 + TOKENS // PAGE, PAGE, "float32")
    pages = 1 + jnp.arange(TOKENS // PAGE)[None]
    hidden, _ = forward(config, Plain(), params, cache, ids[None], jnp.zeros(1, jnp.int32), pages, dtype="float32")
    return vocabulary_logits(Plain(), params, hidden[0])


def logits(checkpoint: Checkpoint) -> np.ndarray:
    params, _ = load_params(checkpoint)
    ids = np.random.RandomState(0).randint(0, checkpoint.config.vocab_size, TOKENS)
    return np.asarray(run(checkpoint.config, params, jnp.asarray(ids, jnp.int32)))


@functools.cache
def expected(name: str) -> np.ndarray:
    return logits(checkpoint(name))


def error(name: str, rewritten: Checkpoint) -> float:
    """The largest difference of logits from those of the unchanged model, in units of their range."""
    return float(np.abs(logits(rewritten) - expected(name)).max() / np.ptp(expected(name)))


@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize("name", tiny.CASES)
def test_a_rewritten_model_of_any_family_gives_the_same_logits(name: str, rewrite: str) -> None:
    assert error(name, REWRITES[rewrite](checkpoint(name))) <= TOLERANCE


def test_rewrites_can_be_composed_in_any_order_and_repeated() -> None:
    chain = [fold_norms, grown, rotate, fold_norms, functools.partial(rotate, seed=1), wide_twin]
    result = functools.reduce(lambda model, rewrite: rewrite(model), chain, checkpoint("smollm2"))
    assert error("smollm2", result) <= 3 * TOLERANCE


def with_other(rewritten: Checkpoint, other: Checkpoint, *parts: str) -> Checkpoint:
    """`rewritten` with the tensors whose names contain one of `parts` taken from `other`."""
    taken = {name: t for name, t in other.tensors.items() if any(part in name for part in parts)}
    assert taken
    return dataclasses.replace(rewritten, tensors={**rewritten.tensors, **taken})


def wrong_epsilon(original: Checkpoint) -> Checkpoint:
    wide = grown(original)
    return dataclasses.replace(wide, config=dataclasses.replace(wide.config, rms_norm_eps=EPSILON))


def unscaled_keys(original: Checkpoint) -> Checkpoint:
    plain = dataclasses.replace(original, config=dataclasses.replace(original.config, qk_norm=False))
    tensors = {name: tensor for name, tensor in plain.tensors.items() if "_norm" not in name or "layernorm" in name}
    return with_other(grown(original), grown(dataclasses.replace(plain, tensors=tensors)), "k_proj")


MISTAKES: dict[str, tuple[str, Rewrite]] = {
    "epsilon was forgotten": ("llama2", wrong_epsilon),
    "norms were not scaled": ("llama2", lambda c: with_other(grown(c), wide_norms(c), "layernorm")),
    "keys were not scaled for their norm": ("qwen3", unscaled_keys),
    "one norm was not folded": ("qwen2", lambda c: with_other(fold_norms(c), c, f"{LAYER}self_attn.k_proj.weight")),
    "the head was not folded": ("llama2", lambda c: with_other(fold_norms(c), c, HEAD)),
    "one bias was not rotated": ("llama_biases", lambda c: with_other(rotate(c), c, f"{LAYER}mlp.down_proj.bias")),
    "values were not rotated back": ("mistral", lambda c: with_other(rotate(c), other_values(c), "v_proj")),
    "a bias of values was not rotated": ("qwen2", lambda c: with_other(rotate(c), c, f"{LAYER}self_attn.v_proj.bias")),
}


def wide_norms(original: Checkpoint) -> Checkpoint:
    """The norms of `original`, padded and not scaled."""
    arrays = {name: np.pad(a, (0, 7)) for name, a in arrays_of(original).items() if "layernorm" in name}
    return of_arrays(original.config, arrays)


def other_values(original: Checkpoint) -> Checkpoint:
    """v in the right basis of the residual stream, and in another one of the values."""
    q = residual_rotation(original.config.hidden_size)
    folded = arrays_of(fold_norms(original))
    return of_arrays(original.config, {n: (a @ q).astype(np.float32) for n, a in folded.items() if "v_proj" in n})


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_would_notice(mistake: str) -> None:
    name, rewrite = MISTAKES[mistake]
    assert error(name, rewrite(checkpoint(name))) > 100 * TOLERANCE


@pytest.mark.slow
def test_the_wide_twin_of_smollm2_says_what_smollm2_says(smollm2: fusedllm.LLM) -> None:
    from fusedllm.weights.registry import fetch

    twin = wide_twin(open_checkpoint(fetch("smollm2-135m", progress=False)))
    params, report = load_params(twin)
    assert report.bytes_copied == 0
    ids = json.loads((Path(__file__).parent / "data" / "smollm2.json").read_text())["perplexity"]["ids"][:64]
    wanted = smollm2.logits(ids)
    found = fusedllm.LLM(twin.config, params, engine=EngineConfig(max_context=64, prefill_buckets=(64,))).logits(ids)
    # These logits have a range of 60. Two float32 implementations of this model differ by about 1e-4, and so do two
    # bases: 2.2e-4 at most was found.
    np.testing.assert_allclose(found, wanted, atol=1e-3, rtol=0)


# What changes in the configuration, and what does not.


def test_folding_unties_a_tied_head_and_leaves_ones() -> None:
    original = checkpoint("smollm2")
    assert original.config.tie_embeddings
    folded = fold_norms(original)
    assert folded.config == dataclasses.replace(original.config, tie_embeddings=False)
    before, after = arrays_of(original), arrays_of(folded)
    assert after.keys() - before.keys() == {HEAD}
    np.testing.assert_array_equal(after[HEAD], before[EMBEDDING] * before[FINAL_NORM])
    np.testing.assert_array_equal(after[EMBEDDING], before[EMBEDDING])
    for name, values in after.items():
        if name.endswith("norm.weight"):
            assert (values == 1).all()
            assert not (before[name] == 1).any()


def test_folding_leaves_norms_over_a_head_and_biases_alone() -> None:
    before, after = (arrays_of(c) for c in (checkpoint("qwen3_yarn"), fold_norms(checkpoint("qwen3_yarn"))))
    kept = [name for name in before if name.endswith((".bias", "q_norm.weight", "k_norm.weight"))]
    assert len(kept) == 2 * 6
    for name in kept:
        np.testing.assert_array_equal(after[name], before[name])


def test_folding_twice_changes_no_bit_more() -> None:
    once, twice = (
        arrays_of(c) for c in (fold_norms(checkpoint("llama2")), fold_norms(fold_norms(checkpoint("llama2"))))
    )
    assert all(twice[name].tobytes() == values.tobytes() for name, values in once.items())


def test_a_head_that_lies_beside_a_tied_embedding_is_passed_over() -> None:
    original = checkpoint("smollm2")
    stray = LazyTensor(HEAD, (1,), np.dtype(np.float32), 4, lambda: pytest.fail("the stray head was read"))
    folded = fold_norms(dataclasses.replace(original, tensors={**original.tensors, HEAD: stray}))
    assert folded.tensors[HEAD].read().shape == original.tensors[EMBEDDING].shape


def test_widening_adds_zeros_at_the_end_and_changes_sizes_and_epsilon_only() -> None:
    original = checkpoint("llama_biases")
    wide, config = grown(original), original.config
    assert wide.config == dataclasses.replace(
        config, hidden_size=71, num_heads=12, num_kv_heads=3, intermediate_size=117, rms_norm_eps=EPSILON * 64 / 71
    )
    narrow = arrays_of(original)
    for name, values in arrays_of(wide).items():
        assert values.shape == specs(wide.config)[name].shape
        inner = tuple(slice(size) for size in narrow[name].shape)
        if not name.endswith("norm.weight"):
            np.testing.assert_array_equal(values[inner], narrow[name])
        assert np.count_nonzero(values) == np.count_nonzero(values[inner])


def test_a_width_that_is_not_asked_for_stays() -> None:
    original = checkpoint("smollm2")
    same = widen(original)
    assert same.config == original.config
    for name, values in arrays_of(same).items():
        np.testing.assert_array_equal(values, original.tensors[name].read())
    assert widen(original, 144).config == dataclasses.replace(
        original.config, hidden_size=144, rms_norm_eps=EPSILON / 2
    )


def test_the_twin_of_smollm2_has_the_shape_that_k_quants_take() -> None:
    config = MODELS["smollm2-135m"].architecture
    twin = wide_twin(random_checkpoint(config, "float32")).config
    assert (config.hidden_size, config.num_heads, config.num_kv_heads, config.intermediate_size) == (576, 9, 3, 1536)
    assert (twin.hidden_size, twin.num_heads, twin.num_kv_heads, twin.intermediate_size) == (768, 12, 4, 1536)
    assert (twin.head_dim, twin.tie_embeddings) == (64, False)
    assert twin.rms_norm_eps == pytest.approx(config.rms_norm_eps * 0.75)


@settings(max_examples=20)
@given(
    hidden=st.integers(1, 1000),
    kv_heads=st.integers(1, 12),
    group=st.integers(1, 7),
    half=st.integers(1, 80),
    ffn=st.integers(1, 1000),
)
def test_the_rows_of_any_twin_are_whole_blocks_and_no_longer_than_they_must_be(
    hidden, kv_heads, group, half, ffn
) -> None:
    config = ModelConfig("llama", 7, hidden, ffn, 1, kv_heads * group, kv_heads, 2 * half, 64)
    twin = wide_twin(random_checkpoint(config, "float32")).config
    assert twin.hidden_size == -(-hidden // 256) * 256
    assert twin.intermediate_size == -(-ffn // 256) * 256
    assert twin.num_heads == twin.num_kv_heads * group
    fits = (n for n in itertools.count(kv_heads) if n * group * 2 * half % 256 == 0)
    assert twin.num_kv_heads == next(fits)


def test_the_shape_of_a_twin_can_be_given() -> None:
    twin = wide_twin(checkpoint("smollm2"), hidden_size=76, num_heads=12, num_kv_heads=4, intermediate_size=112)
    config = twin.config
    assert (config.hidden_size, config.num_heads, config.num_kv_heads, config.intermediate_size) == (76, 12, 4, 112)
    assert error("smollm2", twin) <= TOLERANCE


@pytest.mark.parametrize("name", tiny.CASES)
def test_a_config_json_can_say_what_every_twin_is(name: str) -> None:
    config = wide_twin(checkpoint(name)).config
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((71,), "a model whose hidden_size is 72 can't be widened to 71; ask for 72 or more."),
        ((72, 6, 2), "a model whose num_heads is 9 can't be widened to 6; ask for 9 or more."),
        ((72, 9, 2), "a model whose num_kv_heads is 3 can't be widened to 2; ask for 3 or more."),
        ((72, 9, 3, 100), "a model whose intermediate_size is 112 can't be widened to 100; ask for 112 or more."),
        ((72.0,), "can't be widened to 72.0"),
        ((True,), "can't be widened to True"),
        (("768",), "can't be widened to '768'"),
        (
            (72, 12, 3),
            "the model has 3 query heads to a key/value head, so it can't be widened to 12 over 3; ask for 9 over 3.",
        ),
        ((72, None, 4), "widened to 9 over 4; ask for 12 over 4."),
    ],
)
def test_a_shape_that_does_not_hold_the_model_is_refused_in_one_sentence(sizes, message) -> None:
    with pytest.raises(ConfigError) as caught:
        widen(checkpoint("smollm2"), *sizes)
    assert message in str(caught.value)


@pytest.mark.parametrize("rewrite", REWRITES)
def test_a_checkpoint_without_a_tensor_is_refused_before_anything_is_read(rewrite: str) -> None:
    whole = checkpoint("llama2")
    tensors = {name: tensor for name, tensor in whole.tensors.items() if name != DOWN}
    with pytest.raises(CheckpointError, match=r"no tensor 'model.layers.1.mlp.down_proj.weight'"):
        REWRITES[rewrite](dataclasses.replace(whole, tensors=tensors))


# The rotations.


@pytest.mark.parametrize("size", [1, 2, 24, 130])
def test_rotations_are_orthogonal(size: int) -> None:
    for matrix in (residual_rotation(size, 3), value_rotation(size, 3, 1)):
        assert matrix.dtype == np.float64
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=EXACT)


def test_a_seed_gives_one_matrix_and_every_other_seed_layer_and_use_another() -> None:
    np.testing.assert_array_equal(residual_rotation(8, 5), residual_rotation(8, 5))
    np.testing.assert_array_equal(value_rotation(8, 5, 2), value_rotation(8, 5, 2))
    different = [residual_rotation(8, seed) for seed in (0, 1, -1, 2**32, 2**64 - 2)]
    different += [value_rotation(8, seed, layer) for seed in (0, 1) for layer in (0, 1)]
    for one, other in itertools.combinations(different, 2):
        assert np.abs(one - other).max() > 0.1


def test_the_numbers_of_a_seed_are_the_same_in_every_version() -> None:
    np.testing.assert_allclose(residual_rotation(3, 0), PINNED, atol=EXACT)


def test_rotations_lean_to_no_side() -> None:
    # The mean of an entry of variance 1/4 over 400 matrices has a standard error of 0.025. Without a correction of its
    # signs, QR of LAPACK has a first entry that is never positive, -0.42 on average.
    first = np.mean([residual_rotation(4, seed) for seed in range(400)], axis=0)
    assert np.abs(first).max() < 0.1


@settings(max_examples=30)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    axis=st.integers(0, 1),
    size=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_a_transposed_rotation_undoes_a_rotation_along_any_axis(shape, axis, size, seed) -> None:
    axis %= len(shape)
    shape[axis] *= size
    values = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
    matrix = residual_rotation(size, seed)
    turned = times(values, axis, matrix)
    # Twice the rounding of a float32 whose size is that of a whole run.
    np.testing.assert_allclose(times(turned, axis, matrix.T), values, atol=1e-6 * (1 + np.abs(values).sum()))
    np.testing.assert_allclose(np.linalg.norm(turned), np.linalg.norm(values), rtol=1e-6)


def test_a_long_matrix_is_rotated_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values, matrix = np.random.RandomState(0).standard_normal((23, 6)).astype(np.float32), residual_rotation(3)
    whole = [times(values, 1, matrix), times(values.T, 0, matrix)]
    monkeypatch.setattr(rotate_module, "_CHUNK", 30)
    for one, other in zip(whole, [times(values, 1, matrix), times(values.T, 0, matrix)], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
        np.testing.assert_allclose(whole[0], np.hstack([values[:, :3] @ matrix, values[:, 3:] @ matrix]), rtol=1e-5)


def test_the_matrices_that_are_shown_are_the_ones_that_were_used() -> None:
    original = checkpoint("llama_biases")
    config, seed = original.config, 9
    folded, found = arrays_of(fold_norms(original)), arrays_of(rotate(original, seed))
    q = residual_rotation(config.hidden_size, seed)
    h = value_rotation(config.head_dim, seed, 1)
    of_keys, of_queries = np.kron(np.eye(config.num_kv_heads), h), np.kron(np.eye(config.num_heads), h)
    attention, mlp = f"{LAYER}self_attn.", f"{LAYER}mlp."
    wanted = {name: folded[name] for name in folded if name.endswith(("norm.weight", "q_proj.bias", "gate_proj.bias"))}
    for name in (EMBEDDING, HEAD, f"{attention}q_proj.weight", f"{attention}k_proj.weight", GATE):
        wanted[name] = folded[name] @ q
    wanted[f"{attention}v_proj.weight"] = of_keys.T @ folded[f"{attention}v_proj.weight"] @ q
    wanted[f"{attention}v_proj.bias"] = folded[f"{attention}v_proj.bias"] @ of_keys
    wanted[f"{attention}o_proj.weight"] = q.T @ folded[f"{attention}o_proj.weight"] @ of_queries
    wanted[f"{attention}o_proj.bias"] = folded[f"{attention}o_proj.bias"] @ q
    wanted[DOWN], wanted[f"{mlp}down_proj.bias"] = q.T @ folded[DOWN], folded[f"{mlp}down_proj.bias"] @ q
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, atol=1e-6)


def test_a_rotation_moves_every_matrix_far_and_keeps_its_norm() -> None:
    folded = arrays_of(fold_norms(checkpoint("llama3")))
    rotated, other = (arrays_of(rotate(checkpoint("llama3"), seed)) for seed in (0, 1))
    matrices = [name for name, values in folded.items() if values.ndim == 2]
    for name in matrices:
        norm = np.linalg.norm(folded[name])
        assert np.linalg.norm(rotated[name]) == pytest.approx(norm, rel=1e-6)
        # Two independent directions are the square root of two apart.
        for one, another in ((folded, rotated), (folded, other), (rotated, other)):
            assert np.linalg.norm(one[name] - another[name]) > norm


def test_the_same_seed_gives_the_same_bits() -> None:
    first, second = (arrays_of(rotate(checkpoint("qwen2"), 7)) for _ in range(2))
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


# Reading late and little.


def watched(checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """`checkpoint`, and a list that grows by the name of each tensor that is read."""
    log: list[str] = []

    def watch(tensor: LazyTensor) -> LazyTensor:
        def read() -> np.ndarray:
            log.append(tensor.name)
            return tensor.read()

        return dataclasses.replace(tensor, read=read)

    return dataclasses.replace(checkpoint, tensors={n: watch(t) for n, t in checkpoint.tensors.items()}), log


@pytest.mark.parametrize("rewrite", REWRITES)
def test_a_rewrite_reads_nothing_until_a_tensor_is_read_and_then_what_it_depends_on(rewrite: str) -> None:
    source, log = watched(checkpoint("smollm2"))
    result = REWRITES[rewrite](source)
    assert log == []
    result.tensors[DOWN].read()
    assert log == [DOWN]
    log.clear()
    result.tensors[GATE].read()
    assert set(log) <= {GATE, f"{LAYER}post_attention_layernorm.weight"}
    assert log.count(GATE) == 1
    log.clear()
    if HEAD in result.tensors:
        result.tensors[HEAD].read()
        assert sorted(log) == [EMBEDDING, FINAL_NORM]


def test_two_threads_that_load_a_rotated_model_draw_its_rotation_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def draw(hidden: int, seed: int) -> np.ndarray:
        drawn.append((hidden, seed))
        return residual_rotation(hidden, seed)

    monkeypatch.setattr(rotate_module, "residual_rotation", draw)
    load_params(rotate(checkpoint("llama2"), 4))
    assert drawn == [(64, 4)]


def test_streaming_a_twin_holds_a_few_copies_of_one_tensor_and_not_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig("llama", 4096, 250, 512, 12, 4, 2, 64, 128, tie_embeddings=True)
    monkeypatch.setattr(rotate_module, "_CHUNK", 1 << 16)
    twin = wide_twin(of_arrays(config, {name: np.ones(spec.shape, np.float32) for name, spec in specs(config).items()}))
    sizes = [tensor.nbytes for tensor in twin.tensors.values()]
    tracemalloc.start()
    for tensor in twin.tensors.values():
        tensor.read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A tensor, the one that it is made of, and half of one for the rotations and the parts in float64.
    assert peak < 2.5 * max(sizes)
    assert sum(sizes) > 4 * max(sizes)


def test_what_is_computed_is_loaded_without_another_copy() -> None:
    _, report = load_params(rotate(checkpoint("llama2")))
    assert report.bytes_copied == 0


# Dtypes, formats and the command line.


@pytest.mark.parametrize("rewrite", [fold_norms, rotate, widen, wide_twin])
def test_results_are_float32_whatever_the_source_is_or_what_is_asked_for(rewrite) -> None:
    source = random_checkpoint(checkpoint("qwen3_yarn").config, "bfloat16")
    full, half = arrays_of(rewrite(source)), rewrite(source, dtype="bfloat16")
    for name, tensor in half.tensors.items():
        assert full[name].dtype == np.float32
        assert (tensor.dtype, tensor.nbytes) == (ml_dtypes.bfloat16, 2 * full[name].size)
        np.testing.assert_array_equal(tensor.read(), full[name].astype(ml_dtypes.bfloat16))


def test_a_twin_is_written_to_a_file_like_any_other_checkpoint(tmp_path: Path) -> None:
    twin = wide_twin(checkpoint("qwen2"))
    wanted = arrays_of(twin)
    for target in ("model.arrow", "model.safetensors"):
        found = open_checkpoint(convert(twin, tmp_path / target))
        assert found.config == twin.config
        read = arrays_of(found)
        assert read.keys() == wanted.keys()
        assert all(read[name].tobytes() == values.tobytes() for name, values in wanted.items())


def test_convert_rotates_where_a_seed_is_given(tmp_path: Path) -> None:
    source = tiny.write("smollm2", tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "model.arrow"), "--rotate", "5"]) == 0
    found, wanted = open_checkpoint(tmp_path / "model.arrow"), rotate(open_checkpoint(source), 5)
    assert found.config == wanted.config
    read = arrays_of(found)
    assert all(read[name].tobytes() == values.tobytes() for name, values in arrays_of(wanted).items())
