"""`mode: auto` with forced times of steps: who gets a snapshot, who loses it, and who shares a step with whom."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

import rig
from adapter_server.core import Event, Finished, Folded, Member, Request, Token
from adapter_server.engine import pool
from adapter_server.engine.costs import Costs, Kind
from adapter_server.engine.engine import Engine
from adapter_server.engine.scheduler import Slice

DEAR = {"plain": 1.0, "unmerged": 1.5, "alone": 1.0, "beside": 2.0}  # by which a snapshot pays while nobody else runs
LIKE = {"plain": 1.0, "unmerged": 1.02, "alone": 1.0, "beside": 2.0}  # by which it hardly does
APART = {"plain": 0.5, "unmerged": 0.5, "alone": 0.5, "beside": 2.0}
WAVES = 20  # of requests, until a fold that the machine gives little time has ended
TOGETHER = {"plain": 1.5, "unmerged": 1.5, "alone": 1.5, "beside": 2.0}


class Forced(Costs):
    """Costs that are known from the start, whatever the number of rows."""

    def __init__(self, seconds: dict[str, float]) -> None:
        super().__init__()
        self.seconds = seconds

    def note(self, kind: Kind, rows: int, seconds: float, now: float) -> None:
        self.noted = kind

    def step(self, kind: Kind, rows: int, now: float) -> float | None:
        return self.seconds[kind] if rows else 0.0


def forced(seconds: dict[str, float], took: float = 0.5, **settings: object) -> Engine:
    """An engine whose steps take so many seconds, by its own books."""
    engine = rig.engine("llama", **settings)
    engine.auto.costs = Forced(seconds)
    ran = engine.auto.ran
    engine.auto.ran = lambda slices, _: ran(slices, took)  # type: ignore[method-assign]
    return engine


def flow(engine: Engine, name: str, until: Callable[[], bool], rows: int = 3, **asked: Any) -> list[Event]:
    """Keep so many rows of an adapter running until something is the case; then let them end."""
    events: list[Event] = []
    ends = time.monotonic() + 20
    while not until():
        for i in range(rows - len(engine._rows)):
            engine.submit(rig.ask(engine, name, rig.PROMPTS[i], **{"mode": "auto", **asked}))
        events += engine.step()
        assert time.monotonic() < ends, "it does not come to pass"
    while engine.busy:
        events += engine.step()
    return events


def snapshots(engine: Engine) -> list[str]:
    return [r.name for r in engine.stats().residents if r.snapshot_bytes]


def modes(events: Sequence[Event]) -> list[str | None]:
    return [event.mode for event in events if isinstance(event, Finished)]


def check(answer: rig.Answer, name: str | None, prompt: tuple[int, ...], new: int = rig.NEW) -> None:
    ids, logprobs = rig.peft_alone("llama", name, prompt, new)
    assert answer.end is not None
    assert answer.end.error is None
    assert tuple(answer.ids) == ids
    assert (answer.matrix() - logprobs).abs().max() < 1e-4


def test_one_that_dominates_gets_a_snapshot_and_loses_it_with_its_share() -> None:
    engine = forced(DEAR)
    digest = engine.model.digest()
    events = flow(engine, "lora", lambda: snapshots(engine) == ["lora"])
    assert [e.name for e in events if isinstance(e, Folded) and e.error is None] == ["lora"]
    assert modes(events)[0] == "unmerged"
    [answer] = rig.run(engine, [rig.ask(engine, "lora", rig.PROMPTS[1], "auto")])
    check(answer, "lora", rig.PROMPTS[1])
    assert answer.end is not None
    assert answer.end.mode == "merged"
    held = engine.pool.used
    flow(engine, "ia3", lambda: not snapshots(engine))
    assert engine.pool.used < held
    assert engine.pool.used == sum(h.bytes for h in engine.pool.holdings.values() if not h.merged)
    [answer] = rig.run(engine, [rig.ask(engine, "lora", rig.PROMPTS[1], "auto")])
    check(answer, "lora", rig.PROMPTS[1])
    assert answer.end is not None
    assert answer.end.mode == "unmerged"
    assert engine.stats().decisions["merged"] >= 1
    assert engine.model.digest() == digest
    engine.close()


def test_a_moment_of_others_takes_nothing() -> None:
    engine = forced(DEAR)
    flow(engine, "lora", lambda: bool(snapshots(engine)))
    flow(engine, "ia3", lambda: engine.auto._steps % 8 == 0, rows=1)
    assert snapshots(engine) == ["lora"]
    engine.close()


def test_a_snapshot_stays_while_its_adapter_has_few_rows_and_carries_none() -> None:
    """Its rows run unmerged beside the others, which is cheaper: it loses nothing by that, and is there when they are
    alone again.
    """
    engine = forced(DEAR)
    flow(engine, "lora", lambda: bool(snapshots(engine)))
    for _ in range(4):
        given = [
            rig.ask(engine, name, rig.PROMPTS[0], "auto") for name in ("lora", "ia3", "lora", "dora", "ia3", "ia3")
        ]
        assert {a.end.mode for a in rig.run(engine, given) if a.end is not None} == {"unmerged"}
    assert snapshots(engine) == ["lora"]
    [answer] = rig.run(engine, [rig.ask(engine, "lora", rig.PROMPTS[1], "auto")])
    assert answer.end is not None
    assert answer.end.mode == "merged"
    engine.close()


@pytest.mark.parametrize(
    ("seconds", "settings"), [(LIKE, {}), (DEAR, {"auto_merge": False}), (DEAR, {"adapter_bytes": 60_000})]
)
def test_no_snapshot_where_it_does_not_pay_or_may_not_be(seconds: dict[str, float], settings: dict[str, Any]) -> None:
    engine = forced(seconds, took=100.0, **settings)
    start = engine.steps
    events = flow(engine, "lora", lambda: engine.steps > start + 60)
    assert not snapshots(engine)
    assert not any(isinstance(e, Folded) for e in events)
    assert set(modes(events)) == {"unmerged"}
    engine.close()


def test_rows_get_their_tokens_while_the_fold_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    go, begun, fold = threading.Event(), threading.Event(), pool.fold

    def slow(*args: Any) -> Any:
        begun.set()
        assert go.wait(20)
        return fold(*args)

    monkeypatch.setattr(pool, "fold", slow)
    engine = forced(DEAR)
    flow(engine, "lora", begun.is_set)
    requests = [rig.ask(engine, "lora", prompt, "auto") for prompt in rig.PROMPTS[:3]]
    for request in requests:
        engine.submit(request)
    got: list[Event] = []
    for _ in range(rig.NEW + 1):
        got += engine.step()
    go.set()
    ends = [e for e in got if isinstance(e, Finished)]
    assert sorted(e.request_id for e in ends) == sorted(r.id for r in requests)
    assert {e.mode for e in ends} == {"unmerged"}
    engine.close()


@pytest.mark.parametrize("seconds", [DEAR, APART, TOGETHER])
def test_answers_are_the_same_while_routes_change(seconds: dict[str, float]) -> None:
    """Rows of both routes, the base's and others', before, during and after the fold."""
    engine = forced({**seconds, "unmerged": 4.0}, took=1.0)
    names = ["lora", "lora", None, "lora", "ia3", "lora", "lora", "dora"]
    asked = [(names[i % 8], rig.PROMPTS[i % 5]) for i in range(32)]
    found: set[tuple[str | None, str | None]] = set()
    for wave in range(WAVES):
        requests = [rig.ask(engine, name, prompt, "auto", id=f"r{wave}-{i}") for i, (name, prompt) in enumerate(asked)]
        for (name, prompt), answer in zip(asked, rig.run(engine, requests, stagger=2), strict=True):
            check(answer, name, prompt)
            found.add((name, answer.end.mode))  # type: ignore[union-attr]
        if ("lora", "merged") in found:
            break
    assert {("lora", "unmerged"), ("lora", "merged"), (None, "base"), ("ia3", "unmerged")} <= found
    engine.close()


def test_a_seed_a_scale_and_a_sum_stay_unmerged() -> None:
    engine = forced(DEAR)
    flow(engine, "lora", lambda: bool(snapshots(engine)))
    plain = rig.ask(engine, "lora", rig.PROMPTS[0], "auto")
    ia3 = Member(engine.pool.store.resolve("ia3"), 0.5)
    asked: list[Request] = [
        rig.ask(engine, "lora", rig.PROMPTS[0], "auto", seed=3),
        rig.ask(engine, "lora", rig.PROMPTS[0], "auto", weight=0.5),
        replace(plain, id="sum", members=(*plain.members, ia3)),
        rig.ask(engine, "prefix", rig.PROMPTS[0], "auto"),
    ]
    for request in asked:
        [answer] = rig.run(engine, [request])
        assert answer.end is not None
        assert (answer.end.error, answer.end.mode) == (None, "unmerged")
    engine.close()


def test_one_that_has_no_merged_form_is_left_alone() -> None:
    engine = forced(DEAR, took=100.0)
    flow(engine, "prefix", lambda: engine.steps > 60)
    assert engine.auto.holding is None
    assert not engine.auto._not_before
    engine.close()


def test_a_fold_that_fails_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise pool.AdapterRefused("not finite")

    monkeypatch.setattr(pool, "fold", broken)
    engine = forced(DEAR, took=100.0)
    events = flow(engine, "lora", lambda: engine.steps > 100)
    assert [e.error for e in events if isinstance(e, Folded)] == ["not finite"]
    assert set(modes(events)) == {"unmerged"}
    engine.close()


def test_its_snapshot_goes_before_anything_else() -> None:
    engine = forced(DEAR)
    flow(engine, "lora", lambda: bool(snapshots(engine)))
    held = {key for key in engine.pool.holdings if not key[2]}
    engine.pool.budget = engine.pool.used
    rig.run(engine, [rig.ask(engine, "ia3", rig.PROMPTS[0])])
    assert not snapshots(engine)
    assert held <= engine.pool.holdings.keys()
    engine.close()


def test_an_operators_word_makes_it_an_ordinary_snapshot() -> None:
    engine = forced(DEAR)
    flow(engine, "lora", lambda: bool(snapshots(engine)))
    engine.call("merge", engine.pool.store.resolve("lora")).result(0)
    flow(engine, "ia3", lambda: engine.steps > 400)
    assert "lora" in snapshots(engine)
    engine.close()


def test_a_row_that_waits_for_its_place_keeps_a_snapshot_that_is_unloaded() -> None:
    engine = forced(DEAR, max_rows=1)
    flow(engine, "lora", lambda: bool(snapshots(engine)), rows=2)
    first, second = (rig.ask(engine, "lora", prompt, "auto") for prompt in rig.PROMPTS[:2])
    answers = {r.id: rig.Answer() for r in (first, second)}
    engine.submit(first)
    engine.submit(second)
    rig.collect(engine.step(), answers)
    engine.call("unload", engine.pool.store.resolve("lora"))
    engine.pool.store.read = None  # type: ignore[method-assign,assignment]
    while engine.busy:
        rig.collect(engine.step(), answers)
    check(answers[second.id], "lora", rig.PROMPTS[1])
    assert answers[second.id].end.mode == "merged"  # type: ignore[union-attr]
    assert not engine.pool.used
    engine.close()


def test_a_route_is_kept_through_preemption() -> None:
    per_token = 2 * 2 * (2 * 8) * 4
    engine = forced(DEAR, kv_layout="pages", page_tokens=4, kv_bytes=40 * per_token, max_model_len=32)
    flow(engine, "lora", lambda: bool(snapshots(engine)), rows=1)
    asked = [("lora", "auto"), ("ia3", "auto"), ("lora", "auto"), ("lora", "unmerged"), ("lora", "auto")]
    requests = [rig.ask(engine, n, rig.PROMPTS[i % 3], m, max_new_tokens=12) for i, (n, m) in enumerate(asked)]
    for (name, _), request, answer in zip(asked, requests, rig.run(engine, requests), strict=True):
        check(answer, name, request.prompt, 12)
    assert engine.scheduler.preemptions > 0
    engine.close()


ASKED = [
    ("lora", "merged"),
    ("lora", "unmerged"),
    ("lora", "merged"),
    ("ia3", "unmerged"),
    ("dora", "merged"),
    (None, ""),
]


@pytest.mark.parametrize(("seconds", "apart"), [(APART, True), (TOGETHER, False)])
@pytest.mark.parametrize("layout", ["slots", "pages"])
def test_snapshots_have_steps_of_their_own_where_those_are_cheaper(
    seconds: dict[str, float], apart: bool, layout: str
) -> None:
    engine = forced(seconds, kv_layout=layout)
    for name in ("lora", "dora"):
        done = engine.call("merge", engine.pool.store.resolve(name))
        while not done.done():
            engine.step()
    rig.run(engine, [rig.ask(engine, n, rig.PROMPTS[0], m) for n, m in ASKED])
    stepped: list[list[tuple[str | None, str]]] = []
    ran = engine.auto.ran

    def seen(slices: Sequence[Slice], took: float) -> None:
        stepped.append([(s.row.request.members[0].spec.name, s.row.mode) for s in slices if s.row.request.members])
        ran(slices, took)

    engine.auto.ran = seen  # type: ignore[method-assign]
    requests = [rig.ask(engine, n, rig.PROMPTS[i % 5], m) for i, (n, m) in enumerate(ASKED)]
    answers = rig.run(engine, requests)
    for (name, _), request, answer in zip(ASKED, requests, answers, strict=True):
        check(answer, name, request.prompt)
    groups = [{who if who[1] == "merged" else None for who in step} for step in stepped]
    assert all(len(group) == 1 for group in groups) == apart
    turns = [next(iter(group)) for group in groups if len(group) == 1]
    if apart:  # each of the three in its turn, from the first step to the last
        assert all(len(set(turns[i : i + 3])) == 3 for i in range(3 * rig.NEW - 2))
    assert len(stepped) == (3 * rig.NEW if apart else rig.NEW)
    engine.close()


def test_times_are_learnt_and_a_mode_is_told_with_the_first_token() -> None:
    engine = rig.engine("llama")
    events = flow(engine, "lora", lambda: engine.steps > 40, max_new_tokens=16)
    first = [e for e in events if isinstance(e, Token) and e.index == 0]
    assert {e.mode for e in first} == {"unmerged"}
    assert all(e.mode is None for e in events if isinstance(e, Token) and e.index)
    known = engine.auto.costs.step("unmerged", 3, time.monotonic())
    assert known is not None
    assert 0 < known < 5
    assert engine.auto.costs.step("alone", 3, time.monotonic()) is None
    engine.close()
