"""Kinds with tasks: a request's `task_id` chooses, many tasks of one adapter in one batch, each as PEFT alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import rig
from adapter_server.engine import engine as engine_module
from adapter_server.engine.engine import Engine
from adapter_server.errors import InvalidRequest, NotMergeable

NAMES = ("poly", "poly_split", "multitask", "lora")


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = rig.engine("llama", NAMES)
    yield made
    made.close()


ASKED = [("poly", 0), ("poly", 1), ("poly_split", 0), ("poly", 2), ("poly_split", 1), ("multitask", 2), ("poly", 0)]


def hold(engine: Engine) -> None:
    requests = [rig.ask(engine, name, rig.PROMPTS[i % 5], task_id=task) for i, (name, task) in enumerate(ASKED)]
    for i, ((name, task), answer) in enumerate(zip(ASKED, rig.run(engine, requests, stagger=1), strict=True)):
        assert answer.end is not None
        assert answer.end.error is None
        ids, logprobs = rig.peft_alone("llama", name, rig.PROMPTS[i % 5], task=task)
        assert tuple(answer.ids) == ids, (name, task)
        assert (answer.matrix() - logprobs).abs().max() < 1e-4, (name, task)


def test_tasks_of_one_adapter_in_one_batch(engine: Engine) -> None:
    hold(engine)
    (held,) = (h for h in engine.pool.holdings.values() if h.spec.name == "poly")
    assert held.placed is not None
    assert held.bytes == held.placed.bytes == sum(placed.bytes for placed in held.placed.tasks.values()) > 0
    assert engine.pool.used == sum(h.bytes for h in engine.pool.holdings.values())


def test_only_the_tasks_used_last_are_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "TASKS_KEPT", 1)
    hold(engine)
    held = [h for h in engine.pool.holdings.values() if h.spec.name == "poly"]
    assert [len(h.placed.tasks) for h in held if h.placed] == [1]


@pytest.mark.parametrize("task", [3, -1, 1 << 30])
def test_a_task_that_is_none_is_refused_with_the_range(engine: Engine, task: int) -> None:
    (answer,) = rig.run(engine, [rig.ask(engine, "poly", (5, 6), task_id=task)])
    assert answer.end is not None
    assert isinstance(answer.end.error, InvalidRequest)
    assert answer.end.error.message == "task_id must be 0 to 2 for this adapter"


def test_what_a_task_decides_has_no_merged_form(engine: Engine) -> None:
    (answer,) = rig.run(engine, [rig.ask(engine, "poly", (5, 6), mode="merged")])
    assert answer.end is not None
    assert isinstance(answer.end.error, NotMergeable)
    assert "depend on the request's task" in answer.end.error.message


def test_scale_is_of_the_mixed_low_rank(engine: Engine) -> None:
    half, zero, base = rig.run(
        engine,
        [
            rig.ask(engine, "poly", (5, 6), weight=0.5),
            rig.ask(engine, "poly", (5, 6), weight=0.0),
            rig.ask(engine, None, (5, 6)),
        ],
    )
    assert torch.allclose(zero.matrix(), base.matrix(), atol=1e-5)
    assert (half.matrix()[0] - base.matrix()[0]).abs().max() > 1e-2
