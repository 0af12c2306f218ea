"""A client in a process of its own: streamed requests, each sent when it is due. Imports no torch.

python -m adapter_server.bench.client URL     reads a batch of [seconds, body] a line, answers with a line of replies

The loop is open: a request leaves at its moment whatever became of those before it, and its times count from there.
While answers come, their bytes are put aside with the moment of each; they are read once all have ended, so that the
client takes next to nothing of a machine that it shares with the server.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any
from urllib.parse import urlsplit

from adapter_server.errors import RequestFailed


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer: its tokens, when it was due, and when each token came, in seconds since the batch began."""

    due_s: float
    ids: Sequence[int]
    times: Sequence[float]

    @property
    def ttft_s(self) -> float:
        return self.times[0] - self.due_s

    @property
    def total_s(self) -> float:
        return self.times[-1] - self.due_s

    @property
    def gaps_s(self) -> list[float]:
        """Between tokens that came apart from each other."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


TICK_S = 1e-6  # tokens that were read at once came no further apart than a clock shows


def per_token_s(replies: Sequence[Reply]) -> list[float]:
    """Of each reply the seconds between two tokens, on average, while all of them were under way; all, if never."""
    first, last = max(reply.times[0] for reply in replies), min(reply.times[-1] for reply in replies)
    inside = [[at for at in reply.times if first <= at <= last] for reply in replies]
    kept = inside if all(len(times) > 1 for times in inside) else [reply.times for reply in replies]
    return [max(TICK_S, (times[-1] - times[0]) / max(1, len(times) - 1)) for times in kept]


Due = tuple[float, dict[str, Any]]
END = b"\r\n"


def ask(url: str, dues: Sequence[Due]) -> list[Reply]:
    """Every body to POST /generate at its second."""
    return asyncio.run(_ask(url, dues))


async def _ask(url: str, dues: Sequence[Due]) -> list[Reply]:
    start = time.perf_counter()
    exchanges = await asyncio.gather(*(_sent(url, due_s, body, start) for due_s, body in dues))
    return [_reply(exchange, due_s, start) for exchange, (due_s, _) in zip(exchanges, dues, strict=True)]


async def _sent(url: str, due_s: float, body: dict[str, Any], start: float) -> Exchange:
    to = urlsplit(url)
    await asyncio.sleep(max(0.0, start + due_s - time.perf_counter()))
    loop = asyncio.get_running_loop()
    _, exchange = await loop.create_connection(
        lambda: Exchange(_request(to.netloc, body)), str(to.hostname), to.port or 80
    )
    await exchange.ended
    return exchange


def _request(host: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


class Exchange(asyncio.Protocol):
    """One request on a connection of its own, and the bytes that come back, each part with its moment."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.parts: list[bytes] = []
        self.moments: list[float] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.moments.append(time.perf_counter())
        self.parts.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set_result(None)


def _reply(exchange: Exchange, due_s: float, start: float) -> Reply:
    """Raises RequestFailed where the answer is no whole stream of tokens."""
    raw, ends = b"".join(exchange.parts), list(accumulate(map(len, exchange.parts)))
    at = raw.find(END + END) + 2 * len(END)
    if not raw.startswith(b"HTTP/1.1 200 "):
        raise RequestFailed(f"the server refused: {raw[at:].decode(errors='replace') or 'no answer'}")
    ids: list[int] = []
    times: list[float] = []
    for chunk, end in _chunks(raw, at):
        new = [id for event in chunk.split(b"\n\n") for id in _ids(event)]
        times += [exchange.moments[bisect_left(ends, end)] - start] * len(new)
        ids += new
    if not ids:
        raise RequestFailed("the server ended an answer before its first token")
    return Reply(due_s, ids, times)


def _chunks(raw: bytes, at: int) -> Iterator[tuple[bytes, int]]:
    """The chunks of a body that begins at `at`, each with where it ends."""
    while size := int(raw[at : (begin := raw.index(END, at))], 16):
        at = begin + len(END) + size + len(END)
        yield raw[begin + len(END) : at - len(END)], at


def _ids(event: bytes) -> list[int]:
    content = json.loads(event.removeprefix(b"data: ")) if event else {}
    if "error" in content:
        raise RequestFailed(f"the server refused: {content['error']}")
    ids: list[int] = content.get("token_ids", [])
    return ids


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps([asdict(reply) for reply in ask(sys.argv[1], json.loads(line))]), flush=True)
