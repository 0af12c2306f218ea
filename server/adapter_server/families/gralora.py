"""GraLoRA (PEFT `tuners/gralora/layer.py`): k × k blocks of a low rank each, and a plain one over all.

block (i → j), s < r/k:   A'[(i,j,s), i-th part of in] = A[i, :, j·r/k + s]      A [k, in/k, r]
                          B'[j-th part of out, (i,j,s)] = B[j, i·r/k + s, :]      B [k, r, out/k]
y = W x + b + s·(B' A' + B_general A_general) x        s = α / (r + hybrid_r)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapter_server.families.base import Family, Patch
from adapter_server.families.options import as_number, integer
from adapter_server.families.parts import Expected
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping, low_rank


class GraLora(Wrapping):
    name = "GRALORA"
    known = (TARGETS - {"exclude_modules"}) | {
        *("alpha", "bias", "fan_in_fan_out", "gralora_dropout", "gralora_k", "hybrid_r", "init_weights", "r"),
    }
    slow = True
    conv1d = True

    def tensors(self, at: Wrapped) -> Expected:
        r, k, hybrid = _ranks(at)
        inp, out = at.parts(at.inp, k, "gralora_k"), at.parts(at.out, k, "gralora_k")
        blocks: Expected = {"gralora_A": (k, inp, r), "gralora_B": (k, r, out)}
        if not hybrid:
            return blocks
        return blocks | {"gralora_A_general.weight": (hybrid, at.inp), "gralora_B_general.weight": (at.out, hybrid)}

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        r, _, hybrid = _ranks(at)
        scaling = as_number(at.config.get("alpha", 64), "alpha") / (r + hybrid)
        A, B = _unfolded(read("gralora_A"), read("gralora_B"))
        if hybrid:
            A = torch.cat([A, read("gralora_A_general.weight")])
            B = torch.cat([B, read("gralora_B_general.weight")], 1)
        return low_rank(A, scaling * B, read)


def _ranks(at: Wrapped) -> tuple[int, int, int]:
    r, k = at.rank(default=32), integer(at.config, "gralora_k", 2, most=1024)
    at.parts(r, k, "gralora_k")
    return r, k, integer(at.config, "hybrid_r", 0, least=0, most=max(1024, at.inp, at.out))


def _unfolded(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A [k, in/k, r], B [k, r, out/k] → A' [k·r, in], B' [out, k·r]."""
    k, r, out = B.shape
    wide = torch.zeros(k, out, k, k, r // k)  # j, o, i, j', s
    for j in range(k):
        wide[j, :, :, j] = B[j].view(k, r // k, out).permute(2, 0, 1)
    return torch.block_diag(*A.transpose(1, 2)), wide.view(k * out, k * r)  # type: ignore[no-untyped-call]


FAMILY: Family = GraLora()
