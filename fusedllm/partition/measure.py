"""Digests of what runs: the weights as they lie in the checkpoint, and this package's own files."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedllm.partition.manifest import Manifest

if TYPE_CHECKING:
    from fusedllm.weights.checkpoint import Checkpoint, LazyTensor

# Hashed at a time: large enough to cost nothing, small enough for a progress bar to move.
CHUNK_BYTES = 16 * 2**20

# The pages of the file are let go of each time that so many bytes have been read.
RELEASE_BYTES = 256 * 2**20

PACKAGE = Path(__file__).resolve().parent.parent

# What is imported, and what the server sends to browsers. Compiled libraries differ from machine to machine: what was
# compiled, and of which compiler, is for the measurement of the whole machine to say.
SOURCES = ("**/*.py", "serve/page/*")


def manifest_of(checkpoint: Checkpoint, policy: str, version: str, progress: bool = False) -> Manifest:
    """The manifest of a server that runs `checkpoint` under `policy`; reads all of the weights once.

    `version` is this package's.

    Raises:
      CheckpointError: a tensor can't be read.
    """
    tensors = checkpoint.tensors.values()
    tokenizer = checkpoint.tokenizer
    return Manifest(
        weights=weights_sha256(checkpoint, progress),
        config=_text_sha256(_canonical(checkpoint.config.to_dict())),
        tokenizer=None if tokenizer is None else _text_sha256(_canonical(json.loads(tokenizer.to_json()))),
        quantization=dict(Counter(tensor.quantization or str(tensor.dtype) for tensor in tensors)),
        policy=policy,
        version=version,
        code=code_sha256(),
    )


def weights_sha256(checkpoint: Checkpoint, progress: bool = False) -> str:
    """SHA-256 over every tensor in the order of the names: its name, dtype or scheme, shape, and stored bytes.

    Where a tensor is quantized its blocks or codes are hashed as they are. The file's format does not matter: tensors
    that are equal to the byte give equal digests. Nothing of a tensor can pass for a part of another, as each is led
    by a header that says how many bytes follow.
    """
    from tqdm import tqdm

    digest = hashlib.sha256()
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    unreleased = 0
    with tqdm(
        total=total, desc="hashing", unit="B", unit_scale=True, leave=False, disable=None if progress else True
    ) as bar:
        for name in sorted(checkpoint.tensors):
            tensor = checkpoint.tensors[name]
            kind, buffers = _stored(tensor)
            parts = [[str(buffer.dtype), list(buffer.shape)] for buffer in buffers]
            _update_framed(digest, _canonical([name, kind, list(tensor.shape), parts]).encode("ascii"))
            for buffer in buffers:
                for chunk in _chunks(buffer):
                    digest.update(chunk)
                    bar.update(len(chunk))
                    unreleased += len(chunk)
            if unreleased >= RELEASE_BYTES:
                checkpoint.release()
                unreleased = 0
    return digest.hexdigest()


def code_sha256(package: Path = PACKAGE) -> str:
    """SHA-256 over the names and contents of this package's own files (`SOURCES`), in the order of their names."""
    digest = hashlib.sha256()
    files = {file.relative_to(package).as_posix(): file for pattern in SOURCES for file in package.glob(pattern)}
    for name in sorted(files):
        _update_framed(digest, name.encode())
        _update_framed(digest, files[name].read_bytes())
    return digest.hexdigest()


def _stored(tensor: LazyTensor) -> tuple[str, list[Any]]:
    """How a tensor is stored, and its buffers as NumPy arrays."""
    import numpy as np

    if tensor.read_quantized is None:
        return str(tensor.dtype), [np.asarray(tensor.read())]
    array = tensor.read_quantized()
    leaves = (array.values, array.scales, array.zeros)
    return array.scheme.name, [np.asarray(leaf) for leaf in leaves if leaf is not None]


def _chunks(buffer: Any) -> Iterator[memoryview]:
    import numpy as np

    # (uint8, as bfloat16 has no buffer that Python knows.)
    data = np.ascontiguousarray(buffer).reshape(-1).view(np.uint8).data
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


def _update_framed(digest: Any, data: bytes) -> None:
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()
