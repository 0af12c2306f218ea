"""A merged snapshot: an adapter folded into weight overrides, kept beside the base. Merged is a patch too.

`fold` gives new tensors; the base is never written. Tied embeddings come apart by themselves, since a patch belongs to
one module. `export` writes the same thing as an ordinary transformers folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapter_server.core import Spec
from adapter_server.engine.model import load
from adapter_server.engine.pauses import Pause, at_once
from adapter_server.errors import AdapterRefused, InvalidRequest, NotMergeable
from adapter_server.families import fallback
from adapter_server.families.base import Adapter, AnyPatch, Base, ParamPatch, Patch
from adapter_server.families.compose import Part, Way, compose
from adapter_server.families.facts import ModelBase
from adapter_server.registry.store import Store

PROBES = 4  # random inputs that a fold is tried on
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the largest output


def check_foldable(adapter: Adapter) -> None:
    """Raises NotMergeable for what no weights can do, as what stands before the prompt."""
    if why := adapter.unfoldable:
        raise NotMergeable(
            f"adapter {adapter.spec.name!r} ({adapter.spec.family}) has no merged form: {why}. Use mode 'unmerged'",
            param="mode",
        )


def fold(adapter: Adapter, base: Base, dtype: torch.dtype = torch.float32, pause: Pause = at_once) -> Adapter:
    """The adapter with every patch folded into float32 weights, which `dtype` will hold; `pause` is called before each.

    Raises NotMergeable, and AdapterRefused where the weights are not finite or do not do what the patch does.
    """
    check_foldable(adapter)
    if adapter.graft is not None:
        return replace(adapter, graft=replace(adapter.graft, merged=True))
    folded: dict[str, AnyPatch] = {}
    for path, patch in adapter.patches.items():
        pause()
        folded[path] = _fold(path, patch, base, dtype)
    return Adapter(adapter.spec, folded)


def _fold(path: str, patch: AnyPatch, base: Base, dtype: torch.dtype) -> AnyPatch:
    params = _params(path, base)
    folded = patch.fold(params)
    if not all(bool(torch.isfinite(t.to(dtype)).all()) for t in folded.values()):
        raise AdapterRefused(f"folding {path} gave weights that are not finite; serve this adapter unmerged")
    if isinstance(patch, Patch):
        _check(path, patch, params, folded, dtype)
    if base.shapes.modules[path].kind not in ("linear", "conv1d"):
        return ParamPatch(folded)
    bias = folded.get("bias")
    if bias is not None and "bias" in params:
        bias = bias - params["bias"]
    return Patch(weight=folded["weight"], bias=bias)


def _check(
    path: str, patch: Patch, params: Mapping[str, Tensor], folded: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """The folded weights, rounded as they will be, against the patch itself on some random input."""
    plain, rounded = _linear(params), {name: t.to(dtype).float() for name, t in folded.items()}
    x = torch.randn(PROBES, plain.in_features, generator=torch.Generator().manual_seed(0))
    want, got = patch.to(x.device, x.dtype).apply(x, plain), F.linear(x, rounded["weight"], rounded.get("bias"))
    error = ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()
    if not error <= TOLERANCE[dtype]:
        raise AdapterRefused(
            f"folding {path} moved its output by {error:.1e} of the largest, allowed are {TOLERANCE[dtype]:g} in "
            f"{str(dtype).removeprefix('torch.')}: serve this adapter unmerged"
        )


def _linear(params: Mapping[str, Tensor]) -> nn.Linear:
    """A stand-in for the base's module, in float32."""
    out, inp = params["weight"].shape
    module = nn.Linear(inp, out, bias="bias" in params, device="meta")
    for name, value in params.items():
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    return module


def _params(path: str, base: Base) -> dict[str, Tensor]:
    """The module's parameters in float32; a Linear's or Conv1D's weight as [out, in]."""
    shape = base.shapes.modules[path]
    if shape.kind not in ("linear", "conv1d"):
        return {name: base.param(path, name) for name in shape.params}
    params = {"weight": base.weight(path)}
    if (bias := base.bias(path)) is not None:
        params["bias"] = bias
    return params


def export(model: str | Path, spec: Spec, store: Store, out: Path) -> None:
    """Write base + adapter as an ordinary transformers folder, in the checkpoint's dtype. Refuses a folder in use."""
    from adapter_server.engine.pool import compile_adapter

    if out.exists() and any(out.iterdir()):
        raise InvalidRequest(f"{out} is not empty; name a new folder", param="out")
    module = load(model, "checkpoint", torch.device("cpu"))
    base = ModelBase(module)
    adapter = compile_adapter(spec, store, base)
    check_foldable(adapter)
    if adapter.graft is not None:
        module = fallback.merged(fallback.attach(module, adapter.graft), spec.name)
    if base.shapes.tied and {base.shapes.embed, base.shapes.head} & set(adapter.patches):
        _untie(module, base)
    with torch.no_grad():
        for path, patch in adapter.patches.items():
            _write(module.get_submodule(path), base.shapes.modules[path].kind, patch.fold(_params(path, base)))
    module.save_pretrained(out)
    _copy_tokenizer(model, out)


def composed(model: str | Path, members: Sequence[tuple[Spec, float]], way: Way, store: Store) -> tuple[bytes, bytes]:
    """A stored composition of (adapter, weight): its config and weights. Raises InvalidRequest, AdapterRefused."""
    from adapter_server.engine.pool import Tensors, compile_blob

    module = load(model, "float32", torch.device("cpu"))
    base, parts = ModelBase(module), []
    for spec, weight in members:
        blob = store.read(spec)
        compile_blob(spec, blob, base, store)
        parts.append(Part(spec, Tensors(blob), weight))
    return compose(parts, way, module)


def _untie(module: torch.nn.Module, base: Base) -> None:
    head = module.get_submodule(base.shapes.head)
    head.weight = torch.nn.Parameter(head.get_parameter("weight").detach().clone())
    module.config.tie_word_embeddings = False  # type: ignore[union-attr]


def _write(module: torch.nn.Module, kind: str, params: Mapping[str, Tensor]) -> None:
    for name, value in params.items():
        target = getattr(module, name, None)
        if target is None:
            raise NotMergeable("the adapter adds a bias to a layer that has none; a transformers folder cannot hold it")
        target.copy_(value.T if kind == "conv1d" and name == "weight" else value)


def _copy_tokenizer(model: str | Path, out: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(model).save_pretrained(out)
