"""The trust boundary beside a GPU: one crossing, a prompt under each policy, and the ladder. Parts of `gpu.py`.

What is measured is `boundary.py`'s, `rpc_policies.py`'s and `rpc_ladder.py`'s; here is only how much of it, and that
what can't run is said by name.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Spread, Worker
from gpu_part import ROOT, Part, config_of

# What a goal is about goes first.
POLICIES = ("plain", "masked", "split", "verify", "masked+verify")
REPETITIONS = 3
# Of the ladder: the predecessor's two, the best that its way can be, and the engine.
RUNGS = ("a", "b", "d", "e", "plain")
# They are measured on one layer and scaled: in Python's lists a prompt takes minutes.
SCALED = ("a", "b")
TOKENS = 1024
CROSSING_PASSES = 9
NEEDED = ("zmq", "msgpack")


def crossings_part(part: Part) -> None:
    """A small crossing and a large one, in each form that runs here."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    import boundary

    from fusedllm.kernels import native
    from fusedllm.partition.policies import CROSSINGS, devices

    _, device = devices("split")
    part.put("device", str(device))
    forms = ["driven"] if part.tiny else list(CROSSINGS)
    if device.platform != "cpu" or native.why_unavailable() is not None:
        forms = [form for form in forms if form != "ffi"]
    for size, rows in boundary.SIZES.items():
        for form in forms:
            run = functools.partial(boundary.measure, [form], rows, 1 if part.tiny else CROSSING_PASSES)
            found = part.attempt(f"{size}, {form}", run)
            if found is None:
                continue
            for name, took in found["seconds"].items():
                if name == form or (form == forms[0] and name == boundary.COPY):
                    part.row(size=size, form=name, microseconds=1e6 * took.median, of_copy=found["of_copy"][name])


def policies_part(part: Part) -> None:
    """A prompt and a token under each policy, each in a process of its own: what crosses, and where the time goes."""
    config = config_of(part.scale)
    tokens = 16 if part.tiny else TOKENS
    prompt = [(7 * at) % config.vocab_size for at in range(tokens)]
    names = ("plain", "split") if part.tiny else POLICIES
    for at, name in enumerate(names):
        if part.left() <= 0:
            part.skip(name, "no time was left")
            continue
        until = part.deadline - part.left() * (1 - 1 / (len(names) - at))
        worker = Worker([sys.executable, str(ROOT / "benchmarks" / "rpc_policies.py"), name])
        try:
            said = worker.ask("load", config.to_dict(), "auto", 0, tokens)
            if "why_not" in said:
                part.skip(name, said["why_not"])
                continue
            worker.ask("logits", prompt)  # Compiles.
            samples, decoded = [worker.ask("prefill", prompt)], [worker.ask("decode", prompt)]
            # Each makes pads for the prompt first, which may take longer than the prompt.
            while not part.tiny and len(samples) < REPETITIONS and time.monotonic() < until:
                samples.append(worker.ask("prefill", prompt))
        except SystemExit:
            part.skip(name, "its process ended early; its message is in the log")
            continue
        finally:
            worker.close()
        keys = ("latency", "calls", "sent", "received", "crossings", "trusted", "offline")
        row: dict[str, Any] = {key: Spread.of([one[key] for one in samples]) for key in keys if key in samples[0]}
        row["token_seconds"] = Spread.of([one["latency"] for one in decoded])
        part.row(policy=name, tokens=tokens, **row)


def ladder_part(part: Part) -> None:
    """`rpc_ladder.py` on few rungs, in its own process; needs pyzmq and msgpack."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        part.skip("the ladder", f"{' and '.join(missing)} not installed: bring the wheels along")
        return
    with tempfile.TemporaryDirectory(prefix="fusedllm-ladder-") as directory:
        path = Path(directory, "ladder.json")
        rungs = ["b", "plain"] if part.tiny else list(RUNGS)
        command = [sys.executable, str(ROOT / "benchmarks" / "rpc_ladder.py"), "--json", str(path), "--ckpt"]
        command += [part.scale.ckpt, "--repetitions", "1", "--rungs", *rungs]
        command += ["--seq", "16", "--layers", "1"] if part.tiny else ["--seq", str(TOKENS)]
        command += [] if part.tiny else ["--scaled-layers", "1", "--scaled", *SCALED]
        began = time.monotonic()
        try:
            ran = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=max(part.left(), 1), env=_environment()
            )
        except subprocess.TimeoutExpired:
            part.skip("the ladder", f"it was not done after {time.monotonic() - began:.0f} s")
            return
        print("\n".join(f"  {line}" for line in ran.stdout.splitlines()[:12]))
        if not path.exists():
            lines = [line for line in ran.stderr.splitlines() if line.strip()]
            part.skip("the ladder", (lines or ["it ended without a word"])[-1][:300])
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        part.put("verdicts", found["verdicts"])
        for row in found["rows"]:
            part.row(
                rung=row["name"],
                scaled_from_layers=row["scaled_from_layers"],
                latency=row["latency"]["median"],
                arithmetic=row["arithmetic"]["median"],
                calls=row["calls"]["median"],
                faster_than_b=row["speedup"].get("b", {}).get("median"),
            )


def _environment() -> dict[str, str]:
    """With the source tree first: nothing needs to be installed."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
