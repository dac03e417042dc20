"""Calibration: layers quantized on what goes through them, resumable, and the model's own function where AWQ folds."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

import fusedllm
from fusedllm.calibrate.fold import fold_factors
from fusedllm.calibrate.layers import layer_output
from fusedllm.calibrate.run import Run
from fusedllm.calibrate.text import HELD_BACK, calibration_tokens
from fusedllm.config import ModelConfig
from fusedllm.errors import CheckpointError, QuantizationError
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.model.params import describe
from fusedllm.quant.methods import method_named
from fusedllm.quant.schemes import SCHEMES
from fusedllm.quant.statistics import Statistics
from fusedllm.weights.checkpoint import Checkpoint
from fusedllm.weights.convert import convert
from fusedllm.weights.random import random_checkpoint

CONFIG = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=64,
    tie_embeddings=False,
    eos_token_ids=(2,),
)
TOKENS = np.random.default_rng(1).integers(0, 97, (4, 32)).astype(np.int32)
SCHEME = SCHEMES["int4-g32"]


def matrices(name: str, shape: tuple[int, ...]) -> GroupedScheme | None:
    return SCHEME if len(shape) > 1 else None


def run(method: str, checkpoint: Checkpoint | None = None, directory: Path | None = None) -> Run:
    return Run(
        checkpoint or random_checkpoint(CONFIG, "float32"), TOKENS, matrices, method_named(method), directory=directory
    )


def logits(checkpoint: Checkpoint, values: dict[str, np.ndarray]) -> np.ndarray:
    tensors = {
        name: dataclasses.replace(tensor, read=lambda name=name: values[name])
        for name, tensor in checkpoint.tensors.items()
    }
    llm = fusedllm.load(dataclasses.replace(checkpoint, tensors=tensors), dtype="float32", max_context=64)
    return np.stack([llm.logits(row.tolist()) for row in TOKENS])


def divergence(exact: np.ndarray, found: np.ndarray) -> float:
    def log_softmax(x: np.ndarray) -> np.ndarray:
        shifted = x - x.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    p, q = log_softmax(exact.astype(np.float64)), log_softmax(found.astype(np.float64))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def outlying(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with a few channels of the norms much larger than others, as in trained models."""

    def grown(name: str) -> np.ndarray:
        values = np.array(checkpoint.tensors[name].read())
        if name.endswith("layernorm.weight"):
            values[::16] *= 20
        return values

    tensors = {
        name: dataclasses.replace(tensor, read=lambda name=name: grown(name))
        for name, tensor in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, tensors=tensors)


def test_statistics_are_those_of_the_inputs_that_the_layers_see():
    checkpoint = random_checkpoint(CONFIG, "float32")
    found = dict(run("rtn", checkpoint).statistics())
    assert set(found) == {name for name, tensor in checkpoint.tensors.items() if len(tensor.shape) > 1} - {
        "model.embed_tokens.weight"
    }
    embedding = np.asarray(checkpoint.tensors["model.embed_tokens.weight"].read(), np.float64)
    x = embedding[TOKENS].reshape(-1, 64)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + CONFIG.rms_norm_eps)
    x = x * np.asarray(checkpoint.tensors["model.layers.0.input_layernorm.weight"].read())
    first = found["model.layers.0.self_attn.q_proj.weight"]
    # float32 sums over 128 tokens.
    np.testing.assert_allclose(first.hessian, x.T @ x / len(x), atol=2e-5)
    np.testing.assert_allclose(first.mean_square, np.square(x).mean(0), rtol=1e-4)
    np.testing.assert_allclose(first.mean_abs, np.abs(x).mean(0), rtol=1e-4)
    assert found["model.layers.1.mlp.down_proj.weight"].hessian.shape == (96, 96)


@pytest.mark.parametrize("method", ["rtn", "awq+clip", "gptq"])
def test_every_tensor_comes_once_and_is_read_once(method):
    checkpoint = random_checkpoint(CONFIG, "float32")
    reads: list[str] = []

    def counted(name: str):
        def read() -> np.ndarray:
            reads.append(name)
            return checkpoint.tensors[name].read()

        return read

    tensors = {name: dataclasses.replace(tensor, read=counted(name)) for name, tensor in checkpoint.tensors.items()}
    found = list(run(method, dataclasses.replace(checkpoint, tensors=tensors)).tensors())
    assert sorted(tensor.name for tensor in found) == sorted(checkpoint.tensors)
    assert sorted(reads) == sorted(checkpoint.tensors)
    for name, weights, array in found:
        assert weights.shape == checkpoint.tensors[name].shape
        assert (array is None) == (len(weights.shape) < 2)


def test_codes_that_make_up_for_one_another_diverge_less_than_the_nearest():
    checkpoint = random_checkpoint(CONFIG, "float32")
    exact = logits(checkpoint, {name: tensor.read() for name, tensor in checkpoint.tensors.items()})
    found = {}
    for method in ("rtn", "gptq"):
        values = {
            name: weights if array is None else np.asarray(array.dequantize())
            for name, weights, array in run(method, checkpoint).tensors()
        }
        found[method] = divergence(exact, logits(checkpoint, values))
    assert found["gptq"] < 0.8 * found["rtn"]


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_factors_are_folded_without_changing_what_a_layer_does(kv_heads, bias):
    config = dataclasses.replace(CONFIG, num_kv_heads=kv_heads, mlp_bias=bias, attention_bias=bias)
    checkpoint = outlying(random_checkpoint(config, "float32"))
    runs = Run(checkpoint, TOKENS, matrices, method_named("awq"))
    described = describe(config).layers[0]
    layer = runs.float_layer(described)
    rng = np.random.default_rng(2)
    if bias:
        biases = {
            f"{name}_bias": jnp.asarray(rng.standard_normal(getattr(layer, f"{name}_bias").shape), jnp.float32)
            for name in ("q", "k", "v", "gate", "up", "down")
        }
        layer = layer.replace(**biases)
    x = jnp.asarray(rng.standard_normal((4, 32, 64)), jnp.float32)
    statistics = runs.site_statistics(0, layer, np.asarray(x))
    schemes = dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), SCHEME)
    folded, after = fold_factors(config, layer, statistics, schemes, np.dtype(np.float16))
    before = layer_output(config, layer, x, window=None)
    # Sums of products of another magnitude round otherwise in float32: outputs are up to 100 here.
    np.testing.assert_allclose(layer_output(config, folded, x, window=None), before, atol=2e-3)
    changed = [
        name for name in ("q", "gate", "down", "o") if not np.array_equal(getattr(layer, name), getattr(folded, name))
    ]
    assert changed == (["q", "gate", "down", "o"] if kv_heads == 4 else ["q", "gate", "down"])
    seen = runs.site_statistics(0, folded, np.asarray(x))
    for site in ("qkv", "gate_up", "down"):
        assert isinstance(after[site], Statistics)
        np.testing.assert_allclose(seen[site].mean_square, after[site].mean_square, rtol=1e-3)


def test_a_run_that_was_stopped_goes_on_and_makes_the_same_bits(tmp_path):
    whole = list(run("awq+gptq").tensors())
    stopped = run("awq+gptq", directory=tmp_path).tensors()
    # The embedding and the nine tensors of the first layer.
    for _ in range(10):
        next(stopped)
    stopped.close()
    (tmp_path / ".layer-1.npz").write_bytes(b"half of a file")
    reads: list[int] = []
    again = run("awq+gptq", directory=tmp_path)
    layer = Run._layer
    resumed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_layer", lambda self, index, *rest: reads.append(index) or layer(self, index, *rest))
        resumed = list(again.tensors())
    assert reads == [1]
    for one, other in zip(whole, resumed, strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(one.weights, other.weights)
        if one.array is not None:
            np.testing.assert_array_equal(one.array.values, other.array.values)
            np.testing.assert_array_equal(one.array.scales, other.array.scales)
    with pytest.raises(QuantizationError, match="other settings"):
        next(run("gptq", directory=tmp_path).tensors())


def other(seed: int) -> pa.Table:
    """Weights of the model's names and shapes."""
    rng = np.random.default_rng(seed)
    tensors = random_checkpoint(CONFIG, "float32").tensors.values()
    return pa.table(
        {
            "layer_name": [tensor.name for tensor in tensors],
            "weights": [rng.standard_normal(math.prod(tensor.shape), np.float32) for tensor in tensors],
            "shape": [list(tensor.shape) for tensor in tensors],
        }
    )


def test_a_run_does_not_go_on_with_the_layers_of_other_weights(tmp_path):
    """The path of a model does not tell: a table may stand for its weights, and the file may be another by now."""
    model = convert(random_checkpoint(CONFIG, "float32"), tmp_path / "model.arrow")
    options = {"method": "gptq", "calibration": TOKENS, "model": model, "resume": tmp_path / "kept"}
    first = fusedllm.quantize(other(1), "int4-g32", **options)
    with pytest.raises(QuantizationError, match="of other weights"):
        fusedllm.quantize(other(2), "int4-g32", **options)
    assert first.equals(fusedllm.quantize(other(1), "int4-g32", **options))


@pytest.mark.parametrize("name", ["settings.json", "layer-0001.npz", "hidden-0001.npy"])
def test_a_damaged_file_of_a_stopped_run_is_named(name, tmp_path):
    list(run("rtn", directory=tmp_path).tensors())
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(QuantizationError, match=rf"{name} is damaged: remove .*"):
        list(run("rtn", directory=tmp_path).tensors())


def test_a_place_that_can_keep_no_layers_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(QuantizationError, match="can't be written: File exists"):
        list(run("rtn", directory=tmp_path / "file").tensors())


@pytest.mark.parametrize("tokens", [np.full((1, 8), 97), np.full((1, 8), -1), np.zeros((0, 8), int)])
def test_tokens_that_the_model_does_not_have_are_refused(tokens):
    with pytest.raises(QuantizationError, match="from 0 to 96"):
        dataclasses.replace(run("rtn"), tokens=tokens)


def test_a_name_that_occurs_twice_is_refused_by_a_calibration_too(tmp_path):
    model = convert(random_checkpoint(CONFIG, "float32"), tmp_path / "model.arrow")
    table = pa.concat_tables([other(1), other(1).slice(3, 1)])
    with pytest.raises(QuantizationError, match="occurs twice"):
        fusedllm.quantize(table, method="gptq", calibration=TOKENS, model=model)


def test_what_a_calibration_leaves_keeps_its_dtype():
    checkpoint = random_checkpoint(CONFIG, "bfloat16")
    keywords = {"rules": {"lm_head": "keep", "norm": "int8"}, "calibration": TOKENS}
    table = fusedllm.quantize(checkpoint, "int8", method="gptq", **keywords)
    schemes = dict(zip(table["layer_name"].to_pylist(), table["scheme"].to_pylist(), strict=True))
    assert schemes["lm_head.weight"] == "bfloat16"
    assert schemes["model.norm.weight"] == "bfloat16"
    read = fusedllm.dequantize(table)
    row = read["layer_name"].to_pylist().index("lm_head.weight")
    exact = np.asarray(checkpoint.tensors["lm_head.weight"].read(), np.float32)
    np.testing.assert_array_equal(np.array(read["weights"][row].as_py(), np.float32), exact.reshape(-1))


def test_tokens_come_from_a_file_a_list_an_array_or_python_itself(smollm2_checkpoint, tmp_path):
    tokenizer = smollm2_checkpoint.tokenizer
    default = calibration_tokens(None, tokenizer, windows=4)
    assert default.shape == (4, 512)
    assert default.dtype == np.int32
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox. " * 400, encoding="utf-8")
    from_file = calibration_tokens(path, tokenizer, window=128)
    np.testing.assert_array_equal(from_file, calibration_tokens([path.read_text()], tokenizer, window=128))
    np.testing.assert_array_equal(calibration_tokens(np.arange(100), None, window=30), np.arange(90).reshape(3, 30))
    np.testing.assert_array_equal(calibration_tokens(TOKENS, None), TOKENS)
    # Of more windows than are wanted, some from everywhere.
    np.testing.assert_array_equal(calibration_tokens(np.arange(100), None, window=10, windows=3)[:, 0], [0, 40, 90])


def test_what_perplexity_is_measured_on_is_held_back():
    from pydoc_data.topics import topics

    assert set(HELD_BACK) <= set(topics)


@pytest.mark.parametrize(
    ("calibration", "sentence"),
    [
        ("/nowhere/text.txt", r"the calibration text /nowhere/text.txt can't be read: No such file"),
        ([1, 2], "must be a path, a list of texts"),
        (5, "must be a path, a list of texts"),
        (np.zeros((2, 2)), "must be integers"),
        (np.arange(5), "has 5 tokens; at least one window of 512"),
        (np.array([[3, -1]]), "from 0 to 2147483647, got -1 to 3"),
        (np.array([[3, 2**40]]), "from 0 to 2147483647, got 3 to 1099511627776"),
    ],
)
def test_bad_calibration_is_refused(smollm2_checkpoint, calibration, sentence):
    with pytest.raises(QuantizationError, match=sentence):
        calibration_tokens(calibration, smollm2_checkpoint.tokenizer)
    with pytest.raises(QuantizationError, match="needs a tokenizer"):
        calibration_tokens("text.txt", None)


def test_a_table_is_calibrated_with_the_model_that_it_is_of(tmp_path):
    checkpoint = random_checkpoint(CONFIG, "float32")
    convert(checkpoint, tmp_path / "model.arrow")
    table = pa.ipc.open_file(str(tmp_path / "model.arrow")).read_all()
    weights = table.replace_schema_metadata(None)
    made = fusedllm.quantize(weights, "int4-g32", method="gptq", calibration=TOKENS, model=tmp_path / "model.arrow")
    direct = fusedllm.quantize(checkpoint, "int4-g32", method="gptq", calibration=TOKENS)
    assert made.sort_by("layer_name")["quantized_data"].equals(direct.sort_by("layer_name")["quantized_data"])
    assert set(made["method"].to_pylist()) == {"gptq", "none"}
    report = fusedllm.quantize_report(made)
    assert len(report) == table.num_rows
    llm = fusedllm.load(made, dtype="float32", max_context=64)
    values = {name: w if a is None else np.asarray(a.dequantize()) for name, w, a in run("gptq", checkpoint).tensors()}
    np.testing.assert_allclose(llm.logits(TOKENS[0].tolist()), logits(checkpoint, values)[0], atol=1e-4)
    with pytest.raises(QuantizationError, match="say whose weights these are"):
        fusedllm.quantize(weights, method="gptq", calibration=TOKENS)


def test_a_table_that_describes_its_model_is_calibrated_without_a_name():
    checkpoint = random_checkpoint(CONFIG, "float32")
    expected = fusedllm.quantize(checkpoint, "int4-g32", method="gptq", calibration=TOKENS)
    weights = fusedllm.dequantize(fusedllm.quantize(checkpoint, rules={".": "keep"}))
    made = fusedllm.quantize(weights, "int4-g32", method="gptq", calibration=TOKENS)
    assert made.equals(expected)
    broken = weights.replace_schema_metadata({b"fusedllm.config": b"nonsense"})
    with pytest.raises(CheckpointError, match="the metadata of the table hold no text that describes a model"):
        fusedllm.quantize(broken, method="gptq", calibration=TOKENS)
