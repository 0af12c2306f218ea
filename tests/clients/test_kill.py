"""Clients that vanish at every stage; servers that are told to go, or are killed: no more is lost than was theirs."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

import live
from adapter_server.config import EngineConfig, ServerConfig, demo_adapters
from adapter_server.registry import guard
from live import Live, Question

STEP_S = 0.1  # long, so that what the network takes is less than a step
SOON = 10  # steps: the one under way, the one planned beside it, and the rest for a busy machine
ROWS = 3
SURE = Question("shout", "red cat>", "RED CAT")
LONG = {"adapter": "caesar", "max_new_tokens": 300, "ignore_eos": True}


@pytest.fixture(scope="module")
def demo() -> Iterator[Live]:
    """Few rows, and a prompt of some length takes many steps."""
    with live.demo(engine=EngineConfig(max_rows=ROWS, max_step_tokens=16), config=ServerConfig()) as running:
        running.warm([SURE])
        yield running


@contextmanager
def loader_busy(demo: Live) -> Iterator[None]:
    """Loads wait behind another one."""
    over = threading.Event()
    demo.worker.engine.pool._quick.submit(over.wait)
    try:
        yield
    finally:
        over.set()


def call(demo: Live, **fields: Any) -> socket.socket:
    """A client that has asked, and can vanish."""
    where = urlsplit(demo.address)
    body = json.dumps({"prompt": "red cat>", "stream": True} | fields).encode()
    client = socket.create_connection((where.hostname, where.port))
    client.sendall(f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return client


def until(true: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + live.PATIENCE_S
    while not true():
        assert time.monotonic() < give_up, f"never {what}"
        time.sleep(0.002)


def rows(demo: Live) -> int:
    """Requests that the engine knows, this moment."""
    return len(demo.worker.engine._rows)


def vanish(demo: Live, client: socket.socket) -> int:
    """How many steps it takes until the client's place is free."""
    before, known = demo.worker.engine.steps, rows(demo)
    client.close()
    until(lambda: rows(demo) < known, "free")
    return demo.worker.engine.steps - before


def test_who_leaves_in_prefill_is_forgotten(demo: Live) -> None:
    scheduler = demo.worker.engine.scheduler
    with demo.slowly(STEP_S), ThreadPoolExecutor(1) as other:
        answer = other.submit(demo.ask, SURE)
        client = call(demo, prompt="x" * 400, max_new_tokens=50)
        until(lambda: any(0 < row.done < len(row.request.prompt) for row in scheduler.running), "in prefill")
        assert vanish(demo, client) <= SOON
        assert answer.result().json()["text"] == SURE.answer
    demo.settle()


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_in_decode_is_forgotten(demo: Live, stream: bool) -> None:
    scheduler = demo.worker.engine.scheduler
    with demo.slowly(STEP_S), ThreadPoolExecutor(1) as other:
        client = call(demo, **LONG, stream=stream)
        until(lambda: any(row.emitted for row in scheduler.running), "in decode")
        answer = other.submit(demo.ask, SURE)
        until(lambda: rows(demo) == 2, "two rows")
        assert vanish(demo, client) <= SOON
        assert answer.result().json()["text"] == SURE.answer
    demo.settle()


def test_who_leaves_the_queue_is_forgotten(demo: Live) -> None:
    scheduler = demo.worker.engine.scheduler
    with demo.slowly(STEP_S), ThreadPoolExecutor(ROWS) as others:
        answers = [others.submit(demo.ask, SURE) for _ in range(ROWS)]
        until(lambda: len(scheduler.running) == ROWS, "full")
        client = call(demo, **LONG)
        until(lambda: len(scheduler.waiting) == 1, "in the queue")
        assert vanish(demo, client) <= SOON
        assert [answer.result().json()["text"] for answer in answers] == [SURE.answer] * ROWS
    demo.settle()


def test_who_leaves_while_its_adapter_loads_is_forgotten(demo: Live) -> None:
    demo.http.post("/adapters/mirror/unload")
    with loader_busy(demo):
        client = call(demo, adapter="mirror")
        until(lambda: rows(demo) == 1, "waiting for its adapter")
        vanish(demo, client)
        assert demo.ask(SURE).json()["text"] == SURE.answer
        demo.settle()
    assert demo.ask(Question("mirror", "red cat>", "")).json()["adapter"] == "mirror"
    demo.settle()


# The server goes


async def listen(http: httpx.AsyncClient, body: dict[str, Any], begun: list[int]) -> dict[str, Any]:
    """The last event of a stream."""
    last: dict[str, Any] = {}
    async with http.stream("POST", "/generate", json=body | {"stream": True}) as response:
        async for line in response.aiter_lines():
            if line and not last:
                begun.append(1)
            last = json.loads(line.removeprefix("data: ")) if line else last
    return last


async def streams_until_signal(address: str, tell: Callable[[], object]) -> tuple[list[dict[str, Any]], httpx.Response]:
    """The ends of 64 streams, short and long, when the server is told to go; and what who comes later hears."""
    bodies = [LONG | {"prompt": "red cat>", "max_new_tokens": 8 if i % 2 else 450} for i in range(64)]
    async with httpx.AsyncClient(base_url=address, timeout=60, limits=httpx.Limits(max_connections=None)) as http:
        begun: list[int] = []
        ends = [asyncio.create_task(listen(http, body, begun)) for body in bodies]
        while len(begun) < len(bodies):
            await asyncio.sleep(0.005)
        tell()
        await asyncio.sleep(0.1)
        late = await http.post("/generate", json={"prompt": "a"})
        return await asyncio.gather(*ends), late


def check_ends(ends: list[dict[str, Any]], late: httpx.Response) -> None:
    assert late.status_code == 503
    assert {end["finish_reason"] for end in ends[1::2]} == {"length"}
    assert {end["finish_reason"] for end in ends[::2]} <= {"length", "cancelled"}
    assert all(end["usage"]["completion_tokens"] >= 1 for end in ends)


def test_a_signal_tells_all_streams() -> None:
    with live.demo(config=ServerConfig(drain_timeout_s=4)) as demo:
        check_ends(
            *asyncio.run(streams_until_signal(demo.address, lambda: demo.server.handle_exit(signal.SIGTERM, None)))
        )
        demo.thread.join(20)
        assert not demo.thread.is_alive()
    assert demo.server.exit_code == 0


@pytest.mark.soak
def test_a_signal_from_outside_tells_all_streams() -> None:
    with live.process("demo", "--drain-timeout-s", "4") as process:
        tell = partial(process.send_signal, signal.SIGTERM)
        check_ends(*asyncio.run(streams_until_signal(live.address_of(process), tell)))
        process.communicate(timeout=20)
    assert process.returncode == 0


def keep_busy(address: str, adapters: Path, over: threading.Event) -> None:
    """Publishes and asks until the server is gone."""
    files = [
        {f: (adapters / name / f).read_bytes() for f in (guard.CONFIG, guard.WEIGHTS)} for name in ("shout", "caesar")
    ]
    with httpx.Client(base_url=address, timeout=20) as http:
        try:
            for i in range(1000):
                http.put("/adapters/busy", files=files[i % 2])
                over.set()
                http.post("/generate", json={"prompt": "red cat>", "adapter": "busy"})
        except httpx.TransportError:
            return


@pytest.mark.soak
@pytest.mark.parametrize("after_s", [0.0, 0.03, 0.2])
def test_who_is_killed_starts_again_on_the_same_registry(tmp_path: Path, after_s: float) -> None:
    adapters = shutil.copytree(demo_adapters(), tmp_path / "adapters")
    words = ("serve", live.DEMO_BASE, "--adapters", adapters)
    with live.process(*words) as process, ThreadPoolExecutor(1) as others:
        address, begun = logged_address(process), threading.Event()
        busy = others.submit(keep_busy, address, demo_adapters(), begun)
        begun.wait(live.PATIENCE_S)
        time.sleep(after_s)
        process.kill()
        busy.result()
    with live.process(*words) as process, httpx.Client(base_url=logged_address(process), timeout=20) as http:
        views = {view["name"]: view for view in http.get("/adapters").json()["adapters"]}
        assert {name: view["reason"] for name, view in views.items() if view["state"] == "failed"} == {}
        assert views.keys() == {path.name for path in demo_adapters().iterdir()} | {"busy"}
        for name, right in (("shout", {"RED CAT"}), ("busy", {"RED CAT", "sfe dbu"})):
            answer = http.post("/generate", json={"prompt": "red cat>", "adapter": name}).json()
            assert answer["text"] in right
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 0


def logged_address(process: Popen[str]) -> str:
    assert process.stderr
    return next("http://" + line.split("http://")[1].strip() for line in process.stderr if "http://" in line)
