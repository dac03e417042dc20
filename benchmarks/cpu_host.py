"""What the host adds between decode launches: the engine beside the same program launched without it.

    python benchmarks/cpu_host.py
    python benchmarks/cpu_host.py --model 1b-q4 --repetitions 9

The engine launches the next steps before it reads the last ones' tokens. Here its time per token stands beside that of
launches in a row that nobody reads, on the same request, in turns; what it takes longer is the host's part of a step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import cpu_models
import cpu_peers
import jax
import numpy as np
from common import warn_if_busy

from fusedllm.engine.runner import orders

MOST_STEPS = 16  # Of one launch; the engine makes them as long as a stream bears.
LAUNCHES = 4  # Of each side in a turn.


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(cpu_models.MODELS), default="smollm2")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    warn_if_busy()
    import fusedllm

    repetitions = arguments.repetitions
    # Each turn makes them twice with the engine and once without, and some that aren't measured.
    budget = (4 * LAUNCHES * (repetitions + 1) + 16) * MOST_STEPS
    llm = fusedllm.load(str(cpu_models.path_of(arguments.model)), max_context=budget + 64, threads=arguments.threads)
    (ids,) = cpu_peers.prompts(llm.config.vocab_size, 1, 16)
    sampling = fusedllm.SamplingParams(temperature=0, max_tokens=budget, ignore_eos=True)
    engine, runner = llm.engine, llm.engine.runner
    chunks = engine.run([engine.prepare(ids, sampling)])

    steps = [len(next(chunks)[1].tokens) for _ in range(8)][-1]  # The length of launches follows the speed.

    # Where the request's pages end, what is written goes to the null page: the same work.
    (seat,) = (job.seat for job in engine._scheduler._running)
    order = orders(runner.engine, [(seat, 0, ())])

    def with_engine() -> float:
        return _seconds_per_token(lambda: sum(len(next(chunks)[1].tokens) for _ in range(LAUNCHES)))

    def without() -> float:
        # Those that the engine has launched ahead end before this one does.
        jax.block_until_ready(runner.decode(order, steps).tokens)

        def launch() -> int:
            outputs: Any = None
            for _ in range(LAUNCHES):
                outputs = runner.decode(order, steps)
            jax.block_until_ready(outputs.tokens)
            return LAUNCHES * steps

        return _seconds_per_token(launch)

    pairs = []
    for _ in range(repetitions + 1):
        with_engine()  # After a pause its first launch was not ahead.
        pairs.append((with_engine(), without()))
    chunks.close()
    whole, bare = np.asarray(pairs[1:]).T
    low, middle, high = 100 * np.quantile(whole / bare - 1, (0.25, 0.5, 0.75))
    both = f"{1e3 * np.median(whole):.3f} ms a token, {1e3 * np.median(bare):.3f} without the host"
    print(f"{arguments.model}, {steps} steps a launch: {both}")
    print(f"the host: {middle:+.1f} % of a step, quartiles {low:+.1f} % and {high:+.1f} %")


def _seconds_per_token(run: Callable[[], int]) -> float:
    begin = time.perf_counter()
    tokens = run()
    return (time.perf_counter() - begin) / tokens


if __name__ == "__main__":
    main()
