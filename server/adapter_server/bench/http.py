"""A benchmark over HTTP: a real server in this process, the client in another, the engine here or in a third."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx

from adapter_server.api.app import Connect
from adapter_server.api.logs import configure_logs
from adapter_server.api.server import Server
from adapter_server.bench.client import Reply, per_token_s
from adapter_server.bench.drive import Ask, Run, Setting, Tokens, engine_of
from adapter_server.bench.play import Arrival, Deed, by_clock
from adapter_server.bench.workloads import Workload
from adapter_server.config import PACKAGE, EngineConfig, ServerConfig
from adapter_server.core import Info, Op
from adapter_server.engine.engine import Engine
from adapter_server.engine.process import EngineProcess
from adapter_server.engine.worker import Worker
from adapter_server.errors import RequestFailed
from adapter_server.registry import guard
from adapter_server.registry.store import Store
from adapter_server.text import Text

START_S = 60.0
Result = TypeVar("Result")


class Client:
    """A stage over HTTP. Requests come from a process of its own, so that it takes no share of the interpreter."""

    def __init__(self, process: subprocess.Popen[str], http: httpx.Client) -> None:
        self._process, self._http = process, http

    def drive(self, asks: Sequence[Ask], new: int) -> Run:
        """As `drive.drive`; a row's time per token, while all are under way, stands for its steps."""
        start = time.perf_counter()
        self._send([Arrival(0.0, ask, new) for ask in asks])
        replies = self._read()
        return Run(
            answers=[tuple(reply.ids) for reply in replies],
            first_s=[reply.ttft_s for reply in replies],
            steps=per_token_s(replies),
            total_s=time.perf_counter() - start,
        )

    def play(self, arrivals: Sequence[Arrival], deeds: Sequence[Deed] = ()) -> list[Reply]:
        start = time.perf_counter()
        self._send(arrivals)
        by_clock(deeds, start)
        return self._read()

    def _send(self, arrivals: Sequence[Arrival]) -> None:
        to = self._process.stdin
        if to is None:
            raise RequestFailed("the benchmark's client has no pipes")
        to.write(json.dumps([(each.due_s, _body(each.ask, each.new)) for each in arrivals]) + "\n")
        to.flush()

    def _read(self) -> list[Reply]:
        back = self._process.stdout
        if back is None:
            raise RequestFailed("the benchmark's client has no pipes")
        if not (line := back.readline()):
            raise RequestFailed("the benchmark's client ended; what it said is above")
        return [Reply(**reply) for reply in json.loads(line)]

    def gap(self, ask: Ask, known: Tokens) -> float:
        body = _body(replace(ask, prompt=ask.prompt + known), 1) | {"logprobs": 2, "stream": False}
        (token,) = _good(self._http.post("/generate", json=body)).json()["logprobs"]
        first, second = (each["logprob"] for each in token["top"])
        return abs(float(first) - float(second))

    def operate(self, op: Op, adapter: str) -> None:
        _good(self._http.post(f"/adapters/{adapter}/{op}"))

    def publish(self, adapter: str, folder: Path) -> None:
        files = {file: (file, (folder / file).read_bytes()) for file in (guard.CONFIG, guard.WEIGHTS)}
        _good(self._http.put(f"/adapters/{adapter}", files=files))


def _good(answer: httpx.Response) -> httpx.Response:
    if answer.is_error:
        raise RequestFailed(f"the server refused: {answer.text}")
    return answer


def _body(ask: Ask, new: int) -> dict[str, Any]:
    fields = {"prompt": list(ask.prompt), "adapter": ask.adapter, "max_new_tokens": new}
    mode = {} if ask.adapter is None else {"mode": ask.mode}
    task = {} if ask.task_id is None else {"task_id": ask.task_id}
    return fields | mode | task | {"ignore_eos": True, "return_token_ids": True, "stream": True}


@contextmanager
def _client(url: str) -> Iterator[Client]:
    command = [sys.executable, "-m", "adapter_server.bench.client", url]
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    with (
        httpx.Client(base_url=url, timeout=600) as http,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process,
    ):
        try:
            yield Client(process, http)
        finally:
            process.kill()


Behind = tuple[Connect, Info, Store]  # what a server stands before


def within(engine: Engine) -> Behind:
    """An engine on a thread of this process, which is closed with the server."""
    return partial(Worker, engine), engine.info, engine.pool.store


def apart(workload: Workload, setting: Setting, **limits: Any) -> Behind:
    """An engine in a process of its own, which ends with the server."""
    store = Store(workload.adapters, settle_s=0)
    process = EngineProcess(partial(engine_of, workload, setting, limits), EngineConfig(**limits), store)
    store.judge = process.judge
    return process.connect, process.ready().info, store


def serve(behind: Behind, workload: Workload, work: Callable[[Client], Result]) -> Result:
    """Do some work against a server over this engine."""
    configure_logs("error")
    return asyncio.run(_serve(behind, workload, work))


async def _serve(behind: Behind, workload: Workload, work: Callable[[Client], Result]) -> Result:
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    connect, info, store = behind
    config = ServerConfig(port=0, adapters=str(workload.adapters))
    server = Server(connect, store, Text(workload.model), info, config, address.set_result)
    running = asyncio.create_task(server.serve())
    try:
        with _client(await asyncio.wait_for(address, START_S)) as client:
            return await asyncio.to_thread(work, client)
    finally:
        server.should_exit = True
        await running
