"""Quotes through configfs-tsm, from a kernel that is played here: its races, its refusals, and what is left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import threading

import pytest
from attestation_stand_in import BUSY, FakeKernel, fails, snp_blob

from fusedllm.errors import AttestationError, AttestationUnavailableError
from fusedllm.partition import tsm
from fusedllm.partition.quotes import report_data_in

DATA = bytes(range(64))
OTHERS = bytes(64)


@pytest.fixture
def kernel(tmp_path):
    return FakeKernel(tmp_path)


def sentence(error: Exception) -> str:
    text = str(error)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_a_quote_is_made_of_one_write_and_its_directory_removed(kernel):
    quote = kernel.quote(DATA)
    assert (quote.provider, quote.generation, quote.blob) == ("sev_guest", 1, snp_blob(DATA))
    assert kernel.writes == [DATA]
    assert list(kernel.root.iterdir()) == []


def test_the_write_really_is_one(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(os, "write", lambda descriptor, data: written.append(data) or len(data))
    (tmp_path / "inblob").touch()
    assert tsm.Files().write(tmp_path / "inblob", DATA) == 64
    assert written == [DATA]


def test_another_writer_between_our_write_and_our_read_is_noticed(kernel):
    """`outblob` would be about what the other one wrote."""
    races = [2]

    def intrude(directory):
        if races[0]:
            races[0] -= 1
            kernel.take(directory, OTHERS)

    kernel.before["read", "outblob"] = intrude
    quote = kernel.quote(DATA)
    assert report_data_in("sev_guest", quote.blob) == DATA
    assert kernel.writes == [DATA, OTHERS, DATA, OTHERS, DATA]
    assert list(kernel.root.iterdir()) == []


def test_another_writer_who_writes_the_same_is_noticed_by_the_generation_alone(kernel):
    kernel.before["read", "outblob"] = lambda directory: kernel.take(directory, DATA)
    with pytest.raises(AttestationError, match="somebody else wrote 1 times"):
        kernel.quote(DATA)
    assert len(kernel.writes) == 2 * tsm.ATTEMPTS


def test_another_writer_before_our_write_is_noticed_after_it(kernel):
    kernel.before["write", "inblob"] = lambda directory: kernel.take(directory, OTHERS)
    with pytest.raises(AttestationError, match="somebody else wrote"):
        kernel.quote(DATA)
    assert list(kernel.root.iterdir()) == []


def test_a_writer_in_a_thread_never_gets_its_data_into_our_quote(kernel):
    """Whenever it strikes: the threads meet where the scheduler lets them."""
    stop = threading.Event()

    def strike():
        while not stop.is_set():
            for directory in list(kernel.root.iterdir()):
                # The directory may go away under its feet, as with the real kernel.
                with contextlib.suppress(FileNotFoundError):
                    kernel.take(directory, OTHERS)
            stop.wait(0.0005)

    thread = threading.Thread(target=strike)
    thread.start()
    made = 0
    try:
        for _ in range(100):
            with contextlib.suppress(AttestationError):
                assert report_data_in("sev_guest", kernel.quote(DATA).blob) == DATA
                made += 1
    finally:
        stop.set()
        thread.join()
    assert made > 0


def test_a_write_that_the_kernel_drops_is_tried_again(kernel, monkeypatch):
    """configfs hands a write over when the file is closed, and tells nobody that it was refused."""
    drops = [2]
    take = kernel.take

    def drop(directory, data):
        if drops[0]:
            drops[0] -= 1
        else:
            take(directory, data)

    monkeypatch.setattr(kernel, "take", drop)
    assert kernel.quote(DATA).generation == 1
    drops[0] = 10**6
    with pytest.raises(AttestationError, match="did not take"):
        kernel.quote(DATA)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EAGAIN, errno.EWOULDBLOCK])
@pytest.mark.parametrize("place", [("make", ""), ("write", "inblob"), ("read", "outblob"), ("read", "generation")])
def test_a_busy_kernel_is_asked_again(kernel, number, place):
    kernel.before[place] = fails(number, times=tsm.ATTEMPTS - 1)
    assert kernel.quote(DATA).blob == snp_blob(DATA)
    assert list(kernel.root.iterdir()) == []


def test_a_kernel_that_stays_busy_is_given_up_after_some_seconds(kernel):
    kernel.before["read", "outblob"] = fails(BUSY)
    pauses = []
    with pytest.raises(AttestationError, match="7 attempts") as failed:
        tsm.quote(DATA, kernel.root, files=kernel, sleep=pauses.append)
    assert "outblob" in sentence(failed.value)
    assert len(pauses) == tsm.ATTEMPTS - 1
    # 0.05 s (2^6 - 1): long for a race, short for a client that waits.
    assert sum(pauses) == pytest.approx(3.15)
    assert list(kernel.root.iterdir()) == []


def test_a_machine_without_the_interface_has_no_quote(tmp_path):
    with pytest.raises(AttestationUnavailableError, match="/report, which Linux") as refused:
        tsm.quote(DATA, tmp_path / "report")
    sentence(refused.value)
    assert not tsm.available(tmp_path / "report")


@pytest.mark.parametrize(
    ("place", "number", "words"),
    [
        (("make", ""), errno.ENXIO, "no driver"),
        (("read", "outblob"), errno.ENOTTY, "no driver"),
        (("make", ""), errno.EACCES, "may not make"),
        (("write", "inblob"), errno.EPERM, "may not write inblob"),
    ],
)
def test_hardware_that_is_missing_or_forbidden_is_unavailable(kernel, place, number, words):
    kernel.before[place] = fails(number)
    with pytest.raises(AttestationUnavailableError, match=words) as refused:
        kernel.quote(DATA)
    sentence(refused.value)
    assert list(kernel.root.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL, errno.ETIMEDOUT])
def test_a_failing_device_is_one_sentence_and_leaves_nothing(kernel, number):
    kernel.before["read", "outblob"] = fails(number)
    with pytest.raises(AttestationError, match="read outblob") as failed:
        kernel.quote(DATA)
    assert os.strerror(number).lower() in sentence(failed.value)
    assert list(kernel.root.iterdir()) == []


def test_a_missing_or_empty_provider_is_an_error(kernel):
    kernel.before["read", "provider"] = lambda directory: (directory / "provider").unlink()
    with pytest.raises(AttestationError, match="read provider"):
        kernel.quote(DATA)
    kernel.before.clear()
    kernel.provider = ""
    with pytest.raises(AttestationUnavailableError, match="names no provider"):
        kernel.quote(DATA)
    assert list(kernel.root.iterdir()) == []


def test_a_directory_that_cannot_be_removed_is_named(kernel):
    kernel.before["remove", ""] = fails(errno.EPERM)
    with pytest.raises(AttestationError, match="can't be removed") as failed:
        kernel.quote(DATA)
    (left,) = kernel.root.iterdir()
    assert str(left) in sentence(failed.value)


def test_what_failed_first_is_what_is_said(kernel):
    kernel.before["remove", ""] = fails(errno.EPERM)
    kernel.before["read", "outblob"] = fails(errno.EIO)
    with pytest.raises(AttestationError, match="read outblob"):
        kernel.quote(DATA)


@pytest.mark.parametrize("blob", [b"", bytes(tsm.MAX_QUOTE_BYTES + 1)])
def test_a_quote_of_no_or_absurd_size_is_none(kernel, blob):
    kernel.make_blob = lambda data: blob
    with pytest.raises(AttestationError):
        kernel.quote(DATA)


def test_a_quote_for_other_data_is_never_handed_out(kernel):
    kernel.make_blob = lambda data: snp_blob(OTHERS)
    with pytest.raises(AttestationError, match="made for other data"):
        kernel.quote(DATA)


def test_a_provider_that_is_not_known_here_passes_for_the_client_to_judge(kernel):
    kernel.provider, kernel.make_blob = "arm_cca_guest", lambda data: b"token"
    assert kernel.quote(DATA).blob == b"token"


def test_a_generation_that_is_no_number_and_a_partial_write_are_errors(kernel, monkeypatch):
    kernel.before["read", "generation"] = lambda directory: (directory / "generation").write_text("many")
    with pytest.raises(AttestationError, match="'many', which is no number"):
        kernel.quote(DATA)
    kernel.before.clear()
    monkeypatch.setattr(tsm.Files, "write", lambda self, file, data: 63)
    with pytest.raises(AttestationError, match="63 of the 64"):
        kernel.quote(DATA)


def test_only_64_bytes_are_quoted(kernel):
    with pytest.raises(AttestationError, match="64 bytes, got 32"):
        kernel.quote(bytes(32))
