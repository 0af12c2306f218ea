"""DEFT (PEFT `tuners/deft/layer.py`): what the base does in some directions of the output is replaced.

y = W x + b + Q (s·R − Zᵀ W) x      relu: Q = P, Z = relu(P);  qr: Q = Z = qr(P);  `para`: without R
P [out,r]  R [r,in]      s = α/r, 1 where α is not set
"""

from __future__ import annotations

from typing import Any

import torch

from adapter_server.families.base import Family, Patch
from adapter_server.families.options import as_number, choice, flag
from adapter_server.families.parts import Expected
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping, low_rank


class Deft(Wrapping):
    name = "DEFT"
    known = TARGETS | {
        *("alpha", "bias", "decomposition_method", "deft_dropout", "fan_in_fan_out", "init_scale", "init_weights"),
        *("para", "r"),
    }
    slow = True
    conv1d = True

    def tensors(self, at: Wrapped) -> Expected:
        r = _rank(at)
        P: Expected = {"deft_P": (at.out, r)}
        return P if flag(at.config, "para") else P | {"deft_R": (r, at.inp)}

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        P = read("deft_P")
        if choice(at.config, "decomposition_method", "relu", ("relu", "qr")) == "qr":
            Q = Z = torch.linalg.qr(P).Q
        else:
            Q, Z = P, P.relu()
        A = -(Z.T @ read.weight())
        if not flag(at.config, "para"):
            alpha = at.config.get("alpha")
            A += read("deft_R") * (as_number(alpha, "alpha") / _rank(at) if alpha else 1.0)
        return low_rank(A, Q, read)


def _rank(at: Wrapped) -> int:
    return min(at.rank(), at.out)


FAMILY: Family = Deft()
