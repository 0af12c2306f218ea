"""FRoD (PEFT `tuners/frod/`): the base's weights of one kind in a common basis V, their coordinates trained.

W' = U (S + diag λ) Vᵀ      W V⁻ᵀ = U diag(‖·‖), unit columns;  S [in,in] sparse;  λ [in]  V [in,in], one per category
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Family, Patch
from adapter_server.families.options import Config, as_number, flag
from adapter_server.families.parts import Expected, Integers, Taker
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping


class Basis(NamedTuple):
    V: Tensor  # [in, in]
    places: Tensor  # [2, n] of S


class Frod(Wrapping):
    name = "FROD"
    known = (TARGETS - {"exclude_modules"}) | {
        *("bias", "fan_in_fan_out", "frod_dropout", "init_weights", "progressbar", "projection_prng_key"),
        *("regularization_alpha", "runtime_offload_base_weight", "save_projection", "sparse_rate"),
    }
    slow = True
    conv1d = True

    def tensors(self, at: Wrapped) -> Expected:
        return {"frod_lambda_l": (at.inp,), "frod_lambda_s_values": (_count(at),)}

    def shared(self, config: Config, wrapped: list[Wrapped]) -> Expected:
        if not flag({"save_projection": True, **config}, "save_projection"):
            raise AdapterRefused(
                "adapter_config.json: without 'save_projection' the bases are found again from all layers; save the "
                "adapter with its projections"
            )
        keys: Expected = {}
        for category, at in _categories(wrapped).items():
            keys[f"base_model.frod_V.{category}"] = (at.inp, at.inp)
            keys[f"base_model.frod_s_indices.{category}"] = Integers((2, _count(at)))
            keys[f"base_model.frod_s_size.{category}"] = Integers((2,))
        return keys

    def common(self, config: Config, wrapped: list[Wrapped], take: Taker) -> dict[str, Basis]:
        return {category: _basis(category, at.inp, take) for category, at in _categories(wrapped).items()}

    def patch(self, at: Wrapped, read: Reader, common: dict[str, Basis]) -> Patch:
        V, (rows, columns) = common[_category(at.path)]
        S = torch.diag(read("frod_lambda_l")).index_put((rows, columns), read("frod_lambda_s_values"), accumulate=True)
        return Patch(weight=_directions(V, read.weight()) @ S @ V.T)


def _category(path: str) -> str:
    """Modules of the same name in all layers share a basis (PEFT `frod/model.py`, `_category_from_key`)."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    last = f"{parts[-2]}_{parts[-1]}"
    return "attention_output" if last == "output_dense" and parts[-3:-2] == ["attention"] else last


def _categories(wrapped: list[Wrapped]) -> dict[str, Wrapped]:
    """Each category with one of its modules; all have the same input."""
    found: dict[str, Wrapped] = {}
    for at in wrapped:
        if found.setdefault(_category(at.path), at).inp != at.inp:
            raise AdapterRefused(f"{at.path} has another width than its namesakes; FRoD gives them one basis")
    return found


def _count(at: Wrapped) -> int:
    """Numbers off the diagonal that are trained."""
    rate, most = as_number(at.config.get("sparse_rate", 0.01), "sparse_rate"), at.inp * (at.inp - 1)
    if not 0 < rate <= 1 or not most:
        raise AdapterRefused("adapter_config.json: 'sparse_rate' must be above 0 and at most 1")
    return max(1, min(int(at.inp * at.inp * rate), most))


def _basis(category: str, inp: int, take: Taker) -> Basis:
    if take.integers(f"base_model.frod_s_size.{category}", inp + 1).tolist() != [inp, inp]:
        raise AdapterRefused(f"tensor 'base_model.frod_s_size.{category}' must be {inp}, {inp}")
    return Basis(take(f"base_model.frod_V.{category}"), take.integers(f"base_model.frod_s_indices.{category}", inp))


def _directions(V: Tensor, W: Tensor) -> Tensor:
    """U [out, in] of unit columns (PEFT `frod/layer.py`, `_calculate_frod_u_and_lambda`)."""
    try:
        both = torch.linalg.solve(V.double(), W.double().T).T
    except RuntimeError:  # singular
        both = W.double() @ torch.linalg.pinv(V.double(), rtol=1e-6).T
    norms = both.norm(dim=0)
    return torch.where(norms > 1e-12, both / norms, 0.0).float()


FAMILY: Family = Frod()
