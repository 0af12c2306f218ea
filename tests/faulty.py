"""A bad line between client and server: a TCP proxy that cuts, stalls, dribbles and bursts."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

AT_ONCE = 1 << 16
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing drops what is not sent, and tells the peer by a reset


@dataclass(frozen=True)
class Fault:
    """What happens to each connection of a line. `cut` comes after a few bytes of the `side` named."""

    side: Literal["request", "answer"] = "answer"
    cut: Literal["", "reset", "end", "silence"] = ""
    most: int = 0  # bytes, up to which the cut comes anywhere
    piece: int = AT_ONCE  # bytes at a time
    pause_s: float = 0.0  # after each piece
    delay_s: float = 0.0  # before the first

    @property
    def harmless(self) -> bool:
        """Whether all bytes arrive in the end."""
        return not self.cut


FAULTS = {
    "sound": Fault(),
    "late": Fault(delay_s=0.1),
    "a request that dribbles": Fault(side="request", piece=5, pause_s=0.002),
    "an answer that dribbles": Fault(piece=5, pause_s=0.002),
    "bursts": Fault(pause_s=0.05),
    "a request that is reset": Fault(side="request", cut="reset", most=400),
    "an answer that is reset": Fault(cut="reset", most=1500),
    "a request that ends early": Fault(side="request", cut="end", most=400),
    "an answer that ends early": Fault(cut="end", most=1500),
    "a request that falls silent": Fault(side="request", cut="silence", most=400),
    "an answer that falls silent": Fault(cut="silence", most=1500),
}


class Line:
    """Connections to one server, all with the same fault."""

    def __init__(self, host: str, port: int, fault: Fault, seed: int) -> None:
        self.fault = fault
        self._server = (host, port)
        self._random = random.Random(seed)
        self._open: set[asyncio.Task[None]] = set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        there, back = await asyncio.open_connection(*self._server)
        up = asyncio.create_task(self._pump(reader, back, "request"))
        down = asyncio.create_task(self._pump(there, writer, "answer"))
        try:
            await asyncio.gather(up, down)
        except (OSError, asyncio.CancelledError):
            for end in (writer, back):
                _reset(end)
        finally:
            up.cancel()
            down.cancel()
            for end in (writer, back):
                end.close()
            self._open.discard(task)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, side: str) -> None:
        fault, own = self.fault, self.fault.side == side
        left = self._random.randint(0, fault.most) if own and fault.cut else AT_ONCE << 8
        await asyncio.sleep(fault.delay_s)
        while left and (data := await source.read(min(left, fault.piece if own else AT_ONCE))):
            left -= len(data)
            sink.write(data)
            await sink.drain()
            if own and fault.pause_s:
                await asyncio.sleep(fault.pause_s)
        if not left:
            await self._cut(source)
        if sink.can_write_eof():
            sink.write_eof()

    async def _cut(self, source: asyncio.StreamReader) -> None:
        if self.fault.cut == "reset":
            raise ConnectionResetError
        if self.fault.cut == "silence":
            await asyncio.Event().wait()

    async def hang_up(self) -> None:
        """Resets whatever is still open."""
        for task in [*self._open]:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)


def _reset(end: asyncio.StreamWriter) -> None:
    connection: socket.socket = end.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    end.transport.abort()


@asynccontextmanager
async def lines(host: str, port: int, seed: int) -> AsyncIterator[dict[str, str]]:
    """A line for each fault: where it listens, by the fault's name."""
    made = {name: Line(host, port, fault, seed + i) for i, (name, fault) in enumerate(FAULTS.items())}
    servers = {name: await asyncio.start_server(line.accept, "127.0.0.1", 0) for name, line in made.items()}
    try:
        yield {name: f"http://127.0.0.1:{s.sockets[0].getsockname()[1]}" for name, s in servers.items()}
    finally:
        for name, server in servers.items():
            server.close()
            await made[name].hang_up()
