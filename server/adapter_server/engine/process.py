"""The engine in a process of its own, so that HTTP and the steps each have an interpreter: a `Worker` for the server.

    server's process                              engine's process (child.py)
    submit, cancel, call ──> outbox ── line ──>   inbox ──> Worker ──> engine.step
    deliver <── a thread <────────── line <──────  News, once a step

Nothing here waits for the engine but `judge`, `ready` and `stop`. Torch and transformers are imported where they are
needed, so that one process loads the base while the other one becomes a server.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from logging import LogRecord
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapter_server.config import PACKAGE, EngineConfig
from adapter_server.core import Event, Finished, FinishReason, Op, Request, Spec, Stats
from adapter_server.engine.link import Done, Line, News, Order, Ready, Refused
from adapter_server.engine.worker import Room
from adapter_server.errors import Unavailable
from adapter_server.registry.guard import Base
from adapter_server.registry.store import Blob, Fault, Store

if TYPE_CHECKING:
    from adapter_server.engine.engine import Engine

LEAVE_S = 10.0  # for the engine's process to end once it may; then it is killed
RETRY_S = 5.0


def is_apart(chosen: Literal["auto", "on", "off"], device: str) -> bool:
    """Whether the engine gets a process of its own: on the CPU its threads and HTTP's share the cores anyway."""
    if chosen != "auto":
        return chosen == "on"
    from adapter_server.engine.device import device_of

    return device_of(device).type == "cuda"


@dataclass(frozen=True, slots=True)
class Shelf:
    """What the engine's own store must know; it reads what the server's has resolved."""

    root: Path
    reserved: tuple[str, ...]
    max_bytes: int
    strict_base: bool

    def open(self) -> Store:
        """Whoever resolved a version has seen it settle: this store need not."""
        store = Store(self.root, self.reserved, settle_s=0, max_bytes=self.max_bytes)
        store.strict_base = self.strict_base
        return store


def build_over(model: str, config: EngineConfig, shelf: Shelf, name: str | None) -> Engine:
    """As `build`, over adapters of its own. For an `Order`."""
    from transformers.utils import logging as logging_of_libraries

    from adapter_server.engine.engine import build

    logging_of_libraries.disable_progress_bar()
    store = shelf.open()
    engine = build(model, config, store, name)
    store.base = Base((model, engine.info.model), engine.info.commit)
    return engine


class EngineProcess:
    """A `Worker` whose engine runs elsewhere. The process starts at once; `ready` waits for its engine."""

    def __init__(self, make: Callable[[], Engine], config: EngineConfig, store: Store) -> None:
        self.config, self.store = config, store
        self.deliver: Callable[[list[Event]], None] = lambda events: None
        self._process, self._line, self._desk = _begun()
        self._line.send(Order(make, logging.getLogger().getEffectiveLevel()))
        self._outbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._write, "engine-requests"), (self._read, "engine-events"))
        ]
        self._lock = threading.Lock()
        self._judging = threading.Lock()
        self._alive = True
        self._leaving = False
        self._numbers = itertools.count()
        self._calls: dict[int, Future[None]] = {}
        self._open: set[str] = set()  # requests that have not ended
        self._unseen: deque[int] = deque()  # tokens of each request that the engine has not taken in yet
        self._seen, self._room, self._stats = 0, Room(), Stats()

    def ready(self) -> Ready:
        """What the engine says of itself. Raises what its making raised, or Unavailable where its process ended."""
        try:
            while isinstance(first := self._line.receive(), LogRecord):
                _log(first)
        except (EOFError, OSError):
            status = self._process.wait()
            first = Refused(Unavailable(f"the engine's process ended with status {status} at start: see above"))
        if isinstance(first, Refused):
            self.stop()
            raise first.error
        ready: Ready = first
        self._stats = ready.stats
        return ready

    def connect(self, deliver: Callable[[list[Event]], None]) -> EngineProcess:
        """Events go there from now on."""
        self.deliver = deliver
        return self

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        return self._alive

    def stop(self, drain_s: float = 0.0) -> None:
        """Take nothing new, let rows run for at most `drain_s` seconds, cancel the rest, end the process."""
        self._leaving = True
        self._outbox.put(("leave", drain_s))
        started = [thread for thread in self._threads if thread.ident is not None]
        if not started:
            self._close()  # which tells the other end to leave
        try:
            self._process.wait(drain_s + LEAVE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in started:
            thread.join()
        self._close()

    def _close(self) -> None:
        self._alive = False
        self._line.close()
        self._desk.close()

    def submit(self, request: Request) -> None:
        """Queue a request. Raises QueueFull or Unavailable at once; other refusals come as `Finished`."""
        with self._lock:
            if self._leaving or not self._alive:
                raise Unavailable("the server is going down; try another or later", retry_after=RETRY_S)
            waiting, tokens = self._room.requests + len(self._unseen), self._room.tokens + sum(self._unseen)
            Room(waiting, tokens, self._room.pace_s).check(request, self.config)
            self._unseen.append(request.cost)
            self._open.add(request.id)
        self._outbox.put(("submit", request))

    def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> None:
        """End a request; its place is free at the next step. One that has ended already is left alone."""
        self._outbox.put(("cancel", request_id, reason))

    def call(self, op: Op, spec: Spec) -> Future[None]:
        """load, unload, pin, unpin, merge or unmerge; refusals come through the future."""
        done: Future[None] = Future()
        with self._lock:
            if not self._alive:
                done.set_exception(Unavailable("the engine is not running", retry_after=RETRY_S))
                return done
            number = next(self._numbers)
            self._calls[number] = done
        self._outbox.put(("call", number, op, spec))
        return done

    def stats(self) -> Stats:
        return self._stats

    def judge(self, spec: Spec, blob: Blob) -> None:
        """Refuses what a load would refuse. For any thread but the event loop's: it waits for the answer."""
        with self._judging:
            try:
                self._desk.send((spec, dict(blob.header)))
                self._desk.send_bytes(blob.data)
                refusal = self._desk.receive()
            except (EOFError, OSError):
                raise Unavailable("the engine is not running", retry_after=RETRY_S) from None
        if refusal is not None:
            raise refusal

    # On threads of its own

    def _write(self) -> None:
        """A socket that is full holds up nobody but this thread."""
        try:
            while (message := self._outbox.get()) is not None:
                self._line.send(message)
        except OSError:
            return  # the other thread sees the same, and says so

    def _read(self) -> None:
        try:
            while True:
                self._take(self._line.receive())
        except (EOFError, OSError):
            self._lost()

    def _take(self, message: Any) -> None:
        if isinstance(message, News):
            self._told(message)
        elif isinstance(message, Done):
            _resolve(self._calls.pop(message.number), message.error)
        elif isinstance(message, Fault):
            self.store.take(message)
        else:
            _log(message)

    def _told(self, news: News) -> None:
        events = news.events
        with self._lock:
            for _ in range(self._seen, news.seen):
                self._unseen.popleft()
            self._seen, self._room = max(self._seen, news.seen), news.room
            self._open.difference_update(event.request_id for event in events if isinstance(event, Finished))
        if news.stats is not None:
            self._stats = news.stats
        if events:
            self.deliver(events)

    def _lost(self) -> None:
        """The engine is gone: whoever waits is told."""
        with self._lock:
            self._alive = False
            calls, self._calls = self._calls, {}
            ids, self._open = self._open, set()
        gone = Unavailable("the engine's process ended: retry once the server is back", retry_after=RETRY_S)
        for call in calls.values():
            call.set_exception(gone)
        if ids:
            self.deliver([Finished(id, "error", gone) for id in ids])
        self._outbox.put(None)


def _begun() -> tuple[subprocess.Popen[bytes], Line, Line]:
    """The process, and the ends of two lines to it: messages, and adapters to be judged, which may be large."""
    pairs = [socket.socketpair() for _ in range(2)]
    theirs = [other.fileno() for _, other in pairs]
    command = [sys.executable, "-P", "-m", "adapter_server.engine.child", *map(str, theirs)]
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=2, env=os.environ | {"PYTHONPATH": path}, pass_fds=theirs
    )
    for _, other in pairs:
        other.close()
    line, desk = (Line(one.detach()) for one, _ in pairs)
    return process, line, desk


def _resolve(call: Future[None], error: Exception | None) -> None:
    if error is None:
        call.set_result(None)
    else:
        call.set_exception(error)


def _log(record: LogRecord) -> None:
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)
