"""`LLM`: the notebook's face. Loads a model, answers prompts and chats, streams, and evaluates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast

import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from fusedllm.backend import (
    cache_dtype,
    check_activation_bits,
    compute_dtype,
    default_activation_bits,
    kept_codes,
    runs_native,
    set_threads,
)
from fusedllm.compilation_cache import use_compilation_cache
from fusedllm.config import ModelConfig, SamplingParams, sampling_from_keywords
from fusedllm.engine.config import DEFAULT_MAX_CONTEXT, EngineConfig
from fusedllm.engine.engine import Engine
from fusedllm.engine.replicas import Replicas, share_of
from fusedllm.engine.results import Completion
from fusedllm.engine.runner import Runner
from fusedllm.errors import ContextLengthError, RequestError, TokenizerError
from fusedllm.kernels.choose import WAYS, platform, traced_for
from fusedllm.model.params import Params
from fusedllm.partition import policies
from fusedllm.partition.ledger import Ledger
from fusedllm.partition.pad_supply import PadReport
from fusedllm.prompts import Message, Prompt, as_ids, as_prompts
from fusedllm.sharding.layout import Layout, lay_out
from fusedllm.stream import Stream
from fusedllm.text.chat import ChatTemplate
from fusedllm.text.tokenizer import Tokenizer
from fusedllm.weights import quantized, registry
from fusedllm.weights.checkpoint import Checkpoint
from fusedllm.weights.load import LoadReport, load_params
from fusedllm.weights.open import open_checkpoint
from fusedllm.weights.random import random_checkpoint


def load(
    ckpt: str | Path | pa.Table | Checkpoint = "smollm2-135m",
    *,
    dtype: str = "auto",
    kv_dtype: str = "auto",
    max_context: int | None = None,
    engine: EngineConfig | None = None,
    keep_quantized: bool | Literal["codes"] | None = None,
    implementation: str | None = None,
    activation_bits: int | None = None,
    threads: int | None = None,
    policy: str = "plain",
    crossing: str | None = None,
    mesh: str | None = None,
    random_weights: bool = False,
    seed: int = 0,
    keep_programs: bool = True,
    progress: bool = False,
) -> LLM:
    """Loads a model.

    Args:
      ckpt: a name of `fusedllm models`, `hf:OWNER/NAME`, a path to a file or directory of a known format, a table that
        `fusedllm.quantize` made, or a `Checkpoint`.
      dtype: of weights and activations: `float32`, `bfloat16`, `float16`, or `auto`. That is bfloat16 on accelerators;
        on the CPU float32 activations, and the weights as they are in the file where the native kernels run.
      kv_dtype: of the KV cache: `float32`, `bfloat16`, `float16`, `int8` (with a scale for each position and head),
        `fp8` (e4m3, half of bfloat16's bytes; int8 is some ten times closer to float32), or `auto`: bfloat16 where
        `dtype` is `auto`, otherwise that of the activations.
      max_context: positions that one request may use; by default the model's own limit, at most 4,096.
      engine: all sizes at once, instead of `max_context`.
      keep_quantized: leave quantized matrices quantized; by default where `dtype` is `auto` and kernels read them (the
        native ones on the CPU, on a GPU those of `fusedllm.quantize`'s codes), and where the policy asks for integers.
      implementation: of the kernels, `xla`, `ffi` (native, on the CPU) or, on a GPU, `pallas`, which is the better of
        `triton` and `mosaic`; by default the best there is.
      activation_bits: 16 or 8: to what native products with quantized weights round activations, in groups of 32. 8
        prefills up to 1.8 times as fast, and moves logits by about 1 % of their range. By default 8 for models whose
        hidden size is 2,048 or more, and 16 for smaller ones, which are more easily disturbed.
      threads: how many threads the native kernels of this process use; by default all cores that it may use.
      policy: which part runs where (`fusedllm.partition.policies`): `plain` is one fused program, and no
        confidentiality claim; `split` has everything but the products on the CPU, and no claim either; `masked` hides
        what the products see, `verify` checks them and `masked+verify` does both, for models of `w8a8`; `trusted` runs
        on the CPU alone.
      crossing: under a policy that crosses, `driven` (the default) launches each product from the host; with `callback`
        (Python's) and `ffi` (native, on the CPU) one program runs all products of a pass, and asks the host.
      mesh: split the model over devices, as in `tp=2,dp=2`: `tp` of them share the weights, and `dp` such groups answer
        side by side, each with its part of the KV cache and of the requests that run together (docs/sharding.md).
      random_weights: do not read a checkpoint; seeded random weights of the named architecture, and no tokenizer.
      seed: of the random weights.
      keep_programs: keep compiled programs on disk for the next process, in this package's cache directory, unless jax
        has been told another (`jax_compilation_cache_dir`).
      progress: show a progress bar on standard error.

    Raises:
      SourceError: the name is unknown or can't be fetched.
      CheckpointError, ConfigError, TokenizerError: what was found there can't be used.
      ShardingError: the model can't be split so, or there are not as many devices.
    """
    if keep_programs:
        use_compilation_cache()
    check_activation_bits(activation_bits)
    policies.check_mesh(policies.find(policy), mesh is not None)
    with traced_for(policies.find(policy).platform):
        compute, where = compute_dtype(dtype), platform()
        native_kernels, keeps_codes = runs_native(implementation), kept_codes(implementation)
    if threads is not None:
        set_threads(threads, native_kernels)
    as_filed = dtype == "auto" and native_kernels
    if keep_quantized is None:
        keep_quantized = policies.find(policy).integers or as_filed or (dtype == "auto" and keeps_codes)
    tokenizer: Tokenizer | None = None
    report: LoadReport | None = None
    if random_weights:
        if not isinstance(ckpt, (str, Path)):
            raise RequestError("random weights are of a named architecture, not of a table or checkpoint.")
        config = registry.architecture(ckpt)
        layout = None if mesh is None else lay_out(mesh, config)
        drawn = random_checkpoint(config, np.dtype(jnp.bfloat16 if as_filed else compute), seed)
        params, _ = load_params(drawn, layout=layout)
    else:
        checkpoint = _open(ckpt, progress)
        config = checkpoint.config
        layout = None if mesh is None else lay_out(mesh, config)
        tokenizer = None if checkpoint.tokenizer is None else Tokenizer(checkpoint.tokenizer)
        with ThreadPoolExecutor(1, thread_name_prefix="fusedllm-tokenizer") as pool:
            if tokenizer is not None:
                # Meanwhile; whoever needs it first will hear of what is wrong with it.
                pool.submit(tokenizer.prepare)
            params, report = load_params(
                checkpoint,
                dtype=None if as_filed else np.dtype(compute),
                keep_quantized=keep_quantized,
                pack=native_kernels,
                layout=layout,
                progress=progress,
            )
    if engine is None:
        limit = min(config.max_position, DEFAULT_MAX_CONTEXT) if max_context is None else max_context
        engine = EngineConfig.suited(where, max_context=limit)
    return LLM(
        config,
        params,
        tokenizer,
        engine=engine,
        dtype=compute,
        kv_dtype=cache_dtype(kv_dtype, jnp.bfloat16 if dtype == "auto" else compute),
        implementation=implementation,
        activation_bits=activation_bits,
        policy=policy,
        crossing=crossing,
        layout=layout,
        load_report=report,
    )


class LLM:
    """A loaded model with its tokenizer and engine; `load` makes one.

    Attributes:
      config: the model's shape and mathematics.
      tokenizer: `None` where the checkpoint carries none; prompts are token ids then, and texts are empty.
      load_report: how the weights came in, bytes copied included; `None` for random weights.
      activation_bits: 16 or 8, to which native products with quantized weights round activations.
      mesh: the layout over several devices, on whose mesh the parameters lie; `None` for one.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer | None = None,
        *,
        engine: EngineConfig | None = None,
        dtype: Any = jnp.float32,
        kv_dtype: Any = None,
        implementation: str | None = None,
        activation_bits: int | None = None,
        policy: str = "plain",
        crossing: str | None = None,
        layout: Layout | None = None,
        load_report: LoadReport | None = None,
    ) -> None:
        check_activation_bits(activation_bits)
        engine = engine or EngineConfig(max_context=min(config.max_position, DEFAULT_MAX_CONTEXT))
        if engine.max_context > config.max_position:
            raise RequestError(
                f"max_context of {engine.max_context} was asked for, the model allows {config.max_position} positions."
            )
        self.config = config
        self.tokenizer = tokenizer
        self.load_report = load_report
        self.mesh = layout
        self.activation_bits = activation_bits or default_activation_bits(config.hidden_size)
        kv_dtype = dtype if kv_dtype is None else kv_dtype
        if policies.find(policy).platform == "cpu":
            # The trusted side branches for nothing, and where the host drives it looks at each step.
            engine = dataclasses.replace(engine, free_steps=0)
        way = implementation if implementation in WAYS else None
        if way is not None:
            # Where there are no kernels of Pallas the best of the others do.
            implementation = None
        self._applied = policies.apply(
            policy,
            params,
            implementation=implementation,
            way=way,
            activation_bits=self.activation_bits,
            crossing=crossing,
            sharded=layout is not None,
        )
        sizes, placed = engine, self._applied.params

        def engine_of(group: Layout | None) -> Engine:
            runner = Runner(
                config,
                placed if layout is None or group is None else layout.of_replica(placed, group),
                sizes if layout is None else share_of(sizes, layout.dp),
                self._applied.placement,
                dtype=dtype,
                cache_dtype=kv_dtype,
                implementation=implementation,
                layout=group,
            )
            return Engine(runner)

        engines = [engine_of(group) for group in ((None,) if layout is None else layout.replicas())]
        self._engine: Engine | Replicas = engines[0] if len(engines) == 1 else Replicas(engines)
        self._template: ChatTemplate | None = None

    @property
    def engine(self) -> Engine | Replicas:
        """The engine underneath, for counters and for callers that schedule themselves."""
        return self._engine

    @property
    def policy(self) -> policies.Policy:
        """Which part runs where, and what that claims."""
        return self._applied.policy

    @property
    def boundary(self) -> Ledger:
        """What has crossed the boundary so far."""
        return self._applied.ledger

    @property
    def pads(self) -> Mapping[Hashable, PadReport]:
        """What was computed beforehand so that products can be hidden, by site; empty under most policies."""
        return {} if self._applied.boundary is None else self._applied.boundary.pads()

    def policy_words(self) -> str:
        """What the policy lets the accelerator see, and what it claims."""
        return self._applied.words()

    def boundary_report(self) -> str:
        """What has crossed the boundary so far, by site, under the policy's own words."""
        crossing = f"crossing: {self._applied.crossing}\n" if self._applied.crossing else ""
        return f"{self.policy_words()}\n{crossing}{self._applied.report()}"

    def close(self) -> None:
        """Ends the policy's session: pads that wait are overwritten, and nothing can cross any more."""
        self._applied.close()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | None = None, **keywords: Any
    ) -> list[Completion]:
        """Answers one prompt or several, in their order; a list of integers is one prompt of token ids.

        `keywords` are fields of `SamplingParams` and override those of `sampling`.

        Raises:
          RequestError: an empty prompt, or a parameter out of range.
          ContextLengthError: a prompt that does not fit.
        """
        parameters = sampling_from_keywords(sampling, keywords)
        streams = [self._stream(self.encode(prompt), parameters) for prompt in as_prompts(prompts)]
        for index, chunk in self._engine.run([stream.sequence for stream in streams]):
            streams[index].push(chunk)
        return [stream.result for stream in streams]

    def chat(self, messages: Sequence[Message], sampling: SamplingParams | None = None, **keywords: Any) -> Completion:
        """Answers a conversation: mappings with `role` and `content`, rendered by the model's own chat template.

        Raises:
          TokenizerError: the checkpoint has no tokenizer or no chat template.
          RequestError, ContextLengthError: as `generate`.
        """
        return self.generate([self.render(messages)], sampling, **keywords)[0]

    def stream(
        self, prompt: Prompt | Sequence[Message], sampling: SamplingParams | None = None, **keywords: Any
    ) -> Stream:
        """Iterates over pieces of the answer's text as they are made; `.result` has the whole once it has ended.

        `prompt` is a text, token ids, or a conversation as for `chat`. Raises as `generate` and `chat`, at once.
        """
        parameters = sampling_from_keywords(sampling, keywords)
        conversation = isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        ids = self.render(cast("Sequence[Message]", prompt)) if conversation else self.encode(cast("Prompt", prompt))
        return self._stream(ids, parameters)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; ids pass through.

        Raises:
          TokenizerError: a text, where the checkpoint has no tokenizer.
        """
        if not isinstance(prompt, str):
            return as_ids(prompt)
        return self._need_tokenizer().encode(prompt)

    def render(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Raises:
          TokenizerError: no tokenizer, no chat template, or a template that refuses the messages.
        """
        tokenizer = self._need_tokenizer()
        if self._template is None:
            self._template = tokenizer.chat_template()
        return tokenizer.encode(self._template.render(messages, **variables), add_special=False)

    def logits(self, token_ids: Sequence[int], chunk: int | None = None) -> np.ndarray:
        """Logits after each token, float32 `[seq, vocab]`. `chunk` sets how many tokens a launch takes.

        Raises:
          RequestError, ContextLengthError: as `generate`.
        """
        return self._engine.logits(as_ids(token_ids), chunk)

    def perplexity(self, token_ids: Sequence[int], window: int = 512) -> float:
        """`exp` of the mean negative log-likelihood over windows that do not overlap.

        Each window is scored on its own, its first token unscored; a last window of one token is left out.

        Raises:
          RequestError: fewer than two tokens, or a window below two.
          ContextLengthError: a window that does not fit the context.
        """
        token_ids = as_ids(token_ids)
        if window < 2 or len(token_ids) < 2:
            raise RequestError(
                f"a perplexity needs at least two tokens and a window of two, got {len(token_ids)} and {window}."
            )
        if window > self._engine.config.max_context:
            raise ContextLengthError(
                f"a window of {window} does not fit the context of {self._engine.config.max_context}."
            )
        parts = [token_ids[at : at + window] for at in range(0, len(token_ids), window)]
        scores = [self._engine.score(part) for part in parts if len(part) > 1]
        return math.exp(-float(np.concatenate(scores).astype(np.float64).mean()))

    def warm_up(self, **keywords: Any) -> None:
        """Compiles every program that answering needs, so that none compiles later. See `Engine.warm_up`."""
        self._engine.warm_up(**keywords)

    def prepare(self, prompt: Prompt, sampling: SamplingParams, **options: Any) -> Stream:
        """A request that nobody runs yet: for `Engine.submit`, with `Stream.push` for what it delivers.

        `options` are those of `Engine.prepare`; raises as `generate`.
        """
        return self._stream(self.encode(prompt), sampling, **options)

    def _stream(self, ids: list[int], parameters: SamplingParams, **options: Any) -> Stream:
        return Stream(self._engine, self._engine.prepare(ids, parameters, **options), self.tokenizer)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError("this checkpoint has no tokenizer, so a prompt must be a list of token ids.")
        return self.tokenizer


def _open(ckpt: str | Path | pa.Table | Checkpoint, progress: bool) -> Checkpoint:
    if isinstance(ckpt, Checkpoint):
        return ckpt
    if isinstance(ckpt, pa.Table):
        return quantized.of_table(ckpt)
    return open_checkpoint(registry.resolve(ckpt, progress=progress))
