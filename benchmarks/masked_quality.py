"""What masked products cost in quality: perplexity of eight-bit weights and activations, turned and not.

    python benchmarks/masked_quality.py --json benchmarks/results/masked_quality.json
    python benchmarks/masked_quality.py --windows 2

The model is SmolLM2-135M; a line rotates the residual stream or does not (`fusedllm convert --rotate`), and then
quantizes to `w8a8`, or to `w8a8-turned`, which turns the inputs of o and down as the model runs. Perplexity and the KL
divergence from the float32 model are of eight windows of 512 tokens of English text. Codes are the nearest, or by GPTQ
on other text. The last line is what the policy `masked` itself answers; on the first window it has the bits of
`verify`, and this program ends where it has not.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, table, warn_if_busy, write_json
from judge import Judge

import fusedllm
from fusedllm.calibrate.rotate import rotate
from fusedllm.calibrate.text import calibration_tokens
from fusedllm.weights.checkpoint import Checkpoint
from fusedllm.weights.convert import convert
from fusedllm.weights.open import open_checkpoint
from fusedllm.weights.registry import resolve

MODEL = "smollm2-135m"
SEED = 0
# Windows of 512 tokens that activations are measured on, which are none of those that are judged.
CALIBRATION_WINDOWS = 16
# The goal: no more perplexity than this above float32's.
GOAL = 0.01
CONTEXT = 1024


@dataclass(frozen=True)
class Line:
    """A row of the table: the rotated checkpoint or not, in `scheme` with `rules`, by `method`, under `policy`."""

    name: str
    rotated: bool
    scheme: str
    rules: tuple[tuple[str, str], ...] = ()
    method: str = "rtn"
    policy: str = "plain"


LINES = (
    Line("w8a8", False, "w8a8"),
    Line("inputs of o and down turned", False, "w8a8-turned"),
    Line("residual stream rotated", True, "w8a8"),
    Line("rotated, input of o turned", True, "w8a8", ((r"o_proj\.weight$", "w8a8-h"),)),
    Line("rotated, input of down turned", True, "w8a8", ((r"down_proj\.weight$", "w8a8-h"),)),
    Line("rotated, inputs of o and down turned", True, "w8a8-turned"),
    Line("residual stream rotated, gptq", True, "w8a8", method="gptq"),
    Line("rotated, inputs of o and down turned, gptq", True, "w8a8-turned", method="gptq"),
    Line("the same, answered under `masked`", True, "w8a8-turned", method="gptq", policy="masked"),
)


class Bench:
    """Both checkpoints, and the last table that was made of one of them."""

    def __init__(self, source: Checkpoint, rotated: Checkpoint, judge: Judge) -> None:
        self._checkpoints = {False: source, True: rotated}
        self._judge = judge
        self._made: tuple[Any, Any] = (None, None)

    def run(self, line: Line) -> dict[str, Any]:
        """Quantizes, answers and judges.

        Raises:
          SystemExit: the answer under `masked` has not the bits of `verify`.
        """
        started = time.perf_counter()
        made = self._quantized(dataclasses.replace(line, name="", policy=""))
        llm = fusedllm.load(made, max_context=CONTEXT, policy=line.policy)
        result: dict[str, Any] = self._judge.judge(llm.logits)
        if line.policy != "plain":
            verified = fusedllm.load(made, max_context=CONTEXT, policy="verify")
            window = self._judge.windows[0]
            if not np.array_equal(llm.logits(window), verified.logits(window)):
                raise SystemExit(f"the answer under {line.policy} differs from that under verify on the first window.")
            result["equal_bits_to_verify"] = True
            verified.close()
        llm.close()
        return result | {"seconds": time.perf_counter() - started}

    def _quantized(self, how: Line) -> Any:
        if self._made[0] != how:
            checkpoint = self._checkpoints[how.rotated]
            calibration = None
            if how.method != "rtn":
                calibration = calibration_tokens(None, checkpoint.tokenizer, windows=CALIBRATION_WINDOWS)
            table = fusedllm.quantize(
                checkpoint,
                how.scheme,
                method=how.method,
                rules=dict(how.rules),
                calibration=calibration,
                streaming=False,
            )
            self._made = (how, table)
        return self._made[1]


def report(lines: dict[str, dict[str, Any]]) -> str:
    """The table, with the goal in it."""
    exact = lines["float32"]["perplexity"]
    rows = []
    for name, line in lines.items():
        more = line["perplexity"] / exact - 1
        reached = "-" if name == "float32" else "yes" if more <= GOAL else "no"
        rows.append(
            [name, f"{line['perplexity']:.3f}", f"{100 * more:+.2f} %", f"{line['kl_divergence']:.5f}", reached]
        )
    text = table(["", "perplexity", "to float32", "mean KL", f"within {100 * GOAL:.0f} %"], rows)
    masked = [name for name, line in lines.items() if line.get("equal_bits_to_verify")]
    equal = "\nThe answer under `masked` has the bits of `verify` on the first window." if masked else ""
    return f"{text}\n\nKL(float32 || the line) in nats.{equal}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens (default and most: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    warn_if_busy()
    # A second device of the CPU, which plays the accelerator.
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=2 {os.environ.get('XLA_FLAGS', '')}"
    lines: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="fusedllm-masked-") as directory:
        source = open_checkpoint(resolve(MODEL, progress=True))
        turned = convert(rotate(source, SEED), Path(directory) / "rotated.arrow", progress=True)
        judge = Judge(source, options.windows, Path(directory), max_context=CONTEXT)
        bench = Bench(source, open_checkpoint(turned), judge)
        lines["float32"] = judge.reference()
        for line in LINES:
            lines[line.name] = bench.run(line)
            print(f"{line.name}: {lines[line.name]}", file=sys.stderr, flush=True)
            gc.collect()
    print(report(lines))
    if options.json:
        where = environment("fusedllm", "jax", "jaxlib", "numpy")
        about = {"model": MODEL, "windows": options.windows, "seed": SEED, "goal": GOAL}
        write_json(options.json, {**where, **about, "lines": lines})


if __name__ == "__main__":
    main()
