"""A client in a process of its own: streamed requests, all at once, timed as they arrive. Imports no torch.

python -m adapter_server.bench.client URL     reads a batch of bodies a line, answers with a line of replies
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
    """One answer: its tokens, and when its first and last came, in seconds since the batch was sent."""

    ids: tuple[int, ...]
    first_s: float
    last_s: float

    @property
    def per_token_s(self) -> float:
        return (self.last_s - self.first_s) / (len(self.ids) - 1)


def ask(url: str, bodies: Sequence[dict[str, Any]]) -> list[Reply]:
    """All bodies to POST /generate at once."""
    return asyncio.run(_ask(url, bodies))


async def _ask(url: str, bodies: Sequence[dict[str, Any]]) -> list[Reply]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        start = time.perf_counter()
        return await asyncio.gather(*(_stream(http, body, start) for body in bodies))


async def _stream(http: httpx.AsyncClient, body: dict[str, Any], start: float) -> Reply:
    ids: list[int] = []
    first = last = 0.0
    async with http.stream("POST", "/generate", json=body) as response:
        async for line in response.aiter_lines():
            if new := _ids(line):
                last = time.perf_counter() - start
                first = first or last
                ids += new
    return Reply(tuple(ids), first, last)


def _ids(line: str) -> list[int]:
    event = json.loads(line.removeprefix("data: ")) if line else {}
    if "error" in event:
        raise RequestFailed(f"the server refused: {event['error']}")
    ids: list[int] = event.get("token_ids", [])
    return ids


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps([asdict(reply) for reply in ask(sys.argv[1], json.loads(line))]), flush=True)
