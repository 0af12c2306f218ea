"""The kinds beyond PEFT, in one batch with PEFT's own and the base; merged, scaled and composed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import beyond
import rig
import zoo

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(architecture, an engine over every kind beyond PEFT that fits it, and two of PEFT's)."""
    arch, root = request.param, tmp_path_factory.mktemp("beyond")
    for name in ("lora", "ia3"):
        shutil.copytree(rig.saved(arch, name), root / name)
    for kind, case in beyond.KINDS.items():
        if arch in case.archs:
            case.save(arch, root / kind)
    engine = beyond.engine(arch, root, max_step_tokens=24)
    yield arch, engine
    engine.close()


def kinds(arch: str) -> list[str]:
    return [kind for kind, case in beyond.KINDS.items() if arch in case.archs]


def test_all_in_one_batch_with_lora_ia3_and_the_base(served) -> None:
    arch, engine = served
    digest = engine.model.digest()
    names: list[str | None] = [None, "lora", *kinds(arch), "ia3", None, *kinds(arch)]
    asked = [(name, rig.PROMPTS[i % len(rig.PROMPTS)]) for i, name in enumerate(names)]
    requests = [beyond.ask(engine, {name: 1.0} if name else {}, prompt) for name, prompt in asked]
    for (name, prompt), answer in zip(asked, rig.run(engine, requests, stagger=1), strict=True):
        case = beyond.KINDS.get(name or "")
        beyond.hold(answer, case.judge(arch, prompt) if case else rig.peft_alone(arch, name, prompt))
    assert engine.model.digest() == digest


def test_merged_is_unmerged_or_refused(served) -> None:
    arch, engine = served
    for kind in kinds(arch):
        (answer,) = rig.run(engine, [beyond.ask(engine, {kind: 1.0}, rig.PROMPTS[1], mode="merged")])
        if beyond.KINDS[kind].folds:
            beyond.hold(answer, beyond.KINDS[kind].judge(arch, rig.PROMPTS[1]))
        else:
            assert "has no merged form" in str(answer.end.error)


def test_a_bottleneck_is_weighted_and_composed_at_each_module(served) -> None:
    """y = y₀ + w (y' − y₀), the LoRA beside it at the same Linears."""
    arch, engine = served
    if arch == "qwen2":  # AdapterHub's library has no such base
        return
    lora = zoo.load_peft(zoo.tiny_base(arch), rig.saved(arch, "lora"))
    judges = {
        (("ADAPTERHUB", 0.5),): beyond.with_houlsby(zoo.tiny_base(arch), arch, 0.5),
        (("ADAPTERHUB", 0.7), ("lora", 1.0)): beyond.with_houlsby(lora, arch, 0.7),
    }
    requests = [beyond.ask(engine, dict(members), rig.PROMPTS[0]) for members in judges]
    for model, answer in zip(judges.values(), rig.run(engine, requests), strict=True):
        beyond.hold(answer, beyond.alone(model, rig.PROMPTS[0]))


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("adapterhub-*.safetensors")), ids=lambda file: file.stem)
def test_what_adapterhub_saved_answers_as_its_library_does(file: Path, tmp_path: Path) -> None:
    """Every method and option that is served, all in one batch."""
    arch, wants = file.stem.split("-")[1], beyond.golden(file, tmp_path)
    layout = "pages" if file.stem in ("adapterhub-llama", "adapterhub-llama-lora") else "slots"
    engine = beyond.engine(arch, tmp_path, max_step_tokens=16, kv_layout=layout)
    asked = [beyond.ask(engine, {case: 1.0}, (5, 9, 13, 40, 7), max_new_tokens=6) for case in wants]
    for (case, want), answer in zip(wants.items(), rig.run(engine, asked, stagger=1), strict=True):
        if arch == "mistral" and case == "mam":
            assert "this base's windows would slide past it" in str(answer.end.error)
        else:
            beyond.hold(answer, want)
    engine.close()
