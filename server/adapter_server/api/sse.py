"""Server-Sent Events, and JSON as every answer writes it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

Item = TypeVar("Item")
DONE = b"data: [DONE]\n\n"
dumps: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


quote: Callable[[str], str] = json.encoder.encode_basestring  # as `dumps` writes a text
Write = Callable[[bytes], bool]  # a part of the answer, at once; False where it must be sent the ordinary way


def data(content: dict[str, Any]) -> bytes:
    """One event."""
    return f"data: {dumps(content)}\n\n".encode()


def reply(content: Any) -> Response:
    """A whole answer."""
    return Response(dumps(content), media_type="application/json")


class EventStream(Response):
    """Server-Sent Events. The iterator is closed however the answer ends.

    Parts go straight to the connection (`protocol.py`) where it takes them, past all layers that only pass them on.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        write: Write = scope.get("write", _never)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._chunks) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                if chunk and not write(chunk):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _never(part: bytes) -> bool:
    """The way of servers that offer no other."""
    del part
    return False


async def together(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[tuple[int, Item], None]:
    """What each stream gives, with its number, as it comes. If one fails, or the reader leaves, all are closed."""
    if len(streams) == 1:  # needs no task for each of its items
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    awaited = {asyncio.ensure_future(anext(stream)): number for number, stream in enumerate(streams)}
    try:
        while awaited:
            done, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            going = [task for task in done if not isinstance(task.exception(), StopAsyncIteration)]
            items = {awaited[task]: task.result() for task in going}
            for task in done:
                del awaited[task]
            for number in sorted(items):
                yield number, items[number]
            awaited |= {asyncio.ensure_future(anext(streams[number])): number for number in items}
    finally:
        for task in awaited:
            task.cancel()
        await asyncio.gather(*awaited, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
