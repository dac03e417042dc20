"""`fusedllm generate`: one prompt, its answer streamed to standard output, a summary line on standard error."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from fusedllm.cli.options import add_model_arguments, load_model
from fusedllm.config import SamplingParams
from fusedllm.errors import RequestError

if TYPE_CHECKING:
    from fusedllm.llm import LLM
    from fusedllm.stream import Stream

NAME = "generate"
HELP = "answer a prompt"
DEFAULT_PROMPT = "What is the capital of France?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    defaults = SamplingParams()
    parser.add_argument(
        "--prompt", default=DEFAULT_PROMPT, help=f"the prompt, or - to read standard input (default: {DEFAULT_PROMPT})"
    )
    parser.add_argument("--system", help="a system message in front of the prompt")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    add_model_arguments(parser)
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=defaults.max_tokens)
    group.add_argument("--temperature", type=float, default=defaults.temperature, help="0 is greedy (default)")
    group.add_argument("--top-k", type=int, default=defaults.top_k, help="0 keeps all (default)")
    group.add_argument("--top-p", type=float, default=defaults.top_p)
    group.add_argument("--min-p", type=float, default=defaults.min_p)
    group.add_argument("--repetition-penalty", type=float, default=defaults.repetition_penalty)
    group.add_argument("--presence-penalty", type=float, default=defaults.presence_penalty)
    group.add_argument("--frequency-penalty", type=float, default=defaults.frequency_penalty)
    group.add_argument("--seed", type=int, help="same seed, same text")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    parser.add_argument("--stats", action="store_true", help="print what was loaded and what crossed to the host")


def run(options: argparse.Namespace) -> None:
    """Streams the answer."""
    sampling = SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        seed=options.seed,
        max_tokens=options.max_tokens,
        stop=tuple(options.stop),
        ignore_eos=options.ignore_eos,
    )
    prompt = _prompt(options.prompt)
    llm = load_model(options)
    if options.policy != "plain":
        print(llm.policy_words(), file=sys.stderr)
    stream = _start(llm, prompt, sampling, options)
    try:
        _show(llm, stream)
    finally:
        stream.close()
        print(flush=True)
        if stream.token_ids:
            print(summary(stream), file=sys.stderr)
    if options.stats:
        print(statistics(llm), file=sys.stderr)
    llm.close()


def _prompt(option: str) -> str:
    try:
        prompt = sys.stdin.buffer.read().decode() if option == "-" else option
        prompt.encode()
    except UnicodeError:
        raise RequestError("the prompt is not UTF-8 text; convert it first.") from None
    if not prompt:
        raise RequestError("the prompt is empty; give some text with --prompt or on standard input.")
    return prompt


def _start(llm: LLM, prompt: str, sampling: SamplingParams, options: argparse.Namespace) -> Stream:
    templated = llm.tokenizer is not None and llm.tokenizer.data.chat_template is not None and not options.raw
    if options.system and not templated:
        raise RequestError("--system needs a chat template: the model has none, or --raw passes it over.")
    if llm.tokenizer is None:
        print("No tokenizer: the prompt's bytes are the token ids, and ids are printed.", file=sys.stderr)
        return llm.stream([byte % llm.config.vocab_size for byte in prompt.encode()], sampling)
    if not templated:
        return llm.stream(prompt, sampling)
    system = [{"role": "system", "content": options.system}] if options.system else []
    return llm.stream([*system, {"role": "user", "content": prompt}], sampling)


def _show(llm: LLM, stream: Stream) -> None:
    shown = 0
    for piece in stream:
        if llm.tokenizer is None:
            piece = "".join(f"{token} " for token in stream.token_ids[shown:])
            shown = len(stream.token_ids)
        print(piece, end="", flush=True)


def summary(stream: Stream) -> str:
    """One line: tokens in and out, their rates, and the time to the first of them."""
    result = stream.result
    timings = result.timings
    parts = [f"{result.usage.prompt_tokens} prompt tokens"]
    if not timings.compile_seconds:
        # What a program costs once, before its first launch, is not the speed of a prefill.
        parts.append(f"prefill {result.usage.prompt_tokens / timings.prefill_seconds:.1f} tokens/s")
    parts.append(f"{result.usage.completion_tokens} tokens")
    if timings.decode_seconds > 0:
        parts.append(f"decode {(result.usage.completion_tokens - 1) / timings.decode_seconds:.1f} tokens/s")
    if timings.compile_seconds > 0:
        parts.append(f"programs {timings.compile_seconds:.2f} s")
    parts += [f"first token {timings.first_token_seconds:.2f} s", f"finish: {result.finish_reason}"]
    return " · ".join(parts)


def statistics(llm: LLM) -> str:
    """What was loaded, how large the cache is, and what crossed between host and device."""
    runner = llm.engine.runner
    traffic = runner.traffic
    # One answer is one group's, the first's.
    where = "" if llm.mesh is None else f", on each {llm.mesh.tp} of {llm.mesh.tp * llm.mesh.dp} devices"
    lines = [
        llm.boundary_report(),
        f"KV cache {runner.cache_bytes / 1e6:.1f} MB for {runner.engine.cache_tokens} positions{where}",
        f"{traffic.launches} launches, {traffic.bytes_to_device} bytes to the device, "
        f"{traffic.bytes_to_host} to the host: {traffic.bytes_to_host / max(traffic.tokens, 1):.1f} bytes a token",
    ]
    if llm.load_report is not None:
        lines.insert(0, str(llm.load_report))
    return "\n".join(lines)
