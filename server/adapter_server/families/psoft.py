"""PSOFT (PEFT `tuners/psoft/layer.py`): a rotation inside the base's first r singular directions.

y = W x + b + s·B (R − I) A x      s = α/r      W ≈ U S Vᵀ, cut to r
psoft_init: A = Vᵀ, B = U S/s;     pissa_init: A = √(S/s) Vᵀ, B = U √(S/s)
R = diag(b) cayley(Q) diag(a)      the file holds Q, a and b; A and B are found again from the base
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Family, Patch
from adapter_server.families.options import Config, as_number, choice, flag, integer
from adapter_server.families.orthogonal import MAX_TERMS, cayley, neumann, skew
from adapter_server.families.parts import Expected
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping, low_rank


class Psoft(Wrapping):
    name = "PSOFT"
    known = TARGETS | {
        *("ab_svd_init", "cayley_neumann_eps", "fan_in_fan_out", "init_weights", "num_cayley_neumann_terms"),
        *("psoft_alpha", "psoft_dropout", "psoft_mag_a", "psoft_mag_b", "psoft_orth", "psoft_svd"),
        *("psoft_svd_lowrank_niter", "r", "random_seed", "use_cayley_neumann"),
    }
    slow = True

    def tensors(self, at: Wrapped) -> Expected:
        choice(at.config, "psoft_svd", "full", ("full",))  # the other is a random approximation
        r = integer(at.config, "r", 32, least=2, most=min(at.inp, at.out))
        keys: Expected = {"psoft_R.weight": (r * (r - 1) // 2,) if _on(at.config, "psoft_orth") else (r, r)}
        return keys | {f"psoft_R.vector_{x}": (r,) for x in "ab" if _on(at.config, f"psoft_mag_{x}")}

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        r = integer(at.config, "r", 32)
        scaling = as_number(at.config.get("psoft_alpha", 32), "psoft_alpha") / r
        if scaling <= 0:
            raise AdapterRefused("adapter_config.json: 'psoft_alpha' must be positive")
        U, S, Vh = torch.linalg.svd(read.weight(), full_matrices=False)
        U, S, Vh = U[:, :r], S[:r] / scaling, Vh[:r]
        split = choice(at.config, "ab_svd_init", "psoft_init", ("psoft_init", "pissa_init")) == "pissa_init"
        A, B = (S.sqrt()[:, None] * Vh, U * S.sqrt()) if split else (Vh, U * S)
        return low_rank(A.contiguous(), scaling * B @ (_rotation(at, read, r) - torch.eye(r)), read)


def _on(config: Config, key: str) -> bool:
    """A boolean that is on unless unset."""
    return flag({key: True, **config}, key)


def _rotation(at: Wrapped, read: Reader, r: int) -> Tensor:
    """PEFT `OrthLayer.get_matrix`: [r, r]."""
    R = read("psoft_R.weight")
    if _on(at.config, "psoft_orth"):
        Q = skew(R, r)
        R = _series(at.config, Q) if flag(at.config, "use_cayley_neumann") else cayley(Q)
    R = read("psoft_R.vector_b")[:, None] * R if _on(at.config, "psoft_mag_b") else R
    return R * read("psoft_R.vector_a") if _on(at.config, "psoft_mag_a") else R


def _series(config: Config, Q: Tensor) -> Tensor:
    """The cut-off series, Q shrunk first to a norm of `cayley_neumann_eps`."""
    if config.get("cayley_neumann_eps") is not None:
        eps, norm = as_number(config["cayley_neumann_eps"], "cayley_neumann_eps"), torch.linalg.norm(Q)
        Q = Q * (eps / (norm + 1e-12)) if norm > eps else Q
    return neumann(Q, integer(config, "num_cayley_neumann_terms", 5, most=MAX_TERMS))


FAMILY: Family = Psoft()
