"""lm-eval's `local-completions` with the remote tokenizer, on tasks of this repository, against a served model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving import MODEL, app_of, on_a_port

TASKS = Path(__file__).parent / "data" / "lm-eval"


@pytest.mark.reference
def test_lm_eval_scores_and_generates(served_llm, tmp_path):
    pytest.importorskip("lm_eval")
    shutil.copytree(TASKS, tmp_path / "tasks")
    with on_a_port(app_of(served_llm)) as url:
        arguments = f"model={MODEL},base_url={url}/v1/completions,tokenizer_backend=remote,num_concurrent=4"
        subprocess.run(
            [
                sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments,
                "--tasks", "fusedllm_capitals,fusedllm_continued", "--include_path", str(tmp_path / "tasks"),
                "--output_path", str(tmp_path / "results"), "--log_samples",
            ],
            check=True,
            cwd=tmp_path / "tasks",
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        )  # fmt: skip
    (found,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(found.read_text())["results"]
    assert results["fusedllm_capitals"]["acc,none"] >= 5 / 6
    (samples,) = (tmp_path / "results").rglob("samples_fusedllm_capitals_*.jsonl")
    ids = served_llm.encode("The capital of France is Paris")
    expected = float(served_llm.engine.score(ids)[-1])
    first = next(s for s in map(json.loads, samples.read_text().splitlines()) if "France" in s["doc"]["question"])
    # Two programs of the same arithmetic in another order.
    assert float(first["resps"][0][0][0]) == pytest.approx(expected, abs=2e-2)
    (samples,) = (tmp_path / "results").rglob("samples_fusedllm_continued_*.jsonl")
    texts = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert any("Paris" in text for text in texts)
