"""Attestation reports of AMD SEV-SNP: their structure, and every check of one.

Layout: "SEV Secure Nested Paging Firmware ABI Specification" (AMD publication 56860), ATTESTATION_REPORT.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusedllm.errors import AttestationError
from fusedllm.partition.attestation import REPORT_DATA_BYTES
from fusedllm.partition.checks import Check, Expected, decided, measurement_checks, same, unchecked
from fusedllm.partition.quotes import SNP_REPORT_DATA

REPORT_BYTES = 0x4A0
SIGNED_BYTES = 0x2A0

# Those that have the fields below in the same places; version 1 was never shipped.
VERSIONS = (2, 3, 4, 5)
ECDSA_P384_SHA384 = 1
MIGRATION_ALLOWED = 1 << 18
DEBUG_ALLOWED = 1 << 19

# Reports that the hypervisor asked for have another number here; their report data is not the guest's.
LOWEST_VMPL = 3

# Of Zen 5 (Turin), whose firmware has one more version number, and another order of them.
FAMILY_TURIN = 0x1A
_CPUID_SINCE = 3

REQUIRED = ("measurement",)
TCB_NAMES = ("bootloader", "tee", "snp", "microcode")

# Of the 8 bytes of a TCB version, where each of `TCB_NAMES` is.
_TCB_BYTES = (0, 1, 6, 7)
_TCB_BYTES_TURIN = (1, 2, 3, 7)


@dataclass(frozen=True, slots=True)
class SnpReport:
    """The fields of a report that are compared or shown.

    Attributes:
      raw: the whole report.
      version: of the structure.
      policy: what the guest's owner allowed the hypervisor.
      vmpl: the privilege level that asked for the report; 0 is the highest.
      signature_algorithm: 1 is ECDSA P-384 with SHA-384.
      signing_key: 0 is a VCEK, 1 a VLEK, 7 none.
      report_data: what the guest gave.
      measurement: the launch digest.
      host_data: what the hypervisor gave at launch.
      id_key_digest, author_key_digest: of the keys that signed the guest's identity, or zeros.
      tcb: the reported versions, in the order of `TCB_NAMES`.
      fmc: the version of Turin's FMC, `None` before.
      chip_id: of the processor; zeros where the machine's owner hides it.
    """

    raw: bytes
    version: int
    policy: int
    vmpl: int
    signature_algorithm: int
    signing_key: int
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    tcb: tuple[int, ...]
    fmc: int | None
    chip_id: bytes

    @property
    def debug_allowed(self) -> bool:
        """Whether the hypervisor may read and change the guest's memory."""
        return bool(self.policy & DEBUG_ALLOWED)

    @property
    def migration_allowed(self) -> bool:
        """Whether another guest, the migration agent, may take this one's memory elsewhere."""
        return bool(self.policy & MIGRATION_ALLOWED)

    @property
    def signature(self) -> tuple[int, int]:
        """`r` and `s` of ECDSA."""
        return self._number(SIGNED_BYTES, 72), self._number(SIGNED_BYTES + 72, 72)

    def _number(self, start: int, length: int) -> int:
        return int.from_bytes(self.raw[start : start + length], "little")


def parse_report(raw: bytes) -> SnpReport:
    """Reads a report; checks no signature.

    Raises:
      AttestationError: another length, or a version whose layout is not known here.
    """
    if len(raw) != REPORT_BYTES:
        raise AttestationError(f"an SEV-SNP report has {REPORT_BYTES} bytes, got {len(raw)}.")

    def number(start: int, length: int) -> int:
        return int.from_bytes(raw[start : start + length], "little")

    version = number(0x00, 4)
    if version not in VERSIONS:
        raise AttestationError(f"an SEV-SNP report of version {version} was found, known are {VERSIONS}.")
    turin = version >= _CPUID_SINCE and raw[0x188] >= FAMILY_TURIN
    tcb = raw[0x180:0x188]
    return SnpReport(
        raw=raw,
        version=version,
        policy=number(0x08, 8),
        vmpl=number(0x30, 4),
        signature_algorithm=number(0x34, 4),
        signing_key=number(0x48, 4) >> 2 & 0b111,
        report_data=raw[SNP_REPORT_DATA : SNP_REPORT_DATA + REPORT_DATA_BYTES],
        measurement=raw[0x90:0xC0],
        host_data=raw[0xC0:0xE0],
        id_key_digest=raw[0xE0:0x110],
        author_key_digest=raw[0x110:0x140],
        tcb=tuple(tcb[place] for place in (_TCB_BYTES_TURIN if turin else _TCB_BYTES)),
        fmc=tcb[0] if turin else None,
        chip_id=raw[0x1A0:0x1E0],
    )


def check_report(raw: bytes, expected: Expected, roots: dict[str, str] | None = None) -> list[Check]:
    """All checks of a report. `roots` are the accepted root certificates, by default AMD's (`sev_chain.AMD_ROOTS`)."""
    from fusedllm.partition import sev_chain

    try:
        report = parse_report(raw)
    except AttestationError as error:
        return [decided("signature", False, str(error), "a report of SEV-SNP")]
    what = f"SEV-SNP report, version {report.version}"
    if expected.certificates:
        accepted = sev_chain.AMD_ROOTS if roots is None else roots
        signature = sev_chain.check_signature(report, expected.certificates, accepted, expected.now)
    else:
        signature = unchecked("signature", what, "AMD's certificates were not given; --certificates FILE")
    registers = {
        name: getattr(report, name) for name in ("measurement", "host_data", "id_key_digest", "author_key_digest")
    }
    return [
        signature,
        _check_tcb(report, expected.min_tcb),
        same("report data", report.report_data, expected.report_data),
        decided("asked by", report.vmpl <= LOWEST_VMPL, f"VMPL {report.vmpl}", "the guest, at VMPL 0 to 3"),
        _forbidden("debug", report.debug_allowed),
        _forbidden("migration", report.migration_allowed),
        *measurement_checks(registers, REQUIRED[0], REQUIRED, expected.measurements),
    ]


def _check_tcb(report: SnpReport, least: tuple[int, ...] | None) -> Check:
    found = ".".join(map(str, report.tcb)) + f" ({'.'.join(TCB_NAMES)})"
    if least is None:
        return unchecked("TCB", found, "no least versions were given; --min-tcb as AMD's bulletins name them")
    held = len(least) == len(report.tcb) and all(have >= want for have, want in zip(report.tcb, least, strict=True))
    return decided("TCB", held, found, "at least " + ".".join(map(str, least)))


def _forbidden(name: str, allowed: bool) -> Check:
    return decided(name, not allowed, "allowed" if allowed else "not allowed", "not allowed")
