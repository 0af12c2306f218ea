"""LN tuning (PEFT `tuners/ln_tuning/layer.py`): whole modules in place of the base's, norms as a rule."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from adapter_server.core import Spec
from adapter_server.families.base import Adapter, AnyPatch, Base, Family, Shapes
from adapter_server.families.options import Config, check_known
from adapter_server.families.parts import (
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
from adapter_server.families.targets import saved_modules, targeted

KNOWN = frozenset({"exclude_modules", "modules_to_save", "target_modules"})
INSIDE = ".ln_tuning_layers"


class LNTuning:
    name = "LN_TUNING"
    slow = False

    def expected(self, config: Config, shapes: Shapes, names: frozenset[str]) -> Expected:
        tuned, saved = _resolve(config, shapes)
        own = {f"{ROOT}{p}{INSIDE}.{name}": s for p in tuned for name, s in shapes.modules[p].params.items()}
        return own | copies_expected(tuned, shapes, names) | saved_expected(saved, shapes)

    def load(self, spec: Spec, tensors: Mapping[str, Tensor], base: Base) -> Adapter:
        tuned, saved = _resolve(spec.config, base.shapes)
        take = Taker(tensors)
        patches: dict[str, AnyPatch] = {
            path: override(w, base.shapes.modules[path]) for path, w in take_copies(take, tuned, base).items()
        }
        for path in tuned:
            patches[path] = saved_patch(take, path, base, INSIDE)
        for path in saved:
            patches[path] = saved_patch(take, path, base)
        take.done()
        return Adapter(spec, patches)


def _resolve(config: Config, shapes: Shapes) -> tuple[list[str], list[str]]:
    check_known(config, KNOWN)
    tuned, saved = targeted(config, shapes), saved_modules(config, shapes)
    refuse_overlap(tuned, saved)
    return tuned, saved


FAMILY: Family = LNTuning()
