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


# The prompt's own tokens

PROMPT = rig.PROMPTS[1]
LONG = tuple(5 + (7 * i) % 80 for i in range(41))


def rated_alone(arch: str, name: str | None, prompt: tuple[int, ...]) -> torch.Tensor:
    """PEFT with this one adapter: the logprobs [prompt − 1, vocab] after each token but the last."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        logits = rig.peft_model(arch, name)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    return logits[-len(prompt) : -1].float().log_softmax(-1)


def check_rated(arch: str, name: str | None, prompt: tuple[int, ...], answer: rig.Answer) -> None:
    check(arch, name, prompt, answer)
    want = rated_alone(arch, name, prompt)
    assert len(answer.prompt) == len(prompt) - 1
    for (own, top), id, logprobs in zip(answer.prompt, prompt[1:], want, strict=True):
        assert abs(own - logprobs[id].item()) < TOLERANCE[torch.float32], name
        assert [i for i, _ in top] == logprobs.topk(3).indices.tolist(), name
        assert (torch.tensor([v for _, v in top]) - logprobs.topk(3).values).abs().max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("arch", "names"), [("llama", rig.COMMON), ("gpt2", ("lora", "ia3"))])
def test_a_prompts_own_tokens_are_rated_as_by_peft(arch: str, names: tuple[str, ...]) -> None:
    """In chunks, among rows that ask for nothing, and again once blocks of the prompt are known."""
    engine = rig.engine(arch, names, max_step_tokens=29)
    cases = [(name, LONG if i % 2 else PROMPT) for i, name in enumerate([None, *names])]
    for _ in range(2):
        asked = [rig.ask(engine, name, prompt, prompt_logprobs=3) for name, prompt in cases]
        plain = [rig.ask(engine, name, prompt) for name, prompt in cases]
        mixed = [request for pair in zip(asked, plain, strict=True) for request in pair]
        answers = rig.run(engine, mixed, stagger=1)
        for (name, prompt), rated, other in zip(cases, answers[::2], answers[1::2], strict=True):
            check_rated(arch, name, prompt, rated)
            check(arch, name, prompt, other)
            assert other.prompt == ()
    engine.close()


def test_preemption_rates_each_token_once() -> None:
    per_token = 2 * 2 * (2 * 8) * 4  # layers, K and V, kv_heads x dim, bytes
    engine = rig.engine("llama", kv_layout="pages", page_tokens=4, kv_bytes=88 * per_token, max_model_len=64)
    names = [None, "lora", "dora", "prefix", "ia3"]
    asked = [rig.ask(engine, name, LONG, prompt_logprobs=3) for name in names]
    for name, answer in zip(names, rig.run(engine, asked, stagger=1), strict=True):
        check_rated("llama", name, LONG, answer)
    assert engine.scheduler.preemptions > 0
    engine.close()


def test_a_prompt_of_one_token_has_nothing_to_rate() -> None:
    engine = rig.engine("llama", ("lora",))
    [answer] = rig.run(engine, [rig.ask(engine, "lora", (50,), prompt_logprobs=3)])
    assert (answer.prompt, len(answer.ids)) == ((), rig.NEW)
    engine.close()
