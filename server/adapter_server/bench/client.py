"""A client in a process of its own: streamed requests, each sent when it is due. Imports no torch.

python -m adapter_server.bench.client URL     reads a batch of [seconds, body] a line, answers with a line of replies

The loop is open: a request leaves at its moment whatever became of those before it, and its times count from there.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

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
    def per_token_s(self) -> float:
        return (self.times[-1] - self.times[0]) / (len(self.ids) - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Between tokens that came apart from each other."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


Due = tuple[float, dict[str, Any]]


def ask(url: str, dues: Sequence[Due]) -> list[Reply]:
    """Every body to POST /generate at its second."""
    return asyncio.run(_ask(url, dues))


async def _ask(url: str, dues: Sequence[Due]) -> list[Reply]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        start = time.perf_counter()
        return await asyncio.gather(*(_stream(http, due_s, body, start) for due_s, body in dues))


async def _stream(http: httpx.AsyncClient, due_s: float, body: dict[str, Any], start: float) -> Reply:
    ids: list[int] = []
    times: list[float] = []
    await asyncio.sleep(max(0.0, start + due_s - time.perf_counter()))
    async with http.stream("POST", "/generate", json=body) as response:
        async for line in response.aiter_lines():
            if new := _ids(line):
                times += [time.perf_counter() - start] * len(new)
                ids += new
    if not ids:
        raise RequestFailed("the server ended an answer before its first token")
    return Reply(due_s, ids, times)


def _ids(line: str) -> list[int]:
    event = json.loads(line.removeprefix("data: ")) if line else {}
    if "error" in event:
        raise RequestFailed(f"the server refused: {event['error']}")
    ids: list[int] = event.get("token_ids", [])
    return ids


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps([asdict(reply) for reply in ask(sys.argv[1], json.loads(line))]), flush=True)
