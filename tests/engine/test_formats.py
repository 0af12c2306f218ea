"""Bases in formats that transformers knows and we do not: adapters run beside whatever a Linear computes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.engine.engine import Engine
from adapter_server.engine.model import load
from adapter_server.families.base import linear_params
from adapter_server.families.quantised import dequantised, is_quantised
from adapter_server.registry.store import Store

NAMES = ("lora", "dora", "ia3", "lora_saved", "prefix", "oft", "shira")
CPU = torch.device("cpu")


class PackedLinear(nn.Module):
    """Four bits a weight in rows of integers, as GPTQ and AWQ store them: no `weight`, no parameter, only buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        W = linear.weight.detach()
        scales = W.abs().amax(1, keepdim=True) / 7
        levels = (W / scales).round().clamp(-8, 7).to(torch.int32) + 8
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", sum(levels[:, i::8] << (4 * i) for i in range(8)).to(torch.int64))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def unpacked(self) -> Tensor:
        levels = torch.empty(self.out_features, self.in_features)
        for i in range(8):
            levels[:, i::8] = ((self.qweight >> (4 * i)) & 15) - 8
        return levels * self.scales

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.unpacked(), self.bias)


def packed(model: transformers.PreTrainedModel, plain: bool = False) -> transformers.PreTrainedModel:
    """Every Linear of the layers packed; `plain`: the same numbers in ordinary Linears."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in path:
            parent, name = path.rsplit(".", 1)
            new = PackedLinear(module)
            if plain:
                module.weight.data = new.unpacked()
            else:
                setattr(model.get_submodule(parent), name, new)
    return model


def served(model: transformers.PreTrainedModel) -> Engine:
    model.generation_config.eos_token_id = None
    return Engine(model, EngineConfig(kv_bytes=16 << 20), Store(rig.registry("llama", NAMES), settle_s=0))


def answers(engine: Engine, mode: str = "unmerged", names: tuple[str | None, ...] = (None, *NAMES)) -> list[rig.Answer]:
    requests = [rig.ask(engine, name, rig.PROMPTS[i % 5], mode) for i, name in enumerate(names)]
    found = rig.run(engine, requests)
    assert [a.end.error for a in found] == [None] * len(names)
    return found


def test_packed_linears_are_the_numbers_that_they_stand_for() -> None:
    """Held to PEFT's answers by way of the plain base, which the oracle holds to PEFT."""
    engine, plain = served(packed(zoo.tiny_base("llama"))), served(packed(zoo.tiny_base("llama"), plain=True))
    digest = engine.model.digest()
    for ours, theirs in zip(answers(engine), answers(plain), strict=True):
        assert ours.ids == theirs.ids
        assert (ours.matrix() - theirs.matrix()).abs().max() < 1e-4
    assert engine.model.digest() == digest
    engine.close()
    plain.close()


def test_a_snapshot_over_packed_linears_is_the_unmerged_adapter() -> None:
    engine, names = served(packed(zoo.tiny_base("llama"))), ("lora", "dora", "ia3", "oft", "shira")
    for merged, unmerged in zip(answers(engine, "merged", names), answers(engine, names=names), strict=True):
        assert merged.ids == unmerged.ids
        assert (merged.matrix() - unmerged.matrix()).abs().max() < 1e-4
    engine.close()


@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_is_asked_for_by_unit_vectors(bias: bool) -> None:
    linear = PackedLinear(nn.Linear(40, 24, bias=bias))
    assert is_quantised(linear)
    W, b = linear_params(linear)
    assert torch.allclose(W, linear.unpacked(), atol=1e-6)
    assert (b is not None) == bias
    assert not is_quantised(nn.Linear(4, 4))
    assert not is_quantised(nn.Linear(4, 4).to(torch.bfloat16))


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's own
        yield


def int8() -> object:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def float8() -> object:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("config", [int8, float8], ids=lambda make: make.__name__)
def test_a_checkpoint_of_torchao_is_served_as_it_is(config: Callable[[], object], tmp_path: Path) -> None:
    """Its tensors are classes of the library's: read by asking, left as they are, every kind beside them."""
    pytest.importorskip("torchao")
    zoo.tiny_base("llama").save_pretrained(tmp_path / "plain")
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=transformers.TorchAoConfig(config()), dtype=torch.float32
    )
    quantised.save_pretrained(tmp_path / "checkpoint")
    assert "quantization_config" in json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    base = load(tmp_path / "checkpoint", "float32", CPU)
    linear = base.model.layers[0].self_attn.q_proj
    assert is_quantised(linear)
    plain = load(tmp_path / "plain", "float32", CPU)
    for path, module in plain.named_modules():
        if is_quantised(base.get_submodule(path)):
            module.weight.data = dequantised(base.get_submodule(path))
    ours, theirs = served(base), served(plain)
    digest = ours.model.digest()
    for a, b in zip(answers(ours), answers(theirs), strict=True):
        assert a.ids == b.ids
        assert (a.matrix() - b.matrix()).abs().max() < 1e-4
    assert ours.model.digest() == digest
    ours.close()
    theirs.close()
