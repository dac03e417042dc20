"""What XLA reads of the environment, which must be there before jax is imported; the library never sets it."""

from __future__ import annotations

import argparse
import os


def set_environment(options: argparse.Namespace) -> None:
    """Sets what suits a command; what the user has set stands."""
    # XLA's own log lines speak to its developers.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    flags = []
    if getattr(options, "policy", "plain") not in ("plain", "trusted"):
        # Where there is no accelerator, a second device of this CPU plays one.
        flags.append("--xla_force_host_platform_device_count=2")
    if getattr(options, "mesh", None):
        # Devices that exchange sums go on with what does not wait for them. Between one device's programs there is
        # nothing to hide, and kernels are launched together (as CUDA graphs) without being told.
        flags.append("--xla_gpu_enable_latency_hiding_scheduler=true")
    if flags:
        # Of a flag that is there twice the last one counts.
        os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip()
