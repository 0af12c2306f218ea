"""Every Prometheus name. One `Metrics` has a registry of its own, so that a process may hold several.

Label values are closed sets or registered adapter names; nothing that a caller wrote becomes a label. A composition
counts for each of its members.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from adapter_server.core import Event, Finished, Folded, Loaded, Request, Resident, Spec, Stats, Token
from adapter_server.errors import VersionGone
from adapter_server.registry.aliases import Targets

CONTENT_TYPE = CONTENT_TYPE_LATEST
NAMESPACE = "adapter_server"
BASE = "base"
SECONDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0),
)


@dataclass(slots=True)
class _Live:
    """A request under way, with its counters looked up once."""

    request: Request
    names: tuple[str, ...]
    generated: tuple[Counter, ...]
    intervals: Histogram | None = None  # by its mode, which the first token tells
    last: float | None = None


class Gateway(Collector):
    """What LoRA-aware gateways read, by the names that they know from vLLM: one sample of each, whatever comes.

    They prefer a server that holds an adapter already, so `running` are those in memory and ready. Room is counted in
    bytes here, not in adapters: `max_lora` is as many as there are, since any of them can be made room for.
    """

    def __init__(self) -> None:
        self.stats = Stats()
        self.registered = 0
        self.aliases: Callable[[], Mapping[str, Targets]] = dict  # other names that adapters are asked for by

    def collect(self) -> Iterator[GaugeMetricFamily]:
        stats = self.stats
        yield GaugeMetricFamily("vllm:num_requests_running", "Rows that run", stats.running)
        yield GaugeMetricFamily("vllm:num_requests_waiting", "Requests that wait", stats.waiting)
        used = stats.kv_used_tokens / max(1, stats.kv_total_tokens)
        yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of the keys' and values' memory, 0 to 1", used)
        yield self._adapters()

    def _adapters(self) -> GaugeMetricFamily:
        held = self._named({r.name for r in self.stats.residents if r.state == "ready"})
        coming = self._named({r.name for r in self.stats.residents if r.waiting or r.state == "loading"}) - held
        labels = {
            "max_lora": str(max(self.registered, len(held | coming))),
            "running_lora_adapters": ",".join(sorted(held)),
            "waiting_lora_adapters": ",".join(sorted(coming)),
        }
        about = "Adapters in memory and on their way; the value is the time of this look"
        family = GaugeMetricFamily("vllm:lora_requests_info", about, labels=list(labels))
        family.add_metric(list(labels.values()), time.time())
        return family

    def _named(self, names: set[str]) -> set[str]:
        """With what else they are called."""
        return names | {alias for alias, to in self.aliases().items() if any(target.name in names for target in to)}


class Metrics:
    """Listens to requests and to the engine's events; the gauges are set when somebody reads them."""

    def __init__(self, gateway: bool = False) -> None:
        self.registry = CollectorRegistry()
        self.gateway = Gateway()
        if gateway:
            self.registry.register(self.gateway)
        ProcessCollector(namespace=NAMESPACE, registry=self.registry)
        self.build = Info("build", "Version, model, device and dtype", namespace=NAMESPACE, registry=self.registry)
        self._histograms()
        self._counters()
        self._gauges()
        self._live: dict[str, _Live] = {}
        self._forgettable: dict[str, set[tuple[Counter, tuple[str, ...]]]] = {}
        self._seen = Stats()

    def _histograms(self) -> None:
        self.ttft = self._histogram("ttft_seconds", "From arrival to the first token", "mode")
        self.intervals = self._histogram("inter_token_seconds", "Between two tokens of one request", "mode")
        self.total = self._histogram("request_seconds", "From arrival to the end", "mode")
        self.queue = self._histogram("queue_seconds", "From arrival to the first step", "mode")
        self.loads = self._histogram("adapter_load_seconds", "Loading an adapter", "outcome")
        self.folds = self._histogram("snapshot_seconds", "Folding an adapter into a merged snapshot", "outcome")

    def _counters(self) -> None:
        self.requests = self._counter("requests", "Admitted requests that ended", "adapter", "mode", "outcome")
        self.tokens = self._counter("tokens", "Tokens read (prompt) and written (generated)", "adapter", "kind")
        self.refused = self._counter("refused", "Requests that were refused, by the code of the refusal", "code")
        self.preemptions = self._counter("preemptions", "Rows put back because memory ran out")
        self.hits = self._counter("adapter_hits", "Where admitted requests found their adapters", "tier")
        self.decisions = self._counter("auto_decisions", "What became of requests of mode auto", "mode")
        self.steps = self._counter("steps", "Forward passes of the engine")

    def _gauges(self) -> None:
        self.running = self._gauge("requests_running", "Rows that run")
        self.waiting = self._gauge("requests_waiting", "Requests that wait for a place or for their adapter")
        self.kv_used = self._gauge("kv_tokens_used", "Tokens whose keys and values are held")
        self.kv_total = self._gauge("kv_tokens_capacity", "Tokens whose keys and values fit")
        self.adapters = self._gauge("adapters", "Adapters by tier and state", "tier", "state")
        self.bytes = self._gauge("adapter_bytes", "Bytes of adapters by tier", "tier")

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(name, text, labels, namespace=NAMESPACE, registry=self.registry, buckets=SECONDS)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace=NAMESPACE, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace=NAMESPACE, registry=self.registry)

    def admitted(self, request: Request) -> None:
        """From here on the events of this request are counted."""
        names = tuple(member.spec.name for member in request.members) or (BASE,)
        generated = tuple(self._child(self.tokens, name, "generated") for name in names)
        self._live[request.id] = _Live(request, names, generated)

    def observe(self, events: Iterable[Event]) -> None:
        """One step's events. A request that was not admitted here is not counted."""
        now = time.monotonic()
        for event in events:
            if isinstance(event, Token):
                self._token(event, now)
            elif isinstance(event, Finished):
                self._finished(event)
            else:
                self._news(event)

    def refuse(self, code: str) -> None:
        """A request was turned away; `code` is one of the error tree's."""
        self.refused.labels(code).inc()

    def forget(self, name: str) -> None:
        """The adapter left the registry: its series go. Its last requests end uncounted."""
        for family, labels in self._forgettable.pop(name, set()):
            family.remove(*labels)
        for live in self._live.values():
            live.names = tuple(kept for kept in live.names if kept != name)

    def render(self, stats: Stats, adapters: Mapping[str, Spec | None]) -> bytes:
        """The text that Prometheus reads. `adapters` are the registry's, by name; None for one that breaks a rule."""
        for name in self._forgettable.keys() - adapters.keys() - {BASE}:
            self.forget(name)
        specs = [spec for spec in adapters.values() if spec is not None]
        self.gateway.stats, self.gateway.registered = stats, len(specs)
        self._set_engine(stats)
        self._set_adapters(stats.residents, specs, len(adapters) - len(specs))
        return generate_latest(self.registry)

    def _token(self, token: Token, now: float) -> None:
        live = self._live.get(token.request_id)
        if live is None:
            return
        if live.last is None or live.intervals is None:
            self._read(live)
            mode = token.mode or live.request.mode
            live.intervals = self.intervals.labels(mode)
            self.ttft.labels(mode).observe(now - live.request.arrived)
        else:
            live.intervals.observe(now - live.last)
        live.last = now
        for counter in live.generated:
            counter.inc()

    def _read(self, live: _Live) -> None:
        """The prompt has been read, once there is a token after it."""
        for name in live.names:
            self._child(self.tokens, name, "prompt").inc(len(live.request.prompt))

    def _finished(self, end: Finished) -> None:
        """One whose files changed under it is asked again, or refused: it is no request yet."""
        live = self._live.pop(end.request_id, None)
        if live is None or isinstance(end.error, VersionGone):
            return
        mode = end.mode or live.request.mode
        self.total.labels(mode).observe(end.total_s)
        self.queue.labels(mode).observe(end.queue_s)
        outcome = end.error.code if end.error is not None else end.reason
        for name in live.names:
            self._child(self.requests, name, mode, outcome).inc()

    def _news(self, event: Loaded | Folded) -> None:
        times = self.loads if isinstance(event, Loaded) else self.folds
        times.labels("failed" if event.error else "ok").observe(event.seconds)

    def _child(self, family: Counter, name: str, *labels: str) -> Counter:
        """A counter of an adapter, remembered so that it can be forgotten."""
        key = (name, *labels)
        self._forgettable.setdefault(name, set()).add((family, key))
        return family.labels(*key)

    def _set_engine(self, stats: Stats) -> None:
        self.running.set(stats.running)
        self.waiting.set(stats.waiting)
        self.kv_used.set(stats.kv_used_tokens)
        self.kv_total.set(stats.kv_total_tokens)
        self.preemptions.inc(max(0, stats.preemptions - self._seen.preemptions))
        self.steps.inc(max(0, stats.steps - self._seen.steps))
        for tier, hits in stats.hits.items():
            self.hits.labels(tier).inc(max(0, hits - self._seen.hits.get(tier, 0)))
        for mode, count in stats.decisions.items():
            self.decisions.labels(mode).inc(max(0, count - self._seen.decisions.get(mode, 0)))
        self._seen = stats

    def _set_adapters(self, residents: Sequence[Resident], specs: Sequence[Spec], refused: int) -> None:
        self.adapters.labels("disk", "registered").set(len(specs))
        self.adapters.labels("disk", "refused").set(refused)
        for state in ("loading", "ready", "failed"):
            self.adapters.labels("device", state).set(sum(resident.state == state for resident in residents))
        self.adapters.labels("host", "ready").set(sum(resident.host_bytes > 0 for resident in residents))
        self.adapters.labels("snapshot", "ready").set(sum(resident.snapshot_bytes > 0 for resident in residents))
        self.bytes.labels("disk").set(sum(spec.bytes for spec in specs))
        self.bytes.labels("host").set(sum(resident.host_bytes for resident in residents))
        self.bytes.labels("device").set(sum(resident.bytes for resident in residents))
        self.bytes.labels("snapshot").set(sum(resident.snapshot_bytes for resident in residents))
