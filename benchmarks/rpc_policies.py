"""A policy of the engine for `rpc_ladder.py`, in a process of its own: the compiled prefill under `plain` and others.

    python benchmarks/rpc_policies.py POLICY

It is asked through `common.Worker`; what crosses between the policy's trusted side and the device stays inside.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from common import serve

PAGE_SIZE = 16
# Of an answer whose decoding is timed; with the prompt they fit the context.
DECODED = 8

# Without a device beside the trusted CPU. The others have a boundary; where there is no accelerator, a second device of
# this CPU plays it.
ONE_DEVICE = ("plain", "trusted")
# Of products of integers, so that their model is in w8a8.
INTEGERS = ("masked", "verify", "masked+verify")


class Policy:
    """A loaded model under one policy. jax is imported with the model."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._llm: Any = None
        self._pads: Any = None

    def load(self, config: dict[str, Any], dtype: str, seed: int, seq: int) -> dict[str, Any]:
        """Loads and warms up a model: what the policy claims, or why it can't be."""
        import numpy as np
        from rpc_integers import Pads, quantized
        from rpc_model import dtypes

        import fusedllm
        from fusedllm.config import ModelConfig
        from fusedllm.errors import FusedLLMError
        from fusedllm.weights.random import random_checkpoint

        bucket = -(-seq // PAGE_SIZE) * PAGE_SIZE
        shapes = fusedllm.EngineConfig(
            max_context=bucket + PAGE_SIZE,
            page_size=PAGE_SIZE,
            prefix_cache=False,
            prefill_buckets=(bucket,),  # One launch for the prompt.
            batch_buckets=(1,),
            decode_steps=1,  # As under a policy that crosses.
        )
        checkpoint = random_checkpoint(ModelConfig.from_dict(config), np.dtype(dtypes(dtype)[1]), seed)
        keywords: dict[str, Any] = {"keep_quantized": True} if self._name in INTEGERS else {}
        if self._name in INTEGERS:
            checkpoint = quantized(checkpoint)
        try:
            self._llm = fusedllm.load(
                checkpoint, dtype=dtype, engine=shapes, keep_programs=False, policy=self._name, **keywords
            )
        except FusedLLMError as error:
            return {"why_not": f"{self._name}: {error}"}
        # The engine's own way to them: no other is public.
        pool = getattr(self._llm._applied.boundary, "pool", None)
        self._pads = None if pool is None else Pads(pool, bucket + DECODED)
        return {"claim": self._llm.policy.claim}

    def logits(self, tokens: list[int]) -> list[float]:
        """The logits after the last token. Then once what is measured, which compiles it."""
        logits = self._llm.logits(tokens)[-1].tolist()
        self.prefill(tokens)
        self.decode(tokens)
        return logits

    def prefill(self, tokens: list[int]) -> dict[str, float]:
        """Seconds from the prompt to its first token on the host, crossings, and bytes there and back.

        What crosses is counted by the policy's ledger; where there is no boundary, it is what the engine sends and
        reads. Of the seconds those of crossings include the products. Pads are made before: `offline` are the seconds
        of those that the prompt used.
        """
        self._fill()
        before = self._counts()
        (result,) = self._llm.generate([tokens], temperature=0, max_tokens=1, ignore_eos=True)
        calls, sent, received, seconds = (now - then for now, then in zip(self._counts(), before, strict=True))
        latency = result.timings.prefill_seconds
        parts = {"crossings": seconds, "trusted": latency - seconds} if calls else {"program": latency}
        return {"latency": latency, "calls": calls, "sent": sent, "received": received, **parts, **self._used()}

    def decode(self, tokens: list[int]) -> dict[str, float]:
        """Seconds and crossings of a token after the prompt's first one, and the offline seconds of its pads.

        By the difference to an answer of one token, as an engine that launches ahead gives the first one late.
        """
        took, calls = [], []
        for count in (1, DECODED + 1):
            self._fill()
            before = self._counts()[0]
            (result,) = self._llm.generate([tokens], temperature=0, max_tokens=count, ignore_eos=True)
            took.append(result.timings.last_token - result.timings.prefill_started)
            calls.append(self._counts()[0] - before)
        offline = {} if self._pads is None else {"offline": self._pads.row_seconds()}
        return {"latency": (took[1] - took[0]) / DECODED, "calls": (calls[1] - calls[0]) / DECODED, **offline}

    def _fill(self) -> None:
        if self._pads is not None:
            self._pads.fill()

    def _used(self) -> dict[str, float]:
        return {} if self._pads is None else self._pads.used()

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
