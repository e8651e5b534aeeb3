"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .core import Service

# A click takes milliseconds on a GPU, an encoder run up to half a minute on a CPU.
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """The metrics of one service, in a registry of their own.

    Args:
        service: whose stages, runs, queues and cache are watched.
    """

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        labels = ("route", "method", "status")
        self.requests = Counter("sam3rt_requests", "Requests", labels, registry=self.registry)
        self.seconds = Histogram(
            "sam3rt_request_seconds",
            "Time from a request's header to its answer",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.errors = Counter("sam3rt_errors", "Refusals", ("kind",), registry=self.registry)
        stages = Histogram(
            "sam3rt_stage_seconds",
            "Time of the model's stages",
            ("stage",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        service.model.on_stage = lambda stage, seconds: stages.labels(stage).observe(seconds)
        runs = Histogram(
            "sam3rt_run_objects",
            "Objects decoded together",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        service.on_run = runs.observe
        waiting = Gauge("sam3rt_waiting", "Requests that wait", ("queue",), registry=self.registry)
        waiting.labels("images").set_function(lambda: service.uploads.waiting)
        waiting.labels("clicks").set_function(lambda: service.clicks.waiting)
        self.registry.register(_Cache(service))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


class _Cache:
    """The cache's statistics, read when they are asked for."""

    def __init__(self, service: Service) -> None:
        self._cache = service.cache

    def collect(self) -> Iterator[Metric]:
        now = self._cache.statistics()
        uses = CounterMetricFamily(
            "sam3rt_cache_uses", "Uses of embeddings, by where they were", labels=["result"]
        )
        for result, value in (("hit", now.hits), ("load", now.loads), ("miss", now.misses)):
            uses.add_metric([result], value)
        yield uses
        for name, what, value in (
            ("evictions", "Embeddings that had to make room", now.evictions),
            ("folder_errors", "Files that could not be read or written", now.folder_errors),
        ):
            yield CounterMetricFamily(f"sam3rt_cache_{name}", what, value=value)
        for name, what, value in (
            ("bytes", "Memory of embeddings", now.bytes),
            ("entries", "Embeddings in memory", now.entries),
        ):
            yield GaugeMetricFamily(f"sam3rt_cache_{name}", what, value=value)
