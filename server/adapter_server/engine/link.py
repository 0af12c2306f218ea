"""The line between the server's process and the engine's: whole messages over a pair of sockets, a write for each.

    server ──> engine   Order, then ("submit", request) ("cancel", id, reason) ("call", number, op, spec) ("leave", s)
    engine ──> server   Ready or Refused, then News once a step, Done, Fault, LogRecord

Both ends run this code, and nobody else holds them: what comes is unpickled as it is.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

from adapter_server.core import Event, Info, Stats, Token
from adapter_server.engine.worker import Room
from adapter_server.errors import AdapterServerError

if TYPE_CHECKING:
    from adapter_server.engine.engine import Engine

PROTOCOL = 5


@dataclass(frozen=True, slots=True)
class Order:
    """How to come by the engine, as functions pickle: by name. `level` is of the log."""

    make: Callable[[], Engine]
    level: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine stands."""

    info: Info
    stats: Stats


@dataclass(frozen=True, slots=True)
class Refused:
    """There will be no engine."""

    error: AdapterServerError


class News(NamedTuple):
    """What a step brought. `seen`: requests that the engine has taken in; `room` tells which of them wait."""

    packed: list[Any]  # events; a token's fields without its class, which pickles in a quarter of the time
    stats: Stats | None
    seen: int
    room: Room

    @classmethod
    def of(cls, events: list[Event], stats: Stats | None, seen: int, room: Room) -> News:
        return cls([tuple(each) if isinstance(each, Token) else each for each in events], stats, seen, room)

    @property
    def events(self) -> list[Event]:
        return [Token._make(each) if isinstance(each, tuple) else each for each in self.packed]


class Done(NamedTuple):
    """A call has ended."""

    number: int
    error: AdapterServerError | None


class Line:
    """One end. Any thread may send, one receives. Raises EOFError or OSError where the other end is gone."""

    def __init__(self, handle: int) -> None:
        self._connection = Connection(handle)
        self._sending = threading.Lock()

    def send(self, message: Any) -> None:
        self.send_bytes(pickle.dumps(message, PROTOCOL))

    def send_bytes(self, data: bytes | bytearray | memoryview) -> None:
        with self._sending:
            self._connection.send_bytes(data)

    def receive(self) -> Any:
        return pickle.loads(self._connection.recv_bytes())

    def receive_bytes(self) -> bytes:
        return self._connection.recv_bytes()

    def close(self) -> None:
        self._connection.close()
