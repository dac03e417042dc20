"""The servers that `serve.py` loads, each a process on this machine: fusedllm's, and two of llama.cpp.

    python benchmarks/serve_sides.py MODEL.gguf --port 8001 --parallel 8      llama.cpp's own server, of xllamacpp

`xllamacpp` holds llama.cpp's own C++ server, with as many slots as it is given, which it batches. The server of
`llama-cpp-python[server]` is Python and takes one request at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from http_stream import Connection

READY_SECONDS = 300.0


@dataclass(frozen=True)
class Side:
    """A server: how to start it, where it says that it is ready, and what a request to it looks like.

    `{port}` in the command becomes the port. `body` is what each request carries besides the prompt, so that all sides
    make the same number of tokens.
    """

    name: str
    command: Sequence[str]
    ready: str
    body: dict[str, Any] = field(default_factory=dict)


def ours(command: str, ready: str = "/ready") -> Side:
    """Our server, by its command, and the path that says when it is ready."""
    return Side("fusedllm", shlex.split(command), ready, {"ignore_eos": True})


def xllamacpp(python: str, model: Path, threads: int, parallel: int, context: int, unified: bool) -> Side:
    """llama.cpp's own server; `unified` is one KV cache for all slots, as it has it where slots are not counted."""
    command = [python, str(Path(__file__).resolve()), str(model), "--port", "{port}"]
    command += ["--threads", str(threads), "--parallel", str(parallel), "--context", str(context)]
    cache = "one KV cache" if unified else "a KV cache each"
    name = f"llama.cpp's server, {parallel} slots, {cache}"
    return Side(name, command + ["--unified"] * unified, "/health", {"ignore_eos": True})


def llama_cpp_python(python: str, model: Path, threads: int, context: int, eos: Sequence[int]) -> Side:
    """The server of llama-cpp-python. It knows no `ignore_eos`; a bias of -100 comes to the same."""
    command = [python, "-m", "llama_cpp.server", "--model", str(model), "--port", "{port}", "--n_ctx", str(context)]
    command += ["--n_threads", str(threads), "--n_threads_batch", str(threads), "--verbose", "False"]
    bias = {str(token): -100 for token in eos}
    return Side("llama-cpp-python's server", command, "/v1/models", {"logit_bias": bias})


def has(python: str, module: str) -> bool:
    """Whether an interpreter can import a module."""
    found = subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False)
    return found.returncode == 0


def version(python: str, package: str) -> str:
    """The version of a package in an interpreter's environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


class Server:
    """A running side; `stop` ends it."""

    def __init__(self, side: Side, log: Path) -> None:
        self.side = side
        self.port = _free_port()
        command = [part.replace("{port}", str(self.port)) for part in side.command]
        with log.open("w") as output:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self._log = log

    async def wait_until_ready(self) -> None:
        """Returns once the server says so; ends this program if the server ends, or takes too long."""
        until = time.monotonic() + READY_SECONDS
        while time.monotonic() < until:
            if self._process.poll() is not None:
                break
            connection = Connection(self.port)
            try:
                status, _ = await connection.get(self.side.ready)
                if status == 200:
                    return
            except (OSError, EOFError):
                pass
            finally:
                connection.close()
            await asyncio.sleep(0.2)
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-10:])
        self.stop()
        raise SystemExit(f"{self.side.name} did not become ready:\n{tail}")

    def cpu_seconds(self) -> float:
        """Processor time of the server so far, its threads and children included."""
        import psutil

        process = psutil.Process(self._process.pid)
        times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
        return sum(one.user + one.system for one in times)

    def memory_bytes(self) -> int:
        """What the server's process has in memory, without its children."""
        import psutil

        return int(psutil.Process(self._process.pid).memory_info().rss)

    def stop(self) -> None:
        """Ends the process, and waits for it."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """The command: llama.cpp's own server until this process is ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parallel", type=int, default=8, help="slots, each with a context of its own")
    parser.add_argument("--context", type=int, default=2048, help="tokens of one slot")
    parser.add_argument("--unified", action="store_true", help="one KV cache for all slots")
    arguments = parser.parse_args()
    import xllamacpp as llama

    # Everything else as llama.cpp has it: continuous batching, the reuse of prompts, flash attention where it helps.
    parameters = llama.CommonParams()
    parameters.model.path = arguments.model
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = arguments.port
    parameters.n_parallel = arguments.parallel
    parameters.n_ctx = arguments.parallel * arguments.context
    parameters.kv_unified = arguments.unified
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = arguments.threads
    parameters.verbosity = 0
    parameters.fit_params = False
    server = llama.Server(parameters)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
