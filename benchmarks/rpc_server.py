"""The device server of `rpc_ladder.py`: answers calls of the trusted client over ZeroMQ, one at a time.

    python benchmarks/rpc_server.py ENDPOINT REQUESTS REPLIES

`REQUESTS` and `REPLIES` are inherited descriptors of memory that it shares with the client. It answers on `ENDPOINT`
and on a TCP port of this machine, and prints the latter's address. A request has two frames: the codec's letter and
what it packed; `j` is JSON and speaks of the server itself. The clock of its stamps is the client's: `perf_counter` is
the same for all processes of a machine.

It sees all activations as they are: no confidentiality claim.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import zmq
from rpc_codecs import Arena, Codec, codecs

# How often it looks whether the client is still there.
WATCH_MILLISECONDS = 1000


class Server:
    """What the client may ask for; jax is imported with the first model, so that a transport alone needs none."""

    def __init__(self, requests: int, replies: int) -> None:
        self._descriptors = requests, replies
        self._codecs = codecs(None, None, trusted=False)
        self._products: Any = None
        # Of each call since they were last asked for: when it was received, unpacked, on the device, computed, back on
        # the host, and packed.
        self._stamps: list[list[float]] = []

    def answer(self, letter: bytes, frame: bytes) -> bytes:
        """The frame to reply with."""
        received = perf_counter()
        if letter == b"j":
            method, *values = json.loads(frame)
            return json.dumps(getattr(self, "do_" + method)(*values)).encode()
        codec = self._codecs[letter.decode()]
        header, arrays = codec.unpack(frame)
        stamps = [received, perf_counter()]
        results = arrays if header["name"] == "echo" else self._compute(codec, header, arrays, stamps)
        stamps += [perf_counter()] * (5 - len(stamps))
        reply = codec.pack({}, results)
        self._stamps.append([*stamps, perf_counter()])
        return reply

    def _compute(self, codec: Codec, header: dict[str, Any], arrays: Sequence[Any], stamps: list[float]) -> list[Any]:
        import jax
        import numpy as np

        operands = jax.block_until_ready([jax.device_put(array) for array in arrays])
        stamps.append(perf_counter())
        results = jax.block_until_ready(self._products.call(header["name"], header["layer"], operands, codec.wire))
        stamps.append(perf_counter())
        return [np.asarray(result) for result in results]

    def do_stamps(self) -> list[list[float]]:
        """Those of the calls since it was last asked."""
        stamps, self._stamps = self._stamps, []
        return stamps

    def do_share(self, size: int) -> None:
        """Maps the shared memory, which the client has made so large."""
        requests, replies = (Arena(descriptor, size) for descriptor in self._descriptors)
        self._codecs = codecs(replies, requests, trusted=False)

    def do_device(self) -> dict[str, str]:
        """What jax runs on."""
        import jax

        device = jax.devices()[0]
        return {"platform": device.platform, "kind": device.device_kind}

    def do_load(self, config: dict[str, Any], dtype: str, seed: int) -> None:
        """Makes the weights."""
        from rpc_model import Products

        from fusedllm.config import ModelConfig

        self._products = Products(ModelConfig.from_dict(config), dtype, seed)

    def do_arithmetic(self, kind: str, seq: int) -> float:
        """As `Products.arithmetic`."""
        return self._products.arithmetic(kind, seq)

    def do_weight_bytes(self) -> int:
        """As `Products.weight_bytes`."""
        return self._products.weight_bytes()

    def do_limits(self, size: int | None) -> dict[str, Any]:
        """As `Products.limits`."""
        return self._products.limits(size)


def main() -> None:
    """The command."""
    endpoint, requests, replies = sys.argv[1], *map(int, sys.argv[2:])
    parent = os.getppid()
    socket = zmq.Context().socket(zmq.REP)
    socket.bind(endpoint)
    socket.bind("tcp://127.0.0.1:*")
    print(socket.getsockopt_string(zmq.LAST_ENDPOINT), flush=True)
    server = Server(requests, replies)
    while True:
        while not socket.poll(WATCH_MILLISECONDS):
            if os.getppid() != parent:
                return
        letter, frame = socket.recv_multipart()
        if frame == b'["end"]':
            socket.send_multipart((b"j", b"null"))
            socket.close()  # What was sent goes out first.
            return
        try:
            reply = server.answer(letter, frame)
        except Exception as error:
            socket.send_multipart((b"!", f"{type(error).__name__}: {error}".encode()))
        else:
            socket.send_multipart((letter, reply))


if __name__ == "__main__":
    main()
