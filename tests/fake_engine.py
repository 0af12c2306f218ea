"""An engine that echoes, for a process of its own: one token of each row a step, and a word for everything asked."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from adapter_server.config import EngineConfig
from adapter_server.core import Event, Finished, FinishReason, Request, Resident, Spec, Stats, Token
from adapter_server.errors import (
    AdapterRefused,
    AdapterServerError,
    BaseNotSupported,
    InvalidRequest,
    NotMergeable,
    RequestFailed,
)
from adapter_server.registry.store import Blob, Fault, Store
from fakes import INFO

if TYPE_CHECKING:
    from adapter_server.engine.engine import Engine

BAD, DIES, HANGS, BROKEN = 255, 254, 253, 252  # first ids of prompts that have a meaning
CONFIG = EngineConfig(max_waiting=4, max_waiting_tokens=1000, max_rows=2)


class FakeEngine:
    """As much of `Engine` as a `Worker` asks for."""

    def __init__(self, step_s: float, root: Path) -> None:
        self.config, self.info = CONFIG, INFO
        self.step_s, self.steps = step_s, 0
        self.scheduler = SimpleNamespace(waiting=[], running=[])
        self.forming: list[Any] = []
        self.pool = SimpleNamespace(judge=self._judge, store=Store(root, settle_s=0))
        self._residents: tuple[Resident, ...] = ()

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def submit(self, request: Request) -> None:
        if request.prompt[0] == BAD:
            raise InvalidRequest("this prompt is bad", param="prompt")
        self.scheduler.waiting.append(SimpleNamespace(request=request, sent=0))

    def cancel(self, request_id: str, reason: FinishReason) -> list[Event]:
        return [self._end(row, reason) for row in self._rows() if row.request.id == request_id]

    def call(self, op: str, spec: Spec) -> Future[None]:
        done: Future[None] = Future()
        if op == "merge":
            done.set_exception(NotMergeable("this has no merged form"))
            return done
        if op == "unload":
            self.pool.store.on_fault(Fault(*spec.key, "its files are broken"))
        self._residents = (Resident(spec.name, spec.version, "ready", spec.family),) if op == "load" else ()
        logging.getLogger("fake").warning("%s of %s", op, spec.name)
        done.set_result(None)
        return done

    def step(self) -> list[Event]:
        scheduler = self.scheduler
        while scheduler.waiting and len(scheduler.running) < self.config.max_rows:
            scheduler.running.append(scheduler.waiting.pop(0))
        if not scheduler.running:
            return []
        time.sleep(self.step_s)
        self.steps += 1
        return [event for row in list(scheduler.running) for event in self._advance(row)]

    def _advance(self, row: Any) -> list[Event]:
        prompt = row.request.prompt
        if prompt[0] == DIES:
            raise MemoryError("the loop's own end")
        if prompt[0] == HANGS:
            time.sleep(60)
        if prompt[0] == BROKEN:
            failure = RequestFailed("the step that ran this request failed")
            failure.__cause__ = ArithmeticError("what really happened")
            return [self._end(row, "error", failure)]
        token = Token(row.request.id, row.sent, prompt[row.sent % len(prompt)])
        row.sent += 1
        return [token, self._end(row, "length")] if row.sent == row.request.sampling.max_new_tokens else [token]

    def _end(self, row: Any, reason: FinishReason, error: AdapterServerError | None = None) -> Finished:
        (self.scheduler.waiting if row in self.scheduler.waiting else self.scheduler.running).remove(row)
        return Finished(row.request.id, reason, error, completion_tokens=row.sent)

    def _rows(self) -> list[Any]:
        return [*self.scheduler.waiting, *self.scheduler.running]

    def abandon(self, reason: FinishReason, error: AdapterServerError | None = None) -> list[Event]:
        return [self._end(row, reason, error) for row in self._rows()]

    def stats(self) -> Stats:
        running, waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        return Stats(running, waiting, steps=self.steps, residents=self._residents)

    def on_wake(self, wake: Callable[[], None]) -> None:
        del wake

    def end_profile(self) -> None: ...
    def close(self) -> None: ...

    def _judge(self, spec: Spec, blob: Blob) -> None:
        if not isinstance(blob.data, bytearray) or len(blob.data) != spec.bytes:
            raise AdapterRefused(f"{len(blob.data)} bytes are no {spec.bytes}")


def make(step_s: float, root: Path) -> Engine:
    return FakeEngine(step_s, root)  # type: ignore[return-value]


def refused(root: Path) -> Engine:
    raise BaseNotSupported(f"no base fits {root.name}")


def gone(root: Path) -> Engine:
    del root
    os._exit(7)
