"""A model loads and answers with few packages installed: those of servers, grammars and pads are imported late."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# What a GPU machine that is only lent may lack. The server, grammars, GGUF's and pads' packages, and where caches are.
MISSING = (
    "beartype",
    "cryptography",
    "fastapi",
    "gguf",
    "httptools",
    "llguidance",
    "platformdirs",
    "prometheus_client",
    "pydantic",
    "uvicorn",
    "uvloop",
)

PROGRAM = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {MISSING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
sys.path.insert(0, {str(ROOT)!r})

import fusedllm
from fusedllm.weights.random import random_checkpoint

config = fusedllm.ModelConfig(
    family="llama", vocab_size=199, hidden_size=48, intermediate_size=80, num_layers=1, num_heads=6, num_kv_heads=2,
    head_dim=8, max_position=256, tie_embeddings=True, eos_token_ids=(2,),
)
engine = fusedllm.EngineConfig(max_context=32, prefill_buckets=(16,), batch_buckets=(1,), decode_steps=2)
llm = fusedllm.load(random_checkpoint(config, "float32"), engine=engine)
(completion,) = llm.generate([[1, 2, 3]], max_tokens=3, temperature=0, ignore_eos=True)
assert len(completion.token_ids) == 3
print("answered")
"""


def test_a_model_loads_and_answers_without_packages_that_it_does_not_use(tmp_path):
    environment = {**os.environ, "XLA_FLAGS": "", "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("FUSEDLLM_CACHE", None)
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert ran.stdout.split() == ["answered"], ran.stderr
    assert (tmp_path / "fusedllm" / "programs").is_dir()
