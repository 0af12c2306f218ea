"""The engine's process: `python -m adapter_server.engine.child LINE DESK`, two descriptors that it inherits.

It ends when it is told to, when its engine dies (status 1), and when the server's process is gone, however that went.
Signals are the server's: a terminal and a service manager send them to both.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from adapter_server.core import Event, Finished, Op, Request, Spec, Stats
from adapter_server.engine.link import Done, Line, News, Order, Ready, Refused
from adapter_server.engine.worker import Room, Worker
from adapter_server.errors import AdapterServerError, AdapterUnavailable
from adapter_server.registry.store import Blob

if TYPE_CHECKING:
    from adapter_server.engine.engine import Engine

ORPHAN_S = 5.0  # for the rows of a server that is gone to end; then the process ends as it is
STATS_SHARE = 0.05  # of the time, at most, goes into telling how things stand
Inbox = queue.SimpleQueue[tuple[Any, ...] | None]  # None: the server is gone
Waiting = tuple[int, Room]  # requests that were taken in, and what waits
OVER = ("over",)


class Hosted(Worker):
    """A worker whose events go over the line: once a step, and with them how things stand, where that has changed."""

    def __init__(self, engine: Engine, line: Line) -> None:
        super().__init__(engine, self._keep)
        self._line = line
        self._events: list[Event] = []
        self._told: Waiting = (0, Room())
        self._told_stats, self._pictured_again = self.stats(), 0.0
        self.seen = 0
        self.over: Callable[[], None] = lambda: None

    def take(self, request: Request) -> None:
        """As `submit`; a refusal is an end."""
        try:
            self.submit(request)
        except AdapterServerError as error:
            self.tell([Finished(request.id, "error", error)])
        self.seen += 1

    def operate(self, number: int, op: Op, spec: Spec) -> None:
        """As `call`; what it changed is told before its end."""
        self.call(op, spec).add_done_callback(partial(self._done, number))

    def _done(self, number: int, done: Future[None]) -> None:
        error = done.exception()
        known = error is None or isinstance(error, AdapterServerError)
        self.tell([], self.stats())
        self._say(Done(number, error if known else AdapterUnavailable(repr(error))))  # type: ignore[arg-type]

    def tell(self, events: list[Event], stats: Stats | None = None, waiting: Waiting | None = None) -> None:
        self._told = waiting or self._waiting()
        self._say(News.of(events, stats, *self._told))

    def _waiting(self) -> Waiting:
        """In this order: a request that comes meanwhile is counted twice rather than not at all."""
        return self.seen, self.room()

    def _say(self, message: News | Done) -> None:
        try:
            self._line.send(message)
        except OSError:
            return  # nobody is there to hear it: `_listen` ends the process

    # On the thread

    def _main(self) -> None:
        try:
            super()._main()
        finally:
            self.over()

    def _keep(self, events: list[Event]) -> None:
        self._events = events

    def _send(self, events: list[Event]) -> None:
        super()._send(events)
        kept, self._events = self._events, []
        stats = self._fresh()
        now = self._waiting()
        if kept or stats is not None or now != self._told:
            start = time.monotonic()
            self.tell(kept, stats, now)
            if stats is not None:  # one of thousands of adapters takes its time, and is told less often
                self._pictured_again = start + (time.monotonic() - start) / STATS_SHARE

    def _fresh(self) -> Stats | None:
        """The picture, where it is another than was told last, and that was long enough ago."""
        stats = self.stats()
        if stats is self._told_stats or time.monotonic() < self._pictured_again:
            return None
        before, self._told_stats = self._told_stats, stats
        return stats if stats != before else None


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    line, desk = (Line(int(handle)) for handle in sys.argv[1:])
    inbox: Inbox = queue.SimpleQueue()
    order: Order = line.receive()
    threading.Thread(target=_listen, args=(line, inbox), daemon=True).start()
    logging.basicConfig(handlers=[_Wire(line)], level=order.level)
    try:
        engine = order.make()
    except AdapterServerError as error:
        line.send(Refused(error))
        return
    hosted = Hosted(engine, line)
    line.send(Ready(engine.info, hosted.stats()))
    engine.pool.store.on_fault = line.send
    threading.Thread(target=_judge, args=(desk, engine), daemon=True).start()
    _host(hosted, inbox)
    engine.close()
    sys.exit(1 if hosted.failure else 0)


def _host(hosted: Hosted, inbox: Inbox) -> None:
    """Everything that comes, to the end of the engine."""
    hosted.over = lambda: inbox.put(OVER)
    hosted.start()
    deeds: dict[str, Callable[..., object]] = {"submit": hosted.take, "cancel": hosted.cancel}
    deeds |= {"call": hosted.operate, "leave": hosted.leave}
    while (message := inbox.get()) != OVER:
        name, *given = message or ("leave",)
        deeds[name](*given)


def _listen(line: Line, inbox: Inbox) -> None:
    try:
        while True:
            inbox.put(line.receive())
    except (EOFError, OSError):
        inbox.put(None)
    time.sleep(ORPHAN_S)
    os._exit(1)


def _judge(desk: Line, engine: Engine) -> None:
    """Adapters that somebody wants to publish, one by one, beside everything else."""
    try:
        while True:
            spec, header = desk.receive()
            desk.send(_refusal(engine, spec, Blob(bytearray(desk.receive_bytes()), header)))
    except (EOFError, OSError):
        return


def _refusal(engine: Engine, spec: Spec, blob: Blob) -> Exception | None:
    try:
        engine.pool.judge(spec, blob)
    except AdapterServerError as error:
        return error
    except Exception as error:
        logging.getLogger(__name__).exception("judging an adapter failed")
        return AdapterUnavailable(f"checking {spec.name!r} failed: {error!r}")
    return None


class _Wire(logging.handlers.QueueHandler):
    """The log is the server's: it has one format, and one place to go."""

    def __init__(self, line: Line) -> None:
        super().__init__(queue.SimpleQueue())
        self.setFormatter(logging.Formatter("%(message)s"))
        self._line = line

    def enqueue(self, record: logging.LogRecord) -> None:
        self._line.send(record)


if __name__ == "__main__":
    main()
