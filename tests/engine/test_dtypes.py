"""Bases in fewer bits than float32: rounding as PEFT rounds, and the tolerance by dtype."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.engine.added import Native
from adapter_server.engine.engine import Engine
from adapter_server.registry.store import Store

TOLERANCE = {torch.float16: 0.025, torch.bfloat16: 0.2}  # of a log-probability over 97 tokens
KINDS = (
    *("lora", "dora", "rslora", "ia3", "ia3_saved", "lora_saved", "lora_embed", "lora_bias_all", "prefix", "prompt"),
    *("oft", "boft", "road", "lokr", "loha", "c3a", "fourierft", "shira", "vera", "adalora", "hra", "miss"),
)
NAMES = tuple(name for name in KINDS if name in zoo.ADAPTERS and "llama" in zoo.ADAPTERS[name].archs)
HALVES = [torch.bfloat16, torch.float16]


def engine(dtype: torch.dtype, **settings: object) -> Engine:
    config = EngineConfig(**{"kv_bytes": 16 << 20, "max_rows": 64, **settings})  # type: ignore[arg-type]
    return Engine(zoo.tiny_base("llama").to(dtype), config, Store(rig.registry("llama", NAMES), settle_s=0))


@functools.cache
def alone(name: str | None, dtype: torch.dtype, prompt: tuple[int, ...], autocast: bool = True) -> Tensor:
    """PEFT's log-probabilities of the token after the prompt [vocab]."""
    base = zoo.tiny_base("llama").to(dtype)
    model = base if name is None else zoo.load_peft(base, rig.saved("llama", name), autocast_adapter_dtype=autocast)
    with torch.inference_mode(), zoo.quiet():
        logits = model(input_ids=torch.tensor([prompt])).logits
    return logits[0, -1].float().log_softmax(-1)


def answers(served: Engine, names: tuple[str | None, ...], mode: str = "unmerged") -> list[Tensor]:
    prompts = [rig.PROMPTS[i % 2] for i in range(len(names))]
    asked = [rig.ask(served, n, p, mode, max_new_tokens=1) for n, p in zip(names, prompts, strict=True)]
    found = rig.run(served, asked)
    assert [a.end.error for a in found] == [None] * len(names)
    return [a.matrix()[0] for a in found]


def off(ours: list[Tensor], names: tuple[str | None, ...], dtype: torch.dtype, **how: bool) -> dict[str | None, float]:
    """How far each answer is from PEFT's in the same dtype."""
    prompts = [rig.PROMPTS[i % 2] for i in range(len(names))]
    theirs = [alone(n, dtype, p, **how) for n, p in zip(names, prompts, strict=True)]
    return {n: (a - b).abs().max().item() for n, a, b in zip(names, ours, theirs, strict=True)}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_form_in_one_batch_over_half_a_base(dtype: torch.dtype) -> None:
    served, names = engine(dtype), (None, *NAMES)
    digest = served.model.digest()
    far = off(answers(served, names), names, dtype)
    assert max(far.values()) < TOLERANCE[dtype], far
    assert served.model.digest() == digest
    served.close()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_adapters_are_as_near_to_the_truth_as_pefts(dtype: torch.dtype) -> None:
    """Float32 is the truth. Rounded as PEFT rounds, we are no further from it than PEFT is, on average."""
    served = engine(dtype)
    names: tuple[str | None, ...] = tuple(n for n in NAMES if n not in ("prefix", "prompt"))
    ours = answers(served, names)
    prompts = [rig.PROMPTS[i % 2] for i in range(len(names))]
    truth = [alone(n, torch.float32, p) for n, p in zip(names, prompts, strict=True)]
    theirs = [alone(n, dtype, p) for n, p in zip(names, prompts, strict=True)]
    mine = sum((a - t).abs().mean().item() for a, t in zip(ours, truth, strict=True))
    pefts = sum((a - t).abs().mean().item() for a, t in zip(theirs, truth, strict=True))
    assert mine < 1.25 * pefts
    served.close()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_an_embedding_that_has_a_step_to_itself_stays_in_the_bases_format(dtype: torch.dtype) -> None:
    served = engine(dtype)
    [ours] = answers(served, ("lora_embed",))
    assert (ours - alone("lora_embed", dtype, rig.PROMPTS[0])).abs().max().item() < TOLERANCE[dtype]
    served.close()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_adapters_in_the_bases_own_dtype(dtype: torch.dtype) -> None:
    """`--adapter-dtype base`: half the bytes; PEFT with `autocast_adapter_dtype=False` is the judge."""
    names: tuple[str | None, ...] = ("lora", "rslora", "ia3", "fourierft", "c3a", None)
    whole, half = engine(dtype), engine(dtype, adapter_dtype="base")
    far = off(answers(half, names), names, dtype, autocast=False)
    assert max(far.values()) < TOLERANCE[dtype], far
    answers(whole, names)
    sizes = [{r.name: r.bytes for r in served.stats().residents} for served in (whole, half)]
    assert sizes[0]["lora"] == 2 * sizes[1]["lora"]
    whole.close()
    half.close()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_snapshot_is_rounded_once(dtype: torch.dtype) -> None:
    """Merged weights stay in the base's dtype, folded in float32: near the float32 truth."""
    served, names = engine(dtype), ("lora", "dora", "oft")
    for name, i, ours in zip(names, range(3), answers(served, names, "merged"), strict=True):
        assert (ours - alone(name, torch.float32, rig.PROMPTS[i % 2])).abs().max() < TOLERANCE[dtype]
    held = [h.placed for h in served.pool.holdings.values() if h.merged and h.placed]
    assert {g.product.weight.dtype for p in held for g in p.groups.values() if g.product} == {dtype}
    served.close()


@pytest.mark.parametrize("kernels", [True, False])
def test_adapters_filed_in_16_bits_are_pefts_over_a_base_in_float32(kernels: bool, tmp_path: Path) -> None:
    """In one batch with others, merged and not; where kernels read them as they are, they take half the memory."""
    dtypes = {"wide": torch.float32, "brain": torch.bfloat16, "half": torch.float16}
    for name, dtype in dtypes.items():
        shutil.copytree(rig.saved("llama", "lora"), tmp_path / name)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        save_file({key: t.to(dtype) for key, t in tensors.items()}, tmp_path / name / "adapter_model.safetensors")
    config = EngineConfig(kv_bytes=16 << 20, max_rows=64, kernels=kernels, fuse=kernels)
    served = Engine(zoo.tiny_base("llama"), config, Store(tmp_path, settle_s=0))
    for mode in ("unmerged", "merged"):
        asked = [rig.ask(served, name, rig.PROMPTS[0], mode) for name in (*dtypes, *dtypes)]
        for name, answer in zip((*dtypes, *dtypes), rig.run(served, asked), strict=True):
            ids, logprobs = _peft_of(tmp_path / name, rig.PROMPTS[0])
            assert tuple(answer.ids) == ids, (name, mode)
            assert (answer.matrix() - logprobs).abs().max() < 1e-4, (name, mode)
    held = {r.name: (r.bytes, r.host_bytes) for r in served.stats().residents}
    of_16 = held["wide"][0] // 2 if isinstance(served.model.lowrank, Native) else held["wide"][0]
    for name in ("brain", "half"):
        assert held[name] == (of_16, held["wide"][1] // 2), name
    served.close()


def _peft_of(folder: Path, prompt: tuple[int, ...]) -> tuple[tuple[int, ...], Tensor]:
    model = zoo.load_peft(zoo.tiny_base("llama"), folder)
    ids, rows = list(prompt), []
    for _ in range(rig.NEW):
        with torch.inference_mode():
            rows.append(model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1))
        ids.append(int(rows[-1].argmax()))
    return tuple(ids[len(prompt) :]), torch.stack(rows)
