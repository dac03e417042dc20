"""What the device server of `rpc_ladder.py` computes: the products of a layer one by one, or a whole layer at once.

They are the engine's own kernels on the engine's own kind of weights, so that a rung of the ladder differs from another
in how it gets there and in nothing else. `Products.arithmetic` runs them where the data lies: what a forward would take
if nothing had to travel.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rpc_integers import RingProducts
from rpc_limits import limits

from fusedllm.backend import compute_dtype, default_activation_bits, runs_native
from fusedllm.config import ModelConfig
from fusedllm.kernels.cached_attention import cached_attention
from fusedllm.kernels.embed import embed
from fusedllm.kernels.rms_norm import rms_norm
from fusedllm.kernels.swiglu import swiglu
from fusedllm.model.cache import empty_cache
from fusedllm.model.composed import added
from fusedllm.model.params import LayerParams
from fusedllm.model.placement import Residual, Site
from fusedllm.model.rope import cos_sin
from fusedllm.model.transformer import decoder_layer
from fusedllm.partition.plain import Plain
from fusedllm.weights.random import random_params

PAGE_SIZE = 16

# What a queue is plugged with: products that take a GPU some 50 ms, and launching all of a forward a host less.
PLUG_SIZE = 4096
PLUG_PRODUCTS = 300
PLUG_TRIALS = 3


def dtypes(dtype: str) -> tuple[Any, Any, Any]:
    """Of activations, weights and the KV cache, as `fusedllm.load(..., random_weights=True)` chooses them."""
    compute = compute_dtype(dtype)
    if dtype != "auto":
        return compute, compute, compute
    return compute, jnp.bfloat16 if runs_native(None) else compute, jnp.bfloat16


class Products:
    """The model's weights on the device, and the calls that a client may make of them.

    Prompts are one sequence; activations are `[seq, width]`, scores `[heads, seq, seq]`.
    """

    def __init__(self, config: ModelConfig, dtype: str, seed: int) -> None:
        self.config = config
        self._compute, weights, self._cache_dtype = dtypes(dtype)
        self._params = random_params(config, np.dtype(weights), seed)
        self._placement = Plain(None, default_activation_bits(config.hidden_size))
        self._precision = jax.lax.Precision.HIGHEST if self._compute == jnp.float32 else None
        jitted = functools.partial(jax.jit, static_argnames=("wire",))
        self._linear = jitted(self._traced_linear)
        self._scores = jitted(self._traced_scores)
        self._mix = jitted(self._traced_mix)
        self._embed = jitted(self._traced_embed)
        # The pages are rewritten with each prompt.
        self._layer = jax.jit(self._traced_layer, static_argnames=("window", "wire"), donate_argnames=("pages",))
        self._attend = jax.jit(self._traced_attention, static_argnames=("window",), donate_argnames=("pages",))
        eps = config.rms_norm_eps
        self._norm = jax.jit(lambda x, delta, weight: rms_norm(x, weight, eps, delta=delta))
        self._activate = jax.jit(swiglu)
        self._plug = jax.jit(lambda x: jax.lax.fori_loop(0, PLUG_PRODUCTS, lambda _, y: jnp.dot(y, x), x))
        self._pages: list[tuple[jax.Array, ...]] = []
        self._operands: dict[str, Any] = {}
        self._seed = seed
        self._ring: RingProducts | None = None

    def call(self, name: str, layer: int | None, arrays: list[jax.Array], wire: np.dtype[Any]) -> list[jax.Array]:
        """The results of one call, in `wire`: a product, or with the name `layer` all of a layer.

        Raises:
          KeyError: no call has that name.
        """
        params, weights = self._params, () if layer is None else self._params.layers[layer]
        if name == "embedding":
            return [self._embed(params.embedding, *arrays, wire=wire)]
        if name == "scores":
            return [self._scores(*arrays, wire=wire)]
        if name == "mix":
            return [self._mix(*arrays, wire=wire)]
        if name == "layer":
            return [self._run_layer(layer, *arrays, wire)]
        if name == "head":
            return list(self._linear(*arrays, params.embedding if params.head is None else params.head, wire=wire))
        return list(self._linear(*arrays, *(getattr(weights, part) for part in name.split("_")), wire=wire))

    def arithmetic(self, kind: str, seq: int) -> float:
        """Seconds of a forward's products, and of its norms and activations, one after the other on operands that are
        there.

        `calls` are those of the six calls a layer. `layers` has cached attention instead of its two full products, as
        the fused layer does; `last` lets only the last token leave the last layer's attention, as the engine does.
        `ring` is `last` with the integer products of w8a8 over the ring, on weights of their own.
        """
        runs = list(self._ring_runs(seq) if kind == "ring" else self._runs(kind, seq))
        if jax.default_backend() == "cpu":
            began = time.perf_counter()
            for run in runs:
                jax.block_until_ready(run())
            return time.perf_counter() - began
        # Elsewhere the host may take longer to launch them than the device to run them: they wait in its queue behind
        # something that lasts, and what that takes alone is subtracted.
        alone = min(self._queued([]) for _ in range(PLUG_TRIALS))
        return min(self._queued(runs) for _ in range(PLUG_TRIALS)) - alone

    def _queued(self, runs: Sequence[Callable[[], Any]]) -> float:
        """Seconds of the plug and of `runs` after it, in the order of one queue."""
        x = jnp.zeros((PLUG_SIZE, PLUG_SIZE), self._compute)
        self._plug(x).block_until_ready()
        began = time.perf_counter()
        result = self._plug(x)
        for run in runs:
            result = run()
        jax.block_until_ready(result)
        return time.perf_counter() - began

    def limits(self, size: int | None = None) -> dict[str, Any]:
        """As `rpc_limits.limits`, for weights of this kind."""
        ours = functools.partial(self._linear, wire=np.dtype(self._compute))
        return limits(self._params.layers[0].q.dtype, self._compute, ours, size)

    def weight_bytes(self) -> int:
        """Of the products of a forward, each weight once."""
        head = self._params.embedding if self._params.head is None else self._params.head
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self._params.layers, head)))

    def _ring_runs(self, seq: int) -> Iterator[Callable[[], Any]]:
        """As `_runs`, for the policies of integer products."""
        ring = self._ring = self._ring or RingProducts(self.config, self._seed)
        ring.prepare(seq)
        operands = self._random_operands(seq)
        q, k, v = (operands[name] for name in ("q", "k", "v"))
        yield functools.partial(self.call, "embedding", None, [operands["tokens"]], np.dtype(self._compute))
        for layer in range(self.config.num_layers):
            rows = 1 if layer == self.config.num_layers - 1 else seq
            yield functools.partial(ring, Site("qkv", layer), seq)
            yield functools.partial(self._run_attention, layer, q, k, v)
            for name in ("o", "gate_up", "down"):
                yield functools.partial(ring, Site(name, layer), rows)
            yield from self._elementwise(layer, seq, rows)
        yield functools.partial(ring, Site("head"), 1)

    def _runs(self, kind: str, seq: int) -> Iterator[Callable[[], Any]]:
        """What `arithmetic` times, in the order of a forward."""
        config, operands = self.config, self._random_operands(seq)
        wire = np.dtype(self._compute)
        hidden, mixed, active, q, k, v = (operands[name] for name in ("hidden", "mixed", "active", "q", "k", "v"))
        yield functools.partial(self.call, "embedding", None, [operands["tokens"]], wire)
        for layer in range(config.num_layers):
            one = kind == "last" and layer == config.num_layers - 1
            yield functools.partial(self.call, "q_k_v", layer, [hidden], wire)
            if kind == "calls":
                yield functools.partial(self.call, "scores", layer, [q, k], np.dtype(np.float32))
                yield functools.partial(self.call, "mix", layer, [operands["weights"], v], wire)
            else:
                yield functools.partial(self._run_attention, layer, q, k, v)
            for name, x in (("o", mixed), ("gate_up", hidden), ("down", active)):
                yield functools.partial(self.call, name, layer, [x[-1:] if one else x], wire)
            yield from self._elementwise(layer, seq, 1 if one else seq)
        yield functools.partial(self.call, "head", None, [hidden[-1:]], wire)

    def _elementwise(self, layer: int, seq: int, rows: int) -> Iterator[Callable[[], Any]]:
        """A layer's two norms with the sums of the residual stream before them, and its activation."""
        operands, weights = self._random_operands(seq), self._params.layers[layer]
        hidden, active = operands["hidden"], operands["active"]
        yield functools.partial(self._norm, hidden, hidden, weights.attention_norm)
        yield functools.partial(self._norm, hidden[:rows], hidden[:rows], weights.mlp_norm)
        yield functools.partial(self._activate, active[:rows], active[:rows])

    def _random_operands(self, seq: int) -> dict[str, jax.Array]:
        """Normal numbers and not zeros: a GPU multiplies zeros faster, since they take less power."""
        if self._operands.get("seq") != seq:
            config = self.config
            width, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
            shapes: dict[str, tuple[int, ...]] = {"hidden": (seq, config.hidden_size), "mixed": (seq, width)}
            shapes |= {"active": (seq, config.intermediate_size), "q": (seq, width), "k": (seq, narrow)}
            shapes |= {"v": (seq, narrow), "weights": (config.num_heads, seq, seq)}
            self._operands = {
                name: jax.random.normal(jax.random.key(index), shape).astype(self._compute)
                for index, (name, shape) in enumerate(shapes.items())
            }
            self._operands |= {"tokens": jnp.arange(seq, dtype=jnp.int32) % config.vocab_size, "seq": seq}
        return self._operands

    def _run_layer(self, layer: int, x: jax.Array, wire: np.dtype[Any]) -> jax.Array:
        pages, window = self._pages_for(x.shape[0])[layer], self.config.sliding_windows[layer]
        x, self._pages[layer] = self._layer(self._params.layers[layer], x, pages=pages, window=window, wire=wire)
        return x

    def _run_attention(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        pages, window = self._pages_for(q.shape[0])[layer], self.config.sliding_windows[layer]
        mixed, self._pages[layer] = self._attend(q, k, v, pages=pages, window=window)
        return mixed

    def _pages_for(self, seq: int) -> list[tuple[jax.Array, ...]]:
        """Pages for a prompt of `seq` tokens and the null page, a tuple for each layer."""
        pages = -(-seq // PAGE_SIZE) + 1
        if not self._pages or self._pages[0][0].shape[0] != pages:
            cache = empty_cache(self.config, pages, PAGE_SIZE, self._cache_dtype)
            self._pages = [cache.of_layer(layer) for layer in range(self.config.num_layers)]
        return self._pages

    def _traced_embed(self, table: jax.Array, tokens: jax.Array, wire: np.dtype[Any]) -> jax.Array:
        return embed(table, tokens, self._compute).astype(wire)

    def _traced_linear(self, x: jax.Array, *weights: jax.Array, wire: np.dtype[Any]) -> tuple[jax.Array, ...]:
        products = self._placement.linear(Site("rpc"), x.astype(self._compute), weights)
        return tuple(product.astype(wire) for product in products)

    def _traced_scores(self, q: jax.Array, k: jax.Array, wire: np.dtype[Any]) -> jax.Array:
        scores = jnp.einsum(
            "skgd,tkd->kgst",
            self._split(q, grouped=True),
            self._split(k),
            precision=self._precision,
            preferred_element_type=jnp.float32,
        )
        return scores.reshape(self.config.num_heads, *scores.shape[2:]).astype(wire)

    def _traced_mix(self, weights: jax.Array, v: jax.Array, wire: np.dtype[Any]) -> jax.Array:
        heads, seq, _ = weights.shape
        grouped = weights.astype(self._compute).reshape(self.config.num_kv_heads, -1, seq, seq)
        mixed = jnp.einsum(
            "kgst,tkd->skgd", grouped, self._split(v), precision=self._precision, preferred_element_type=jnp.float32
        )
        return mixed.reshape(seq, heads * self.config.head_dim).astype(wire)

    def _split(self, x: jax.Array, grouped: bool = False) -> jax.Array:
        """`[seq, kv_heads, head_dim]`, or of queries `[seq, kv_heads, group, head_dim]`."""
        config = self.config
        group = (config.num_heads // config.num_kv_heads,) if grouped else ()
        return x.astype(self._compute).reshape(len(x), config.num_kv_heads, *group, config.head_dim)

    def _places(self, seq: int) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:
        """Angles, start and page table of a prompt at position 0."""
        angles = cos_sin(self.config.rope, self.config.head_dim, jnp.arange(seq)[None])
        return angles, jnp.zeros(1, jnp.int32), jnp.arange(1, -(-seq // PAGE_SIZE) + 1, dtype=jnp.int32)[None]

    def _traced_layer(
        self, layer: LayerParams, x: jax.Array, pages: tuple[jax.Array, ...], window: int | None, wire: np.dtype[Any]
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        angles, start, table = self._places(x.shape[0])
        residual, pages = decoder_layer(
            self.config,
            self._placement,
            layer,
            Residual(x.astype(self._compute)[None]),
            pages,
            angles,
            start,
            table,
            window=window,
            key=None,
        )
        return added(residual)[0].astype(wire), pages

    def _traced_attention(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pages: tuple[jax.Array, ...], window: int | None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        (cos, sin), start, table = self._places(q.shape[0])
        q, k, v = (x.reshape(1, len(x), -1, self.config.head_dim) for x in (q, k, v))
        return cached_attention(q, k, v, cos, sin, pages, table, start, window=window)
