"""Prometheus metrics of one endpoint."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pipelines.serving.engine import Request
from pipelines.serving.manager import Manager
from pipelines.serving.protocol import Usage

LATENCIES_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_LATENCIES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Queue and speed as they are, requests and tokens as they come, latencies as histograms."""

    def __init__(self, manager: Manager) -> None:
        self._registry = CollectorRegistry()
        for name, what in (
            ("waiting", "Requests in the queue"),
            ("running", "Requests that are read or decoded"),
            ("tokens_per_s", "New tokens a second, over the last ten"),
        ):
            gauge = Gauge(f"shovel_{name}", what, registry=self._registry)
            gauge.set_function(lambda name=name: getattr(manager.current, name, 0))
        labels = ("endpoint", "status")
        self._requests = Counter("shovel_requests", "Requests by status", labels, registry=self._registry)
        self._tokens = Counter("shovel_tokens", "Tokens of answered requests", ("kind",), registry=self._registry)
        self._latency = self._histogram("request_seconds", "From a request to its last token", LATENCIES_S)
        self._first = self._histogram("first_token_seconds", "From a request to its first token", LATENCIES_S)
        self._each = self._histogram("token_seconds", "Between two tokens, mean of a request", TOKEN_LATENCIES_S)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"shovel_{name}", what, buckets=buckets, registry=self._registry)

    def count(self, endpoint: str, status: int) -> None:
        """A request was answered."""
        self._requests.labels(endpoint, str(status)).inc()

    def generated(self, request: Request, usage: Usage) -> None:
        """An answer was generated, to the end or not."""
        self._tokens.labels("prompt").inc(usage.prompt_tokens - usage.cached_tokens)
        self._tokens.labels("cached").inc(usage.cached_tokens)
        self._tokens.labels("completion").inc(usage.completion_tokens)
        if request.first_token_s is not None:
            self._first.observe(request.first_token_s - request.arrived_s)
        if request.ended_s is not None:
            self._latency.observe(request.ended_s - request.arrived_s)
            if request.first_token_s is not None and request.completion_tokens > 1:
                self._each.observe((request.ended_s - request.first_token_s) / (request.completion_tokens - 1))

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self._registry)
