"""What one crossing of the trust boundary costs in each of its forms, beside what it costs to copy its bytes.

    python benchmarks/boundary.py
    python benchmarks/boundary.py --json benchmarks/results/boundary.json

A crossing sends int32 to a device and takes a product back, as the masked policies do. Here the product is of one
number in each cache line with a single row of weights, so that it is the crossing that is timed: all that was sent is
read, and next to nothing is computed. Of the forms of `fusedllm.load(..., crossing=)`, `driven` launches a program each
time; `ffi` and `callback` hand the numbers to a program that waits for them, in passes as long as those of LLaMA-1B. A
figure is the mean over the crossings of a pass, each of them the median over all passes: the launches of a pass are
shared among its crossings. Without an accelerator a second
device of this CPU is crossed to.

The limit is a copy of what is sent from one part of memory to another, by one thread and in the same run; `ffi` copies
with all threads, and `driven` copies nothing where the device is a part of this CPU. A large crossing is also made with
fresh memory each time, which is what the memory that links give away saves.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Spread, environment, significant, table, warn_if_busy, write_json

# As LLaMA-1B: 2,048 wide. One row is 8 KB, and 1,024 are 8 MB.
WIDTH = 2048
LAYERS = 16
# int32 numbers in a cache line of 64 bytes.
LINE = 16
SITES = ("qkv", "o", "gate_up", "down")
SIZES = {"8 KB": 1, "8 MB": 1024}

SMALL_GOAL_SECONDS = 20e-6
LARGE_GOAL_OF_COPY = 0.5

COPY, FRESH = "copy", "driven, fresh memory"


class Form:
    """A link of one form with the sites of a model; a pass is an exchange at each."""

    def __init__(self, form: str) -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np

        from fusedllm.model.placement import Site
        from fusedllm.partition.in_program import InProgram
        from fusedllm.partition.link import Driven
        from fusedllm.partition.policies import devices

        def product(x: Any, weight: Any) -> tuple[Any, ...]:
            return (jnp.sum(x[:, ::LINE] * weight[:, ::LINE], axis=1, keepdims=True),)

        _, device = devices("split")
        self.link: Any = Driven(device, product) if form == "driven" else InProgram(device, product, via=form)
        weight = np.ones((1, WIDTH), np.int32)
        self._placed = [
            self.link.place(Site(name, layer), (jax.device_put(weight, device),))
            for layer in range(LAYERS)
            for name in SITES
        ]
        self._placed.append(self.link.place(Site("head"), (jax.device_put(weight, device),)))

    def run(self, values: Any, fresh: bool) -> list[float]:
        """Seconds of each crossing of a pass. What is sent is written before, outside of them."""
        import numpy as np

        samples = []
        for placed in self._placed:
            sent = np.empty(values.shape, values.dtype) if fresh else self.link.outgoing(values.shape, values.dtype)
            sent[:] = values
            began = time.perf_counter()
            (product,) = self.link.exchange(placed, sent)
            samples.append(time.perf_counter() - began)
            if product[0, 0] != WIDTH // LINE or product[-1, 0] != WIDTH // LINE:
                raise SystemExit("a crossing brought back another product than the one that was asked for.")
        return samples


def copies(values: Any) -> Callable[[], list[float]]:
    """A pass of nothing but copies, into memory that is there."""
    import numpy as np

    into = np.zeros_like(values)

    def run() -> list[float]:
        samples = []
        for _ in range(LAYERS * len(SITES) + 1):
            began = time.perf_counter()
            np.copyto(into, values)
            samples.append(time.perf_counter() - began)
        return samples

    return run


def of_passes(passes: list[list[float]]) -> Spread:
    """A crossing of a pass: the median over all passes of each of its crossings, and the mean of these.

    So what the machine does to one crossing now and then is left out, and the launches that a pass needs are not.
    """
    import numpy as np

    whole = [float(np.median(one)) for one in passes]
    return Spread(float(np.median(passes, axis=0).mean()), Spread.of(whole).iqr, len(passes))


def measure(forms: list[str], rows: int, repetitions: int) -> dict[str, Any]:
    """Every form once per repetition, in turns at being first: the medians of their passes."""
    import numpy as np

    values = np.ones((rows, WIDTH), np.int32)
    links = {form: Form(form) for form in forms}
    runs: dict[str, Callable[[], list[float]]] = {COPY: copies(values)}
    for form, made in links.items():
        runs[form] = functools.partial(made.run, values, False)
    runs[FRESH] = lambda: links["driven"].run(values, True)
    names = list(runs)
    samples: dict[str, list[list[float]]] = {name: [] for name in names}
    for repetition in range(-1, repetitions):  # The first compiles, and is dropped.
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            found = runs[name]()
            if repetition >= 0:
                samples[name].append(found)
    for made in links.values():
        made.link.close()
    spreads = {name: of_passes(found) for name, found in samples.items()}
    shares = {name: spreads[COPY].median / found.median for name, found in spreads.items()}
    return {"bytes": values.nbytes, "seconds": spreads, "of_copy": shares}


def verdict(size: str, name: str, seconds: Spread, of_copy: float) -> str:
    """Whether the goal is met, where there is one: of Python's callback it is only told."""
    if name == COPY:
        return "the limit"
    if size == "8 KB":
        if name == FRESH:
            return "-"
        if name == "callback":
            return "reported"
        return "met" if seconds.median <= SMALL_GOAL_SECONDS else "missed"
    if name in (FRESH, "callback"):
        return "reported"
    return "met" if of_copy >= LARGE_GOAL_OF_COPY else "missed"


def report(result: dict[str, Any]) -> str:
    """A table of both sizes, and the goals."""
    rows = []
    for size, found in result["sizes"].items():
        for name, seconds in found["seconds"].items():
            of_copy = found["of_copy"][name]
            share = f"{100 * of_copy:.0f} %"
            rows.append(
                [
                    f"{size}, {name}",
                    f"{significant(1e6 * seconds.median)} ± {significant(1e6 * seconds.iqr / 2)}",
                    significant(found["bytes"] / seconds.median / 1e9),
                    share,
                    verdict(size, name, seconds, of_copy),
                ]
            )
    goals = (
        f"Goals: a small crossing takes {1e6 * SMALL_GOAL_SECONDS:.0f} µs at most, a large one runs at "
        f"{100 * LARGE_GOAL_OF_COPY:.0f} % of a copy's speed at least, by `driven` or `ffi`."
    )
    passes = f"{result['repetitions']} passes of {LAYERS * len(SITES) + 1}"
    head = f"## One crossing to {result['device']}, median of {passes}"
    return "\n\n".join([head, table(["crossing", "µs", "GB/s", "of a copy", "goal"], rows), goals])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    warn_if_busy()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=2 {os.environ.get('XLA_FLAGS', '')}"
    from fusedllm.kernels import native
    from fusedllm.partition.policies import CROSSINGS, devices

    _, device = devices("split")
    usable = device.platform == "cpu" and native.why_unavailable() is None
    forms = [form for form in CROSSINGS if form != "ffi" or usable]
    sizes = {size: measure(forms, rows, arguments.repetitions) for size, rows in SIZES.items()}
    result = {"device": str(device), "repetitions": arguments.repetitions, "sizes": sizes}
    print(report(result))
    if arguments.json:
        write_json(arguments.json, {**environment("fusedllm", "jax", "jaxlib", "numpy"), **result})


if __name__ == "__main__":
    main()
