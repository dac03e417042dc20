"""`fusedllm verify` against a real server with TLS: honest, relayed, replayed, and of other software."""

from __future__ import annotations

import base64
import subprocess
import sys
from functools import partial

import httpx
import pytest
from attestation_stand_in import MANIFEST, FakeKernel, SnpMachine, tls_pair
from relay import relayed
from serving import app_of, on_a_port

from fusedllm import verifying
from fusedllm.attesting import Attester
from fusedllm.cli import main
from fusedllm.errors import AttestationError, RequestError
from fusedllm.partition import sev
from fusedllm.partition.checks import LAUNCH, Outcome
from fusedllm.serve.attestation import Quoting
from fusedllm.verifying import Expectations, verify

HELD, FAILED, UNCHECKED = Outcome.HELD, Outcome.FAILED, Outcome.UNCHECKED


@pytest.fixture(scope="module")
def machine():
    return SnpMachine()


@pytest.fixture(autouse=True)
def our_root(machine, monkeypatch):
    """Reports of our machine are signed by a root of our own."""
    checker = partial(sev.check_report, roots=machine.roots)
    monkeypatch.setattr(verifying, "CHECKERS", {**verifying.CHECKERS, "sev_guest": checker})


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tls_pair(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def app(tiny_llm, machine, pair, tmp_path_factory):
    kernel = FakeKernel(tmp_path_factory.mktemp("report"), make_blob=machine.report)
    app = app_of(tiny_llm, certificate=pair[0], private_key=pair[1])
    app.state.server.quoting = Quoting(Attester(MANIFEST, pair[0], kernel.quote))
    # The tests ask more often than anybody else would.
    app.state.server.quoting._rates._per_minute = 10_000
    return app


@pytest.fixture(scope="module")
def server(app, pair):
    with on_a_port(app, pair) as url:
        yield url


def expectations(machine, **changes):
    return Expectations(
        **{
            "manifest_sha256": MANIFEST.sha256.hex(),
            "measurements": {LAUNCH: [machine.measurement]},
            "certificates": machine.certificates,
            "min_tcb": (3, 0, 8, 115),
            **changes,
        }
    )


def outcomes(verdict):
    return {check.name: check.outcome for check in verdict.checks}


def but(verdict, outcome):
    return [name for name, found in outcomes(verdict).items() if found is outcome]


def test_an_honest_server_holds(server, machine):
    verdict = verify(server, expectations(machine))
    assert verdict.holds, str(verdict)
    assert verdict.policy == "plain"
    assert "every check held" in verdict.conclusion


def test_somebody_in_between_who_relays_everything_fails(server, machine, tmp_path):
    """Quote, nonce and manifest are all genuine; only the key of the connection is not the attested one."""
    with relayed(server, tls_pair(tmp_path)) as url:
        verdict = verify(url, expectations(machine))
    assert not verdict.holds
    assert but(verdict, FAILED) == ["TLS key", "report data"]


def test_somebody_in_between_who_claims_the_own_key_fails_by_the_quote(server, machine, tmp_path):
    from fusedllm.partition.attestation import public_key_sha256

    pair = tls_pair(tmp_path)
    own = public_key_sha256(pair[0].read_bytes()).hex()
    with relayed(server, pair, lambda body: {**body, "tls_public_key_sha256": own}) as url:
        verdict = verify(url, expectations(machine))
    assert but(verdict, FAILED) == ["report data"]
    assert not verdict.holds


def test_a_replayed_answer_fails_by_the_nonce(server, machine, pair, tmp_path):
    """Even behind the right key: the server's own earlier answer is not the one to this nonce."""
    old = httpx.get(f"{server}/v1/attestation?nonce={'ab' * 32}", verify=False).json()
    for change in (lambda body: old, lambda body: {**old, "nonce": body["nonce"]}):
        with relayed(server, pair, change) as url:
            verdict = verify(url, expectations(machine))
        assert not verdict.holds
        assert "report data" in but(verdict, FAILED)
        assert outcomes(verdict)["TLS key"] is HELD
    assert outcomes(verdict)["nonce"] is HELD


def test_another_manifest_than_the_expected_fails(server, machine):
    verdict = verify(server, expectations(machine, manifest_sha256="0" * 64))
    assert but(verdict, FAILED) == ["manifest"]
    assert not verdict.holds


def test_a_manifest_that_was_exchanged_on_the_way_fails_by_the_quote(server, machine, pair):
    import dataclasses

    better = dataclasses.replace(MANIFEST, policy="masked")
    with relayed(server, pair, lambda body: {**body, "manifest": better.text}) as url:
        verdict = verify(url, expectations(machine, manifest_sha256=better.sha256.hex()))
    assert but(verdict, FAILED) == ["report data"]


@pytest.mark.parametrize(
    ("left_out", "check"),
    [
        ("manifest_sha256", "manifest"),
        ("measurements", "measurement measurement"),
        ("certificates", "signature"),
        ("min_tcb", "TCB"),
    ],
)
def test_what_was_not_checked_is_said_and_is_no_success(server, machine, left_out, check):
    full = expectations(machine)
    default = getattr(Expectations(), left_out)
    verdict = verify(server, expectations(machine, **{left_out: default}))
    assert but(verdict, UNCHECKED) == [check]
    assert not verdict.holds
    assert "no confidentiality claim" in str(verdict)
    assert verify(server, full).holds


def test_without_tls_nothing_is_bound(tiny_llm, machine, tmp_path):
    app = app_of(tiny_llm)
    kernel = FakeKernel(tmp_path, make_blob=machine.report)
    app.state.server.quoting = Quoting(Attester(MANIFEST, None, kernel.quote))
    with on_a_port(app) as url:
        verdict = verify(url, expectations(machine))
        assert but(verdict, FAILED) == ["TLS key"]
        assert "not bound" in str(verdict)
        with pytest.raises(RequestError, match="not sent without TLS"):
            verify(url, api_key="sesame-open")


def test_a_proxy_that_ends_tls_is_not_the_attested_machine(tiny_llm, machine, pair, tmp_path):
    app = app_of(tiny_llm)
    kernel = FakeKernel(tmp_path, make_blob=machine.report)
    app.state.server.quoting = Quoting(Attester(MANIFEST, None, kernel.quote))
    with on_a_port(app) as behind, relayed(behind, pair) as url:
        verdict = verify(url, expectations(machine))
    assert but(verdict, FAILED) == ["TLS key", "report data"]


def test_a_provider_that_is_not_known_is_no_success(server, machine, pair):
    with relayed(server, pair, lambda body: {**body, "provider": "arm_cca_guest"}) as url:
        verdict = verify(url, expectations(machine))
    assert outcomes(verdict)["signature"] is UNCHECKED
    assert not verdict.holds


def test_an_api_key_is_only_told_to_a_server_with_a_valid_certificate(tiny_llm, machine, pair, tmp_path):
    app = app_of(tiny_llm, api_keys=("sesame-open",))
    kernel = FakeKernel(tmp_path, make_blob=machine.report)
    app.state.server.quoting = Quoting(Attester(MANIFEST, pair[0], kernel.quote))
    with on_a_port(app, pair) as url:
        with pytest.raises(AttestationError, match="status 401: this server needs an API key"):
            verify(url, expectations(machine))
        with pytest.raises(AttestationError, match="certificate verify failed"):
            verify(url, expectations(machine), api_key="sesame-open")
        assert verify(url, expectations(machine), api_key="sesame-open", authorities=pair[0]).holds
        # Not even the right address helps somebody in between with another key.
        with (
            relayed(url, tls_pair(tmp_path / "other")) as between,
            pytest.raises(AttestationError, match="certificate verify failed"),
        ):
            verify(between, expectations(machine), api_key="sesame-open", authorities=pair[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda body: {},
        lambda body: [],
        lambda body: {**body, "quote": "%%%"},
        lambda body: {**body, "quote": 5},
        lambda body: {**body, "manifest": "\ud800"},
        lambda body: {**body, "nonce": "\ud800"},
        lambda body: {**body, "tls_public_key_sha256": 1},
        lambda body: {"pad": "x" * verifying.MAX_ANSWER_BYTES},
    ],
)
def test_what_is_no_answer_is_one_sentence(server, machine, pair, change):
    with relayed(server, pair, change) as url, pytest.raises(AttestationError) as failed:
        verify(url, expectations(machine))
    assert str(failed.value).endswith(".")
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda body: {**body, "manifest": "{}"}, "manifest"),
        (lambda body: {**body, "manifest": body["manifest"] + " "}, "manifest"),
        (lambda body: {**body, "quote": base64.b64encode(b"short").decode()}, "signature"),
        (lambda body: {**body, "provider": "tdx_guest"}, "signature"),
        (lambda body: {**body, "nonce": "\u00e9"}, "nonce"),
    ],
)
def test_an_answer_that_is_wrong_fails(server, machine, pair, change, check):
    pytest.importorskip("dcap_qvl")
    with relayed(server, pair, change) as url:
        verdict = verify(url, expectations(machine))
    assert outcomes(verdict)[check] is FAILED


@pytest.mark.parametrize(
    "url", ["", "server", "ftp://server", "https://", "https://server:port", "https://server:99999"]
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(RequestError):
        verify(url)


def test_a_server_that_is_not_there_is_one_sentence():
    with pytest.raises(AttestationError, match="gives no attestation"):
        verify("https://127.0.0.1:1")


@pytest.fixture
def files(machine, tmp_path):
    (tmp_path / "chain.pem").write_bytes(b"".join(machine.certificates))
    (tmp_path / "manifest.json").write_text(MANIFEST.text + "\n")
    return tmp_path


def arguments(server, machine, files):
    return [
        "verify", server, "--expect-manifest", str(files / "manifest.json"), "--measurement", machine.measurement.hex(),
        "--certificates", str(files / "chain.pem"), "--min-tcb", "3.0.8.115",
    ]  # fmt: skip


def test_the_command_exits_with_0_only_if_everything_held(server, machine, files, capsys):
    assert main.main(arguments(server, machine, files)) == 0
    shown = capsys.readouterr().out
    assert shown.count("held") == shown.count("expected") + 1
    assert machine.measurement.hex() in shown
    assert "policy plain makes no confidentiality claim against the accelerator" in shown
    assert main.main(arguments(server, machine, files)[:-2]) == 1
    shown = capsys.readouterr()
    assert "not checked" in shown.out
    assert shown.err.endswith("0 checks failed, 1 were not made: no confidentiality claim.\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--min-tcb", "3.0"], "--min-tcb is written as"),
        (["--measurement", "xyz"], "HEX or NAME=HEX"),
        (["--expect-manifest", "nowhere.json"], "no such file"),
        (["--collateral", "nowhere.json"], "no such file"),
    ],
)
def test_options_that_can_not_be_are_one_sentence(server, options, words, capsys):
    assert main.main(["verify", server, *options]) == 2
    assert words in capsys.readouterr().err


def test_a_client_needs_no_jax():
    code = "import sys; from fusedllm.cli.main import main; main(['verify', 'https://127.0.0.1:1']); "
    code += "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
