"""The traced programs: prefill a chunk, score a chunk, admit a request to its slot, decode several steps.

They are pure functions of device state; `runner.py` compiles and launches them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32

from fusedllm.config import ModelConfig, Sampler
from fusedllm.engine import segments
from fusedllm.engine.slots import Seats, SlotState, StepOutputs
from fusedllm.model.cache import KVCache
from fusedllm.model.params import Params
from fusedllm.model.placement import Numbers, Placement, Site
from fusedllm.model.sampling import Logprobs, Seen
from fusedllm.model.transformer import forward, vocabulary_logits

Result = TypeVar("Result")


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
        return self._trusted(segments.rows_of, hidden), cache

    def logits(
        self,
        params: Params,
        cache: KVCache,
        tokens: Int[Array, "1 seq"],
        start: Int[Array, " 1"],
        page_table: Int[Array, "1 table"],
    ) -> tuple[Float[Numbers, "seq vocab"], KVCache]:
        """Runs a chunk and returns every row of its logits."""
        hidden, cache = self._forward(params, cache, tokens, start, page_table)
        return vocabulary_logits(self.placement, params, self._trusted(segments.rows_of, hidden)), cache

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
        return self._trusted(segments.scores_of, rows, targets), cache

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
        hidden = self._trusted(segments.rows_of, hidden)
        rows = vocabulary_logits(self.placement, params, hidden)
        return *self._trusted(segments.scored, hidden, rows, targets, last), cache

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
        logits = vocabulary_logits(self.placement, params, hidden)
        token, chosen = self._choose(logits, request.slots, request.seen, np.zeros(1, np.int32), allowed)
        return self._trusted(segments.seated, seats, seat, request, token, chosen)

    def decode(
        self,
        params: Params,
        cache: KVCache,
        seats: Seats,
        orders: Int[Array, "batch fields"],
        steps: Int[Array, ""],
        allowed: UInt32[Array, "batch words"],
        most: int,
        sampler: Sampler = Sampler.FULL,
        free_steps: int = 1,
    ) -> tuple[KVCache, Seats, StepOutputs]:
        """Makes up to `steps` (at most `most`) tokens in each row of `orders` whose slot is active.

        No row asks for more than `sampler` has. Whether any of them goes on is looked at every `free_steps`; with more
        than one, `loop` must be part of the program.

        A row is `(seat, whether it is to run, first entry of its page table to set, pages to set it to)`; the pages
        that there are not are negative. Rows that are not to run name seats that no other row names.
        """
        all_slots, rows, begun = self._trusted(
            segments.begun, seats, orders, steps, most=most, vocab=self.config.vocab_size
        )
        in_prompt = seats.seen.in_prompt

        def step(carry: tuple[segments.Progress, KVCache]) -> tuple[segments.Progress, KVCache]:
            made, cache = carry
            tokens, start, table = self._trusted(segments.inputs, made.slots)
            hidden, cache = self._forward(params, cache, tokens, start, table)
            logits = vocabulary_logits(self.placement, params, self._trusted(segments.rows_of, hidden))
            seen = Seen(in_prompt=in_prompt, output_counts=made.counts)
            token, chosen = self._choose(logits, made.slots, seen, rows, allowed, sampler)
            made = self._trusted(
                segments.recorded, made.step, steps, made.slots, rows, made.counts, made.outputs, token, chosen
            )
            return made, cache

        def several(carry: tuple[segments.Progress, KVCache]) -> tuple[segments.Progress, KVCache]:
            # Of a fixed length, so that nobody is asked; a step that is one too many works on no row.
            return jax.lax.fori_loop(0, free_steps, lambda _, carry: _unless_ended(step, *carry), carry)

        body = step if free_steps == 1 else several
        made, cache = self.placement.loop(lambda carry: carry[0].goes_on, body, (begun, cache))
        slots = self._trusted(segments.returned, all_slots, rows, made.slots)
        return cache, Seats(slots=slots, seen=Seen(in_prompt=in_prompt, output_counts=made.counts)), made.outputs

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

    def _choose(
        self,
        logits: Numbers,
        slots: SlotState,
        seen: Seen,
        rows: jax.Array | np.ndarray,
        allowed: jax.Array,
        sampler: Sampler = Sampler.FULL,
    ) -> tuple[jax.Array, Logprobs]:
        return self.placement.protected(
            Site("sampling"), segments.chosen, logits, slots, seen, rows, allowed,
            sampler=sampler, implementation=self.implementation,
        )  # fmt: skip

    def _trusted(self, function: Callable[..., Result], *operands: object, **static: Hashable) -> Result:
        """One of `segments`, where the trust is."""
        return self.placement.protected(Site(function.__name__), function, *operands, **static)


def _unless_ended(
    step: Callable[[tuple[segments.Progress, KVCache]], tuple[segments.Progress, KVCache]],
    made: segments.Progress,
    cache: KVCache,
) -> tuple[segments.Progress, KVCache]:
    """`step`; where the program has ended it works on no row, and changes none."""
    running = replace(made.slots, active=made.slots.active & made.goes_on)
    after, cache = step((replace(made, slots=running), cache))
    active = jnp.where(made.goes_on, after.slots.active, made.slots.active)
    return replace(after, slots=replace(after.slots, active=active)), cache
