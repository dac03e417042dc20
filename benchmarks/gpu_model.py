"""The 1B shape on the device: decode, prefill, and both with quantized weights. Parts of `gpu.py`.

A program's time is taken on its own, from the device's queue, and beside it that of `LLM.generate`, which is what a
caller sees. Weights, and what the cache holds, are random numbers made on the device.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable
from typing import Any

from common import Spread, decode_bytes, prefill_operations, sizes
from gpu_part import Part, compile_together, config_of, normal, on_gpu, peak_memory

SCHEMES = ("int8", "int4-g64", "fp8", "w8a8", "int4-g64-sym", "int8-g64")
PAGE_SIZE = 16
# Of launches that are timed together; the first of them wait for the host and the rest for the device.
LAUNCHES = 4
# Of the samples of one figure, beyond the first that warm up.
MOST_SECONDS = 3.0
# Of the device's memory for the KV cache, beside weights and what programs need for the time being.
CACHE_SHARE = 0.4


def random_params(config: Any, dtype: str, scheme: str | None = None) -> Any:
    """Weights drawn on the device, all matrices in `scheme`; ones for norms."""
    import jax
    import jax.numpy as jnp

    from fusedllm.kernels.quantize import quantize
    from fusedllm.model.params import ParamSpec, describe
    from fusedllm.quant.schemes import SCHEMES

    numbers = iter(range(10**6))

    def draw(spec: ParamSpec) -> Any:
        if spec.init != "normal":
            return (jnp.ones if spec.init == "ones" else jnp.zeros)(spec.shape, dtype)
        std = 0.02 if spec.axes[0] == "vocab" else spec.shape[-1] ** -0.5
        weight = normal(spec.shape, dtype, next(numbers), std)
        return weight if scheme is None else jax.block_until_ready(quantize(weight, SCHEMES[scheme]))

    described = describe(config)
    return jax.block_until_ready(jax.tree.map(draw, described, is_leaf=lambda leaf: isinstance(leaf, ParamSpec)))


class Model:
    """A loaded model; the parts that use it share its shapes, so that a program is compiled for all of them once."""

    def __init__(self, part: Part, scheme: str | None = None) -> None:
        from fusedllm.llm import LLM

        scale = part.scale
        self.config = config_of(scale)
        self.params = random_params(self.config, scale.dtype, scheme)
        self.engine = engine_config(part, self.config)
        self.llm = LLM(self.config, self.params, engine=self.engine, dtype=scale.dtype)
        self.runner: Any = self.llm.engine.runner
        self.scale = scale
        self._filled = False

    def compile_ahead(self, prompts: bool, batches: tuple[int, ...] = ()) -> None:
        """Compiles programs of prompts or of decode steps side by side, for the directory of compiled programs to have.

        Where there is none, or it does not have them for some reason, they are compiled when they are first run.
        """
        import jax
        import numpy as np

        runner, engine = self.runner, self.engine
        if not on_gpu() or not jax.config.jax_compilation_cache_dir:
            return
        state = runner._params, runner._cache
        lowered = [runner.trace_decode(batch).lower() for batch in batches]
        for bucket in engine.prefill_buckets if prompts else ():
            tokens, start = np.zeros((1, bucket), np.int32), np.zeros(1, np.int32)
            lowered.append(runner._prefill.lower(*state, tokens, start, runner._table(()), np.int32(0)))
        compile_together(lowered)

    def nbytes(self) -> int:
        """Of all weights that a decode step reads, each once."""
        import jax

        leaves = jax.tree.leaves(self.params)
        untied = self.params.head is not None
        return sum(leaf.nbytes for leaf in leaves) - (self.params.embedding.nbytes if untied else 0)

    def fill_cache(self) -> None:
        """Random numbers instead of zeros in every page; and pages, where a launch that failed took them with it."""
        import jax

        if self.runner._cache is None:
            self.runner._cache, self._filled = self.runner._make_cache(), False
        if self._filled:
            return
        cache, self.runner._cache = self.runner._cache, None
        leaves, shape = jax.tree.flatten(cache)
        filled = []
        for number, leaf in enumerate(leaves):
            filled.append(jax.device_put(normal(leaf.shape, leaf.dtype, number), leaf.sharding))
            leaves[number] = None
            leaf.delete()
        self.runner._cache = jax.tree.unflatten(shape, filled)
        self._filled = True

    def decode(self, context: int, batch: int) -> Callable[[], float]:
        """Seats `batch` requests whose context is there; what it returns makes launches: seconds of a step."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        from fusedllm.config import SamplingParams
        from fusedllm.engine.request import Sequence
        from fusedllm.engine.runner import orders

        runner, engine, steps = self.runner, self.engine, self.scale.steps
        self.fill_cache()
        # As many launches as fit the pages, and then the seats are taken anew.
        entries = -(-(context + self.room()) // PAGE_SIZE)
        hidden = normal((1, self.config.hidden_size), self.scale.dtype)
        hidden = jax.device_put(hidden, runner._no_token.sharding)
        ids = np.random.RandomState(context).randint(0, self.config.vocab_size, context).tolist()
        rows = [(seat, entries, ()) for seat in range(batch)]
        order = orders(engine, rows, batch)
        arguments = (order, np.int32(steps), runner._all_allowed[batch])
        # Of the samplers the least, which is all that greedy requests ask for.
        program = runner._decode[min(runner._decode)]

        sampling = SamplingParams(temperature=0, max_tokens=self.room(), ignore_eos=True)
        for number in range(batch):
            pages = range(1 + number * entries, 1 + (number + 1) * entries)
            sequence = Sequence(tuple(ids), sampling, frozenset(), budget=2**30, seed=number)
            runner.admit(number, sequence, ids, pages, hidden)
        # A launch takes the seats with it; each run begins with those of before.
        again = jax.jit(lambda seats: jax.tree.map(jnp.copy, seats))
        seated = again(runner._seats)

        def run() -> float:
            params, cache, seats, outputs = runner._params, runner._cache, again(seated), None
            # Given away: where a launch fails, `fill_cache` finds that it is gone.
            runner._cache = None
            cache, seats, outputs = program(params, cache, seats, *arguments)  # Wakes what has gone cold.
            jax.block_until_ready((cache, seats))
            began = time.perf_counter()
            for _ in range(LAUNCHES):
                cache, seats, outputs = program(params, cache, seats, *arguments)
            jax.block_until_ready(outputs)
            took = time.perf_counter() - began
            runner._cache, runner._seats = cache, seats
            made = np.asarray(outputs.tokens)
            if made.shape[0] < steps or (made[:steps, :batch] < 0).any():
                raise RuntimeError("a launch made fewer tokens than it was asked for, so that its time says nothing.")
            return took / (LAUNCHES * steps)

        return run

    def room(self) -> int:
        """Positions beyond the context that the timed launches write."""
        return (LAUNCHES + 1) * self.scale.steps + PAGE_SIZE

    def prefill(self, tokens: int) -> Callable[[], float]:
        """What it returns runs a prompt of `tokens` in chunks: seconds until its last hidden state is there."""
        import jax
        import numpy as np

        runner = self.runner
        ids = np.random.RandomState(tokens).randint(0, self.config.vocab_size, tokens).tolist()
        pages = list(range(1, -(-tokens // PAGE_SIZE) + 1))
        chunk = self.scale.chunk if tokens > self.scale.chunk else tokens

        def run() -> float:
            began = time.perf_counter()
            for at in range(0, tokens, chunk):
                hidden, _ = runner.prefill(ids[at : at + chunk], at, chunk, pages)
            jax.block_until_ready(hidden)
            return time.perf_counter() - began

        return run

    def generated(self, tokens: int, count: int) -> tuple[float, float]:
        """As a caller sees it: seconds until the first token, and of each after it."""
        import numpy as np

        self.fill_cache()
        ids = np.random.RandomState(tokens).randint(0, self.config.vocab_size, tokens).tolist()
        (result,) = self.llm.generate([ids], temperature=0, max_tokens=count + 1, ignore_eos=True)
        timings = result.timings
        return timings.prefill_seconds, timings.decode_seconds / max(count, 1)


def engine_config(part: Part, config: Any) -> Any:
    """Buckets of exactly the shapes that are measured, and as many pages as they need or as there is room for."""
    import jax

    from fusedllm.engine.config import EngineConfig

    scale = part.scale
    room = 6 * scale.steps + 2 * PAGE_SIZE
    longest = max(*scale.contexts, *scale.prefill) + room
    wanted = max(max(scale.contexts) * max(scale.batches) + max(scale.batches) * room, longest)
    return EngineConfig.suited(
        jax.default_backend(),
        max_context=-(-longest // PAGE_SIZE) * PAGE_SIZE,
        page_size=PAGE_SIZE,
        cache_tokens=max(min(wanted, cache_room(config)), longest + PAGE_SIZE),
        prefill_buckets=tuple(sorted({min(tokens, scale.chunk) for tokens in scale.prefill})),
        batch_buckets=scale.batches,
        decode_steps=scale.steps,
        prefix_cache=False,
    )


def cache_room(config: Any) -> int:
    """How many positions of a cache in two bytes the device's memory has room for."""
    import jax

    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit") if on_gpu() else None
    position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    return int((limit or 2**32) * CACHE_SHARE) // position


def decode_part(part: Part) -> None:
    """Contexts and batches; batch 1 first, since that is what the goal is about."""
    import jax.numpy as jnp

    model = Model(part)
    shape, itemsize = sizes(model.config), jnp.dtype(part.scale.dtype).itemsize
    part.put("weight_bytes", model.nbytes())
    part.attempt("compiling side by side", lambda: model.compile_ahead(prompts=False, batches=part.scale.batches))
    for batch in part.scale.batches:
        for context in part.scale.contexts:
            name = f"context {context}, batch {batch}"
            if batch * (context + model.room()) + PAGE_SIZE > model.engine.cache_tokens:
                part.skip(name, "the KV cache would not fit")
                continue
            made = part.attempt(name, lambda context=context, batch=batch: _samples(part, model.decode(context, batch)))
            if made is None:
                continue
            read = decode_bytes(shape, context + model.room() // 2, itemsize, batch)
            part.row(
                context=context,
                batch=batch,
                step_seconds=made,
                tokens_per_second=Spread.of([batch / made.median]),
                bytes=read,
                bytes_per_second=read / made.median,
            )
    context = min(part.scale.contexts)
    seen = part.attempt(
        "as a caller sees it", lambda: [model.generated(context, 4 * part.scale.steps) for _ in range(4)]
    )
    if seen is not None:
        step = Spread.of([each for _, each in seen[1:]])
        part.put("generate", {"context": context, "step_seconds": step, "tokens_per_second": 1 / step.median})
        print(f"  LLM.generate at {context}: {1 / step.median:.0f} tokens/s")
    part.put("peak_bytes", peak_memory())


def prefill_part(part: Part) -> None:
    """Prompts of several lengths: the program's time, and what a caller waits for."""
    model = Model(part)
    part.attempt("compiling side by side", lambda: model.compile_ahead(prompts=True))
    model.fill_cache()
    shape = sizes(model.config)
    # What the goal is about goes first.
    for tokens in sorted(part.scale.prefill, key=lambda tokens: (tokens != 1024, tokens)):
        made = part.attempt(f"{tokens} tokens", lambda tokens=tokens: _samples(part, model.prefill(tokens)))
        if made is None:
            continue
        seen = part.attempt(
            f"{tokens} tokens as a caller sees them",
            lambda tokens=tokens: [model.generated(tokens, 0)[0] for _ in "abcd"],
        )
        operations = prefill_operations(shape, tokens)
        part.row(
            tokens=tokens,
            seconds=made,
            generate_seconds=None if seen is None else Spread.of(seen[1:]),
            tokens_per_second=tokens / made.median,
            operations=operations,
            operations_per_second=operations / made.median,
        )
    part.put("peak_bytes", peak_memory())


def quantized_part(part: Part) -> None:
    """Decode of batch 1 and prefill, in the model's dtype first and then in each scheme."""
    context = min(part.scale.contexts)
    tokens = 1024 if 1024 in part.scale.prefill else max(part.scale.prefill)
    plain: dict[str, float] = {}
    # Few pages: several models follow one another, and only one request runs.
    part = dataclasses.replace(
        part, scale=dataclasses.replace(part.scale, contexts=(context,), batches=(1,), prefill=(tokens,))
    )
    for scheme in (None, *(SCHEMES[:1] if part.tiny else SCHEMES)):
        name = scheme or part.scale.dtype
        found = part.attempt(name, functools.partial(_one_scheme, part, scheme, context, tokens))
        if found is None:
            continue
        plain = plain or {"step": found["step_seconds"].median, "prompt": found["prompt_seconds"].median}
        ratios = {
            "decode_ratio": plain["step"] / found["step_seconds"].median,
            "prefill_ratio": plain["prompt"] / found["prompt_seconds"].median,
        }
        whole = part.scale.dtype in [name, *(row["weights"] for row in part.found.get("rows", []))]
        part.row(weights=name, **found, **(ratios if whole else {}))
        gc.collect()  # An engine and its runner know one another.


def _one_scheme(part: Part, scheme: str | None, context: int, tokens: int) -> dict[str, Any]:
    model = Model(part, scheme)
    part.attempt("compiling side by side", lambda: model.compile_ahead(prompts=True, batches=(1,)))
    step = _samples(part, model.decode(context, 1))
    prompt = _samples(part, model.prefill(tokens))
    return {
        "context": context,
        "tokens": tokens,
        "weight_bytes": model.nbytes(),
        "step_seconds": step,
        "tokens_per_second": 1 / step.median,
        "bytes_per_second": model.nbytes() / step.median,
        "prompt_seconds": prompt,
    }


def _samples(part: Part, run: Callable[[], float]) -> Spread:
    """As many as the scale says, or as a few seconds have room for."""
    run()  # Compiles.
    began = time.perf_counter()
    run()
    took = time.perf_counter() - began
    count = max(2, min(part.scale.repetitions, int(MOST_SECONDS / took)))
    return Spread.of([run() for _ in range(count)])
