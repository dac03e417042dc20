"""From a request's body to streams that the engine can run: limits, tokens, grammars, seeds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from fusedllm.errors import ContextLengthError
from fusedllm.serve.errors import bad_request
from fusedllm.serve.schemas_common import Generation, GrammarKind
from fusedllm.serve.state import ServerState
from fusedllm.stream import Stream

if TYPE_CHECKING:
    from fusedllm.text.constraint import Constraint

# Encoding so many characters takes about a millisecond, for which the other clients may wait.
INLINE_CHARACTERS = 8_192

# Those who wait until a stranger's grammar has been tried out, one after the other, seconds each, take no thread from
# those who wait for an encoded prompt.
_GRAMMARS = ThreadPoolExecutor(8, "fusedllm-grammar")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the two endpoints say differently.

    Attributes:
      encode: makes the token ids of every prompt; may take its time.
      characters: how long the prompts are, or how many ids they have.
      prompts: how many there are.
      max_tokens: as asked for; `None` is whatever the context leaves.
      logprobs: as in `SamplingParams`.
      prompt_logprobs: the same, for the prompt.
    """

    encode: Callable[[], list[list[int]]]
    characters: int
    prompts: int
    max_tokens: int | None
    logprobs: int | None
    prompt_logprobs: int | None = None


async def prepare(server: ServerState, key: str, body: Generation, wanted: Wanted) -> list[Stream]:
    """`n` streams for each prompt, those of one prompt side by side.

    Raises:
      APIError, RequestError, ContextLengthError, TokenizerError: the request is over a limit, or can't be answered.
      EngineStoppedError: nobody is admitted.
    """
    settings, n = server.settings, body.n or 1
    server.check_model(body.model)
    server.check_admission()
    if n > settings.max_n:
        raise bad_request(f"n is {n}, this server makes at most {settings.max_n} answers.", "n")
    if (body.priority or 0) < settings.min_priority:
        raise bad_request(
            f"priority is {body.priority}, this server lets requests ask for {settings.min_priority} or more.",
            "priority",
        )
    if wanted.prompts * n > settings.max_queue:
        raise bad_request(
            f"{wanted.prompts} prompts with n={n} are {wanted.prompts * n} answers, this server's queue has "
            f"{settings.max_queue} places; send fewer at once.",
            "prompt",
        )
    if settings.max_tokens is not None and (wanted.max_tokens or 0) > settings.max_tokens:
        raise bad_request(
            f"max_tokens is {wanted.max_tokens}, this server makes at most {settings.max_tokens}.", "max_tokens"
        )
    deadline = time.perf_counter() + settings.request_seconds

    def work() -> list[Stream]:
        return _prepare(server, key, body, wanted, deadline)

    if body.grammar() is not None:
        return await asyncio.get_running_loop().run_in_executor(_GRAMMARS, work)
    return await in_thread(work, wanted.characters <= INLINE_CHARACTERS)


async def in_thread(work: Callable[[], T], quick: bool) -> T:
    """`work()`, in a thread unless it is quick: while it runs, other clients are served."""
    return work() if quick else await asyncio.to_thread(work)


def check_prompt(server: ServerState, ids: Sequence[int]) -> None:
    """Raises `ContextLengthError` for a prompt over the server's limit; the engine knows the context's."""
    limit = server.settings.max_prompt_tokens
    if limit is not None and len(ids) > limit:
        raise ContextLengthError(f"the prompt has {len(ids)} tokens, this server takes at most {limit}.")


def _prepare(server: ServerState, key: str, body: Generation, wanted: Wanted, deadline: float) -> list[Stream]:
    llm, settings = server.llm, server.settings
    salt = body.cache_salt or ""
    if settings.prefix_cache_per_key:
        # A key's id and a salt, so put together that no other pair makes the same text.
        salt = f"{len(key)}:{key}{salt}"
    prompts = wanted.encode()
    for ids in prompts:
        check_prompt(server, ids)
    max_tokens = wanted.max_tokens or settings.max_tokens or llm.engine.config.max_context
    samples = [body.sampling(sample, max_tokens, wanted.logprobs) for sample in range(body.n or 1)]
    source = body.grammar()
    grammar = None if source is None else _compile(server, *source)
    return [
        llm.prepare(
            ids,
            sampling,
            priority=body.priority or 0,
            deadline=deadline,
            cache_salt=salt,
            constraint=None if grammar is None else grammar.fresh(),
            prompt_logprobs=wanted.prompt_logprobs,
        )
        for ids in prompts
        for sampling in samples
    ]


def _compile(server: ServerState, kind: GrammarKind, source: str | list[str]) -> Constraint:
    # Most servers never see a grammar, and its library is large.
    from fusedllm.text.constraint import Constraint

    llm = server.llm
    if llm.tokenizer is None:
        raise bad_request("a grammar needs a tokenizer, and this checkpoint has none.")
    return Constraint.compile(kind, source, llm.tokenizer, llm.config.eos_token_ids, vocab_size=llm.config.vocab_size)
