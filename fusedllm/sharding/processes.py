"""Several processes as one model: who they are to one another, and a number that all of them know."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable

import jax
import numpy as np

from fusedllm.errors import ShardingError

MOST_PROCESSES = 65536

# How long the processes wait for one another. jax itself would end the process then, without a word that Python hears,
# and so is given more time than anybody has.
JOIN_SECONDS = 300
FOREVER_SECONDS = 10**6


def connect(coordinator: str, processes: int, process_id: int) -> None:
    """Joins the processes of one run; waits until all are there. To be called before anything else asks jax.

    Args:
      coordinator: `host:port`, at which the process 0 listens and all others find it.
      processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      ShardingError: an argument is out of range, the processes don't find one another, or jax has devices already.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise ShardingError(f"the coordinator is written as host:port, got {coordinator!r}.")
    if not 1 <= processes <= MOST_PROCESSES:
        raise ShardingError(f"the number of processes must be from 1 to {MOST_PROCESSES}, got {processes}.")
    if not 0 <= process_id < processes:
        raise ShardingError(f"of {processes} processes the ids go from 0 to {processes - 1}, got {process_id}.")
    if process_id == 0:
        _check_free(int(port))

    def join() -> None:
        jax.distributed.initialize(coordinator, processes, process_id, initialization_timeout=FOREVER_SECONDS)

    try:
        _waited_for(join, JOIN_SECONDS)
    except TimeoutError:
        raise ShardingError(
            f"the process {process_id} has waited {JOIN_SECONDS} seconds at {coordinator} for {processes} processes to "
            "meet; start all of them, each with its own id and the same coordinator."
        ) from None
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ShardingError(f"the process {process_id} can't join those at {coordinator}: {reason}.") from error


def _check_free(port: int) -> None:
    """Refuses a port that somebody listens at, for which jax would end the process with a fault of memory."""
    both = socket.has_dualstack_ipv6()
    try:
        socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        ).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ShardingError(f"the process 0 can't listen at port {port} ({reason}); choose another.") from error


def _waited_for(function: Callable[[], object], seconds: float) -> None:
    """`function` in a thread, so that Ctrl-C ends the wait: where jax waits Python hears of no signal.

    Raises:
      TimeoutError: it takes longer than so many seconds; the thread goes on.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="fusedllm-connect", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if failed:
        raise failed[0]


def shared_number() -> int:
    """A random number of 62 bits that is the same in every process; all must call this together."""
    from jax.experimental import multihost_utils

    own = np.asarray([secrets.randbits(31), secrets.randbits(31)], np.int32)
    high, low = np.asarray(multihost_utils.broadcast_one_to_all(own)).tolist()
    return int(high) << 31 | int(low)
