"""300 seeded mutations of an Arrow file: our exception or the checkpoint that was written, never anything else."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa

MUTATIONS = 300
SEED = 20
# What one read may leave behind in memory: far above the file's 60 KB, far below what a forged length asks for.
MEMORY_LIMIT = 100e6


def mutate(content: bytes, described: np.ndarray, rng: np.random.Generator, kind: int) -> bytes:
    """`content` with a bit flipped, a byte or a length replaced where no tensor lies, or cut or shifted anywhere."""
    changed = bytearray(content)
    at = int(rng.choice(described))
    if kind == 0:
        changed[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        changed[at] = int(rng.integers(256))
    elif kind == 2:
        at = min(at // 4 * 4, len(changed) - 4)
        changed[at : at + 4] = int(rng.choice([0, 1, 8, 64, 2**31 - 1, 2**31, 2**32 - 1])).to_bytes(4, "little")
    elif kind == 3:
        del changed[int(rng.integers(len(changed))) :]
    elif kind == 4:
        anywhere = int(rng.integers(len(changed)))
        del changed[anywhere : anywhere + int(rng.integers(1, 64))]
    else:
        anywhere = int(rng.integers(len(changed)))
        changed[anywhere:anywhere] = rng.bytes(int(rng.integers(1, 64)))
    return bytes(changed)


def outcomes(directory: Path, count: int, seed: int) -> Counter[str]:
    """How often a mutated file was refused or read unchanged; runs in a process of its own, which may die."""
    import resource

    from fusedllm.config import ModelConfig
    from fusedllm.errors import CheckpointError
    from fusedllm.weights import arrow
    from fusedllm.weights.random import random_checkpoint

    config = ModelConfig("llama", 64, 32, 48, 2, 4, 2, 8, 128, tie_embeddings=True)
    whole, mutated = directory / "whole.arrow", directory / "mutated.arrow"
    arrow.write(random_checkpoint(config, "bfloat16"), whole)
    content = whole.read_bytes()
    described = np.ones(len(content), bool)
    truth = {name: tensor.read().tobytes() for name, tensor in arrow.read(whole).tensors.items()}
    reader = pa.ipc.open_file(pa.BufferReader(content))
    for index in range(reader.num_record_batches):
        batch, metadata = reader.get_batch_with_custom_metadata(index)
        start = int(metadata[b"fusedllm.offset"])
        described[start : start + len(truth[batch["layer_name"][0].as_py()])] = False
    rng = np.random.default_rng(seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen: Counter[str] = Counter()
    for turn in range(count):
        mutated.write_bytes(mutate(content, np.flatnonzero(described), rng, turn % 6))
        try:
            found = arrow.read(mutated)
        except CheckpointError as error:
            seen["refused" if str(mutated) in str(error) and "\n" not in str(error) else f"unclear: {error}"] += 1
            continue
        assert found.config == config
        assert {name: tensor.read().tobytes() for name, tensor in found.tensors.items()} == truth
        seen["unchanged"] += 1
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert kilobytes * 1024 < MEMORY_LIMIT
    return seen


def test_a_damaged_file_is_refused_or_changes_nothing(tmp_path):
    # In a process of its own, so that a crash inside the Arrow library is a failure and not the end of the tests.
    ran = subprocess.run(
        [sys.executable, "-X", "faulthandler", __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert ran.returncode == 0, ran.stderr
    refused, unchanged = (int(number) for number in ran.stdout.split())
    assert refused + unchanged == MUTATIONS
    # Padding and the schema's second copy can change without a consequence; most of the rest must be noticed.
    assert refused > MUTATIONS / 2


if __name__ == "__main__":
    # By hand: `python tests/test_fuzz_arrow.py "" 5000 7` runs 5,000 mutations of seed 7.
    with tempfile.TemporaryDirectory() as scratch:
        arguments = sys.argv[1:] + ["", "", ""][len(sys.argv) - 1 :]
        counted = outcomes(Path(arguments[0] or scratch), int(arguments[1] or MUTATIONS), int(arguments[2] or SEED))
    print(counted["refused"], counted["unchanged"])
