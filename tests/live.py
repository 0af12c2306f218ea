"""The demo on a loopback port, the real engine below: what it should answer, and whether it is as empty as before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx

from adapter_server.api.server import Server
from adapter_server.config import DEMO_BASE, PACKAGE, EngineConfig, ServerConfig, demo_adapters
from adapter_server.engine.engine import build
from adapter_server.engine.worker import Worker
from adapter_server.registry.store import Store
from adapter_server.text import Text

NAME = "adapter-server-demo"
PATIENCE_S = 20.0


@dataclass(frozen=True)
class Question:
    """A prompt that an adapter has a right answer to."""

    adapter: str | None
    prompt: str
    answer: str


@dataclass
class Live:
    """A running server as a test sees it."""

    address: str
    http: httpx.Client
    server: Server
    worker: Worker
    thread: threading.Thread
    at_rest: dict[str, Any] = field(default_factory=dict)  # what adapters hold that stand before the prompt

    def ask(self, question: Question, **fields: Any) -> httpx.Response:
        body = {"prompt": question.prompt, "adapter": question.adapter, "max_new_tokens": 64}
        return self.http.post("/generate", json=body | fields)

    def occupied(self) -> dict[str, Any]:
        """All that requests may hold, by its name; what is zero or empty is left out."""
        stats, bridge = self.worker.stats(), self.server._service.bridge
        held = {
            "running": stats.running,
            "waiting": stats.waiting,
            "kv_used": stats.kv_used_tokens,
            "open requests": bridge.open_requests,
            "rows on adapters": {r.name: r.running for r in stats.residents if r.running},
            "waiting for adapters": {r.name: r.waiting for r in stats.residents if r.waiting},
        }
        return {name: value for name, value in held.items() if value}

    def settle(self, patience_s: float = PATIENCE_S) -> None:
        """Waits until nothing is left of any request; fails if something stays."""
        until = time.monotonic() + patience_s
        while (held := self.occupied()) != self.at_rest:
            assert time.monotonic() < until, f"still held: {held}"
            time.sleep(0.02)

    def warm(self, questions: list[Question]) -> list[Question]:
        """Those that it answers rightly, one by one; what their adapters hold from now on is no request's."""
        known = [q for q in questions if self.ask(q).json()["text"] == q.answer]
        until = time.monotonic() + PATIENCE_S
        while set(held := self.occupied()) - {"kv_used"}:
            assert time.monotonic() < until, f"still held: {held}"
            time.sleep(0.02)
        self.at_rest = held
        return known

    def wait_for(self, **least: int) -> None:
        """Waits until `running`, `waiting` or `steps` are at least so many."""
        until = time.monotonic() + PATIENCE_S
        while any(getattr(self.worker.stats(), name) < count for name, count in least.items()):
            assert time.monotonic() < until, f"never {least}: {self.worker.stats()}"
            time.sleep(0.005)

    @contextmanager
    def slowly(self, step_s: float) -> Iterator[None]:
        """Steps that take so much longer."""
        model = self.worker.engine.model
        forward = model.forward

        def late(*args: Any, **kwargs: Any) -> Any:
            time.sleep(step_s)
            return forward(*args, **kwargs)

        model.forward = late  # type: ignore[method-assign]
        try:
            yield
        finally:
            model.forward = forward  # type: ignore[method-assign]


@contextmanager
def demo(
    adapters: Path | None = None, engine: EngineConfig | None = None, config: ServerConfig | None = None
) -> Iterator[Live]:
    store = Store(adapters or demo_adapters(), settle_s=0.1)
    built = build(DEMO_BASE, engine or EngineConfig(), store, NAME)
    store.judge = built.pool.judge
    ready: SimpleQueue[str] = SimpleQueue()
    workers: list[Worker] = []

    def connect(deliver: Any) -> Worker:
        workers.append(Worker(built, deliver))
        return workers[0]

    config = replace(config or ServerConfig(), port=0)
    server = Server(connect, store, Text(DEMO_BASE), built.info, config, ready.put)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    address = ready.get(timeout=30)
    with httpx.Client(base_url=address, timeout=60, headers=bearer(config)) as http:
        try:
            yield Live(address, http, server, workers[0], thread)
        finally:
            server.should_exit = True
            thread.join(30)


def bearer(config: ServerConfig) -> dict[str, str]:
    """The header of whoever may do everything."""
    keys = config.admin_key or config.api_key
    return {"Authorization": f"Bearer {keys[0]}"} if keys else {}


def questions() -> list[Question]:
    """Prompts that no training saw, of the base and of each adapter."""
    files = {None: DEMO_BASE / "eval.jsonl"} | {f.parent.name: f for f in sorted(demo_adapters().glob("*/eval.jsonl"))}
    return [
        Question(name, line["prompt"], line["expected"])
        for name, file in files.items()
        for line in map(json.loads, file.read_text().splitlines())
    ]


@contextmanager
def process(*words: object) -> Iterator[subprocess.Popen[str]]:
    """The command line in a process of its own, on a free port."""
    command = [sys.executable, "-m", "adapter_server.cli", *map(str, words), "--port", "0"]
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as running:
        try:
            yield running
        finally:
            running.kill()


def is_gone(pid: int) -> bool:
    """Gone, or a zombie that nobody has reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def address_of(process: subprocess.Popen[str]) -> str:
    """Where `adapter-server demo` says that it listens."""
    assert process.stdout
    return next(line.split()[2].rstrip(",") for line in process.stdout if "http://" in line)
