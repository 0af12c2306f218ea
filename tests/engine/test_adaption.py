"""Adaption prompts: an attention of their own in the last layers, in the one batch, as PEFT alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import peft
import pytest
import torch
import transformers

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.engine.engine import Engine
from adapter_server.errors import AdapterRefused, NotMergeable
from adapter_server.families import find
from adapter_server.families.facts import describe
from adapter_server.registry.store import Store

NAMES = ("adaption_prompt", "adaption_prompt_top", "lora", "prefix")


@pytest.mark.parametrize("arch", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("budget", [6, 2048])
def test_however_the_prompt_is_cut(arch: str, budget: int) -> None:
    engine = rig.engine(arch, NAMES, max_step_tokens=budget)
    asked = [(name, prompt) for prompt in rig.PROMPTS for name in (*NAMES, None) if name is None or _fits(name, arch)]
    answers = rig.run(engine, [rig.ask(engine, name, prompt) for name, prompt in asked], stagger=1)
    for (name, prompt), answer in zip(asked, answers, strict=True):
        assert answer.end is not None
        assert answer.end.error is None, answer.end.error.__cause__
        ids, logprobs = rig.peft_alone(arch, name, prompt)
        assert tuple(answer.ids) == ids, (name, prompt)
        assert (answer.matrix() - logprobs).abs().max() < 1e-4, (name, prompt)
    engine.close()


def _fits(name: str, arch: str) -> bool:
    return arch in zoo.ADAPTERS[name].archs


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_scale_and_composition_are_of_what_it_adds(arch: str) -> None:
    """At 0 it is the base. Two of them add up, which cannot be told from one whose parts are added."""
    engine = rig.engine(arch, NAMES)
    prompt = (5, 9, 13)
    one, other = (rig.ask(engine, name, prompt, id=name) for name in NAMES[:2])
    both = dataclasses.replace(one, id="both", members=(*one.members, *other.members))
    nothing = rig.ask(engine, NAMES[1], prompt, weight=0.0)
    beside = dataclasses.replace(both, id="beside", members=(*one.members, *nothing.members))
    base, zero, alone, together, still = rig.run(engine, [rig.ask(engine, None, prompt), nothing, one, both, beside])
    assert torch.allclose(zero.matrix(), base.matrix(), atol=1e-5)
    assert torch.allclose(still.matrix(), alone.matrix(), atol=1e-5)
    assert (alone.matrix()[0] - base.matrix()[0]).abs().max() > 1e-2
    assert (together.matrix()[0] - alone.matrix()[0]).abs().max() > 1e-3
    engine.close()


def test_an_output_with_a_bias_has_it_twice_as_in_peft(tmp_path: Path) -> None:
    def base() -> transformers.PreTrainedModel:
        config = transformers.LlamaConfig(**zoo.COMMON, attention_bias=True)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.3)
        model.generation_config.eos_token_id = None
        return model.eval()

    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
    zoo.save_adapter(base, config, tmp_path / "a")
    engine = Engine(base(), EngineConfig(kv_bytes=16 << 20), Store(tmp_path, settle_s=0))
    (answer,) = rig.run(engine, [rig.ask(engine, "a", (5, 9, 13))])
    with torch.inference_mode():
        logits = zoo.load_peft(base(), tmp_path / "a")(input_ids=torch.tensor([(5, 9, 13)])).logits[0, -1]
    assert (answer.matrix()[0] - logits.log_softmax(-1)).abs().max() < 1e-4
    engine.close()


def test_has_no_merged_form() -> None:
    engine = rig.engine("llama", NAMES)
    (answer,) = rig.run(engine, [rig.ask(engine, "adaption_prompt", (5, 6), mode="merged")])
    assert answer.end is not None
    assert isinstance(answer.end.error, NotMergeable)
    assert "an attention of its own is no weight" in answer.end.error.message
    engine.close()


@pytest.mark.parametrize(
    ("arch", "options", "reason"),
    [
        ("qwen2", {}, "are defined for llama, mistral, gpt2, and this base is a qwen2"),
        ("llama", {"adapter_layers": 3}, "'adapter_layers' must be an integer in 1..2"),
        ("llama", {"adapter_layers": 0}, "'adapter_layers' must be an integer in 1..2"),
        ("llama", {"adapter_len": None}, "'adapter_len' must be an integer"),
        ("llama", {"target_modules": "mlp"}, "'target_modules' must be one of"),
        ("llama", {"target_modules": ["self_attn"]}, "'target_modules' must be one of"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(arch: str, options: dict[str, object], reason: str) -> None:
    config = {"peft_type": "ADAPTION_PROMPT", "adapter_len": 4, "adapter_layers": 1, **options}
    with pytest.raises(AdapterRefused, match=reason):
        find("ADAPTION_PROMPT").expected(config, describe(zoo.tiny_base(arch)), frozenset())
