"""What `/metrics`, `/health`, `/ready` and the log tell."""

from __future__ import annotations

import dataclasses
import io
import json
import logging

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from operations_stand_in import Model, serving, wait_until
from prometheus_client.parser import text_string_to_metric_families

from fusedllm.engine.stats import EngineStats
from fusedllm.partition.pad_supply import PadReport
from fusedllm.partition.policies import POLICIES
from fusedllm.serve import logs
from fusedllm.serve.metrics import Histogram, Metrics

# What dashboards made for vLLM ask for, with our prefix.
NAMES = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "num_preemptions": "counter",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "request_success": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "failed_steps": "counter",
    "compiles_after_ready": "counter",
    "boundary_crossings": "counter",
    "boundary_bytes": "counter",
    "boundary_seconds": "counter",
    "pad_rows": "counter",
    "pad_seconds": "counter",
    "pad_bytes_waiting": "gauge",
}


def samples(text):
    """`{(name, labels): value}` of our metrics, as Prometheus' own parser reads them."""
    families = list(text_string_to_metric_families(text))
    return {
        (sample.name.removeprefix("fusedllm:"), *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("fusedllm:")
    }


def test_every_name_is_there_with_its_type_before_anything_has_happened():
    text = Metrics(Model()).render().decode()
    types = {family.name: family.type for family in text_string_to_metric_families(text)}
    assert {name: types.get(f"fusedllm:{name}") for name in NAMES} == NAMES


def test_gauges_and_counters_are_the_engines_at_the_moment_of_asking():
    model = Model()
    metrics = Metrics(model)
    assert samples(metrics.render().decode())[("num_requests_running",)] == 0
    model.engine.counters = EngineStats(
        num_running=3, num_waiting=5, pages_in_use=30, pages_cached=20, pages_total=120, prefix_queries=100,
        prefix_hits=64, preemptions=2, prompt_tokens=1000, generated_tokens=700, failed_steps=1,
    )  # fmt: skip
    found = samples(metrics.render().decode())
    assert found[("num_requests_running",)] == 3
    assert found[("num_requests_waiting",)] == 5
    assert found[("kv_cache_usage_perc",)] == 0.25
    assert found[("prefix_cache_queries_total",)] == 100
    assert found[("prefix_cache_hits_total",)] == 64
    assert found[("num_preemptions_total",)] == 2
    assert found[("prompt_tokens_total",)] == 1000
    assert found[("generation_tokens_total",)] == 700
    assert found[("failed_steps_total",)] == 1


def test_requests_are_counted_by_the_reason_of_their_end():
    metrics = Metrics(Model())
    for reason in ("stop", "length", "stop", "cancelled"):
        metrics.observe_request(reason, 10, 20, 0.3)
    metrics.observe_compile()
    found = samples(metrics.render().decode())
    assert found[("request_success_total", "stop")] == 2
    assert found[("request_success_total", "cancelled")] == 1
    assert found[("request_prompt_tokens_sum",)] == 40
    assert found[("request_generation_tokens_count",)] == 4
    assert found[("e2e_request_latency_seconds_bucket", "0.25")] == 0
    assert found[("e2e_request_latency_seconds_bucket", "0.5")] == 4
    assert found[("compiles_after_ready_total",)] == 1


def test_what_crosses_the_boundary_is_told_by_site():
    model = Model()
    metrics = Metrics(model)
    model.policy = POLICIES["masked"]
    for _ in range(3):
        with model.boundary.crossing("o") as crossing:
            crossing.bytes_to_device, crossing.bytes_to_host = 40, 20
    model.pads = {"o": PadReport(8, 5, 100, 0.25, 0.5), "down": PadReport(4, 1, 10, 0.0, 0.25)}
    found = samples(metrics.render().decode())
    assert found[("boundary_crossings_total", "masked", "o")] == 3
    assert found[("boundary_bytes_total", "to_device", "masked", "o")] == 120
    assert found[("boundary_bytes_total", "to_host", "masked", "o")] == 60
    assert found[("boundary_seconds_total", "masked", "o")] > 0
    assert found[("pad_rows_total",)] == 12
    assert found[("pad_seconds_total",)] == 1
    assert found[("pad_bytes_waiting",)] == 510


def test_tokens_of_one_launch_share_the_time_since_the_one_before():
    metrics = Metrics(Model())
    metrics.observe_inter_token(0.16, 16)
    metrics.observe_inter_token(0.1, 0)
    found = samples(metrics.render().decode())
    assert found[("inter_token_latency_seconds_count",)] == 16
    assert found[("inter_token_latency_seconds_sum",)] == pytest.approx(0.16)
    assert found[("inter_token_latency_seconds_bucket", "0.0075")] == 0
    assert found[("inter_token_latency_seconds_bucket", "0.01")] == 16


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 5))), st.lists(st.floats(0, 10), min_size=1, unique=True))
def test_a_bucket_has_all_values_up_to_its_bound(values, bounds):
    bounds.sort()
    histogram = Histogram("anything", "Anything.", bounds)
    for value, times in values:
        histogram.observe(value, times)
    for sample in histogram.family().samples:
        if sample.name.endswith("_bucket"):
            bound = float(sample.labels["le"])
            assert sample.value == sum(times for value, times in values if value <= bound)


def test_answers_are_counted_by_status():
    with serving() as handle, httpx.Client(base_url=handle.url) as client:
        client.get("/v1/models")
        client.get("/nothing")
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert samples(answer.text)[("http_responses_total", "404")] == 1


def test_health_and_readiness_tell_a_starting_server_from_a_dead_one():
    model = Model()
    with serving(model) as handle, httpx.Client(base_url=handle.url) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 200
        model.engine.alive = False
        assert client.get("/health").status_code == 503
        assert client.get("/ready").status_code == 503
        refused = client.post("/v1/completions", json={})
        assert refused.status_code == 503
        assert refused.json()["error"]["message"] == "the engine has stopped."


@pytest.fixture
def lines():
    """What the server writes to its log, as handlers of ours write it."""
    stream = io.StringIO()

    @dataclasses.dataclass
    class Lines:
        handler: logging.Handler

        def all(self):
            return stream.getvalue().splitlines()

    handler = logging.StreamHandler(stream)
    yield Lines(handler)
    logs.LOGGER.removeHandler(handler)


def attach(lines, log_format):
    lines.handler.setFormatter(logs.JsonLines() if log_format == "json" else logs.HumanLines())
    logs.LOGGER.addHandler(lines.handler)


def ask(handle, **headers):
    content = json.dumps({"prompt": "my-secret-prompt", "events": 2})
    return httpx.post(f"{handle.url}/v1/completions?token=in-the-query", content=content, headers=headers)


def test_a_request_is_one_json_line_without_what_was_asked(lines):
    with serving(log_format="json", api_keys=("sesame-open",)) as handle:
        attach(lines, "json")
        ask(handle, **{"x-request-id": "mine", "authorization": "Bearer sesame-open"})
        httpx.get(f"{handle.url}/health")
        wait_until(lambda: any("mine" in line for line in lines.all()))
    entries = [json.loads(line) for line in lines.all()]
    (entry,) = [entry for entry in entries if entry["message"] == "request"]
    assert entry["request_id"] == "mine"
    assert entry["level"] == "info"
    assert (entry["method"], entry["path"], entry["status"], entry["caller"]) == (
        "POST",
        "/v1/completions",
        200,
        "key-1",
    )
    assert entry["seconds"] >= 0
    assert entry["time"].endswith("Z")
    text = "\n".join(lines.all())
    assert "my-secret-prompt" not in text
    assert "sesame" not in text
    assert "in-the-query" not in text


def test_prompts_are_logged_for_those_who_ask_for_it(lines):
    with serving(log_prompts=True) as handle:
        attach(lines, "human")
        ask(handle)
        wait_until(lambda: any("POST" in line for line in lines.all()))
    assert any("my-secret-prompt" in line for line in lines.all())


def test_nobody_writes_a_log_line_of_his_own(lines):
    attach(lines, "human")
    logs.log(logging.INFO, "request", path="/x\n12:00:00 INFO all is well\x1b[2J\u2028")
    (line,) = lines.all()
    assert r"/x\n12:00:00 INFO all is well\x1b[2J" in line


@pytest.mark.parametrize("log_format", ["json", "human"])
def test_a_failure_is_logged_with_its_traceback(lines, log_format):
    attach(lines, log_format)
    try:
        raise ValueError("because")
    except ValueError:
        logs.LOGGER.exception("failed")
    assert "ValueError: because" in "\n".join(lines.all())
    if log_format == "json":
        (line,) = lines.all()
        assert "Traceback" in json.loads(line)["traceback"]
