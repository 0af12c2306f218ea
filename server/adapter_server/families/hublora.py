"""What AdapterHub's LoRA is: its options, its places in a block, its tensors, and the low ranks that they become.

y = W x + b + s·B A x      s = α / r
gated                      s is the mean of sigmoid(gate · x + c) over all tokens of a call, and α / r is left out

Where queries, keys and values are one Linear, each third that is trained has r rows of A, and a gate, of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Patch, Shapes
from adapter_server.families.bottleneck import Gate, left_out
from adapter_server.families.deltas import TensorFields
from adapter_server.families.options import Config, as_number, choice, flag, integer, name_list, refuse_set
from adapter_server.families.parts import Expected

KNOWN = frozenset(
    {
        "alpha", "architecture", "attn_matrices", "composition_mode", "dropout", "init_weights", "init_weights_seed",
        "intermediate_lora", "leave_out", "output_lora", "r", "selfattn_lora", "use_gating",
    }
)  # fmt: skip
REFUSED = {
    "dtype": "its tensors are computed in the adapters' format; train without",
    "use_dora": "the library's DoRA; train it with PEFT",
    "vera_b": "the library's VeRA; train it with PEFT",
    "vera_d": "the library's VeRA; train it with PEFT",
}
LETTERS = ("q", "k", "v")


@dataclass(frozen=True, slots=True, eq=False)
class GatedLowRank(TensorFields):
    """B (g ∘ A x), to be added to what a Linear gives."""

    A: Tensor  # [n·r, in]
    B: Tensor  # [out, n·r]
    gate: Gate | None = None  # n of them

    def term(self, x: Tensor) -> Tensor:
        """x [1, T, in], all tokens of the call → [1, T, out]."""
        inner = F.linear(x, self.A)
        if self.gate is not None:
            gates = self.gate.mean(x)
            inner = inner * gates.repeat_interleave(inner.shape[-1] // gates.shape[-1], -1)
        return F.linear(inner, self.B)


@dataclass(frozen=True, slots=True)
class Place:
    """A Linear that has a LoRA: its path, and the thirds of its output that are trained, where it is all three."""

    path: str
    thirds: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return len(self.thirds) or 1


@dataclass(frozen=True, slots=True)
class Lora:
    """The config, checked. `attention` holds the paths in a layer of q, k and v, or of the one Linear for all."""

    config: Config
    shapes: Shapes
    layers: str
    attention: tuple[str, ...]
    intermediate: str
    output: str

    def __post_init__(self) -> None:
        refuse_set(self.config, REFUSED)
        choice(self.config, "composition_mode", "add", ("add",))
        as_number(self.config.get("alpha", 8), "alpha")

    @property
    def gated(self) -> bool:
        return flag(self.config, "use_gating")

    @property
    def rank(self) -> int:
        return integer(self.config, "r", 8, most=1 << 14)

    @property
    def scaling(self) -> float:
        return 1.0 if self.gated else as_number(self.config.get("alpha", 8), "alpha") / self.rank

    def places(self) -> Iterator[Place]:
        out, inside = left_out(self.config), list(self._inside())
        for layer in range(self.shapes.layers):
            for path, thirds in inside if layer not in out else ():
                yield Place(f"{self.layers}.{layer}.{path}", thirds)

    def _inside(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        if flag({"selfattn_lora": True, **self.config}, "selfattn_lora"):
            matrices = self._matrices()
            if len(self.attention) == 1:
                yield self.attention[0], matrices
            else:
                yield from ((self.attention[i], ()) for i in matrices)
        if flag(self.config, "intermediate_lora"):
            yield self.intermediate, ()
        if flag(self.config, "output_lora"):
            yield self.output, ()

    def _matrices(self) -> tuple[int, ...]:
        given = name_list(self.config, "attn_matrices") if "attn_matrices" in self.config else ["q", "v"]
        if not given or not set(given) <= set(LETTERS):
            raise AdapterRefused("adapter_config.json: 'attn_matrices' must name some of q, k and v, and no other")
        return tuple(i for i, letter in enumerate(LETTERS) if letter in given)

    def expected(self, place: Place, at: str) -> Expected:
        """The tensors of one Linear, whose names begin with `at`."""
        shape, n = self.shapes.modules[place.path], place.count
        out = shape.out // 3 * n if place.thirds else shape.out
        found: Expected = {f"{at}lora_A": (n * self.rank, shape.inp), f"{at}lora_B": (out, self.rank)}
        return found | Gate.expected(f"{at}gate.", n, shape.inp) if self.gated else found

    def patch(self, place: Place, at: str, take: Callable[[str], Tensor]) -> Patch:
        """An ungated one, in the normal form."""
        low = self.low_rank(place, at, take)
        return Patch(A=low.A, B=low.B)

    def low_rank(self, place: Place, at: str, take: Callable[[str], Tensor]) -> GatedLowRank:
        A, B = take(f"{at}lora_A"), take(f"{at}lora_B") * self.scaling
        if place.thirds:
            wide = torch.zeros(3, self.shapes.modules[place.path].out // 3, A.shape[0])
            for i, (third, part) in enumerate(zip(place.thirds, B.chunk(place.count), strict=True)):
                wide[third, :, i * self.rank : (i + 1) * self.rank] = part
            B = wide.flatten(0, 1)
        return GatedLowRank(A, B, Gate.read(f"{at}gate.", take) if self.gated else None)
