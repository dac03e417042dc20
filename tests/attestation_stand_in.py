"""Stand-ins for what attestation needs of the world: a kernel, a machine of AMD's, certificates."""

from __future__ import annotations

import datetime
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.x509.oid import NameOID

from fusedllm.partition import sev, sev_chain, tsm
from fusedllm.partition.manifest import Manifest

MANIFEST = Manifest(
    weights="1" * 64,
    config="2" * 64,
    tokenizer=None,
    quantization={"Q4_1": 3},
    policy="plain",
    version="0",
    code="3" * 64,
)

DAY = datetime.timedelta(days=1)


def snp_blob(report_data: bytes) -> bytes:
    """A report without a signature, of which only the report data are set."""
    return bytes(0x50) + report_data + bytes(sev.REPORT_BYTES - 0x50 - 64)


@dataclass
class FakeKernel(tsm.Files):
    """configfs-tsm over a temporary directory: real files, and the kernel's way with them.

    What is written to `inblob` is taken when the file is closed, `generation` counts what was taken, and a directory
    goes away with the files in it. `before` runs ahead of an operation (`("read", "outblob")`), for races and errors.
    """

    root: Path
    provider: str = "sev_guest"
    make_blob: Callable[[bytes], bytes] = snp_blob
    before: dict[tuple[str, str], Callable[[Path], None]] = field(default_factory=dict)
    writes: list[bytes] = field(default_factory=list)
    # The kernel's own, which makes each operation whole.
    lock: threading.RLock = field(default_factory=threading.RLock)

    def make(self, directory: Path) -> None:
        self._run("make", "", directory)
        with self.lock:
            self._fill(directory)

    def _fill(self, directory: Path) -> None:
        super().make(directory)
        for name, content in (
            ("generation", "0\n"),
            ("provider", f"{self.provider}\n"),
            ("inblob", ""),
            ("outblob", ""),
        ):
            (directory / name).write_text(content)

    def write(self, file: Path, data: bytes) -> int:
        self._run("write", file.name, file.parent)
        with self.lock:
            taken = super().write(file, data)
        self.take(file.parent, data)
        return taken

    def take(self, directory: Path, data: bytes) -> None:
        """What the kernel does when a writer, ours or another, closes `inblob`."""
        generation = directory / "generation"
        with self.lock:
            count = int(generation.read_text())
            self.writes.append(data)
            (directory / "inblob").write_bytes(data)
            generation.write_text(f"{count + 1}\n")

    def read(self, file: Path) -> bytes:
        self._run("read", file.name, file.parent)
        with self.lock:
            if file.name == "outblob":
                file.write_bytes(self.make_blob((file.parent / "inblob").read_bytes()))
            return super().read(file)

    def remove(self, directory: Path) -> None:
        self._run("remove", "", directory)
        with self.lock:
            shutil.rmtree(directory)

    def quote(self, report_data: bytes) -> tsm.Quote:
        """A quote through this kernel, without pauses."""
        return tsm.quote(report_data, self.root, files=self, sleep=lambda seconds: None)

    def _run(self, operation: str, name: str, directory: Path) -> None:
        hook = self.before.get((operation, name))
        if hook is not None:
            hook(directory)


def fails(number: int, times: int = 10**6) -> Callable[[Path], None]:
    """A hook that fails with an errno, `times` over."""
    left = [times]

    def hook(directory: Path) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))

    return hook


BUSY = errno.EBUSY


@dataclass
class SnpMachine:
    """A machine with SEV-SNP whose chip was certified by a root of our own: the same chain as AMD's, other keys."""

    measurement: bytes = bytes(range(48))
    tcb: bytes = bytes([3, 0, 0, 0, 0, 0, 8, 200])
    chip: bytes = bytes(range(64))
    policy: int = 0x30000
    version: int = 2
    vmpl: int = 0
    # Zen 5's number from version 3 on.
    family: int = 0x19

    @cached_property
    def keys(self):
        # Smaller than AMD's 4,096 bits, which take seconds to find.
        return [rsa.generate_private_key(65537, 2048) for _ in range(2)] + [ec.generate_private_key(ec.SECP384R1())]

    @cached_property
    def chain(self) -> list[x509.Certificate]:
        """ARK, ASK and VCEK."""
        root, intermediate, leaf = self.keys
        ark = _certificate("ARK", root, "ARK", root, authority=True)
        ask = _certificate("ASK", intermediate, "ARK", root, authority=True)
        values = {sev_chain.OID_CHIP: self.chip}
        for name, version in zip(("bootloader", "tee", "snp", "microcode"), self.tcb[:2] + self.tcb[6:], strict=True):
            values[sev_chain.OID_TCB[name]] = bytes([2, 1, version] if version < 128 else [2, 2, 0, version])
        return [ark, ask, _certificate("SEV-VCEK", leaf, "ASK", intermediate, values)]

    @property
    def roots(self) -> dict[str, str]:
        return {self.chain[0].fingerprint(hashes.SHA256()).hex(): "our own root"}

    @property
    def certificates(self) -> tuple[bytes, ...]:
        return tuple(one.public_bytes(serialization.Encoding.PEM) for one in self.chain)

    def report(self, report_data: bytes) -> bytes:
        """A signed report."""
        raw = bytearray(sev.REPORT_BYTES)
        raw[0x00:0x04] = self.version.to_bytes(4, "little")
        raw[0x08:0x10] = self.policy.to_bytes(8, "little")
        raw[0x30:0x34] = self.vmpl.to_bytes(4, "little")
        raw[0x34] = sev.ECDSA_P384_SHA384
        raw[0x50:0x90] = report_data
        raw[0x90:0xC0] = self.measurement
        raw[0x180:0x188] = self.tcb
        if self.version > 2:
            raw[0x188] = self.family
        raw[0x1A0:0x1E0] = self.chip
        signature = self.keys[2].sign(bytes(raw[: sev.SIGNED_BYTES]), ec.ECDSA(hashes.SHA384()))
        for place, number in zip((0x2A0, 0x2E8), utils.decode_dss_signature(signature), strict=True):
            raw[place : place + 72] = number.to_bytes(72, "little")
        return bytes(raw)


def _certificate(subject, key, issuer, signer, values=None, authority=False):
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
    )
    for oid, value in (values or {}).items():
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=False)
    if not isinstance(signer, rsa.RSAPrivateKey):
        return builder.sign(signer, hashes.SHA256())
    pss = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
    return builder.sign(signer, hashes.SHA384(), rsa_padding=pss)


def tls_pair(directory: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that signs itself, and its key, as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    directory.mkdir(exist_ok=True)
    files = directory / "certificate.pem", directory / "key.pem"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, *private))
    return files


def now() -> int:
    return int(time.time())
