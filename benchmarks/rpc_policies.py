"""A policy of the engine for `rpc_ladder.py`, in a process of its own: the compiled prefill under `plain` and others.

    python benchmarks/rpc_policies.py POLICY

It is asked through `common.Worker`; what crosses between the policy's trusted side and the device stays inside.
"""

from __future__ import annotations

import inspect
import os
import sys
from typing import Any

from common import serve

PAGE_SIZE = 16

# Without a device beside the trusted CPU. The others have a boundary; where there is no accelerator, a second device of
# this CPU plays it.
ONE_DEVICE = ("plain", "trusted")


class Policy:
    """A loaded model under one policy. jax is imported with the model."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._llm: Any = None

    def load(self, config: dict[str, Any], dtype: str, seed: int, seq: int) -> dict[str, Any]:
        """Loads and warms up a model: what the policy claims, or why it can't be."""
        import numpy as np
        from rpc_model import dtypes

        import fusedllm
        from fusedllm.config import ModelConfig
        from fusedllm.errors import FusedLLMError
        from fusedllm.weights.random import random_checkpoint

        takes_policy = "policy" in inspect.signature(fusedllm.load).parameters
        if self._name != "plain" and not takes_policy:
            return {"why_not": f"`fusedllm.load` takes no policy, so that there is no {self._name!r} to measure."}
        bucket = -(-seq // PAGE_SIZE) * PAGE_SIZE
        shapes = fusedllm.EngineConfig(
            max_context=bucket + PAGE_SIZE,
            page_size=PAGE_SIZE,
            prefix_cache=False,
            prefill_buckets=(bucket,),  # One launch for the prompt.
            batch_buckets=(1,),
        )
        checkpoint = random_checkpoint(ModelConfig.from_dict(config), np.dtype(dtypes(dtype)[1]), seed)
        keywords = {"policy": self._name} if takes_policy else {}
        try:
            self._llm = fusedllm.load(checkpoint, dtype=dtype, engine=shapes, keep_programs=False, **keywords)
        except FusedLLMError as error:
            return {"why_not": f"{self._name}: {error}"}
        return {"claim": self._llm.policy.claim if takes_policy else None}

    def logits(self, tokens: list[int]) -> list[float]:
        """The logits after the last token. Then once what is measured, which compiles it."""
        logits = self._llm.logits(tokens)[-1].tolist()
        self.prefill(tokens)
        return logits

    def prefill(self, tokens: list[int]) -> dict[str, float]:
        """Seconds from the prompt to its first token on the host, crossings, and bytes there and back.

        What crosses is counted by the policy's ledger; where there is no boundary, it is what the engine sends and
        reads. Of the seconds those of crossings include the products.
        """
        before = self._counts()
        (result,) = self._llm.generate([tokens], temperature=0, max_tokens=1, ignore_eos=True)
        calls, sent, received, seconds = (now - then for now, then in zip(self._counts(), before, strict=True))
        latency = result.timings.prefill_seconds
        parts = {"crossings": seconds, "trusted": latency - seconds} if calls else {"program": latency}
        return {"latency": latency, "calls": calls, "sent": sent, "received": received, **parts}

    def _counts(self) -> tuple[float, ...]:
        if self._name not in ONE_DEVICE:
            total = self._llm.boundary.total()
            return total.count, total.bytes_to_device, total.bytes_to_host, total.seconds
        traffic = self._llm.engine.runner.traffic
        return 0, traffic.bytes_to_device, traffic.bytes_to_host, 0.0


def main() -> None:
    """The command."""
    (name,) = sys.argv[1:]
    if name not in ONE_DEVICE:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=2 {os.environ.get('XLA_FLAGS', '')}"
    serve(lambda: Policy(name))


if __name__ == "__main__":
    main()
