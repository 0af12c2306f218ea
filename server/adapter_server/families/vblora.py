"""VB-LoRA (PEFT `tuners/vblora/layer.py`): both factors are cut from a bank of vectors, by top-k weights.

A = Σ softmax(top-k logits) · bank[top-k]      logits_A [r, in/len, n]   logits_B [out/len, r, n]   bank [n, len]
`save_only_topk_weights`: indices and all weights but the last, which is what is left to 1
"""

from __future__ import annotations

import torch
from torch import Tensor

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Family, Patch
from adapter_server.families.options import Config, flag, integer
from adapter_server.families.parts import Expected, Integers, Taker
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping


class VBLora(Wrapping):
    name = "VBLORA"
    known = TARGETS | {
        *("bias", "fan_in_fan_out", "init_logits_std", "init_vector_bank_bound", "num_vectors", "r"),
        *("save_only_topk_weights", "topk", "vblora_dropout", "vector_length"),
    }
    conv1d = True

    def tensors(self, at: Wrapped) -> Expected:
        n, length, k = _sizes(at.config)
        parts = at.parts(at.inp, length, "vector_length"), at.parts(at.out, length, "vector_length")
        a, b = (at.rank(default=4), parts[0]), (parts[1], at.rank(default=4))
        if not flag(at.config, "save_only_topk_weights"):
            return {"vblora_logits_A": (*a, n), "vblora_logits_B": (*b, n)}
        indices = {f"vblora_logits_{x}_topk_indices": Integers((*s, k)) for x, s in (("A", a), ("B", b))}
        return indices | {f"vblora_logits_{x}_topk_weights": (*s, k - 1) for x, s in (("A", a), ("B", b))}

    def shared(self, config: Config, wrapped: list[Wrapped]) -> Expected:
        n, length, _ = _sizes(config)
        return {"base_model.vblora_vector_bank": (n, length)}

    def common(self, config: Config, wrapped: list[Wrapped], take: Taker) -> Tensor:
        return take("base_model.vblora_vector_bank")

    def patch(self, at: Wrapped, read: Reader, common: Tensor) -> Patch:
        A, B = (_vectors(at, read, f"vblora_logits_{x}", common) for x in "AB")  # [r, in/len, len] [out/len, r, len]
        return Patch(A=A.flatten(1), B=B.transpose(1, 2).flatten(0, 1))


def _sizes(config: Config) -> tuple[int, int, int]:
    """Vectors in the bank, their length, and how many make one."""
    n, length, k = (integer(config, key, d) for key, d in (("num_vectors", 256), ("vector_length", 256), ("topk", 2)))
    if k > n:
        raise AdapterRefused(f"adapter_config.json: 'topk' is {k} and 'num_vectors' only {n}")
    return n, length, k


def _vectors(at: Wrapped, read: Reader, name: str, bank: Tensor) -> Tensor:
    """[…, len], one sum of weighted vectors for each place of the logits."""
    if flag(at.config, "save_only_topk_weights"):
        indices, some = read.integers(f"{name}_topk_indices", len(bank)), read(f"{name}_topk_weights")
        weights = torch.cat([some, 1 - some.sum(-1, keepdim=True)], -1)
    else:
        logits, indices = read(name).topk(_sizes(at.config)[2], dim=-1)
        weights = logits.softmax(-1)
    return torch.einsum("...k,...kl->...l", weights, bank[indices])


FAMILY: Family = VBLora()
