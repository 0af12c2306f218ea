"""Uni-LoRA (PEFT `tuners/unilora/`): every number of every factor is one of d shared ones, drawn from a seed.

A = θ[i_A] ∘ s_A      B = θ[i_B] ∘ s_B      s = 1/√(how often θ's number is used)      θ [d]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Family, Patch
from adapter_server.families.options import Config, flag, integer
from adapter_server.families.parts import Expected, Integers, Taker
from adapter_server.families.vera import seed
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping

MAX_NUMBERS = 1 << 27  # of all factors: each is drawn from one list of this length


@dataclass(frozen=True, slots=True)
class Shared:
    theta: Tensor  # [d]
    indices: list[Tensor]  # A's and B's of each module in turn; empty where the file holds them
    scales: Tensor  # [d]


class UniLora(Wrapping):
    name = "UNILORA"
    known = (TARGETS - {"exclude_modules"}) | {
        *("bias", "fan_in_fan_out", "init_theta_d_bound", "init_weights", "proj_seed", "r", "save_indices"),
        *("theta_d_length", "unilora_dropout"),
    }
    conv1d = True

    def tensors(self, at: Wrapped) -> Expected:
        if not flag(at.config, "save_indices"):
            return {}
        a, b = _shapes(at)
        indices = {"unilora_indices_A": Integers(a), "unilora_indices_B": Integers(b)}
        return indices | {"unilora_scales_A": a, "unilora_scales_B": b}

    def shared(self, config: Config, wrapped: list[Wrapped]) -> Expected:
        count = sum(r * n for at in wrapped for r, n in _shapes(at))
        if count > MAX_NUMBERS:
            raise AdapterRefused(f"adapter_config.json: 'r' makes {count:,} numbers, allowed are {MAX_NUMBERS:,}")
        return {"base_model.unilora_theta_d": (_length(config),)}

    def common(self, config: Config, wrapped: list[Wrapped], take: Taker) -> Shared:
        theta = take("base_model.unilora_theta_d")
        if flag(config, "save_indices"):
            return Shared(theta, [], theta)
        counts = [r * n for at in wrapped for r, n in _shapes(at)]
        indices = _drawn(sum(counts), len(theta), seed(config, "proj_seed", 42))
        return Shared(theta, list(torch.split(indices, counts)), _scales(indices, len(theta)))

    def patch(self, at: Wrapped, read: Reader, common: Shared) -> Patch:
        if not common.indices:
            ia, ib = (read.integers(f"unilora_indices_{x}", len(common.theta)) for x in "AB")
            sa, sb = (read(f"unilora_scales_{x}") for x in "AB")
        else:
            ia, ib = (common.indices[2 * at.index + x].view(shape) for x, shape in enumerate(_shapes(at)))
            sa, sb = common.scales[ia], common.scales[ib]
        return Patch(A=common.theta[ia] * sa, B=common.theta[ib] * sb)


def _shapes(at: Wrapped) -> tuple[tuple[int, int], tuple[int, int]]:
    r = at.rank(default=4)
    return (r, at.inp), (at.out, r)


def _length(config: Config) -> int:
    return integer(config, "theta_d_length", 256, most=1 << 28)


def _drawn(count: int, length: int, proj_seed: int) -> Tensor:
    """PEFT's `UniLoraModel.generate_index`: each of θ's numbers equally often, shuffled."""
    rng = np.random.default_rng(proj_seed)
    drawn = np.repeat(np.arange(length), count // length)
    if count % length:
        drawn = np.concatenate([drawn, rng.choice(length, size=count % length, replace=False)])
    rng.shuffle(drawn)
    return torch.as_tensor(drawn, dtype=torch.long)


def _scales(indices: Tensor, length: int) -> Tensor:
    counts = torch.bincount(indices, minlength=length).float()
    return torch.where(counts > 0, counts.rsqrt(), 0.0)


FAMILY: Family = UniLora()
