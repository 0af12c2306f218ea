"""Captured steps on the CPU: the same sheets, keys and launches ahead, with the forward run again for a replay.

`captured.py` says what stands in for the kernels.
"""

from __future__ import annotations

import functools
import gc
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import rig
import zoo
from adapter_server.core import Member, Request
from adapter_server.engine import capture, forms
from adapter_server.engine.capture import Captures, bucket
from adapter_server.engine.engine import Engine
from adapter_server.engine.graphs import GraphKey, Graphs
from adapter_server.engine.grouped import Beside
from adapter_server.engine.routing import Step
from captured import as_on_cuda, ask, right, served, uncaptured  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("as_on_cuda")
NAMES = ("lora", "velora", "dora", "prefix")


def captured(engine: Engine) -> Graphs:
    assert engine.graphs is not None
    return engine.graphs


def test_rows_of_any_length_and_end_are_peft_alone() -> None:
    """Rows end one after another while steps are launched ahead; none of it shows in a token."""
    engine = served()
    asked = [ask(engine, None, i, new=2 + 2 * i) for i in range(4)]
    for i, answer in enumerate(rig.run(engine, asked)):
        assert answer.ids == right(None, i, 2 + 2 * i)
        assert answer.end is not None
        assert answer.end.reason == "length"
    assert {key.rows for key in captured(engine).captured} >= {1, 2, 4}
    assert engine.scheduler.running == []
    assert engine.kv.used == 0
    engine.close()


def test_any_mix_of_adapters_is_one_graph() -> None:
    names = ("lora", "velora")
    engine, found = served(names), []
    rig.run(engine, [ask(engine, name, new=1) for name in names])  # so that no row waits for its adapter
    for order in (("lora", "velora", None), ("velora", None, "lora"), (None, "lora", "velora")):
        for (i, name), answer in zip(
            enumerate(order), rig.run(engine, [ask(engine, n, i, 3) for i, n in enumerate(order)]), strict=True
        ):
            assert answer.ids == right(name, i, 3), (order, name)
        found.append(set(captured(engine).captured))
    assert any(key.tiles for key in found[0])
    assert found[0] == found[2]
    engine.close()


def test_compositions_of_low_ranks_are_captured_and_others_run_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two and three adapters a row, with weights, beside rows of one and of none; not where some scale the base."""
    names = ("lora", "rslora", "velora", "dora")
    engine = served(names)
    mixes = (
        {"lora": 0.5, "rslora": 1.0},
        {"velora": -0.5, "lora": 1.0, "rslora": 0.7},
        {"dora": 1.0},
        {"velora": 2.0},
        {},
    )
    rig.run(engine, [ask(engine, name, new=1) for name in names])  # so that no row waits for its adapter
    without = uncaptured(engine, monkeypatch)
    answers = rig.run(engine, [mixed(engine, i, mix) for i, mix in enumerate(mixes)])
    for (i, mix), answer in zip(enumerate(mixes), answers, strict=True):
        alone = served(names, graphs=False)
        assert answer.ids == rig.run(alone, [mixed(alone, i, mix)])[0].ids, mix
        alone.close()
    assert len(without) == 1  # the prompts
    assert {key.added.depths for key in captured(engine).captured if key.added} == {3}
    rig.run(engine, [mixed(engine, 0, {"lora": 0.5, "dora": 1.0})])
    assert without[-1] == {"lora", "dora"}
    assert len(without) > 2
    engine.close()


def mixed(engine: Engine, i: int, mix: dict[str, float]) -> Request:
    """A row of the i-th prompt under several adapters."""
    members = tuple(Member(engine.pool.store.resolve(name), weight) for name, weight in mix.items())
    return replace(ask(engine, None, i % 5, 6), members=members, mode="unmerged" if mix else "base")


def test_who_scales_the_base_is_right_as_everybody_beside_it() -> None:
    engine = served(NAMES)
    order = (None, *NAMES)
    for (i, name), answer in zip(
        enumerate(order), rig.run(engine, [ask(engine, n, i % 3, 4) for i, n in enumerate(order)]), strict=True
    ):
        assert answer.ids == right(name, i % 3, 4), name
    engine.close()


def test_rows_on_one_snapshot_run_as_a_graph_of_its_own() -> None:
    engine = served(("lora",))
    digest = engine.model.digest()
    [answer] = rig.run(engine, [ask(engine, "lora", mode="merged")])
    assert answer.ids == right("lora")
    assert any(key.whole is not None for key in captured(engine).captured)
    engine.pool.unmerge(engine.pool.store.resolve("lora"))
    assert not any(key.whole is not None for key in captured(engine).captured)
    assert engine.model.digest() == digest
    engine.close()


def test_an_end_is_seen_a_step_late_and_its_surplus_dropped() -> None:
    engine = served()
    ids = right(None)
    at = next(i for i in range(2, rig.NEW) if ids[i] not in ids[:i])
    engine.info = replace(engine.info, eos=frozenset({ids[at]}))
    asked = [ask(engine, None, 0, ignore_eos=False), ask(engine, None, 1)]
    first, second = rig.run(engine, asked)
    assert first.ids == ids[: at + 1]
    assert first.end is not None
    assert (first.end.reason, first.end.completion_tokens) == ("eos", at + 1)
    assert second.ids == right(None, 1)
    engine.close()


def test_rows_that_join_and_that_are_cancelled_while_a_step_is_under_way() -> None:
    engine = served()
    stays, goes = ask(engine, None, 0, id="stays"), ask(engine, None, 1, id="goes")
    answers = {each: rig.Answer() for each in ("stays", "goes", "joins")}
    engine.submit(stays)
    engine.submit(goes)
    for step in range(40):
        rig.collect(engine.step(), answers)
        if step == 4:
            rig.collect(engine.cancel("goes"), answers)
            engine.submit(ask(engine, None, 2, id="joins"))
    assert answers["stays"].ids == right(None, 0)
    assert answers["joins"].ids == right(None, 2)
    assert answers["goes"].ids == right(None, 1)[: len(answers["goes"].ids)]
    assert engine.kv.used == 0
    engine.close()


def test_logprobs_and_draws_read_the_captured_logits() -> None:
    engine = served()
    ids, logprobs = rig.peft_alone("llama", None, rig.PROMPTS[0])
    [answer] = rig.run(engine, [ask(engine, None, logprobs=zoo.VOCAB)])
    assert tuple(answer.ids) == ids
    assert (answer.matrix() - logprobs).abs().max().item() < 1e-4
    assert captured(engine).captured
    seeded = {"temperature": 1.0, "seed": 7}
    warm = [rig.run(engine, [ask(engine, None, **seeded)])[0].ids for engine in (engine, served(graphs=False))]
    assert warm[0] == warm[1]
    engine.close()


WARM: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 1.5, "top_k": 20},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 2.0, "min_p": 0.05, "top_k": 40, "top_p": 0.95},
)
OWNERS, NEWS = (None, "lora", None, "velora", None), (9, 3, 6, 4, 11)  # whose steps are interpreted are few


def warm(engine: Engine, i: int, **more: object) -> Request:
    """The i-th row that is drawn, or not: its adapter, prompt, settings and seed."""
    return ask(engine, OWNERS[i], i, **{"new": NEWS[i], "seed": 40 + i, **WARM[i], **more})


@functools.cache
def by_itself(i: int, **more: object) -> list[int]:
    """The tokens that it has without graphs and without anybody beside it."""
    engine = served(("lora", "velora"), graphs=False)
    [answer] = rig.run(engine, [warm(engine, i, **more)])
    engine.close()
    return answer.ids


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each step that is launched before the last one's tokens are read, whether it draws."""
    launch, found = Graphs.launch, []

    def seen(self: Graphs, slices: Any, routing: Any, before: Any = None, drawn: bool = False) -> Any:
        flight = launch(self, slices, routing, before, drawn)
        if before is not None and flight is not None:
            found.append(drawn)
        return flight

    monkeypatch.setattr(Graphs, "launch", seen)
    return found


@pytest.mark.parametrize(("some", "stagger"), [((0, 1, 2, 3, 4), 0), ((0, 2, 4), 2)])
def test_rows_that_are_drawn_fly_and_have_the_tokens_that_they_have_alone(
    some: tuple[int, ...], stagger: int, ahead: list[bool]
) -> None:
    """Beside a greedy one, on any adapters, in buckets that shrink while rows end one after another."""
    engine = served(("lora", "velora"))
    rig.run(engine, [ask(engine, name, new=1) for name in ("lora", "velora")])  # so that no row waits for its adapter
    answers = rig.run(engine, [warm(engine, i) for i in some], stagger)
    assert [a.ids for a in answers] == [by_itself(i) for i in some]
    assert all(a.end is not None and a.end.reason == "length" for a in answers)
    assert by_itself(1) == right("lora", 1, NEWS[1])
    assert sum(ahead) >= 4
    assert engine.kv.used == 0
    engine.close()


def test_greedy_rows_alone_do_not_draw(ahead: list[bool]) -> None:
    engine = served()
    asked = [ask(engine, None, i) for i in range(2)]
    assert [a.ids for a in rig.run(engine, asked)] == [right(None, 0), right(None, 1)]
    assert set(ahead) == {False}
    assert not any(key.drawn for key in captured(engine).captured)
    rig.run(engine, [warm(engine, 0)])
    assert {key.drawn for key in captured(engine).captured} == {False, True}
    engine.close()


def test_a_row_that_is_drawn_ends_by_its_own_token() -> None:
    """Which is seen a step late; the row beside it goes on."""
    ids = by_itself(0, new=9)
    at = next(i for i in range(2, 9) if ids[i] not in ids[:i])
    engine = served(("lora", "velora"))
    engine.info = replace(engine.info, eos=frozenset({ids[at]}))
    first, second = rig.run(engine, [warm(engine, 0, new=9, ignore_eos=False), warm(engine, 4)])
    assert first.ids == ids[: at + 1]
    assert first.end is not None
    assert (first.end.reason, first.end.completion_tokens) == ("eos", at + 1)
    assert second.ids == by_itself(4)
    engine.close()


@pytest.mark.parametrize(
    "more",
    [{"logprobs": 2}, {"repetition_penalty": 1.3}, {"logit_bias": ((7, 2.0),)}],
    ids=lambda more: next(iter(more)),
)
def test_rows_that_want_more_hold_the_others_back_and_change_no_token(more: dict[str, Any], ahead: list[bool]) -> None:
    engine = served(("lora", "velora"))
    answers = rig.run(engine, [warm(engine, 2), warm(engine, 0, **more), warm(engine, 4)])
    assert [a.ids for a in answers] == [by_itself(2), by_itself(0, **more), by_itself(4)]
    if "logprobs" in more:
        assert answers[1].ids == by_itself(0)
    assert True in ahead  # once that row has ended
    engine.close()


def test_without_a_kernel_that_draws_rows_do_not_fly(monkeypatch: pytest.MonkeyPatch, ahead: list[bool]) -> None:
    monkeypatch.setattr(forms, "drawing", lambda *_: None)
    engine = served(("lora", "velora"))
    answers = rig.run(engine, [warm(engine, i) for i in (0, 2)])
    assert [a.ids for a in answers] == [by_itself(0), by_itself(2)]
    assert ahead == []
    engine.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_their_row_alone(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    engine = served()
    forward = engine.model.forward

    def broken(step: object, ids: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        logits = forward(step, ids, positions, keep)  # type: ignore[arg-type]
        return logits.masked_fill((positions[keep] == len(rig.PROMPTS[1]) + 2)[:, None], torch.nan)

    monkeypatch.setattr(engine.model, "forward", broken)
    others = ask(engine, None, 2, 2), ask(engine, None, 0, 5, temperature=temperature, seed=1)
    well, also, ill = rig.run(engine, [*others, ask(engine, None, 1)])
    assert well.ids == right(None, 2, 2)
    assert len(also.ids) == 5
    assert ill.end is not None
    assert ill.end.reason == "error"
    assert ill.ids == right(None, 1)[:3]
    engine.close()


def test_a_step_that_cannot_be_captured_runs_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*_: object) -> None:
        raise RuntimeError("no capture here")

    monkeypatch.setattr(Captures, "_capture", refuses)
    engine = served()
    with caplog.at_level(logging.WARNING):
        [answer] = rig.run(engine, [ask(engine, None)])
    assert answer.ids == right(None)
    assert len([r for r in caplog.records if "no capture here" in r.getMessage()]) == 2  # prompts, and single tokens
    engine.close()


def test_a_step_that_fails_ends_its_rows_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = served()
    launch = Graphs.launch

    def fails(self: Graphs, slices: Sequence[object], *rest: object) -> object:
        if rest[1:] and rest[1] is not None:
            raise RuntimeError("the device is gone")
        return launch(self, slices, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Graphs, "launch", fails)
    [answer] = rig.run(engine, [ask(engine, None)])
    assert answer.end is not None
    assert answer.end.reason == "error"
    monkeypatch.setattr(Graphs, "launch", launch)
    [answer] = rig.run(engine, [ask(engine, None)])
    assert answer.ids == right(None)
    assert engine.kv.used == 0
    engine.close()


def _last(runs: list[Any]) -> None:
    runs[-1]()


def test_a_captured_step_holds_what_its_launches_know_by_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph keeps no tensor alive: the memory of the small products, and the table, must outlive the capture."""
    recorded = Captures._recorded

    def as_a_graph(self: Captures[Any], step: Step, key: object) -> tuple[object, Tensor]:
        seen.extend(weakref.ref(small.tiles.scratch) for plan in step.routing.plans.values() for small in plan.small)
        run, logits = recorded(self, step, key)
        runs.append(run)
        return functools.partial(_last, runs), logits

    seen: list[weakref.ref[Tensor]] = []
    runs: list[Any] = []
    monkeypatch.setattr(Captures, "_recorded", as_a_graph)
    engine = served(("lora",))
    rig.run(engine, [ask(engine, "lora", 0, 3)])
    runs.clear()
    gc.collect()
    assert seen
    assert all(ref() is not None for ref in seen)
    assert all(
        known.table is engine.model.lowrank.table.rows
        for known in captured(engine).captured.values()
        if known.table is not None
    )
    engine.close()


class Streams:
    """As much of torch.cuda as a capture asks for. `ran`: (stream, whether it was captured) of each forward."""

    CUDAGraph = functools.partial(SimpleNamespace, replay=None)

    def __init__(self) -> None:
        self.now, self.made, self.capturing, self.ran = "default", 0, False, list[tuple[str, bool]]()

    def current_stream(self) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: None)

    def Stream(self, device: torch.device) -> SimpleNamespace:  # noqa: N802 - torch's name
        self.made += 1
        return SimpleNamespace(name=f"stream {self.made}", wait_stream=lambda other: None)

    @contextmanager
    def stream(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.now = self.now, stream.name
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def graph(self, graph: object, pool: object, stream: SimpleNamespace, capture_error_mode: str) -> Iterator[None]:
        """One that fails stays on its stream: torch's ends the capture first, which raises."""
        before, self.now, self.capturing = self.now, stream.name, True
        try:
            yield
        finally:
            self.capturing = False
        self.now = before


def test_captures_share_a_stream_and_one_that_fails_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, streams = served(), Streams()
    graphs = captured(engine)
    for name in ("current_stream", "Stream", "stream", "graph", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, getattr(streams, name))

    def run(step: Step, key: GraphKey) -> Tensor:
        streams.ran.append((streams.now, streams.capturing))
        if key.rows == 2 and streams.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.empty(0)

    monkeypatch.setattr(graphs, "run", run)
    monkeypatch.setattr(graphs, "locked", True)
    capture._aside.cache_clear()
    for rows in (1, 4):
        key = GraphKey(rows, 1024)
        graphs._recorded(graphs.step(key), key)
    assert streams.ran == [("stream 1", False), ("stream 1", True)] * 2
    key = GraphKey(2, 1024)
    with pytest.raises(RuntimeError):
        graphs._recorded(graphs.step(key), key)
    assert streams.now == "default"
    capture._aside.cache_clear()
    engine.close()


def test_a_product_that_fails_leaves_nothing_running_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written beside it is freed with the step, for the next one to take."""

    def base(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room for y")

    done: list[str] = []
    here, aside = (SimpleNamespace(wait_stream=lambda _, said=said: done.append(said)) for said in ("joined", "forked"))
    small = SimpleNamespace(write=lambda more, x: done.append("written"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    with pytest.raises(torch.OutOfMemoryError):
        Beside(small, torch.ones(1), aside).run(base, torch.ones(1, 2), 3)  # type: ignore[arg-type]
    assert done == ["forked", "written", "joined"]


def test_the_table_of_addresses_may_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_server.engine.grouped.FEWEST", 1)
    engine = served(("lora", "rslora", "velora"))
    sizes = []
    for name in ("lora", "rslora", "velora", "lora"):
        assert rig.run(engine, [ask(engine, name, 0, 3)])[0].ids == right(name, 0, 3), name
        sizes.append(len(engine.model.lowrank.table.rows))
    assert sizes == [1, 2, 4, 4]
    engine.close()


@pytest.mark.parametrize(("count", "found"), [(1, 1), (3, 4), (33, 48), (256, 256), (257, 512)])
def test_buckets(count: int, found: int) -> None:
    assert bucket(count, capture.ROWS, None) == found
    assert bucket(count, (4,), 64) == (4 if count <= 4 else 64)
