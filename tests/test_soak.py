"""Thousands of loads, merges, publications and unloads: memory, tensors, threads and open files stay the same."""

from __future__ import annotations

import gc
import io
import os
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.engine import Engine
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
    resident: int

    @classmethod
    def now(cls) -> Books:
        gc.collect()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(os.listdir("/proc/self/fd"))
        return cls(tensors, threading.active_count(), files, pages * os.sysconf("SC_PAGE_SIZE"))


def settle(engine: Engine, done: Future[None]) -> None:
    while not done.done():
        engine.step() or time.sleep(0.0002)  # the loader needs the lock too
    done.result()


def cycle(engine: Engine, publisher: Publisher, content: list[tuple[bytes, bytes]], i: int) -> None:
    """Load, merge, answer, unload; now and then publish, go back, delete. The same again after `PERIOD` cycles."""
    kind = i // 10 % len(KINDS)
    if i % 10 == 0:
        config, weights = content[kind]
        publisher.publish("a", config, io.BytesIO(weights))
    spec = publisher.store.resolve("a")
    settle(engine, engine.call("load", spec))
    if KINDS[kind] != "prefix":
        settle(engine, engine.call("merge", spec))
    if i % 5 == 0:
        [answer] = rig.run(engine, [rig.ask(engine, "a", (5, 9), max_new_tokens=1, logprobs=0)])
        assert answer.end is not None
        assert answer.end.error is None
    settle(engine, engine.call("unload", spec))
    if i % PERIOD == PERIOD - 1:
        publisher.rollback("a")
        publisher.delete("a")


def run(tmp_path: Path, cycles: int) -> None:
    store, content = Store(tmp_path / "adapters", settle_s=0), []
    for name in KINDS:
        base = zoo.tiny_base("llama")
        zoo.save_adapter(lambda: zoo.tiny_base("llama"), zoo.ADAPTERS[name](base), tmp_path / name)
        content.append(tuple((tmp_path / name / file).read_bytes() for file in (guard.CONFIG, guard.WEIGHTS)))
    engine = Engine(zoo.tiny_base("llama"), EngineConfig(kv_bytes=8 << 20), store)
    publisher, digest = Publisher(store, keep=2), engine.model.digest()
    for i in range(PERIOD):
        cycle(engine, publisher, content, i)
    before = Books.now()
    for i in range(PERIOD, cycles):
        cycle(engine, publisher, content, i)
    after = Books.now()
    engine.close()
    assert (after.tensors, after.threads, after.files) == (before.tensors, before.threads, before.files)
    assert after.resident - before.resident < MORE_BYTES
    assert engine.model.digest() == digest
    assert (engine.pool.used, engine.pool.host.used) == (0, 0)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "cycles", [2 * PERIOD, pytest.param(10_000, marks=[pytest.mark.soak, pytest.mark.timeout(900)])]
)
def test_nothing_grows(tmp_path: Path, cycles: int) -> None:
    run(tmp_path, cycles)
