"""The dense lane: bases of other attention, rows of all kinds at once, each as PEFT alone."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.engine.dense import TESTED
from adapter_server.engine.engine import Engine
from adapter_server.registry.store import Store

TYPES: dict[str, tuple[str, dict[str, object]]] = {
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "falcon-alibi": ("falcon", {"alibi": True, "multi_query": False}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 256}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
    "codegen": ("codegen", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 256}),
    "xglm": ("xglm", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}),
}


def base(case: str) -> transformers.PreTrainedModel:
    kind, own = TYPES[case]
    common = {k: v for k, v in zoo.COMMON.items() if k.endswith(("_id", "vocab_size"))}
    if kind == "falcon":
        common |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model(kind, **{**common, **own})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def adapters(model: torch.nn.Module) -> dict[str, PeftConfig]:
    linears = [p for p, m in model.named_modules() if isinstance(m, torch.nn.Linear) and p != "lm_head"]
    scaled = [p for p in linears if ".0." in p]
    return {
        "lora": LoraConfig(r=4, target_modules=linears, task_type="CAUSAL_LM"),
        "dora": LoraConfig(r=3, use_dora=True, target_modules=linears, task_type="CAUSAL_LM"),
        "ia3": IA3Config(target_modules=scaled, feedforward_modules=scaled[-1:], task_type="CAUSAL_LM"),
        "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", **heads(model)),
        "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", **{**heads(model), "token_dim": 32}),
    }


def heads(model: torch.nn.Module) -> dict[str, int]:
    """What PEFT does not find in every config: how many keys and values a token has."""
    with torch.inference_mode():
        layers = model(input_ids=torch.tensor([[1, 2]]), use_cache=True).past_key_values.layers
    _, count, _, dim = layers[0].keys.shape
    return {"num_layers": len(layers), "num_attention_heads": count, "token_dim": count * dim}


def test_every_tested_type_is_tested() -> None:
    assert {kind for kind, _ in TYPES.values()} == set(TESTED)


@pytest.mark.parametrize("case", TYPES)
def test_tokens_are_the_bases_and_pefts(case: str, tmp_path: Path) -> None:
    for seed, (name, config) in enumerate(adapters(base(case)).items()):
        zoo.save_adapter(functools.partial(base, case), config, tmp_path / name, seed)
    engine = Engine(base(case), EngineConfig(kv_bytes=16 << 20, max_step_tokens=20), Store(tmp_path, settle_s=0))
    assert engine.info.lane == "dense"
    names = [None, "lora", "dora", "ia3", "prefix", "prompt", None]
    cases = [(name, rig.PROMPTS[i % 5]) for i, name in enumerate(names)]
    asked = [rig.ask(engine, name, prompt, logprobs=0, prompt_logprobs=1) for name, prompt in cases]
    answers = rig.run(engine, asked, stagger=1)
    for (name, prompt), answer in zip(cases, answers, strict=True):
        assert answer.end is not None
        assert answer.end.error is None, (name, answer.end.error.__cause__)
        ids, rated = alone(case, tmp_path, name, prompt)
        assert tuple(answer.ids) == ids, (name, prompt)
        assert [own for own, _ in answer.prompt] == pytest.approx(rated, abs=1e-4), (name, prompt)
    engine.close()


def alone(case: str, root: Path, name: str | None, prompt: tuple[int, ...]) -> tuple[tuple[int, ...], list[float]]:
    """The greedy tokens, and the logprobs of the prompt's own from its second."""
    model = base(case) if name is None else zoo.load_peft(base(case), root / name)
    asked = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
    with torch.inference_mode(), zoo.quiet():
        out = model.generate(**asked, max_new_tokens=rig.NEW, do_sample=False)
        logprobs = model(**asked).logits[0, -len(prompt) : -1].log_softmax(-1)
    rated = [row[id].item() for row, id in zip(logprobs, prompt[1:], strict=True)]
    return tuple(out[0, len(prompt) :].tolist()), rated
