"""Quotes of Intel TDX (versions 4 and 5) and SGX (version 3), verified and read by `dcap-qvl`.

The signature chain, the freshness of collateral, the debug attribute and the TCB level are the library's to check;
values are read from the same bytes by the same parser, so that nothing else than what was signed is compared.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Mapping
from typing import Any

from fusedllm.partition.checks import Check, Expected, Outcome, decided, measurement_checks, same, unchecked

MISSING = "the package dcap-qvl is not installed (pip install 'fusedllm[attest]')"

UP_TO_DATE = "UpToDate"

# What the registers are called, and where the library has them. `rt_mr0` is the machine's configuration, `rt_mr1` the
# kernel, `rt_mr2` its command line and initrd (as TDVF and Linux use them); `rt_mr3` is left to applications.
TDX_REGISTERS = ("mr_td", "rt_mr0", "rt_mr1", "rt_mr2", "rt_mr3", "mr_config_id", "mr_owner", "mr_owner_config")
TDX_REQUIRED = TDX_REGISTERS[:4]
SGX_REGISTERS = ("mr_enclave", "mr_signer")
SGX_REQUIRED = SGX_REGISTERS[:1]

_TDX_DEBUG = 0x01
_SGX_DEBUG = 0x02


def check_quote(blob: bytes, expected: Expected) -> list[Check]:
    """All checks of an Intel quote."""
    try:
        # By name: it is an extra, and has no types that mypy could read.
        library: Any = importlib.import_module("dcap_qvl")
    except ImportError:
        return [unchecked("signature", f"a quote of {len(blob)} bytes", MISSING)]
    try:
        quote = library.parse_quote(blob)
        report, version = quote.report, quote.header.version
    except ValueError as error:
        return [decided("signature", False, f"no Intel quote: {_sentence(error)}", "a TDX or SGX quote")]
    if quote.is_tdx():
        registers, debug = _registers(report, TDX_REGISTERS), bool(report.td_attributes[0] & _TDX_DEBUG)
        required: tuple[str, ...] = TDX_REQUIRED
    else:
        registers, debug = _registers(report, SGX_REGISTERS), bool(report.attributes[0] & _SGX_DEBUG)
        required = SGX_REQUIRED
    return [
        *_check_signature(library, blob, f"{quote.quote_type()} quote, version {version}", expected),
        same("report data", bytes(report.report_data), expected.report_data),
        decided("debug", not debug, "on" if debug else "off", "off"),
        *measurement_checks(registers, required[0], required, expected.measurements),
    ]


def _check_signature(library: Any, blob: bytes, what: str, expected: Expected) -> list[Check]:
    """Whether Intel's keys vouch for the quote, and how old the platform's firmware is."""
    try:
        collateral = _collateral(library, blob, expected.collateral)
    except Exception as error:  # of a network and of an asynchronous runtime, without a common base
        return [unchecked("signature", what, f"no collateral: {_sentence(error)}; give it with --collateral")]
    try:
        report = library.verify(blob, collateral, expected.now)
    except ValueError as error:
        return [
            decided("signature", False, f"{what}: {_sentence(error)}", "signed by Intel's keys, collateral in date")
        ]
    accepted = (UP_TO_DATE, *expected.tcb_statuses)
    advisories = f" ({', '.join(report.advisory_ids)})" if report.advisory_ids else ""
    return [
        Check("signature", Outcome.HELD, what, "signed by Intel's keys, collateral in date"),
        decided("TCB status", report.status in accepted, report.status + advisories, " or ".join(accepted)),
    ]


def _collateral(library: Any, blob: bytes, text: str | None) -> Any:
    if text is not None:
        return library.QuoteCollateralV3.from_json(text)

    async def fetch() -> Any:
        return await library.get_collateral(library.INTEL_PCS_URL, blob)

    return asyncio.run(fetch())


def _registers(report: Any, names: tuple[str, ...]) -> Mapping[str, bytes]:
    return {name: bytes(getattr(report, name)) for name in names}


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
