"""HF transformers on the same device: eager, and compiled with a static cache. The part `peers` of `gpu.py`.

    python benchmarks/gpu_peers.py eager

The same shape with random weights, in processes of their own that never import jax. Prefill is until the logits of the
last token, decode greedy with the key/value cache; both are timed by the clock, the device waited for.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any

from common import Spread, Worker, serve
from gpu_part import Part, config_of, reason

KINDS = ("eager", "compiled")
REPETITIONS = 7
PREFILL = 1024
CONTEXT = 128
DECODED = 32


class Peer:
    """A LLaMA of transformers, asked through `common.Worker`."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._step: Any = None
        self._kept: tuple[int, Any] | None = None
        self._model: Any = None

    def load(self, shape: dict[str, Any], tiny: bool) -> dict[str, Any]:
        """Makes the model on the GPU, or on the CPU if there is none."""
        try:
            return self._load(shape, tiny)
        except Exception as error:
            return {"why_not": reason(error)}

    def _load(self, shape: dict[str, Any], tiny: bool) -> dict[str, Any]:
        import torch
        import transformers
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.set_grad_enabled(False)
        self._torch, self._device = torch, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = LlamaConfig(
            vocab_size=shape["vocab_size"],
            hidden_size=shape["hidden_size"],
            intermediate_size=shape["intermediate_size"],
            num_hidden_layers=shape["num_layers"],
            num_attention_heads=shape["num_heads"],
            num_key_value_heads=shape["num_kv_heads"],
            head_dim=shape["head_dim"],
            max_position_embeddings=16384,
            tie_word_embeddings=shape["tie_embeddings"],
            attn_implementation="sdpa",
        )
        torch.set_default_dtype(torch.float32 if self._device.type == "cpu" else torch.bfloat16)
        with self._device:
            self._model = LlamaForCausalLM(config).eval()
        self._prefill_tokens, self._context = (16, 16) if tiny else (PREFILL, CONTEXT)
        self._decoded = 4 if tiny else DECODED
        self._forward: Callable[..., Any] = self._model.forward
        return {"torch": torch.__version__, "transformers": transformers.__version__, "device": str(self._device)}

    def prefill(self) -> dict[str, Any]:
        """Seconds of a prompt."""
        return self._told(self._prefill)

    def decode(self) -> dict[str, Any]:
        """Seconds of a token."""
        return self._told(self._decode)

    def _told(self, measure: Callable[[], list[float]]) -> dict[str, Any]:
        try:
            return {"samples": measure()}
        except Exception as error:
            return {"why_not": reason(error)}

    def _compiled(self) -> Callable[..., Any]:
        """The forward pass of one token; graphs are captured where there is a GPU."""
        if self._kind == "eager":
            return self._forward
        if self._step is None:
            mode = "reduce-overhead" if self._device.type == "cuda" else "default"
            self._step = self._torch.compile(self._model.forward, mode=mode, dynamic=False)
        return self._step

    def _cache(self, length: int) -> Any:
        """An empty cache; of a static one always the same, since a captured graph has its address."""
        from transformers import DynamicCache, StaticCache

        if self._kind == "eager":
            return DynamicCache(config=self._model.config)
        if self._kept is None or self._kept[0] != length:
            self._kept = length, StaticCache(config=self._model.config, max_cache_len=length)
            self._run(self._forward, self._prompt(1), self._kept[1], 0)  # Its memory is taken at the first use.
        self._kept[1].reset()
        return self._kept[1]

    def _prompt(self, tokens: int) -> Any:
        return self._torch.randint(0, self._model.config.vocab_size, (1, tokens), device=self._device)

    def _run(self, forward: Callable[..., Any], ids: Any, cache: Any, position: int) -> Any:
        """The likeliest next token `[1, 1]`."""
        positions = self._torch.arange(position, position + ids.shape[1], device=self._device)[None]
        out = forward(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1)

    def _prefill(self) -> list[float]:
        forward = self._compiled()
        samples = []
        for turn in range(REPETITIONS + 3):
            cache, ids = self._cache(self._prefill_tokens), self._prompt(self._prefill_tokens)
            self._wait()
            began = time.perf_counter()
            self._run(forward, ids, cache, 0)
            self._wait()
            if turn >= 3:
                samples.append(time.perf_counter() - began)
        return samples

    def _decode(self) -> list[float]:
        forward = self._compiled()
        samples = []
        length = self._context + 3 * self._decoded + 8
        for turn in range(REPETITIONS + 2):
            cache = self._cache(length)
            token = self._run(self._forward, self._prompt(self._context), cache, 0)
            position = self._context
            for measured in (False, True):  # The first of them warm up.
                self._wait()
                began = time.perf_counter()
                for _ in range(self._decoded):
                    # A graph's result is overwritten by its next run.
                    token = self._run(forward, token, cache, position).clone()
                    position += 1
                self._wait()
                if measured and turn >= 2:
                    samples.append((time.perf_counter() - began) / self._decoded)
        return samples

    def _wait(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()


def peers_part(part: Part) -> None:
    """Decode and prefill of each kind."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        part.skip("transformers", f"{' and '.join(missing)} not installed")
        return
    shape = config_of(part.scale).to_dict()
    for kind in KINDS[:1] if part.tiny else KINDS:
        if part.left() <= 0:
            part.skip(kind, "no time was left")
            continue
        worker = Worker([sys.executable, __file__, kind])
        try:
            said = worker.ask("load", shape, part.tiny)
            if "why_not" in said:
                part.skip(kind, said["why_not"])
                continue
            part.put("versions", said)
            for what, tokens in (("decode", CONTEXT), ("prefill", PREFILL)):
                found = worker.ask(what)
                if "why_not" in found:
                    part.skip(f"{kind}, {what}", found["why_not"])
                else:
                    part.row(kind=kind, what=what, tokens=tokens, seconds=Spread.of(found["samples"]))
        except SystemExit:
            part.skip(kind, "its process ended early; its message is in the log")
        finally:
            worker.close()


if __name__ == "__main__":
    serve(lambda: Peer(sys.argv[1]))
