"""Converting: the same floats through every format, and a target that is whole or not there."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_gguf import as_llama_cpp_writes, model_tensors, write_gguf

from fusedllm.config import ModelConfig
from fusedllm.errors import CheckpointError
from fusedllm.weights import files
from fusedllm.weights.checkpoint import Checkpoint
from fusedllm.weights.convert import convert
from fusedllm.weights.load import load_params
from fusedllm.weights.open import open_checkpoint
from fusedllm.weights.random import random_checkpoint

CONFIG = ModelConfig("llama", 64, 32, 48, 2, 4, 2, 8, 128, tie_embeddings=True, eos_token_ids=(2,))
TARGETS = ("model.arrow", "model.gguf", "model.orbax", "model.safetensors")


def checkpoint() -> Checkpoint:
    return random_checkpoint(CONFIG, "float32", seed=2)


def floats(path: Path) -> list[bytes]:
    params, _ = load_params(open_checkpoint(path))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def assert_the_round_trip_is_exact(source: Path, directory: Path) -> None:
    first = open_checkpoint(source)
    expected, path = floats(source), source
    for target in TARGETS:
        path = convert(path, directory / target)
        found = open_checkpoint(path)
        assert (found.format, found.config) == (Path(target).suffix[1:], first.config)
        assert floats(path) == expected
    found = open_checkpoint(directory / "model.orbax")
    assert found.tokenizer == first.tokenizer
    assert sorted(entry.name for entry in directory.iterdir() if entry != source) == sorted(TARGETS)


def test_gguf_to_arrow_to_orbax_to_safetensors_gives_equal_bits(tmp_path):
    source = write_gguf(tmp_path / "tiny.gguf", as_llama_cpp_writes(model_tensors()))
    assert_the_round_trip_is_exact(source, tmp_path)


@pytest.mark.slow
def test_smollm2_goes_through_every_format_with_equal_bits(tmp_path):
    from fusedllm.errors import SourceError
    from fusedllm.weights.registry import fetch

    try:
        source = fetch("smollm2-135m", progress=False)
    except SourceError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    assert_the_round_trip_is_exact(source, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
def test_a_dtype_can_be_asked_for(tmp_path, target):
    convert(checkpoint(), tmp_path / target, dtype="bfloat16")
    found = open_checkpoint(tmp_path / target)
    for name, tensor in found.tensors.items():
        # A GGUF has its vectors in float32: llama.cpp asks for that, and no bit is lost.
        is_vector = len(tensor.shape) == 1 and target.endswith(".gguf")
        assert str(tensor.dtype) == ("float32" if is_vector else "bfloat16")
        wanted = checkpoint().tensors[name].read().astype("bfloat16")
        assert tensor.read().astype("bfloat16").tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("model", {}, "names no format; say --format arrow or gguf or orbax or safetensors"),
        ("model.arrow", {"format": "onnx"}, "the format 'onnx' is unknown"),
        ("model.arrow", {"dtype": "int8"}, "'int8' is not a dtype to convert to; known are: float32"),
    ],
)
def test_what_can_not_be_made_is_refused_before_anything_is_read(tmp_path, target, options, message):
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "does not matter", tmp_path / target, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", TARGETS)
def test_what_exists_is_replaced_only_by_force(tmp_path, target):
    convert(checkpoint(), tmp_path / target)
    before = floats(tmp_path / target)
    other = random_checkpoint(CONFIG, "float32", seed=99)
    with pytest.raises(CheckpointError, match="exists already: choose another name, or pass --force"):
        convert(other, tmp_path / target)
    assert floats(tmp_path / target) == before
    convert(other, tmp_path / target, force=True)
    assert floats(tmp_path / target) != before
    assert [entry.name for entry in tmp_path.iterdir()] == [target]


def test_a_directory_and_a_file_replace_each_other(tmp_path):
    for name in ("arrow", "orbax", "arrow"):
        convert(checkpoint(), tmp_path / "model", format=name, force=True)
        assert open_checkpoint(tmp_path / "model").format == name
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def failing(error: BaseException) -> Checkpoint:
    """A checkpoint whose last tensor can't be read."""
    base = checkpoint()
    name = list(base.tensors)[-1]

    def read() -> np.ndarray:
        raise error

    return dataclasses.replace(base, tensors={**base.tensors, name: dataclasses.replace(base.tensors[name], read=read)})


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), CheckpointError("broken"), RuntimeError("a bug"), MemoryError()]
)
def test_an_interrupted_write_leaves_nothing_and_an_older_target_as_it_was(tmp_path, target, error, existing):
    before = floats(convert(checkpoint(), tmp_path / target)) if existing else None
    with pytest.raises(type(error)):
        convert(failing(error), tmp_path / target, force=existing)
    assert [entry.name for entry in tmp_path.iterdir()] == ([target] if existing else [])
    assert before is None or floats(tmp_path / target) == before


@pytest.mark.parametrize("target", TARGETS)
def test_a_full_disk_is_one_sentence(tmp_path, target):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(CheckpointError, match=r"its disk is full \([\d,]+ MB free\): free some space"):
        convert(failing(full), tmp_path / target)
    assert list(tmp_path.iterdir()) == []


# A limit on the size of a file makes the system itself refuse in the middle of a write, in every library.
LIMITED = """
import resource, signal, sys
from pathlib import Path
from fusedllm.config import ModelConfig
from fusedllm.errors import CheckpointError
from fusedllm.weights.convert import convert
from fusedllm.weights.random import random_checkpoint
import fusedllm.weights.gguf_write, fusedllm.weights.orbax, fusedllm.weights.safetensors

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
config = ModelConfig("llama", 4096, 64, 48, 2, 4, 2, 16, 128, tie_embeddings=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
for name in sys.argv[2:]:
    try:
        convert(random_checkpoint(config, "float32"), Path(sys.argv[1], name))
    except CheckpointError as error:
        assert name in str(error) and "tmp-" not in str(error).split("can't")[0], error
        print(name)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource limits")
def test_a_write_that_the_system_refuses_half_way_leaves_nothing(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), *TARGETS],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == list(TARGETS)
    assert list(tmp_path.iterdir()) == []


SLOW = """
import sys, time
from pathlib import Path
from fusedllm.config import ModelConfig
from fusedllm.weights.convert import convert
from fusedllm.weights import random

draw = random._draw
def slowly(*arguments):
    print("reading", flush=True)
    time.sleep(0.5)
    return draw(*arguments)
random._draw = slowly
config = ModelConfig("llama", 64, 32, 48, 2, 4, 2, 8, 128)
try:
    convert(random.random_checkpoint(config, "float32"), Path(sys.argv[1]))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl-C otherwise")
def test_ctrl_c_leaves_nothing(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path / "model.arrow")],
        stdout=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    ) as process:
        assert process.stdout.readline() == b"reading\n"
        assert process.stdout.readline() == b"reading\n"
        assert [entry.name.startswith(".model.arrow.tmp-") for entry in tmp_path.iterdir()] == [True]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_target_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"model\.arrow can't be written: (Not a directory|File exists)"):
        convert(checkpoint(), tmp_path / "file" / "model.arrow")


def test_a_source_that_is_not_there_leaves_no_target(tmp_path):
    with pytest.raises(CheckpointError, match="there is no file or directory"):
        convert(tmp_path / "none.gguf", tmp_path / "model.arrow")
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "model.arrow"

    def both_write() -> None:
        with files.write_atomically(target) as temporary:
            temporary.write_text("ours")
            target.write_text("theirs")

    with pytest.raises(CheckpointError, match="exists already"):
        both_write()
    assert target.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(files, "flush_to_disk", lambda path: order.append(("flush", path.exists())))
    monkeypatch.setattr(files, "replace", lambda source, target: order.append(("replace", source.exists())))
    with files.write_atomically(tmp_path / "a") as temporary:
        temporary.write_text("content")
    assert order == [("flush", True), ("replace", True)]


def test_progress_counts_every_byte(tmp_path, capfd):
    convert(checkpoint(), tmp_path / "model.arrow", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "writing model.arrow: 100%" in err
