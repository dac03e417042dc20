"""What decoding keeps on the device of each request, and what a launch gives back."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from fusedllm.config import ModelConfig, SamplingParams
from fusedllm.model.cache import NULL_PAGE
from fusedllm.model.sampling import Logprobs, SamplingState, Seen

# In `StepOutputs.tokens`: this slot made no token in this step.
NO_TOKEN = -1


@flax.struct.dataclass
class SlotState:
    """What decoding keeps on the device of each slot.

    `token` was drawn but is not in the cache yet; it belongs at `position`. `generated` counts drawn tokens up to
    `budget`. Unused entries of `stop_ids` are negative. A `constrained` slot draws what its mask allows.
    """

    token: Int[Array, " batch"]
    position: Int[Array, " batch"]
    generated: Int[Array, " batch"]
    budget: Int[Array, " batch"]
    active: Bool[Array, " batch"]
    wants_logprobs: Bool[Array, " batch"]
    constrained: Bool[Array, " batch"]
    stop_ids: Int[Array, "batch stops"]
    page_table: Int[Array, "batch table"]
    sampling: SamplingState


@flax.struct.dataclass
class Seats:
    """Every slot that there is; a launch works on some of them."""

    slots: SlotState
    seen: Seen


@flax.struct.dataclass
class StepOutputs:
    """What a launch made: `tokens[step, slot]`, or `NO_TOKEN`, and the log-probabilities in the same order."""

    tokens: Int[Array, "steps batch"]
    logprobs: Logprobs


def mask_words(config: ModelConfig) -> int:
    """Words of 32 bits that say of each token whether it is allowed."""
    return -(-config.vocab_size // 32)


def empty_seats(config: ModelConfig, batch: int, table_entries: int, stops: int) -> Seats:
    """`batch` seats without a request."""

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
    )
    slots = SlotState(
        token=full(0, jnp.int32),
        position=full(0, jnp.int32),
        generated=full(0, jnp.int32),
        budget=full(0, jnp.int32),
        active=full(False, jnp.bool_),
        wants_logprobs=full(False, jnp.bool_),
        constrained=full(False, jnp.bool_),
        stop_ids=full(NO_TOKEN, jnp.int32, stops),
        page_table=full(NULL_PAGE, jnp.int32, table_entries),
        sampling=sampling,
    )
    seen = Seen(
        in_prompt=full(False, jnp.bool_, config.vocab_size), output_counts=full(0, jnp.int32, config.vocab_size)
    )
    return Seats(slots=slots, seen=seen)
