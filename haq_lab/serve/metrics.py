"""Count requests, tokens and seconds, and publish them with the offloading counts as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from haq_lab.offload.session import OffloadSession

OUTCOMES = ("finished", "cancelled", "failed", "refused")
SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)  # upper bounds of the histogram's buckets


class Metrics:
    """The metrics of one server.

    Args:
        offload: The model's offloading session, or None if all experts stay in memory.

    Attributes:
        registry: The registry to publish.
        tokens_per_second: Decoded tokens per second of the newest request, or None before the first.
    """

    def __init__(self, offload: OffloadSession | None):
        self.registry = registry = CollectorRegistry()
        self.tokens_per_second: float | None = None
        self.requests = Counter("haq_lab_requests", "Requests by outcome.", ["outcome"], registry=registry)
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        self.queued = Gauge("haq_lab_requests_queued", "Requests that run or wait.", registry=registry)
        self.prompt_tokens = Counter("haq_lab_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.tokens = Counter("haq_lab_generated_tokens", "Generated tokens.", registry=registry)
        self.seconds = Counter("haq_lab_generation_seconds", "Seconds in which the model ran.", registry=registry)
        self.first_token_seconds = Histogram(
            "haq_lab_first_token_seconds",
            "Seconds from a request to its first token, with its time in the queue.",
            buckets=SECONDS,
            registry=registry,
        )
        if offload is not None:
            registry.register(_OffloadCollector(offload))


class _OffloadCollector(Collector):
    """Reads the counts of an offloading session when Prometheus asks for them."""

    def __init__(self, offload: OffloadSession):
        self._offload = offload

    def collect(self) -> Iterator[Metric]:
        stats = self._offload.expert_stats()
        for name, values, about in (
            ("hits", stats["hits"], "Choices of an expert in the fast tier by a token."),
            ("misses", stats["misses"], "Choices of an expert outside the fast tier by a token."),
            ("moved_bytes", stats["bytes_moved"], "Bytes of experts that were moved to the fast tier."),
        ):
            counter = CounterMetricFamily(f"haq_lab_offload_{name}", about, labels=["layer"])
            for layer, value in enumerate(values.sum(1)):
                counter.add_metric([str(layer)], float(value))
            yield counter
        gauge = GaugeMetricFamily("haq_lab_offload_resident_experts", "Experts in the fast tier.", labels=["layer"])
        for layer, value in enumerate(self._offload.residents().sum(1)):
            gauge.add_metric([str(layer)], float(value))
        yield gauge
