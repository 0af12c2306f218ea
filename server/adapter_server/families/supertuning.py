"""Super-tuning (PEFT `tuners/supertuning/layer.py`): the largest (or smallest) weights, and a low rank beside them.

W' = W + scatter(indices, values) + s·B A      s = α/r      values, indices [n], of W as one row
"""

from __future__ import annotations

from typing import Any

import torch

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Family, Patch
from adapter_server.families.deltas import Sparse
from adapter_server.families.options import Config, as_number, flag
from adapter_server.families.parts import Expected, Integers
from adapter_server.families.wrapping import NARROW, Reader, Wrapped, Wrapping


class Supertuning(Wrapping):
    name = "SUPERTUNING"
    known = NARROW | {
        *("init_weights", "lora_alpha", "lora_dropout", "r", "save_precomputed_indices", "select_top", "sparsity"),
    }
    slow = True

    def tensors(self, at: Wrapped) -> Expected:
        n = _count(at)
        keys: Expected = {"supertuning_values": (n,)}
        if _saved(at.config):
            keys["supertuning_indices"] = Integers((n,))
        if at.config.get("r") is not None:
            r = at.rank()
            keys |= {"supertuning_lora_A.weight": (r, at.inp), "supertuning_lora_B.weight": (at.out, r)}
        return keys

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        W = read.weight()
        if _saved(at.config):
            places = read.integers("supertuning_indices", W.numel())
        else:
            largest = flag({"select_top": True, **at.config}, "select_top")
            places = torch.topk(W.abs().flatten(), _count(at), largest=largest).indices
        delta = Sparse.of(places // at.inp, places % at.inp, read("supertuning_values"), (at.out, at.inp))
        if at.config.get("r") is None:
            return Patch(delta=delta)
        scaling = as_number(at.config.get("lora_alpha"), "lora_alpha") / at.rank()
        A, B = read("supertuning_lora_A.weight"), scaling * read("supertuning_lora_B.weight")
        return Patch(A=A, B=B, delta=delta)


def _count(at: Wrapped) -> int:
    size, sparsity = at.inp * at.out, as_number(at.config.get("sparsity", 0.99), "sparsity")
    n = int(size * (1 - sparsity))
    if not 1 <= n <= size:
        raise AdapterRefused(f"adapter_config.json: 'sparsity' {sparsity:g} leaves {n} of {size} weights at {at.path}")
    return n


def _saved(config: Config) -> bool:
    return flag({"save_precomputed_indices": True, **config}, "save_precomputed_indices")


FAMILY: Family = Supertuning()
