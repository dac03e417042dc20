"""`fusedllm verify`: is a server the software that it should be, in hardware that keeps its memory to itself."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from fusedllm.errors import RequestError, VerificationError

NAME = "verify"
HELP = "check the attestation of a server"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("url", metavar="URL", help="of the server, as in https://chat.example.org")
    parser.add_argument(
        "--expect-manifest", metavar="FILE|SHA256", help="what must run there, as `fusedllm manifest` prints it"
    )
    parser.add_argument(
        "--measurement", action="append", default=[], metavar="[NAME=]HEX",
        help="accepted value of a register (mr_td, rt_mr0, ..., mr_enclave, measurement); without a name of the launch "
        "digest. Repeatable; several of one name are alternatives",
    )  # fmt: skip
    parser.add_argument("--api-key", metavar="KEY", help="where the server asks for one; needs a valid certificate")
    parser.add_argument("--ca", type=Path, metavar="PEM", help="whose certificates are valid (default: the system's)")
    group = parser.add_argument_group("Intel TDX and SGX")
    group.add_argument("--collateral", type=Path, metavar="JSON", help="by default fetched from Intel")
    group.add_argument(
        "--accept-tcb-status", action="append", default=[], metavar="STATUS",
        help="of the platform, beside UpToDate, as in SWHardeningNeeded; repeatable",
    )  # fmt: skip
    group = parser.add_argument_group("AMD SEV-SNP")
    group.add_argument(
        "--certificates", type=Path, action="append", default=[], metavar="FILE",
        help="AMD's chain, PEM or DER: VCEK, ASK, ARK; repeatable",
    )  # fmt: skip
    group.add_argument("--min-tcb", metavar="B.T.S.M", help="least versions: bootloader, tee, snp, microcode")


def run(options: argparse.Namespace) -> None:
    """Prints what was checked; fails unless everything was, and held."""
    from fusedllm.verifying import Expectations, parse_measurements, verify

    collateral = (
        None if options.collateral is None else options.collateral.read_text(encoding="utf-8", errors="replace")
    )
    expectations = Expectations(
        manifest_sha256=_manifest_sha256(options.expect_manifest),
        measurements=parse_measurements(options.measurement),
        collateral=collateral,
        tcb_statuses=tuple(options.accept_tcb_status),
        certificates=tuple(file.read_bytes() for file in options.certificates),
        min_tcb=_versions(options.min_tcb),
    )
    verdict = verify(options.url, expectations, api_key=options.api_key, authorities=options.ca)
    if not verdict.holds:
        print(verdict.table)
        raise VerificationError(verdict.conclusion)
    print(verdict)


def _manifest_sha256(given: str | None) -> str | None:
    if given is None or re.fullmatch(r"[0-9a-f]{64}", given):
        return given
    from fusedllm.attesting import Manifest

    return Manifest.from_text(Path(given).read_text(encoding="utf-8", errors="replace")).sha256.hex()


def _versions(given: str | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,3}){3}", given):
        raise RequestError(f"--min-tcb is written as 3.0.8.115 (bootloader, tee, snp, microcode), got {given!r}.")
    return tuple(map(int, given.split(".")))
