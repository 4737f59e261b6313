"""
What replies have cost: as clients are told, and as a server counts it for Prometheus.

A client gets it in its API's own fields, and in ours beside them. Cached tokens are those that no
forward pass was fed with: the prompt's, less the computed ones. Counters grow as replies end; what
the engines know is asked when somebody looks.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from recollect.conversation.model import Model
from recollect.conversation.turn import Reply
from recollect.engine.reply import GeneratedReply
from recollect.errors import StoreError
from recollect.journal.requests import RequestLog
from recollect.types import Ended, Reason, Usage

Tier = Literal["memory", "disk", "memory+disk"]

_FEW_TOKENS: Final = 64
"""A prefill of fewer says little about speed: most of it is one pass's fixed cost."""


class PrefillSpeed:
    """How fast a model reads prompts, from the replies it gave. Used on the event loop alone."""

    def __init__(self) -> None:
        self._tokens_per_second: float | None = None

    def learn(self, usage: Usage) -> None:
        """Take note of a reply."""
        if usage.prefill_tps is not None and usage.awaited_tokens >= _FEW_TOKENS:
            known = self._tokens_per_second or usage.prefill_tps
            self._tokens_per_second = (known + usage.prefill_tps) / 2

    def time_saved_s(self, usage: Usage) -> float | None:
        """Return how long the reused tokens would have taken; None before anything long was read."""
        speed = self._tokens_per_second
        return None if speed is None else usage.reused_tokens / speed


@dataclass(slots=True)
class Saved:
    """What replies did not have to compute."""

    tokens: int = 0
    restored_tokens: int = 0
    """Of those, the ones whose KV came from disk."""
    seconds: float = 0.0
    """That computing them would have taken, as far as it was known how fast the model reads."""

    def add(self, usage: Usage, speed: PrefillSpeed) -> None:
        """Count a reply."""
        self.tokens += usage.reused_tokens
        self.restored_tokens += usage.restored_tokens
        self.seconds += speed.time_saved_s(usage) or 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the replies to one request cost together; they share the prompt."""

    prompt_tokens: int
    computed_tokens: int
    """Of the prompt, in the reply that computed most of it."""
    reused_tokens: int
    restored_tokens: int
    """Of those, the ones whose KV came from disk."""
    generated_tokens: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    reasoning_tokens: int = 0
    ttft_s: float
    time_saved_s: float | None
    reason: Reason
    difference: str | None
    ended: Ended | None = None
    """Why a reply was ended whose finish reason says more than one thing; None: nothing to add."""

    sampling: Mapping[str, Any] | None = None
    """How tokens were chosen, as `Usage.sampling` has it; `seeds` where the replies have several."""

    @property
    def cached_tokens(self) -> int:
        """Return the tokens of the prompt that were not computed."""
        return self.prompt_tokens - self.computed_tokens

    @property
    def tier(self) -> Tier | None:
        """Return where reused tokens came from; None where none were."""
        if not self.reused_tokens:
            return None
        if not self.restored_tokens:
            return "memory"
        return "disk" if self.restored_tokens == self.reused_tokens else "memory+disk"

    def chat(self) -> dict[str, Any]:
        """Return `usage` as chat completions and completions have it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated_tokens,
            "total_tokens": self.prompt_tokens + self.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning_tokens,
                "audio_tokens": 0,
            },
            "recollect": self.own(),
        }

    def responses(self) -> dict[str, Any]:
        """Return `usage` as the Responses API has it."""
        return {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": self.generated_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": self.prompt_tokens + self.generated_tokens,
            "recollect": self.own(),
        }

    def messages(self) -> dict[str, Any]:
        """Return `usage` as Anthropic has it: there, input tokens are those that were computed."""
        return {
            "input_tokens": self.computed_tokens,
            "cache_read_input_tokens": self.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": self.generated_tokens,
            "recollect": self.own(),
        }

    def own(self) -> dict[str, Any]:
        """Return what no other API has a field for."""
        return {
            "computed_tokens": self.computed_tokens,
            "reused_tokens": self.reused_tokens,
            "restored_tokens": self.restored_tokens,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "tier": self.tier,
            "time_saved_s": None if self.time_saved_s is None else round(self.time_saved_s, 4),
            "ttft_s": round(self.ttft_s, 4),
            "reason": self.reason,
            "difference": self.difference,
            "ended": self.ended,
            "sampling": self.sampling,
        }

    def headers(self) -> dict[str, str]:
        """Return the same as headers; ASCII, whatever the conversation says."""
        return {
            f"x-recollect-{name.replace('_', '-')}": _header_value(value)
            for name, value in {"prompt_tokens": self.prompt_tokens, **self.own()}.items()
            if value is not None and name != "sampling"
        }


def cost_of(
    replies: Sequence[GeneratedReply], speed: PrefillSpeed, *, per_prompt: int | None = None
) -> Cost:
    """Return what replies to one request cost that have ended; the arguments are those of `cost`."""
    usages = [reply.usage for reply in replies]
    ended = next((reply.ended for reply in replies if reply.ended is not None), None)
    return cost(usages, speed, per_prompt=per_prompt, ended=ended)


def cost(
    usages: Sequence[Usage],
    speed: PrefillSpeed,
    *,
    per_prompt: int | None = None,
    ended: Ended | None = None,
) -> Cost:
    """
    Return what the replies to one request cost.

    Args:
        usages: Of the replies, in their order.
        speed: Of the model.
        per_prompt: How many of them in a row share a prompt; None: all do.
        ended: What there is to say of the end of one of them: see `GeneratedReply.ended`.
    """
    size = per_prompt or len(usages)
    groups = [usages[start : start + size] for start in range(0, len(usages), size)]
    # Of replies that share a prompt one computes it, and the others find what it left.
    most = [max(group, key=lambda usage: usage.computed_tokens) for group in groups]
    saved = [speed.time_saved_s(usage) for usage in most]
    return Cost(
        prompt_tokens=sum(usage.prompt_tokens for usage in most),
        computed_tokens=sum(usage.computed_tokens for usage in most),
        reused_tokens=sum(usage.reused_tokens for usage in most),
        restored_tokens=sum(usage.restored_tokens for usage in most),
        generated_tokens=sum(usage.generated_tokens for usage in usages),
        drafted_tokens=sum(usage.drafted_tokens for usage in usages),
        accepted_tokens=sum(usage.accepted_tokens for usage in usages),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
        ttft_s=min(usage.ttft_s for usage in usages),
        time_saved_s=sum(seconds for seconds in saved if seconds is not None)
        if None not in saved
        else None,
        reason=most[0].reason,
        difference=most[0].difference,
        ended=ended,
        sampling=_shared(usages),
    )


def _shared(usages: Sequence[Usage]) -> dict[str, Any] | None:
    """
    Return how all replies to one request were sampled; only their seeds can differ.

    A seed is as a request names it: negative where it stands for one above what an int64 holds.
    """
    told = usages[0].sampling
    if told is None or "seed" not in told:
        return None if told is None else dict(told)
    seeds = [int((usage.sampling or told)["seed"]) for usage in usages]
    seeds = [seed - 2**64 if seed >= 2**63 else seed for seed in seeds]
    rest = {name: value for name, value in told.items() if name != "seed"}
    return rest | ({"seed": seeds[0]} if len(set(seeds)) == 1 else {"seeds": seeds})


def recorded(values: Mapping[str, Any]) -> Usage:
    """Return the usage that the journal has of a reply; fields of other versions are left out."""
    known = {one.name for one in fields(Usage)}
    return Usage(**{name: value for name, value in values.items() if name in known})


def _header_value(value: object) -> str:
    return str(value).encode("ascii", "backslashreplace").decode().replace("\n", " ")


CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PER_TOKEN_S: Final = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1)


class Asker(Protocol):
    """Whose request it is."""

    @property
    def namespace(self) -> str:
        """Return under which everything of the client's is kept."""

    @property
    def agent(self) -> str:
        """Return what program the client is."""


class Metrics:
    """The metrics of one server, in a registry of their own. Changed on the event loop alone."""

    def __init__(
        self,
        *,
        loaded: Callable[[], Mapping[str, Model]],
        running: Callable[[], int],
        waiting: Callable[[], int],
        log: RequestLog | None = None,
    ) -> None:
        self._log = log
        self._speeds = defaultdict[tuple[str, str], PrefillSpeed](PrefillSpeed)
        self._saved = defaultdict[str, Saved](Saved)
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
        self._guesses = Counter(
            "recollect_drafted_tokens",
            "Tokens that were guessed, by whether they were right.",
            ["model", "outcome"],
            registry=registry,
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

    def speed(self, model: str, namespace: str) -> PrefillSpeed:
        """Return how fast a model has read the prompts of a namespace; nobody learns of others' prompts."""
        return self._speeds[model, namespace]

    def saved(self, namespace: str) -> Saved:
        """Return what a namespace did not have to compute since the server started."""
        return self._saved[namespace]

    def observe(self, model: str, client: Asker, reply: GeneratedReply) -> None:
        """Take note of a reply that has ended."""
        usage = reply.usage
        speed = self.speed(model, client.namespace)
        speed.learn(usage)
        self.saved(client.namespace).add(usage, speed)
        if self._log is not None:
            change = reply.change if isinstance(reply, Reply) else None
            self._log.note(model, client.agent, usage, change)
        self._tokens.labels(model, "computed").inc(usage.computed_tokens)
        self._tokens.labels(model, "memory").inc(usage.reused_tokens - usage.restored_tokens)
        self._tokens.labels(model, "disk").inc(usage.restored_tokens)
        self._generated.labels(model).inc(usage.generated_tokens)
        wrong = usage.drafted_tokens - usage.accepted_tokens
        self._guesses.labels(model, "accepted").inc(usage.accepted_tokens)
        self._guesses.labels(model, "rejected").inc(wrong)
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
        disk, elsewhere = _Disk(), _Elsewhere()
        for name, model in self._loaded().items():
            engine = model.engine
            disk.add(name, model)
            elsewhere.add(name, model)
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
        yield from (blocks, evicted, computed, preempted, *disk.families, *elsewhere.families)


class _Elsewhere:
    """What was asked of the replicas of engines elsewhere; nothing where there are none."""

    def __init__(self) -> None:
        self._up = GaugeMetricFamily(
            "recollect_replica_up",
            "Whether a replica answered when it was last asked.",
            labels=["model", "replica"],
        )
        self._running = GaugeMetricFamily(
            "recollect_replica_running", "Requests under way.", labels=["model", "replica"]
        )
        self._requests = CounterMetricFamily(
            "recollect_replica_requests",
            "Requests, by outcome.",
            labels=["model", "replica", "outcome"],
        )
        self._tokens = CounterMetricFamily(
            "recollect_replica_tokens",
            "Tokens of prompts by what became of them, and generated ones.",
            labels=["model", "replica", "kind"],
        )

    @property
    def families(self) -> tuple[Metric, ...]:
        """Return the metrics; those of no engine are left out."""
        families = (self._up, self._running, self._requests, self._tokens)
        return tuple(one for one in families if one.samples)

    def add(self, name: str, model: Model) -> None:
        """Ask a model's engine."""
        for one in model.replicas():
            where = [name, one.url]
            self._up.add_metric(where, one.is_up)
            self._running.add_metric(where, one.running)
            for outcome, count in (
                ("lost", one.lost),
                ("done", one.asked - one.running - one.lost),
            ):
                self._requests.add_metric([*where, outcome], count)
            for kind, tokens in (
                ("reused", one.reused_tokens),
                ("computed", one.computed_tokens),
                ("generated", one.generated_tokens),
            ):
                self._tokens.add_metric([*where, kind], tokens)


class _Disk:
    """What the tiers on disk have done; nothing where there is none."""

    def __init__(self) -> None:
        self._bytes = GaugeMetricFamily("recollect_disk_bytes", "KV on disk, of all models.")
        self._written = CounterMetricFamily(
            "recollect_disk_written_bytes", "KV written to disk.", labels=["model"]
        )
        self._evicted = CounterMetricFamily(
            "recollect_disk_evicted_blocks", "KV blocks given up on disk.", labels=["model"]
        )
        self._misses = CounterMetricFamily(
            "recollect_disk_misses",
            "Blocks on disk that were refused, by reason.",
            labels=["model", "reason"],
        )

    @property
    def families(self) -> tuple[Metric, ...]:
        """Return the metrics."""
        return self._bytes, self._written, self._evicted, self._misses

    def add(self, name: str, model: Model) -> None:
        """Ask the tier of a model."""
        tier = model.engine.tier
        if tier is None:
            return
        done = tier.statistics()
        self._written.add_metric([name], done.written_bytes)
        self._evicted.add_metric([name], done.evicted_blocks)
        for reason, count in done.misses.items():
            self._misses.add_metric([name, reason], count)
        if not self._bytes.samples:  # the models of a home share it
            with suppress(StoreError), tier.store.reading() as tables:
                self._bytes.add_metric([], tables.total_bytes())
