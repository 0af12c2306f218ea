"""An open loop: requests and other deeds happen by a clock, and no answer is waited for before the next is sent.

A stage is where that is played: an engine on its own thread in this process (`Live`), or a server (`http.Remote`).
"""

from __future__ import annotations

import queue
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from adapter_server.bench.client import Reply
from adapter_server.bench.drive import Ask, Checker, Tokens, request_of
from adapter_server.core import Event, Finished, Op, Token
from adapter_server.engine.engine import Engine
from adapter_server.engine.worker import Worker
from adapter_server.errors import RequestFailed
from adapter_server.registry import guard
from adapter_server.registry.publish import Publisher


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request, its length, and when it is due, in seconds since the play began."""

    due_s: float
    ask: Ask
    new: int


@dataclass(frozen=True, slots=True)
class Deed:
    """Something done beside the requests: it must not wait for what it sets going."""

    due_s: float
    name: str
    work: Callable[[], object]


class Stage(Protocol):
    """Where requests are played."""

    def play(self, arrivals: Sequence[Arrival], deeds: Sequence[Deed] = ()) -> list[Reply]:
        """One reply each, in the order of the arrivals. Raises RequestFailed."""

    def gap(self, ask: Ask, known: Tokens) -> float:
        """How far the two likeliest next tokens are apart after `known`."""

    def operate(self, op: Op, adapter: str) -> None:
        """load, unload, merge or unmerge, to its end."""

    def publish(self, adapter: str, folder: Path) -> None:
        """These files become the adapter's current version."""


class Live:
    """An engine on its worker's thread. Tokens are timed there, as they leave the engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.worker = Worker(engine, self._deliver)
        self._publisher = Publisher(engine.pool.store)
        self._tokens: dict[str, list[tuple[Token, float]]] = {}
        self._ended: queue.SimpleQueue[Finished] = queue.SimpleQueue()

    def _deliver(self, events: list[Event]) -> None:
        now = time.perf_counter()
        for event in events:
            if isinstance(event, Token):
                self._tokens[event.request_id].append((event, now))
            elif isinstance(event, Finished):
                self._ended.put(event)

    def play(self, arrivals: Sequence[Arrival], deeds: Sequence[Deed] = ()) -> list[Reply]:
        start = time.perf_counter()
        ids: dict[int, str] = {}

        def send(i: int) -> None:
            ids[i] = self._send(arrivals[i].ask, arrivals[i].new)

        sends = [Deed(arrival.due_s, "", lambda i=i: send(i)) for i, arrival in enumerate(arrivals)]  # type: ignore[misc]
        by_clock([*sends, *deeds], start)
        self._wait(len(arrivals))
        return [self._reply(arrival.due_s, ids[i], start) for i, arrival in enumerate(arrivals)]

    def _send(self, ask: Ask, new: int, logprobs: int = 0) -> str:
        request = request_of(self.engine, ask, new, logprobs)
        self._tokens[request.id] = []
        self.worker.submit(request)
        return request.id

    def _wait(self, count: int) -> None:
        ends = [self._ended.get() for _ in range(count)]
        for end in ends:
            if end.reason == "error":
                raise end.error or RequestFailed("the engine gave no answer and no reason")

    def _reply(self, due_s: float, id: str, start: float) -> Reply:
        got = self._tokens.pop(id)
        return Reply(due_s, [token.id for token, _ in got], [at - start for _, at in got])

    def gap(self, ask: Ask, known: Tokens) -> float:
        id = self._send(replace(ask, prompt=ask.prompt + known), new=1, logprobs=2)
        self._wait(1)
        ((token, _),) = self._tokens.pop(id)
        return abs(token.top[0][1] - token.top[1][1])

    def operate(self, op: Op, adapter: str) -> None:
        self.worker.call(op, self.engine.pool.store.resolve(adapter)).result()

    def publish(self, adapter: str, folder: Path) -> None:
        with guard.open_regular(folder / guard.WEIGHTS, folder) as weights:
            self._publisher.publish(adapter, (folder / guard.CONFIG).read_bytes(), weights)


@contextmanager
def live(engine: Engine) -> Iterator[Live]:
    """The engine on a thread of its own; it is closed afterwards."""
    stage = Live(engine)
    stage.worker.start()
    try:
        yield stage
    finally:
        stage.worker.stop()


def by_clock(deeds: Sequence[Deed], start: float) -> None:
    """Do each at its second. One that comes late delays no other's due time."""
    for deed in sorted(deeds, key=lambda deed: deed.due_s):
        time.sleep(max(0.0, start + deed.due_s - time.perf_counter()))
        deed.work()


def learn(stage: Stage, checker: Checker, arrivals: Sequence[Arrival]) -> None:
    """What the engine answers to each of these alone."""
    for arrival in arrivals:
        (reply,) = stage.play([Arrival(0.0, arrival.ask, arrival.new)])
        checker.learn(arrival.ask, tuple(reply.ids))


def check(checker: Checker, arrivals: Sequence[Arrival], replies: Sequence[Reply]) -> None:
    checker.check([arrival.ask for arrival in arrivals], [tuple(reply.ids) for reply in replies])


def figures(replies: Sequence[Reply]) -> dict[str, float]:
    """What a service is judged by, over one play."""
    ttft = [reply.ttft_s for reply in replies]
    gaps = [gap for reply in replies for gap in reply.gaps_s]
    whole = max(reply.times[-1] for reply in replies)
    return {
        "requests_per_s": len(replies) / whole,
        "tokens_per_s": sum(len(reply.ids) for reply in replies) / whole,
        "ttft_ms": 1e3 * statistics.median(ttft),
        "ttft_p99_ms": 1e3 * quantile(ttft, 0.99),
        "itl_ms": 1e3 * statistics.median(gaps),
        "itl_p99_ms": 1e3 * quantile(gaps, 0.99),
        "latency_ms": 1e3 * statistics.mean(reply.total_s for reply in replies),
        "latency_per_token_ms": 1e3 * statistics.mean(reply.total_s / len(reply.ids) for reply in replies),
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Of every figure the median over the rounds, and the rounds themselves."""
    names = rounds[0]
    return {name: statistics.median(each[name] for each in rounds) for name in names} | {
        "rounds": {name: [each[name] for each in rounds] for name in names}
    }
