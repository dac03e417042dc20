"""Several processes as one model: who they are to one another, and a number that all of them know."""

from __future__ import annotations

import secrets

import jax
import numpy as np

from fusedllm.errors import ShardingError

MOST_PROCESSES = 65536


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
    if not host or not (port.isascii() and port.isdecimal() and int(port) < 2**16):
        raise ShardingError(f"the coordinator is written as host:port, got {coordinator!r}.")
    if not 1 <= processes <= MOST_PROCESSES:
        raise ShardingError(f"the number of processes must be from 1 to {MOST_PROCESSES}, got {processes}.")
    if not 0 <= process_id < processes:
        raise ShardingError(f"of {processes} processes the ids go from 0 to {processes - 1}, got {process_id}.")
    try:
        jax.distributed.initialize(coordinator, processes, process_id)
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ShardingError(f"the process {process_id} can't join those at {coordinator}: {reason}.") from error


def shared_number() -> int:
    """A random number of 62 bits that is the same in every process; all must call this together."""
    from jax.experimental import multihost_utils

    own = np.asarray([secrets.randbits(31), secrets.randbits(31)], np.int32)
    high, low = np.asarray(multihost_utils.broadcast_one_to_all(own)).tolist()
    return int(high) << 31 | int(low)
