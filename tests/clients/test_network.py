"""Requests over lines that cut, stall, dribble and burst: who can be answered is, rightly; of others nothing stays."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from structlog.testing import capture_logs

import live
from adapter_server.config import EngineConfig
from faulty import FAULTS, lines
from live import Live, Question

CLIENTS = 32
PATIENT_S, HASTY_S = 120.0, 1.0  # how long a client waits: on a line that works, on one that falls silent
BROKEN = "broken"  # what a client makes of a line that fails it


@pytest.fixture(scope="module", params=["slots", pytest.param("pages", marks=pytest.mark.soak)])
def demo(request: pytest.FixtureRequest) -> Iterator[Live]:
    with live.demo(engine=EngineConfig(max_model_len=256, kv_bytes=64 << 20, kv_layout=request.param)) as running:
        yield running


def body(question: Question, dialect: str, stream: bool) -> tuple[str, dict[str, Any]]:
    """Where and what to ask in each dialect."""
    if dialect == "lorax":
        parameters = {"adapter_id": question.adapter, "max_new_tokens": 64}
        return "/generate_stream" if stream else "/generate", {"inputs": question.prompt, "parameters": parameters}
    asked = {"prompt": question.prompt, "stream": stream}
    if dialect == "openai":
        return "/v1/completions", asked | {"model": question.adapter or "", "max_tokens": 64, "temperature": 0}
    return "/generate", asked | {"adapter": question.adapter, "max_new_tokens": 64}


def text_of(dialect: str, stream: bool, raw: str) -> str | None:
    """The answer's text; None where the answer has no end."""
    if not stream:
        content = json.loads(raw)
        return str(
            content["choices"][0]["text"] if dialect == "openai" else content.get("text", content.get("generated_text"))
        )
    events = [line.removeprefix("data: ") for line in raw.split("\n\n") if line]
    if dialect == "openai":
        parts = [json.loads(event)["choices"][0]["text"] for event in events if event != "[DONE]"]
        return "".join(parts) if events and events[-1] == "[DONE]" else None
    if dialect == "lorax":
        return str(json.loads(events[-1])["generated_text"]) if events else None
    *parts, last = map(json.loads, events)
    return "".join(part["text"] for part in parts) if "finish_reason" in last else None


async def ask(http: httpx.AsyncClient, line: str, question: Question, dialect: str, stream: bool) -> str:
    """`right`, what was wrong, a status, or `broken`."""
    path, asked = body(question, dialect, stream)
    try:
        response = await http.post(line + path, json=asked)
    except httpx.TransportError:
        return BROKEN
    if response.status_code != 200:
        return str(response.status_code)
    said = text_of(dialect, stream, response.text)
    return "right" if said == question.answer else f"wrong: {said!r} to {question}"


async def trouble(demo: Live, known: list[Question], count: int, seed: int) -> dict[str, Counter[str]]:
    """So many requests, a fault for each; what became of them, by fault."""
    dice, seen = random.Random(seed), {name: Counter[str]() for name in FAULTS}
    places, alone = asyncio.Semaphore(CLIENTS), httpx.Limits(max_connections=None, max_keepalive_connections=0)
    where = urlsplit(demo.address)
    patient, hasty = (httpx.AsyncClient(timeout=seconds, limits=alone) for seconds in (PATIENT_S, HASTY_S))

    async def one(name: str, line: str) -> None:
        dialect, stream, question = dice.choice(["ours", "openai", "lorax"]), dice.random() < 0.6, dice.choice(known)
        async with places:
            http = hasty if FAULTS[name].cut == "silence" else patient
            seen[name][await ask(http, line, question, dialect, stream)] += 1

    async with patient, hasty, lines(where.hostname or "", where.port or 0, seed) as addresses:
        names = [name for _ in range(count // len(FAULTS) + 1) for name in FAULTS]
        await asyncio.gather(*(one(name, addresses[name]) for name in names))
    return seen


def survive(demo: Live, count: int, seed: int) -> None:
    known = demo.warm(live.questions()[::25])
    assert {q.adapter for q in known} == {q.adapter for q in live.questions()}
    files = open_files()
    with capture_logs() as logs:
        seen = asyncio.run(trouble(demo, known, count, seed))
    assert not [line for line in logs if line["log_level"] in ("error", "critical")]
    for name, outcomes in seen.items():
        allowed = {"right"} if FAULTS[name].harmless else {"right", BROKEN}
        assert set(outcomes) <= allowed, (name, outcomes)
    assert any(seen[name][BROKEN] for name in FAULTS)
    demo.settle()
    until = time.monotonic() + live.PATIENCE_S
    while open_files() > files:  # the server closes its sockets
        assert time.monotonic() < until, (open_files(), files)
        time.sleep(0.1)
    assert demo.ask(known[0]).json()["text"] == known[0].answer


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")


def test_a_bad_network_leaves_nothing_behind(demo: Live) -> None:
    survive(demo, 110, seed=1)


@pytest.mark.soak
def test_a_bad_network_leaves_nothing_behind_at_length(demo: Live) -> None:
    survive(demo, 1000, seed=2)
