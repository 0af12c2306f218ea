"""PEFT alone is the judge of right: one adapter, batch 1, float32. Everything here is held against it."""

from __future__ import annotations

import pytest
import torch

import rig
import zoo

TOLERANCE = {torch.float32: 1e-4}


def kinds(arch: str) -> tuple[str, ...]:
    return tuple(name for name, case in zoo.ADAPTERS.items() if arch in case.archs)


def foldable(arch: str) -> tuple[str, ...]:
    return tuple(name for name in kinds(arch) if name not in zoo.UNFOLDABLE)


def cases(names: tuple[str, ...]) -> list[tuple[str | None, tuple[int, ...]]]:
    """Every adapter, and the base at both ends, each with a prompt of its own."""
    return [(name, rig.PROMPTS[i % len(rig.PROMPTS)]) for i, name in enumerate([None, *names, None])]


def check(arch: str, name: str | None, prompt: tuple[int, ...], answer: rig.Answer) -> None:
    assert answer.end is not None
    assert answer.end.error is None, (arch, name, answer.end.error)
    ids, logprobs = rig.peft_alone(arch, name, prompt)
    error = (answer.matrix() - logprobs).abs().max().item()
    assert tuple(answer.ids) == ids, (arch, name)
    assert error < TOLERANCE[torch.float32], (arch, name, error)


def hold(arch: str, names: tuple[str, ...], mode: str, stagger: int, **settings: object) -> None:
    """All of these in one engine, each as PEFT alone, and the base as it was."""
    engine = rig.engine(arch, names, **settings)
    digest = engine.model.digest()
    asked = cases(names)
    answers = rig.run(engine, [rig.ask(engine, name, prompt, mode=mode) for name, prompt in asked], stagger=stagger)
    for (name, prompt), answer in zip(asked, answers, strict=True):
        check(arch, name, prompt, answer)
    assert engine.model.digest() == digest
    engine.close()


@pytest.mark.parametrize("arch", zoo.ARCHS)
def test_every_kind_in_one_batch(arch: str) -> None:
    hold(arch, kinds(arch), "unmerged", stagger=1, max_step_tokens=48)


@pytest.mark.parametrize("arch", zoo.ARCHS)
def test_merged_is_unmerged(arch: str) -> None:
    hold(arch, foldable(arch), "merged", stagger=0)


def test_every_kind_in_one_batch_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_server.engine.native.library", lambda: None)
    hold("llama", kinds("llama"), "unmerged", stagger=1, max_step_tokens=48)
