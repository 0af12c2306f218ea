"""RoAd (PEFT `tuners/road/layer.py`): outputs, bias included, turned and stretched in pairs.

y = c₁ ∘ z + c₂ ∘ turn(z)      z = W x + b;  in each group of g: turn(z₁, z₂) = (−z₂, z₁), halves of the group
c₁ = α cos θ,  c₂ = α sin θ      road_1: one θ, α per pair;  road_2: per output;  road_4: of their own for c₁ and c₂
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Family, Patch
from adapter_server.families.deltas import Mirror
from adapter_server.families.options import choice, integer
from adapter_server.families.parts import Expected
from adapter_server.families.wrapping import NARROW, Reader, Wrapped, Wrapping

NUMBERS = {"road_1": (1, 2), "road_2": (1, 1), "road_4": (2, 1)}  # of θ, for each output: a fraction


class Road(Wrapping):
    name = "ROAD"
    known = NARROW | {"group_size", "init_weights", "variant"}

    def tensors(self, at: Wrapped) -> Expected:
        many, few = NUMBERS[_variant(at)]
        _group(at)
        return dict.fromkeys(("road_alpha", "road_theta"), (at.out * many // few,))

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        group = _group(at)
        c1, c2 = _columns(_variant(at), group, read("road_theta"), read("road_alpha"))
        first, second = torch.arange(at.out).view(-1, 2, group // 2).unbind(1)
        partner = torch.stack((second, first), 1).flatten()
        sign = torch.stack((-torch.ones_like(first), torch.ones_like(second)), 1).flatten()
        return Patch(out_scale=c1, mirror=Mirror(partner, sign * c2))


def _variant(at: Wrapped) -> str:
    return choice(at.config, "variant", "road_1", NUMBERS)


def _group(at: Wrapped) -> int:
    group = integer(at.config, "group_size", 64)
    at.parts(at.out, group, "group_size")
    if group % 2:
        raise AdapterRefused("adapter_config.json: 'group_size' must be even")
    return group


def _columns(variant: str, group: int, theta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """c₁ and c₂, [out]."""
    if variant == "road_4":
        (t1, t2), (a1, a2) = (v.view(-1, 2, group).unbind(1) for v in (theta, alpha))
        return (a1 * t1.cos()).flatten(), (a2 * t2.sin()).flatten()
    if variant == "road_1":
        theta, alpha = (v.view(-1, group // 2).repeat_interleave(2, dim=0).flatten() for v in (theta, alpha))
    return alpha * theta.cos(), alpha * theta.sin()


FAMILY: Family = Road()
