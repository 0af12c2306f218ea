"""Many streams at once for a while: every answer right and whole, no event twice or missing, the memory flat."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import pytest

import live
from adapter_server.config import EngineConfig
from live import Question

MORE_BYTES = 64 << 20  # what an allocator may keep back
SMALL = ("--kv-bytes", "64M", "--prefix-cache-bytes", "4M")  # soon touched to the last byte
HELD = ("vllm:num_requests", "vllm:kv_cache_usage_perc")
LINES = httpx.Limits(max_connections=None, max_keepalive_connections=None)


@dataclass
class Heard:
    """What the clients got."""

    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)  # seconds to the first token
    gaps: list[float] = field(default_factory=list)  # seconds between two tokens of one answer

    def quantiles(self) -> dict[str, Any]:
        """In milliseconds."""
        spans = {"ttft": self.firsts, "itl": self.gaps}
        cuts = {name: statistics.quantiles(span, n=100) for name, span in spans.items()}
        shown = {name: {f"p{p}": round(cut[p - 1] * 1e3, 2) for p in (50, 90, 99)} for name, cut in cuts.items()}
        return {"answers": self.answers, **shown}


async def events(http: httpx.AsyncClient, path: str, asked: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with http.stream("POST", path, json=asked) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line:
                yield json.loads(line.removeprefix("data: "))


async def ours(http: httpx.AsyncClient, question: Question, heard: Heard) -> str:
    """The text of a stream whose events are numbered without a gap."""
    asked = {"prompt": question.prompt, "adapter": question.adapter, "stream": True, "max_new_tokens": 64}
    text, count, ended, last = "", 0, False, time.perf_counter()
    async for event in events(http, "/generate", asked):
        now = time.perf_counter()
        if ended := "finish_reason" in event:
            assert event["usage"]["completion_tokens"] >= count
            continue
        assert event["index"] == count, "an event is missing, or came twice"
        (heard.gaps if count else heard.firsts).append(now - last)
        text, count, last = text + event["text"], count + 1, now
    assert ended
    return text


async def loraxs(http: httpx.AsyncClient, question: Question) -> str:
    """The same from a stream that says the whole text at its end."""
    asked = {"inputs": question.prompt, "parameters": {"adapter_id": question.adapter, "max_new_tokens": 64}}
    text, whole = "", None
    async for event in events(http, "/generate_stream", asked):
        text += "" if event["token"]["special"] else event["token"]["text"]
        whole = event["generated_text"]
    assert text == whole, "the deltas are not the text"
    return text


async def client(http: httpx.AsyncClient, known: list[Question], until: float, seed: int, heard: Heard) -> None:
    """Asks again and again."""
    dice = random.Random(seed)
    while time.monotonic() < until:
        question = dice.choice(known)
        said = await (loraxs(http, question) if dice.random() < 0.3 else ours(http, question, heard))
        heard.answers += 1
        if said != question.answer:
            heard.wrong.append(f"{said!r} to {question}")


async def load(address: str, known: list[Question], streams: int, seconds: float) -> Heard:
    heard, until = Heard(), time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=LINES) as http:
        await asyncio.gather(*(client(http, known, until, seed, heard) for seed in range(streams)))
    return heard


def resident(process: Popen[str]) -> int:
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def settle(http: httpx.Client) -> None:
    """Waits until the server's own metrics say that it holds no request."""
    until = time.monotonic() + live.PATIENCE_S
    while held := [
        line for line in http.get("/metrics").text.splitlines() if line.startswith(HELD) and not line.endswith(" 0.0")
    ]:
        assert time.monotonic() < until, held
        time.sleep(0.05)


def right(http: httpx.Client, question: Question) -> bool:
    body = {"prompt": question.prompt, "adapter": question.adapter, "max_new_tokens": 64}
    return bool(http.post("/generate", json=body).json()["text"] == question.answer)


def known_to(http: httpx.Client) -> list[Question]:
    """What the server answers rightly, one by one; of every adapter."""
    known = [question for question in live.questions()[::25] if right(http, question)]
    assert {question.adapter for question in known} == {question.adapter for question in live.questions()}
    return known


def check(heard: Heard, streams: int) -> None:
    print(json.dumps({"streams": streams, **heard.quantiles()}))
    assert heard.wrong == []
    assert heard.answers >= streams


def test_64_streams_are_right() -> None:
    config = EngineConfig(kv_bytes=64 << 20, prefix_cache_bytes=4 << 20)
    with live.demo(engine=config) as demo:
        check(asyncio.run(load(demo.address, known_to(demo.http), 64, 3)), 64)
        settle(demo.http)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_256_streams_are_right_for_five_minutes() -> None:
    with (
        live.process("demo", "--log-level", "error", *SMALL) as process,
        httpx.Client(base_url=live.address_of(process), timeout=60) as http,
    ):
        address, known = str(http.base_url), known_to(http)
        check(asyncio.run(load(address, known, 1, 10)), 1)  # idle, to compare with
        asyncio.run(load(address, known, 256, 120))
        before = resident(process)
        check(asyncio.run(load(address, known, 256, 300)), 256)
        grown = resident(process) - before
        settle(http)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 0
    assert grown < MORE_BYTES
