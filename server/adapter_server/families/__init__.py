"""The kinds of adapters, one file each: a module here that defines `FAMILY` (or several `FAMILIES`) is found."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Mapping

from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Family


def find(peft_type: str) -> Family:
    """The family of a PEFT kind. The string comes from a file: it is a dictionary key and nothing else."""
    family = _families().get(peft_type)
    if family is None:
        near = difflib.get_close_matches(peft_type, known(), 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise AdapterRefused(f"adapters of kind {peft_type[:80]!r} are not served{hint} Known: {', '.join(known())}")
    return family


def slow(spec: Spec) -> bool:
    """Whether its compile reads base weights or needs an SVD, so that it must not hold up a plain LoRA."""
    return find(spec.family).slow or bool(spec.config.get("use_dora"))


def known() -> list[str]:
    """The kinds that are served, sorted."""
    return sorted(_families())


@functools.cache
def _families() -> Mapping[str, Family]:
    found: dict[str, Family] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        declared = getattr(module, "FAMILIES", None) or filter(None, [getattr(module, "FAMILY", None)])
        found |= {family.name: family for family in declared}
    return found
