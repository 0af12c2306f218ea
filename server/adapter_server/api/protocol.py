"""HTTP as uvicorn speaks it through h11, whose parser takes a limit, with a short way for the parts of a stream."""

from __future__ import annotations

from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

CHUNKED = b"1.1"  # the first version in which an answer without a length comes in chunks


class Protocol(H11Protocol):
    """`scope["write"]` sends a part of an answer at once: h11 keeps no count of chunks, and learns of the end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        app = self.app

        async def run(scope: Scope, receive: Receive, send: Send) -> None:
            scope["write"] = self._write
            await app(scope, receive, send)

        self.app = run

    def _write(self, part: bytes) -> bool:
        """False before the head and after the end, for HEAD and for HTTP/1.0, and where the client reads too slowly."""
        cycle, version = self.cycle, self.conn.their_http_version or b""
        under_way = cycle.response_started and not cycle.response_complete and not cycle.disconnected
        if not under_way or self.flow.write_paused or version < CHUNKED or self.scope["method"] == "HEAD":
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(part), part))
        return True
