"""Quotes from the hardware, through Linux configfs-tsm. Where there is none, there is an error and never a quote.

The interface is the kernel's `Documentation/ABI/testing/configfs-tsm-report`. Two of its ways decide what is here:
what is written to `inblob` arrives when the file is closed, and whether it was taken is not reported; and whoever else
may write to the directory changes what `outblob` is about. `generation` counts the writes that were taken, so that it
tells both: between two readings around ours there must be exactly one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fusedllm.errors import AttestationError, AttestationUnavailableError
from fusedllm.partition.attestation import REPORT_DATA_BYTES
from fusedllm.partition.quotes import report_data_in

ROOT = Path("/sys/kernel/config/tsm/report")

# Another user of the device, or a hypervisor that throttles, is done within seconds: 0.05 s, 0.1 s, ... 1.6 s.
ATTEMPTS = 7
FIRST_PAUSE = 0.05

# Of the kernel: nothing that it gives is longer (`TSM_OUTBLOB_MAX` was 32 KiB and has grown).
MAX_QUOTE_BYTES = 16 * 2**20

_BUSY = {errno.EBUSY, errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR, errno.EEXIST}
_ABSENT = {errno.ENXIO, errno.ENOTTY, errno.ENODEV, errno.EOPNOTSUPP}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@dataclass(frozen=True, slots=True)
class Quote:
    """A quote as the kernel gave it.

    Attributes:
      provider: who made it, such as `tdx_guest` or `sev_guest`; says how to read `blob`.
      blob: the signed quote (TDX) or report (SEV-SNP).
      generation: the kernel's count of writes that the quote belongs to.
    """

    provider: str
    blob: bytes
    generation: int


class Files:
    """The file operations that configfs asks for; a test puts a kernel of its own in their place."""

    def make(self, directory: Path) -> None:
        """A new directory; the kernel fills it."""
        directory.mkdir(mode=0o700)

    def remove(self, directory: Path) -> None:
        """Takes the directory away, with the kernel's files in it."""
        directory.rmdir()

    def read(self, file: Path) -> bytes:
        """Everything in a file."""
        with file.open("rb") as stream:
            return stream.read(MAX_QUOTE_BYTES + 1)

    def write(self, file: Path, data: bytes) -> int:
        """One write; how many bytes were taken."""
        descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
        try:
            return os.write(descriptor, data)
        finally:
            os.close(descriptor)


class _RetryError(Exception):
    """This attempt gave nothing, the next one may; the message says why."""


def available(root: Path = ROOT) -> bool:
    """Whether the kernel offers quotes here; whether there is hardware behind, only `quote` finds out."""
    return root.is_dir()


def quote(
    report_data: bytes,
    root: Path = ROOT,
    *,
    files: Files | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Quote:
    """A quote for 64 bytes of `report_data`, made in a directory of its own that is removed again.

    Raises:
      AttestationUnavailableError: this machine makes no quotes, or does not let this process.
      AttestationError: the device failed, stayed busy, or others kept writing to our directory.
    """
    if len(report_data) != REPORT_DATA_BYTES:
        raise AttestationError(f"a quote is made for {REPORT_DATA_BYTES} bytes, got {len(report_data)}.")
    if not available(root):
        raise AttestationUnavailableError(
            f"this machine can't be attested: there is no {root}, which Linux 6.7 and later have in a confidential VM "
            "(TDX or SEV-SNP) where configfs is mounted."
        )
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            sleep(FIRST_PAUSE * 2 ** (attempt - 1))
        try:
            return _attempt(report_data, root, files or Files())
        except _RetryError as error:
            reason = str(error)
    raise AttestationError(f"no quote was made in {ATTEMPTS} attempts: {reason}; try again later.")


def _attempt(report_data: bytes, root: Path, files: Files) -> Quote:
    directory = root / f"fusedllm-{os.getpid()}-{secrets.token_hex(8)}"
    with _kernel(f"make {directory}"):
        files.make(directory)
    try:
        made = _quote_in(directory, report_data, files)
    except BaseException:
        # What went wrong first is what the caller should hear of.
        with contextlib.suppress(OSError):
            files.remove(directory)
        raise
    try:
        files.remove(directory)
    except OSError as error:
        raise AttestationError(f"{directory} can't be removed: {_reason(error)}; remove it by hand.") from error
    return made


def _quote_in(directory: Path, report_data: bytes, files: Files) -> Quote:
    before = _generation(directory, files)
    with _kernel("write inblob"):
        taken = files.write(directory / "inblob", report_data)
    if taken != len(report_data):
        raise AttestationError(f"the kernel took {taken} of the {len(report_data)} bytes of a single write to inblob.")
    with _kernel("read outblob"):
        blob = files.read(directory / "outblob")
    with _kernel("read provider"):
        provider = files.read(directory / "provider").decode("utf-8", "replace").strip()
    after = _generation(directory, files)
    if after == before:
        raise _RetryError("the kernel did not take what was written to inblob")
    if after != before + 1:
        raise _RetryError(f"somebody else wrote {after - before - 1} times to the same directory")
    if not provider:
        raise AttestationUnavailableError(f"the kernel offers {directory.parent}, and names no provider of quotes.")
    if not blob or len(blob) > MAX_QUOTE_BYTES:
        raise AttestationError(f"{provider} gave a quote of {len(blob)} bytes, which can't be one.")
    if report_data_in(provider, blob) not in (None, report_data):
        raise _RetryError(f"{provider} gave a quote that was made for other data")
    return Quote(provider, blob, after)


def _generation(directory: Path, files: Files) -> int:
    with _kernel("read generation"):
        text = files.read(directory / "generation")
    try:
        return int(text)
    except ValueError:
        raise AttestationError(f"the kernel's generation is {text[:32]!r}, which is no number.") from None


@contextlib.contextmanager
def _kernel(what: str) -> Iterator[None]:
    """Inside, what the kernel answers becomes a retry, an `AttestationUnavailableError` or an `AttestationError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _BUSY:
            raise _RetryError(f"to {what} the kernel said: {_reason(error)}") from error
        if error.errno in _ABSENT:
            raise AttestationUnavailableError(
                f"this machine can't be attested: to {what} the kernel said: {_reason(error)}; it has no driver for "
                "quotes (tdx-guest or sev-guest) loaded."
            ) from error
        if error.errno in _FORBIDDEN:
            raise AttestationUnavailableError(
                f"this process may not {what} ({_reason(error)}); run it as a user who may, usually root."
            ) from error
        raise AttestationError(f"no quote was made: to {what} the kernel said: {_reason(error)}.") from error


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
