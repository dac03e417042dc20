"""The trusted client of `rpc_ladder.py`: norms, rotary embedding, softmax, residuals and activation in NumPy, and a
call to the device server for each product between them, as the predecessor did it.

Its account of a forward gives each moment to one phase, so that the phases add up to what the clock says of the whole.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import zmq
from rpc_codecs import Arena, Codec, codecs, shared_bytes

from fusedllm.config import ModelConfig
from fusedllm.model.rope import inverse_frequencies
from fusedllm.weights.random import random_checkpoint

PHASES = ("serialize", "send", "receive", "deserialize", "copy", "compute", "trusted")
# Of a policy of the engine: what crosses with the products of it, or all of its one program.
IN_PROCESS = ("crossings", "program")

# How often a client that waits looks whether the server still lives.
WATCH_MILLISECONDS = 1000

MASKED = np.float32(-1e30)


@dataclass
class Call:
    """One call: the layer that it is of, the client's stamps, and bytes each way; `server` are the server's stamps.

    The client's: trusted work began, packing began, packed, reply received, unpacked.
    """

    layer: int | None
    client: tuple[float, ...]
    sent: int
    received: int
    server: Sequence[float] = ()

    def phases(self) -> dict[str, float]:
        """Seconds of each phase; `copy` is between the server's memory and its device."""
        idle, began, packed, replied, unpacked = self.client
        arrived, read, placed, computed, fetched, written = self.server
        return {
            "serialize": packed - began + written - fetched,
            "send": arrived - packed,
            "receive": replied - written,
            "deserialize": read - arrived + unpacked - replied,
            "copy": placed - read + fetched - computed,
            "compute": computed - placed,
            "trusted": began - idle,
        }


@dataclass
class Account:
    """What a forward took. `shares` says how often a part counts: 0 for one whose time another stands for."""

    calls: list[Call]
    rests: list[tuple[int | None, float]]
    measured_layers: int
    layers: int
    phases: dict[str, float] = field(init=False)
    sent: float = 0.0
    received: float = 0.0
    count: int = 0

    def __post_init__(self) -> None:
        self.phases = dict.fromkeys(PHASES, 0.0)
        for call in self.calls:
            share = self._share(call.layer)
            for phase, seconds in call.phases().items():
                self.phases[phase] += share * seconds
            self.sent += share * call.sent
            self.received += share * call.received
        for layer, seconds in self.rests:
            self.phases["trusted"] += self._share(layer) * seconds
        self.count = len(self.calls)

    @property
    def latency(self) -> float:
        """Seconds of the whole."""
        return sum(self.phases.values())

    def _share(self, layer: int | None) -> float:
        if layer is None:
            return 1.0
        return self.layers / self.measured_layers if layer < self.measured_layers else 0.0


class DeviceServer:
    """The server's process, with a socket for each transport and the memory shared with it."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="rpc-ladder-")
        self._endpoint = f"ipc://{self._directory.name}/calls"
        self._descriptors = Arena.descriptor(), Arena.descriptor()
        self.codecs = codecs(None, None, trusted=True)
        command = [sys.executable, str(Path(__file__).parent / "rpc_server.py"), self._endpoint]
        command += map(str, self._descriptors)
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=self._descriptors)
        assert self._process.stdout
        tcp = self._process.stdout.readline().strip()
        if not tcp:
            raise SystemExit("the device server ended early; its message is above.")
        self._context = zmq.Context()
        self.sockets = {"ipc": self._connect(self._endpoint), "tcp": self._connect(tcp)}

    def share(self, message_bytes: int) -> None:
        """Shares memory for messages whose arrays take so many bytes."""
        size = shared_bytes(message_bytes)
        for descriptor in self._descriptors:
            os.ftruncate(descriptor, size)
        requests, replies = (Arena(descriptor, size) for descriptor in self._descriptors)
        self.codecs = codecs(requests, replies, trusted=True)
        self.ask("share", size)

    def ask(self, method: str, *values: Any) -> Any:
        """What a method of the server returns, through JSON."""
        return self._ask(self.sockets["ipc"], method, *values)

    def exchange(self, socket: zmq.Socket[bytes], letter: str, frame: bytes) -> bytes:
        """Sends a request and waits for its reply. A server that fails or has ended ends this program too."""
        socket.send_multipart((letter.encode(), frame))
        while not socket.poll(WATCH_MILLISECONDS):
            if self._process.poll() is not None:
                raise SystemExit("the device server ended early; its message is above.")
        status, reply = socket.recv_multipart()
        if status == b"!":
            raise SystemExit(f"the device server refuses: {reply.decode()}")
        return reply

    def close(self) -> None:
        """Ends the server and waits for it."""
        if self._process.poll() is None:
            # Another socket: one whose call was interrupted may not send.
            with self._connect(self._endpoint) as socket:
                self._ask(socket, "end")
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()
        self._context.destroy(linger=0)
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._directory.cleanup()

    def _ask(self, socket: zmq.Socket[bytes], method: str, *values: Any) -> Any:
        return json.loads(self.exchange(socket, "j", json.dumps([method, *values]).encode()))

    def _connect(self, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.REQ)
        socket.connect(endpoint)
        return socket


@dataclass(frozen=True)
class Channel:
    """A codec over a transport: `("b", "tcp")`."""

    codec: str
    transport: str = "ipc"


class Recorder:
    """Makes calls and keeps what each took; the time between two is the trusted side's own."""

    def __init__(self, server: DeviceServer) -> None:
        self._server = server
        self._calls: list[Call] = []
        self._rests: list[tuple[int | None, float]] = []
        self._idle = 0.0

    def begin(self) -> None:
        """Starts the clock; what an earlier forward left is forgotten."""
        self._server.ask("stamps")
        self._calls, self._rests = [], []
        self._idle = perf_counter()

    def call(self, channel: Channel, name: str, layer: int | None, *arrays: np.ndarray) -> list[np.ndarray]:
        """The results of one call."""
        codec: Codec = self._server.codecs[channel.codec]
        began = perf_counter()
        frame = codec.pack({"name": name, "layer": layer}, arrays)
        packed = perf_counter()
        reply = self._server.exchange(self._server.sockets[channel.transport], channel.codec, frame)
        replied = perf_counter()
        _, results = codec.unpack(reply)
        stamps = (self._idle, began, packed, replied, perf_counter())
        sent, received = codec.moved(frame, arrays), codec.moved(reply, results)
        self._calls.append(Call(layer, stamps, sent, received))
        self._idle = stamps[-1]
        return results

    def rest(self, layer: int | None) -> None:
        """The trusted work since the last call belongs to `layer`."""
        now = perf_counter()
        self._rests.append((layer, now - self._idle))
        self._idle = now

    def end(self, measured_layers: int, layers: int) -> Account:
        """The account of all since `begin`."""
        self.rest(None)
        for call, stamps in zip(self._calls, self._server.ask("stamps"), strict=True):
            call.server = stamps
        return Account(self._calls, self._rests, measured_layers, layers)


class TrustedClient:
    """The trusted side of one model: it holds the norms and does everything but products.

    Raises:
      SystemExit: the model has biases, norms of queries and keys, or a sliding window, which the predecessor had not.
    """

    def __init__(self, config: ModelConfig, server: DeviceServer, seed: int) -> None:
        others = (config.attention_bias, config.attention_output_bias, config.mlp_bias, config.qk_norm)
        if any(others) or any(config.sliding_windows):
            raise SystemExit(f"the predecessor's client knows LLaMA alone, and this model is {config.family}.")
        self.config = config
        self._recorder = Recorder(server)
        tensors = random_checkpoint(config, "float32", seed).tensors
        self._norms = {name: tensor.read() for name, tensor in tensors.items() if "norm" in name}

    def forward(
        self, tokens: np.ndarray, channel: Channel, *, fused: bool = False, measured_layers: int = 0
    ) -> tuple[np.ndarray, Account]:
        """The logits after the last of `tokens`, and what they took.

        Args:
          tokens: int32 `[seq]`.
          channel: how the calls travel.
          fused: one call for each layer instead of six.
          measured_layers: of so many layers the calls travel by `channel` and stand for all of them; those of the
            others go through shared memory and don't count. 0 for all.
        """
        config, layers = self.config, self.config.num_layers
        measured = measured_layers or layers
        self._recorder.begin()
        frequencies = inverse_frequencies(config.rope, config.head_dim)
        angles = np.arange(len(tokens), dtype=np.float32)[:, None, None] * frequencies
        self._cos_sin = np.cos(angles), np.sin(angles)
        self._causal = np.triu(np.full((len(tokens), len(tokens)), MASKED), 1)
        (x,) = self._recorder.call(channel, "embedding", None, tokens)
        for layer in range(layers):
            route = channel if layer < measured else Channel("d")
            if fused:
                (x,) = self._recorder.call(route, "layer", layer, x)
            else:
                x = self._layer(x, layer, route)
            self._recorder.rest(layer)
        last = self._norm(x[-1:], "model.norm.weight")
        (logits,) = self._recorder.call(channel, "head", None, last)
        return logits[0], self._recorder.end(measured, layers)

    def _layer(self, x: np.ndarray, layer: int, route: Channel) -> np.ndarray:
        """The six calls, and what the trusted side does between them."""

        def call(name: str, *arrays: np.ndarray) -> list[np.ndarray]:
            return self._recorder.call(route, name, layer, *arrays)

        prefix = f"model.layers.{layer}."
        q, k, v = call("q_k_v", self._norm(x, prefix + "input_layernorm.weight"))
        (scores,) = call("scores", self._rotate(q), self._rotate(k))
        (mixed,) = call("mix", self._softmax(scores), v)
        (o,) = call("o", mixed)
        x = x + o
        gate, up = call("gate_up", self._norm(x, prefix + "post_attention_layernorm.weight"))
        (down,) = call("down", _swiglu(gate, up))
        return x + down

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        squares = np.einsum("ij,ij->i", x, x) / np.float32(x.shape[1])
        return x * (1 / np.sqrt(squares + np.float32(self.config.rms_norm_eps)))[:, None] * self._norms[name]

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        """`[seq, heads_dim]`, each head's halves rotated as pairs."""
        (cos, sin), seq = self._cos_sin, len(x)
        first, second = np.split(x.reshape(seq, -1, self.config.head_dim), 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(seq, -1)

    def _softmax(self, scores: np.ndarray) -> np.ndarray:
        """Causal, over the last axis of `[heads, seq, seq]`."""
        scores = scores * np.float32(1 / math.sqrt(self.config.head_dim))
        scores += self._causal
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        return scores


def _swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp of a large -gate is infinite, and gate / infinity is right.
        return gate / (1 + np.exp(-gate)) * up


def largest_message(config: ModelConfig, seq: int) -> int:
    """Bytes of the arrays of the largest call or reply of a prompt, in float32."""
    width, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    elements = (
        seq * max(config.hidden_size, width + 2 * narrow, 2 * config.intermediate_size),
        config.num_heads * seq * seq + seq * narrow,
        config.vocab_size,
    )
    return 4 * max(elements)
