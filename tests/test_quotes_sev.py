"""What a client makes of SEV-SNP reports: with a chain like AMD's, of our own."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
from attestation_stand_in import SnpMachine, now
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fusedllm.errors import AttestationError
from fusedllm.partition import sev, sev_chain
from fusedllm.partition.checks import LAUNCH, Expected, Outcome, Verdict

DATA = Path(__file__).parent / "data" / "quotes"
HELD, FAILED, UNCHECKED = Outcome.HELD, Outcome.FAILED, Outcome.UNCHECKED


def outcomes(checks):
    found = {check.name: check.outcome for check in checks}
    assert len(found) == len(checks)
    return found


def test_the_pinned_roots_are_those_that_amd_serves():
    found = x509.load_pem_x509_certificates((DATA / "amd_roots.pem").read_bytes())
    names = {}
    for root in found:
        root.verify_directly_issued_by(root)
        (name,) = root.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        names[hashlib.sha256(root.public_bytes(Encoding.DER)).hexdigest()] = name.value
    assert names == sev_chain.AMD_ROOTS


@pytest.fixture(scope="module")
def machine():
    return SnpMachine()


REPORT_DATA = bytes(range(64))


def expected_of(machine, **changes):
    expected = Expected(
        REPORT_DATA, now(), {LAUNCH: [machine.measurement]}, certificates=machine.certificates, min_tcb=(3, 0, 8, 115)
    )
    return dataclasses.replace(expected, **changes)


def test_a_report_holds_with_its_chain_and_what_it_reports(machine):
    checks = sev.check_report(machine.report(REPORT_DATA), expected_of(machine), machine.roots)
    assert set(outcomes(checks).values()) == {HELD}, Verdict(tuple(checks))


def test_a_chain_of_another_root_fails(machine):
    """The default roots are AMD's alone, and ours is none of them."""
    checks = sev.check_report(machine.report(REPORT_DATA), expected_of(machine))
    assert outcomes(checks).pop("signature") is FAILED
    assert "none of AMD's" in checks[0].found


def test_without_certificates_the_signature_is_not_checked_and_that_is_said(machine):
    checks = sev.check_report(machine.report(REPORT_DATA), expected_of(machine, certificates=()), machine.roots)
    assert outcomes(checks)["signature"] is UNCHECKED
    assert not Verdict(tuple(checks)).holds


def test_without_least_versions_old_firmware_would_pass_and_that_is_said(machine):
    for least, outcome in ((None, UNCHECKED), ((3, 0, 8, 201), FAILED), ((3, 0, 9, 0), FAILED), ((0, 0, 0, 0), HELD)):
        checks = sev.check_report(machine.report(REPORT_DATA), expected_of(machine, min_tcb=least), machine.roots)
        assert outcomes(checks)["TCB"] is outcome


def test_no_flipped_bit_of_a_report_passes(machine):
    raw = machine.report(REPORT_DATA)
    for place in [*range(0, sev.SIGNED_BYTES, 11), *range(sev.SIGNED_BYTES, sev.SIGNED_BYTES + 144, 5)]:
        broken = bytearray(raw)
        broken[place] ^= 0x10
        checks = outcomes(sev.check_report(bytes(broken), expected_of(machine), machine.roots))
        assert checks["signature"] is FAILED, place


def of_the_same_chain(machine, **changes):
    """A machine with the same keys and certificates, that reports something else."""
    other = dataclasses.replace(machine, **changes)
    other.__dict__.update(keys=machine.keys, chain=machine.chain)
    return other


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"chip": bytes(64)}, "signature"),
        ({"tcb": bytes([3, 0, 0, 0, 0, 0, 9, 200])}, "signature"),
        ({"policy": 0x30000 | 1 << 19}, "debug"),
        ({"policy": 0x30000 | 1 << 18}, "migration"),
        ({"vmpl": 0xFFFFFFFF}, "asked by"),
        ({"measurement": bytes(48)}, "measurement measurement"),
    ],
    ids=["chip", "firmware", "debug", "migration", "asked by the hypervisor", "measurement"],
)
def test_a_signed_report_that_says_the_wrong_thing_fails(machine, changes, check):
    checks = sev.check_report(
        of_the_same_chain(machine, **changes).report(REPORT_DATA), expected_of(machine), machine.roots
    )
    assert outcomes(checks)[check] is FAILED
    assert [name for name, outcome in outcomes(checks).items() if outcome is not HELD] == [check]


def test_turin_has_its_versions_elsewhere():
    """Its FMC comes first; without the family's number the same bytes would be other versions."""
    raw = SnpMachine(version=3, family=0x1A, tcb=bytes([1, 3, 0, 8, 0, 0, 0, 115])).report(REPORT_DATA)
    assert sev.parse_report(raw).tcb == (3, 0, 8, 115)
    assert sev.parse_report(raw).fmc == 1
    milan = SnpMachine(version=3, tcb=bytes([3, 0, 0, 0, 0, 0, 8, 115])).report(REPORT_DATA)
    assert (sev.parse_report(milan).tcb, sev.parse_report(milan).fmc) == ((3, 0, 8, 115), None)


def test_certificates_that_do_not_make_a_chain_fail(machine):
    other = SnpMachine()
    mixed = (machine.certificates[0], other.certificates[1], other.certificates[2])
    for certificates, words in (
        (machine.certificates[1:], "0 are roots"),
        (machine.certificates[:2], "0 keys of chips"),
        ((*machine.certificates, machine.certificates[2]), "2 keys of chips"),
        ((*machine.certificates[:2], other.certificates[2]), "not signed by"),
        (mixed, "not signed by"),
        ((b"nothing",), "can't be read"),
    ):
        checks = sev.check_report(
            machine.report(REPORT_DATA), expected_of(machine, certificates=certificates), machine.roots
        )
        assert outcomes(checks)["signature"] is FAILED
        assert words in checks[0].found, checks[0].found


def test_certificates_out_of_date_fail(machine):
    expected = expected_of(machine, now=now() + 10 * 86_400)
    checks = sev.check_report(machine.report(REPORT_DATA), expected, machine.roots)
    assert "not valid at" in checks[0].found


def test_a_bundle_and_der_files_are_read_too(machine):
    ders = tuple(one.public_bytes(Encoding.DER) for one in machine.chain)
    for certificates in (ders, (b"".join(machine.certificates),), tuple(reversed(machine.certificates))):
        expected = expected_of(machine, certificates=certificates)
        checks = sev.check_report(machine.report(REPORT_DATA), expected, machine.roots)
        assert outcomes(checks)["signature"] is HELD


@pytest.mark.parametrize("raw", [b"", bytes(1184), bytes([9]) + bytes(1183), bytes(1183)])
def test_what_is_no_snp_report_fails(raw):
    with pytest.raises(AttestationError):
        sev.parse_report(raw)
    assert outcomes(sev.check_report(raw, Expected(bytes(64), 0))) == {"signature": FAILED}
