"""Sparse deltas of any parameters, as DiffPruning (Guo et al. 2021) and its relatives train them.

w' = w + scatter(indices, values)      values [n]  indices [n], into the parameter as the base stores it, as one row
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Adapter, AnyPatch, Base, Family, ParamPatch, Patch, Shapes
from adapter_server.families.deltas import sparse
from adapter_server.families.options import Config, as_integer, check_known, table
from adapter_server.families.parts import LINEAR, ROOT, Expected, Integers, Taker

KNOWN = frozenset({"parameters"})


class SparseDelta:
    name = "SPARSE_DELTA"
    slow = True

    def expected(self, config: Config, shapes: Shapes, names: frozenset[str]) -> Expected:
        found: Expected = {}
        for (path, name), n in _counts(config, shapes).items():
            found |= {f"{ROOT}{path}.{name}.indices": Integers((n,)), f"{ROOT}{path}.{name}.values": (n,)}
        return found

    def load(self, spec: Spec, tensors: Mapping[str, Tensor], base: Base) -> Adapter:
        take, shapes = Taker(tensors), base.shapes
        new: dict[str, dict[str, Tensor]] = {}
        for path, name in _counts(spec.config, shapes):
            new.setdefault(path, {})[name] = _changed(take, path, name, base)
        take.done()
        if shapes.tied and shapes.embed in new:
            new[shapes.head] = new[shapes.embed]
        return Adapter(spec, {path: _patch(path, params, base) for path, params in new.items()})


def _counts(config: Config, shapes: Shapes) -> dict[tuple[str, str], int]:
    """{(module, its parameter): how many of its numbers are changed}."""
    check_known(config, KNOWN)
    found = {}
    for key, n in table(config, "parameters").items():
        path, _, name = key.rpartition(".")
        shape = shapes.modules[path].params.get(name) if path in shapes.modules else None
        if shape is None:
            raise AdapterRefused(f"adapter_config.json: 'parameters' names {key[:80]!r}, which this base does not have")
        if shapes.tied and path == shapes.head:
            raise AdapterRefused(f"adapter_config.json: {key} is the embedding's own here: name {shapes.embed}.{name}")
        found[path, name] = as_integer(n, "parameters", most=torch.Size(shape).numel())
    if not found:
        raise AdapterRefused("adapter_config.json: 'parameters' must say how many numbers of each parameter change")
    return found


def _changed(take: Taker, path: str, name: str, base: Base) -> Tensor:
    """The parameter as stored, with its numbers changed."""
    old, key = base.param(path, name), f"{ROOT}{path}.{name}"
    indices = take.integers(f"{key}.indices", old.numel())
    if bool((indices.sort().values.diff() == 0).any()):
        raise AdapterRefused(f"tensor '{key}.indices' names a place twice")
    new = old.flatten().index_add(0, indices, take(f"{key}.values")).view(old.shape)
    if not torch.isfinite(new).all():
        raise AdapterRefused(f"{key}: the changed numbers are not finite; save a sound step")
    return new


def _patch(path: str, params: Mapping[str, Tensor], base: Base) -> AnyPatch:
    shape = base.shapes.modules[path]
    if shape.kind not in LINEAR:
        return ParamPatch(params)
    bias = params["bias"] - base.param(path, "bias") if "bias" in params else None
    if "weight" not in params:
        return Patch(bias=bias)
    weight = params["weight"].T.contiguous() if shape.kind == "conv1d" else params["weight"]
    few = sparse(weight - base.weight(path))
    return Patch(weight=weight, bias=bias) if few is None else Patch(delta=few, bias=bias)


FAMILY: Family = SparseDelta()
