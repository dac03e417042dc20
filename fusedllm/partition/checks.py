"""`Check` and `Verdict`: what a client looked at, what it found and what it expected, line by line."""

from __future__ import annotations

import enum
import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fusedllm.errors import RequestError

# The policies that keep something from the accelerator. A quote says which policy runs, and not what it is worth.
POLICIES_WITH_A_CLAIM = ("masked", "masked+verify", "trusted")

# How a measurement is called that was given without a name: the launch digest, whatever the hardware calls it.
LAUNCH = "launch"


class Outcome(enum.Enum):
    """How a check ended."""

    HELD = "held"
    FAILED = "FAILED"
    UNCHECKED = "not checked"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a verdict. `found` and `expected` are as a person reads them, whole, so that they can be copied."""

    name: str
    outcome: Outcome
    found: str
    expected: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """All checks of one attestation, and what the server says it runs."""

    checks: tuple[Check, ...]
    policy: str | None = None

    @property
    def holds(self) -> bool:
        """Whether there were checks, every one was made, and every one held."""
        return bool(self.checks) and all(check.outcome is Outcome.HELD for check in self.checks)

    @property
    def table(self) -> str:
        """Two lines for each check."""
        width = max((len(check.name) for check in self.checks), default=0)
        indent = " " * (len(Outcome.UNCHECKED.value) + 2 + width)
        lines = []
        for check in self.checks:
            lines.append(f"{check.outcome.value:<11}  {check.name:<{width}}  found     {_printable(check.found)}")
            lines.append(f"{indent}  expected  {_printable(check.expected)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.table}\n{self.conclusion}"

    @property
    def conclusion(self) -> str:
        """What follows from the checks, in one sentence."""
        failed = sum(check.outcome is Outcome.FAILED for check in self.checks)
        unchecked = sum(check.outcome is Outcome.UNCHECKED for check in self.checks)
        if not self.holds:
            return f"{failed} checks failed, {unchecked} were not made: no confidentiality claim."
        held = "every check held: this TLS key belongs to the measured machine, which reports this manifest"
        if self.policy in POLICIES_WITH_A_CLAIM:
            return f"{held}, under the policy {self.policy}."
        return (
            f"{held}; its policy {_printable(str(self.policy))} makes no confidentiality claim against the accelerator."
        )


@dataclass(frozen=True, slots=True)
class Expected:
    """What a client holds a server to.

    Attributes:
      report_data: the 64 bytes that it computed itself.
      measurements: accepted values by the name of a register; `LAUNCH` names the launch digest of any hardware.
      collateral: Intel's collateral as JSON; `None` fetches it from Intel.
      tcb_statuses: of Intel, further ones than `UpToDate`.
      certificates: AMD's chain, each file PEM or DER: VCEK or VLEK, ASK or ASVK, ARK.
      min_tcb: the least versions of AMD's firmware: bootloader, tee, snp, microcode.
      now: seconds since 1970.
    """

    report_data: bytes
    now: int
    measurements: Mapping[str, Sequence[bytes]] = field(default_factory=dict)
    collateral: str | None = None
    tcb_statuses: Sequence[str] = ()
    certificates: Sequence[bytes] = ()
    min_tcb: tuple[int, ...] | None = None


def same(name: str, found: bytes, expected: bytes) -> Check:
    """Whether two digests are equal."""
    held = hmac.compare_digest(found, expected)
    return Check(name, Outcome.HELD if held else Outcome.FAILED, found.hex(), expected.hex())


def unchecked(name: str, found: str, why: str) -> Check:
    """A check that could not be made, and why."""
    return Check(name, Outcome.UNCHECKED, found, f"not checked: {why}")


def decided(name: str, holds: bool, found: str, expected: str) -> Check:
    """A check that is a matter of yes or no."""
    return Check(name, Outcome.HELD if holds else Outcome.FAILED, found, expected)


def measurement_checks(
    registers: Mapping[str, bytes], launch: str, required: Iterable[str], given: Mapping[str, Sequence[bytes]]
) -> list[Check]:
    """Compares registers with their accepted values: those that `required` names, and those that were given.

    Args:
      registers: what the quote reports, by name.
      launch: the register that `LAUNCH` means.
      required: those without which the software that runs is not known.
      given: accepted values by name.
    """
    accepted: dict[str, list[bytes]] = {}
    for name, values in given.items():
        accepted.setdefault(launch if name == LAUNCH else name, []).extend(values)
    checks = []
    for name in dict.fromkeys([*required, *accepted]):
        if name not in registers:
            known = ", ".join(registers)
            checks.append(Check(f"measurement {name}", Outcome.FAILED, "no such register", f"one of {known}"))
        elif name not in accepted:
            checks.append(
                unchecked(f"measurement {name}", registers[name].hex(), f"no value was given; --measurement {name}=HEX")
            )
        else:
            found, wanted = registers[name], accepted[name]
            held = any(hmac.compare_digest(found, one) for one in wanted)
            checks.append(decided(f"measurement {name}", held, found.hex(), " or ".join(one.hex() for one in wanted)))
    return checks


def parse_measurements(words: Iterable[str]) -> dict[str, list[bytes]]:
    """`HEX` or `NAME=HEX` by name; several of one name are alternatives.

    Raises:
      RequestError: a value that is not hexadecimal, or as short as no digest is.
    """
    found: dict[str, list[bytes]] = {}
    for word in words:
        name, separator, digits = word.rpartition("=")
        try:
            value = bytes.fromhex(digits)
        except ValueError:
            value = b""
        if len(value) < 32 or (separator and not name):
            raise RequestError(f"a measurement is HEX or NAME=HEX with 32 or 48 bytes, got {word!r}.")
        found.setdefault(name or LAUNCH, []).append(value)
    return found


def _printable(text: str) -> str:
    """What came from a server must not write into the terminal as it likes."""
    return "".join(character if character.isprintable() else "?" for character in text)
