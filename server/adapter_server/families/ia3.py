"""(IA)³ (PEFT `tuners/ia3/layer.py`): feed-forward modules scale their input, the others their output and its bias."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Adapter, AnyPatch, Base, Family, Patch, Shapes
from adapter_server.families.options import Config, check_known
from adapter_server.families.parts import (
    LINEAR,
    ROOT,
    Expected,
    Taker,
    copies_expected,
    override,
    refuse_overlap,
    saved_expected,
    saved_patch,
    take_copies,
)
from adapter_server.families.targets import saved_modules, suffix_or_pattern, targeted

KNOWN = frozenset(
    {
        "exclude_modules",
        "fan_in_fan_out",
        "feedforward_modules",
        "init_ia3_weights",
        "modules_to_save",
        "target_modules",
    }
)


class IA3:
    name = "IA3"
    slow = False

    def expected(self, config: Config, shapes: Shapes, names: frozenset[str]) -> Expected:
        wrapped, saved = resolve(config, shapes)
        scales = {_key(p): (1, shapes.modules[p].inp) if f else (shapes.modules[p].out, 1) for p, f in wrapped.items()}
        return scales | copies_expected(wrapped, shapes, names) | saved_expected(saved, shapes)

    def load(self, spec: Spec, tensors: Mapping[str, Tensor], base: Base) -> Adapter:
        wrapped, saved = resolve(spec.config, base.shapes)
        take = Taker(tensors)
        weights = take_copies(take, wrapped, base)
        patches: dict[str, AnyPatch] = {
            path: override(w, base.shapes.modules[path]) for path, w in weights.items() if path not in wrapped
        }
        for path, feedforward in wrapped.items():
            scale, W = take(_key(path)).flatten(), weights.get(path)
            patches[path] = Patch(in_scale=scale, weight=W) if feedforward else Patch(out_scale=scale, weight=W)
        for path in saved:
            patches[path] = saved_patch(take, path, base)
        take.done()
        return Adapter(spec, patches)


def resolve(config: Config, shapes: Shapes) -> tuple[dict[str, bool], list[str]]:
    """{wrapped module: whether it is feed-forward}, and the modules saved whole."""
    check_known(config, KNOWN)
    paths, saved = targeted(config, shapes), saved_modules(config, shapes)
    refuse_overlap(paths, saved)
    wrong = next((path for path in paths if shapes.modules[path].kind not in LINEAR), None)
    if wrong is not None:
        raise AdapterRefused(f"adapter_config.json: 'target_modules' names {wrong}, which (IA)³ does not apply to")
    feedforward = suffix_or_pattern(config, "feedforward_modules")
    return {path: feedforward(path) for path in paths}, saved


def _key(path: str) -> str:
    return f"{ROOT}{path}.ia3_l"


FAMILY: Family = IA3()
