"""The client's face of attestation: asks a server who it is, and believes nothing that it can't check.

Loads no jax: a client needs neither a model nor an accelerator.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import http.client
import json
import os
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fusedllm.errors import AttestationError, RequestError
from fusedllm.partition import intel, sev
from fusedllm.partition.attestation import public_key_sha256, report_data
from fusedllm.partition.checks import Check, Expected, Outcome, Verdict, decided, parse_measurements, same, unchecked
from fusedllm.partition.manifest import Manifest

__all__ = ["Expectations", "Verdict", "parse_measurements", "verify"]

PATH = "/v1/attestation"
NONCE_BYTES = 32
TIMEOUT_SECONDS = 60.0

# Far more than a quote with its certificates takes.
MAX_ANSWER_BYTES = 2**21

# How each of the kernel's providers signs.
CHECKERS: Mapping[str, Callable[[bytes, Expected], list[Check]]] = {
    "tdx_guest": intel.check_quote,
    "sev_guest": sev.check_report,
}


@dataclass(frozen=True, slots=True)
class Expectations:
    """What a server is held to. What is left out is not checked, and the verdict says so.

    Attributes:
      manifest_sha256: of the manifest, in hexadecimal.
      measurements, collateral, tcb_statuses, certificates, min_tcb: as in `Expected`.
    """

    manifest_sha256: str | None = None
    measurements: Mapping[str, Sequence[bytes]] = field(default_factory=dict)
    collateral: str | None = None
    tcb_statuses: Sequence[str] = ()
    certificates: Sequence[bytes] = ()
    min_tcb: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a server sent, and the key of the connection that it came through (`None` without TLS)."""

    key: bytes | None
    nonce: str
    provider: str
    quote: bytes
    manifest: str
    claimed_key: str | None


def verify(
    url: str,
    expectations: Expectations | None = None,
    *,
    api_key: str | None = None,
    authorities: Path | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> Verdict:
    """Asks the server at `url` for its attestation, over one connection, and checks it.

    The TLS key is taken from that connection, whoever signed its certificate: the quote vouches for it or nothing
    does. Only where an `api_key` is sent must the certificate be valid too, as it would be told to whoever answers.

    Args:
      url: `https://host:port`.
      expectations: what to hold the server to.
      api_key: for servers that ask for one.
      authorities: PEM file of certificates to trust where an `api_key` is sent; by default the system's.
      timeout: in seconds, of each operation on the network.

    Raises:
      AttestationError: no answer, or one that is none.
      RequestError: a URL that can't be.
    """
    expectations = expectations or Expectations()
    nonce = os.urandom(NONCE_BYTES)
    answer = _ask(url, nonce, api_key, authorities, timeout)
    # All three parts are ours: the nonce that was sent, the key that was met, and the digest of what was received.
    manifest_sha256 = hashlib.sha256(answer.manifest.encode()).digest()
    expected = Expected(
        report_data=report_data(nonce, answer.key, manifest_sha256),
        now=int(time.time()),
        measurements=expectations.measurements,
        collateral=expectations.collateral,
        tcb_statuses=expectations.tcb_statuses,
        certificates=expectations.certificates,
        min_tcb=expectations.min_tcb,
    )
    checker = CHECKERS.get(answer.provider)
    if checker is None:
        known = " and ".join(CHECKERS)
        quoted = [unchecked("signature", f"a quote of {answer.provider!r}", f"only {known} are known")]
    else:
        quoted = checker(answer.quote, expected)
    policy, manifest = _check_manifest(answer.manifest, manifest_sha256, expectations.manifest_sha256)
    echoed = decided(
        "nonce", hmac.compare_digest(answer.nonce.encode(), nonce.hex().encode()), answer.nonce, nonce.hex()
    )
    return Verdict((_check_channel(answer), echoed, *manifest, *quoted), policy)


def _check_channel(answer: _Answer) -> Check:
    claimed = answer.claimed_key or "no key: the server has no TLS of its own"
    if answer.key is None:
        return Check("TLS key", Outcome.FAILED, "a connection without TLS: not bound", claimed)
    return decided("TLS key", answer.key.hex() == answer.claimed_key, answer.key.hex(), claimed)


def _check_manifest(text: str, found: bytes, expected: str | None) -> tuple[str | None, list[Check]]:
    try:
        policy = Manifest.from_text(text).policy
    except AttestationError as error:
        return None, [decided("manifest", False, str(error), "a manifest")]
    if expected is None:
        return policy, [unchecked("manifest", text, "none was given; --expect-manifest FILE or SHA256")]
    return policy, [same("manifest", found, bytes.fromhex(expected))]


def _ask(url: str, nonce: bytes, api_key: str | None, authorities: Path | None, timeout: float) -> _Answer:
    connection = _connect(url, api_key is not None, authorities, timeout)
    headers = {"Accept": "application/json", "Connection": "close"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    try:
        connection.connect()
        # What was met here is what must be attested: a second connection might meet somebody else.
        connection.auto_open = 0
        key = None
        if isinstance(connection.sock, ssl.SSLSocket):
            key = public_key_sha256(connection.sock.getpeercert(binary_form=True) or b"")
        prefix = urlsplit(url).path.rstrip("/").removesuffix("/v1")
        connection.request("GET", f"{prefix}{PATH}?nonce={nonce.hex()}", headers=headers)
        # The connection forgets the response, and leaves it open where it was not read to its end.
        with connection.getresponse() as response:
            body = response.read(MAX_ANSWER_BYTES + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise AttestationError(f"{url} gives no attestation: {str(error) or type(error).__name__}.") from error
    finally:
        connection.close()
    if len(body) > MAX_ANSWER_BYTES:
        raise AttestationError(f"{url} answered with more than {MAX_ANSWER_BYTES} bytes, which no attestation has.")
    if response.status != http.client.OK:
        raise AttestationError(f"{url} gives no attestation, status {response.status}: {_message(body)}")
    return _parse(body, key, url)


def _connect(url: str, secret: bool, authorities: Path | None, timeout: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise RequestError(f"the URL {url} has no such port: {error}.") from error
    if parts.scheme not in ("http", "https") or not host:
        raise RequestError(f"a server's URL is written as https://host:port, got {url!r}.")
    if parts.scheme == "http":
        if secret:
            raise RequestError("an API key is not sent without TLS; ask at an https URL.")
        return http.client.HTTPConnection(host, port, timeout=timeout)
    context = ssl.create_default_context(cafile=None if authorities is None else str(authorities))
    if not secret:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(host, port, timeout=timeout, context=context)


def _parse(body: bytes, key: bytes | None, url: str) -> _Answer:
    try:
        fields: Any = json.loads(body)
        claimed = fields["tls_public_key_sha256"]
        texts = [fields[name] for name in ("nonce", "provider", "manifest", "quote")]
        if not all(isinstance(text, str) for text in texts) or not isinstance(claimed, str | None):
            raise TypeError("a field has another type")
        # Half of a surrogate pair is JSON, and has no bytes.
        "".join(texts).encode()
        quote = base64.b64decode(texts[3], validate=True)
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise AttestationError(f"{url} answered with what is no attestation: {error}.") from error
    return _Answer(key, texts[0], texts[1], quote, texts[2], claimed)


def _message(body: bytes) -> str:
    """The sentence in an error object, or what there is instead."""
    try:
        text = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = body[:200].decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "?" for character in text)
