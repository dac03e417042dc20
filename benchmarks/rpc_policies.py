"""The engine's own policies for `rpc_ladder.py`, in a process of their own: the compiled prefill of each.

It is asked through `common.Worker`; what crosses between the policy's trusted side and the device stays inside.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from common import serve

import fusedllm
from fusedllm.config import ModelConfig
from fusedllm.errors import FusedLLMError
from fusedllm.weights.random import random_checkpoint

PAGE_SIZE = 16


class Policies:
    """One loaded model for each policy, on the same random weights."""

    def __init__(self) -> None:
        self._models: dict[str, fusedllm.LLM] = {}

    def load(self, policy: str, config: dict[str, Any], dtype: str, seed: int, seq: int) -> str | None:
        """Loads and warms up a model; returns why that can't be, or nothing."""
        takes_policy = "policy" in inspect.signature(fusedllm.load).parameters
        if policy != "plain" and not takes_policy:
            return f"`fusedllm.load` takes no policy yet, so that there is no {policy!r} to measure."
        from rpc_model import dtypes

        weights = np.dtype(dtypes(dtype)[1])
        bucket = -(-seq // PAGE_SIZE) * PAGE_SIZE
        shapes = fusedllm.EngineConfig(
            max_context=bucket + PAGE_SIZE,
            page_size=PAGE_SIZE,
            prefix_cache=False,
            prefill_buckets=(bucket,),  # One launch for the prompt.
            batch_buckets=(1,),
        )
        checkpoint = random_checkpoint(ModelConfig.from_dict(config), weights, seed)
        keywords = {"policy": policy} if takes_policy else {}
        try:
            llm = fusedllm.load(checkpoint, dtype=dtype, engine=shapes, keep_programs=False, **keywords)
        except FusedLLMError as error:
            return f"the policy {policy!r} refuses this model: {error}"
        self._models[policy] = llm
        return None

    def logits(self, policy: str, tokens: list[int]) -> list[float]:
        """The logits after the last token."""
        return self._models[policy].logits(tokens)[-1].tolist()

    def prefill(self, policy: str, tokens: list[int]) -> dict[str, Any]:
        """Seconds from the prompt to its first token on the host, launches, and bytes that the engine moved for it."""
        llm = self._models[policy]
        traffic = llm.engine.runner.traffic
        before = traffic.bytes_to_device, traffic.bytes_to_host
        (result,) = llm.generate([tokens], temperature=0, max_tokens=1, ignore_eos=True)
        sent, received = traffic.bytes_to_device - before[0], traffic.bytes_to_host - before[1]
        return {"seconds": result.timings.prefill_seconds, "sent": sent, "received": received}


if __name__ == "__main__":
    serve(Policies)
