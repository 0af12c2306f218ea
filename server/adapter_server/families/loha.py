"""LoHa (PEFT `tuners/loha/layer.py`): the Hadamard product of two low ranks is one of rank r² (Khatri–Rao).

ΔW = s·(w1a w1b) ∘ (w2a w2b)       s = α/r
A[(j,k), :] = w1b[j, :] ∘ w2b[k, :]      B[:, (j,k)] = s·w1a[:, j] ∘ w2a[:, k]
"""

from __future__ import annotations

from typing import Any

from adapter_server.families.base import Family, Patch
from adapter_server.families.options import as_number
from adapter_server.families.parts import Expected
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping, low_rank


class LoHa(Wrapping):
    name = "LOHA"
    known = TARGETS | {
        *("alpha", "alpha_pattern", "init_weights", "module_dropout", "r", "rank_dropout", "rank_pattern"),
        "use_effective_conv2d",
    }
    slow = True
    patterns = {"alpha_pattern": "alpha", "rank_pattern": "r"}  # noqa: RUF012

    def tensors(self, at: Wrapped) -> Expected:
        a, b = (at.out, at.rank()), (at.rank(), at.inp)
        return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        scaling = as_number(at.config.get("alpha", 8), "alpha") / at.rank()
        a1, b1, a2, b2 = (read(f"hada_w{name}") for name in ("1_a", "1_b", "2_a", "2_b"))
        if 2 * at.rank() ** 2 > min(at.inp, at.out):
            return Patch(weight=read.weight() + scaling * (a1 @ b1) * (a2 @ b2))
        A = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)  # [r², in]
        B = (a1[:, :, None] * a2[:, None, :]).flatten(1, 2)  # [out, r²]
        return low_rank(A, scaling * B, read)


FAMILY: Family = LoHa()
