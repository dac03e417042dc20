"""What a quote vouches for: `report_data` binds a nonce, the server's TLS key and its manifest into 64 bytes."""

from __future__ import annotations

import hashlib
import re

from fusedllm.errors import AttestationError, RequestError

# Says which protocol the 64 bytes belong to, so that a quote made for another can't be shown here.
LABEL = b"fusedllm-v1"

# A nonce of 16 random bytes does not come twice; the upper end bounds what a stranger makes the server hash.
MIN_NONCE, MAX_NONCE = 16, 64

DIGEST_BYTES = 32
REPORT_DATA_BYTES = 64

# In place of the key's digest where there is no TLS: no key has this digest, and the lengths stay unambiguous.
NO_KEY = bytes(DIGEST_BYTES)


def report_data(nonce: bytes, tls_public_key_sha256: bytes | None, manifest_sha256: bytes) -> bytes:
    """The 64 bytes that a quote is made for: SHA-512 (FIPS 180-4) of the label, the nonce and the two digests.

    Only the nonce's length varies, and what follows it has always 64 bytes, so no other parts give the same input.

    Args:
      nonce: 16 to 64 bytes, chosen by who verifies.
      tls_public_key_sha256: SHA-256 of the certificate's SubjectPublicKeyInfo (DER); `None` without TLS.
      manifest_sha256: `Manifest.sha256`.

    Raises:
      AttestationError: a part has another length.
    """
    key = NO_KEY if tls_public_key_sha256 is None else tls_public_key_sha256
    if not MIN_NONCE <= len(nonce) <= MAX_NONCE:
        raise AttestationError(f"a nonce has {MIN_NONCE} to {MAX_NONCE} bytes, got {len(nonce)}.")
    for what, digest in (("TLS key", key), ("manifest", manifest_sha256)):
        if len(digest) != DIGEST_BYTES:
            raise AttestationError(f"the digest of the {what} must have {DIGEST_BYTES} bytes, got {len(digest)}.")
    return hashlib.sha512(LABEL + nonce + key + manifest_sha256).digest()


def parse_nonce(text: str) -> bytes:
    """The bytes of a nonce in hexadecimal.

    Raises:
      RequestError: it is not hexadecimal, or not 16 to 64 bytes long.
    """
    if not re.fullmatch(r"(?:[0-9a-fA-F]{2})*", text) or not MIN_NONCE <= len(text) // 2 <= MAX_NONCE:
        raise RequestError(
            f"the nonce must be {MIN_NONCE} to {MAX_NONCE} bytes in hexadecimal, got {len(text)} characters; "
            "send fresh random ones."
        )
    return bytes.fromhex(text)


def public_key_sha256(certificate: bytes) -> bytes:
    """SHA-256 of the SubjectPublicKeyInfo of a certificate in DER, or of the first one in PEM.

    It is what `curl --pinnedpubkey` and RFC 7469 pin, and outlives a renewal of the certificate with the same key.

    Raises:
      AttestationError: it is no certificate.
    """
    # Verifying and serving need it, importing this file does not.
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    try:
        if b"-----BEGIN" in certificate:
            first = x509.load_pem_x509_certificates(certificate)[0]
        else:
            first = x509.load_der_x509_certificate(certificate)
        key = first.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except Exception as error:  # the library raises whatever its parser of ASN.1 does
        raise AttestationError(f"the TLS certificate can't be read: {error}.") from error
    return hashlib.sha256(key).digest()
