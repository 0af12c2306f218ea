"""The benchmark's client: tokens get the moment in which their last byte came, and no refusal passes for an answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import pytest

from adapter_server.bench.client import TICK_S, Reply, ask, per_token_s
from adapter_server.errors import RequestFailed

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def event(*ids: int) -> bytes:
    return b'data: {"token_ids": %b}\n\n' % json.dumps(ids).encode()


def chunk(part: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(part), part)


def answered(parts: Sequence[bytes], pause_s: float = 0.05) -> list[Reply]:
    """What the client makes of a server that sends these, one after another."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)
        writer.close()

    async def run() -> list[Reply]:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await asyncio.to_thread(ask, f"http://127.0.0.1:{port}", [(0.0, {"prompt": "a"})])

    return asyncio.run(run())


def test_tokens_have_the_moment_of_their_last_byte() -> None:
    torn = chunk(event(2))
    (reply,) = answered([HEAD + chunk(event(1)), torn[:9], torn[9:] + chunk(event(3) + event(4)), chunk(b"")])
    assert reply.ids == [1, 2, 3, 4]
    first, *others = reply.times
    assert len(set(others)) == 1
    assert others[0] - first >= 0.09


@pytest.mark.parametrize(
    "parts",
    [
        [b'HTTP/1.1 429 Too Many Requests\r\n\r\n{"error": "full"}'],
        [HEAD + chunk(b'data: {"error": "gone"}\n\n') + chunk(b"")],
        [HEAD + chunk(b"")],
    ],
)
def test_a_refusal_is_no_answer(parts: list[bytes]) -> None:
    with pytest.raises(RequestFailed):
        answered(parts, 0.0)


def test_seconds_per_token_are_of_the_time_that_all_share() -> None:
    early = Reply(0.0, (1, 2, 3, 4), (1.0, 11.0, 12.0, 13.0))
    late = Reply(0.0, (1, 2, 3, 4), (10.0, 11.0, 12.0, 43.0))
    assert per_token_s([early, late]) == [1.0, 1.0]
    assert per_token_s([Reply(0.0, (1, 2), (0.0, 1.0)), Reply(0.0, (1, 2), (5.0, 7.0))]) == [1.0, 2.0]
    assert per_token_s([Reply(0.0, (1, 2), (1.0, 1.0))]) == [TICK_S]  # read at once
