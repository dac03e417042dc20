"""llama.cpp as a peer of tests: the library inside the `xllamacpp` wheel, in a process of its own.

    python tests/peer_llama_cpp.py JOBS.json RESULTS.npz

A job is a GGUF file with a text, of which the token ids are wanted, or with token ids, of which the logits are wanted
or the `count` most likely tokens after them.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs the wheel `xllamacpp` of the extra `test`"
)


def logits(jobs: Sequence[tuple[Path, Sequence[int]]]) -> list[np.ndarray]:
    """The logits after each token of each job's ids, float32 `[seq, vocab]`."""
    return _run([{"path": str(path), "ids": list(ids)} for path, ids in jobs])


def greedy(path: Path, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The `count` most likely tokens after each prompt, one after the other."""
    found = _run([{"path": str(path), "ids": list(ids), "count": count} for ids in prompts])
    return [list(map(int, tokens)) for tokens in found]


def token_ids(paths: Sequence[Path], texts: Sequence[str]) -> list[list[list[int]]]:
    """For each file the token ids of each text, as llama.cpp splits it."""
    rows = _run([{"path": str(path), "text": text} for path in paths for text in texts])
    ids = [list(map(int, row)) for row in rows]
    return [ids[start : start + len(texts)] for start in range(0, len(ids), len(texts))]


def _run(jobs: list[dict[str, Any]]) -> list[np.ndarray]:
    with tempfile.TemporaryDirectory() as directory:
        asked, answered = Path(directory, "jobs.json"), Path(directory, "results.npz")
        asked.write_text(json.dumps(jobs), encoding="utf-8")
        command = [sys.executable, __file__, str(asked), str(answered)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, f"llama.cpp ended with {ran.returncode}: {ran.stderr[-2000:]}"
        with np.load(answered) as results:
            return [results[str(number)] for number in range(len(jobs))]


def main() -> None:
    """The command."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from cpu_peers import LlamaCpp, libraries
    from reference.make_tokenizer_reference import LlamaCpp as Vocabulary

    library = next(path for path in libraries() if "xllamacpp" in path)
    results: dict[str, np.ndarray] = {}
    opened: dict[str, LlamaCpp] = {}
    vocabularies: dict[str, Vocabulary] = {}
    with tempfile.TemporaryDirectory() as directory:
        for number, job in enumerate(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))):
            path, ids = job["path"], job.get("ids")
            if "text" in job:
                if path not in vocabularies:
                    vocabularies[path] = Vocabulary(path)
                results[str(number)] = np.asarray(vocabularies[path].encode(job["text"]), np.int64)
                continue
            if path not in opened:
                opened[path] = LlamaCpp(library, path, threads=1, context=512)
            if "count" in job:
                results[str(number)] = np.asarray(opened[path].greedy(ids, job["count"]))
            else:
                opened[path].save_logits(ids, f"{directory}/logits.npy")
                results[str(number)] = np.load(f"{directory}/logits.npy")
    np.savez(sys.argv[2], **results)


if __name__ == "__main__":
    main()
