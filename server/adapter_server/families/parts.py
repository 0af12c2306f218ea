"""What files of several kinds have in common: strict reading, modules saved whole, copies of embeddings, biases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import AnyPatch, Base, ModuleShape, ParamPatch, Patch, Shapes

ROOT = "base_model.model."
LINEAR = ("linear", "conv1d")
HALVES = (torch.bfloat16, torch.float16)
Expected = dict[str, tuple[int, ...]]


class Integers(tuple[int, ...]):
    """The shape of a tensor that holds integers: only where a family says so does the guard let one through."""

    integer = True


class Fresh(Mapping[str, Tensor]):
    """Tensors that are new, float32 or int64, whenever one is asked for."""

    def as_filed(self, key: str) -> Tensor:
        """One of floating point in the file's own format, which may have half the bytes."""
        return self[key]


class Taker:
    """Hands out each tensor of a file once, in float32, for who takes it to keep or to change.

    `done` refuses leftovers by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors, self._left, self._copy = tensors, set(tensors), not isinstance(tensors, Fresh)

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def __call__(self, key: str) -> Tensor:
        self._strike(key)
        found = self._tensors[key]
        return found.to("cpu", torch.float32, copy=True) if self._copy or found.dtype != torch.float32 else found

    def as_filed(self, key: str) -> Tensor:
        """The same, but in the file's own format where that is half as wide."""
        self._strike(key)
        found = self._tensors.as_filed(key) if isinstance(self._tensors, Fresh) else self._tensors[key].clone()
        return found.to("cpu", found.dtype if found.dtype in HALVES else torch.float32)

    def integers(self, key: str, below: int) -> Tensor:
        """A tensor of indices in 0..below-1, int64."""
        self._strike(key)
        found = self._tensors[key].to("cpu", torch.int64, copy=self._copy)
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < below:
            raise AdapterRefused(f"tensor '{key}' holds indices outside 0..{below - 1}")
        return found

    def _strike(self, key: str) -> None:
        if key not in self._left:
            raise AdapterRefused(f"the file holds no tensor '{key}', which its config calls for")
        self._left.remove(key)

    def done(self) -> None:
        if self._left:
            some = ", ".join(sorted(self._left)[:5])
            raise AdapterRefused(f"{len(self._left)} tensors of the file belong to nothing in its config: {some}")


def saved_expected(paths: Iterable[str], shapes: Shapes) -> Expected:
    """`modules_to_save`: every parameter of the module, as stored."""
    return {f"{ROOT}{path}.{name}": shape for path in paths for name, shape in shapes.modules[path].params.items()}


def saved_patch(take: Taker, path: str, base: Base, inside: str = "") -> AnyPatch:
    """A module saved whole: at a Linear a weight override W' and a bias difference, elsewhere its own parameters."""
    shape = base.shapes.modules[path]
    params = {name: take(f"{ROOT}{path}{inside}.{name}") for name in shape.params}
    if shape.kind not in LINEAR:
        return ParamPatch(params)
    weight = params["weight"].T.contiguous() if shape.kind == "conv1d" else params["weight"]
    bias = params["bias"] - base_bias(base, path) if "bias" in params else None
    return Patch(weight=weight, bias=bias)


def trained_biases(mode: object, shapes: Shapes, wrapped: list[str], saved: list[str]) -> dict[str, str]:
    """{path: key} of the base's biases that were trained (PEFT `tuners_utils.py`, `_get_learnable_bias_state_dict`)."""
    if mode == "none":
        return {}
    if not isinstance(mode, str) or (mode != "all" and not mode.endswith("_only")):
        raise AdapterRefused(f"adapter_config.json: 'bias' must be none, all or …_only, not {str(mode)[:80]!r}")
    with_bias = [path for path, shape in shapes.modules.items() if shape.has_bias and path not in saved]
    inside = {path: f"{ROOT}{path}.base_layer.bias" for path in with_bias if path in wrapped}
    outside = {path: f"{ROOT}{path}.bias" for path in with_bias if path not in wrapped and mode == "all"}
    return inside | outside


def biases_expected(biases: Mapping[str, str], shapes: Shapes) -> Expected:
    return {key: shapes.modules[path].params["bias"] for path, key in biases.items()}


def bias_patch(bias: Tensor, path: str, base: Base) -> AnyPatch:
    """A trained bias of a module that is not wrapped."""
    if base.shapes.modules[path].kind in LINEAR:
        return Patch(bias=bias - base_bias(base, path))
    return ParamPatch({"bias": bias})


def base_bias(base: Base, path: str) -> Tensor:
    bias = base.bias(path)
    if bias is None:
        raise AdapterRefused(f"the file holds a bias for {path}, which has none in this base")
    return bias


def changed(weight: Tensor, base: Base, path: str) -> Tensor | None:
    """The weight if it differs from the base's by more than the rounding to the base's own dtype, else None."""
    original = base.weight(path)
    dtypes = torch.float32, torch.bfloat16, torch.float16
    return None if any(torch.equal(weight.to(d).float(), original) for d in dtypes) else weight


def copies_expected(paths: Iterable[str], shapes: Shapes, names: frozenset[str]) -> Expected:
    """Wrapped embeddings and heads, whose own parameters PEFT may save too (`save_and_load.py`, "auto")."""
    both = [path for path in paths if path in (shapes.embed, shapes.head)]
    own = {f"{ROOT}{p}.base_layer.{name}": s for p in both for name, s in shapes.modules[p].params.items()}
    return {key: shape for key, shape in own.items() if key in names}


def take_copies(take: Taker, paths: Iterable[str], base: Base) -> dict[str, Tensor]:
    """{path: W'} of those copies that differ from the base, a tied partner included."""
    shapes, found = base.shapes, {}
    for path in paths:
        key = f"{ROOT}{path}.base_layer.weight"
        if path in (shapes.embed, shapes.head) and key in take:
            found[path] = changed(take(key), base, path)
    weights = {path: weight for path, weight in found.items() if weight is not None}
    if not shapes.tied or not weights:
        return weights
    first, *others = weights.values()
    if any(not torch.equal(first, other) for other in others):
        raise AdapterRefused("the file changes the tied embedding and head to two different weights")
    return {shapes.embed: first, shapes.head: first}


def override(weight: Tensor, shape: ModuleShape) -> AnyPatch:
    """W' alone, at a module that nothing else touches."""
    return Patch(weight=weight) if shape.kind in LINEAR else ParamPatch({"weight": weight})


def refuse_overlap(wrapped: Iterable[str], saved: Iterable[str]) -> None:
    both = sorted(set(wrapped) & set(saved))
    if both:
        raise AdapterRefused(f"{both[0]} is both in 'target_modules' and in 'modules_to_save'; keep one")
