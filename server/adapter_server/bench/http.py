"""The cells of a benchmark once more over HTTP: a real server in this process, the client in another."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from adapter_server.api.server import Server, configure_logs
from adapter_server.bench.client import Reply
from adapter_server.bench.drive import Ask, Run
from adapter_server.bench.workloads import Workload
from adapter_server.config import PACKAGE, ServerConfig
from adapter_server.engine import Engine, Worker
from adapter_server.errors import RequestFailed
from adapter_server.text import Text

START_S = 60.0
Result = TypeVar("Result")


class Client:
    """Sends batches to a server from a process of its own, so that it takes no share of the interpreter."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def drive(self, asks: Sequence[Ask], new: int) -> Run:
        """As `drive.drive`; a row's time per token stands for its steps."""
        start = time.perf_counter()
        replies = self._send([_body(ask, new) for ask in asks])
        return Run(
            answers=[tuple(reply.ids) for reply in replies],
            first_s=[reply.first_s for reply in replies],
            steps=[statistics.median(reply.per_token_s for reply in replies)],
            total_s=time.perf_counter() - start,
        )

    def _send(self, bodies: list[dict[str, Any]]) -> list[Reply]:
        to, back = self._process.stdin, self._process.stdout
        if to is None or back is None:
            raise RequestFailed("the benchmark's client has no pipes")
        to.write(json.dumps(bodies) + "\n")
        to.flush()
        if not (line := back.readline()):
            raise RequestFailed("the benchmark's client ended; what it said is above")
        return [Reply(**reply) for reply in json.loads(line)]


def _body(ask: Ask, new: int) -> dict[str, Any]:
    fields = {"prompt": list(ask.prompt), "adapter": ask.adapter, "max_new_tokens": new}
    mode = {} if ask.adapter is None else {"mode": ask.mode}
    return fields | mode | {"ignore_eos": True, "return_token_ids": True, "stream": True}


@contextmanager
def _client(url: str) -> Iterator[Client]:
    command = [sys.executable, "-m", "adapter_server.bench.client", url]
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            yield Client(process)
        finally:
            process.kill()


def serve(engine: Engine, workload: Workload, work: Callable[[Client], Result]) -> Result:
    """Do some work against a server over this engine, which is closed with it."""
    configure_logs("error")
    return asyncio.run(_serve(engine, workload, work))


async def _serve(engine: Engine, workload: Workload, work: Callable[[Client], Result]) -> Result:
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    server = Server(
        lambda deliver: Worker(engine, deliver),
        engine.pool.store,
        Text(workload.model),
        engine.info,
        ServerConfig(port=0, adapters=str(workload.adapters)),
        address.set_result,
    )
    running = asyncio.create_task(server.serve())
    try:
        with _client(await asyncio.wait_for(address, START_S)) as client:
            return await asyncio.to_thread(work, client)
    finally:
        server.should_exit = True
        await running
