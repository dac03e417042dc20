"""Who signed an SEV-SNP report: AMD's root, an intermediate key, and the key of the very chip and firmware.

Source: "Versioned Chip Endorsement Key (VCEK) Certificate and KDS Interface Specification" (AMD publication 57230).
Revocation is not looked up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fusedllm.partition.checks import Check, decided
from fusedllm.partition.sev import ECDSA_P384_SHA384, SIGNED_BYTES, SnpReport

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

# SHA-256 of AMD's root certificates (ARK) in DER, as https://kdsintf.amd.com/vcek/v1/NAME/cert_chain serves them.
AMD_ROOTS = {
    "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd": "ARK-Milan",
    "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1": "ARK-Genoa",
    "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a": "ARK-Turin",
}

VCEK, VLEK = 0, 1

_AMD = "1.3.6.1.4.1.3704.1"
OID_TCB = {
    name: f"{_AMD}.3.{last}" for name, last in (("bootloader", 1), ("tee", 2), ("snp", 3), ("microcode", 8), ("fmc", 9))
}
OID_CHIP = f"{_AMD}.4"

EXPECTED = "signed by the key of this chip and firmware, which AMD's root vouches for"


class _BrokenError(Exception):
    """A link of the chain that does not hold; the message says which."""


def check_signature(report: SnpReport, certificates: Sequence[bytes], roots: Mapping[str, str], now: int) -> Check:
    """Whether the chain holds from an accepted root to the report.

    Args:
      report: the parsed report.
      certificates: files in PEM (one or several certificates) or DER, in any order.
      roots: names of the accepted root certificates by their SHA-256.
      now: seconds since 1970.
    """
    what = f"SEV-SNP report, version {report.version}"
    try:
        root, intermediate, leaf = _sorted_chain(certificates)
        name = roots.get(hashlib.sha256(_der(root)).hexdigest())
        if name is None:
            raise _BrokenError("the root certificate is none of AMD's")
        _check_dates((root, intermediate, leaf), now)
        _check_issuers(root, intermediate, leaf)
        _check_leaf(report, leaf)
        _check_report(report, _p384(leaf))
    except _BrokenError as error:
        return decided("signature", False, f"{what}: {error}", EXPECTED)
    return decided("signature", True, f"{what}, {name}", EXPECTED)


def _sorted_chain(files: Sequence[bytes]) -> tuple[x509.Certificate, x509.Certificate, x509.Certificate]:
    """Root, intermediate and leaf; there must be one of each."""
    from cryptography import x509

    try:
        found: list[x509.Certificate] = []
        for data in files:
            if b"-----BEGIN" in data:
                found += x509.load_pem_x509_certificates(data)
            else:
                found.append(x509.load_der_x509_certificate(data))
        roots = [one for one in found if one.subject == one.issuer]
        leaves = [one for one in found if _p384_or_none(one) is not None and one not in roots]
    except Exception as error:  # whatever a parser of ASN.1 raises
        raise _BrokenError(f"a certificate can't be read: {error}") from error
    others = [one for one in found if one not in roots and one not in leaves]
    if (len(roots), len(others), len(leaves)) != (1, 1, 1):
        raise _BrokenError(
            f"{len(found)} certificates were given, of which {len(roots)} are roots (ARK), {len(others)} intermediate "
            f"(ASK, ASVK) and {len(leaves)} keys of chips (VCEK, VLEK); one of each is needed"
        )
    return roots[0], others[0], leaves[0]


def _check_dates(chain: Sequence[x509.Certificate], now: int) -> None:
    when = datetime.fromtimestamp(now, UTC)
    for one in chain:
        if not one.not_valid_before_utc <= when <= one.not_valid_after_utc:
            raise _BrokenError(f"the certificate {_name(one)} is not valid at {when:%Y-%m-%d}")


def _check_issuers(root: x509.Certificate, intermediate: x509.Certificate, leaf: x509.Certificate) -> None:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    for child, parent in ((root, root), (intermediate, root), (leaf, intermediate)):
        try:
            child.verify_directly_issued_by(parent)
        except (InvalidSignature, ValueError, TypeError) as error:
            raise _BrokenError(f"the certificate {_name(child)} is not signed by {_name(parent)}") from error
    try:
        authority = intermediate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        authority = False
    if not authority:
        raise _BrokenError(f"the certificate {_name(intermediate)} may not sign others")


def _check_leaf(report: SnpReport, leaf: x509.Certificate) -> None:
    """The key must be of the kind, the chip and the firmware that the report names."""
    values = _extensions(leaf)
    kind = VCEK if OID_CHIP in values else VLEK
    if report.signing_key != kind:
        raise _BrokenError("the report was signed by a key of another kind (VCEK, VLEK) than the certificate's")
    # Turin's certificates have the 8 bytes that its chips have, others all 64.
    chip = values.get(OID_CHIP, b"")
    if kind == VCEK and (not any(chip) or report.chip_id != chip.ljust(len(report.chip_id), b"\0")):
        raise _BrokenError("the certificate is of another chip than the report")
    versions = dict(zip(("bootloader", "tee", "snp", "microcode"), report.tcb, strict=True))
    if report.fmc is not None:
        versions["fmc"] = report.fmc
    for name, version in versions.items():
        if values.get(OID_TCB[name]) != _der_integer(version):
            raise _BrokenError(f"the certificate is of another version of the firmware ({name}) than the report's")


def _check_report(report: SnpReport, key: ec.EllipticCurvePublicKey) -> None:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    if report.signature_algorithm != ECDSA_P384_SHA384:
        raise _BrokenError(f"the report has the signature algorithm {report.signature_algorithm}, known is 1")
    try:
        signature = utils.encode_dss_signature(*report.signature)
        key.verify(signature, report.raw[:SIGNED_BYTES], ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError) as error:
        raise _BrokenError("the report's signature is wrong") from error


def _p384_or_none(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey | None:
    from cryptography.hazmat.primitives.asymmetric import ec

    key = certificate.public_key()
    return key if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1) else None


def _p384(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    key = _p384_or_none(certificate)
    if key is None:
        raise _BrokenError("the leaf has no key of P-384")
    return key


def _extensions(certificate: x509.Certificate) -> dict[str, bytes]:
    """AMD's own extensions, by OID."""
    from cryptography import x509

    try:
        return {
            one.oid.dotted_string: one.value.value
            for one in certificate.extensions
            if isinstance(one.value, x509.UnrecognizedExtension)
        }
    except ValueError as error:
        raise _BrokenError(f"the extensions of {_name(certificate)} can't be read: {error}") from error


def _der_integer(value: int) -> bytes:
    """A byte as DER has it (X.690, 8.3): with a zero in front where the highest bit is set."""
    content = value.to_bytes(2 if value > 0x7F else 1, "big")
    return bytes([0x02, len(content)]) + content


def _der(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.DER)


def _name(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string()
