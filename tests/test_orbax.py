"""Orbax checkpoints: the same bits back, lazily or straight into a sharding."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from fusedllm.config import ModelConfig
from fusedllm.errors import CheckpointError
from fusedllm.text.data import TokenizerData
from fusedllm.weights import orbax
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor
from fusedllm.weights.load import load_params
from fusedllm.weights.random import random_checkpoint, random_params

CONFIG = ModelConfig("llama", 64, 32, 48, 2, 4, 2, 8, 128, tie_embeddings=False, eos_token_ids=(2,))
TOKENIZER = TokenizerData(tokenizer_json="{}", chat_template="{{ x }}", bos_token="<s>")


def checkpoint(dtype: str = "bfloat16") -> Checkpoint:
    return dataclasses.replace(random_checkpoint(CONFIG, dtype, seed=5), tokenizer=TOKENIZER)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("orbax") / "model.orbax"
    orbax.write(checkpoint(), path)
    return path


def equal(left, right) -> bool:
    return all(
        a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_is_restored_bit_for_bit(tmp_path, dtype):
    written = checkpoint(dtype)
    values = written.tensors["model.norm.weight"].read().copy()
    values[:3] = [-0.0, np.nan, np.inf]
    odd = dataclasses.replace(written.tensors["model.norm.weight"], read=lambda: values)
    written = dataclasses.replace(written, tensors={**written.tensors, odd.name: odd})
    orbax.write(written, tmp_path / "model")
    found = orbax.read(tmp_path / "model")
    assert (found.config, found.tokenizer, found.format) == (CONFIG, TOKENIZER, "orbax")
    assert found.tensors.keys() == written.tensors.keys()
    for name, tensor in found.tensors.items():
        expected = written.tensors[name].read()
        assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
        assert tensor.read().tobytes() == expected.tobytes()


def test_a_checkpoint_that_is_there_is_neither_replaced_nor_removed(tmp_path):
    orbax.write(checkpoint(), tmp_path / "model")
    with pytest.raises(CheckpointError, match="exists already"):
        orbax.write(checkpoint("float32"), tmp_path / "model")
    assert equal(load_params(orbax.read(tmp_path / "model"))[0], random_params(CONFIG, "bfloat16", seed=5))


RETRIED = """
import sys
from pathlib import Path
import orbax.checkpoint as ocp
from fusedllm.config import ModelConfig
from fusedllm.weights import orbax
from fusedllm.weights.random import random_checkpoint

checkpoint = random_checkpoint(ModelConfig("llama", 64, 32, 48, 2, 4, 2, 8, 128), "float32")
save = ocp.Checkpointer.save
def refuse(*arguments):
    raise RuntimeError("no")
ocp.Checkpointer.save = refuse
try:
    orbax.write(checkpoint, Path(sys.argv[1]))
except orbax.CheckpointError:
    ocp.Checkpointer.save = save
    orbax.write(checkpoint, Path(sys.argv[1]))
"""


def test_a_second_attempt_after_a_failed_one_outlives_the_process(tmp_path):
    subprocess.run(
        [sys.executable, "-c", RETRIED, str(tmp_path / "model")],
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert load_params(orbax.read(tmp_path / "model"))[1].tensors > 0


def test_a_tensor_can_be_read_in_any_order_and_again(saved):
    tensors = orbax.read(saved).tensors
    for name in [*reversed(tensors), *tensors]:
        assert tensors[name].read().tobytes() == checkpoint().tensors[name].read().tobytes()


def test_a_checkpoint_may_be_moved(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "elsewhere")
    params, _ = load_params(orbax.read(tmp_path / "elsewhere"))
    assert equal(params, random_params(CONFIG, "bfloat16", seed=5))


def test_restoring_equals_loading(saved):
    config, params = orbax.restore_params(saved)
    assert config == CONFIG
    assert equal(params, load_params(orbax.read(saved))[0])


def test_restoring_casts(saved):
    _, params = orbax.restore_params(saved, dtype="float32")
    assert equal(params, load_params(orbax.read(saved), dtype="float32")[0])


SHARDED = """
import sys, jax, numpy as np
from pathlib import Path
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from fusedllm.model.params import describe, map_specs
from fusedllm.weights import orbax
from fusedllm.weights.random import random_params

assert len(jax.devices()) == 8
path = Path(sys.argv[1])
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
axes = {"ffn": "model", "vocab": "model", "heads_dim": "model"}
config = orbax.read(path).config
shardings = map_specs(lambda s: NamedSharding(mesh, P(*(axes.get(a) for a in s.axes))), describe(config))
_, params = orbax.restore_params(path, shardings)
_, replicated = orbax.restore_params(path, NamedSharding(mesh, P()))
for array, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True):
    assert array.sharding == wanted
assert params.layers[0].gate.addressable_shards[0].data.shape == (48 // 4, 32)
truth = jax.tree.leaves(random_params(config, "bfloat16", seed=5))
for restored in (params, replicated):
    for array, expected in zip(jax.tree.leaves(restored), truth, strict=True):
        assert np.asarray(array).tobytes() == np.asarray(expected).tobytes()
print("same")
"""


def test_each_of_eight_devices_reads_its_own_part(saved):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-c", SHARDED, str(saved)],
        capture_output=True,
        text=True,
        env={**os.environ, **flags, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parent.parent,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "same\n"


def test_nothing_is_said_on_the_terminal(saved, tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from fusedllm.weights import orbax; from fusedllm.weights.load import load_params\n"
        "checkpoint = orbax.read(Path(sys.argv[1])); load_params(checkpoint)\n"
        "orbax.write(checkpoint, Path(sys.argv[2])); orbax.restore_params(Path(sys.argv[2]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(saved), str(tmp_path / "again")],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def damaged(saved: Path, target: Path) -> Path:
    shutil.copytree(saved, target)
    return target


def test_a_newer_format_version_is_refused_with_both_numbers(saved, tmp_path):
    path = damaged(saved, tmp_path / "newer")
    model = json.loads((path / "model" / "metadata").read_text())
    (path / "model" / "metadata").write_text(json.dumps({**model, "format_version": 9}))
    with pytest.raises(CheckpointError, match="format version 9; this fusedllm reads up to 1"):
        orbax.read(path)


@pytest.mark.parametrize("lost", ["params", "model", "params/_METADATA", "model/metadata"])
def test_a_missing_part_is_refused(saved, tmp_path, lost):
    path = damaged(saved, tmp_path / "partial")
    shutil.rmtree(path / lost) if (path / lost).is_dir() else (path / lost).unlink()
    with pytest.raises(CheckpointError, match="partial"):
        orbax.read(path)


def test_lost_arrays_are_refused_when_they_are_read(saved, tmp_path):
    path = damaged(saved, tmp_path / "partial")
    for data in path.glob("params/**/d"):
        shutil.rmtree(data)
    with pytest.raises(CheckpointError, match="partial"):
        load_params(orbax.read(path))


def test_a_name_that_is_the_beginning_of_another_is_refused(tmp_path):
    ones = np.ones(2, np.float32)
    tensors = {name: LazyTensor(name, (2,), ones.dtype, 8, lambda: ones) for name in ("a", "a.b")}
    for order in (["a", "a.b"], ["a.b", "a"]):
        with pytest.raises(CheckpointError, match="nested"):
            orbax.nest({name: tensors[name] for name in order})


def test_nesting_has_an_inverse():
    flat = {"a.b.c": 1, "a.b.d": 2, "e": 3}
    assert orbax.flatten(orbax.nest(flat)) == flat
