"""The kinds beyond PEFT: folders written by hand, and the plain model with the change made to it as the judge."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.core import Finished, Member, Request, Sampling
from adapter_server.engine import Engine
from adapter_server.registry.store import Store

TOLERANCE = 1e-4  # of log-probabilities, float32
ROOT = "base_model.model."


def save(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def noise(shape: Sequence[int], seed: int, size: float = 0.3) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def alone(model: nn.Module, prompt: Sequence[int], new: int = rig.NEW) -> tuple[tuple[int, ...], Tensor]:
    """The model by itself, batch 1, greedy: (tokens, logprobs [new, vocab])."""
    model.generation_config.eos_token_id = None
    out = model.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new, min_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    logits = torch.stack(out.logits, 1)[0].float()
    return tuple(logits.argmax(-1).tolist()), logits.log_softmax(-1)


def engine(arch: str, root: Path, **settings: Any) -> Engine:
    config = EngineConfig(**{"kv_bytes": 16 << 20, "max_rows": 64, **settings})
    return Engine(zoo.tiny_base(arch), config, Store(root, settle_s=0))


def ask(
    engine: Engine, members: Mapping[str, float], prompt: Sequence[int], mode: str = "unmerged", **sampling: Any
) -> Request:
    settings = {"max_new_tokens": rig.NEW, "logprobs": zoo.VOCAB, "ignore_eos": True, **sampling}
    return Request(
        id=f"{members}-{mode}-{time.monotonic_ns()}",
        prompt=tuple(prompt),
        sampling=Sampling(**settings),
        members=tuple(Member(engine.pool.store.resolve(name), weight) for name, weight in members.items()),
        mode=mode if members else "base",  # type: ignore[arg-type]
        arrived=time.monotonic(),
    )


def hold(answer: rig.Answer, want: tuple[tuple[int, ...], Tensor]) -> None:
    """The answer is the judge's, token by token."""
    assert isinstance(answer.end, Finished)
    assert answer.end.error is None, answer.end.error
    assert tuple(answer.ids) == want[0]
    assert (answer.matrix() - want[1]).abs().max().item() < TOLERANCE


@dataclass(frozen=True)
class Kind:
    """A kind: how a folder of it is written for an architecture, and the base with the same change made to it."""

    archs: tuple[str, ...]
    save: Callable[[str, Path], Path]
    changed: Callable[[str], nn.Module]
    folds: bool = True


# BitFit


def trained_biases(arch: str) -> dict[str, Tensor]:
    """Random biases: some that the base has (a norm's, a Linear's), and one of a Linear that has none."""
    base = zoo.tiny_base(arch)
    names = [name for name, _ in base.named_parameters() if name.endswith(".bias")]
    names += [f"{path}.bias" for path, m in base.named_modules() if path.endswith(("o_proj", "up_proj"))]
    found = {}
    for i, name in enumerate(names):
        module = base.get_submodule(name.removesuffix(".bias"))
        own = getattr(module, "bias", None)
        found[name] = noise((module.out_features,) if own is None else own.shape, i, 0.5)
    return found


def save_bitfit(arch: str, folder: Path) -> Path:
    biases = trained_biases(arch)
    config = {"peft_type": "BITFIT", "target_modules": [name.removesuffix(".bias") for name in biases]}
    return save(folder, config, {ROOT + name: bias for name, bias in biases.items()})


def with_biases(arch: str) -> nn.Module:
    base = zoo.tiny_base(arch)
    for name, bias in trained_biases(arch).items():
        base.get_submodule(name.removesuffix(".bias")).bias = nn.Parameter(bias)
    return base


KINDS = {"BITFIT": Kind(("llama", "qwen2", "gpt2"), save_bitfit, with_biases)}
