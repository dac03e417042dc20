"""What test_sharding_models.py runs in processes of its own, with as many devices as it asks for.

`python sharding_peer.py OUT MESH...` runs a tiny model on each mesh (`one` is a single device), and writes what came
out to the file OUT, as JSON. `PEERS=host:port,processes,id` in the environment makes it one of several processes.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import sys
from pathlib import Path

import numpy as np

from fusedllm.config import ModelConfig
from fusedllm.engine.compile_guard import forbid_compile
from fusedllm.engine.config import EngineConfig
from fusedllm.engine.replicas import Replicas
from fusedllm.engine.runner import Runner
from fusedllm.llm import LLM, load
from fusedllm.sharding.processes import connect
from fusedllm.weights.checkpoint import Checkpoint
from fusedllm.weights.random import random_checkpoint

# Whatever is split can be split by four, into parts that fill no whole panels of 16 rows.
CONFIG = ModelConfig(
    family="llama",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    max_position=128,
    tie_embeddings=True,
    attention_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    qk_norm=True,
    eos_token_ids=(2,),
)
ENGINE = EngineConfig(max_context=64, cache_tokens=256, prefill_buckets=(16,), batch_buckets=(4,), decode_steps=4)
IDS = [(7 * at * at + 3) % 96 for at in range(40)]
PROMPTS = [[(at * 7 + 5 * seed) % 96 for at in range(5 + 6 * seed)] for seed in range(5)]
COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def checkpoint() -> Checkpoint:
    return random_checkpoint(CONFIG, "float32", seed=4)


def runner_of(llm: LLM) -> Runner:
    return llm.engine.runner


def compiled(llm: LLM) -> dict[str, object]:
    """What the compiled programs exchange, and of decode the bytes that it reuses beside those of a device's cache."""
    runner = runner_of(llm)
    batch = runner.engine.max_batch
    state = (runner._params, runner._cache)
    decode = runner.trace_decode(batch).lower().compile()
    tokens = np.zeros((1, 16), np.int32)
    table = runner._table(())
    prefill = runner._prefill.trace(*state, tokens, np.zeros(1, np.int32), table, np.int32(0)).lower().compile()
    pages = [array.addressable_shards[0].data.nbytes for array in (*runner._cache.k, *runner._cache.v)]
    return {
        "exchanged": {
            name: collections.Counter(COLLECTIVE.findall(program.as_text()))
            for name, program in (("decode", decode), ("prefill", prefill))
        },
        "aliased": [decode.memory_analysis().alias_size_in_bytes, sum(pages)],
    }


def answers(llm: LLM, prompts: list[list[int]], **options: float) -> list[tuple[int, ...]]:
    return [one.token_ids for one in llm.generate(prompts, max_tokens=8, ignore_eos=True, **options)]


def report(mesh: str) -> dict[str, object]:
    llm = load(checkpoint(), dtype="float32", engine=ENGINE, mesh=None if mesh == "one" else mesh)
    alone = "PEERS" not in os.environ
    if alone:
        llm.warm_up()
    with forbid_compile() if alone else contextlib.nullcontext():
        greedy = answers(llm, PROMPTS)
        drawn = answers(llm, PROMPTS, temperature=0.9, seed=5)
        unseeded = answers(llm, PROMPTS[:2], temperature=0.9)
    engines = llm.engine.engines if isinstance(llm.engine, Replicas) else (llm.engine,)
    runner = runner_of(llm)
    gate = runner._params.layers[0].gate
    told = {
        "greedy": greedy,
        "drawn": drawn,
        "unseeded": unseeded,
        "logits": llm.logits(IDS).tolist(),
        "finished": [sum(engine.stats().finished.values()) for engine in engines],
        "gate": [list(shard.data.shape) for shard in gate.addressable_shards],
        "cache": [list(shard.data.shape) for shard in runner._cache.k[0].addressable_shards],
        "pages": [engine.config.num_pages for engine in engines],
        "seats": [engine.config.max_batch for engine in engines],
        "devices": [sorted(device.id for device in engine.runner._cache.k[0].devices()) for engine in engines],
    }
    return told | compiled(llm) if alone else told


if __name__ == "__main__":
    if "PEERS" in os.environ:
        address, count, own = os.environ["PEERS"].split(",")
        connect(address, int(count), int(own))
    made = {mesh: report(mesh) for mesh in sys.argv[2:]}
    Path(sys.argv[1]).write_text(json.dumps(made))
