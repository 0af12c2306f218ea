"""The cells of a benchmark once more over HTTP: a real server in this process, the client in another."""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

from adapter_server.api.server import Server, configure_logs
from adapter_server.bench import client
from adapter_server.bench.drive import Ask, Run
from adapter_server.bench.workloads import Workload
from adapter_server.config import ServerConfig
from adapter_server.engine import Engine, Worker
from adapter_server.text import Text

START_S = 60.0


class Client:
    """Sends batches to a server from a process of its own, so that it takes no share of the interpreter."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def drive(self, asks: Sequence[Ask], new: int) -> Run:
        """As `drive.drive`; a row's time per token stands for its steps."""
        bodies = [_body(ask, new) for ask in asks]
        start = time.perf_counter()
        replies = self._pool.submit(client.ask, self.url, bodies).result()
        return Run(
            answers=[reply.ids for reply in replies],
            first_s=[reply.first_s for reply in replies],
            steps=[statistics.median(reply.per_token_s for reply in replies)],
            total_s=time.perf_counter() - start,
        )

    def close(self) -> None:
        self._pool.shutdown()


def _body(ask: Ask, new: int) -> dict[str, Any]:
    fields = {"prompt": list(ask.prompt), "adapter": ask.adapter, "max_new_tokens": new}
    mode = {} if ask.adapter is None else {"mode": ask.mode}
    return fields | mode | {"ignore_eos": True, "return_token_ids": True, "stream": True}


@contextmanager
def serving(engine: Engine, workload: Workload) -> Iterator[Client]:
    """A server over this engine, which is closed with it."""
    configure_logs("error")
    ready: SimpleQueue[str] = SimpleQueue()
    server = Server(
        lambda deliver: Worker(engine, deliver),
        engine.pool.store,
        Text(workload.model),
        engine.info,
        ServerConfig(port=0, adapters=str(workload.adapters)),
        ready.put,
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    asking = Client(ready.get(timeout=START_S))
    try:
        yield asking
    finally:
        asking.close()
        server.should_exit = True
        thread.join()
