"""What a client makes of Intel's quotes: real ones, and what was done to them; and of a verdict."""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
from pathlib import Path

import pytest

from fusedllm.errors import RequestError
from fusedllm.partition import intel
from fusedllm.partition.checks import LAUNCH, Check, Expected, Outcome, Verdict, parse_measurements
from fusedllm.partition.quotes import report_data_in

DATA = Path(__file__).parent / "data" / "quotes"
HELD, FAILED, UNCHECKED = Outcome.HELD, Outcome.FAILED, Outcome.UNCHECKED


def outcomes(checks):
    found = {check.name: check.outcome for check in checks}
    assert len(found) == len(checks)
    return found


class Vector:
    """A real quote with its collateral, on a day when that was in date."""

    def __init__(self, name: str) -> None:
        dcap = pytest.importorskip("dcap_qvl")
        self.blob = (DATA / f"{name}.bin").read_bytes()
        self.collateral = (DATA / f"{name}_collateral.json").read_text()
        self.report = dcap.parse_quote(self.blob).report
        parts = json.loads(self.collateral)
        issued = (json.loads(parts[part])["issueDate"] for part in ("tcb_info", "qe_identity"))
        self.now = max(int(datetime.datetime.fromisoformat(day).timestamp()) for day in issued) + 1

    def expected(self, registers=(), **changes) -> Expected:
        measurements = {name: [bytes(getattr(self.report, name))] for name in registers}
        expected = Expected(bytes(self.report.report_data), self.now, measurements, self.collateral)
        return dataclasses.replace(expected, **changes)


TDX = ("tdx_quote", "tdx_quote_td15ex")


@pytest.mark.parametrize("name", TDX)
def test_a_real_tdx_quote_holds_with_what_it_reports(name):
    vector = Vector(name)
    checks = intel.check_quote(vector.blob, vector.expected(intel.TDX_REQUIRED))
    assert set(outcomes(checks).values()) == {HELD}, Verdict(tuple(checks))
    assert {"signature", "TCB status", "report data", "debug", "measurement mr_td", "measurement rt_mr2"} <= set(
        outcomes(checks)
    )


def test_a_real_sgx_quote_holds_once_its_status_is_accepted():
    vector = Vector("sgx_quote")
    expected = vector.expected(intel.SGX_REQUIRED)
    checks = intel.check_quote(vector.blob, expected)
    assert outcomes(checks)["TCB status"] is FAILED
    (status,) = (check for check in checks if check.name == "TCB status")
    assert "INTEL-SA-00289" in status.found
    accepting = dataclasses.replace(expected, tcb_statuses=("ConfigurationAndSWHardeningNeeded",))
    assert set(outcomes(intel.check_quote(vector.blob, accepting)).values()) == {HELD}


@pytest.mark.parametrize("name", TDX)
def test_the_server_finds_the_report_data_where_the_verifier_does(name):
    vector = Vector(name)
    assert report_data_in("tdx_guest", vector.blob) == bytes(vector.report.report_data)


@pytest.mark.parametrize("name", [*TDX, "sgx_quote"])
def test_no_flipped_byte_of_a_signed_body_passes(name):
    """In steps: each verification takes a millisecond, and each byte is signed in the same way."""
    vector = Vector(name)
    for place in range(0, 600, 7):
        blob = bytearray(vector.blob)
        blob[place] ^= 1
        checks = outcomes(intel.check_quote(bytes(blob), vector.expected()))
        assert checks["signature"] is FAILED, place


def test_a_replayed_tdx_quote_fails_by_its_report_data_alone():
    vector = Vector("tdx_quote")
    checks = outcomes(intel.check_quote(vector.blob, vector.expected(intel.TDX_REQUIRED, report_data=bytes(64))))
    assert checks.pop("report data") is FAILED
    assert set(checks.values()) == {HELD}


def test_collateral_of_another_day_platform_or_shape_fails():
    vector, other = Vector("tdx_quote"), Vector("sgx_quote")
    for changes in ({"now": vector.now + 10**8}, {"collateral": other.collateral, "now": other.now}):
        checks = intel.check_quote(vector.blob, vector.expected(**changes))
        assert outcomes(checks)["signature"] is FAILED
    for broken in ("", "{}", "null", vector.collateral[:-20]):
        checks = intel.check_quote(vector.blob, vector.expected(collateral=broken))
        assert outcomes(checks)["signature"] is UNCHECKED
        assert "TCB status" not in outcomes(checks)


@pytest.mark.parametrize("register", intel.TDX_REQUIRED)
def test_a_tdx_register_that_is_left_out_or_differs_is_no_success(register):
    vector = Vector("tdx_quote")
    expected = vector.expected(intel.TDX_REQUIRED)
    without = {name: value for name, value in expected.measurements.items() if name != register}
    checks = outcomes(intel.check_quote(vector.blob, dataclasses.replace(expected, measurements=without)))
    assert checks[f"measurement {register}"] is UNCHECKED
    wrong = {**expected.measurements, register: [bytes(48)]}
    checks = outcomes(intel.check_quote(vector.blob, dataclasses.replace(expected, measurements=wrong)))
    assert checks.pop(f"measurement {register}") is FAILED
    assert set(checks.values()) == {HELD}


def test_a_measurement_without_a_name_is_the_launch_digest_and_several_are_alternatives():
    vector = Vector("tdx_quote")
    right = bytes(vector.report.mr_td)
    for given, outcome in (([right], HELD), ([bytes(48), right], HELD), ([bytes(48)], FAILED)):
        checks = intel.check_quote(vector.blob, vector.expected(measurements={LAUNCH: given}))
        assert outcomes(checks)["measurement mr_td"] is outcome
    checks = intel.check_quote(vector.blob, vector.expected(measurements={"mr_enclave": [right]}))
    assert outcomes(checks)["measurement mr_enclave"] is FAILED


def test_without_the_verifier_nothing_is_claimed(monkeypatch):
    monkeypatch.setitem(sys.modules, "dcap_qvl", None)
    checks = intel.check_quote(b"", Expected(bytes(64), 0))
    assert outcomes(checks) == {"signature": UNCHECKED}
    assert "pip install" in checks[0].expected


@pytest.mark.parametrize("blob", [b"", b"\x04\x00", bytes(5000)])
def test_what_is_no_intel_quote_fails(blob):
    pytest.importorskip("dcap_qvl")
    assert outcomes(intel.check_quote(blob, Expected(bytes(64), 0))) == {"signature": FAILED}


def test_measurements_are_hexadecimal_with_or_without_a_name():
    digits = "ab" * 48
    found = parse_measurements([digits, f"rt_mr1={digits}", f"rt_mr1={'cd' * 48}"])
    assert found == {LAUNCH: [b"\xab" * 48], "rt_mr1": [b"\xab" * 48, b"\xcd" * 48]}
    for wrong in ("", "zz", "ab", f"={digits}", "mr_td=", f"{digits}="):
        with pytest.raises(RequestError, match="HEX or NAME=HEX"):
            parse_measurements([wrong])


def test_a_verdict_holds_only_if_every_check_did():
    held = Check("a", HELD, "x", "x")
    assert Verdict((held,), "plain").holds
    assert not Verdict(()).holds
    for outcome in (FAILED, UNCHECKED):
        verdict = Verdict((held, Check("b", outcome, "x\x1b[2J\n", "y")))
        assert not verdict.holds
        assert "no confidentiality claim" in str(verdict)
        # What a server sends does not get to draw on the terminal.
        assert "\x1b" not in str(verdict)
        assert len(str(verdict).splitlines()) == 5
