"""VeRA and PVeRA (PEFT `tuners/vera/`, `tuners/pvera/`): vectors around random matrices that all modules share.

y = W x + b + λ_b ∘ B[:out] (λ_d ∘ A[:, :in] x)      A [r, widest in]  B [widest out, r]
PVeRA: A and λ_d hold means, then variances; at inference the means alone
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_server.families.base import Family, Patch
from adapter_server.families.deltas import Scaled
from adapter_server.families.options import Config, flag, integer
from adapter_server.families.parts import Expected, Taker
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping

SHARED = (TARGETS - {"exclude_modules"}) | {
    *("bias", "d_initial", "fan_in_fan_out", "init_weights", "projection_prng_key", "r", "save_projection"),
}


@dataclass(frozen=True, slots=True)
class Projection:
    A: Tensor  # [r, widest in]
    B: Tensor  # of the widest out, in blocks of columns


class Vera(Wrapping):
    name = "VERA"
    known = SHARED | {"vera_dropout"}
    conv1d = True
    prefix, times = "vera", 1  # of the tensors' names; rows of A and λ_d per rank

    def tensors(self, at: Wrapped) -> Expected:
        return {f"{self.prefix}_lambda_b": (at.out,), f"{self.prefix}_lambda_d": (self.times * _rank(at),)}

    def shared(self, config: Config, wrapped: list[Wrapped]) -> Expected:
        if not _saved(config):
            return {}
        a, b = self._shapes(wrapped)
        return {f"base_model.{self.prefix}_A": a, f"base_model.{self.prefix}_B": b}

    def common(self, config: Config, wrapped: list[Wrapped], take: Taker) -> Projection:
        if _saved(config):
            A, B = take(f"base_model.{self.prefix}_A"), take(f"base_model.{self.prefix}_B")
            return Projection(A, Scaled.blocks(B))
        generator = torch.Generator().manual_seed(seed(config, "projection_prng_key", 0))
        a, b = self._shapes(wrapped)
        A, B = _kaiming(a, generator), _kaiming(b, generator)
        return Projection(A, Scaled.blocks(B))

    def patch(self, at: Wrapped, read: Reader, common: Projection) -> Patch:
        b, d = read(f"{self.prefix}_lambda_b"), read(f"{self.prefix}_lambda_d")[: _rank(at)]
        return Patch(delta=Scaled.within(common.A, d, common.B, b, at.inp))

    def _shapes(self, wrapped: list[Wrapped]) -> tuple[tuple[int, int], tuple[int, int]]:
        r = _rank(wrapped[0])
        return (self.times * r, max(at.inp for at in wrapped)), (max(at.out for at in wrapped), r)


class Pvera(Vera):
    name = "PVERA"
    known = SHARED | {"generator_seed", "pvera_dropout", "sample_at_inference"}
    prefix, times = "pvera", 2
    refused = {"sample_at_inference": "answers would be random; save the config with false"}  # noqa: RUF012


def seed(config: Config, key: str, default: int) -> int:
    return integer(config, key, default, least=0, most=(1 << 63) - 1)


def _rank(at: Wrapped) -> int:
    return at.rank(default=256)


def _saved(config: Config) -> bool:
    return flag({"save_projection": True, **config}, "save_projection")


def _kaiming(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """PEFT's `_kaiming_init`, fan in: the same numbers from the same seed."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


FAMILIES: tuple[Family, ...] = (Vera(), Pvera())
