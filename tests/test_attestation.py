"""Report data: what changes it, what does not, and what is refused."""

from __future__ import annotations

import hashlib

import hypothesis
import pytest
from attestation_stand_in import tls_pair
from hypothesis import strategies as st

from fusedllm.errors import AttestationError, RequestError
from fusedllm.partition.attestation import NO_KEY, parse_nonce, public_key_sha256, report_data

NONCES = st.binary(min_size=16, max_size=64)
DIGESTS = st.binary(min_size=32, max_size=32)
PARTS = st.tuples(NONCES, st.none() | DIGESTS.filter(lambda digest: digest != NO_KEY), DIGESTS)


def test_report_data_is_the_hash_that_the_page_promises():
    nonce, key, manifest = bytes(16), b"k" * 32, b"m" * 32
    assert report_data(nonce, key, manifest) == hashlib.sha512(b"fusedllm-v1" + nonce + key + manifest).digest()
    assert report_data(nonce, None, manifest) == hashlib.sha512(b"fusedllm-v1" + nonce + bytes(32) + manifest).digest()


@hypothesis.given(PARTS, PARTS)
def test_any_part_that_changes_changes_report_data(one, other):
    assert (report_data(*one) == report_data(*other)) == (one == other)


@hypothesis.given(PARTS, st.data())
def test_any_bit_that_changes_changes_report_data(parts, data):
    nonce, key, manifest = parts
    changed = [nonce, key or bytes(32), manifest]
    which = data.draw(st.integers(0, 2))
    bit = data.draw(st.integers(0, 8 * len(changed[which]) - 1))
    value = int.from_bytes(changed[which], "big") ^ 1 << bit
    changed[which] = value.to_bytes(len(changed[which]), "big")
    assert report_data(*changed) != report_data(nonce, key, manifest)


@hypothesis.given(NONCES, DIGESTS, DIGESTS)
def test_a_byte_can_not_move_from_one_part_into_another(nonce, key, manifest):
    for parts in ((nonce + key[:1], key[1:], manifest), (nonce, key[1:], key[:1] + manifest)):
        with pytest.raises(AttestationError):
            report_data(*parts)


@pytest.mark.parametrize("length", [0, 15, 65])
def test_a_nonce_of_another_length_is_refused(length):
    with pytest.raises(AttestationError, match=f"got {length}"):
        report_data(bytes(length), None, bytes(32))
    with pytest.raises(RequestError, match="16 to 64 bytes in hexadecimal"):
        parse_nonce("00" * length)


@pytest.mark.parametrize(
    "text", ["zz" * 16, "0" * 33, " " + "00" * 16, "00" * 16 + "\n", "0x" + "00" * 16, "\u0660" * 32]
)
def test_a_nonce_that_is_not_hexadecimal_is_refused(text):
    with pytest.raises(RequestError):
        parse_nonce(text)


@hypothesis.given(NONCES)
def test_hexadecimal_nonces_are_read(nonce):
    assert parse_nonce(nonce.hex()) == parse_nonce(nonce.hex().upper()) == nonce


def test_a_renewed_certificate_with_the_same_key_has_the_same_digest(tmp_path):
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    pem = tls_pair(tmp_path / "a")[0].read_bytes()
    der = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
    other = tls_pair(tmp_path / "b")[0].read_bytes()
    assert public_key_sha256(pem) == public_key_sha256(der) == public_key_sha256(pem + other)
    assert public_key_sha256(pem) != public_key_sha256(other)
    for wrong in (b"", b"text", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        with pytest.raises(AttestationError, match="can't be read"):
            public_key_sha256(wrong)
