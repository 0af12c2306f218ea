"""The kinds beyond PEFT: folders written by hand, and the plain model with the change made to it as the judge."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.core import Finished, Member, Request, Sampling, Spec
from adapter_server.engine.engine import Engine
from adapter_server.families.facts import describe
from adapter_server.registry.store import Store

TOLERANCE = 1e-4  # of log-probabilities, float32
ROOT = "base_model.model."


def save(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def spec(config: Mapping[str, Any]) -> Spec:
    return Spec("mine", "0" * 12, "", config["peft_type"], config, 0)


def noise(shape: Sequence[int], seed: int, size: float = 0.3) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Judged = tuple[tuple[int, ...], Tensor]  # tokens, logprobs [new, vocab]


@torch.inference_mode()
def alone(model: nn.Module, prompt: Sequence[int], new: int = rig.NEW) -> Judged:
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


def hold(answer: rig.Answer, want: Judged) -> None:
    """The answer is the judge's, token by token."""
    assert isinstance(answer.end, Finished)
    assert answer.end.error is None, answer.end.error
    assert tuple(answer.ids) == want[0]
    assert (answer.matrix() - want[1]).abs().max().item() < TOLERANCE


def golden(file: Path, root: Path) -> dict[str, Judged]:
    """Unpacks a file of `golden/` into adapters' folders: {case: what its own library answered}."""
    wants = {}
    with safe_open(file, "pt") as tensors:
        for case, config in tensors.metadata().items():
            names = [name for name in tensors.keys() if name.startswith(f"{case}/")]  # noqa: SIM118
            own = {name.removeprefix(f"{case}/"): tensors.get_tensor(name) for name in names}
            save(root / case, json.loads(config), own)
            logprobs = tensors.get_tensor(f"{case}@logits").log_softmax(-1)
            wants[case] = tuple(tensors.get_tensor(f"{case}@ids").tolist()), logprobs
    return wants


@dataclass(frozen=True)
class Kind:
    """A kind: how a folder of it is written for an architecture, and who says what is right."""

    archs: tuple[str, ...]
    save: Callable[[str, Path], Path]
    judge: Callable[[str, Sequence[int]], Judged]  # the answer of the base with the same change made to it
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


def with_biases(arch: str, prompt: Sequence[int]) -> Judged:
    base = zoo.tiny_base(arch)
    for name, bias in trained_biases(arch).items():
        base.get_submodule(name.removesuffix(".bias")).bias = nn.Parameter(bias)
    return alone(base, prompt)


# Sparse deltas


def sparse(arch: str) -> dict[str, tuple[Tensor, Tensor]]:
    """{parameter: (indices, values)} of all kinds of modules, the tied embedding among them."""
    found = {}
    for i, (name, p) in enumerate(zoo.tiny_base(arch).named_parameters()):
        if i % 2 == 0:
            indices = torch.randperm(p.numel(), generator=torch.Generator().manual_seed(i))[: max(p.numel() // 8, 1)]
            found[name] = indices, noise((len(indices),), i, 0.6)
    return found


def save_sparse(arch: str, folder: Path) -> Path:
    deltas = sparse(arch)
    config = {"peft_type": "SPARSE_DELTA", "parameters": {name: len(values) for name, (_, values) in deltas.items()}}
    tensors = {f"{ROOT}{name}.indices": indices for name, (indices, _) in deltas.items()}
    return save(folder, config, tensors | {f"{ROOT}{name}.values": values for name, (_, values) in deltas.items()})


def with_sparse(arch: str, prompt: Sequence[int]) -> Judged:
    base = zoo.tiny_base(arch)
    for name, (indices, values) in sparse(arch).items():
        base.get_parameter(name).data.view(-1)[indices] += values
    return alone(base, prompt)


# AdapterHub's: what its own library answers is in golden/; this is the formula, written as hooks


BLOCKS = {
    "llama": ("model.layers", {"attention_adapters": "self_attn.o_proj", "output_adapters": "mlp.down_proj"}),
    "gpt2": ("transformer.h", {"attention_adapters": "attn.c_proj", "output_adapters": "mlp.c_proj"}),
}


def houlsby(arch: str) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """{path of a block's last Linear: (where its adapter stands in the file, its tensors)}."""
    layers, places = BLOCKS[arch]
    return {
        f"{layers}.{i}.{linear}": (
            f"{layers}.{i}.{at}.adapters.mine.",
            {
                "adapter_down.0.weight": noise((4, 32), 9 * i),
                "adapter_down.0.bias": noise((4,), 9 * i + 1),
                "adapter_up.weight": noise((32, 4), 9 * i + 2),
                "adapter_up.bias": noise((32,), 9 * i + 3),
            },
        )
        for i in range(2)
        for at, linear in places.items()
    }


def save_houlsby(arch: str, folder: Path) -> Path:
    own = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 8, "non_linearity": "swish"}
    config = {"model_type": arch, "name": "mine", "version": "adapters.1.3.0", "config": own}
    return save(folder, config, {at + name: t for at, tensors in houlsby(arch).values() for name, t in tensors.items()})


def with_houlsby(model: nn.Module, arch: str, weight: float = 1.0) -> nn.Module:
    """Hooks that add w·up(silu(down(y₀))) behind each block, y₀ what the plain base's Linear gives."""

    def hook(tensors: dict[str, Tensor]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def add(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            plain = module.base_layer(*args) if hasattr(module, "base_layer") else y
            down = F.silu(plain @ tensors["adapter_down.0.weight"].T + tensors["adapter_down.0.bias"])
            return y + weight * (down @ tensors["adapter_up.weight"].T + tensors["adapter_up.bias"])

        return add

    inner = model.base_model.model if hasattr(model, "peft_config") else model
    for path, (_, tensors) in houlsby(arch).items():
        inner.get_submodule(path).register_forward_hook(hook(tensors))
    return model


def flat_prefix(arch: str) -> list[tuple[Tensor, Tensor]]:
    heads = 2 if arch == "llama" else 4
    return [(noise((3, heads, 8), 2 * i, 1.0), noise((3, heads, 8), 2 * i + 1, 1.0)) for i in range(2)]


def save_flat_prefix(arch: str, folder: Path) -> Path:
    own = {"architecture": "prefix_tuning", "flat": True, "prefix_length": 3}
    config = {"model_type": arch, "name": "mine", "version": "adapters.1.3.0", "config": own}
    flat = torch.stack([t for pair in flat_prefix(arch) for t in pair], 1).flatten()  # [n, 2L, heads, dim]
    root = BLOCKS[arch][0].partition(".")[0]
    return save(folder, config, {f"{root}.prefix_tuning.prefix_tunings.mine.self_prefix.control_trans": flat})


@torch.inference_mode()
def with_flat_prefix(arch: str, prompt: Sequence[int]) -> Judged:
    """A cache that holds the prefix, and positions that begin at 0 all the same; the whole text anew for each token."""
    base, ids, rows = zoo.tiny_base(arch), list(prompt), []
    for _ in range(rig.NEW):
        cache = DynamicCache()
        for layer, (k, v) in enumerate(flat_prefix(arch)):
            cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], layer)
        out = base(
            input_ids=torch.tensor([ids]), position_ids=torch.arange(len(ids))[None], past_key_values=cache,
            attention_mask=torch.ones(1, 3 + len(ids), dtype=torch.long),
        )  # fmt: skip
        rows.append(out.logits[0, -1].float())
        ids.append(int(rows[-1].argmax()))
    return tuple(ids[len(prompt) :]), torch.stack(rows).log_softmax(-1)


# Low ranks at what the library calls the output, alone; and, gated, beside a gated bottleneck


OUTPUT = {"llama": "mlp.up_proj", "gpt2": "mlp.c_proj"}


def low_ranks(arch: str) -> dict[str, tuple[Tensor, Tensor]]:
    """{path: (A, B)}"""
    layers, base = BLOCKS[arch][0], zoo.tiny_base(arch)
    shapes = {path: describe(base).modules[path] for path in (f"{layers}.{i}.{OUTPUT[arch]}" for i in range(2))}
    return {p: (noise((2, m.inp), i), noise((m.out, 2), i + 7)) for i, (p, m) in enumerate(shapes.items())}


def hub_file(arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": arch, "name": "mine", "version": "adapters.1.3.0", "config": config}


LORA = {"architecture": "lora", "r": 2, "alpha": 3, "selfattn_lora": False, "output_lora": True}


def lora_tensors(arch: str) -> dict[str, Tensor]:
    pairs = {f"{path}.loras.mine.": pair for path, pair in low_ranks(arch).items()}
    return {at + name: t for at, pair in pairs.items() for name, t in zip(("lora_A", "lora_B"), pair, strict=True)}


def save_hub_lora(arch: str, folder: Path) -> Path:
    return save(folder, hub_file(arch, LORA), lora_tensors(arch))


def with_hub_lora(arch: str, prompt: Sequence[int]) -> Judged:
    base = zoo.tiny_base(arch)
    for path, (A, B) in low_ranks(arch).items():
        base.get_submodule(path).register_forward_hook(
            lambda module, args, y, A=A, B=B: y + 1.5 * F.linear(F.linear(args[0], A), B)
        )
    return alone(base, prompt)


def gates(arch: str) -> dict[str, tuple[Tensor, Tensor]]:
    """{how a gate's names begin: (weight, bias)} of every bottleneck and every low rank."""
    widths = {at: 32 for at, _ in houlsby(arch).values()}
    widths |= {f"{path}.loras.mine.": A.shape[1] for path, (A, _) in low_ranks(arch).items()}
    return {
        f"{at}gate.": (noise((1, d), 3 * i, 1.0), noise((1,), 3 * i + 1)) for i, (at, d) in enumerate(widths.items())
    }


def save_unipelt(arch: str, folder: Path) -> Path:
    bottleneck = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 8, "non_linearity": "swish"}
    members = [member | {"use_gating": True} for member in (bottleneck, LORA)]
    tensors = {at + name: t for at, own in houlsby(arch).values() for name, t in own.items()} | lora_tensors(arch)
    tensors |= {
        at + name: t for at, pair in gates(arch).items() for name, t in zip(("weight", "bias"), pair, strict=True)
    }
    return save(folder, hub_file(arch, {"architecture": "union", "configs": members}), tensors)


@torch.inference_mode()
def with_unipelt(arch: str, prompt: Sequence[int]) -> Judged:
    """Each method's term times the mean of its gate over all tokens, the whole text anew for each token."""
    base, ids, rows = zoo.tiny_base(arch), list(prompt), []

    def gate(at: str, x: Tensor) -> Tensor:
        weight, bias = gates(arch)[f"{at}gate."]
        return F.linear(x, weight, bias).sigmoid().mean(1, keepdim=True)

    def low(path: str, A: Tensor, B: Tensor) -> Any:
        return lambda _, args, y: y + gate(f"{path}.loras.mine.", args[0]) * F.linear(F.linear(args[0], A), B)

    def behind(at: str, own: dict[str, Tensor]) -> Any:
        def add(_: nn.Module, args: Any, y: Tensor) -> Tensor:
            down = F.silu(F.linear(y, own["adapter_down.0.weight"], own["adapter_down.0.bias"]))
            return y + gate(at, y) * F.linear(down, own["adapter_up.weight"], own["adapter_up.bias"])

        return add

    for path, pair in low_ranks(arch).items():
        base.get_submodule(path).register_forward_hook(low(path, *pair))
    for path, (at, own) in houlsby(arch).items():
        base.get_submodule(path).register_forward_hook(behind(at, own))
    for _ in range(rig.NEW):
        rows.append(base(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float())
        ids.append(int(rows[-1].argmax()))
    return tuple(ids[len(prompt) :]), torch.stack(rows).log_softmax(-1)


KINDS = {
    "BITFIT": Kind(("llama", "qwen2", "gpt2"), save_bitfit, with_biases),
    "SPARSE_DELTA": Kind(("llama", "qwen2", "gpt2"), save_sparse, with_sparse),
    "ADAPTERHUB": Kind(
        ("llama", "gpt2"), save_houlsby, lambda arch, ids: alone(with_houlsby(zoo.tiny_base(arch), arch), ids), False
    ),
    "ADAPTERHUB_LORA": Kind(("llama", "gpt2"), save_hub_lora, with_hub_lora),
    "ADAPTERHUB_UNIPELT": Kind(("llama", "gpt2"), save_unipelt, with_unipelt, False),
    "ADAPTERHUB_PREFIX": Kind(("llama", "gpt2"), save_flat_prefix, with_flat_prefix, False),
}
