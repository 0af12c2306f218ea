"""The engine's thread on one side, the event loop on the other: a batch of events crosses once per step."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

import structlog

from adapter_server.api.callers import Caller
from adapter_server.core import Event, Finished, FinishReason, Loaded, Request, Spec, Stats, Token
from adapter_server.errors import AdapterServerError, ClientTooSlow, DeadlineExceeded, Unavailable
from adapter_server.metrics import Metrics

Operation = Literal["load", "unload", "pin", "unpin", "merge", "unmerge"]
GRACE_S = 0.25  # the engine ends a request at its deadline; this much later the bridge does
log = structlog.get_logger()


class Worker(Protocol):
    """What the API needs of the engine."""

    @property
    def alive(self) -> bool: ...
    def start(self) -> None: ...
    def stop(self, drain_s: float = 0.0) -> None: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> None: ...
    def call(self, op: Operation, spec: Spec) -> Future[None]: ...
    def stats(self) -> Stats: ...


@dataclass(slots=True)
class Usage:
    """How an adapter was used; `last_used` in seconds since 1970."""

    served: int = 0
    last_used: float | None = None


class Channel:
    """The events of one request, on the event loop."""

    __slots__ = ("_events", "_reader", "caller", "request", "timer", "unread")

    def __init__(self, request: Request, caller: Caller, timer: asyncio.TimerHandle | None) -> None:
        self._events: list[Token | Finished] = []
        self._reader: asyncio.Future[None] | None = None
        self.request = request
        self.caller = caller
        self.timer = timer
        self.unread = 0  # tokens, and alternatives to them, that nobody has taken yet

    def put(self, event: Token | Finished) -> None:
        self._events.append(event)
        self.unread += 1 + len(event.top) if isinstance(event, Token) else 0
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def next(self) -> list[Token | Finished]:
        """Waits for one event, and takes what else is there. For one reader."""
        if not self._events:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        events, self._events, self.unread = self._events, [], 0
        return events


class Bridge:
    """Requests go down, events come up. All but `deliver` belongs to the event loop."""

    def __init__(self, metrics: Metrics, most_unread: int) -> None:
        self.worker: Worker
        self._most_unread = most_unread
        self.usage: defaultdict[str, Usage] = defaultdict(Usage)
        self._metrics = metrics
        self._channels: dict[str, Channel] = {}
        self._loop: asyncio.AbstractEventLoop

    def open(self) -> None:
        """Binds the running loop; before the worker starts."""
        self._loop = asyncio.get_running_loop()

    def deliver(self, events: list[Event]) -> None:
        """Called on the engine's thread, once a step."""
        self._loop.call_soon_threadsafe(self._dispatch, events)

    @property
    def open_requests(self) -> int:
        return len(self._channels)

    def in_use(self, name: str) -> set[str]:
        """The versions of an adapter that open requests were admitted with. On any thread."""
        members = (member for channel in list(self._channels.values()) for member in channel.request.members)
        return {member.spec.version for member in members if member.spec.name == name}

    def submit(self, request: Request, caller: Caller) -> Channel:
        """Admits a request, or raises what its key or the worker has against it. Its events come by this loop."""
        caller.admit(request.cost)
        try:
            self.worker.submit(request)
        except BaseException:
            caller.release(request.cost)
            raise
        channel = self._channels[request.id] = Channel(request, caller, self._timer(request))
        self._metrics.admitted(request)
        return channel

    def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> None:
        """Frees the request's place within a step. One that has ended is left alone."""
        if request_id in self._channels:
            self.worker.cancel(request_id, reason)

    def cancel_all(self) -> None:
        for request_id in tuple(self._channels):
            self.cancel(request_id)

    def fail_all(self) -> None:
        """The engine is gone: every request ends now."""
        error = Unavailable("the engine stopped: retry once the server is back", retry_after=5)
        self._dispatch([Finished(request_id, "error", error) for request_id in self._channels])

    def _timer(self, request: Request) -> asyncio.TimerHandle | None:
        if request.deadline is None:
            return None
        delay = max(0.0, request.deadline - time.monotonic()) + GRACE_S
        return self._loop.call_later(delay, self._expire, request)

    def _expire(self, request: Request) -> None:
        self.cancel(request.id, "timeout")
        error = DeadlineExceeded("the deadline passed: allow more with timeout_s, or retry when less is waiting")
        self._dispatch([Finished(request.id, "timeout", error, total_s=time.monotonic() - request.arrived)])

    def _dispatch(self, events: list[Event]) -> None:
        self._metrics.observe(events)
        for event in events:
            if isinstance(event, Token):
                self._put(event)
            elif isinstance(event, Finished):
                self._close(event)
            elif event.error is not None:
                log.warning("adapter failed", adapter=event.name, version=event.version, reason=event.error)
            elif isinstance(event, Loaded) and event.warning is not None:
                log.warning("adapter is odd", adapter=event.name, version=event.version, reason=event.warning)

    def _put(self, token: Token) -> None:
        channel = self._channels.get(token.request_id)
        if channel is None:
            return
        channel.put(token)
        if channel.unread > self._most_unread:
            self._give_up(channel)

    def _give_up(self, channel: Channel) -> None:
        """The engine waits for no reader, and what is kept for one has a bound."""
        id = channel.request.id
        self.cancel(id)
        message = f"more than {self._most_unread:,} tokens were waiting to be read: read faster, or ask without stream"
        self._dispatch([Finished(id, "error", ClientTooSlow(message))])

    def _close(self, end: Finished) -> None:
        channel = self._channels.pop(end.request_id, None)
        if channel is None:
            return
        if channel.timer is not None:
            channel.timer.cancel()
        channel.put(end)
        used = 0 if end.error else len(channel.request.prompt) + end.completion_tokens
        channel.caller.release(max(0, channel.request.cost - used))
        for member in channel.request.members:
            usage = self.usage[member.spec.name]
            usage.served, usage.last_used = usage.served + 1, time.time()


def refusal_of(end: Finished, produced: int) -> AdapterServerError | None:
    """The error that this end means to the caller: None where it is an ordinary answer, a partial one included."""
    if end.reason == "error":
        return end.error or Unavailable("the engine ended this request: retry", retry_after=1)
    if produced or end.reason in ("stop", "length", "eos"):
        return None
    if end.reason == "timeout":
        return end.error or DeadlineExceeded("the deadline passed before the first token: allow more with timeout_s")
    return Unavailable("the request was cancelled before its first token", retry_after=1)
