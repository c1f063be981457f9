"""What the server counts, for Prometheus to read. Needs prometheus_client (the `serve` extra)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

COUNTERS = {
    "requests": "Completions asked of the engine.",
    "completed": "Completions written to their end.",
    "cancelled": "Completions cancelled.",
    "failed": "Completions that failed.",
    "prompt_tokens": "Tokens of prompts.",
    "reused_tokens": "Tokens of prompts that were not read because a kept state had read them.",
    "generated_tokens": "Tokens drawn.",
}
GAUGES = {
    "active": "Completions being written.",
    "waiting": "Completions that wait for a slot.",
    "slots": "Completions that can be written at once.",
}
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class _EngineCollector(Collector):
    """The engine's own numbers, read when they are asked for."""

    def __init__(self, statistics: Callable[[], Any]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        numbers = self._statistics()
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"bm_jax_engine_{name}", text, value=getattr(numbers, name))
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"bm_jax_engine_{name}", text, value=getattr(numbers, name))


class Metrics:
    """The numbers of one server, in a registry of their own."""

    def __init__(self, statistics: Callable[[], Any]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(statistics))
        ProcessCollector(registry=self._registry)
        self.responses = Counter(
            "bm_jax_http_responses", "Responses by path and status.", ("path", "code"), registry=self._registry
        )
        self.latency = Histogram(
            "bm_jax_request_seconds",
            "From a request to the end of its answer.",
            ("path",),
            registry=self._registry,
            buckets=SECONDS,
        )
        self.first_token = Histogram(
            "bm_jax_first_token_seconds", "From a request to its first token.", registry=self._registry, buckets=SECONDS
        )

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self._registry)
