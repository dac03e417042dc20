"""The traced programs: prefill a chunk, score a chunk, admit a request to its slot, decode several steps.

They are pure functions of device state; `runner.py` compiles and launches them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32

from fusedllm.config import ModelConfig, SamplingParams
from fusedllm.engine.slots import NO_TOKEN, Seats, SlotState, StepOutputs
from fusedllm.model.cache import NULL_PAGE, KVCache
from fusedllm.model.params import Params
from fusedllm.model.placement import Placement, Site
from fusedllm.model.sampling import Logprobs, Seen, logprobs, sample
from fusedllm.model.transformer import forward, vocabulary_logits


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

    def prefill_scored(
        self,
        params: Params,
        cache: KVCache,
        tokens: Int[Array, "1 seq"],
        start: Int[Array, " 1"],
        page_table: Int[Array, "1 table"],
        last: Int[Array, ""],
        targets: Int[Array, " seq"],
    ) -> tuple[Float[Array, "1 hidden"], Logprobs, KVCache]:
        """`prefill` that also returns the log-probabilities of `targets`, each at its row."""
        hidden, cache = self._forward(params, cache, tokens, start, page_table)
        rows = vocabulary_logits(self.placement, params, hidden[0])
        scores = logprobs(rows, targets, SamplingParams.MAX_LOGPROBS)
        return lax.dynamic_slice_in_dim(hidden[0], last, 1), scores, cache

    def admit(
        self,
        params: Params,
        seats: Seats,
        seat: Int[Array, ""],
        request: Seats,
        hidden: Float[Array, "1 hidden"],
        allowed: UInt32[Array, "1 words"],
    ) -> tuple[Seats, StepOutputs]:
        """Draws the first token of `request` (`Seats` of one) and puts the request into `seat`."""
        rows = jnp.zeros(1, jnp.int32)
        token, chosen = self._draw(params, request.seen, request.slots, rows, allowed, hidden)
        request = Seats(
            slots=self._advance(request.slots, token), seen=self._count(request.seen, request.slots, rows, token)
        )
        seats = jax.tree.map(
            lambda old, new: lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), seat, 0), seats, request
        )
        return seats, StepOutputs(tokens=token[None], logprobs=jax.tree.map(lambda x: x[None], chosen))

    def decode(
        self,
        params: Params,
        cache: KVCache,
        seats: Seats,
        orders: Int[Array, "batch fields"],
        steps: Int[Array, ""],
        allowed: UInt32[Array, "batch words"],
        most: int,
    ) -> tuple[KVCache, Seats, StepOutputs]:
        """Makes up to `steps` (at most `most`) tokens in each row of `orders` whose slot is active.

        A row is `(seat, whether it is to run, first entry of its page table to set, pages to set it to)`; the pages
        that there are not are negative. Rows that are not to run name seats that no other row names.
        """
        rows, runs, entry, pages = orders[:, 0], orders[:, 1] > 0, orders[:, 2], orders[:, 3:]
        batch = rows.shape[0]
        entries = jnp.where(pages >= 0, entry[:, None] + jnp.arange(pages.shape[1]), seats.slots.page_table.shape[1])
        tables = seats.slots.page_table.at[rows[:, None], entries].set(pages, mode="drop")
        seats = replace(seats, slots=replace(seats.slots, page_table=tables))
        slots: SlotState = jax.tree.map(lambda x: x[rows], seats.slots)
        slots = replace(slots, active=slots.active & runs)
        outputs = StepOutputs(
            tokens=jnp.full((most, batch), NO_TOKEN, jnp.int32),
            logprobs=jax.tree.map(
                lambda x: jnp.zeros((most, *x.shape), x.dtype), _no_logprobs(batch, self.config.vocab_size)
            ),
        )
        Carry = tuple[jax.Array, KVCache, SlotState, Seen, StepOutputs]

        def goes_on(carry: Carry) -> jax.Array:
            step, _, slots, _, _ = carry
            return (step < steps) & jnp.any(slots.active)

        def step(carry: Carry) -> Carry:
            step, cache, slots, seen, outputs = carry
            # A slot that does not run is computed with the others; its writes go where nobody reads.
            start = jnp.where(slots.active, slots.position, 0)
            table = jnp.where(slots.active[:, None], slots.page_table, NULL_PAGE)
            hidden, cache = self._forward(params, cache, slots.token[:, None], start, table)
            token, chosen = self._draw(params, seen, slots, rows, allowed, hidden[:, 0])
            made = StepOutputs(tokens=jnp.where(slots.active, token, NO_TOKEN), logprobs=chosen)
            outputs = jax.tree.map(lambda all_, new: all_.at[step].set(new), outputs, made)
            return step + 1, cache, self._advance(slots, token), self._count(seen, slots, rows, token), outputs

        _, cache, slots, seen, outputs = self.placement.loop(
            goes_on, step, (jnp.int32(0), cache, slots, seats.seen, outputs)
        )
        all_slots = jax.tree.map(lambda all_, some: all_.at[rows].set(some), seats.slots, slots)
        return cache, Seats(slots=all_slots, seen=seen), outputs

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

    def _draw(
        self,
        params: Params,
        seen: Seen,
        slots: SlotState,
        rows: jax.Array,
        allowed: jax.Array,
        hidden: jax.Array,
    ) -> tuple[jax.Array, Logprobs]:
        logits = vocabulary_logits(self.placement, params, hidden)

        return self.placement.protected(
            Site("sampling"), _choose, logits, slots, seen, rows, allowed, implementation=self.implementation
        )

    def _advance(self, slots: SlotState, token: jax.Array) -> SlotState:
        """`slots` after each active one has drawn `token`."""
        active = slots.active
        generated = slots.generated + active
        stopped = jnp.any(slots.stop_ids == token[:, None], axis=-1) | (generated >= slots.budget)
        return replace(
            slots,
            token=jnp.where(active, token, slots.token),
            position=slots.position + active,
            generated=generated,
            active=active & ~stopped,
        )

    def _count(self, seen: Seen, slots: SlotState, rows: jax.Array, token: jax.Array) -> Seen:
        """`seen` after each active one of `slots`, in the seats `rows`, has drawn `token`."""
        return replace(seen, output_counts=seen.output_counts.at[rows, token].add(slots.active.astype(jnp.int32)))


def _choose(
    logits: jax.Array,
    slots: SlotState,
    seen: Seen,
    rows: jax.Array,
    allowed: jax.Array,
    *,
    implementation: str | None,
) -> tuple[jax.Array, Logprobs]:
    """The next token of each slot, and its log-probabilities where one of them wants any."""
    constrained = slots.constrained & slots.active
    token = sample(
        logits, slots.sampling, seen, rows, slots.generated, allowed, constrained, implementation=implementation
    )
    return token, lax.cond(
        jnp.any(slots.wants_logprobs & slots.active),
        lambda: logprobs(logits, token, SamplingParams.MAX_LOGPROBS),
        lambda: _no_logprobs(*logits.shape),
    )


def _no_logprobs(batch: int, vocab: int) -> Logprobs:
    top = min(SamplingParams.MAX_LOGPROBS, vocab)
    return Logprobs(
        chosen=jnp.zeros(batch, jnp.float32),
        top_ids=jnp.zeros((batch, top), jnp.int32),
        top=jnp.zeros((batch, top), jnp.float32),
    )
