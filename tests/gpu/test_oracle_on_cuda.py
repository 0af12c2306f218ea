"""The oracle's tests on the device: every kind in one batch over pages, with the kernels and without them."""

from __future__ import annotations

import logging

import pytest
import torch

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.engine.engine import Engine
from adapter_server.engine.grouped import Grouped
from adapter_server.engine.kv import PagePool
from adapter_server.registry.store import Store
from captured import uncaptured
from test_dtypes import NAMES, TOLERANCE, alone, answers
from test_oracle import cases, check, foldable, kinds


def engine(arch: str, names: tuple[str, ...], device: torch.device, dtype: torch.dtype, **settings: object) -> Engine:
    config = EngineConfig(**{"kv_bytes": 16 << 20, "max_rows": 64, **settings})  # type: ignore[arg-type]
    base = zoo.tiny_base(arch).to(device, dtype)
    return Engine(base, config, Store(rig.registry(arch, names), settle_s=0))


@pytest.mark.parametrize("with_kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("arch", zoo.ARCHS)
def test_every_kind_in_one_batch(arch: str, with_kernels: bool, device: torch.device) -> None:
    served = engine(arch, kinds(arch), device, torch.float32, kernels=with_kernels, max_step_tokens=48)
    assert isinstance(served.model.lowrank, Grouped) == with_kernels
    assert isinstance(served.kv, PagePool)
    assert (served.kv.kernels is not None) == with_kernels
    digest, asked = served.model.digest(), cases(kinds(arch))
    found = rig.run(served, [rig.ask(served, name, prompt) for name, prompt in asked], stagger=1, timeout_s=240)
    for (name, prompt), answer in zip(asked, found, strict=True):
        check(arch, name, prompt, answer)
    assert served.model.digest() == digest
    served.close()


def test_merged_is_unmerged(device: torch.device) -> None:
    names = foldable("llama")
    served = engine("llama", names, device, torch.float32)
    asked = cases(names)
    found = rig.run(served, [rig.ask(served, name, prompt, mode="merged") for name, prompt in asked], timeout_s=240)
    for (name, prompt), answer in zip(asked, found, strict=True):
        check("llama", name, prompt, answer)
    served.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("held", ["float32", "base"])
def test_half_a_base(dtype: torch.dtype, held: str, device: torch.device) -> None:
    served, names = engine("llama", NAMES, device, dtype, adapter_dtype=held), (None, *NAMES)
    prompts = [rig.PROMPTS[i % 2] for i in range(len(names))]
    for name, prompt, ours in zip(names, prompts, answers(served, names), strict=True):
        theirs = alone(name, dtype, prompt, autocast=held == "float32")
        assert (ours - theirs).abs().max().item() < TOLERANCE[dtype], name
    served.close()


def test_no_kernel_is_left_out_on_this_device(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            engine("gemma2", (), device, dtype).close()
    assert not [record.getMessage() for record in caplog.records]


PARTS = (
    *("ia3", "ia3_saved", "lora_saved", "lora_embed", "lora_tokens_head", "ln_tuning"),
    *("road", "oft", "boft", "fourierft", "waveft", "shira", "randlora"),
)


def test_every_kind_in_captured_steps(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What adapters do beyond low rank and vectors, by kernels in graphs: PEFT's tokens, no step without a graph."""
    served = engine("llama", PARTS, device, torch.float32)
    rig.run(served, [rig.ask(served, name, (5,), max_new_tokens=1, logprobs=0) for name in PARTS], timeout_s=120)
    without = uncaptured(served, monkeypatch)
    asked = [(name, prompt) for name in (None, *PARTS) for prompt in rig.PROMPTS[:3]]
    requests = [rig.ask(served, name, prompt, logprobs=0) for name, prompt in asked]
    for (name, prompt), answer in zip(asked, rig.run(served, requests, stagger=1, timeout_s=120), strict=True):
        assert tuple(answer.ids) == rig.peft_alone("llama", name, prompt)[0], name
    assert without == []
    served.close()


LOW_RANK = ("lora", "rslora", "velora", "dora")  # what a captured step holds


def test_captured_steps_are_those_launched_one_by_one(device: torch.device) -> None:
    """Graphs, fused modules and kernels on and off, every mix of them in float32: the same tokens as PEFT alone."""
    asked = [(name, prompt) for name in (None, *LOW_RANK) for prompt in rig.PROMPTS[:3]]
    for graphs, fuse in ((True, True), (True, False), (False, True), (False, False)):
        served = engine("llama", LOW_RANK, device, torch.float32, graphs=graphs, fuse=fuse)
        requests = [rig.ask(served, name, prompt, logprobs=0) for name, prompt in asked]
        for (name, prompt), answer in zip(asked, rig.run(served, requests, timeout_s=120), strict=True):
            assert tuple(answer.ids) == rig.peft_alone("llama", name, prompt)[0], (name, graphs, fuse)
        assert (served.graphs is not None and bool(served.graphs.captured)) == graphs
        assert bool(served.model.fused) == fuse
        served.close()


def test_adapters_that_come_and_go_leave_captured_steps_right(device: torch.device) -> None:
    """Memory that a graph knows by address alone is not given to others: loads between steps would overwrite it."""
    served = engine("llama", LOW_RANK, device, torch.float32, adapter_bytes=1 << 18, host_bytes=0)
    for turn in range(40):
        name = LOW_RANK[turn % len(LOW_RANK)]
        torch.full((1 << 16,), torch.nan, device=device)  # what was freed is somebody else's now
        [answer] = rig.run(served, [rig.ask(served, name, rig.PROMPTS[0], logprobs=0)], timeout_s=60)
        assert tuple(answer.ids) == rig.peft_alone("llama", name, rig.PROMPTS[0])[0], (turn, name)
    served.close()
