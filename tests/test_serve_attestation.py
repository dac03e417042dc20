"""`/v1/attestation`: 501 where there is no hardware, a quote for everybody's nonce where there is, one at a time."""

from __future__ import annotations

import asyncio
import base64
import threading
import time

import pytest
from attestation_stand_in import BUSY, MANIFEST, FakeKernel, fails, snp_blob, tls_pair
from serving import app_of, ask, the_error, with_client

from fusedllm.attesting import Attester, available
from fusedllm.partition.attestation import public_key_sha256, report_data
from fusedllm.serve import attestation
from fusedllm.serve.attestation import AttestationBody, Quoting

NONCE = bytes(range(32))
PATH = f"/v1/attestation?nonce={NONCE.hex()}"


@pytest.fixture
def kernel(tmp_path):
    root = tmp_path / "report"
    root.mkdir()
    return FakeKernel(root)


def attested(llm, attester, **settings):
    app = app_of(llm, **settings)
    app.state.server.quoting = Quoting(attester)
    return app


@pytest.mark.skipif(available(), reason="this machine can be attested")
@pytest.mark.parametrize("manifest", [None, MANIFEST])
def test_a_machine_without_the_hardware_answers_501_and_no_quote(tiny_llm, manifest):
    response = ask(app_of(tiny_llm, manifest=manifest), PATH)
    assert response.status_code == 501
    error = the_error(response)
    assert error["code"] == "attestation_unavailable"
    assert "can't be attested" in error["message"]
    assert "quote" not in response.json()


def test_a_quote_binds_nonce_key_and_manifest(tiny_llm, kernel, tmp_path):
    certificate, key = tls_pair(tmp_path / "tls")
    attester = Attester(MANIFEST, certificate, kernel.quote)
    response = ask(attested(tiny_llm, attester, certificate=certificate, private_key=key), PATH)
    assert response.status_code == 200
    body = AttestationBody.model_validate_json(response.text, strict=True, extra="forbid")
    public = public_key_sha256(certificate.read_bytes())
    assert body.nonce == NONCE.hex()
    assert (body.provider, body.generation, body.channel_bound) == ("sev_guest", 1, True)
    assert body.tls_public_key_sha256 == public.hex()
    assert body.manifest == MANIFEST.text
    assert base64.b64decode(body.quote) == snp_blob(report_data(NONCE, public, MANIFEST.sha256))
    assert list(kernel.root.iterdir()) == []


def test_without_tls_the_answer_says_that_no_channel_is_bound(tiny_llm, kernel):
    body = ask(attested(tiny_llm, Attester(MANIFEST, None, kernel.quote)), PATH).json()
    assert body["tls_public_key_sha256"] is None
    assert body["channel_bound"] is False
    assert base64.b64decode(body["quote"]) == snp_blob(report_data(NONCE, None, MANIFEST.sha256))


@pytest.mark.parametrize("query", ["", "?nonce=", "?nonce=00", f"?nonce={'zz' * 16}", f"?nonce={'00' * 65}"])
def test_a_nonce_that_is_none_is_400(tiny_llm, kernel, query):
    response = ask(attested(tiny_llm, Attester(MANIFEST, None, kernel.quote)), f"/v1/attestation{query}")
    assert response.status_code == 400
    assert "nonce" in the_error(response)["message"]
    assert kernel.writes == []


def test_it_needs_a_key_as_the_rest_does(tiny_llm, kernel):
    app = attested(tiny_llm, Attester(MANIFEST, None, kernel.quote), api_keys=("sesame-open",))
    assert ask(app, PATH).status_code == 401

    async def work(client):
        return await client.get(PATH, headers={"authorization": "Bearer sesame-open"})

    assert with_client(app, work).status_code == 200


def test_a_server_without_a_manifest_vouches_for_nothing(tiny_llm, kernel, monkeypatch):
    monkeypatch.setattr("fusedllm.attesting.available", lambda: True)
    response = ask(attested(tiny_llm, Attester(None, None, kernel.quote)), PATH)
    assert response.status_code == 501
    assert "without a manifest" in the_error(response)["message"]
    assert kernel.writes == []


def test_hardware_that_stays_busy_is_503_and_to_be_asked_again(tiny_llm, kernel):
    kernel.before["read", "outblob"] = fails(BUSY)
    response = ask(attested(tiny_llm, Attester(MANIFEST, None, kernel.quote)), PATH)
    assert response.status_code == 503
    assert the_error(response)["code"] == "attestation_failed"
    assert "retry-after" in response.headers


def test_quotes_are_made_one_at_a_time_and_hold_nobody_else_up(tiny_llm, kernel, monkeypatch):
    monkeypatch.setattr(attestation, "QUOTES_PER_MINUTE", 1000)
    inside, most, release = [0], [0], threading.Event()

    def slow(directory):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        release.wait(10)
        inside[0] -= 1

    kernel.before["read", "outblob"] = slow
    app = attested(tiny_llm, Attester(MANIFEST, None, kernel.quote))

    async def work(client):
        tasks = [asyncio.create_task(client.get(PATH)) for _ in range(attestation.MAX_WAITING)]
        while not inside[0]:
            await asyncio.sleep(0.001)
        started = time.monotonic()
        others = await client.get("/version")
        refused = await client.get(PATH)
        seconds = time.monotonic() - started
        release.set()
        return others, refused, seconds, await asyncio.gather(*tasks)

    others, refused, seconds, answers = with_client(app, work)
    assert others.status_code == 200
    # The quote that is being made takes until `release`, 10 s at most.
    assert seconds < 5
    assert refused.status_code == 503
    assert [answer.status_code for answer in answers] == [200] * attestation.MAX_WAITING
    assert most == [1]
    assert len({answer.json()["quote"] for answer in answers}) == 1


def test_a_client_that_leaves_does_not_let_the_next_one_into_the_device(kernel):
    inside, release = threading.Event(), threading.Event()
    running = [0, 0]

    def slow(directory):
        running[0] += 1
        running[1] = max(running)
        inside.set()
        release.wait(10)
        running[0] -= 1

    kernel.before["read", "outblob"] = slow

    async def work():
        quoting = Quoting(Attester(MANIFEST, None, kernel.quote))
        leaving = asyncio.create_task(quoting.attest("", NONCE))
        await asyncio.to_thread(inside.wait, 10)
        leaving.cancel()
        staying = asyncio.create_task(quoting.attest("", NONCE))
        await asyncio.sleep(0.05)
        assert running[0] == 1
        release.set()
        assert (await staying)["nonce"] == NONCE.hex()
        with pytest.raises(asyncio.CancelledError):
            await leaving

    asyncio.run(work())
    assert running[1] == 1


def test_a_caller_who_asks_too_often_gets_429(tiny_llm, kernel):
    app = attested(tiny_llm, Attester(MANIFEST, None, kernel.quote))

    async def work(client):
        return [await client.get(PATH) for _ in range(attestation.QUOTES_PER_MINUTE + 1)]

    *answered, refused = with_client(app, work)
    assert {answer.status_code for answer in answered} == {200}
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1


def test_it_is_described(tiny_llm):
    operation = ask(app_of(tiny_llm), "/openapi.json").json()["paths"]["/v1/attestation"]["get"]
    assert {"200", "400", "401", "429", "501", "503"} <= set(operation["responses"])
