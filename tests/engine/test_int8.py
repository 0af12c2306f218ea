"""A base in int8 on the CPU: whole numbers exactly, rows apart, and how far it is from the base in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.engine.engine import Engine
from adapter_server.engine.int8 import MOST, Int8Linear, hold_in_int8
from adapter_server.engine.model import load
from adapter_server.errors import BaseNotSupported
from adapter_server.families.quantised import dequantised, is_quantised
from adapter_server.registry.store import Store

LOSS = 0.3  # of a log-probability; the base is 32 wide, so that a token's step is a coarse one


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_whole_numbers(bias: bool) -> None:
    linear = torch.nn.Linear(40, 24, bias=bias)
    held, x = Int8Linear(linear.weight, linear.bias), torch.randn(2, 3, 40)
    step = x.abs().amax(-1, keepdim=True) / MOST
    whole = (x / step + 0.5).floor().double() @ held.weight.double().T
    want = whole * step * held.scale + (linear.bias if bias else 0)
    assert torch.allclose(held(x), want.float(), atol=1e-5)
    assert (held(x) - linear(x)).abs().max() < 0.02 * linear(x).abs().max()


def test_a_row_does_not_depend_on_the_others() -> None:
    held, x = Int8Linear(torch.randn(48, 64), None), torch.randn(9, 64) * torch.logspace(-3, 3, 9)[:, None]
    for i in range(9):
        assert torch.equal(held(x)[i : i + 1], held(x[i : i + 1]))
    assert torch.equal(held(torch.zeros(2, 64)), torch.zeros(2, 48))


def test_it_is_read_as_a_quantised_linear() -> None:
    held = Int8Linear(torch.randn(24, 40), torch.randn(24))
    assert is_quantised(held)
    assert torch.allclose(dequantised(held), held.weight * held.scale[:, None], atol=1e-5)


def test_adapters_run_beside_it_merged_or_not() -> None:
    names = ("lora", "dora", "ia3", None)
    model = hold_in_int8(zoo.tiny_base("llama"))
    served = Engine(model, EngineConfig(kv_bytes=16 << 20), Store(rig.registry("llama", names[:-1]), settle_s=0))
    digest = served.model.digest()
    for mode in ("unmerged", "merged"):
        for name in names:
            asked = rig.ask(served, name, rig.PROMPTS[0], mode if name else "base", max_new_tokens=1)
            [answer] = rig.run(served, [asked])
            assert answer.end is not None
            assert answer.end.error is None
            _, logprobs = rig.peft_alone("llama", name, rig.PROMPTS[0], 1)
            assert (answer.matrix() - logprobs).abs().max() < LOSS, name
    assert served.model.digest() == digest
    served.close()


def test_the_head_and_the_embedding_stay(tmp_path: Path) -> None:
    zoo.tiny_base("llama").save_pretrained(tmp_path)
    model = load(tmp_path, "float32", torch.device("cpu"), "cpu-int8")
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert {type(m) for n, m in model.named_modules() if n.endswith("_proj")} == {Int8Linear}


def test_another_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseNotSupported, match="is for the CPU"):
        load(tmp_path, "float32", torch.device("cuda"), "cpu-int8")
