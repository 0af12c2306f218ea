"""A real server on a loopback port, over a worker that echoes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx

from adapter_server.api.server import Server
from adapter_server.config import ServerConfig
from adapter_server.registry.store import Store
from adapter_server.text import Text
from fakes import INFO, FakeWorker


@dataclass
class Served:
    """A running server as a test sees it."""

    http: httpx.Client
    worker: FakeWorker
    server: Server
    thread: threading.Thread
    adapters: Path

    def generate(self, prompt: str = "ab", **fields: Any) -> httpx.Response:
        return self.http.post("/generate", json={"prompt": prompt, **fields})


@contextmanager
def serving(text: Text, adapters: Path, config: ServerConfig | None = None) -> Iterator[Served]:
    workers: list[FakeWorker] = []

    def connect(deliver: Callable[[list[Any]], None]) -> FakeWorker:
        workers.append(FakeWorker(deliver))
        return workers[0]

    ready: SimpleQueue[str] = SimpleQueue()
    config = replace(config or ServerConfig(), port=0)
    server = Server(connect, Store(adapters, settle_s=0.1), text, INFO, config, ready.put)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    with httpx.Client(base_url=ready.get(timeout=20), timeout=20) as http:
        try:
            yield Served(http, workers[0], server, thread, adapters)
        finally:
            server.should_exit = True
            thread.join(20)
