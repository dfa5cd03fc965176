"""What the frontend counts. Plain integers on the hot path; prometheus-client reads them when somebody asks.

Belongs to the event loop of the frontend: nothing here is locked.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..kv_router.metrics import METRICS, worker_states

if TYPE_CHECKING:
    from .models import Model

PREFIX = "dynwire_frontend_"
ROUTER_PREFIX = "dynwire_router_"

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
GAPS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)


class Histogram:
    """Counts per bucket; `bounds` are upper limits, and one bucket more takes the rest."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count ``value``, several times if it stands for as many."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def cumulative(self) -> Iterator[tuple[str, float]]:
        """Buckets as Prometheus has them."""
        count = 0
        for bound, number in zip((*map(repr, map(float, self.bounds)), "+Inf"), self.counts, strict=True):
            count += number
            yield bound, count

    def to_dict(self) -> dict[str, Any]:
        """For the live page."""
        return {"bounds": self.bounds, "counts": self.counts, "sum": self.total}


class ModelMetrics:
    """Of one model. Kept when the model leaves and comes back, so that counters do not fall."""

    __slots__ = (
        "cached_tokens",
        "disconnects",
        "duration",
        "first_token",
        "gap",
        "in_flight",
        "input_tokens",
        "migrations",
        "output_tokens",
        "prompt_sizes",
        "requests",
    )

    def __init__(self) -> None:
        self.in_flight = 0
        self.requests: dict[tuple[str, str, int], int] = {}
        """(endpoint, stream or unary, status) -> number; 499: the client left, 200 with an error event counts as its status"""
        self.disconnects = 0
        self.migrations = 0
        self.input_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.first_token = Histogram(SECONDS)
        self.gap = Histogram(GAPS)
        self.duration = Histogram(SECONDS)
        self.prompt_sizes = Histogram(TOKENS)

    def finished(self, endpoint: str, kind: str, status: int, seconds: float) -> None:
        """A request has ended."""
        key = (endpoint, kind, status)
        self.requests[key] = self.requests.get(key, 0) + 1
        self.duration.add(seconds)


class Metrics:
    """Of the whole frontend."""

    def __init__(self) -> None:
        self.models: dict[str, ModelMetrics] = {}
        self.in_flight = 0
        self.refused: dict[str, int] = {}
        """reason -> number, of what never came to a model"""

    def of(self, model: str) -> ModelMetrics:
        """Of a model, made at first use. Only for models that exist: names come from clients."""
        found = self.models.get(model)
        if found is None:
            found = self.models[model] = ModelMetrics()
        return found

    def refuse(self, reason: str) -> None:
        """A request was answered with an error before it had a model."""
        self.refused[reason] = self.refused.get(reason, 0) + 1


class Exposition:
    """``/metrics``. Raises `ConfigError` if prometheus-client is missing."""

    def __init__(self, metrics: Metrics, models: Callable[[], Iterable[Model]]) -> None:
        try:
            from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
            from prometheus_client.registry import Collector
        except ImportError as error:
            text = "/metrics needs prometheus-client: pip install 'dynwire[frontend]'"
            raise ConfigError(text, name="prometheus-client") from error

        class Frontend(Collector):
            def collect(self) -> Iterator[Any]:
                yield from collect(metrics, models())
                yield from collect_routers(models())

        # a registry of its own: several frontends may live in one process, and what the process registers is its own affair
        self._registry = CollectorRegistry()
        self._registry.register(Frontend())
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def render(self, accept: str) -> tuple[bytes, str]:
        """``(text, content type)``; OpenMetrics if it is asked for."""
        from prometheus_client.exposition import choose_encoder

        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


def collect(metrics: Metrics, models: Iterable[Model]) -> Iterator[Any]:
    """Prometheus' view of the counters."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    yield GaugeMetricFamily(PREFIX + "queued_or_running_requests", "Requests in flight, of all models", metrics.in_flight)
    refused = CounterMetricFamily(PREFIX + "refused_requests", "Refused before they came to a model", labels=["reason"])
    for reason, number in metrics.refused.items():
        refused.add_metric([reason], number)
    yield refused

    instances = GaugeMetricFamily(PREFIX + "model_instances", "Workers that serve the model", labels=["model"])
    context = GaugeMetricFamily(PREFIX + "model_context_length", "Tokens of prompt and answer together", labels=["model"])
    for model in models:
        instances.add_metric([model.name], len(model.instances))
        context.add_metric([model.name], model.card.context_length)
    yield instances
    yield context

    requests = CounterMetricFamily(
        PREFIX + "requests",
        "Requests that have ended; status 499: the client left",
        labels=["model", "endpoint", "type", "status"],
    )
    plain: list[tuple[Any, str]] = [
        (kind(PREFIX + name, text, labels=["model"]), attribute)
        for kind, name, text, attribute in (
            (GaugeMetricFamily, "inflight_requests", "Requests in flight", "in_flight"),
            (CounterMetricFamily, "client_disconnects", "Clients that left early", "disconnects"),
            (CounterMetricFamily, "migrations", "Answers that moved to another worker", "migrations"),
            (CounterMetricFamily, "input_tokens", "Tokens of prompts", "input_tokens"),
            (CounterMetricFamily, "cached_tokens", "Of those, found in a cache", "cached_tokens"),
            (CounterMetricFamily, "output_tokens", "Tokens of answers", "output_tokens"),
        )
    ]
    histograms: list[tuple[Any, str]] = [
        (HistogramMetricFamily(PREFIX + name, text, labels=["model"]), attribute)
        for name, text, attribute in (
            ("time_to_first_token_seconds", "From request to first token", "first_token"),
            ("inter_token_latency_seconds", "Between tokens", "gap"),
            ("request_duration_seconds", "From request to end", "duration"),
            ("input_sequence_tokens", "Tokens per prompt", "prompt_sizes"),
        )
    ]
    for name, found in metrics.models.items():
        for (endpoint, kind, status), number in found.requests.items():
            requests.add_metric([name, endpoint, kind, str(status)], number)
        for family, attribute in plain:
            family.add_metric([name], getattr(found, attribute))
        for family, attribute in histograms:
            histogram: Histogram = getattr(found, attribute)
            family.add_metric([name], list(histogram.cumulative()), histogram.total)
    yield requests
    for family, _ in (*plain, *histograms):
        yield family


def collect_routers(models: Iterable[Model]) -> Iterator[Any]:
    """The same of the kv routers, one per model and endpoint; nothing in the other modes."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    found = [(model, path, router) for model in models for path, router in model.routers.items()]
    if not found:
        return
    for metric in METRICS:
        kind = CounterMetricFamily if metric.counter else GaugeMetricFamily
        family = kind(ROUTER_PREFIX + metric.name, metric.doc, labels=["model", "endpoint"])
        for model, path, router in found:
            value = metric.read(router)
            if value is not None:
                family.add_metric([model.name, path], value)
        if family.samples:
            yield family
    gauges = {
        name: GaugeMetricFamily(f"{ROUTER_PREFIX}worker_{name}", text, labels=["model", "endpoint", "worker", "dp_rank"])
        for name, text in (
            ("cached_blocks", "Blocks of the worker in the index"),
            ("requests", "Requests at the worker, as far as routers have sent them"),
            ("prefill_tokens", "Tokens of prompts that are being computed there"),
            ("decode_blocks", "Blocks in use there"),
        )
    }
    for model, path, router in found:
        for state in worker_states(router, tuple(i.id for i in model.instances if i.path == path)):
            labels = [model.name, path, f"{state.worker[0]:016x}", str(state.worker[1])]
            for name, family in gauges.items():
                family.add_metric(labels, getattr(state, name))
    yield from gauges.values()
