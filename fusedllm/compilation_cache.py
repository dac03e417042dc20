"""Where compiled programs are kept between processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from fusedllm.weights.download import cache_directory

# Below this many seconds a program is compiled again as fast as it is read.
WORTH_KEEPING = 0.1


def use_compilation_cache(directory: Path | None = None) -> None:
    """Keeps compiled programs in `directory` (by default in the cache of this package), unless jax has a place already.

    An unusable directory is passed over: programs are then compiled in each process.
    """
    # Its attributes are made at run time, so a type checker knows none of them.
    config: Any = jax.config
    if config.jax_compilation_cache_dir:
        return
    if directory is None:
        directory = cache_directory() / "programs"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    config.update("jax_compilation_cache_dir", str(directory))
    config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
    config.update("jax_persistent_cache_min_entry_size_bytes", -1)
