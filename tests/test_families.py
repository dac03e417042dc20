"""A HF config.json becomes a ModelConfig and back, and what is not understood is refused by name."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedllm.config import ModelConfig, RopeConfig
from fusedllm.errors import ConfigError
from fusedllm.model.families import FAMILIES, config_from_hf, config_to_hf

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_SCALING,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
    "vocab_size": 128256,
}
SMALL = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def small(**changes: object) -> ModelConfig:
    return config_from_hf({**SMALL, **changes})


def test_llama_3_2_is_read_with_its_scaling_and_its_three_end_tokens():
    config = config_from_hf(LLAMA_1B)
    assert config.rope == RopeConfig(500000.0, "llama3", 32.0, 8192, 1.0, 4.0)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (32, 8, 64)
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.tie_embeddings
    assert config.num_parameters == 1_235_814_400


def test_both_styles_of_rope_settings_give_the_same_model():
    new_style = {key: value for key, value in LLAMA_1B.items() if key not in ("rope_scaling", "rope_theta")}
    new_style["rope_parameters"] = {**LLAMA3_SCALING, "rope_theta": 500000.0}
    assert config_from_hf(new_style) == config_from_hf(LLAMA_1B)


def test_the_older_spelling_of_the_rope_type_is_read():
    assert small(rope_scaling={"type": "linear", "factor": 2}).rope == RopeConfig(10000.0, "linear", 2.0)


def test_yarn_without_a_factor_stretches_to_the_whole_context():
    yarn = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512}
    assert small(rope_scaling=yarn, max_position_embeddings=2048).rope.factor == 4.0


def test_yarn_settings_all_arrive():
    yarn = {
        "rope_type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 512,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 0.8,
        "attention_factor": 1.5,
        "truncate": False,
    }
    rope = small(rope_scaling=yarn).rope
    assert (rope.beta_fast, rope.beta_slow, rope.mscale, rope.mscale_all_dim) == (16, 2, 0.7, 0.8)
    assert (rope.attention_factor, rope.truncate, rope.original_max_position) == (1.5, False, 512)


def test_head_dim_is_derived_or_explicit():
    assert small().head_dim == 8
    assert small(head_dim=20).head_dim == 20
    with pytest.raises(ConfigError, match=r"hidden_size .50. is not a multiple of num_attention_heads .6."):
        small(hidden_size=50)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_null_for_the_kv_heads_means_one_for_each_head(family):
    assert small(model_type=family, num_key_value_heads=None).num_kv_heads == 6


def test_a_silent_config_takes_the_defaults_of_its_class():
    mistral = config_from_hf({"model_type": "mistral"})
    assert (mistral.num_kv_heads, mistral.intermediate_size, mistral.max_position) == (8, 14336, 131072)
    assert mistral.sliding_windows == (4096,) * 32
    qwen3 = config_from_hf({"model_type": "qwen3"})
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.sliding_windows) == (128, True, (None,) * 32)
    llama = config_from_hf({"model_type": "llama"})
    assert (llama.bos_token_id, llama.eos_token_ids, llama.rms_norm_eps) == (1, (2,), 1e-6)


def test_the_family_is_found_by_its_class_where_model_type_is_missing():
    config = {key: value for key, value in LLAMA_1B.items() if key != "model_type"}
    assert config_from_hf(config) == config_from_hf(LLAMA_1B)


def test_attention_bias_reaches_o_in_llama_but_not_in_qwen2():
    llama, qwen = small(attention_bias=True, mlp_bias=True), small(model_type="qwen2")
    assert (llama.attention_bias, llama.attention_output_bias, llama.mlp_bias) == (True, True, True)
    assert (qwen.attention_bias, qwen.attention_output_bias, qwen.mlp_bias) == (True, False, False)


def test_qwen_windows_follow_max_window_layers_or_layer_types():
    asked = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7}
    assert small(**asked, max_window_layers=1).sliding_windows == (None, 7, 7)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert small(**asked, layer_types=types).sliding_windows == (7, None, 7)
    assert small(model_type="qwen2", sliding_window=7).sliding_windows == (None, None, None)


def test_mistral_has_one_window_for_all_layers_or_none():
    assert small(model_type="mistral", sliding_window=5).sliding_windows == (5, 5, 5)
    assert small(model_type="mistral", sliding_window=None).sliding_windows == (None,) * 3


def test_generation_config_overrides_the_end_tokens():
    assert config_from_hf(SMALL, {"eos_token_id": [3, 4], "temperature": 0.6}).eos_token_ids == (3, 4)
    assert config_from_hf(SMALL, {"eos_token_id": 5}).eos_token_ids == (5,)
    assert config_from_hf(SMALL, {}).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "surprise": 1}}, "surprise"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"no_rope_layers": [1, 0, 1]}, "no_rope_layers"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*gptq"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "mixtral"}, "mixtral.*known are: llama, mistral, qwen2, qwen3"),
        ({"model_type": "qwen2", "attention_bias": False}, "attention_bias"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3}, "layer_types"),
    ],
)
def test_mathematics_that_is_not_implemented_is_refused_by_name(changes, named):
    with pytest.raises(ConfigError, match=named):
        small(**changes)


@pytest.mark.parametrize(
    "harmless",
    [
        {"rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {"dtype": "q4"}},
        {"pretraining_tp": 2, "attention_dropout": 0.1, "initializer_range": 0.04, "dtype": "float16"},
        {"rope_scaling": None, "quantization_config": None, "sliding_window": None, "something_new": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
        {"layer_types": ["full_attention"] * 3},
    ],
)
def test_attributes_that_change_nothing_are_accepted(harmless):
    assert small(**harmless) == small()


WRONG = ["x", "4", -1, 0, 1.5, True, [], [1], {}, {"a": 1}, float("nan"), float("inf"), 2**80, 10**5000]
WRONG_NUMBERS = ["x", -1, 0, True, [], {}, float("nan"), float("inf"), 10**5000]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12] if not isinstance(value, int) else "int")
@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim"])
def test_a_size_that_is_not_a_possible_integer_is_a_config_error(key, value):
    with pytest.raises(ConfigError, match=key):
        small(**{key: value})


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", WRONG_NUMBERS, ids=range(len(WRONG_NUMBERS)))
def test_a_number_that_is_not_possible_is_a_config_error(key, value):
    with pytest.raises(ConfigError, match=key):
        small(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tie_word_embeddings", "yes"),
        ("attention_bias", 1),
        ("rope_scaling", "linear"),
        ("rope_scaling", 0),
        ("rope_scaling", {"rope_type": ["linear"]}),
        ("rope_scaling", {"rope_type": "linear", "factor": "2"}),
        ("rope_scaling", {"rope_type": "linear"}),
        ("rope_scaling", {**LLAMA3_SCALING, "high_freq_factor": 0.5}),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [[1]]),
        ("eos_token_id", 64),
        ("bos_token_id", -1),
        ("architectures", "LlamaForCausalLM"),
        ("model_type", ["llama"]),
        ("layer_types", "full_attention"),
        ("num_hidden_layers", 10**9),
        ("hidden_act", ["silu"]),
    ],
)
def test_a_value_of_the_wrong_kind_is_a_config_error(key, value):
    with pytest.raises(ConfigError):
        small(**{key: value})


@pytest.mark.parametrize("config", [[], "llama", 3, {1: 2}])
def test_a_config_that_is_no_object_is_a_config_error(config):
    with pytest.raises(ConfigError, match=r"config\.json must be an object"):
        config_from_hf(config)


def test_a_configuration_that_no_hf_class_expresses_is_not_written():
    with pytest.raises(ConfigError, match="sliding_windows"):
        config_to_hf(dataclasses.replace(small(), sliding_windows=(4, None, 4)))
    with pytest.raises(ConfigError, match="qk_norm"):
        config_to_hf(dataclasses.replace(small(), qk_norm=True))
    with pytest.raises(ConfigError, match="unknown model family 'gpt2'"):
        config_to_hf(dataclasses.replace(small(), family="gpt2"))


positive = st.floats(0.0625, 64, allow_nan=False, width=32)


@st.composite
def ropes(draw: st.DrawFn) -> RopeConfig:
    kind = draw(st.sampled_from(["default", "linear", "llama3", "yarn"]))
    values = {"theta": draw(st.floats(1.5, 1e7)), "kind": kind}
    if kind != "default":
        values["factor"] = draw(positive)
    if kind in ("llama3", "yarn"):
        values["original_max_position"] = draw(st.integers(1, 10**6))
    if kind == "llama3":
        values["low_freq_factor"] = draw(positive)
        values["high_freq_factor"] = values["low_freq_factor"] + draw(positive)
    if kind == "yarn":
        values |= {"beta_fast": draw(positive), "beta_slow": draw(positive), "truncate": draw(st.booleans())}
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            values[name] = draw(st.none() | positive)
    return RopeConfig(**values)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    family = FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))]
    size = st.integers(1, 10**5)
    num_layers, num_kv_heads = draw(st.integers(1, 40)), draw(st.integers(1, 16))
    window = draw(st.none() | size)
    windows: list[int | None] = [None] * num_layers
    if family.window == "all":
        windows = [window] * num_layers
    elif family.window == "layers":
        windows = draw(st.lists(st.sampled_from([None, window]), min_size=num_layers, max_size=num_layers))
    vocab_size = draw(size)
    token = st.integers(0, vocab_size - 1)
    bias = {"none": False, "qkv": True, "qkvo": draw(st.booleans())}[family.bias]
    return ModelConfig(
        family=family.name,
        vocab_size=vocab_size,
        hidden_size=draw(size),
        intermediate_size=draw(size),
        num_layers=num_layers,
        num_heads=num_kv_heads * draw(st.integers(1, 8)),
        num_kv_heads=num_kv_heads,
        head_dim=2 * draw(st.integers(1, 128)),
        max_position=draw(size),
        rms_norm_eps=draw(st.floats(1e-8, 0.1)),
        rope=draw(ropes()),
        tie_embeddings=draw(st.booleans()),
        attention_bias=bias,
        attention_output_bias=bias and family.bias == "qkvo",
        mlp_bias=family.mlp_bias and draw(st.booleans()),
        qk_norm=family.qk_norm,
        sliding_windows=tuple(windows),
        bos_token_id=draw(st.none() | token),
        eos_token_ids=tuple(draw(st.lists(token, max_size=4))),
    )


@given(configs())
@settings(max_examples=200, deadline=None)
def test_every_valid_configuration_survives_config_json(config):
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config
