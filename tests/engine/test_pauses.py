"""Folds and checks of what is published give way to rows that run; nobody else ever sleeps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

import rig
from adapter_server.core import Op
from adapter_server.engine import engine as engines
from adapter_server.engine import pauses
from adapter_server.engine.engine import Engine
from adapter_server.engine.pauses import Pauses, crowded

NEW = 100  # of a row that outlasts what goes on beside it


class Clock(SimpleNamespace):
    """As much of `time` as pauses need."""

    def __init__(self) -> None:
        super().__init__(worked=0.0, slept=list[float]())

    def thread_time(self) -> float:
        return float(self.worked)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pauses, "time", made)
    return made


def test_sleep_is_in_proportion_to_work_while_rows_run(clock: Clock) -> None:
    running = True
    pause = Pauses(lambda: running)
    pause.share = 0.25
    for worked in (0.0004, 0.0004, 0.0004, 0.002, 3.0):
        clock.worked += worked
        pause()
    assert clock.slept == pytest.approx([0.0036, 0.006, pauses.LONGEST_S])
    running = False
    clock.worked += 1.0
    pause()
    assert len(clock.slept) == 3


def test_who_has_named_no_share_never_sleeps(clock: Clock) -> None:
    pause = Pauses(lambda: True)
    clock.worked += 1.0
    pause()
    assert clock.slept == []


def test_a_thread_has_its_own_share_and_begins_with_no_work_behind_it(clock: Clock) -> None:
    pause = Pauses(lambda: True)
    pause.share = 0.5
    seen: list[float] = []
    thread = threading.Thread(target=lambda: (seen.append(pause.share), pause()))
    clock.worked = 9.0
    thread.start()
    thread.join()
    assert (seen, clock.slept) == ([1.0], [])


def test_crowded_is_who_computes_on_every_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses, "_processors", lambda: 2)
    for threads, told in ((1, False), (2, True)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert crowded(torch.device("cpu")) is told
        assert not crowded(torch.device("cuda"))


@pytest.mark.parametrize("busy", [True, False])
def test_folds_and_checks_give_way_and_nobody_else_does(busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load, a fold, and the check of what is published, beside a row; the row's tokens are those without them."""
    slept: list[str] = []
    monkeypatch.setattr(pauses, "SLICE_S", -1.0)
    monkeypatch.setattr(engines, "crowded", lambda device: True)
    monkeypatch.setattr(
        pauses, "time", SimpleNamespace(thread_time=time.thread_time, sleep=lambda s: slept.append(_who()))
    )
    engine = rig.engine("llama", ("lora", "ia3"))
    row = rig.ask(engine, None, rig.PROMPTS[0], max_new_tokens=NEW)
    answers = {row.id: rig.Answer()}
    if busy:
        engine.submit(row)
    spec = engine.pool.store.resolve("lora")
    for op in ("load", "merge"):
        _through(engine, answers, op)
    judge = threading.Thread(target=lambda: engine.pool.judge(spec, engine.pool.store.read(spec)), name="publisher")
    judge.start()
    _stepped(engine, answers, lambda: not judge.is_alive())
    assert {name.rstrip("_0123456789") for name in slept} == (POLITE if busy else set())
    if busy:
        _stepped(engine, answers, lambda: answers[row.id].end is not None)
        assert tuple(answers[row.id].ids) == rig.peft_alone("llama", None, rig.PROMPTS[0], NEW)[0]
    engine.close()


POLITE = {"adapter-folder", "publisher"}


def _who() -> str:
    return threading.current_thread().name


def _through(engine: Engine, answers: dict[str, rig.Answer], op: Op) -> None:
    done = engine.call(op, engine.pool.store.resolve("lora"))
    _stepped(engine, answers, done.done)
    done.result()


def _stepped(engine: Engine, answers: dict[str, rig.Answer], over: Callable[[], bool]) -> None:
    """Steps as slow as their row has to run beside what is waited for."""
    until = time.monotonic() + 30
    while not over():
        rig.collect(engine.step(), answers)
        time.sleep(0.001)
        assert time.monotonic() < until
