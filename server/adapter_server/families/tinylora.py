"""TinyLoRA (PEFT `tuners/tinylora/`): the base's own singular directions, steered by a handful of shared numbers.

y = W x + b + B R A x      R = Σᵢ vᵢ Pᵢ      A [r,in]  B [out,r]  P [u,r,r] random  v [u], one per group of modules
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Family, Patch
from adapter_server.families.options import Config, as_number, flag, integer
from adapter_server.families.parts import Expected, Taker
from adapter_server.families.vera import seed
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping

MAX_PROJECTION = 1 << 26  # numbers in one module's P


@dataclass(frozen=True, slots=True)
class Vectors:
    of: list[str]  # each module's key
    by_key: dict[str, Tensor]


class TinyLora(Wrapping):
    name = "TINYLORA"
    known = (TARGETS - {"exclude_modules"}) | {
        *("bias", "fan_in_fan_out", "init_v_bound", "init_weights", "projection_seed", "r", "save_projection"),
        *("tinylora_dropout", "u", "weight_tying"),
    }
    conv1d = True

    def tensors(self, at: Wrapped) -> Expected:
        r, u = _sizes(at)
        factors: Expected = {"tinylora_A": (r, at.inp), "tinylora_B": (at.out, r)}
        return factors | ({"tinylora_P": (u, r, r)} if _saved(at.config) else {})

    def shared(self, config: Config, wrapped: list[Wrapped]) -> Expected:
        return {key: (_sizes(wrapped[0])[1],) for key in _keys(config, len(wrapped))}

    def common(self, config: Config, wrapped: list[Wrapped], take: Taker) -> Vectors:
        of = _keys(config, len(wrapped))
        return Vectors(of, {key: take(key) for key in dict.fromkeys(of)})

    def patch(self, at: Wrapped, read: Reader, common: Vectors) -> Patch:
        P = read("tinylora_P") if _saved(at.config) else _projection(at)
        R = torch.einsum("u,ujk->jk", common.by_key[common.of[at.index]], P)
        return Patch(A=read("tinylora_A"), B=read("tinylora_B") @ R)


def _sizes(at: Wrapped) -> tuple[int, int]:
    r, u = min(at.rank(default=2), at.inp, at.out), integer(at.config, "u", 64)
    if u * r * r > MAX_PROJECTION:
        raise AdapterRefused(f"adapter_config.json: 'u' {u} and 'r' {r} make projections beyond {MAX_PROJECTION:,}")
    return r, u


def _keys(config: Config, modules: int) -> list[str]:
    """Which shared vector each module uses: neighbours share one, as 'weight_tying' says."""
    tying = as_number(config.get("weight_tying", 0.0), "weight_tying")
    if not 0 <= tying <= 1:
        raise AdapterRefused("adapter_config.json: 'weight_tying' must be in 0..1")
    groups = max(1, round(modules * (1.0 - tying)))
    size = max(1, modules // groups)
    return [f"base_model.tinylora_v.{min(i // size, groups - 1)}" for i in range(modules)]


def _saved(config: Config) -> bool:
    return flag({"save_projection": True, **config}, "save_projection")


def _projection(at: Wrapped) -> Tensor:
    """The same numbers from the same seed (PEFT `tinylora/layer.py`, `_init_projection`)."""
    r, u = _sizes(at)
    generator = torch.Generator().manual_seed(seed(at.config, "projection_seed", 42) + at.index)
    return torch.normal(mean=0.0, std=1.0 / r**0.5, size=(u, r, r), generator=generator)


FAMILY: Family = TinyLora()
