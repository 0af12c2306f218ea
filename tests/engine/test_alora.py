"""aLoRA: the base up to the invocation's last occurrence in the prompt, the adapter from there on, as PEFT alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.core import Request
from adapter_server.engine.engine import Engine
from adapter_server.errors import NotMergeable
from adapter_server.registry.store import Store

CALL = [60, 61]
NAMES = ("a", "b", "plain", None)
PROMPTS = {
    "in the middle": (5, 9, 13, 60, 61, 7, 8),
    "at once": (60, 61, 5, 9),
    "at the end": (*range(20, 33), 60, 61),
    "twice, and the last counts": (60, 61, 5, 9, 60, 61, 7, 8, 9),
    "overlapping its beginning": (5, 60, 60, 61, 7),
    "never": (5, 9, 13, 40, 61, 60),
    "cut off": (5, 9, 13, 60),
    "far in": (*range(3, 43), 60, 61, *range(3, 23)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two aLoRAs with invocations of their own, one of which adapts the head too, and a plain LoRA."""
    root, base = tmp_path_factory.mktemp("alora"), lambda: zoo.tiny_base("llama")
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    make = functools.partial(LoraConfig, r=4, lora_alpha=8, target_modules=linears, task_type="CAUSAL_LM")
    zoo.save_adapter(base, make(alora_invocation_tokens=CALL), root / "a", seed=1)
    head = make(alora_invocation_tokens=[9], target_modules=[*linears, "lm_head"])
    zoo.save_adapter(base, head, root / "b", seed=2)
    zoo.save_adapter(base, make(), root / "plain", seed=3)
    return root


def engine(folder: Path, **settings: object) -> Engine:
    config = EngineConfig(**{"kv_bytes": 16 << 20, "max_rows": 64, **settings})  # type: ignore[arg-type]
    return Engine(zoo.tiny_base("llama"), config, Store(folder, settle_s=0))


def alone(folder: Path, name: str | None) -> torch.nn.Module:
    base = zoo.tiny_base("llama")
    base.generation_config.eos_token_id = None
    return base if name is None else zoo.load_peft(base, folder / name)


def generated(model: torch.nn.Module, prompt: Sequence[int]) -> tuple[list[int], Tensor]:
    with torch.inference_mode(), zoo.quiet():
        out = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=rig.NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.stack(out.logits, 1)[0]
    return logits.argmax(-1).tolist(), logits.log_softmax(-1)


def hold(folder: Path, engine: Engine, stagger: int = 1) -> None:
    digest = engine.model.digest()
    asked = list(itertools.product(NAMES, PROMPTS.values()))
    answers = rig.run(engine, [rig.ask(engine, name, prompt) for name, prompt in asked], stagger=stagger)
    models = {name: alone(folder, name) for name in NAMES}
    for (name, prompt), answer in zip(asked, answers, strict=True):
        assert answer.end is not None
        assert answer.end.error is None, answer.end.error.__cause__
        ids, logprobs = generated(models[name], prompt)
        assert answer.ids == ids, (name, prompt)
        assert (answer.matrix() - logprobs).abs().max() < 1e-4, (name, prompt)
    assert engine.model.digest() == digest
    engine.close()


@pytest.mark.parametrize("budget", [7, 40, 2048])
def test_acts_from_the_invocation_on_however_the_prompt_is_cut(folder: Path, budget: int) -> None:
    hold(folder, engine(folder, max_step_tokens=budget))


def test_without_a_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_server.engine.native.library", lambda: None)
    hold(folder, engine(folder, max_step_tokens=40))


def test_a_row_that_gives_its_place_back_goes_on_where_it_was(folder: Path) -> None:
    """Computed again, its own tokens are read with its prompt, which alone decides where the adapter begins."""
    per_token = 2 * 2 * (2 * 8) * 4  # layers, K and V, kv_heads x dim, bytes
    served = engine(folder, kv_layout="pages", page_tokens=4, kv_bytes=40 * per_token, max_model_len=32)
    asked = [("a", PROMPTS[which]) for which in ("in the middle", "at once", "never", "twice, and the last counts")]
    answers = rig.run(served, [rig.ask(served, name, prompt) for name, prompt in asked])
    assert served.scheduler.preemptions > 0
    for (name, prompt), answer in zip(asked, answers, strict=True):
        assert answer.ids == generated(alone(folder, name), prompt)[0], prompt
    served.close()


def test_scaled_and_composed_it_still_begins_at_its_invocation(folder: Path) -> None:
    """Without its invocation it is absent from a composition; at weight 0 it changes nothing."""
    served = engine(folder)
    never, there = PROMPTS["never"], PROMPTS["in the middle"]

    def both(prompt: tuple[int, ...], weight: float, id: str) -> Request:
        plain, call = (rig.ask(served, name, prompt, weight=w, id=id) for name, w in (("plain", 1.0), ("a", weight)))
        return Request(id, prompt, plain.sampling, (*plain.members, *call.members), "unmerged")

    composed = [both(never, 1, "x"), both(there, 0, "y"), both(there, 1, "z")]
    asked = [*composed, *(rig.ask(served, "plain", prompt) for prompt in (never, there))]
    absent, zero, full, plain_never, plain_there = rig.run(served, asked)
    assert torch.allclose(absent.matrix(), plain_never.matrix(), atol=1e-5)
    assert torch.allclose(zero.matrix(), plain_there.matrix(), atol=1e-5)
    assert (full.matrix()[0] - plain_there.matrix()[0]).abs().max() > 1e-2
    served.close()


def test_what_is_kept_of_a_prompt_is_for_the_same_beginnings_alone(folder: Path) -> None:
    """The invocation of one of two comes again, behind a beginning that is known: there, it does not act yet."""
    both, start = ("a", "b"), (60, 61, 9, *range(20, 38))
    prompts = [start, (*start, 9, 33), (*start, 60, 61, 9), start]

    def asked(engine: Engine) -> list[Request]:
        members = [rig.ask(engine, name, start).members[0] for name in both]
        requests = [rig.ask(engine, "a", prompt, id=str(i)) for i, prompt in enumerate(prompts)]
        return [dataclasses.replace(request, members=tuple(members)) for request in requests]

    plain, keeping = engine(folder, prefix_cache_bytes=0), engine(folder)
    want = rig.run(plain, asked(plain))
    got = [rig.run(keeping, [request])[0] for request in asked(keeping)]
    for one, other in zip(got, want, strict=True):
        assert one.ids == other.ids
        assert torch.allclose(one.matrix(), other.matrix(), atol=1e-4)
    assert [one.end.cached_tokens for one in got if one.end] == [0, 0, 0, 16]
    plain.close()
    keeping.close()


def test_has_no_merged_form(folder: Path) -> None:
    served = engine(folder)
    (answer,) = rig.run(served, [rig.ask(served, "a", PROMPTS["at once"], mode="merged")])
    assert answer.end is not None
    assert isinstance(answer.end.error, NotMergeable)
    assert "from its invocation on" in answer.end.error.message
    served.close()
