"""The kinds beyond PEFT, in one batch with PEFT's own and the base; merged, scaled and composed."""

from __future__ import annotations

import shutil

import pytest

import beyond
import rig

CASES = [(arch, kind) for kind, case in beyond.KINDS.items() for arch in case.archs]


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
    names = [None, "lora", *kinds(arch), "ia3", None, *kinds(arch)]
    asked = [(name, rig.PROMPTS[i % len(rig.PROMPTS)]) for i, name in enumerate(names)]
    requests = [beyond.ask(engine, {name: 1.0} if name else {}, prompt) for name, prompt in asked]
    for (name, prompt), answer in zip(asked, rig.run(engine, requests, stagger=1), strict=True):
        case = beyond.KINDS.get(name)
        beyond.hold(answer, beyond.alone(case.changed(arch), prompt) if case else rig.peft_alone(arch, name, prompt))
    assert engine.model.digest() == digest


def test_merged_is_unmerged_or_refused(served) -> None:
    arch, engine = served
    for kind in kinds(arch):
        (answer,) = rig.run(engine, [beyond.ask(engine, {kind: 1.0}, rig.PROMPTS[1], mode="merged")])
        if beyond.KINDS[kind].folds:
            beyond.hold(answer, beyond.alone(beyond.KINDS[kind].changed(arch), rig.PROMPTS[1]))
        else:
            assert "has no merged form" in str(answer.end.error)
