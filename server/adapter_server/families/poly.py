"""Poly and MHR (PEFT `tuners/poly/layer.py`): skills of a low rank each, which every task mixes in its own way.

w[t] = σ(logits[t]) / Σ_skills σ(logits[t])      per split;  logits [tasks, splits·skills]
A[i-th part of in] = Σ_k w[t,i,k] A_k[i]         A_k [splits, in/splits, r]
B[:, i-th part of out] = Σ_k w[t,i,k] B_k[i]     B_k [splits, r, out/splits]
y = W x + b + (x A B) / r
"""

from __future__ import annotations

from typing import Any

import torch

from adapter_server.families.base import Family, Skills
from adapter_server.families.options import choice, integer
from adapter_server.families.parts import Expected
from adapter_server.families.wrapping import NARROW, Reader, Wrapped, Wrapping

LEAST = 1e-12  # PEFT's EPS: no sum of weights is zero


class Poly(Wrapping):
    name = "POLY"
    known = NARROW | {"exclude_modules", "init_weights", "n_skills", "n_splits", "n_tasks", "poly_type", "r"}
    tasks_key = "n_tasks"

    def tensors(self, at: Wrapped) -> Expected:
        choice(at.config, "poly_type", "poly", ("poly",))
        tasks, skills, splits = _sizes(at)
        inp, out = (at.parts(width, splits, "n_splits") for width in (at.inp, at.out))
        return {
            "poly_lora_A": (splits, skills, inp, at.rank()),
            "poly_lora_B": (splits, skills, at.rank(), out),
            "poly_router.module_logits": (tasks, splits * skills),
        }

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Skills:
        tasks, skills, splits = _sizes(at)
        chosen = torch.sigmoid(read("poly_router.module_logits")).view(tasks, splits, skills)
        mix = chosen / (chosen.sum(-1, keepdim=True) + LEAST)
        return Skills(read("poly_lora_A"), read("poly_lora_B") / at.rank(), mix, read.copy)


def _sizes(at: Wrapped) -> tuple[int, int, int]:
    """Tasks, skills and splits."""
    return integer(at.config, "n_tasks", 1), integer(at.config, "n_skills", 4), integer(at.config, "n_splits", 1)


FAMILY: Family = Poly()
