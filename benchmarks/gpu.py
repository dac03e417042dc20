"""Everything that is asked of a GPU, in one command of at most eight minutes: ceilings, the 1B shape, kernels, peers.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --only ceilings decode prefill --budget 300 --out results

Random weights and no downloads; nothing needs to be installed but jax and what a model is loaded with. Each part runs
in a process of its own and for so long only; time that a part leaves goes to those after it. What a part found is on
disk after each of its rows, the whole in `gpu-DEVICE.json` after each part, and the parts' own words in `NAME.log`. A
part that fails, or lacks a package, is told by name, and the rest goes on. Goals of the project are printed last: what
was asked for, what was hoped for, what was measured. `--tiny` runs small shapes, to see that the programs work: on a
CPU that is all that this can do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import write_json
from gpu_parts import PARTS, Each
from gpu_report import pictures, report

HERE = Path(__file__).parent
BUDGET = 480.0
# For a part to end by itself, beyond its time.
GRACE = 10.0
# Of a part's log, where it failed.
LAST_LINES = 12


def allowance(each: Each, others: Sequence[Each], left: float) -> float:
    """Seconds for a part of `left`: its own, and what it and `others` after it were not going to use.

    Where there is less than all of them would use, each gives as much of its own.
    """
    wanted = sum(other.seconds for other in others)
    if left >= each.seconds + wanted:
        return left - wanted
    return each.seconds * left / (each.seconds + wanted)


def run_part(each: Each, directory: Path, seconds: float, tiny: bool, programs: Path) -> dict[str, Any]:
    """What the part found; killed when its time and some more is over."""
    path, log = directory / f"{each.name}.json", directory / f"{each.name}.log"
    path.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "gpu_part.py"), each.name, "--out", str(path), "--seconds", f"{seconds:.0f}"]
    command += ["--tiny"] * tiny
    paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    where = {"JAX_COMPILATION_CACHE_DIR": str(programs), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    # jax and torch take memory as they need it: a part may have processes of its own on the same GPU.
    if each.module in ("gpu_policies", "gpu_peers"):
        where["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    where = {**os.environ, **where, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    if each.name == "compile":
        where.pop("JAX_COMPILATION_CACHE_DIR")
    began, killed = time.monotonic(), False
    with log.open("w", encoding="utf-8") as lines:
        # A group of its own, so that its own processes are ended with it.
        process = subprocess.Popen(command, stdout=lines, stderr=subprocess.STDOUT, env=where, start_new_session=True)
        try:
            process.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            killed = True
        finally:
            _end(process)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found["wall_seconds"] = round(time.monotonic() - began, 1)
    if killed:
        found["failed"] = f"it was not done after {seconds:.0f} s; what is here was found before"
    elif process.returncode and "failed" not in found:
        found["failed"] = f"its process ended with {process.returncode}; the end of {log.name} says more"
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a part and the processes that it started, whose group is its own."""
    import signal

    if process.poll() is None or hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError, AttributeError):
            process.kill()
    process.wait()


def line_of(each: Each, found: dict[str, Any]) -> str:
    """How the part went, in a line."""
    rows, skipped = len(found.get("rows", [])), len(found.get("skipped", {}))
    parts = [f"{found['wall_seconds']:6.1f} s", each.name]
    parts += [f"{rows} rows"] * bool(rows) + [f"{skipped} not measured"] * bool(skipped)
    parts += [f"FAILED: {found['failed']}"] if "failed" in found else []
    return ", ".join(parts)


def name_of(result: dict[str, Any]) -> str:
    """Of the files: the device's."""
    kind = result["parts"].get("environment", {}).get("device", {}).get("kind", "unknown")
    return "gpu-" + "-".join(str(kind).lower().split())


def measure(parts: Sequence[Each], directory: Path, budget: float, tiny: bool, programs: Path) -> dict[str, Any]:
    """All of `parts`, in their order; written after each."""
    directory.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + budget
    result: dict[str, Any] = {"tiny": tiny, "budget": budget, "parts": {}}
    for at, each in enumerate(parts):
        left = deadline - time.monotonic()
        if left < 1:
            result["parts"][each.name] = {"wall_seconds": 0.0, "failed": "no time was left for it"}
            print(line_of(each, result["parts"][each.name]), flush=True)
            continue
        found = run_part(each, directory, allowance(each, parts[at + 1 :], left), tiny, programs)
        result["parts"][each.name] = found
        print(line_of(each, found), flush=True)
        if "failed" in found:
            lines = (directory / f"{each.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(f"          {line[:200]}" for line in lines[-LAST_LINES:]), flush=True)
        write_json(directory / f"{name_of(result)}.json", result, quiet=True)
    return result


def main() -> None:
    """The command."""
    names = [each.name for each in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help="these parts (--list names them)")
    parser.add_argument("--list", action="store_true", help="the parts, and nothing else")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/gpu")
    parser.add_argument("--programs", type=Path, metavar="DIR", default=HERE / "results" / "programs",
                        help="compiled programs, kept for the next run (default: %(default)s)")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="small shapes: whether it works, not how fast")
    arguments = parser.parse_args()
    if arguments.list:
        for each in PARTS:
            print(f"{each.name:12} {each.seconds:4.0f} s  {each.title}")
        return
    directory = arguments.out or HERE / "results" / "gpu"
    parts = [each for each in PARTS if not arguments.only or each.name in arguments.only]
    result = measure(parts, directory, arguments.budget, arguments.tiny, arguments.programs)
    # Words before pictures, and none of them can take the figures with them: those are on the disk.
    print("\n" + report(result))
    (directory / f"{name_of(result)}.md").write_text(report(result) + "\n", encoding="utf-8")
    try:
        pictures(directory / name_of(result), result)
    except Exception as error:
        print(f"no pictures: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
