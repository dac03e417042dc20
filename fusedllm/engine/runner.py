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

from fusedllm.config import ModelConfig, Sampler, SamplingParams
from fusedllm.engine import request as engine_request
from fusedllm.engine.compile_guard import compile_is_forbidden
from fusedllm.engine.config import EngineConfig, split_into_chunks
from fusedllm.engine.programs import Programs
from fusedllm.engine.slots import NO_TOKEN, Seats, SlotState, StepOutputs, empty_seats, mask_words
from fusedllm.errors import CompileForbiddenError, RequestError
from fusedllm.model.cache import NULL_PAGE, KVCache, empty_cache
from fusedllm.model.params import Params
from fusedllm.model.placement import Placement
from fusedllm.model.sampling import Logprobs, SamplingState, Seen
from fusedllm.sharding.layout import Layout

# Every token of a word is allowed.
ALL_BITS = 0xFFFFFFFF

# Where a row of orders has no further page.
NO_PAGE = -1


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
        layout: Layout | None = None,
    ) -> None:
        self.config = config
        self.engine = engine
        # Whether other processes launch the same, so that nothing may depend on this one's clock or chance.
        self.lockstep = layout is not None and layout.lockstep
        self.traffic = Traffic()
        self.compile_seconds = 0.0
        self._params = params
        # The head alone: `admit` should not be handed 300 arrays that it does not read.
        self._head = replace(params, layers=())
        self._stops = SamplingParams.MAX_STOP_TOKEN_IDS + max(len(config.eos_token_ids), 1)
        self._compiled: set[str] = set()
        compiled = placement.compile if layout is None else layout.compile
        programs = Programs(config, placement, jnp.dtype(dtype), implementation)
        self._prefill = compiled(programs.prefill, donate_argnums=1)
        self._logits = compiled(programs.logits, donate_argnums=1)
        self._score = compiled(programs.score, donate_argnums=1)
        self._prefill_scored = compiled(programs.prefill_scored, donate_argnums=1)
        self._admit = compiled(programs.admit, donate_argnums=1)
        self._decode = {
            sampler: compiled(
                functools.partial(
                    programs.decode,
                    most=engine.decode_steps,
                    sampler=sampler,
                    free_steps=1 if sampler is Sampler.FULL else engine.free_steps,
                ),
                donate_argnums=(1, 2),
            )
            for sampler in (tuple(Sampler) if engine.free_steps else (Sampler.FULL,))
        }
        # Where the parameters are, and bound to it: a program is compiled once for state that is bound to a place and
        # once for state that is not, and what comes out of a launch is bound.
        home = params.final_norm.sharding
        self._place: Callable[[np.ndarray], jax.Array] = (
            functools.partial(jax.device_put, device=home) if layout is None else layout.everywhere
        )
        self._empty_cache = jax.jit(
            functools.partial(empty_cache, config, engine.num_pages, engine.page_size, cache_dtype),
            out_shardings=home if layout is None else layout.cache,
        )
        self._empty_seats = jax.jit(
            lambda: empty_seats(config, engine.max_batch, engine.table_entries, self._stops), out_shardings=home
        )
        # On the device already, so that an ordinary admission does not send a row of the vocabulary.
        self._no_token, self._no_count = (
            self._place(np.zeros((1, config.vocab_size), dtype)) for dtype in (np.bool_, np.int32)
        )
        # What allows everything, for launches without a grammar.
        self._words = mask_words(config)
        self._all_allowed = {batch: self._place(self.all_allowed(batch)) for batch in {1, *engine.batch_buckets}}
        self._cache: KVCache = self._make_cache()
        self._seats: Seats = self._empty_seats()

    def recover(self) -> bool:
        """Makes the device state anew where an interrupted launch has taken it with it; whether it had.

        Requests in flight are lost then, and what the pages held.
        """
        lost = any(array.is_deleted() for array in jax.tree.leaves((self._cache, self._seats)))
        if lost:
            self._cache = self._make_cache()
            self._seats = self._empty_seats()
        return lost

    def _make_cache(self) -> KVCache:
        try:
            cache = self._empty_cache()
            return jax.block_until_ready(cache)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            raise RequestError(
                f"a KV cache of {self.engine.cache_tokens} positions does not fit into memory; ask for less with "
                "max_context or cache_tokens."
            ) from error

    def prefill(
        self, ids: Sequence[int], position: int, bucket: int, pages: Sequence[int], targets: Sequence[int] | None = None
    ) -> tuple[jax.Array, Logprobs | None]:
        """Writes `ids`, at most `bucket`, into `pages` from `position` on.

        Returns:
          The last token's hidden state, for `admit`, and the log-probabilities of `targets` where there are any.
        """
        arguments = (
            self._params, self._cache, _padded(ids, bucket)[None], np.asarray([position], np.int32),
            self._table(pages), np.int32(len(ids) - 1),
        )  # fmt: skip
        if targets is None:
            hidden, self._cache = self._launch(f"prefill of {bucket} tokens", self._prefill, *arguments)
            return hidden, None
        name = f"scored prefill of {bucket} tokens"
        hidden, scores, self._cache = self._launch(name, self._prefill_scored, *arguments, _padded(targets, bucket))
        return hidden, scores

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

    def admit(
        self,
        seat: int,
        sequence: engine_request.Sequence,
        ids: Sequence[int],
        pages: Sequence[int],
        hidden: jax.Array,
        mask: np.ndarray | None = None,
    ) -> StepOutputs:
        """Draws the next token of a sequence whose tokens so far are `ids`, and puts it into `seat`.

        `mask` (uint32 `[words]`) says what its grammar allows.
        """
        allowed = self._all_allowed[1] if mask is None else self._to_device(mask[None].copy())
        request = self._describe(sequence, ids, pages)
        self._seats, outputs = self._launch(
            "admission", self._admit, self._head, self._seats, np.int32(seat), request, hidden, allowed
        )
        return outputs

    def decode(
        self, orders: np.ndarray, steps: int, allowed: np.ndarray | None = None, sampler: Sampler = Sampler.FULL
    ) -> StepOutputs:
        """Makes up to `steps` tokens in each row of `orders` (int32 `[batch, 3 + new_pages]`, see `Programs.decode`).

        `allowed` (uint32 `[batch, words]`) are the masks of rows that follow a grammar. No row asks for more than
        `sampler` has.
        """
        batch, sampler = orders.shape[0], self._made(sampler)
        self._cache, self._seats, outputs = self._launch(
            _decode_name(batch, sampler), self._decode[sampler],
            self._params, self._cache, self._seats, orders, np.int32(steps),
            self._all_allowed[batch] if allowed is None else self._to_device(allowed),
        )  # fmt: skip
        return outputs

    def all_allowed(self, batch: int) -> np.ndarray:
        """Masks for `decode` that allow every token."""
        return np.full((batch, self._words), ALL_BITS, np.uint32)

    def has_decoded(self, requests: int, sampler: Sampler) -> bool:
        """Whether the program that decodes `requests` together has been made."""
        return _decode_name(self.engine.batch_bucket(requests), self._made(sampler)) in self._compiled

    def _made(self, sampler: Sampler) -> Sampler:
        """The least of those that there are programs of, which has what `sampler` has."""
        return min(found for found in self._decode if found >= sampler)

    def wait(self, hidden: jax.Array) -> None:
        """Waits until a prefill has run."""
        jax.block_until_ready(hidden)

    def to_host(self, scores: Logprobs) -> Logprobs:
        """`scores` as NumPy arrays; waits for them."""
        return jax.tree.map(self._to_host, scores)

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
            hidden, _ = self.prefill([0], 0, bucket, ())
        on_program("admission")
        # One step is really made: where the host drives, a program is compiled as far as it runs.
        request = engine_request.Sequence((0,), SamplingParams(), frozenset(), budget=2, seed=0)
        for batch in self.engine.batch_buckets:
            for sampler in self._decode:
                self.admit(0, request, (0,), (), hidden)
                on_program(_decode_name(batch, sampler))
                outputs = self.decode(orders(self.engine, [(0, 0, ())], batch), 1, sampler=sampler)
        jax.block_until_ready(outputs)

    def warm_up_scores(self, bucket: int) -> None:
        """Compiles the prefill that makes log-probabilities of the prompt."""
        jax.block_until_ready(self.prefill([0], 0, bucket, (), targets=[0]))

    def trace_decode(self, batch: int, sampler: Sampler = Sampler.UNFILTERED) -> Any:
        """The decode program of `batch` rows, traced (`jax.stages.Traced`): to be looked at, not to be launched."""
        idle, allowed = orders(self.engine, [], batch), self._all_allowed[batch]
        decode: Any = self._decode[self._made(sampler)]
        return decode.trace(self._params, self._cache, self._seats, idle, np.int32(1), allowed)

    def memory_analysis(self, batch: int) -> Any:
        """XLA's memory analysis of the decode program: how many bytes are aliased, and how many temporary."""
        return self.trace_decode(batch).lower().compile().memory_analysis()

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

    def _table(self, pages: Sequence[int]) -> np.ndarray:
        table = np.full((1, self.engine.table_entries), NULL_PAGE, np.int32)
        table[0, : len(pages)] = pages
        return table

    def _describe(self, sequence: engine_request.Sequence, ids: Sequence[int], pages: Sequence[int]) -> Seats:
        """The sequence as `Seats` of one, in NumPy but for what is on the device already."""
        sampling = sequence.sampling
        vocab = self.config.vocab_size
        in_prompt, counts = self._no_token, self._no_count
        if sampling.repetition_penalty != 1:
            seen = np.zeros((1, vocab), np.bool_)
            seen[0, list(sequence.prompt)] = True
            in_prompt = self._to_device(seen)
        output = ids[len(sequence.prompt) :]
        if output and sampling.has_penalties:
            counts = self._to_device(np.bincount(output, minlength=vocab).astype(np.int32)[None])
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
        }
        fields: dict[str, Any] = {
            "token": one(0, np.int32),
            "position": one(len(ids) - 1, np.int32),
            "generated": one(len(output), np.int32),
            "budget": one(sequence.budget, np.int32),
            "active": one(True, np.bool_),
            "wants_logprobs": one(sampling.logprobs is not None, np.bool_),
            "constrained": one(sequence.constraint is not None, np.bool_),
            "stop_ids": _padded(sorted(sequence.stop_ids), self._stops, NO_TOKEN)[None],
            "page_table": self._table(pages),
        }
        slots = SlotState(**fields, sampling=SamplingState(**sampling_fields))
        return Seats(slots=slots, seen=Seen(in_prompt=in_prompt, output_counts=counts))

    def _to_device(self, array: np.ndarray) -> jax.Array:
        """`array` where what was warmed up is: an argument in another place makes another program."""
        self.traffic.bytes_to_device += array.nbytes
        return self._place(array)


def orders(
    engine: EngineConfig, rows: Sequence[tuple[int, int, Sequence[int]]], batch: int | None = None
) -> np.ndarray:
    """The orders of `Programs.decode` for rows of `(seat, first entry, new pages)`, in the least bucket or `batch`."""
    batch = batch or engine.batch_bucket(len(rows))
    made = np.full((batch, 3 + engine.new_pages), NO_PAGE, np.int32)
    taken = {seat for seat, _, _ in rows}
    idle = [seat for seat in range(engine.max_batch) if seat not in taken]
    made[:, :3] = [(seat, 1, entry) for seat, entry, _ in rows] + [(seat, 0, 0) for seat in idle][: batch - len(rows)]
    for order, (_, _, pages) in zip(made, rows, strict=False):
        order[3 : 3 + len(pages)] = pages
    return made


def _decode_name(batch: int, sampler: Sampler) -> str:
    kind = "" if sampler is Sampler.FULL else f" ({sampler.name.lower()})"
    return f"decode of {batch} slots{kind}"


def _padded(values: Sequence[float], length: int, fill: float = 0, dtype: type = np.int32) -> np.ndarray:
    padded: np.ndarray = np.full(length, fill, dtype)
    padded[: len(values)] = values
    return padded
