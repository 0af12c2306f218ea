"""LoKr (PEFT `tuners/lokr/layer.py`): a Kronecker product, each factor whole or itself a low rank.

ΔW = s·w₁ ⊗ w₂      s = α/r      w₁ = L₁R₁, w₂ = L₂R₂ where they are low ranks
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Family, Patch
from adapter_server.families.deltas import Kronecker
from adapter_server.families.options import as_number, flag, integer
from adapter_server.families.parts import Expected
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping


class LoKr(Wrapping):
    name = "LOKR"
    known = TARGETS | {
        *("alpha", "alpha_pattern", "decompose_both", "decompose_factor", "init_weights", "module_dropout", "r"),
        *("rank_dropout", "rank_dropout_scale", "rank_pattern", "use_effective_conv2d"),
    }
    patterns = {"alpha_pattern": "alpha", "rank_pattern": "r"}  # noqa: RUF012

    def tensors(self, at: Wrapped) -> Expected:
        keys: Expected = {}
        for name, ((out, inp), whole) in _factors(at).items():
            low = {f"lokr_{name}_a": (out, at.rank()), f"lokr_{name}_b": (at.rank(), inp)}
            keys |= {f"lokr_{name}": (out, inp)} if whole else low
        return keys

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        scaling = as_number(at.config.get("alpha", 8), "alpha") / at.rank()
        (left, left_in), (right, right_in) = (_read(read, name, whole) for name, (_, whole) in _factors(at).items())
        return Patch(delta=Kronecker(scaling * left, right, left_in, right_in))


def _factors(at: Wrapped) -> dict[str, tuple[tuple[int, int], bool]]:
    """{w1, w2: (its shape, whether the file holds it whole)}."""
    factor = integer(at.config, "decompose_factor", -1, least=-1)
    if factor == 0:
        raise AdapterRefused("adapter_config.json: 'decompose_factor' must be -1 or positive")
    (i1, i2), (o1, o2), r = _factorised(at.inp, factor), _factorised(at.out, factor), at.rank()
    first = not (flag(at.config, "decompose_both") and 2 * r < max(o1, i1))
    return {"w1": ((o1, i1), first), "w2": ((o2, i2), 2 * r >= max(o2, i2))}


def _factorised(dimension: int, factor: int) -> tuple[int, int]:
    """The two factors nearest to each other, the smaller no larger than `factor` (PEFT `lokr/layer.py`)."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    most = dimension if factor == -1 else factor
    least = max(m for m in range(1, min(most, int(dimension**0.5)) + 1) if dimension % m == 0)
    return least, dimension // least


def _read(read: Reader, name: str, whole: bool) -> tuple[Tensor, Tensor | None]:
    """A factor, or its two halves."""
    if whole:
        return read(f"lokr_{name}"), None
    return read(f"lokr_{name}_a"), read(f"lokr_{name}_b")


FAMILY: Family = LoKr()
