"""What is found by structure; a module that computes something else stays as it is. Kernels are interpreted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rig
import zoo
from adapter_server.engine import forms
from adapter_server.engine.model import Model
from adapter_server.engine.routing import current

pytest.importorskip("adapter_server.engine.kernels", reason="Triton is not installed")
ALL = ["norm", "mlp", "attention", "layer"]
FOUND = {"llama": ALL, "qwen3": ALL, "phi3": ALL, "gemma3": ALL[:3], "gpt2": []}


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "usable", lambda device: True)
    for agrees in ("_low_rank_agrees", "_parts_agree"):  # test_kernels.py and test_parts.py hold them
        monkeypatch.setattr(forms, agrees, lambda *_: True)


@pytest.mark.parametrize("arch", FOUND)
def test_structures_are_found_by_what_they_consist_of(arch: str) -> None:
    """Norms of heads (Qwen3), one Linear for q, k, v (Phi-3), norms about 1 and behind (Gemma 3), nothing (GPT-2)."""
    model = Model(zoo.tiny_base(arch))
    assert list(model.fused) == FOUND[arch]


def logits(model: Model) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model.module(input_ids=torch.tensor([[5, 9, 13, 40]]), use_cache=False).logits
        return out


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_a_forward_outside_any_step_is_the_base(arch: str) -> None:
    """Soft prompts are encoded that way; no sum is left behind."""
    assert torch.allclose(logits(Model(zoo.tiny_base(arch))), logits(Model(zoo.tiny_base(arch), fuse=False)), atol=1e-4)
    assert current() is None


def _doubled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: forward(*args, **kwargs) * 2


@pytest.mark.parametrize(
    ("part", "left"), [("mlp", ["norm", "attention", "layer"]), ("input_layernorm", ["norm", "mlp", "attention"])]
)
def test_what_computes_something_else_stays(part: str, left: list[str]) -> None:
    base = zoo.tiny_base("llama")
    for layer in base.model.layers:
        module: nn.Module = getattr(layer, part)
        module.forward = _doubled(module.forward)  # type: ignore[method-assign]
    other = zoo.tiny_base("llama")
    for layer in other.model.layers:
        getattr(layer, part).forward = _doubled(getattr(layer, part).forward)
    model = Model(base)
    assert list(model.fused) == left
    assert torch.allclose(logits(model), logits(Model(other, fuse=False)), atol=1e-4)


def test_norms_of_adapters_run_in_the_fused_ones() -> None:
    """Trained with IA3, beside a row without adapters."""
    names = ("ia3_saved",)
    engine = rig.engine("llama", names, kv_layout="pages", kernels=True, graphs=False)
    assert "layer" in engine.model.fused
    asked = [rig.ask(engine, name, rig.PROMPTS[0], max_new_tokens=2) for name in (None, "ia3_saved")]
    for name, answer in zip((None, "ia3_saved"), rig.run(engine, asked), strict=True):
        ids, logprobs = rig.peft_alone("llama", name, rig.PROMPTS[0], 2)
        assert tuple(answer.ids) == ids, name
        assert (answer.matrix() - logprobs).abs().max().item() < 1e-4, name
    engine.close()
