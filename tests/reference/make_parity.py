"""Logits of the tiny checkpoints from HF transformers (float32, eager attention), stored for `tests/test_parity.py`.

    python -m tests.reference.make_parity            # writes tests/data/parity/*.npz
    python -m tests.reference.make_parity --check    # compares with what is stored

Needs the extra `reference`. Each case of `tiny.py` becomes one file of less than 30 KB.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from . import tiny

STORED = Path(__file__).parent.parent / "data" / "parity"

# Smallest gap, in units of the logits' range, between the best and the second best token on the greedy part. Both
# may be off by the parity tolerance of 1e-4: an implementation within tolerance can't choose differently.
CLEAR_CHOICE = 3e-4


def model(name: str, **changes: Any) -> Any:
    """A case as a transformers model, its configuration changed by `changes`."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        path = tiny.write(name, Path(directory), **changes)
        loaded, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    problems = {kind: keys for kind, keys in report.items() if keys}
    if problems:
        raise SystemExit(f"{name}: transformers and the checkpoint disagree about the tensors: {problems}")
    return loaded.eval()


def logits(reference: Any, ids: np.ndarray) -> np.ndarray:
    """The float32 logits `[seq, vocab]` of `ids` in one forward pass without a cache."""
    import torch

    with torch.inference_mode():
        return reference(torch.tensor(ids)[None], use_cache=False).logits[0].float().numpy()


def make(name: str) -> dict[str, np.ndarray]:
    """What is stored of a case: `ids` `[seq]`, `logits` `[seq, vocab]`, `digest` of the checkpoint.

    The ids are the case's prompt and its greedy continuation, each token chosen by a forward pass over all before it.
    """
    reference = model(name)
    ids = tiny.prompt(name)
    for _ in range(tiny.GREEDY_TOKENS):
        ids = np.append(ids, logits(reference, ids)[-1].argmax())
    values = logits(reference, ids)
    best = np.sort(values[tiny.PROMPT_TOKENS - 1 : -1], axis=-1)
    gap = (best[:, -1] - best[:, -2]).min() / np.ptp(values)
    if gap < CLEAR_CHOICE:
        raise SystemExit(f"{name}: two tokens are within {gap:.1e} of the logits' range; give the case another prompt.")
    return {"ids": ids.astype(np.int32), "logits": values, "digest": np.array(tiny.digest(name))}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the stored files, write nothing")
    parser.add_argument("names", nargs="*", default=list(tiny.CASES), help="cases (default: all)")
    arguments = parser.parse_args()
    failed = False
    for name in arguments.names:
        made, path = make(name), STORED / f"{name}.npz"
        scale = float(np.ptp(made["logits"]))
        if arguments.check:
            with np.load(path) as stored:
                error = float(np.abs(stored["logits"] - made["logits"]).max()) / scale
                same = np.array_equal(stored["ids"], made["ids"]) and str(stored["digest"]) == str(made["digest"])
            # Another build of torch sums in another order: rounding differs, and nothing else may.
            failed |= error > 1e-5 or not same
            print(f"{name:26} same ids and weights: {same}, max difference {error:.1e} of the range")
        else:
            STORED.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, **made)
            print(f"{name:26} range {scale:5.1f}, deviation {made['logits'].std():.2f}, {path.stat().st_size} B")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
