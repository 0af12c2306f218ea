"""The kinds of adapters, one file each: a module here that defines `FAMILY` (or several `FAMILIES`) is found.

Families of other packages are found by the entry points of the group `adapter_server.families`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Mapping
from typing import Any

from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused, PlugInBroken
from adapter_server.families import fallback, unipelt
from adapter_server.families.base import Family, Shapes
from adapter_server.families.lora_variants import SUBTRACTED
from adapter_server.registry.guard import PEFT_TYPE

GROUP = "adapter_server.families"

# Options that make a quick kind slow.
READS_BASE = ("arrow_config", "kasa_config", "target_parameters", "trainable_token_indices", "use_dora")


def find(peft_type: str) -> Family:
    """The family of a PEFT kind. The string comes from a file: it is a dictionary key and nothing else."""
    family = _families().get(peft_type)
    family = family or fallback.newer(peft_type)
    if family is None:
        near = difflib.get_close_matches(peft_type, known(), 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise AdapterRefused(f"adapters of kind {peft_type[:80]!r} are not served{hint} Known: {', '.join(known())}")
    return family


def serving(config: Mapping[str, Any], shapes: Shapes) -> Family:
    """The family that serves this config over this base: PEFT itself where no patch can. Raises AdapterRefused."""
    kind = str(config["peft_type"]).upper()
    if not shapes.by_peft and not (kind == "LORA" and fallback.is_grafted(config)):
        return find(kind)
    if (family := fallback.newer(kind)) is None:
        raise AdapterRefused(f"adapters of kind {kind[:80]!r} are not PEFT's; over this base only PEFT's are served")
    return family


def lane_of(spec: Spec, base: str) -> str:
    """The lane that serves an adapter over a base of this lane."""
    grafted = spec.family in (*fallback.KINDS, unipelt.NAME) or fallback.is_grafted(spec.config)
    return "peft" if grafted or spec.family not in known() else base


def slow(spec: Spec) -> bool:
    """Whether its compile reads base weights or needs an SVD, so that it must not hold up a plain LoRA."""
    family, config = find(spec.family), spec.config
    return family.slow or any(config.get(key) for key in READS_BASE) or config.get("init_lora_weights") in SUBTRACTED


def before_the_prompt(peft_type: str) -> bool:
    """Whether what it adds stands before the prompt (prefixes, soft prompts): then weights and folds mean nothing."""
    return bool(getattr(_families().get(peft_type), "before_the_prompt", False))


def virtual_tokens(spec: Spec) -> int:
    """Places that it takes before the prompt's."""
    own = getattr(_families().get(spec.family), "virtual_tokens", None)
    if own is not None:
        return int(own(spec.config))
    count = spec.config.get("num_virtual_tokens") if before_the_prompt(spec.family) else 0
    return count if isinstance(count, int) else 0


def tasks(spec: Spec) -> int:
    """How many tasks a request for this adapter chooses from by `task_id`; 0: the kind has none."""
    key = getattr(_families().get(spec.family), "tasks_key", None)
    count = key and spec.config.get(key, 1)
    return count if isinstance(count, int) else 0


def known() -> list[str]:
    """The kinds that are served, sorted. Raises PlugInBroken."""
    return sorted(_families())


@functools.cache
def _families() -> Mapping[str, Family]:
    found: dict[str, Family] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        declared = getattr(module, "FAMILIES", None) or filter(None, [getattr(module, "FAMILY", None)])
        found |= {family.name: family for family in declared}
    for point in sorted(importlib.metadata.entry_points(group=GROUP)):
        family = _plugged(point)
        if family.name in found:
            raise PlugInBroken(f"plug-in {point.value!r}: the kind {family.name!r} is served already; rename it")
        found[family.name] = family
    return found


def _plugged(point: importlib.metadata.EntryPoint) -> Family:
    """A family of another package. Its code is trusted as far as its installation was; its form is not."""
    owner = f" of {point.dist.name}" if point.dist else ""
    try:
        family: Family = point.load()
    except Exception as error:
        raise PlugInBroken(
            f"plug-in {point.value!r}{owner} cannot be imported ({error!r}): repair or uninstall it"
        ) from error
    wrong = [n for n in ("expected", "load") if not callable(getattr(family, n, None))]
    wrong += [] if isinstance(getattr(family, "slow", None), bool) else ["slow"]
    name = str(getattr(family, "name", ""))
    if wrong or not PEFT_TYPE.fullmatch(name) or name != name.upper():
        raise PlugInBroken(
            f"plug-in {point.value!r}{owner} names no family: it needs a name in capitals, slow, expected and load, as "
            f"families/base.py says{', and lacks ' + ', '.join(wrong) if wrong else ''}"
        )
    return family
