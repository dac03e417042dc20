"""TLS: a server with a certificate, made here."""

from __future__ import annotations

import shutil
import ssl
import subprocess

import httpx
import pytest
from operations_stand_in import serving

from fusedllm.errors import SettingsError
from fusedllm.serve import run


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A certificate of 127.0.0.1 that signs itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("the command openssl, which makes the certificate, is not installed")
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", key, "-out", certificate, "-subj", "/CN=server", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


def test_a_client_that_trusts_the_certificate_is_served(pair):
    certificate, key = pair
    with serving(certificate=certificate, private_key=key) as handle:
        assert handle.url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=str(certificate))
        body = {"stream": True, "events": 5, "bytes": 100_000}
        streamed = httpx.post(f"{handle.url}/v1/completions", json=body, verify=trusting)
        assert streamed.text.endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{handle.url}/health")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{handle.url.replace('https', 'http')}/health")


def test_old_versions_are_refused(pair):
    certificate, key = pair
    with serving(certificate=certificate, private_key=key) as handle:
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.load_verify_locations(certificate)
        with pytest.warns(DeprecationWarning, match="deprecated"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{handle.url}/health", verify=old)


def test_a_certificate_that_cannot_be_used_is_one_sentence(pair, tmp_path):
    certificate, key = pair
    other = tmp_path / "other.pem"
    subprocess.run(["openssl", "genrsa", "-out", other, "2048"], check=True, capture_output=True)
    locked = tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "ec", "-in", key, "-aes256", "-passout", "pass:secret", "-out", locked],
        check=True, capture_output=True,
    )  # fmt: skip
    no_pem = tmp_path / "text.pem"
    no_pem.write_text("no certificate")
    for wrong in ((certificate, other), (certificate, locked), (certificate, None), (no_pem, key)):
        with pytest.raises(SettingsError, match="can't be used with its private key") as refused:
            run(None, port=0, certificate=wrong[0], private_key=wrong[1], block=False)
        assert "\n" not in str(refused.value)
