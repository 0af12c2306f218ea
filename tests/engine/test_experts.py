"""LoRA on bare parameters (`target_parameters`): experts, routers and matrices, mixed in a batch, as PEFT alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.engine.engine import Engine
from adapter_server.engine.model import Model
from adapter_server.errors import AdapterRefused
from adapter_server.families import find
from adapter_server.families.facts import ModelBase, describe
from adapter_server.families.parameters import ExpertsPatch
from adapter_server.registry.store import Store
from test_bases import base

UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
CASES: dict[str, dict[str, object]] = {
    "both": {"target_parameters": [UP, DOWN]},
    "up": {"target_parameters": [UP], "rank_pattern": {rf".*\.1\..*{UP}": 2}, "alpha_pattern": {UP: 5}},
    "attention_too": {"target_parameters": [DOWN], "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "matrices": {"target_parameters": ["q_proj.weight", "embed_tokens.weight"]},
    "router": {"target_parameters": ["gate.weight", "router.weight", UP]},
}
KINDS = {
    "mixtral": tuple(CASES),
    "qwen3_moe": ("both", "router"),
    "gpt_oss": ("both", "attention_too", "router"),  # stored transposed, with biases
    "deepseek_v3": ("both",),
}


def config(**options: object) -> LoraConfig:
    chosen: dict[str, object] = {"r": 3, "lora_alpha": 6, "target_modules": [], "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**chosen, **options})  # type: ignore[arg-type]


def save(kind: str, root: Path, names: tuple[str, ...]) -> None:
    for seed, name in enumerate(names):
        zoo.save_adapter(lambda: base(kind), config(**CASES[name]), root / name, seed)


def wanted(model: torch.nn.Module, prompt: tuple[int, ...]) -> tuple[list[int], torch.Tensor]:
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


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_and_merged_as_peft_alone(kind: str, tmp_path: Path) -> None:
    names = KINDS[kind]
    save(kind, tmp_path, names)
    engine = Engine(base(kind), EngineConfig(kv_bytes=16 << 20, max_step_tokens=24), Store(tmp_path, settle_s=0))
    digest = engine.model.digest()
    asked = [(name, mode) for mode, name in itertools.product(("unmerged", "merged"), names)] + [(None, "base")]
    prompts = [rig.PROMPTS[i % 5] for i in range(len(asked))]
    requests = [rig.ask(engine, n, prompt, mode=mode) for (n, mode), prompt in zip(asked, prompts, strict=True)]
    answers = rig.run(engine, requests, stagger=1)
    for (name, mode), prompt, answer in zip(asked, prompts, answers, strict=True):
        assert answer.end is not None
        assert answer.end.error is None, (name, mode, answer.end.error.__cause__)
        model = base(kind) if name is None else zoo.load_peft(base(kind), tmp_path / name)
        ids, logprobs = wanted(model, prompt)
        assert answer.ids == ids, (name, mode)
        assert (answer.matrix() - logprobs).abs().max() < 1e-4, (name, mode)
    assert engine.model.digest() == digest
    engine.close()


def test_no_expert_is_copied(tmp_path: Path) -> None:
    save("mixtral", tmp_path, ("both",))
    model = Model(base("mixtral"))
    spec, tensors = zoo.read(tmp_path / "both")
    placed = model.place(find("LORA").load(spec, tensors, model.base))
    assert all(isinstance(patch, ExpertsPatch) for patch in placed.others.values())
    assert placed.bytes == sum(t.nbytes for t in tensors.values())


def test_alone_in_a_step_the_base_is_not_run_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And half of it, or it beside another, is: y₀ + w (y₁ − y₀)."""
    save("mixtral", tmp_path, ("both",))
    engine = Engine(base("mixtral"), EngineConfig(kv_bytes=16 << 20), Store(tmp_path, settle_s=0))
    rig.run(engine, [rig.ask(engine, "both", (5, 6))])
    runs: list[str] = []
    for site in engine.model._sites.values():
        monkeypatch.setattr(site, "base", _noting(runs, site.path, site.base))
    (whole,) = rig.run(engine, [rig.ask(engine, "both", (5, 6))])
    assert runs == []
    zero, plain = rig.run(engine, [rig.ask(engine, "both", (5, 6), weight=0.0), rig.ask(engine, None, (5, 6))])
    assert runs
    assert torch.allclose(zero.matrix(), plain.matrix(), atol=1e-5)
    assert (whole.matrix()[0] - plain.matrix()[0]).abs().max() > 1e-2
    engine.close()


def _noting(runs: list[str], path: str, run: Callable[..., object]) -> Callable[..., object]:
    def noted(*args: object, **kwargs: object) -> object:
        runs.append(path)
        return run(*args, **kwargs)

    return noted


def test_routers_are_mixed_by_their_weights(tmp_path: Path) -> None:
    """Half a router's change is half of its weights' change, since choices have no halves."""
    save("mixtral", tmp_path, ("router",))
    model = base("mixtral")
    engine = Engine(base("mixtral"), EngineConfig(kv_bytes=16 << 20), Store(tmp_path, settle_s=0))
    half, _ = rig.run(engine, [rig.ask(engine, "router", (5, 6, 7), weight=0.5), rig.ask(engine, None, (5, 6))])
    spec, tensors = zoo.read(tmp_path / "router")
    patches = find("LORA").load(spec, tensors, ModelBase(model)).patches
    with torch.no_grad():
        for path, patch in patches.items():
            module = model.get_submodule(path)
            own = dict(module.named_parameters(recurse=False))
            if path.endswith(".gate"):
                own["weight"].lerp_(patch.fold(own)["weight"], 0.5)
            else:
                module.forward = _half(patch, module.forward, module)  # type: ignore[method-assign]
    assert half.ids == wanted(model, (5, 6, 7))[0]
    engine.close()


def _half(
    patch: ExpertsPatch, run: Callable[..., torch.Tensor], module: torch.nn.Module
) -> Callable[..., torch.Tensor]:
    def halved(x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        return (run(x, chosen, shares) + patch.apply(x, module, chosen, shares)) / 2

    return halved


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target_parameters": ["experts.w1"]}, "matches no parameter"),
        ({"target_parameters": UP}, "'target_parameters' must be a list of names"),
        ({"target_parameters": ["input_layernorm.weight"]}, "has 1 dimensions"),
        ({"target_parameters": [UP], "use_dora": True}, "for plain LoRA and rsLoRA alone"),
        ({"target_parameters": [UP], "lora_bias": True}, "for plain LoRA and rsLoRA alone"),
        ({"target_parameters": [UP], "init_lora_weights": "pissa"}, "for plain LoRA and rsLoRA alone"),
        ({"target_parameters": [UP], "alora_invocation_tokens": [5]}, "for plain LoRA and rsLoRA alone"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]}, "both in 'target_modules' and"),
        ({"target_parameters": [UP], "modules_to_save": ["experts"]}, "both in 'target_modules' and"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options: dict[str, object], reason: str) -> None:
    asked = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, **options}
    with pytest.raises(AdapterRefused, match=reason):
        find("LORA").expected(asked, describe(base("mixtral").to("meta")), frozenset())


def test_experts_are_told_by_their_interface() -> None:
    shapes = {kind: describe(base(kind)).modules for kind in ("mixtral", "gpt_oss", "llama")}
    kinds = {kind: {m.kind for p, m in modules.items() if "experts" in p} for kind, modules in shapes.items()}
    assert kinds == {"mixtral": {"experts"}, "gpt_oss": {"experts_transposed"}, "llama": set()}
