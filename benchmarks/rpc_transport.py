"""The predecessor's transport diagnosis again: 10 MB to the device server's process and back, by each codec.

It found 7.5 ms for msgpack, 1.9 to send, 10.6 to receive and 1.2 to unpack, with IPC and TCP within 2 %.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from common import Spread, significant, table
from rpc_client import Channel, DeviceServer, Recorder

MESSAGE_BYTES = 10_000_000
STEPS = ("pack", "send", "receive", "unpack")

# Far beyond any cache, so that a copy goes through memory.
COPY_BYTES = 256 * 2**20
COPIES = 4

WAYS = {
    "(a) msgpack of lists, ipc": Channel("a"),
    "(b) msgpack of bytes, ipc": Channel("b"),
    "(b) msgpack of bytes, tcp": Channel("b", "tcp"),
    "(c) the same in bfloat16, ipc": Channel("c"),
    "(d) shared memory": Channel("d"),
}


def copy_rate() -> float:
    """Bytes that one NumPy thread copies in a second: each read once and written once. The best of four."""
    source, target = np.ones(COPY_BYTES // 8), np.ones(COPY_BYTES // 8)
    best = float("inf")
    for _ in range(COPIES):
        began = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - began)
    return COPY_BYTES / best


def diagnose(server: DeviceServer, repetitions: int, message_bytes: int = MESSAGE_BYTES) -> dict[str, Any]:
    """Milliseconds of the four steps of each way, in turns; the server echoes what it gets.

    `send` lasts until the server has all of it, `receive` from when the server has packed its reply until all of it is
    here; both are of the whole message.
    """
    recorder = Recorder(server)
    array = np.random.default_rng(0).standard_normal(message_bytes // 4, np.float32)
    samples: dict[str, dict[str, list[float]]] = {way: {step: [] for step in STEPS} for way in WAYS}
    copies = []
    for repetition in range(-1, repetitions):  # The first warms up, and is dropped.
        copies.append(copy_rate())
        turn = repetition % len(WAYS)  # Lists leave a heap behind that the next way has to deal with.
        for way in [*WAYS][turn:] + [*WAYS][:turn]:
            recorder.begin()
            recorder.call(WAYS[way], "echo", None, array)
            (call,) = recorder.end(1, 1).calls
            _, began, packed, replied, unpacked = call.client
            steps = (packed - began, call.server[0] - packed, replied - call.server[-1], unpacked - replied)
            if repetition >= 0:
                for step, seconds in zip(STEPS, steps, strict=True):
                    samples[way][step].append(seconds)
    rows = []
    for way, of in samples.items():
        totals = [sum(parts) for parts in zip(*of.values(), strict=True)]
        rows.append({"way": way, **{step: Spread.of(of[step]) for step in STEPS}, "total": Spread.of(totals)})
    return {"bytes": message_bytes, "copy_rate": Spread.of(copies[1:]), "rows": rows}


def report(result: dict[str, Any]) -> str:
    """The table, and what the memory could do."""
    at_once = result["bytes"] / result["copy_rate"].median
    lines = []
    for row in result["rows"]:
        times = [significant(1e3 * row[step].median) for step in (*STEPS, "total")]
        lines.append([row["way"], *times, f"{significant(row['total'].median / at_once)} x"])
    head = f"## {result['bytes'] / 1e6:.0f} MB to another process and as much back, ms"
    note = (
        f"`pack` and `send` are of the way there, `receive` and `unpack` of the way back. One NumPy thread copies"
        f" {significant(result['copy_rate'].median / 1e9)} GB/s\nhere: {significant(1e3 * at_once)} ms for the message,"
        " of which the last column has multiples. The predecessor's figures: 7.5, 1.9, 10.6, 1.2."
    )
    return "\n\n".join([head, table(["way", *STEPS, "all", "copies"], lines), note])
