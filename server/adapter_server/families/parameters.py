"""LoRA on bare parameters, `target_parameters` (PEFT `lora/layer.py`, class ParamWrapper; `tuners_utils.py`).

experts [E,out,in], or [E,in,out] where stored transposed:  y_e = W_e x + s·B_e (A_e x)
    A_e = A.view(E,r,in)[e]      B_e = B.view(out,r,E)[:,:,e]      the file: A [r·E,in]  B [out,r·E]
a matrix [n,m] as stored:  W + s·B A      A [r,m]  B [n,r]

PEFT wraps a module once for each of its parameters, the first innermost: `base_layer` in a name counts how deep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import AnyPatch, Base, EmbeddingPatch, ParamPatch, Patch, Shapes
from adapter_server.families.options import Config, name_list
from adapter_server.families.parts import ROOT, Expected, Taker

TARGETS = "target_parameters"
EXPERTS = ("experts", "experts_transposed")

Factors = tuple[Tensor, Tensor]  # A [E,r,in] and s·B [E,out,r]; of a matrix A [r,m] and s·B [n,r]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertsPatch:
    """Low ranks of single experts, beside weights that are never copied: a token's experts run on the base's.

    The module's conventions are those of transformers' experts interface (`integrations/moe.py`).
    """

    factors: Mapping[str, Factors]  # by the parameter's name
    transposed: bool  # weights stored [E, in, out]

    @property
    def rank(self) -> int:
        return max(A.shape[1] for A, _ in self.factors.values())

    def apply(self, x: Tensor, module: nn.Module, *more: Tensor) -> Tensor:
        """x [T, hidden], `more` the experts chosen [T, k] and their shares [T, k] → [T, hidden]."""
        own: Any = module
        chosen, shares = more
        y = torch.zeros_like(x)
        for e in set(chosen.flatten().tolist()):
            if e >= own.num_experts:  # nobody's, where experts are spread over devices
                continue
            token, place = torch.where(chosen == e)
            up = self._product(x[token], own, "gate_up_proj" if own.has_gate else "up_proj", e)
            h = self._product(own._apply_gate(up) if own.has_gate else own.act_fn(up), own, "down_proj", e)
            h = own.post_expert_norm(h) if own.has_post_expert_norm else h
            y.index_add_(0, token, (h * shares[token, place, None]).to(y.dtype))
        return y

    def _product(self, x: Tensor, module: Any, name: str, e: int) -> Tensor:
        W = getattr(module, name)[e]
        y = x @ W if self.transposed else F.linear(x, W)
        y = y + getattr(module, f"{name}_bias")[e] if module.has_bias else y
        if name not in self.factors:
            return y
        A, B = self.factors[name]
        return y + F.linear(F.linear(x, A[e]), B[e])

    def fold(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        folded = {name: p.float().clone() for name, p in params.items()}
        for name, (A, B) in self.factors.items():
            delta = B.float() @ A.float()  # [E, out, in]
            folded[name] += delta.mT if self.transposed else delta
        return folded

    def tensors(self) -> Iterator[Tensor]:
        for pair in self.factors.values():
            yield from pair

    def to(self, device: torch.device, dtype: torch.dtype) -> ExpertsPatch:
        moved = {name: (A.to(device, dtype), B.to(device, dtype)) for name, (A, B) in self.factors.items()}
        return ExpertsPatch(moved, self.transposed)


@dataclass(frozen=True, slots=True)
class Target:
    """One parameter: its module, its shape as stored, and where the file has its factors."""

    module: str
    name: str
    shape: tuple[int, ...]
    transposed: bool
    key: str  # what stands before "lora_A.weight"
    rank: int
    scaling: float

    @property
    def experts(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def widths(self) -> tuple[int, int]:
        """(in, out) of the factors."""
        *_, rows, columns = self.shape
        return (rows, columns) if self.transposed else (columns, rows)

    def factors(self, take: Taker) -> Factors:
        A, B = take(self.key + "lora_A.weight"), take(self.key + "lora_B.weight") * self.scaling
        if len(self.shape) == 2:
            return A, B
        out, E = len(B), self.experts
        return A.view(E, self.rank, -1), B.view(out, self.rank, E).permute(2, 0, 1).contiguous()


def targets(config: Config, shapes: Shapes, low: Callable[[str], tuple[int, float]]) -> list[Target]:
    """The parameters that the config names, in the base's order; `low` says rank and scaling by full name."""
    wanted = name_list(config, TARGETS)
    ends = tuple(f".{name}" for name in wanted)
    found: list[Target] = []
    for path, module in shapes.modules.items():
        names = [name for name in module.params if f".{path}.{name}".endswith(ends)]
        for depth, name in enumerate(reversed(names)):
            _check(path, name, shapes)
            key, low_rank = f"{ROOT}{path}." + "base_layer." * depth, low(f"{path}.{name}")
            found.append(Target(path, name, module.params[name], module.kind == EXPERTS[1], key, *low_rank))
    if wanted and not found:
        raise AdapterRefused(f"adapter_config.json: '{TARGETS}' matches no parameter of this base")
    return found


def expected(found: Sequence[Target]) -> Expected:
    keys: Expected = {}
    for target in found:
        (inp, out), many = target.widths, target.rank * target.experts
        keys |= {target.key + "lora_A.weight": (many, inp), target.key + "lora_B.weight": (out, many)}
    return keys


def patches(found: Sequence[Target], take: Taker, base: Base) -> dict[str, AnyPatch]:
    """One patch per module, with the low ranks of all its parameters."""
    by_module: dict[str, dict[str, Factors]] = {}
    for target in found:
        by_module.setdefault(target.module, {})[target.name] = target.factors(take)
    return {path: _patch(path, factors, base) for path, factors in by_module.items()}


def _patch(path: str, factors: Mapping[str, Factors], base: Base) -> AnyPatch:
    kind = base.shapes.modules[path].kind
    if kind in EXPERTS:
        return ExpertsPatch(factors, kind == EXPERTS[1])
    if kind == "other":  # a router: small, and what it gives is no sum
        return ParamPatch({name: base.param(path, name) + B @ A for name, (A, B) in factors.items()})
    A, B = factors["weight"]
    if kind == "embedding":
        return EmbeddingPatch(B.T.contiguous(), A.T.contiguous(), scale=base.shapes.scaled_embeddings.get(path, 1.0))
    return Patch(A=A, B=B) if kind == "linear" else Patch(A=B.T.contiguous(), B=A.T.contiguous())


def _check(path: str, name: str, shapes: Shapes) -> None:
    module = shapes.modules[path]
    if len(module.params[name]) != (3 if module.kind in EXPERTS else 2):
        raise AdapterRefused(
            f"adapter_config.json: '{TARGETS}' names {path}.{name}, which has {len(module.params[name])} dimensions; "
            "served are matrices, and the weights of experts in transformers' experts interface"
        )
