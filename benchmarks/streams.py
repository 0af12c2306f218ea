"""What the API spends on a streamed token: 64 streams from an engine that costs nothing, at the pace of a fast one.

    python benchmarks/streams.py --streams 64 --step-ms 10        one JSON line at the end

The engine gives every stream a token each step, ready made. What is counted is the processor's time of the server's
process, all threads but the engine's, while all streams run, over the tokens that it sent meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from adapter_server.api.app import Deliver
from adapter_server.api.logs import configure_logs
from adapter_server.api.server import Server
from adapter_server.bench.client import Reply
from adapter_server.config import DEMO_BASE, ServerConfig
from adapter_server.core import Event, Finished, FinishReason, Request, Spec, Stats, Token
from adapter_server.registry.store import Store
from adapter_server.text import Text

PROMPT = [114, 101, 100, 32, 99, 97, 116, 62]
LATE = 0.5  # of a step: an API that is behind so far merges events, and its figures are of another work


@dataclass(frozen=True, slots=True)
class Base:
    """What the API asks of the engine about its base."""

    model: str = "metronome"
    max_model_len: int = 1 << 20
    vocab: int = 257
    eos: tuple[int, ...] = (256,)
    device: str = "none"
    dtype: str = "float32"
    lane: str = "packed"
    lane_why: str = "a benchmark"
    has_encoder: bool = False


class Metronome:
    """A worker that begins once so many streams are there, and then gives each a token a step."""

    def __init__(self, deliver: Deliver, streams: int, step_s: float) -> None:
        self._deliver, self._streams, self._step_s = deliver, streams, step_s
        self._requests: list[Request] = []
        self._full = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.spent: list[float] = []  # microseconds per token, by batch

    alive = True

    def start(self) -> None:
        self._thread.start()

    def stop(self, drain_s: float = 0.0) -> None:
        del drain_s

    def submit(self, request: Request) -> None:
        self._requests.append(request)
        if len(self._requests) == self._streams:
            self._full.set()

    def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> None:
        del request_id, reason

    def call(self, op: str, spec: Spec) -> Future[None]:
        raise NotImplementedError

    def stats(self) -> Stats:
        return Stats()

    def _run(self) -> None:
        while True:
            self._full.wait()
            self._full.clear()
            requests, self._requests = self._requests, []
            self._play(requests)

    def _play(self, requests: list[Request]) -> None:
        new = requests[0].sampling.max_new_tokens
        steps: list[list[Event]] = [[Token(r.id, i, 97 + i % 26) for r in requests] for i in range(new)]
        steps[0], first = [], steps[0]
        self._deliver(first)
        time.sleep(0.5)  # the heads of all answers are out
        process, own, due = time.process_time(), time.thread_time(), time.perf_counter()
        for step in steps:
            self._deliver(step)
            due += self._step_s
            time.sleep(max(0.0, due - time.perf_counter()))
        used = time.process_time() - process - (time.thread_time() - own)
        self.spent.append(1e6 * used / (len(requests) * (new - 1)))
        ends = (Finished(r.id, "length", completion_tokens=new, ttft_s=0.0, mode="base") for r in requests)
        self._deliver([*ends])


async def measure(streams: int, new: int, step_s: float, rounds: int) -> dict[str, object]:
    """Of every round: microseconds of the server per token, and milliseconds between two tokens at the client."""
    workers: list[Metronome] = []

    def connect(deliver: Deliver) -> Metronome:
        workers.append(Metronome(deliver, streams, step_s))
        return workers[0]

    with tempfile.TemporaryDirectory() as folder:
        at: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        config = ServerConfig(port=0, adapters=folder)
        server = Server(connect, Store(Path(folder)), Text(DEMO_BASE), Base(), config, at.set_result)
        running = asyncio.create_task(server.serve())
        replies = await asyncio.to_thread(_ask, await at, streams, new, rounds)
        server.should_exit = True
        await running
    gaps = [[gap for reply in batch for gap in reply.gaps_s[2:]] for batch in replies]
    merged = [sum(gap == 0 for gap in batch) / len(batch) for batch in gaps]
    return {
        "us_per_token": round(statistics.median(workers[0].spent), 1),
        "rounds": [round(each, 1) for each in workers[0].spent],
        "ms_between_tokens": round(1e3 * statistics.median(map(statistics.fmean, gaps)), 3),
        "merged": round(statistics.median(merged), 3),
    }


def _ask(url: str, streams: int, new: int, rounds: int) -> list[list[Reply]]:
    """By a client in a process of its own."""
    body = {"prompt": PROMPT, "max_new_tokens": new, "ignore_eos": True, "return_token_ids": True, "stream": True}
    batch = json.dumps([(0.0, body)] * streams) + "\n"
    command = [sys.executable, "-m", "adapter_server.bench.client", url]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, input=batch * rounds, stdout=subprocess.PIPE, text=True, env=env, check=True)
    return [[Reply(**reply) for reply in json.loads(line)] for line in done.stdout.splitlines()]


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--new", type=int, default=200, help="tokens of each stream")
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    configure_logs("error")
    found = asyncio.run(measure(args.streams, args.new, args.step_ms / 1e3, args.rounds))
    machine = {"cpus": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}
    print(json.dumps({"benchmark": "streams", **vars(args), **found, "machine": machine, "commit": commit()}))


if __name__ == "__main__":
    main()
