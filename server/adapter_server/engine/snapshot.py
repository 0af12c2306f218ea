"""A merged snapshot: an adapter folded into weight overrides, kept beside the base. Merged is a patch too.

`fold` gives new tensors; the base is never written. Tied embeddings come apart by themselves, since a patch belongs to
one module. `export` writes the same thing as an ordinary transformers folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from adapter_server.core import Spec
from adapter_server.engine.model import load
from adapter_server.errors import AdapterRefused, InvalidRequest, NotMergeable
from adapter_server.families.base import Adapter, AnyPatch, Base, ParamPatch, Patch
from adapter_server.families.compose import Part, Way, compose
from adapter_server.families.facts import ModelBase
from adapter_server.registry.store import Store


def check_foldable(adapter: Adapter) -> None:
    """Raises NotMergeable for what no weights can do, as what stands before the prompt."""
    if why := adapter.unfoldable:
        raise NotMergeable(
            f"adapter {adapter.spec.name!r} ({adapter.spec.family}) has no merged form: {why}. Use mode 'unmerged'",
            param="mode",
        )


def fold(adapter: Adapter, base: Base) -> Adapter:
    """The adapter with every patch folded into float32 weights. Raises NotMergeable, AdapterRefused (not finite)."""
    check_foldable(adapter)
    return Adapter(adapter.spec, {path: _fold(path, patch, base) for path, patch in adapter.patches.items()})


def _fold(path: str, patch: AnyPatch, base: Base) -> AnyPatch:
    params = _params(path, base)
    folded = patch.fold(params)
    if not all(bool(torch.isfinite(t).all()) for t in folded.values()):
        raise AdapterRefused(f"folding {path} gave weights that are not finite; serve this adapter unmerged")
    if base.shapes.modules[path].kind not in ("linear", "conv1d"):
        return ParamPatch(folded)
    bias = folded.get("bias")
    if bias is not None and "bias" in params:
        bias = bias - params["bias"]
    return Patch(weight=folded["weight"], bias=bias)


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
    if base.shapes.tied and {base.shapes.embed, base.shapes.head} & set(adapter.patches):
        _untie(module, base)
    with torch.no_grad():
        for path, patch in adapter.patches.items():
            _write(module.get_submodule(path), base.shapes.modules[path].kind, patch.fold(_params(path, base)))
    module.save_pretrained(out)
    _copy_tokenizer(model, out)


def composed(model: str | Path, members: Sequence[tuple[Spec, float]], way: Way, store: Store) -> tuple[bytes, bytes]:
    """A stored composition of (adapter, weight): its config and weights. Raises InvalidRequest, AdapterRefused."""
    from adapter_server.engine.pool import compile_blob, tensors_of

    module = load(model, "float32", torch.device("cpu"))
    base, parts = ModelBase(module), []
    for spec, weight in members:
        blob = store.read(spec)
        compile_blob(spec, blob, base)
        parts.append(Part(spec, tensors_of(blob), weight))
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
