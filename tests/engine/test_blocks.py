"""Prefix caching: what was computed before is found by those alone who would compute the same, and changes nothing."""

from __future__ import annotations

import pytest

import rig
import zoo
from adapter_server.engine.engine import Engine

SYSTEM = tuple(range(3, 43))  # what many prompts begin with: two blocks of 16, and a half
KINDS = (None, "lora", "dora", "ia3", "ia3_saved", "lora_embed", "prefix", "prompt", "multitask")


def check(arch: str, name: str | None, prompt: tuple[int, ...], answer: rig.Answer) -> None:
    assert answer.end is not None
    assert answer.end.error is None, answer.end.error
    ids, logprobs = rig.peft_alone(arch, name, prompt)
    assert tuple(answer.ids) == ids, name
    assert (answer.matrix() - logprobs).abs().max() < 1e-4, name


def ends(engine: Engine, asked: list[tuple[str | None, tuple[int, ...]]], arch: str, **more: object) -> list[int]:
    """Each answer as PEFT alone gives it; how many tokens of each prompt were known."""
    answers = rig.run(engine, [rig.ask(engine, name, prompt, **more) for name, prompt in asked])
    for (name, prompt), answer in zip(asked, answers, strict=True):
        check(arch, name, prompt, answer)
    return [answer.end.cached_tokens for answer in answers]


@pytest.mark.parametrize("layout", ["slots", "pages"])
@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma3"])
def test_a_known_beginning_changes_nothing(arch: str, layout: str) -> None:
    engine = rig.engine(arch, tuple(k for k in KINDS if k), kv_layout=layout)
    first = ends(engine, [(name, (*SYSTEM, 50)) for name in KINDS], arch)
    assert first == [0] * len(KINDS)
    again = ends(engine, [(name, (*SYSTEM, 60, 61)) for name in KINDS], arch)
    for name, cached in zip(KINDS, again, strict=True):
        virtual = 0 if name is None else engine.pool.store.resolve(name).config.get("num_virtual_tokens", 0)
        assert cached == (virtual + len(SYSTEM)) // 16 * 16 - virtual, name
    engine.close()


@pytest.mark.parametrize("layout", ["slots", "pages"])
def test_nobody_finds_what_another_computed(layout: str) -> None:
    engine = rig.engine("llama", kv_layout=layout)
    prompt = (*SYSTEM, 50)
    ends(engine, [("lora", prompt)], "llama")
    others = [
        rig.ask(engine, None, prompt),
        rig.ask(engine, "rslora", prompt),
        rig.ask(engine, "lora", prompt, weight=0.5),
    ]
    assert [a.end.cached_tokens for a in rig.run(engine, others)] == [0, 0, 0]
    merged = rig.run(engine, [rig.ask(engine, "lora", prompt, mode="merged")])[0]
    assert merged.end.cached_tokens == 0
    assert ends(engine, [("lora", prompt)], "llama") == [32]
    engine.close()


@pytest.mark.parametrize("layout", ["slots", "pages"])
def test_a_conversation_finds_its_own_answers(layout: str) -> None:
    engine = rig.engine("llama", kv_layout=layout)
    prompt = tuple(range(10, 27))
    said = rig.run(engine, [rig.ask(engine, "lora", prompt, max_new_tokens=16)])[0]
    longer = (*prompt, *said.ids, 7, 8)
    assert ends(engine, [("lora", longer)], "llama") == [32]
    engine.close()


@pytest.mark.parametrize("layout", ["slots", "pages"])
def test_what_stands_before_an_invocation_is_the_bases(layout: str) -> None:
    """An aLoRA's row finds the base's blocks up to its invocation, and the base finds its."""
    engine = rig.engine("llama", ("alora", "lora"), kv_layout=layout)
    invoked = (*SYSTEM, 9, *range(60, 80))  # the last 9 calls it
    ends(engine, [(None, (*SYSTEM, 50))], "llama")
    assert ends(engine, [("alora", invoked)], "llama") == [32]
    assert ends(engine, [("alora", (*invoked, 5))], "llama") == [48]
    assert ends(engine, [(None, invoked), ("lora", invoked)], "llama") == [32, 0]
    engine.close()


@pytest.mark.parametrize("layout", ["slots", "pages"])
def test_an_unloaded_adapter_leaves_no_blocks(layout: str) -> None:
    engine = rig.engine("llama", kv_layout=layout)
    ends(engine, [("lora", (*SYSTEM, 50)), (None, (*SYSTEM, 50))], "llama")
    spec = engine.pool.store.resolve("lora")
    engine.call("unload", spec).result()
    assert ends(engine, [("lora", (*SYSTEM, 51)), (None, (*SYSTEM, 51))], "llama") == [0, 32]
    engine.close()


def test_little_room_keeps_the_newest_and_stays_right() -> None:
    engine = rig.engine("llama", prefix_cache_bytes=5 * 16 * 2 * 2 * 8 * 2 * 4)  # five blocks
    prompts = [tuple((i * 7 + j) % 90 + 3 for j in range(40)) for i in range(6)]
    ends(engine, [("lora", p) for p in prompts], "llama")
    for prompt in reversed(prompts):
        ends(engine, [("lora", prompt)], "llama")
    assert len(list(engine.kv.blocks.cells)) == 5
    engine.close()


def test_preempted_rows_find_their_own_blocks() -> None:
    per_token = 2 * 2 * (2 * 8) * 4
    engine = rig.engine("llama", kv_layout="pages", page_tokens=4, kv_bytes=40 * per_token, max_model_len=32)
    asked = [(name, rig.PROMPTS[i % 2]) for i, name in enumerate([None, "lora", "lora", None, "dora", "ia3"])]
    ends(engine, asked, "llama")
    assert engine.kv.used == 0
    engine.close()


@pytest.mark.parametrize("setting", [{"prefix_cache_bytes": 0}, {"prefix_cache_bytes": 0, "kv_layout": "pages"}])
def test_it_can_be_turned_off(setting: dict[str, object]) -> None:
    engine = rig.engine("llama", **setting)
    for _ in range(2):
        assert ends(engine, [("lora", (*SYSTEM, 50))], "llama") == [0]
    engine.close()


def test_keys_that_depend_on_the_rows_length_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    make = zoo.CONFIGS["llama"]
    monkeypatch.setitem(zoo.CONFIGS, "scaled", lambda: make().__class__(**{**zoo.COMMON, "rope_parameters": rope}))
    engine = rig.engine("scaled", ())
    assert engine.kv.blocks is None
    engine.close()


def test_known_tokens_cost_no_time_in_the_budget() -> None:
    """A row whose prompt is known takes its one step beside a full budget of others."""
    engine = rig.engine("llama", max_step_tokens=48)
    ends(engine, [(None, (*SYSTEM, 50))], "llama")
    before = engine.steps
    rig.run(engine, [rig.ask(engine, None, (*SYSTEM, 50 + i), max_new_tokens=1) for i in range(5)])
    assert engine.steps - before == 1
    engine.close()
