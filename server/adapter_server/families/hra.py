"""HRA (PEFT `tuners/hra/layer.py`): r Householder reflections of the input, as a low rank (compact WY form).

W' = W ∏ᵢ (I − 2 uᵢuᵢᵀ) = W − (W U) (T Uᵀ)      U [in,r] normalised;  T [r,r] upper triangular
T_ii = 2,  T[:i,i] = −2 T[:i,:i] U[:,:i]ᵀ uᵢ;    apply_GS: U orthonormalised, T = 2 I
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapter_server.families.base import Family, Patch
from adapter_server.families.options import flag
from adapter_server.families.parts import Expected
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping, low_rank


class HRA(Wrapping):
    name = "HRA"
    known = TARGETS | {"apply_GS", "bias", "init_weights", "r"}
    slow = True

    def tensors(self, at: Wrapped) -> Expected:
        return {"hra_u": (at.inp, at.rank())}

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        U = read("hra_u")
        if flag(at.config, "apply_GS"):
            U = torch.linalg.qr(U).Q
            T = 2 * torch.eye(U.shape[1])
        else:
            U = U / U.norm(dim=0)
            T = _wy(U)
        return low_rank(T @ U.T, -read.weight() @ U, read)


def _wy(U: Tensor) -> Tensor:
    """U [in, r] of unit columns → T [r, r]."""
    r, products = U.shape[1], U.T @ U
    T = 2 * torch.eye(r)
    for i in range(1, r):
        T[:i, i] = -2 * T[:i, :i] @ products[:i, i]
    return T


FAMILY: Family = HRA()
