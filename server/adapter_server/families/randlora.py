"""RandLoRA (PEFT `tuners/randlora/`): a full-rank sum of random low ranks, each scaled by two vectors.

ΔW = s·Σⱼ Bⱼ Λⱼ A Γⱼ, transposed where the output is the narrow side      s = α/r
A [r, 1, narrow], B [wide, bases, r]: random, one for all modules and cut to each;  Λ [r, bases]  Γ [bases, narrow]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Family, Patch
from adapter_server.families.options import Config, as_number, flag
from adapter_server.families.parts import Expected, Taker
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping


class Bases(NamedTuple):
    A: Tensor
    B: Tensor


class RandLora(Wrapping):
    name = "RANDLORA"
    known = (TARGETS - {"exclude_modules"}) | {
        *("bias", "fan_in_fan_out", "init_weights", "projection_prng_key", "r", "randlora_alpha", "randlora_dropout"),
        *("save_projection", "sparse", "very_sparse"),
    }
    slow = True
    conv1d = True

    def shared(self, config: Config, wrapped: list[Wrapped]) -> Expected:
        """The bases, which PEFT writes once for the model and once more for each module."""
        if not flag({"save_projection": True, **config}, "save_projection"):
            raise AdapterRefused(
                "adapter_config.json: without 'save_projection' the random bases depend on the machine that drew them; "
                "save the adapter with its projections"
            )
        a, b = _shapes(wrapped)
        paths = ["base_model", *(f"base_model.model.{at.path}" for at in wrapped)]
        return {f"{path}.randlora_A": a for path in paths} | {f"{path}.randlora_B": b for path in paths}

    def tensors(self, at: Wrapped) -> Expected:
        r, bases = at.rank(default=32), _bases(at)
        return {"randlora_gamma": (bases, min(at.inp, at.out)), "randlora_lambda": (r, bases)}

    def common(self, config: Config, wrapped: list[Wrapped], take: Taker) -> Bases:
        return Bases(take("base_model.randlora_A"), take("base_model.randlora_B"))

    def patch(self, at: Wrapped, read: Reader, common: Bases) -> Patch:
        if not (torch.equal(read("randlora_A"), common.A) and torch.equal(read("randlora_B"), common.B)):
            raise AdapterRefused(f"{at.path}: its random bases differ from the model's; PEFT shares one pair")
        scaling = as_number(at.config.get("randlora_alpha", 640), "randlora_alpha") / at.rank(default=32)
        low = (read("randlora_lambda")[:, :, None] * common.A[:, :, : min(at.inp, at.out)]) * read("randlora_gamma")
        high = common.B[: max(at.inp, at.out), : _bases(at)]
        product = high.flatten(1) @ low.flatten(0, 1)  # [wide, narrow]
        return Patch(weight=read.weight() + scaling * (product if at.inp <= at.out else product.T))


def _bases(at: Wrapped) -> int:
    return -(-min(at.inp, at.out) // at.rank(default=32))


def _shapes(wrapped: list[Wrapped]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A's and B's, by the largest input and the largest output of all modules (PEFT `randlora/model.py`)."""
    r, sides = wrapped[0].rank(default=32), (max(at.inp for at in wrapped), max(at.out for at in wrapped))
    return (r, 1, min(sides)), (max(sides), -(-min(sides) // r), r)


FAMILY: Family = RandLora()
