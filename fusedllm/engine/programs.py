"""The traced programs: prefill a chunk, score a chunk, admit a request to its slot, decode several steps.

They are pure functions of device state; `runner.py` compiles and launches them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from fusedllm.config import ModelConfig, SamplingParams
from fusedllm.model.cache import NULL_PAGE, KVCache
from fusedllm.model.params import Params
from fusedllm.model.placement import Placement, Site
from fusedllm.model.sampling import Logprobs, SamplingState, logprobs, sample
from fusedllm.model.transformer import forward, vocabulary_logits

# In `StepOutputs.tokens`: this slot made no token in this step.
NO_TOKEN = -1


@flax.struct.dataclass
class SlotState:
    """What decoding keeps on the device of each slot.

    `token` was drawn but is not in the cache yet; it belongs at `position`. `generated` counts drawn tokens up to
    `budget`. Unused entries of `stop_ids` are negative.
    """

    token: Int[Array, " batch"]
    position: Int[Array, " batch"]
    generated: Int[Array, " batch"]
    budget: Int[Array, " batch"]
    active: Bool[Array, " batch"]
    wants_logprobs: Bool[Array, " batch"]
    stop_ids: Int[Array, "batch stops"]
    page_table: Int[Array, "batch table"]
    sampling: SamplingState


@flax.struct.dataclass
class StepOutputs:
    """What a launch made: `tokens[step, slot]`, or `NO_TOKEN`, and the log-probabilities in the same order."""

    tokens: Int[Array, "steps batch"]
    logprobs: Logprobs


@dataclass(frozen=True, slots=True)
class Programs:
    """The programs of one model under one placement; hashable, shapes come with the arguments."""

    config: ModelConfig
    placement: Placement
    dtype: DTypeLike
    implementation: str | None = None

    def prefill(
        self,
        params: Params,
        cache: KVCache,
        tokens: Int[Array, "1 seq"],
        start: Int[Array, " 1"],
        page_table: Int[Array, "1 table"],
        last: Int[Array, ""],
    ) -> tuple[Float[Array, "1 hidden"], KVCache]:
        """Runs a chunk; the hidden state of its token `last` goes on to `admit`."""
        hidden, cache = self._forward(params, cache, tokens, start, page_table, only=last)
        return hidden[:, 0], cache

    def logits(
        self,
        params: Params,
        cache: KVCache,
        tokens: Int[Array, "1 seq"],
        start: Int[Array, " 1"],
        page_table: Int[Array, "1 table"],
    ) -> tuple[Float[Array, "seq vocab"], KVCache]:
        """Runs a chunk and returns every row of its logits."""
        hidden, cache = self._forward(params, cache, tokens, start, page_table)
        return vocabulary_logits(self.placement, params, hidden[0]), cache

    def score(
        self,
        params: Params,
        cache: KVCache,
        tokens: Int[Array, "1 seq"],
        start: Int[Array, " 1"],
        page_table: Int[Array, "1 table"],
        targets: Int[Array, " seq"],
    ) -> tuple[Float[Array, " seq"], KVCache]:
        """Runs a chunk and returns the log-probability of each of `targets` at its row."""
        rows, cache = self.logits(params, cache, tokens, start, page_table)
        chosen = jnp.take_along_axis(rows, targets[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(rows, axis=-1), cache

    def admit(
        self,
        params: Params,
        slots: SlotState,
        slot: Int[Array, ""],
        request: SlotState,
        hidden: Float[Array, "1 hidden"],
    ) -> tuple[SlotState, StepOutputs]:
        """Draws the first token of `request` (a `SlotState` of one slot) and puts the request into `slot`."""
        token, chosen = self._draw(params, request, hidden)
        request = self._advance(request, token)
        slots = jax.tree.map(
            lambda old, new: lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, 0), slots, request
        )
        return slots, StepOutputs(tokens=token[None], logprobs=jax.tree.map(lambda x: x[None], chosen))

    def decode(
        self,
        params: Params,
        cache: KVCache,
        slots: SlotState,
        keep: Bool[Array, " batch"],
        steps: Int[Array, ""],
        most: int,
    ) -> tuple[KVCache, SlotState, StepOutputs]:
        """Makes up to `steps` (at most `most`) tokens in each active slot; slots not in `keep` are retired first."""
        batch = keep.shape[0]
        slots = replace(slots, active=slots.active & keep)
        outputs = StepOutputs(
            tokens=jnp.full((most, batch), NO_TOKEN, jnp.int32),
            logprobs=jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), self._no_logprobs(batch)),
        )

        def goes_on(carry: tuple[jax.Array, KVCache, SlotState, StepOutputs]) -> jax.Array:
            step, _, slots, _ = carry
            return (step < steps) & jnp.any(slots.active)

        def step(
            carry: tuple[jax.Array, KVCache, SlotState, StepOutputs],
        ) -> tuple[jax.Array, KVCache, SlotState, StepOutputs]:
            step, cache, slots, outputs = carry
            # A retired slot is computed with the others; its writes go where nobody reads.
            start = jnp.where(slots.active, slots.position, 0)
            table = jnp.where(slots.active[:, None], slots.page_table, NULL_PAGE)
            hidden, cache = self._forward(params, cache, slots.token[:, None], start, table)
            token, chosen = self._draw(params, slots, hidden[:, 0])
            made = StepOutputs(tokens=jnp.where(slots.active, token, NO_TOKEN), logprobs=chosen)
            outputs = jax.tree.map(lambda all_, new: all_.at[step].set(new), outputs, made)
            return step + 1, cache, self._advance(slots, token), outputs

        _, cache, slots, outputs = lax.while_loop(goes_on, step, (jnp.int32(0), cache, slots, outputs))
        return cache, slots, outputs

    def _forward(
        self,
        params: Params,
        cache: KVCache,
        tokens: jax.Array,
        start: jax.Array,
        page_table: jax.Array,
        only: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        return forward(
            self.config,
            self.placement,
            params,
            cache,
            tokens,
            start,
            page_table,
            dtype=self.dtype,
            only=only,
            implementation=self.implementation,
        )

    def _draw(self, params: Params, slots: SlotState, hidden: jax.Array) -> tuple[jax.Array, Logprobs]:
        rows = vocabulary_logits(self.placement, params, hidden)

        def choose(rows: jax.Array, slots: SlotState) -> tuple[jax.Array, Logprobs]:
            token = sample(rows, slots.sampling, slots.generated, implementation=self.implementation)
            wanted = jnp.any(slots.wants_logprobs & slots.active)
            return token, lax.cond(
                wanted,
                lambda: logprobs(rows, token, SamplingParams.MAX_LOGPROBS),
                lambda: self._no_logprobs(token.shape[0]),
            )

        return self.placement.protected(Site("sampling"), choose, rows, slots)

    def _advance(self, slots: SlotState, token: jax.Array) -> SlotState:
        """`slots` after each active one has drawn `token`."""
        active = slots.active
        generated = slots.generated + active
        stopped = jnp.any(slots.stop_ids == token[:, None], axis=-1) | (generated >= slots.budget)
        rows = jnp.arange(token.shape[0])
        counts = slots.sampling.output_counts.at[rows, token].add(active.astype(jnp.int32))
        return replace(
            slots,
            token=jnp.where(active, token, slots.token),
            position=slots.position + active,
            generated=generated,
            active=active & ~stopped,
            sampling=replace(slots.sampling, output_counts=counts),
        )

    def _no_logprobs(self, batch: int) -> Logprobs:
        top = min(SamplingParams.MAX_LOGPROBS, self.config.vocab_size)
        return Logprobs(
            chosen=jnp.zeros(batch, jnp.float32),
            top_ids=jnp.zeros((batch, top), jnp.int32),
            top=jnp.zeros((batch, top), jnp.float32),
        )


def empty_slots(config: ModelConfig, batch: int, table_entries: int, stops: int) -> SlotState:
    """`batch` slots without a request."""

    def full(value: float, dtype: DTypeLike, *shape: int) -> jax.Array:
        return jnp.full((batch, *shape), value, dtype)

    sampling = SamplingState(
        temperature=full(0, jnp.float32),
        top_k=full(0, jnp.int32),
        top_p=full(1, jnp.float32),
        min_p=full(0, jnp.float32),
        repetition_penalty=full(1, jnp.float32),
        presence_penalty=full(0, jnp.float32),
        frequency_penalty=full(0, jnp.float32),
        key=full(0, jnp.uint32, 2),
        bias_ids=full(0, jnp.int32, SamplingParams.MAX_LOGIT_BIAS),
        bias_values=full(0, jnp.float32, SamplingParams.MAX_LOGIT_BIAS),
        in_prompt=full(False, jnp.bool_, config.vocab_size),
        output_counts=full(0, jnp.int32, config.vocab_size),
    )
    return SlotState(
        token=full(0, jnp.int32),
        position=full(0, jnp.int32),
        generated=full(0, jnp.int32),
        budget=full(0, jnp.int32),
        active=full(False, jnp.bool_),
        wants_logprobs=full(False, jnp.bool_),
        stop_ids=full(NO_TOKEN, jnp.int32, stops),
        page_table=full(NULL_PAGE, jnp.int32, table_entries),
        sampling=sampling,
    )
