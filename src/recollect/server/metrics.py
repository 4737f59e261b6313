"""
What a server counts, for Prometheus.

Counters grow as replies end; what the engines know is asked when somebody looks.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from recollect.conversation.model import Model
from recollect.types import Usage

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PER_TOKEN_S: Final = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """The metrics of one server, in a registry of their own. Changed on the event loop alone."""

    def __init__(
        self,
        *,
        loaded: Callable[[], Mapping[str, Model]],
        running: Callable[[], int],
        waiting: Callable[[], int],
    ) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "recollect_requests",
            "Requests answered.",
            ["endpoint", "status"],
            registry=registry,
        )
        self._tokens = Counter(
            "recollect_prompt_tokens",
            "Tokens of prompts, by where their KV came from.",
            ["model", "source"],
            registry=registry,
        )
        self._generated = Counter(
            "recollect_generated_tokens", "Tokens generated.", ["model"], registry=registry
        )
        self._reasons = Counter(
            "recollect_replies",
            "Replies, by why what was computed was not reused.",
            ["model", "reason"],
            registry=registry,
        )
        self._first_token = Histogram(
            "recollect_first_token_seconds",
            "From the call to the first new token.",
            ["model"],
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self._per_token = Histogram(
            "recollect_token_seconds",
            "Between two tokens of a reply, on its average.",
            ["model"],
            buckets=_PER_TOKEN_S,
            registry=registry,
        )
        Gauge("recollect_running", "Replies being generated.", registry=registry).set_function(
            running
        )
        Gauge("recollect_queue", "Requests that wait for a turn.", registry=registry).set_function(
            waiting
        )
        registry.register(_Engines(loaded))

    def observe(self, model: str, usage: Usage) -> None:
        """Take note of a reply that has ended."""
        self._tokens.labels(model, "computed").inc(usage.computed_tokens)
        self._tokens.labels(model, "memory").inc(usage.reused_tokens - usage.restored_tokens)
        self._tokens.labels(model, "disk").inc(usage.restored_tokens)
        self._generated.labels(model).inc(usage.generated_tokens)
        self._reasons.labels(model, usage.reason).inc()
        if usage.generated_tokens:
            self._first_token.labels(model).observe(usage.ttft_s)
        if usage.decode_tps:
            self._per_token.labels(model).observe(1 / usage.decode_tps)

    def text(self) -> bytes:
        """Return everything as Prometheus reads it."""
        return generate_latest(self._registry)


class _Engines(Collector):
    """Asks the engines of the loaded models what they hold."""

    def __init__(self, loaded: Callable[[], Mapping[str, Model]]) -> None:
        self._loaded = loaded

    def collect(self) -> Iterator[Metric]:
        """Yield what is true now."""
        blocks = GaugeMetricFamily(
            "recollect_blocks", "KV blocks in memory, by state.", labels=["model", "state"]
        )
        evicted = CounterMetricFamily(
            "recollect_evicted_blocks", "KV blocks given up for room.", labels=["model"]
        )
        computed = CounterMetricFamily(
            "recollect_engine_tokens",
            "Tokens fed to forward passes, decode and idle work included.",
            labels=["model"],
        )
        preempted = CounterMetricFamily(
            "recollect_preemptions", "Replies that made way for others.", labels=["model"]
        )
        for name, model in self._loaded().items():
            engine = model.engine
            with engine.lock:
                free, evictable = engine.pool.free_blocks, engine.cache.evictable_blocks
                total = engine.pool.num_blocks
            for state, count in (
                ("free", free),
                ("evictable", evictable),
                ("in_use", total - free - evictable),
            ):
                blocks.add_metric([name, state], count)
            evicted.add_metric([name], engine.cache.evicted_blocks)
            computed.add_metric([name], engine.computed_tokens)
            preempted.add_metric([name], engine.preemptions)
        yield from (blocks, evicted, computed, preempted)
