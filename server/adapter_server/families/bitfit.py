"""BitFit (Zaken et al. 2021): trained biases alone, each whole under its own name.  y = W x + β   β [out].

A module that is no Linear (a norm) must have a bias in the base; a Linear that has none is given one.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Adapter, AnyPatch, Base, Family, ParamPatch, Patch, Shapes
from adapter_server.families.options import Config, check_known
from adapter_server.families.parts import LINEAR, ROOT, Expected, Taker
from adapter_server.families.targets import targeted
from adapter_server.families.wrapping import TARGETS

KNOWN = TARGETS - {"modules_to_save"}


class BitFit:
    name = "BITFIT"
    slow = False

    def expected(self, config: Config, shapes: Shapes, names: frozenset[str]) -> Expected:
        return {f"{ROOT}{path}.bias": width for path, width in _widths(config, shapes).items()}

    def load(self, spec: Spec, tensors: Mapping[str, Tensor], base: Base) -> Adapter:
        take = Taker(tensors)
        patches = {path: _patch(take(f"{ROOT}{path}.bias"), path, base) for path in _widths(spec.config, base.shapes)}
        take.done()
        return Adapter(spec, patches)


def _widths(config: Config, shapes: Shapes) -> Expected:
    """{module: shape of its bias}: those that 'target_modules' names; all that have a bias where it is absent."""
    check_known(config, KNOWN)
    if config.get("target_modules") is not None:
        return {path: _width(path, shapes) for path in targeted(config, shapes)}
    found = {path: shape.params["bias"] for path, shape in shapes.modules.items() if shape.has_bias}
    if not found:
        raise AdapterRefused("adapter_config.json: no module of this base has a bias; name them in 'target_modules'")
    return found


def _width(path: str, shapes: Shapes) -> tuple[int, ...]:
    shape = shapes.modules[path]
    if shape.kind in LINEAR:
        return (shape.out,)
    if not shape.has_bias:
        raise AdapterRefused(f"adapter_config.json: 'target_modules' names {path}, which cannot have a bias")
    return shape.params["bias"]


def _patch(bias: Tensor, path: str, base: Base) -> AnyPatch:
    if base.shapes.modules[path].kind not in LINEAR:
        return ParamPatch({"bias": bias})
    own = base.bias(path)
    return Patch(bias=bias if own is None else bias - own)


FAMILY: Family = BitFit()
