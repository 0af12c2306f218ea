"""The thread that owns the engine. Messages go in, batches of events come out, one batch a step."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from adapter_server.core import Event, Finished, FinishReason, Request, Spec, Stats
from adapter_server.engine.engine import Engine, Op
from adapter_server.errors import AdapterServerError, QueueFull, Unavailable

IDLE_S = 0.05  # how long an idle loop sleeps when nothing wakes it; deadlines are seen this late at most
STATS_S = 0.05  # how old the picture of a busy engine may be


class Worker:
    """Runs `engine.step` on a thread of its own. `deliver` is called there with each step's events."""

    def __init__(self, engine: Engine, deliver: Callable[[list[Event]], None]) -> None:
        self.engine, self.deliver = engine, deliver
        self._inbox: queue.SimpleQueue[Callable[[], list[Event]]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._stats, self._pictured = engine.stats(), 0.0
        self._stop_at: float | None = None
        self._queued = 0  # submitted and not yet seen by the engine
        self._lock = threading.Lock()
        self._rate = 1.0  # requests finished per second, smoothed
        self._last_finish = time.monotonic()
        self.failure: BaseException | None = None
        engine.on_wake(lambda: self._inbox.put(list))

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    def stop(self, drain_s: float = 0.0) -> None:
        """Take nothing new, let rows run for at most `drain_s` seconds, cancel the rest, end the thread."""
        self._stop_at = time.monotonic() + drain_s
        self._inbox.put(list)
        if self._thread.is_alive():
            self._thread.join()
        self.engine.close()

    def submit(self, request: Request) -> None:
        """Queue a request. Raises QueueFull or Unavailable at once; other refusals come as `Finished`."""
        if self._stop_at is not None or not self.alive:
            raise Unavailable("the server is going down; try another or later", retry_after=5)
        with self._lock:
            waiting = self._queued + len(self.engine.scheduler.waiting) + len(self.engine.forming)
            if waiting >= self.engine.config.max_waiting:
                wait = min(60.0, max(1.0, waiting / self._rate))
                raise QueueFull(f"{waiting} requests are waiting, which is the limit; retry later", retry_after=wait)
            self._queued += 1
        self._inbox.put(lambda: self._submit(request))

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
        if time.monotonic() - self._pictured > STATS_S:
            self._picture()
        self._send(events)
        if self.engine.steps == before and not events and self._inbox.empty():
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
        self._stats, self._pictured = self.engine.stats(), time.monotonic()

    def _send(self, events: list[Event]) -> None:
        finished = sum(isinstance(e, Finished) for e in events)
        if finished:
            now = time.monotonic()
            rate = finished / max(1e-3, now - self._last_finish)
            self._rate, self._last_finish = 0.9 * self._rate + 0.1 * rate, now
        if events:
            self.deliver(events)
