"""Each parameter described once: name in the checkpoint, shape, axes, initializer. Everything else derives from that.

`describe(config)` is a `Params` whose leaves are `ParamSpec`; mapping over it gives abstract shapes, random weights,
and (in `weights/load.py`) the loaded ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.struct
import jax
from jax.typing import DTypeLike

from fusedllm.config import ModelConfig
from fusedllm.qarray import QuantArray

Weight = jax.Array | QuantArray
Initializer = Literal["normal", "ones", "zeros"]


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter: its name in a HF checkpoint, shape, logical axes (for sharding) and how it is initialized."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Initializer = "normal"


# flax.struct rather than nnx modules: the model is pure functions, what it needs of flax is a typed pytree.
@flax.struct.dataclass
class LayerParams:
    """The weights of one decoder layer; matrices are `[out, in]`, biases and q/k norms `None` where there are none."""

    attention_norm: jax.Array
    q: Weight
    k: Weight
    v: Weight
    o: Weight
    mlp_norm: jax.Array
    gate: Weight
    up: Weight
    down: Weight
    q_bias: jax.Array | None = None
    k_bias: jax.Array | None = None
    v_bias: jax.Array | None = None
    o_bias: jax.Array | None = None
    gate_bias: jax.Array | None = None
    up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None
    q_norm: jax.Array | None = None
    k_norm: jax.Array | None = None


@flax.struct.dataclass
class Params:
    """The whole model. `head` is `None` where it is tied to the embedding."""

    embedding: Weight
    layers: tuple[LayerParams, ...]
    final_norm: jax.Array
    head: Weight | None = None


def describe(config: ModelConfig) -> Params:
    """The parameters of `config` as a `Params` of `ParamSpec`."""
    heads_dim = ("heads_dim", config.num_heads * config.head_dim)
    kv_dim = ("kv_heads_dim", config.num_kv_heads * config.head_dim)
    hidden = ("hidden", config.hidden_size)
    ffn = ("ffn", config.intermediate_size)
    vocab = ("vocab", config.vocab_size)
    head_dim = ("head_dim", config.head_dim)

    def spec(name: str, *axes: tuple[str, int], init: Initializer = "normal") -> Any:
        # Any: a description stands where an array will.
        return ParamSpec(name, tuple(size for _, size in axes), tuple(axis for axis, _ in axes), init)

    def layer(index: int) -> LayerParams:
        prefix = f"model.layers.{index}."

        def bias(name: str, axis: tuple[str, int], present: bool) -> Any:
            return spec(f"{prefix}{name}.bias", axis, init="zeros") if present else None

        def norm(name: str, axis: tuple[str, int]) -> Any:
            return spec(f"{prefix}{name}.weight", axis, init="ones")

        return LayerParams(
            attention_norm=norm("input_layernorm", hidden),
            q=spec(f"{prefix}self_attn.q_proj.weight", heads_dim, hidden),
            k=spec(f"{prefix}self_attn.k_proj.weight", kv_dim, hidden),
            v=spec(f"{prefix}self_attn.v_proj.weight", kv_dim, hidden),
            o=spec(f"{prefix}self_attn.o_proj.weight", hidden, heads_dim),
            mlp_norm=norm("post_attention_layernorm", hidden),
            gate=spec(f"{prefix}mlp.gate_proj.weight", ffn, hidden),
            up=spec(f"{prefix}mlp.up_proj.weight", ffn, hidden),
            down=spec(f"{prefix}mlp.down_proj.weight", hidden, ffn),
            q_bias=bias("self_attn.q_proj", heads_dim, config.attention_bias),
            k_bias=bias("self_attn.k_proj", kv_dim, config.attention_bias),
            v_bias=bias("self_attn.v_proj", kv_dim, config.attention_bias),
            o_bias=bias("self_attn.o_proj", hidden, config.attention_output_bias),
            gate_bias=bias("mlp.gate_proj", ffn, config.mlp_bias),
            up_bias=bias("mlp.up_proj", ffn, config.mlp_bias),
            down_bias=bias("mlp.down_proj", hidden, config.mlp_bias),
            q_norm=norm("self_attn.q_norm", head_dim) if config.qk_norm else None,
            k_norm=norm("self_attn.k_norm", head_dim) if config.qk_norm else None,
        )

    return Params(
        embedding=spec("model.embed_tokens.weight", vocab, hidden),
        layers=tuple(layer(index) for index in range(config.num_layers)),
        final_norm=spec("model.norm.weight", hidden, init="ones"),
        head=None if config.tie_embeddings else spec("lm_head.weight", vocab, hidden),
    )


def specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter of `config` by its name in a checkpoint."""
    return {spec.name: spec for spec in jax.tree.leaves(describe(config), is_leaf=_is_spec)}


def map_specs(function: Callable[[ParamSpec], object], description: Params) -> Params:
    """`description` with each `ParamSpec` replaced by what `function` makes of it."""
    mapped: Params = jax.tree.map(function, description, is_leaf=_is_spec)
    return mapped


def abstract(config: ModelConfig, dtype: DTypeLike) -> Params:
    """The parameters as `jax.ShapeDtypeStruct`, for tracing without weights."""
    return map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype), describe(config))


def _is_spec(leaf: object) -> bool:
    return isinstance(leaf, ParamSpec)
