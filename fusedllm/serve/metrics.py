"""Prometheus metrics: vLLM's names with our prefix, so that its dashboards need one word replaced."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from fusedllm.llm import LLM

PREFIX = "fusedllm:"

# Upper ends of histograms. From what a short prompt on an accelerator takes to what a long queue makes of it; from a
# fast token to a stuck one; from a word to an hour; and lengths by octaves.
FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
INTER_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 3600.0)
TOKENS = tuple(float(2**power) for power in range(18))


class Histogram:
    """Counts of values up to each bound. Several equal values cost as much as one.

    Not for several threads: the event loop's alone.
    """

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self._name = PREFIX + name
        self._documentation = documentation
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts `value`, `times` over."""
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self) -> HistogramMetricFamily:
        """The histogram as Prometheus has it: counts add up from bound to bound."""
        family = HistogramMetricFamily(self._name, self._documentation)
        bounds = [*map(str, self._bounds), "+Inf"]
        family.add_metric([], list(zip(bounds, itertools.accumulate(map(float, self._counts)), strict=True)), self._sum)
        return family


class Metrics(Collector):
    """Everything `/metrics` tells of one server. What the engine counts is read from it when somebody asks.

    The methods are for the event loop's thread.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._finished: Counter[str] = Counter()
        self._responses: Counter[int] = Counter()
        self._compiles = 0
        self._first_token = Histogram(
            "time_to_first_token_seconds", "From a request's arrival until its first token.", FIRST_TOKEN_SECONDS
        )
        self._inter_token = Histogram(
            "inter_token_latency_seconds", "Between two tokens of a request.", INTER_TOKEN_SECONDS
        )
        self._seconds = Histogram(
            "e2e_request_latency_seconds", "From a request's arrival until its end.", REQUEST_SECONDS
        )
        self._prompt = Histogram("request_prompt_tokens", "Tokens of a request's prompt.", TOKENS)
        self._generation = Histogram("request_generation_tokens", "Tokens of a request's answer.", TOKENS)
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def observe_first_token(self, seconds: float) -> None:
        """A request has its first token, `seconds` after it came."""
        self._first_token.observe(seconds)

    def observe_inter_token(self, seconds: float, tokens: int) -> None:
        """`tokens` tokens came together, `seconds` after those before them: each of them took its part."""
        if tokens > 0:
            self._inter_token.observe(seconds / tokens, tokens)

    def observe_request(self, finish_reason: str, prompt_tokens: int, completion_tokens: int, seconds: float) -> None:
        """A request has ended, `seconds` after it came."""
        self._finished[finish_reason] += 1
        self._prompt.observe(prompt_tokens)
        self._generation.observe(completion_tokens)
        self._seconds.observe(seconds)

    def observe_response(self, status: int) -> None:
        """A request of HTTP was answered; `status` is 0 where its client left before."""
        self._responses[status] += 1

    def observe_compile(self) -> None:
        """Something was compiled after the server was ready."""
        self._compiles += 1

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask the engine."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All metrics, as of now."""
        stats = self._llm.engine.stats()
        usage = stats.pages_in_use / stats.pages_total if stats.pages_total else 0.0
        yield _gauge("num_requests_running", "Requests that hold pages.", stats.num_running)
        yield _gauge("num_requests_waiting", "Requests in the queue.", stats.num_waiting)
        yield _gauge("kv_cache_usage_perc", "Part of the KV cache that running requests hold, from 0 to 1.", usage)
        yield _gauge("kv_cache_pages_in_use", "Pages that running requests hold.", stats.pages_in_use)
        yield _gauge("kv_cache_pages_cached", "Further pages that hold prefixes.", stats.pages_cached)
        yield _gauge("kv_cache_pages", "Pages of the KV cache.", stats.pages_total)
        yield _count("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries)
        yield _count("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits)
        yield _count("num_preemptions", "Requests that gave their pages up for others.", stats.preemptions)
        yield _count("prompt_tokens", "Tokens of prompts.", stats.prompt_tokens)
        yield _count("generation_tokens", "Tokens of answers.", stats.generated_tokens)
        yield _count("failed_steps", "Launches that failed, with the requests in them.", stats.failed_steps)
        yield _count("compiles_after_ready", "Programs compiled while serving; none should be.", self._compiles)
        finished = CounterMetricFamily(
            PREFIX + "request_success", "Requests by the reason of their end.", labels=["finished_reason"]
        )
        for reason, number in sorted(self._finished.items()):
            finished.add_metric([reason], number)
        yield finished
        responses = CounterMetricFamily(PREFIX + "http_responses", "HTTP answers by status.", labels=["status"])
        for status, number in sorted(self._responses.items()):
            responses.add_metric([str(status)], number)
        yield responses
        yield from boundary_families(self._llm)
        for histogram in (self._first_token, self._inter_token, self._seconds, self._prompt, self._generation):
            yield histogram.family()


def boundary_families(llm: LLM) -> Iterator[Metric]:
    """What has crossed the trust boundary, by site, and what was computed beforehand."""
    policy = llm.policy.name
    crossings, seconds = (
        CounterMetricFamily(PREFIX + name, words, labels=["policy", "site"])
        for name, words in (
            ("boundary_crossings", "Products sent to the untrusted device."),
            ("boundary_seconds", "From a product's sending until its results were there and checked."),
        )
    )
    moved = CounterMetricFamily(
        PREFIX + "boundary_bytes", "Bytes that crossed.", labels=["policy", "site", "direction"]
    )
    for site, found in sorted(llm.boundary.by_site().items()):
        crossings.add_metric([policy, site], found.count)
        seconds.add_metric([policy, site], found.seconds)
        moved.add_metric([policy, site, "to_device"], found.bytes_to_device)
        moved.add_metric([policy, site, "to_host"], found.bytes_to_host)
    yield from (crossings, seconds, moved)
    pads = llm.pads.values()
    yield _count("pad_rows", "Rows of pads made for what is to be hidden.", sum(report.rows for report in pads))
    yield _count("pad_seconds", "Seconds of making them, beside the crossings.", sum(report.seconds for report in pads))
    yield _gauge("pad_bytes_waiting", "Bytes of pads that wait.", sum(report.waiting_bytes for report in pads))


def _gauge(name: str, documentation: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, documentation, value=value)


def _count(name: str, documentation: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, documentation, value=value)


router = APIRouter()


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """What Prometheus scrapes."""
    return Response(request.app.state.server.metrics.render(), media_type=CONTENT_TYPE_LATEST)
