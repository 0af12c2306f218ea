"""A server over a real engine in either layout: the engine on a thread of this process, or in a process of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

import httpx

from adapter_server.api.app import Connect
from adapter_server.api.server import Server
from adapter_server.config import EngineConfig, ServerConfig
from adapter_server.core import Info
from adapter_server.engine.engine import build
from adapter_server.engine.process import EngineProcess, Shelf, build_over
from adapter_server.engine.worker import Worker
from adapter_server.registry.store import Store
from adapter_server.text import Text

Layout = Literal["within", "apart"]
LAYOUTS: tuple[Layout, ...] = ("within", "apart")
SETTLE_S = 0.1


@dataclass
class Running:
    """The server as a test sees it."""

    http: httpx.Client
    server: Server
    store: Store
    thread: threading.Thread

    @property
    def address(self) -> str:
        return self.server.address


@contextmanager
def running(
    layout: Layout, base: Path, adapters: Path, engine: EngineConfig, config: ServerConfig | None = None
) -> Iterator[Running]:
    store = Store(adapters, settle_s=SETTLE_S)
    connect, info = (_within if layout == "within" else _apart)(base, engine, store)
    ready: SimpleQueue[str] = SimpleQueue()
    server = Server(connect, store, Text(base), info, replace(config or ServerConfig(), port=0), ready.put)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    with httpx.Client(base_url=ready.get(timeout=20), timeout=30) as http:
        try:
            yield Running(http, server, store, thread)
        finally:
            server.should_exit = True
            thread.join(20)


def _within(base: Path, config: EngineConfig, store: Store) -> tuple[Connect, Info]:
    engine = build(base, config, store)
    store.judge = engine.pool.judge
    return partial(Worker, engine), engine.info


def _apart(base: Path, config: EngineConfig, store: Store) -> tuple[Connect, Info]:
    process = apart(base, config, store)
    return process.connect, process.ready().info


def apart(base: Path, config: EngineConfig, store: Store) -> EngineProcess:
    """The process, under way."""
    shelf = Shelf(store.root, (), store.max_bytes, strict_base=False)
    process = EngineProcess(partial(build_over, str(base), config, shelf, None), config, store)
    store.judge = process.judge
    return process
