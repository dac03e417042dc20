"""`Runner`: the only place that launches programs; it holds parameters, KV cache and slots on the device."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fusedllm.config import ModelConfig, SamplingParams
from fusedllm.engine import request as engine_request
from fusedllm.engine.compile_guard import compile_is_forbidden
from fusedllm.engine.config import EngineConfig, split_into_chunks
from fusedllm.engine.programs import NO_TOKEN, Programs, SlotState, StepOutputs, empty_slots
from fusedllm.errors import CompileForbiddenError, RequestError
from fusedllm.model.cache import NULL_PAGE, KVCache, empty_cache
from fusedllm.model.params import Params
from fusedllm.model.placement import Placement
from fusedllm.model.sampling import Logprobs, SamplingState


@dataclass(slots=True)
class Traffic:
    """What crossed between host and device since the start, and how often a program was launched."""

    launches: int = 0
    bytes_to_device: int = 0
    bytes_to_host: int = 0
    tokens: int = 0


class Runner:
    """Launches the programs of one model. Calls return before the arrays are computed; `fetch` waits.

    Not safe for several threads: `Engine` holds the lock.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        engine: EngineConfig,
        placement: Placement,
        *,
        dtype: DTypeLike,
        cache_dtype: DTypeLike,
        implementation: str | None = None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.traffic = Traffic()
        self.compile_seconds = 0.0
        self._params = params
        # The head alone: `admit` should not be handed 300 arrays that it does not read.
        self._head = replace(params, layers=())
        self._stops = SamplingParams.MAX_STOP_TOKEN_IDS + max(len(config.eos_token_ids), 1)
        self._compiled: set[str] = set()
        self._slots: dict[int, SlotState] = {}
        programs = Programs(config, placement, jnp.dtype(dtype), implementation)
        self._prefill = jax.jit(programs.prefill, donate_argnums=1)
        self._logits = jax.jit(programs.logits, donate_argnums=1)
        self._score = jax.jit(programs.score, donate_argnums=1)
        self._admit = jax.jit(programs.admit, donate_argnums=1)
        self._decode = jax.jit(functools.partial(programs.decode, most=engine.decode_steps), donate_argnums=(1, 2))
        # Where the parameters are, and bound to it: a program is compiled once for state that is bound to a place and
        # once for state that is not, and what comes out of a launch is bound.
        home = params.final_norm.sharding
        self._empty_cache = jax.jit(
            functools.partial(empty_cache, config, engine.num_pages, engine.page_size, cache_dtype), out_shardings=home
        )
        self._empty_slots = jax.jit(
            lambda batch: empty_slots(config, batch, engine.table_entries, self._stops),
            static_argnums=0,
            out_shardings=home,
        )
        # On the device already, so that an ordinary admission does not send a row of the vocabulary.
        self._no_token, self._no_count = (
            jax.device_put(np.zeros((1, config.vocab_size), dtype), home) for dtype in (np.bool_, np.int32)
        )
        self._cache: KVCache = self._make_cache()

    def recover(self) -> None:
        """Makes the device state anew where an interrupted launch has taken it with it. Requests in flight are lost."""
        if any(array.is_deleted() for array in jax.tree.leaves((self._cache, self._slots))):
            self._cache = self._make_cache()
            self._slots.clear()

    def _make_cache(self) -> KVCache:
        try:
            cache = self._empty_cache()
            return jax.block_until_ready(cache)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            raise RequestError(
                f"a KV cache of {self.engine.cache_tokens} positions does not fit into memory; ask for less with "
                "max_context or cache_tokens."
            ) from error

    def prefill(self, ids: Sequence[int], pages: Sequence[int]) -> jax.Array:
        """Writes `ids` into `pages`; the last token's hidden state, for `admit`."""
        table = self._table(pages)
        position, hidden = 0, None
        for length, bucket in split_into_chunks(len(ids), self.engine.prefill_buckets):
            tokens = _padded(ids[position : position + length], bucket)[None]
            start = np.asarray([position], np.int32)
            hidden, self._cache = self._launch(
                f"prefill of {bucket} tokens", self._prefill,
                self._params, self._cache, tokens, start, table, np.int32(length - 1),
            )  # fmt: skip
            position += length
        assert hidden is not None
        return hidden

    def logits(self, ids: Sequence[int], pages: Sequence[int], chunk: int | None) -> np.ndarray:
        """Every row of logits, float32 `[seq, vocab]`; `chunk` overrides the buckets."""
        table = self._table(pages)
        out = np.empty((len(ids), self.config.vocab_size), np.float32)
        for position, length, bucket in self._chunks(len(ids), chunk):
            rows, self._cache = self._launch(
                f"logits of {bucket} tokens", self._logits,
                self._params, self._cache, _padded(ids[position : position + length], bucket)[None],
                np.asarray([position], np.int32), table,
            )  # fmt: skip
            out[position : position + length] = self._to_host(rows)[:length]
        return out

    def score(self, ids: Sequence[int], pages: Sequence[int]) -> np.ndarray:
        """Log-probability of each of `ids[1:]` given those before it, float32 `[seq - 1]`."""
        table = self._table(pages)
        out = np.empty(len(ids) - 1, np.float32)
        for position, length, bucket in self._chunks(len(ids) - 1, None):
            part = slice(position, position + length)
            scores, self._cache = self._launch(
                f"score of {bucket} tokens", self._score,
                self._params, self._cache, _padded(ids[part], bucket)[None],
                np.asarray([position], np.int32), table, _padded(ids[position + 1 : position + length + 1], bucket),
            )  # fmt: skip
            out[part] = self._to_host(scores)[:length]
        return out

    def admit(self, batch: int, slot: int, sequence: engine_request.Sequence, hidden: jax.Array) -> StepOutputs:
        """Draws the sequence's first token and puts it into `slot` of the `batch` slots."""
        slots, outputs = self._launch(
            f"admission to {batch} slots", self._admit,
            self._head, self._slots_of(batch), np.int32(slot), self._describe(sequence), hidden,
        )  # fmt: skip
        self._slots[batch] = slots
        return outputs

    def decode(self, batch: int, keep: Sequence[bool], steps: int) -> StepOutputs:
        """Makes up to `steps` tokens in each of the `batch` slots that is active and in `keep`."""
        self._cache, self._slots[batch], outputs = self._launch(
            _decode_name(batch), self._decode,
            self._params, self._cache, self._slots_of(batch), np.asarray(keep, np.bool_), np.int32(steps),
        )  # fmt: skip
        return outputs

    def has_decoded(self, batch: int) -> bool:
        """Whether the decode program of `batch` slots has been made."""
        return _decode_name(batch) in self._compiled

    def fetch(self, outputs: StepOutputs, *, logprobs: bool) -> tuple[np.ndarray, Logprobs | None]:
        """Waits for a launch: tokens `[steps, batch]`, and `Logprobs` of NumPy arrays where asked for."""
        tokens = self._to_host(outputs.tokens)
        self.traffic.tokens += int((tokens != NO_TOKEN).sum())
        return tokens, jax.tree.map(self._to_host, outputs.logprobs) if logprobs else None

    def warm_up(self, on_program: Callable[[str], object] = lambda name: None) -> None:
        """Compiles what answering needs by launching it once, on the null page; `on_program` hears of each before.

        The programs of evaluation (`logits`, `score`) are not among them.
        """
        for bucket in self.engine.prefill_buckets:
            on_program(f"prefill of {bucket} tokens")
            hidden = self.prefill([0] * bucket, ())
        idle = engine_request.Sequence((0,), SamplingParams(), frozenset(), budget=1, seed=0)
        for batch in self.engine.batch_buckets:
            on_program(_decode_name(batch))
            self.admit(batch, 0, idle, hidden)
            outputs = self.decode(batch, [False] * batch, 1)
        jax.block_until_ready(outputs)

    def memory_analysis(self, batch: int) -> Any:
        """XLA's memory analysis of the decode program: how many bytes are aliased, and how many temporary."""
        arguments = (self._params, self._cache, self._slots_of(batch), np.ones(batch, np.bool_), np.int32(1))
        return self._decode.lower(*arguments).compile().memory_analysis()

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache."""
        return sum(array.nbytes for array in jax.tree.leaves(self._cache))

    def _launch(self, name: str, program: Callable[..., Any], *arguments: Any) -> Any:
        if name not in self._compiled and compile_is_forbidden():
            raise CompileForbiddenError(f"{name} would compile after warm-up, where nothing may compile.")
        sent = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments[2:]) if isinstance(leaf, (np.ndarray, np.generic)))
        self.traffic.launches += 1
        self.traffic.bytes_to_device += sent
        started = time.perf_counter()
        results = program(*arguments)
        if name not in self._compiled:
            # A launch returns at once, so that this is the making of the program.
            self.compile_seconds += time.perf_counter() - started
            self._compiled.add(name)
        return results

    def _to_host(self, array: jax.Array) -> np.ndarray:
        self.traffic.bytes_to_host += array.nbytes
        return np.asarray(array)

    def _chunks(self, length: int, chunk: int | None) -> list[tuple[int, int, int]]:
        """`(position, length, bucket)` of each chunk."""
        if chunk is None:
            sizes = split_into_chunks(length, self.engine.prefill_buckets)
        else:
            sizes = [(min(chunk, length - at), chunk) for at in range(0, length, chunk)]
        positions = np.cumsum([0] + [size for size, _ in sizes])
        return [(int(at), size, bucket) for at, (size, bucket) in zip(positions, sizes, strict=False)]

    def _slots_of(self, batch: int) -> SlotState:
        if batch not in self._slots:
            self._slots[batch] = self._empty_slots(batch)
        return self._slots[batch]

    def _table(self, pages: Sequence[int]) -> np.ndarray:
        table = np.full((1, self.engine.table_entries), NULL_PAGE, np.int32)
        table[0, : len(pages)] = pages
        return table

    def _describe(self, sequence: engine_request.Sequence) -> SlotState:
        """The sequence as a `SlotState` of one slot, in NumPy but for what is on the device already."""
        sampling = sequence.sampling
        vocab = self.config.vocab_size
        in_prompt = self._no_token
        if sampling.repetition_penalty != 1:
            seen = np.zeros((1, vocab), np.bool_)
            seen[0, list(sequence.prompt)] = True
            in_prompt = jax.device_put(seen, in_prompt.sharding)
            self.traffic.bytes_to_device += seen.nbytes
        biases = SamplingParams.MAX_LOGIT_BIAS

        def one(value: float, dtype: type) -> np.ndarray:
            return np.asarray([value], dtype)

        # NumPy arrays where the program will see jax's, which a type checker can't be told.
        sampling_fields: dict[str, Any] = {
            "temperature": one(sampling.temperature, np.float32),
            "top_k": one(sampling.top_k, np.int32),
            "top_p": one(sampling.top_p, np.float32),
            "min_p": one(sampling.min_p, np.float32),
            "repetition_penalty": one(sampling.repetition_penalty, np.float32),
            "presence_penalty": one(sampling.presence_penalty, np.float32),
            "frequency_penalty": one(sampling.frequency_penalty, np.float32),
            "key": np.asarray([[sequence.seed >> 32, sequence.seed & 0xFFFFFFFF]], np.uint32),
            "bias_ids": _padded(list(sampling.logit_bias), biases)[None],
            "bias_values": _padded(list(sampling.logit_bias.values()), biases, dtype=np.float32)[None],
            "in_prompt": in_prompt,
            "output_counts": self._no_count,
        }
        fields: dict[str, Any] = {
            "token": one(0, np.int32),
            "position": one(len(sequence.prompt) - 1, np.int32),
            "generated": one(0, np.int32),
            "budget": one(sequence.budget, np.int32),
            "active": one(True, np.bool_),
            "wants_logprobs": one(sampling.logprobs is not None, np.bool_),
            "stop_ids": _padded(sorted(sequence.stop_ids), self._stops, NO_TOKEN)[None],
            "page_table": self._table(sequence.pages),
        }
        return SlotState(**fields, sampling=SamplingState(**sampling_fields))


def _decode_name(batch: int) -> str:
    return f"decode of {batch} slots"


def _padded(values: Sequence[float], length: int, fill: float = 0, dtype: type = np.int32) -> np.ndarray:
    padded: np.ndarray = np.full(length, fill, dtype)
    padded[: len(values)] = values
    return padded
