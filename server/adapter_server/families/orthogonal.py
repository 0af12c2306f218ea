"""Rotations from skew-symmetric matrices Q, as the orthogonal kinds parametrise them (PEFT `oft/`, `psoft/`)."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_TERMS = 64


def skew(upper: Tensor, size: int) -> Tensor:
    """[…, size(size−1)/2] above the diagonal → […, size, size] with Qᵀ = −Q."""
    rows, cols = torch.triu_indices(size, size, 1)
    Q = torch.zeros(*upper.shape[:-1], size, size)
    Q[..., rows, cols] = upper
    return Q - Q.mT


def cayley(Q: Tensor) -> Tensor:
    """(I + Q)(I − Q)⁻¹"""
    eye = torch.eye(Q.shape[-1]).expand_as(Q)
    R: Tensor = torch.linalg.solve(eye - Q, eye + Q, left=False)
    return R


def neumann(Q: Tensor, terms: int) -> Tensor:
    """Its series, cut off as PEFT does: I + 2Q + 2Q² + … + 2Qᵗ⁻² + Qᵗ⁻¹."""
    R = torch.eye(Q.shape[-1]).expand_as(Q).clone()
    if terms > 1:
        R += 2 * Q
    if terms > 2:
        power = Q @ Q
        R += 2 * power
        for _ in range(3, terms - 1):
            power = power @ Q
            R += 2 * power
        R += power @ Q
    return R
