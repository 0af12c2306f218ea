"""PEFT alone is the judge of right: one adapter, batch 1, float32. Everything here is held against it."""

from __future__ import annotations

import pytest
import torch

import rig
import zoo

TOLERANCE = {torch.float32: 1e-4}
FOLDABLE = [
    name
    for name in zoo.ADAPTERS
    if name not in ("prefix", "prefix_projected", "prompt", "ptuning", "multitask", "cartridge", "cpt")
]


def cases(arch: str, only: list[str] | None = None) -> list[tuple[str | None, tuple[int, ...]]]:
    """Every adapter that fits, and the base, each with a prompt of its own."""
    fit = [n for n, case in zoo.ADAPTERS.items() if arch in case.archs and (only is None or n in only)]
    return [(name, rig.PROMPTS[i % len(rig.PROMPTS)]) for i, name in enumerate([None, *fit, None])]


def check(arch: str, name: str | None, prompt: tuple[int, ...], answer: rig.Answer) -> None:
    assert answer.end is not None
    assert answer.end.error is None, (arch, name, answer.end.error)
    ids, logprobs = rig.peft_alone(arch, name, prompt)
    error = (answer.matrix() - logprobs).abs().max().item()
    assert tuple(answer.ids) == ids, (arch, name)
    assert error < TOLERANCE[torch.float32], (arch, name, error)


@pytest.mark.parametrize("arch", zoo.ARCHS)
def test_every_kind_in_one_batch(arch: str) -> None:
    engine = rig.engine(arch, max_step_tokens=48)
    digest = engine.model.digest()
    asked = cases(arch)
    answers = rig.run(engine, [rig.ask(engine, name, prompt) for name, prompt in asked], stagger=1)
    for (name, prompt), answer in zip(asked, answers, strict=True):
        check(arch, name, prompt, answer)
    assert engine.model.digest() == digest
    engine.close()


@pytest.mark.parametrize("arch", zoo.ARCHS)
def test_merged_is_unmerged(arch: str) -> None:
    engine = rig.engine(arch)
    digest = engine.model.digest()
    asked = cases(arch, FOLDABLE)
    answers = rig.run(engine, [rig.ask(engine, name, prompt, mode="merged") for name, prompt in asked])
    for (name, prompt), answer in zip(asked, answers, strict=True):
        check(arch, name, prompt, answer)
    assert engine.model.digest() == digest
    engine.close()
