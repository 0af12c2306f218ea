"""MiSS, and Bone before it (PEFT `tuners/miss/layer.py`): one small block, shared by all parts of the input.

plain   y = W x + b + Mᵀ Σ_blocks x      M [r,out];  A[j,i] = 1 where i mod r = j,  B = Mᵀ
mini    M [r,mini_r], repeated to the width of the output
bat     W' = W + (W_block M + M), by blocks of r × r      M [out/r, r, r]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Family, Patch
from adapter_server.families.options import integer
from adapter_server.families.parts import Expected
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping, low_rank


class Miss(Wrapping):
    name = "MISS"
    known = TARGETS | {"bias", "init_weights", "mini_r", "miss_dropout", "r"}
    slow = True

    def tensors(self, at: Wrapped) -> Expected:
        r, form = _rank(at), _form(at)
        if form == "bat":
            at.parts(at.inp, r, "r")
            return {"miss_block": (at.parts(at.out, r, "r"), r, r)}
        return {"miss_block": (r, _mini(at) if form == "mini" else at.out)}

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        M = read("miss_block")
        if _form(at) == "bat":
            return Patch(weight=_bat(read.weight(), M))
        M = M.repeat(1, at.out // M.shape[1])
        A = (torch.arange(at.inp) % len(M) == torch.arange(len(M))[:, None]).float()  # [r, in]
        return low_rank(A, M.T.contiguous(), read)


def _rank(at: Wrapped) -> int:
    return integer(at.config, "r", 64, most=at.inp)


def _mini(at: Wrapped) -> int:
    mini = integer(at.config, "mini_r", 1)
    at.parts(at.out, mini, "mini_r")
    return mini


def _form(at: Wrapped) -> str:
    form = at.config.get("init_weights", True)
    if form is None or isinstance(form, bool):
        return ""
    if form in ("bat", "mini"):
        return str(form)
    raise AdapterRefused(
        f"adapter_config.json: 'init_weights' must be true, false, bat or mini, not {str(form)[:80]!r}"
    )


def _bat(W: Tensor, M: Tensor) -> Tensor:
    """W [out, in], M [out/r, r, r]."""
    (out, inp), r = W.shape, M.shape[-1]
    blocks = W.reshape(out // r, r, inp // r, r).permute(2, 0, 1, 3)  # [in/r, out/r, r, r]
    return W + (blocks @ M + M).permute(1, 2, 0, 3).reshape(out, inp)


FAMILY: Family = Miss()
