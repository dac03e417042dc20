"""What the programs compute apart from the model: which rows run, what is drawn, and what is remembered of it.

Pure functions of their operands, with all else static, so that each can be compiled on its own (`Placement.protected`).
An operand named `counts` or `outputs` is given up by who calls.
"""

from __future__ import annotations

from dataclasses import replace

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from fusedllm.config import Sampler, SamplingParams
from fusedllm.engine.slots import NO_TOKEN, Seats, SlotState, StepOutputs
from fusedllm.model.cache import NULL_PAGE
from fusedllm.model.sampling import Logprobs, Seen, logprobs, sample


@flax.struct.dataclass
class Progress:
    """A decode program between two steps.

    Attributes:
      goes_on: whether there is another step.
      step: steps made.
      slots: of the rows that it works on.
      counts: `Seen.output_counts` of every seat.
      outputs: what was made.
    """

    goes_on: Bool[Array, ""]
    step: Int[Array, ""]
    slots: SlotState
    counts: Int[Array, "seats vocab"]
    outputs: StepOutputs


def rows_of(hidden: Float[Array, "batch selected hidden"]) -> Float[Array, "rows hidden"]:
    """One row for each token that goes on to the vocabulary product."""
    return hidden.reshape(-1, hidden.shape[-1])


def scores_of(logits: Float[Array, "seq vocab"], targets: Int[Array, " seq"]) -> Float[Array, " seq"]:
    """The log-probability of each of `targets` at its row."""
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def scored(
    hidden: Float[Array, "seq hidden"],
    logits: Float[Array, "seq vocab"],
    targets: Int[Array, " seq"],
    last: Int[Array, ""],
) -> tuple[Float[Array, "1 hidden"], Logprobs]:
    """The row `last`, and the log-probabilities of `targets` with the likeliest others."""
    scores = logprobs(logits, targets, SamplingParams.MAX_LOGPROBS)
    return lax.dynamic_slice_in_dim(hidden, last, 1), scores


def seated(
    seats: Seats, seat: Int[Array, ""], request: Seats, token: Int[Array, " 1"], chosen: Logprobs
) -> tuple[Seats, StepOutputs]:
    """`request` (`Seats` of one), which has drawn `token`, in its seat."""
    counts = _counted(request.seen.output_counts, request.slots, jnp.zeros(1, jnp.int32), token)
    request = Seats(slots=_advanced(request.slots, token), seen=replace(request.seen, output_counts=counts))
    seats = jax.tree.map(
        lambda old, new: lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), seat, 0), seats, request
    )
    return seats, StepOutputs(tokens=token[None], logprobs=jax.tree.map(lambda x: x[None], chosen))


def begun(
    seats: Seats, orders: Int[Array, "batch fields"], steps: Int[Array, ""], *, most: int, vocab: int
) -> tuple[SlotState, Int[Array, " batch"], Progress]:
    """All slots with their new pages, the seat of each row of `orders` (see `Programs.decode`), and no step made."""
    rows, runs, entry, pages = orders[:, 0], orders[:, 1] > 0, orders[:, 2], orders[:, 3:]
    batch = rows.shape[0]
    entries = jnp.where(pages >= 0, entry[:, None] + jnp.arange(pages.shape[1]), seats.slots.page_table.shape[1])
    tables = seats.slots.page_table.at[rows[:, None], entries].set(pages, mode="drop")
    all_slots = replace(seats.slots, page_table=tables)
    slots: SlotState = jax.tree.map(lambda x: x[rows], all_slots)
    slots = replace(slots, active=slots.active & runs)
    outputs = StepOutputs(
        tokens=jnp.full((most, batch), NO_TOKEN, jnp.int32),
        logprobs=jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), _no_logprobs(batch, vocab)),
    )
    step = jnp.int32(0)
    goes_on = (step < steps) & jnp.any(slots.active)
    return all_slots, rows, Progress(goes_on, step, slots, seats.seen.output_counts, outputs)


def inputs(slots: SlotState) -> tuple[Int[Array, "batch 1"], Int[Array, " batch"], Int[Array, "batch table"]]:
    """The token, the position and the page table of each row.

    A slot that does not run is computed with the others; its writes go where nobody reads.
    """
    start = jnp.where(slots.active, slots.position, 0)
    return slots.token[:, None], start, jnp.where(slots.active[:, None], slots.page_table, NULL_PAGE)


def chosen(
    logits: Float[Array, "batch vocab"],
    slots: SlotState,
    seen: Seen,
    rows: Int[Array, " batch"],
    allowed: jax.Array,
    *,
    sampler: Sampler,
    implementation: str | None,
) -> tuple[Int[Array, " batch"], Logprobs]:
    """The next token of each slot, and its log-probabilities where one of them wants any."""
    constrained = slots.constrained & slots.active
    token = sample(
        logits, slots.sampling, seen, rows, slots.generated, allowed, constrained, sampler=sampler,
        implementation=implementation,
    )  # fmt: skip
    if sampler < Sampler.FULL:
        return token, _no_logprobs(*logits.shape)
    return token, lax.cond(
        jnp.any(slots.wants_logprobs & slots.active),
        lambda: logprobs(logits, token, SamplingParams.MAX_LOGPROBS),
        lambda: _no_logprobs(*logits.shape),
    )


def recorded(
    step: Int[Array, ""],
    steps: Int[Array, ""],
    slots: SlotState,
    rows: Int[Array, " batch"],
    counts: Int[Array, "seats vocab"],
    outputs: StepOutputs,
    token: Int[Array, " batch"],
    likely: Logprobs,
) -> Progress:
    """The program after a step that has drawn `token`."""
    made = StepOutputs(tokens=jnp.where(slots.active, token, NO_TOKEN), logprobs=likely)
    outputs = jax.tree.map(lambda all_, new: all_.at[step].set(new), outputs, made)
    counts = _counted(counts, slots, rows, token)
    slots = _advanced(slots, token)
    goes_on = (step + 1 < steps) & jnp.any(slots.active)
    return Progress(goes_on, step + 1, slots, counts, outputs)


def returned(all_slots: SlotState, rows: Int[Array, " batch"], slots: SlotState) -> SlotState:
    """All slots after a decode program that has worked on `rows` of them."""
    returned_slots: SlotState = jax.tree.map(lambda all_, some: all_.at[rows].set(some), all_slots, slots)
    return returned_slots


def _advanced(slots: SlotState, token: jax.Array) -> SlotState:
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


def _counted(counts: jax.Array, slots: SlotState, rows: jax.Array, token: jax.Array) -> jax.Array:
    """`counts` after each active one of `slots`, in the seats `rows`, has drawn `token`."""
    return counts.at[rows, token].add(slots.active.astype(jnp.int32))


def _no_logprobs(batch: int, vocab: int) -> Logprobs:
    top = min(SamplingParams.MAX_LOGPROBS, vocab)
    return Logprobs(
        chosen=jnp.zeros(batch, jnp.float32),
        top_ids=jnp.zeros((batch, top), jnp.int32),
        top=jnp.zeros((batch, top), jnp.float32),
    )
