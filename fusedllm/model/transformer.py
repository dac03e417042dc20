"""The decoder: one layer, the stack, and the vocabulary product, written against a `Placement`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fusedllm.config import ModelConfig, RopeConfig
from fusedllm.kernels.cached_attention import cached_attention
from fusedllm.kernels.embed import embed
from fusedllm.kernels.rms_norm import rms_norm
from fusedllm.model.cache import KVCache
from fusedllm.model.composed import add_and_norm, biased
from fusedllm.model.params import LayerParams, Params
from fusedllm.model.placement import Numbers, Placement, Residual, Site
from fusedllm.model.rope import cos_sin


def forward(
    config: ModelConfig,
    placement: Placement,
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "batch seq"],
    start: Int[Array, " batch"],
    page_table: Int[Array, "batch table"],
    *,
    dtype: DTypeLike,
    only: Int[Array, ""] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch selected hidden"], KVCache]:
    """Runs `tokens` at positions `start, start + 1, ...` through the stack.

    With `only` just that token of each row leaves the last layer's attention: of the others the cache keeps all that
    later tokens will read. `implementation` is that of the kernels outside of `placement.linear`.

    Returns:
      The normed hidden states, ready for `vocabulary_logits`, and the cache with the tokens' keys and values in it.
    """
    # Of a plain table there is no other gather than XLA's, whatever was asked for.
    gather = None if implementation == "ffi" else implementation
    x = placement.protected(
        Site("embedding"), embed, params.embedding, tokens, dtype=jnp.dtype(dtype), implementation=gather
    )
    residual = Residual(x)
    angles = placement.protected(Site("rope"), _angles, tokens, start, rope=config.rope, head_dim=config.head_dim)
    # Traced once for all layers that share a window and a key, not once a layer (the first has nothing to add yet); XLA
    # inlines the calls.
    static = ("config", "placement", "window", "key", "implementation")
    run_layer = placement.compile(decoder_layer, static_argnames=static)
    layers = []
    for index, layer in enumerate(params.layers):
        residual, pages = run_layer(
            config,
            placement,
            layer,
            residual,
            cache.of_layer(index),
            angles,
            start,
            page_table,
            only if index == config.num_layers - 1 else None,
            window=config.sliding_windows[index],
            key=placement.layer_key(index),
            implementation=implementation,
        )
        layers.append(pages)
    norm = {"eps": config.rms_norm_eps, "implementation": implementation}
    _, normed = placement.protected(Site("final_norm"), add_and_norm, *residual, params.final_norm, **norm)
    return normed, KVCache.of_layers(layers)


def decoder_layer(
    config: ModelConfig,
    placement: Placement,
    layer: LayerParams,
    residual: Residual,
    pages: tuple[jax.Array, ...],
    angles: tuple[jax.Array, jax.Array],
    start: Int[Array, " batch"],
    page_table: Int[Array, "batch table"],
    only: Int[Array, ""] | None = None,
    *,
    window: int | None,
    key: int | None,
    implementation: str | None = None,
) -> tuple[Residual, tuple[jax.Array, ...]]:
    """One pre-norm decoder layer (LLaMA, arXiv:2302.13971): attention and SwiGLU, each added to the residual.

    With `only` just that token goes on after the attention. `window` is the layer's sliding window, `key` what the
    placement wants to know of its place.

    Returns:
      The residual stream `[batch, selected, hidden]`, to which the layer's last product is still to be added, and the
      layer's part of the cache with the new positions written.
    """
    eps = config.rms_norm_eps
    x, (q, k, v) = placement.normed(
        (Site("attention_norm", key), Site("qkv", key)), residual, layer.attention_norm, (layer.q, layer.k, layer.v),
        eps=eps, implementation=implementation,
    )  # fmt: skip
    small = (layer.q_bias, layer.k_bias, layer.v_bias, layer.q_norm, layer.k_norm)
    x, mixed, pages = placement.protected(
        Site("attention", key), _attend, x, q, k, v, small, pages, angles, page_table, start, only,
        head_dim=config.head_dim, window=window, eps=eps, implementation=implementation,
    )  # fmt: skip
    (o,) = placement.linear(Site("o", key), mixed, (layer.o,))
    x, active = placement.activated(
        (Site("mlp_norm", key), Site("gate_up", key), Site("activation", key)), Residual(x, o, layer.o_bias),
        layer.mlp_norm, (layer.gate, layer.up), (layer.gate_bias, layer.up_bias),
        eps=eps, implementation=implementation,
    )  # fmt: skip
    (down,) = placement.linear(Site("down", key), active, (layer.down,))
    return Residual(x, down, layer.down_bias), pages


def vocabulary_logits(
    placement: Placement, params: Params, hidden: Float[Array, "*rows hidden"]
) -> Float[Numbers, "*rows vocab"]:
    """The vocabulary product of what `forward` returns, in float32."""
    head = params.embedding if params.head is None else params.head
    (logits,) = placement.linear(Site("head"), hidden, (head,))
    return logits.astype(jnp.float32)


def _angles(tokens: jax.Array, start: jax.Array, *, rope: RopeConfig, head_dim: int) -> tuple[jax.Array, jax.Array]:
    return cos_sin(rope, head_dim, start[:, None] + jnp.arange(tokens.shape[1]))


def _attend(
    x: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    small: tuple[jax.Array | None, ...],
    pages: tuple[jax.Array, ...],
    angles: tuple[jax.Array, jax.Array],
    page_table: jax.Array,
    start: jax.Array,
    only: jax.Array | None,
    *,
    head_dim: int,
    window: int | None,
    eps: float,
    implementation: str | None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """The residual stream, what attention mixes, both of the token `only` if that is given, and the layer's pages.

    `small` are the biases of q, k and v, and the norms of q and k.
    """
    q_bias, k_bias, v_bias, q_norm, k_norm = small

    def heads(x: jax.Array, bias: jax.Array | None, norm: jax.Array | None) -> jax.Array:
        split = biased(x, bias).reshape(*x.shape[:2], -1, head_dim)
        return split if norm is None else rms_norm(split, norm, eps, implementation=implementation)[1]

    q, k, v = heads(q, q_bias, q_norm), heads(k, k_bias, k_norm), heads(v, v_bias, None)
    mixed, pages = cached_attention(
        q, k, v, *angles, pages, page_table, start, window=window, implementation=implementation
    )
    mixed = mixed.reshape(*mixed.shape[:2], -1)
    if only is not None:
        x, mixed = (jax.lax.dynamic_slice_in_dim(rows, only, 1, axis=1) for rows in (x, mixed))
    return x, mixed, pages
