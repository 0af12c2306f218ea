"""PEANuT (PEFT `tuners/peanut/layer.py`): a small network reads the base's weight and gives a low rank.

H = f(Wᵀ Aᵀ) [in,r], then `depth` encoders H ← f(H Eᵢᵀ), then as many decoders H ← f(H Dᵢᵀ) + its encoder's input
y = W x + b + s·B Hᵀ x      A [r,out]  B [out,r]  Eᵢ, Dᵢ [r,r]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adapter_server.families.base import Family, Patch
from adapter_server.families.options import as_number, choice, integer
from adapter_server.families.parts import Expected
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping, low_rank

MAX_DEPTH = 64
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {  # by the names that transformers gives them
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


class Peanut(Wrapping):
    name = "PEANUT"
    known = TARGETS | {"act_fn", "depth", "init_weights", "r", "scaling"}
    slow = True

    def tensors(self, at: Wrapped) -> Expected:
        r = at.rank(default=32)
        coders = [f"peanut_{kind}coders.{i}.weight" for kind in ("en", "de") for i in range(_depth(at))]
        ends: Expected = {"peanut_A.weight": (r, at.out), "peanut_B.weight": (at.out, r)}
        return ends | dict.fromkeys(coders, (r, r))

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        f = ACTIVATIONS[choice(at.config, "act_fn", "relu", ACTIVATIONS)]
        H, kept = f(read.weight().T @ read("peanut_A.weight").T), []
        for i in range(_depth(at)):
            kept.append(H)
            H = f(F.linear(H, read(f"peanut_encoders.{i}.weight")))
        for i in range(_depth(at)):
            H = f(F.linear(H, read(f"peanut_decoders.{i}.weight"))) + kept.pop()
        scaling = as_number(at.config.get("scaling", 1.0), "scaling")
        return low_rank(H.T.contiguous(), scaling * read("peanut_B.weight"), read)


def _depth(at: Wrapped) -> int:
    return integer(at.config, "depth", 0, least=0, most=MAX_DEPTH)


FAMILY: Family = Peanut()
