"""The model families as data, and the translation between a HF `config.json` and a `ModelConfig`.

A family is a row of `FAMILIES`: which HF class it is, what that class assumes where a config is silent, and which of
the optional parts of a decoder layer it has. The defaults are those of the configuration classes of transformers 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from fusedllm.config import ModelConfig
from fusedllm.errors import ConfigError
from fusedllm.model.attributes import MAX_LAYERS, Attributes, shortened
from fusedllm.model.hf_neutral import FIXED, NEUTRAL
from fusedllm.model.hf_rope import rope_from_hf, rope_to_hf
from fusedllm.model.hf_windows import LAYER_TYPES, WindowKind, windows_from_hf


@dataclass(frozen=True, slots=True)
class Family:
    """One row.

    Attributes:
      name: HF's `model_type`, and `ModelConfig.family`.
      architecture: HF's class of the causal language model.
      bias: where q, k and v have a bias: `qkvo` if the config says so, then o has one too; `qkv` always.
      mlp_bias: whether the config may ask for one.
      window: `none`; `all` layers when `sliding_window` is set; `layers` that `layer_types` or
        `use_sliding_window` and `max_window_layers` name.
      qk_norm: an RMS norm on each head of q and k.
      defaults: HF's defaults of this class, where they differ from `_DEFAULTS`.
    """

    name: str
    architecture: str
    bias: Literal["qkvo", "qkv", "none"] = "none"
    mlp_bias: bool = False
    window: WindowKind = "none"
    qk_norm: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,  # as many as attention heads
        "head_dim": None,  # hidden_size / num_attention_heads
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "bos_token_id": None,
        "eos_token_id": (),
    }
)
_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (
            Family(
                "llama",
                "LlamaForCausalLM",
                bias="qkvo",
                mlp_bias=True,
                defaults={"bos_token_id": 1, "eos_token_id": (2,)},
            ),
            Family(
                "mistral",
                "MistralForCausalLM",
                window="all",
                defaults={
                    "intermediate_size": 14336,
                    "num_key_value_heads": 8,
                    "max_position_embeddings": 4096 * 32,
                    "bos_token_id": 1,
                    "eos_token_id": (2,),
                },
            ),
            Family("qwen2", "Qwen2ForCausalLM", bias="qkv", window="layers", defaults=_QWEN),
            Family(
                "qwen3",
                "Qwen3ForCausalLM",
                bias="qkvo",
                window="layers",
                qk_norm=True,
                defaults={**_QWEN, "head_dim": 128},
            ),
        )
    }
)


def config_from_hf(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelConfig:
    """The model that a HF `config.json` describes, with the end tokens of `generation_config.json` where it has any.

    Both styles of rotary settings are read: `rope_theta` with `rope_scaling`, and `rope_parameters`.

    Raises:
      ConfigError: an unknown family, a value of the wrong type or size, or an attribute that changes the mathematics
        (or may do so) and is not implemented; it is named.
    """
    attributes = Attributes(config, "the model's config.json")
    family = _family(attributes)
    _refuse_quantization(attributes)

    def integer(name: str, high: int | None = None) -> Any:
        default = family.defaults.get(name, _DEFAULTS[name])
        return attributes.integer(name, default) if high is None else attributes.integer(name, default, high=high)

    num_layers = integer("num_hidden_layers", high=MAX_LAYERS)
    hidden_size, num_heads = integer("hidden_size"), integer("num_attention_heads")
    # Silence means the class's default; a written null means "one per attention head" in every class.
    silent = "num_key_value_heads" not in config
    num_kv_heads = attributes.integer(
        "num_key_value_heads", family.defaults.get("num_key_value_heads") if silent else None
    )
    head_dim = integer("head_dim")
    if head_dim is None:
        head_dim, rest = divmod(hidden_size, num_heads)
        if rest:
            raise ConfigError(
                f"hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({num_heads}), and "
                "config.json sets no head_dim."
            )
    max_position = integer("max_position_embeddings")
    attention_bias, output_bias, mlp_bias = _biases(attributes, family)
    bos, eos = _special_tokens(attributes, family, config, generation_config)
    result = ModelConfig(
        family=family.name,
        vocab_size=integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=attributes.number("rms_norm_eps", _DEFAULTS["rms_norm_eps"]),
        rope=rope_from_hf(attributes, max_position),
        tie_embeddings=attributes.boolean("tie_word_embeddings", False),
        attention_bias=attention_bias,
        attention_output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=family.qk_norm,
        sliding_windows=windows_from_hf(attributes, family.window, num_layers, silent="sliding_window" not in config),
        bos_token_id=bos,
        eos_token_ids=eos,
    )
    for name, allowed in FIXED.items():
        attributes.expect(name, *allowed)
    attributes.drop(NEUTRAL)
    attributes.finish()
    return result


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` that `transformers` (4 and 5) and `config_from_hf` read back to the same mathematics.

    Raises:
      ConfigError: the configuration is valid here but no HF class of its family can express it.
    """
    family = FAMILIES.get(config.family)
    if family is None:
        raise ConfigError(f"unknown model family {config.family!r}; known are: {', '.join(FAMILIES)}.")
    eos = config.eos_token_ids
    data: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        # The older of the two styles, because every version reads it.
        "rope_theta": config.rope.theta,
        "rope_scaling": rope_to_hf(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
    }
    if family.bias == "qkvo":
        data["attention_bias"] = config.attention_bias
    if family.mlp_bias:
        data["mlp_bias"] = config.mlp_bias
    windows = [window for window in config.sliding_windows if window is not None]
    if family.window == "all":
        data["sliding_window"] = windows[0] if windows else None
    elif family.window == "layers":
        data["use_sliding_window"] = bool(windows)
        data["sliding_window"] = windows[0] if windows else None
        data["layer_types"] = [LAYER_TYPES[window is not None] for window in config.sliding_windows]
    # What a family can't say (a window in LLaMA, two different windows, ...) shows when it is read back.
    read = config_from_hf(data)
    for name in (each.name for each in dataclasses.fields(ModelConfig)):
        wanted, found = getattr(config, name), getattr(read, name)
        if wanted != found:
            raise ConfigError(
                f"a {family.name} config.json can't express {name} = {shortened(wanted)}; it would read back as "
                f"{shortened(found)}."
            )
    return data


def _family(attributes: Attributes) -> Family:
    model_type = attributes.string("model_type", None)
    architectures = attributes.raw("architectures", [])
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ConfigError(
            f"'architectures' in {attributes.what} must be a list of texts, got {shortened(architectures)}."
        )
    by_class = {family.architecture: family.name for family in FAMILIES.values()}
    if model_type is None and architectures:
        model_type = by_class.get(architectures[0], architectures[0])
    if model_type is None:
        raise ConfigError(f"{attributes.what} has neither 'model_type' nor 'architectures', so the family is unknown.")
    family = FAMILIES.get(model_type)
    if family is None:
        raise ConfigError(
            f"the model family {shortened(model_type)} is not implemented; known are: {', '.join(FAMILIES)}."
        )
    if architectures and family.architecture not in architectures:
        raise ConfigError(
            f"the architecture {shortened(architectures[0])} is not implemented for {family.name}; only "
            f"{family.architecture} is."
        )
    return family


def _refuse_quantization(attributes: Attributes) -> None:
    quantization = attributes.raw("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise ConfigError(
            f"{attributes.what} has a 'quantization_config' ({shortened(method)}), which can't be read; those of "
            "compressed-tensors, GPTQ and AWQ can: use one of them, the unquantized model or a GGUF file."
        )


def _biases(attributes: Attributes, family: Family) -> tuple[bool, bool, bool]:
    """Whether q, k and v, whether o, and whether the MLP has a bias."""
    if family.bias == "qkvo":
        attention = output = attributes.boolean("attention_bias", False)
    else:
        attention, output = family.bias == "qkv", False
        attributes.expect("attention_bias", attention)
    if family.mlp_bias:
        return attention, output, attributes.boolean("mlp_bias", False)
    attributes.expect("mlp_bias", False)
    return attention, output, False


def _special_tokens(
    attributes: Attributes, family: Family, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None
) -> tuple[int | None, tuple[int, ...]]:
    """The beginning-of-sequence token, and every token that ends a generation."""
    bos = attributes.integer(
        "bos_token_id", None if "bos_token_id" in config else family.defaults.get("bos_token_id"), low=0
    )
    eos = attributes.token_ids("eos_token_id")
    if eos is None:
        eos = () if "eos_token_id" in config else family.defaults.get("eos_token_id", ())
    if generation_config is not None:
        overriding = Attributes(generation_config, "generation_config.json").token_ids("eos_token_id")
        eos = eos if overriding is None else overriding
    return bos, tuple(eos)
