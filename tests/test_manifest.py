"""Manifests and the digests in them: what changes them, what does not, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from attestation_stand_in import MANIFEST
from conftest import TINY
from hypothesis import strategies as st
from packing import blocks, raw

from fusedllm.cli import main, serve
from fusedllm.errors import AttestationError, SettingsError
from fusedllm.model.params import specs
from fusedllm.partition import measure
from fusedllm.partition.manifest import Manifest
from fusedllm.serve.settings import ServerSettings
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor
from fusedllm.weights.convert import convert
from fusedllm.weights.open import open_checkpoint

HEX_DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)
MANIFESTS = st.builds(
    Manifest,
    weights=HEX_DIGESTS,
    config=HEX_DIGESTS,
    tokenizer=st.none() | HEX_DIGESTS,
    quantization=st.dictionaries(st.text(max_size=8), st.integers(1, 10**6), max_size=4),
    policy=st.text(max_size=20),
    version=st.text(max_size=20),
    code=HEX_DIGESTS,
)


@hypothesis.given(MANIFESTS)
def test_a_manifest_reads_as_it_was_written(manifest):
    assert Manifest.from_text(manifest.text) == manifest
    assert manifest.text.isascii()
    assert "\n" not in manifest.text
    assert manifest.sha256 == hashlib.sha256(manifest.text.encode()).digest()


@hypothesis.given(MANIFESTS, MANIFESTS)
def test_manifests_are_equal_if_and_only_if_their_texts_are(one, other):
    assert (one.text == other.text) == (one == other)


@hypothesis.given(MANIFESTS, st.randoms(use_true_random=False))
def test_the_order_of_what_was_counted_does_not_matter(manifest, random):
    items = list(manifest.quantization.items())
    random.shuffle(items)
    assert dataclasses.replace(manifest, quantization=dict(items)).text == manifest.text


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(":", ": ", 1),
        lambda text: "{" + text[1:].replace('"policy":"plain",', "", 1),
        lambda text: text.replace('{"code"', '{"new":1,"code"'),
        lambda text: text.replace('{"code"', '{"code":"' + "0" * 64 + '","code"'),
        lambda text: text.replace('"plain"', "1"),
        lambda text: text.replace("1" * 64, "1" * 63),
        lambda text: text.replace("1" * 64, "A" * 64),
        lambda text: text.replace('"Q4_1":3', '"Q4_1":true'),
        lambda text: text.replace('"Q4_1":3', '"Q4_1":3.0'),
        lambda text: text.replace("manifest-1", "manifest-2"),
        lambda text: json.dumps(dict(reversed(json.loads(text).items())), separators=(",", ":")),
        lambda text: "[" * 60_000,
        lambda text: " " * 10 + "{" + " " * 10**5 + "}",
        lambda text: "null",
        lambda text: "",
    ],
)
def test_a_manifest_that_is_not_canonical_is_refused(change):
    with pytest.raises(AttestationError) as refused:
        Manifest.from_text(change(MANIFEST.text))
    assert str(refused.value).endswith(".")
    assert len(str(refused.value)) < 500


def test_the_last_line_of_a_file_may_end():
    assert Manifest.from_text(MANIFEST.text + "\n") == MANIFEST


def checkpoint_of(arrays):
    tensors = {
        name: LazyTensor(name, array.shape, array.dtype, array.nbytes, lambda array=array: array)
        for name, array in arrays.items()
    }
    return Checkpoint(TINY, tensors, None, "test", None)


ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(ml_dtypes.bfloat16),
    "c": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize(
    "change",
    [
        {"a": ARRAYS["a"] + 1},
        {"a": ARRAYS["a"].reshape(3, 2)},
        {"a": ARRAYS["a"].view(np.int32)},
        {"b": ARRAYS["b"].view(np.float16)},
        {"c": np.zeros((3, 0), np.float32)},
        {"d": np.zeros(0, np.float32)},
        {"a": ARRAYS["a"][:1], "b": ARRAYS["a"][1:]},
    ],
    ids=["value", "shape", "dtype", "dtype of the same size", "empty shape", "empty tensor", "boundary"],
)
def test_the_weights_hash_knows_names_dtypes_shapes_and_bytes(change):
    assert measure.weights_sha256(checkpoint_of(ARRAYS | change)) != measure.weights_sha256(checkpoint_of(ARRAYS))


def test_the_weights_hash_knows_no_order_and_no_layout():
    first = measure.weights_sha256(checkpoint_of(ARRAYS))
    turned = dict(reversed(ARRAYS.items())) | {"a": np.asfortranarray(ARRAYS["a"])}
    assert measure.weights_sha256(checkpoint_of(turned)) == first


def test_the_weights_hash_streams(monkeypatch):
    """In chunks that end anywhere, and with the file's pages let go of."""
    whole = measure.weights_sha256(checkpoint_of(ARRAYS))
    released = []
    monkeypatch.setattr(measure, "CHUNK_BYTES", 5)
    monkeypatch.setattr(measure, "RELEASE_BYTES", 8)
    checkpoint = dataclasses.replace(checkpoint_of(ARRAYS), release=lambda: released.append(1))
    assert measure.weights_sha256(checkpoint) == whole
    assert released


def test_the_manifest_of_the_same_weights_is_the_same_in_another_format(tmp_path):

    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal(spec.shape).astype(np.float32) for name, spec in specs(TINY).items()}
    manifests = []
    for suffix in ("arrow", "safetensors"):
        path = tmp_path / suffix / f"tiny.{suffix}"
        path.parent.mkdir()
        convert(checkpoint_of(arrays), path if suffix == "arrow" else path.parent / "tiny", format=suffix)
        opened = open_checkpoint(path if suffix == "arrow" else path.parent / "tiny")
        manifests.append(measure.manifest_of(opened, "plain", "0"))
    assert manifests[0].weights == measure.weights_sha256(checkpoint_of(arrays))
    assert manifests[0].weights == manifests[1].weights
    assert manifests[0].quantization == {"float32": len(arrays)}


def test_quantized_weights_are_hashed_as_they_are_stored():
    """Decoding them would take longer, and tell two schemes apart only by what they round."""

    def of(name, made):
        def never():
            raise AssertionError("it was decoded")

        array = raw(name, 64, made)
        tensor = LazyTensor("a", array.shape, np.dtype(np.float32), made.nbytes, never, name, lambda: array)
        return measure.weights_sha256(Checkpoint(TINY, {"a": tensor}, None, "test", None))

    made = blocks("Q4_0", 4, 64, np.random.default_rng(0))
    other = made.copy()
    other[3, -1] ^= 1
    assert of("Q4_0", made) == of("Q4_0", made.copy())
    assert of("Q4_0", made) != of("Q4_0", other)


def test_the_code_hash_knows_every_file_and_its_name(tmp_path):
    package = tmp_path / "package"
    shutil.copytree(measure.PACKAGE / "partition", package)
    first = measure.code_sha256(package)
    (package / "__pycache__").mkdir(exist_ok=True)
    (package / "__pycache__" / "plain.cpython-311.pyc").write_bytes(b"compiled")
    assert measure.code_sha256(package) == first
    (package / "plain.py").rename(package / "simple.py")
    renamed = measure.code_sha256(package)
    (package / "simple.py").write_text((package / "simple.py").read_text() + "\n")
    assert len({first, renamed, measure.code_sha256(package)}) == 3
    assert measure.code_sha256() == measure.code_sha256()


@pytest.fixture
def tiny_file(tmp_path):
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal(spec.shape).astype(np.float32) for name, spec in specs(TINY).items()}
    convert(checkpoint_of(arrays), tmp_path / "tiny.arrow", format="arrow")
    return tmp_path / "tiny.arrow"


def test_the_command_prints_the_manifest_that_a_server_has(tiny_file, capsys, monkeypatch):
    assert main.main(["manifest", "--ckpt", str(tiny_file)]) == 0
    printed = Manifest.from_text(capsys.readouterr().out)
    assert main.main(["manifest", "--ckpt", str(tiny_file), "--sha256"]) == 0
    assert capsys.readouterr().out.strip() == printed.sha256.hex()
    monkeypatch.setattr("fusedllm.attesting.available", lambda: True)
    checkpoint = open_checkpoint(tiny_file)
    assert serve._attested(ServerSettings(), checkpoint, "plain").manifest == printed
    assert serve._attested(ServerSettings(), "tiny", "plain").manifest is None
    monkeypatch.setattr("fusedllm.attesting.available", lambda: False)
    assert serve._attested(ServerSettings(), checkpoint, "plain").manifest is None


def test_a_setting_that_is_no_manifest_is_refused():
    with pytest.raises(SettingsError, match="manifest must be a Manifest"):
        ServerSettings(manifest=MANIFEST.text)
