"""Stored compositions: one new adapter out of several, by PEFT's own `add_weighted_adapter`.

Nothing of a file's patterns reaches PEFT: the modules that an adapter names are resolved here and given by their paths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from adapter_server.core import Spec
from adapter_server.errors import InvalidRequest
from adapter_server.families.base import Shapes
from adapter_server.families.facts import describe
from adapter_server.families.lora_variants import SUBTRACTED
from adapter_server.families.options import Config, table
from adapter_server.families.targets import by_pattern, suffix_or_pattern, targeted

PLAIN = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
BY = (*PLAIN, "cat", "svd", *(f"{kind}_svd" for kind in PLAIN[1:]))
SAME_RANK = frozenset(PLAIN)
# What PEFT leaves out of the sum without a word, or scales wrongly.
LEFT_OUT = (
    "alora_invocation_tokens", "arrow_config", "lora_bias", "modules_to_save", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora",
)  # fmt: skip
SEED = 0  # of the numbers that dare drops
OUT = "composed"


@dataclass(frozen=True, slots=True)
class Part:
    """An adapter of the sum, its tensors checked."""

    spec: Spec
    tensors: Mapping[str, Tensor]
    weight: float


@dataclass(frozen=True, slots=True)
class Way:
    """How the parts are put together."""

    by: str
    density: float | None = None
    rank: int | None = None


def compose(parts: Sequence[Part], way: Way, module: nn.Module) -> tuple[bytes, bytes]:
    """The new adapter's config and weights, as PEFT saves them. `module` is the base, and is spoilt.

    Raises InvalidRequest where PEFT cannot, or would leave something out.
    """
    _check(parts, way)
    shapes = describe(module)
    configs = [_config(part.spec, shapes) for part in parts]
    try:
        return _by_peft(parts, way, configs, module)
    except ValueError as error:
        raise InvalidRequest(f"PEFT cannot compose these: {error}", param="by") from error


def _check(parts: Sequence[Part], way: Way) -> None:
    kinds = {part.spec.family for part in parts}
    if way.by not in BY:
        raise InvalidRequest(f"by must be one of {', '.join(BY)}", param="by")
    if len(kinds) > 1 or not kinds <= {"LORA", "IA3"}:
        raise InvalidRequest(f"PEFT composes LoRAs, or (IA)³s, not {', '.join(sorted(kinds))}", param="adapter")
    if kinds == {"IA3"} and way.by != "linear":
        raise InvalidRequest("(IA)³ composes linearly alone: leave --by out", param="by")
    if (way.density is None) == any(word in way.by for word in ("ties", "dare", "prune")):
        raise InvalidRequest("a density goes with ties, dare and magnitude_prune, and with no other", param="density")
    if way.density is not None and not 0 < way.density <= 1:
        raise InvalidRequest("density is the share that is kept: above 0, at most 1", param="density")
    for part in parts:
        _check_config(part.spec)


def _check_config(spec: Spec) -> None:
    config = spec.config
    lost = [key for key in LEFT_OUT if config.get(key)]
    lost += ["bias"] if config.get("bias") not in (None, "none") else []
    lost += ["init_lora_weights"] if config.get("init_lora_weights") in SUBTRACTED else []
    if lost:
        raise InvalidRequest(
            f"{spec.name!r} has {lost[0]!r}, which PEFT leaves out of a composition or scales wrongly: name the "
            "adapters with their weights in a request instead",
            param="adapter",
        )


def _config(spec: Spec, shapes: Shapes) -> dict[str, Any]:
    """What PEFT is told of an adapter: where it is, and how strong, all by whole paths."""
    config, paths = spec.config, targeted(spec.config, shapes)
    transposed = any(shapes.modules[path].kind == "conv1d" for path in paths)
    if spec.family == "IA3":
        scales_input = suffix_or_pattern(config, "feedforward_modules")
        return {
            "target_modules": paths,
            "feedforward_modules": [path for path in paths if scales_input(path)],
            "fan_in_fan_out": transposed,
        }
    return {
        "r": config.get("r", 8),
        "lora_alpha": config.get("lora_alpha", 8),
        "target_modules": paths,
        "rank_pattern": _by_path(config, "rank_pattern", paths),
        "alpha_pattern": _by_path(config, "alpha_pattern", paths),
        "fan_in_fan_out": transposed,
    }


def _by_path(config: Config, key: str, paths: Sequence[str]) -> dict[str, Any]:
    """A table of patterns, as one of whole paths."""
    found = by_pattern(config, key, table(config, key), None)
    return {re.escape(path): value for path in paths if (value := found(path)) is not None}


def _by_peft(
    parts: Sequence[Part], way: Way, configs: Sequence[Mapping[str, Any]], module: nn.Module
) -> tuple[bytes, bytes]:
    import peft

    kind: Any = peft.LoraConfig if parts[0].spec.family == "LORA" else peft.IA3Config
    names = [f"part{i}" for i in range(len(parts))]
    whole = [kind(**config, task_type="CAUSAL_LM") for config in configs]
    model: Any = peft.get_peft_model(module, whole[0], adapter_name=names[0])
    for name, config in zip(names[1:], whole[1:], strict=True):
        model.add_adapter(name, config)
    for name, part in zip(names, parts, strict=True):
        peft.set_peft_model_state_dict(model, dict(part.tensors), adapter_name=name)
    weights = [part.weight for part in parts]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model.base_model.add_weighted_adapter(names, weights, OUT, **_options(parts[0].spec.family, way))
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=[OUT], save_embedding_layers=False)
        saved = Path(folder) / OUT
        return (saved / "adapter_config.json").read_bytes(), (saved / "adapter_model.safetensors").read_bytes()


def _options(family: str, way: Way) -> dict[str, Any]:
    if family == "IA3":
        return {}
    return {"combination_type": way.by, "density": way.density, "svd_rank": way.rank}
