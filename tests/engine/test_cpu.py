"""The kernels in C against their lines of torch, and engines that run with and without them."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import beyond
import rig
from adapter_server.core import Member, Request
from adapter_server.engine import cpu, forms, native, proofs
from adapter_server.engine.engine import Engine
from adapter_server.engine.fused import FusedNorm
from adapter_server.engine.kv import LayerShape, SlotPool
from adapter_server.engine.operands import Form
from adapter_server.engine.routing import Routing, Step

CPU, DTYPE = torch.device("cpu"), torch.float32
FAR = 1e-6  # differences of rounding alone
NAMES = (None, "lora", "velora", "dora", "prefix", "ia3")
FORMS = {
    "plain": Form(0.1),
    "capped": Form(0.1, cap=5.0),
    "window": Form(0.1, window=50),
    "all": Form(0.1, cap=5.0, window=50, sinks=torch.linspace(-1, 1, 8)),
}

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler")


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("n", [5, 64, 1040])
def test_norms(n: int, centred: bool) -> None:
    assert proofs.norm_error(cpu, CPU, DTYPE, n, centred=centred) < FAR


@pytest.mark.parametrize("act", cpu.ACTS)
@pytest.mark.parametrize("n", [5, 64, 1040])
def test_gates(n: int, act: str) -> None:
    assert proofs.gated_error(cpu, CPU, DTYPE, act, n) < FAR


def test_a_gate_of_any_size() -> None:
    """Where e^x over- and underflows, and of what is no number."""
    x = torch.cat([torch.linspace(-120, 120, 24001), torch.tensor([torch.inf, torch.nan])])
    both = torch.cat([x, torch.ones_like(x)])[None]
    got, want = cpu.gated(both, "silu")[0], torch.nn.functional.silu(x)
    assert torch.allclose(got, want, atol=1e-6, rtol=1e-6, equal_nan=True)


def test_an_activation_without_a_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernel for the activation 'relu'"):
        cpu.gated(torch.ones(1, 2), "relu")


@pytest.mark.parametrize(("normed", "centred"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(4, 2, 64), (3, 1, 20), (8, 8, 128)])
def test_rope(shape: tuple[int, int, int], normed: bool, centred: bool) -> None:
    assert proofs.rope_error(cpu, CPU, DTYPE, shape, normed, centred) < FAR


def test_angles_of_another_shape_are_refused() -> None:
    stores, places = torch.zeros(8, 1, 16), torch.arange(2)
    with pytest.raises(ValueError, match="cos and sin of 2 tokens and 16 numbers"):
        cpu.rope_write(torch.zeros(2, 64), torch.ones(2, 8), torch.ones(2, 8), stores, stores, places, 2, 1)


def test_what_is_still_to_be_added() -> None:
    assert proofs.more_error(cpu, CPU, DTYPE) < FAR


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 64, 64), (1, 20, 24), (8, 128, 128)])
def test_attention_over_pages(shape: LayerShape, form: str) -> None:
    assert proofs.attention_error(cpu, FORMS[form], shape, 8, CPU, DTYPE) < FAR
    assert proofs.attention_error(cpu, FORMS[form], shape, 8, CPU, DTYPE, lengths=(70,)) < FAR  # heads apart


def test_a_row_of_attention_is_its_own() -> None:
    draw = torch.Generator().manual_seed(0)
    q, keys, values = (torch.randn(*s, generator=draw) for s in ((4, 3, 16), (300, 2, 16), (300, 2, 16)))
    table, lengths = torch.tensor([[0], [1], [2]], dtype=torch.int32), torch.tensor([100, 7, 63])
    together, alone = torch.empty(3, 4, 16), torch.empty(3, 4, 16)
    cpu.paged_decode(together, q, keys, values, cpu.Rows(table, lengths, torch.arange(3), 100, 100), Form(0.2))
    for i in range(3):
        rows = cpu.Rows(table[i:][:1], lengths[i:][:1], torch.tensor([i]), 100, int(lengths[i]))
        cpu.paged_decode(alone, q, keys, values, rows, Form(0.2))
    assert torch.equal(together, alone)


def test_who_runs_them() -> None:
    assert forms.between(CPU, torch.float32) is cpu
    assert forms.between(CPU, torch.bfloat16) is None
    assert forms.between(CPU, torch.float32, wanted=False) is None
    attending = functools.partial(forms.attending, CPU, torch.float32, [(2, 16, 16)], 4, 16)
    assert attending(slots=True) is cpu
    assert attending(slots=False) is None  # C has no kernel for prompts over pages


def test_attention_that_differs_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    right = cpu.paged_decode

    def off(out: torch.Tensor, *rest: Any) -> None:
        right(out, *rest)
        out += 1

    monkeypatch.setattr(cpu, "paged_decode", off)
    caplog.set_level("WARNING")
    assert forms.attending(CPU, torch.float32, [(2, 16, 16)], 4, 16, slots=True) is None
    assert "is off by" in caplog.text


def test_slots_of_a_device_are_read_by_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "usable", lambda device: True)
    monkeypatch.setattr(forms, "kernels", lambda: cpu)
    assert forms.attending(CPU, torch.float32, [(2, 16, 16)], 4, 16, slots=True) is None


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2"])
def test_engines_with_and_without_are_peft_alone(arch: str, kernels: bool) -> None:
    """Rows of several adapters together, prompts of several lengths."""
    engine = rig.engine(arch, tuple(name for name in NAMES if name), kernels=kernels, fuse=kernels)
    assert isinstance(engine.kv, SlotPool)
    assert (engine.kv.kernels is cpu) == kernels
    assert bool(engine.model.fused) == kernels
    asked = [rig.ask(engine, name, rig.PROMPTS[i % 3]) for i, name in enumerate(NAMES)]
    for i, (name, answer) in enumerate(zip(NAMES, rig.run(engine, asked), strict=True)):
        ids, logprobs = rig.peft_alone(arch, name, rig.PROMPTS[i % 3], rig.NEW)
        assert tuple(answer.ids) == ids, name
        assert (answer.matrix() - logprobs).abs().max().item() < 1e-4, name
    engine.close()


BESIDE = ("ln_tuning", "lora_saved", "trainable_tokens", "lora_embed", "lora")  # norms, embeddings


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether steps ran fused, as they asked."""
    asked: list[bool] = []
    real = Routing.unfused.fget  # type: ignore[attr-defined]

    def noted(routing: Routing) -> bool:
        asked.append(real(routing))
        return asked[-1]

    monkeypatch.setattr(Routing, "unfused", property(noted))
    return asked


def test_norms_and_embeddings_of_adapters_leave_the_batch_fused(unfused: list[bool]) -> None:
    """A norm is linear in its weight: those of several adapters on a token add up as the engine without them says."""
    engine, plain = (rig.engine("llama", BESIDE, kernels=kernels, fuse=kernels) for kernels in (True, False))
    asked = [rig.ask(engine, name, rig.PROMPTS[i % 3]) for i, name in enumerate((None, *BESIDE))]
    for i, (name, answer) in enumerate(zip((None, *BESIDE), rig.run(engine, asked, stagger=1), strict=True)):
        ids, logprobs = rig.peft_alone("llama", name, rig.PROMPTS[i % 3], rig.NEW)
        assert tuple(answer.ids) == ids, name
        assert (answer.matrix() - logprobs).abs().max().item() < 1e-4, name
    assert unfused
    assert not any(unfused)
    [got], [want] = (rig.run(each, [_both(each)]) for each in (engine, plain))
    assert got.ids == want.ids
    assert (got.matrix() - want.matrix()).abs().max().item() < 1e-4
    assert not any(unfused)


def _both(engine: Engine) -> Request:
    one, other = (engine.pool.store.resolve(name) for name in ("ln_tuning", "lora_saved"))
    return dataclasses.replace(
        rig.ask(engine, "ln_tuning", rig.PROMPTS[0]), members=(Member(one, 0.5), Member(other, 0.7))
    )


def test_networks_behind_blocks_leave_the_batch_fused(unfused: list[bool], tmp_path: Path) -> None:
    case = beyond.KINDS["ADAPTERHUB"]
    case.save("llama", tmp_path / "hub")
    engine = beyond.engine("llama", tmp_path)
    assert "layer" in engine.model.fused
    [answer] = rig.run(engine, [beyond.ask(engine, {"hub": 1.0}, rig.PROMPTS[0])])
    beyond.hold(answer, case.judge("llama", rig.PROMPTS[0]))
    assert unfused
    assert not any(unfused)


def test_a_stream_is_noted_for_who_reads_it_alone(tmp_path: Path) -> None:
    case = beyond.KINDS["ADAPTERHUB"]
    case.save("llama", tmp_path / "hub")
    shutil.copytree(rig.saved("llama", "lora"), tmp_path / "lora")
    engine, noted = beyond.engine("llama", tmp_path), []
    real = engine.model.forward

    def forward(step: Step, *rest: Any) -> torch.Tensor:
        out = real(step, *rest)
        noted.append(len(step.streams))
        return out

    engine.model.forward = forward  # type: ignore[method-assign]
    for name, layers in (("lora", 0), ("hub", 2)):
        noted.clear()
        rig.run(engine, [beyond.ask(engine, {name: 1.0}, rig.PROMPTS[0], max_new_tokens=2)])
        assert set(noted) == {2 * layers}
    engine.close()


def test_norms_of_a_mixed_step_are_kept_by_adapter_not_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routings are kept, and have thousands of tokens."""
    kept: list[torch.Tensor] = []
    real = FusedNorm._mixed

    def noted(norm: FusedNorm, routing: Routing) -> torch.Tensor | None:
        found = real(norm, routing)
        kept.extend([] if found is None else [found])
        return found

    monkeypatch.setattr(FusedNorm, "_mixed", noted)
    engine = rig.engine("llama", ("ln_tuning",))
    rig.run(engine, [rig.ask(engine, name, rig.PROMPTS[3], max_new_tokens=2) for name in (None, "ln_tuning")])
    assert kept
    assert max(len(weights) for weights in kept) <= 2
    engine.close()
