"""The thread that owns the engine. Messages go in, batches of events come out, one batch a step.

Worker   the thread      Room   what may wait, by the settings      Pace   tokens a second
"""

from __future__ import annotations

import gc
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapter_server.config import EngineConfig
from adapter_server.core import Event, Finished, FinishReason, Op, Request, Spec, Stats
from adapter_server.errors import AdapterServerError, QueueFull, Unavailable

if TYPE_CHECKING:
    from adapter_server.engine.engine import Engine

IDLE_S = 0.05  # how long an idle loop sleeps when nothing wakes it; deadlines are seen this late at most
LONGEST_WAIT_S = 60.0  # that a refused caller is told to wait
HALF_LIFE_S = 30.0  # of what is known about the pace
STATS_S = 0.05  # how old the picture of a busy engine may be
STATS_SHARE = 0.02  # of its time that the picture may take; of thousands of adapters it may be older then,
OLDEST_STATS_S = 0.5  # but no older than this
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Room:
    """What waits for a place: requests, the tokens that they may take, and the seconds that one takes now."""

    requests: int = 0
    tokens: int = 0
    pace_s: float = 0.0

    def check(self, request: Request, config: EngineConfig) -> None:
        """Whether one more may wait: raises QueueFull. An empty queue takes a request of any size."""
        many = self.requests >= config.max_waiting
        if many or (self.requests and self.tokens + request.cost > config.max_waiting_tokens):
            what = f"{self.requests} requests" if many else f"requests of {self.tokens:,} tokens"
            wait = min(LONGEST_WAIT_S, max(1.0, self.pace_s * self.tokens))
            raise QueueFull(f"{what} are waiting, which is the limit; retry later", retry_after=wait)


@contextmanager
def settled() -> Iterator[None]:
    """What is there now is taken to stay: full passes of Python's collector, for which every thread stands still, look
    at what came later alone. With torch and transformers loaded there are half a million objects: 0.3 s.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Worker:
    """Runs `engine.step` on a thread of its own. `deliver` is called there with each step's events."""

    def __init__(self, engine: Engine, deliver: Callable[[list[Event]], None]) -> None:
        self.engine, self.deliver = engine, deliver
        self._inbox: queue.SimpleQueue[Callable[[], list[Event]]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._stats, self._again = engine.stats(), 0.0
        self._stop_at: float | None = None
        self._queued = 0  # submitted and not yet seen by the engine
        self._lock = threading.Lock()
        self._open: dict[str, Request] = {}  # submitted and not finished
        self._cost = 0  # tokens of all of these
        self._pace = Pace(time.monotonic())
        self.failure: BaseException | None = None
        engine.on_wake(lambda: self._inbox.put(list))

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    def stop(self, drain_s: float = 0.0) -> None:
        """Take nothing new, let rows run for at most `drain_s` seconds, cancel the rest, end the thread."""
        self.leave(drain_s)
        if self._thread.is_alive():
            self._thread.join()
        self.engine.close()

    def leave(self, drain_s: float = 0.0) -> None:
        """The same, without waiting for the end."""
        self._stop_at = time.monotonic() + drain_s
        self._inbox.put(list)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises QueueFull or Unavailable at once; other refusals come as `Finished`."""
        if self._stop_at is not None or not self.alive:
            raise Unavailable("the server is going down; try another or later", retry_after=5)
        with self._lock:
            self.room().check(request, self.engine.config)
            self._queued += 1
            self._open[request.id] = request
            self._cost += request.cost
        self._inbox.put(lambda: self._submit(request))

    def room(self) -> Room:
        """What waits at this moment."""
        scheduler = self.engine.scheduler
        waiting = self._queued + len(scheduler.waiting) + len(self.engine.forming)
        tokens = self._cost - sum(row.request.cost for row in tuple(scheduler.running))
        return Room(waiting, tokens, self._pace.seconds(1))

    def _submit(self, request: Request) -> list[Event]:
        with self._lock:
            self._queued -= 1
        try:
            self.engine.submit(request)
        except AdapterServerError as error:
            return [Finished(request.id, "error", error)]
        return []

    def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> None:
        """End a request; its place is free at the next step. One that has ended already is left alone."""
        self._inbox.put(lambda: self.engine.cancel(request_id, reason))

    def call(self, op: Op, spec: Spec) -> Future[None]:
        """load, unload, pin, unpin, merge or unmerge; refusals come through the future."""
        done: Future[None] = Future()
        if not self.alive:
            done.set_exception(Unavailable("the engine is not running", retry_after=5))
            return done

        def run() -> list[Event]:
            self.engine.call(op, spec).add_done_callback(lambda inner: self._relay(inner, done))
            return []

        self._inbox.put(run)
        return done

    def _relay(self, inner: Future[None], outer: Future[None]) -> None:
        self._picture()  # who asked will look, and must see what was done
        error = inner.exception()
        if error is None:
            outer.set_result(None)
        else:
            outer.set_exception(error)

    def stats(self) -> Stats:
        return self._stats

    # On the thread

    def _main(self) -> None:
        with settled():
            self._run()

    def _run(self) -> None:
        try:
            while not self._ended():
                self._turn()
            self._send(self.engine.abandon("cancelled"))
        except BaseException as error:  # the loop has died: say so to everybody who waits
            self.failure = error
            gone = Unavailable(f"the engine stopped: {type(error).__name__}", retry_after=5)
            self._send(self.engine.abandon("error", gone))
            raise
        finally:
            self.engine.end_profile()

    def _ended(self) -> bool:
        if self._stop_at is None:
            return False
        return time.monotonic() >= self._stop_at or not (self.engine.busy or self._queued)

    def _turn(self) -> None:
        """Everything in the inbox, then one step; asleep when there is nothing to do."""
        before = self.engine.steps
        events = self._read()
        events += self.engine.step()
        if time.monotonic() >= self._again:
            self._picture()
        self._send(events)
        if self.engine.steps == before and not events and self._inbox.empty():
            self._pace.rest(time.monotonic())
            self._sleep()

    def _read(self) -> list[Event]:
        events: list[Event] = []
        while not self._inbox.empty():
            events += self._inbox.get()()
        return events

    def _sleep(self) -> None:
        try:
            self._send(self._inbox.get(timeout=IDLE_S)())
        except queue.Empty:
            return

    def _picture(self) -> None:
        start = time.monotonic()
        self._stats, now = self.engine.stats(), time.monotonic()
        self._again = now + max(STATS_S, min(OLDEST_STATS_S, (now - start) / STATS_SHARE))

    def _send(self, events: list[Event]) -> None:
        ended = [event for event in events if isinstance(event, Finished)]
        if ended:
            _explain(ended)
            self._pace.add(sum(self._closed(end) for end in ended), time.monotonic())
        if events:
            self.deliver(events)

    def _closed(self, end: Finished) -> int:
        """The tokens that were read and written for it; 0 where its prompt was not read."""
        with self._lock:
            request = self._open.pop(end.request_id, None)
            self._cost -= request.cost if request else 0
        return len(request.prompt) + end.completion_tokens if request and end.completion_tokens else 0


def _explain(ended: list[Finished]) -> None:
    """What made requests fail inside goes to the log, once a step: an error's message is for callers."""
    causes = {id(end.error.__cause__): end.error.__cause__ for end in ended if end.error is not None}
    for cause in causes.values():
        if cause is not None and not isinstance(cause, AdapterServerError):
            log.error("a request failed inside", exc_info=cause)


class Pace:
    """Tokens finished a second, of the time in which there is something to do; the last minute counts most."""

    def __init__(self, now: float) -> None:
        self._tokens, self._busy, self._seen = 0.0, 0.0, now

    def rest(self, now: float) -> None:
        """Nothing was done until now."""
        self._seen = now

    def add(self, tokens: int, now: float) -> None:
        passed, self._seen = now - self._seen, now
        kept = 0.5 ** (passed / HALF_LIFE_S)
        self._tokens, self._busy = self._tokens * kept + tokens, self._busy * kept + passed

    def seconds(self, tokens: int) -> float:
        """How long so many will take; 0 while nothing is known."""
        return tokens * self._busy / self._tokens if self._tokens else 0.0
