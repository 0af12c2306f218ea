"""The two processes from outside: a server started by hand, its engine in a process of its own, and both ends of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import pytest

import live

LONG = {"prompt": "red cat>", "adapter": "caesar", "max_new_tokens": 400, "ignore_eos": True, "stream": True}
STREAMS = 3


@contextmanager
def started(*words: object) -> Iterator[tuple[Popen[str], str, int]]:
    """The demo's process, its address, and its child's number."""
    with live.process("demo", "--engine-process", "on", *words) as process:
        address = live.address_of(process)
        yield process, address, child_of(process.pid)


def child_of(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


async def ends_after(address: str, happens: Any) -> list[dict[str, Any]]:
    """The last event of streams that are under way when it happens."""
    async with httpx.AsyncClient(base_url=address, timeout=60) as http:
        begun: list[int] = []
        ends = [asyncio.create_task(last_event(http, begun)) for _ in range(STREAMS)]
        while len(begun) < STREAMS:
            await asyncio.sleep(0.005)
        happens()
        return await asyncio.gather(*ends)


async def last_event(http: httpx.AsyncClient, begun: list[int]) -> dict[str, Any]:
    event: dict[str, Any] = {}
    async with http.stream("POST", "/generate", json=LONG) as response:
        begun.append(response.status_code)
        async for line in response.aiter_lines():
            event = json.loads(line.removeprefix("data: ")) if line else event
    return event


def test_a_killed_engine_ends_its_streams_and_the_server() -> None:
    with started() as (process, address, child):
        ends = asyncio.run(ends_after(address, lambda: os.kill(child, signal.SIGKILL)))
        assert {end["error"]["code"] for end in ends} == {"unavailable"}
        _, said = process.communicate(timeout=live.PATIENCE_S)
    assert process.returncode == 1
    assert "the engine stopped" in said


def test_a_signal_to_both_drains_and_leaves_nobody() -> None:
    with started("--drain-timeout-s", "1") as (process, address, child):

        def tell() -> None:
            for pid in (child, process.pid):  # as a service manager does
                os.kill(pid, signal.SIGTERM)

        ends = asyncio.run(ends_after(address, tell))
        assert {end["finish_reason"] for end in ends} <= {"cancelled", "length"}
        assert all(end["usage"]["completion_tokens"] >= 1 for end in ends)
        process.communicate(timeout=live.PATIENCE_S)
    assert process.returncode == 0
    assert live.is_gone(child)


@pytest.mark.soak
def test_a_second_signal_leaves_at_once_and_nobody_behind() -> None:
    with started() as (process, address, child):

        def tell() -> None:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)

        with suppress(httpx.TransportError):  # torn off, unless it had ended
            asyncio.run(ends_after(address, tell))
        process.communicate(timeout=live.PATIENCE_S)
        until = time.monotonic() + live.PATIENCE_S
        while not live.is_gone(child):
            assert time.monotonic() < until
            time.sleep(0.02)
