"""Captured steps that read prompts, on the CPU; `captured.py` says what stands in for the kernels."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import rig
from adapter_server.engine.capture import Captures, Sheet
from adapter_server.engine.engine import Engine
from adapter_server.engine.prompts import Prompts
from captured import as_on_cuda, ask, right, served, uncaptured  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("as_on_cuda")


def prompts(engine: Engine) -> Prompts:
    assert engine.prompts is not None
    return engine.prompts


def check(engine: Engine, asked: list[tuple[str | None, int]], new: int = 3) -> None:
    answers = rig.run(engine, [ask(engine, name, i, new) for name, i in asked], stagger=1)
    for (name, i), answer in zip(asked, answers, strict=True):
        assert answer.ids == right(name, i, new), (name, i)


def test_chunks_of_prompts_beside_rows_that_decode() -> None:
    """A budget of 16 tokens cuts the longest prompt; rows join at every step; nothing is left of any."""
    engine = served(max_step_tokens=16)
    check(engine, [(None, i) for i in (0, 3, 1, 2, 4)], rig.NEW)
    assert {key.tokens for key in prompts(engine).captured} == {32}
    assert engine.kv.used == 0
    engine.close()


def test_long_and_short_rows_of_any_adapters_are_one_graph() -> None:
    engine = served(("lora", "velora"), prefix_cache_bytes=0)
    check(engine, [("lora", 3), ("velora", 2)])  # both are loaded from here on
    found = []
    for names in (("lora", None, "velora"), ("velora", None, "lora")):
        before = set(prompts(engine).captured)
        answers = rig.run(engine, [ask(engine, name, i, 2) for name, i in zip(names, (3, 1, 2), strict=True)])
        assert [a.ids for a in answers] == [right(name, i, 2) for name, i in zip(names, (3, 1, 2), strict=True)]
        found.append(set(prompts(engine).captured) - before)
    assert any(key.added for key in found[0])
    assert found[1] == set()
    engine.close()


def test_few_rows_have_few_tiles() -> None:
    """A launch reads as many as its graph says: more than the sheet has would be whatever stands behind them."""
    engine = served(("lora",), max_rows=2, prefix_cache_bytes=0)
    check(engine, [("lora", 0), ("lora", 3)])
    ran = [known for key, known in prompts(engine).captured.items() if key.many and key.few]
    tiles = [small.tiles for known in ran for plan in known.step.routing.plans.values() for small in plan.small]
    assert tiles
    assert all(each.runs[-1].stop == len(each.places) for each in tiles)
    engine.close()


class OnItsWay:
    """What `Sheet.sent` is on CUDA: the device has the sheet once somebody has waited for it."""

    arrived = False

    def synchronize(self) -> None:
        self.arrived = True


def test_a_capture_writes_no_sheet_that_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a prompt's middle. Its sheet may be still to be read when the rest is captured."""

    def send(self: Captures[Any], host: Sheet) -> None:
        self.sheet.bytes.copy_(host.bytes)
        host.sent = OnItsWay()  # type: ignore[assignment]

    def pad(self: Prompts, host: Sheet, *spans: int) -> None:
        assert not isinstance(host.sent, OnItsWay) or host.sent.arrived
        written(self, host, *spans)

    written = Prompts._pad
    monkeypatch.setattr(Captures, "send", send)
    monkeypatch.setattr(Prompts, "_pad", pad)
    monkeypatch.setattr("adapter_server.engine.prompts.TOKENS", (4, 16))
    engine = served(max_step_tokens=9)
    check(engine, [(None, 3)])  # 9, 9 and 3 tokens
    assert {key.tokens for key in prompts(engine).captured} == {4, 16}
    engine.close()


def test_a_prefix_stands_before_the_prompt() -> None:
    engine = served(("prefix",))
    check(engine, [("prefix", 3), (None, 0)])
    assert prompts(engine).captured
    engine.close()


def test_a_snapshot_reads_its_own_weights() -> None:
    engine = served(("lora",))
    [answer] = rig.run(engine, [ask(engine, "lora", 3, 3, mode="merged")])
    assert answer.ids == right("lora", 3, 3)
    assert any(key.whole is not None for key in prompts(engine).captured)
    engine.close()


def test_what_no_sheet_holds_runs_without() -> None:
    """The prompt's own logprobs, and a kind that no kernel on CUDA does."""
    engine = served(("c3a",))
    [answer] = rig.run(engine, [ask(engine, None, 0, 2, prompt_logprobs=1)])
    assert answer.ids == right(None, 0, 2)
    assert len(answer.prompt) == len(rig.PROMPTS[0]) - 1
    check(engine, [("c3a", 0)])
    assert not prompts(engine).captured
    engine.close()


def test_a_snapshots_own_head_beside_a_prompt_of_the_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot's row alone samples: at the head it has all tokens, in the step it has not."""
    engine = served(("lora_head",), max_step_tokens=6, prefix_cache_bytes=0)
    monkeypatch.setattr(engine.auto, "_splits", lambda *_: False)  # one forward for both
    rig.run(engine, [ask(engine, "lora_head", 0, 1, mode="merged")])
    without = uncaptured(engine, monkeypatch)
    merged, base = ask(engine, "lora_head", mode="merged"), ask(engine, None, 3, 2)
    answers = {each.id: rig.Answer() for each in (merged, base)}
    engine.submit(merged)
    for step in range(20):
        if step == 2:
            engine.submit(base)
        rig.collect(engine.step(), answers)
    assert answers[merged.id].ids == right("lora_head")
    assert answers[base.id].ids == right(None, 3, 2)
    assert without == []
    engine.close()
