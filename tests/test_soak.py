"""Thousands of loads, merges, publications and unloads: memory, tensors, threads, files and metrics stay the same."""

from __future__ import annotations

import gc
import io
import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.core import Event, Finished, Op, Spec
from adapter_server.engine.engine import Engine
from adapter_server.metrics import Metrics
from adapter_server.registry import guard
from adapter_server.registry.publish import Publisher
from adapter_server.registry.store import Store

KINDS = ("lora", "dora", "ia3", "lora_saved", "prefix")
PERIOD = 10 * len(KINDS)
MORE_BYTES = 8 << 20  # what an allocator may keep back


@dataclass
class Books:
    """What a leak would make grow."""

    tensors: int
    threads: int
    files: int
    series: int
    resident: int

    @classmethod
    def now(cls, served: Served) -> Books:
        gc.collect()
        series = sum(not line.startswith("#") for line in served.render().splitlines())
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(os.listdir("/proc/self/fd"))
        return cls(tensors, threading.active_count(), files, series, pages * os.sysconf("SC_PAGE_SIZE"))


@dataclass
class Served:
    """An engine, its registry, and the metrics that listen to both."""

    engine: Engine
    publisher: Publisher
    metrics: Metrics

    def do(self, op: Op, spec: Spec) -> None:
        done = self.engine.call(op, spec)
        while not done.done():
            self.step()
        done.result()

    def step(self) -> list[Event]:
        events = self.engine.step()
        self.metrics.observe(events)
        events or time.sleep(0.0002)  # the loader needs the lock too
        return events

    def say(self, name: str) -> None:
        request = rig.ask(self.engine, name, (5, 9), max_new_tokens=1, logprobs=0)
        self.metrics.admitted(request)
        self.engine.submit(request)
        ends: list[Finished] = []
        while not ends:
            ends = [event for event in self.step() if isinstance(event, Finished)]
        assert ends[0].error is None

    def render(self) -> str:
        """As Prometheus reads it; what is forgotten goes."""
        entries = {entry.name: entry.spec for entry in self.publisher.store.entries()}
        return self.metrics.render(self.engine.stats(), entries).decode()


def cycle(served: Served, content: list[tuple[bytes, bytes]], i: int) -> None:
    """Load, merge, answer, unload; now and then publish, go back, delete. The same again after `PERIOD` cycles. Names
    are new ones each period, as a series that is left behind would be seen by its name only."""
    name, publisher = f"a{i // PERIOD}", served.publisher
    kind = i // 10 % len(KINDS)
    if i % 10 == 0:
        config, weights = content[kind]
        publisher.publish(name, config, io.BytesIO(weights))
    spec = publisher.store.resolve(name)
    served.do("load", spec)
    if KINDS[kind] != "prefix":
        served.do("merge", spec)
    if i % 5 == 0:
        served.say(name)
    held = served.engine.pool.host.used
    assert held == sum(resident.host_bytes for resident in served.engine.stats().residents) > 0
    served.do("unload", spec)
    assert served.engine.stats().residents == ()
    if i % PERIOD == PERIOD - 1:
        assert f'adapter="{name}"' in served.render()
        publisher.rollback(name)
        publisher.delete(name)
        assert f'adapter="{name}"' not in served.render()


def run(tmp_path: Path, cycles: int) -> None:
    store, content = Store(tmp_path / "adapters", settle_s=0), []
    for name in KINDS:
        base = zoo.tiny_base("llama")
        zoo.save_adapter(lambda: zoo.tiny_base("llama"), zoo.ADAPTERS[name](base), tmp_path / name)
        content.append(tuple((tmp_path / name / file).read_bytes() for file in (guard.CONFIG, guard.WEIGHTS)))
    engine = Engine(zoo.tiny_base("llama"), EngineConfig(kv_bytes=8 << 20), store)
    served, digest = Served(engine, Publisher(store, keep=2), Metrics(gateway=True)), engine.model.digest()
    for i in range(PERIOD):
        cycle(served, content, i)
    before = Books.now(served)
    for i in range(PERIOD, cycles):
        cycle(served, content, i)
    after = Books.now(served)
    engine.close()
    assert replace(after, resident=0) == replace(before, resident=0)
    assert after.resident - before.resident < MORE_BYTES
    assert engine.model.digest() == digest
    assert (engine.pool.used, engine.pool.host.used) == (0, 0)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "cycles", [2 * PERIOD, pytest.param(10_000, marks=[pytest.mark.soak, pytest.mark.timeout(900)])]
)
def test_nothing_grows(tmp_path: Path, cycles: int) -> None:
    run(tmp_path, cycles)
