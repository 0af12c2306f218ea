"""WaveFT (PEFT `tuners/waveft/layer.py`): a few wavelet coefficients of ΔW, at places drawn from a seed.

ΔW = s·idwt2(S)      S [out,in] is zero but for `n_frequency` numbers;  one level of db1 to db10, or none at all
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from adapter_server.families.base import Family, Patch, Shapes
from adapter_server.families.deltas import Sparse
from adapter_server.families.fourierft import SPECTRAL, frequencies, places
from adapter_server.families.options import Config, as_number, choice, flag, integer
from adapter_server.families.parts import Expected
from adapter_server.families.wrapping import Reader, Wrapped, Wrapping, added

DEFAULT = 2592
WAVELETS = tuple(f"db{n}" for n in range(1, 11))


class WaveFT(Wrapping):
    name = "WAVEFT"
    known = SPECTRAL | {"proportional_parameters", "use_idwt", "wavelet_family"}
    slow = True
    conv1d = True
    patterns = {"n_frequency_pattern": "n_frequency"}  # noqa: RUF012

    def per_module(self, config: Config, shapes: Shapes, paths: list[str]) -> list[Config]:
        """`proportional_parameters`: the same number of coefficients in all, shared out by the weights' sizes."""
        if not flag(config, "proportional_parameters"):
            return super().per_module(config, shapes, paths)
        sizes = [shapes.modules[path].inp * shapes.modules[path].out for path in paths]
        budget = integer(config, "n_frequency", DEFAULT, most=1 << 40) * len(paths)
        whole = max(1, sum(sizes))
        return [{**config, "n_frequency": max(1, round(size / whole * budget))} for size in sizes]

    def tensors(self, at: Wrapped) -> Expected:
        if _transformed(at.config):
            _half(at.config)
        return {"waveft_spectrum": (frequencies(at, DEFAULT),)}

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        values = as_number(at.config.get("scaling", 25.0), "scaling") * read("waveft_spectrum")
        S = Sparse.of(*places(at, len(values)), values, (at.out, at.inp))
        return added(_inverse(S.dense(), _half(at.config)), read) if _transformed(at.config) else Patch(delta=S)


def _transformed(config: Config) -> bool:
    return flag({"use_idwt": True, **config}, "use_idwt")


def _half(config: Config) -> int:
    """Half the length of the wavelet's filters."""
    return WAVELETS.index(choice(config, "wavelet_family", "db1", WAVELETS)) + 1


def _inverse(S: Tensor, half: int) -> Tensor:
    """The inverse transform of one level. Quadrants of S in the middle of even sides:  | a  h |
    | v  d |"""
    sides = [n + 2 * (half - 1) + n % 2 for n in S.shape]
    before = [(side - n) // 2 for side, n in zip(sides, S.shape, strict=True)]
    after = [side - n - b for side, n, b in zip(sides, S.shape, before, strict=True)]
    top, bottom = F.pad(S, (before[1], after[1], before[0], after[0])).chunk(2, 0)
    (a, h), (v, d) = top.chunk(2, 1), bottom.chunk(2, 1)
    low = torch.tensor(daubechies(half))
    rows = _merged(a.T, h.T, low).T, _merged(v.T, d.T, low).T
    return _merged(*rows, low)[: S.shape[0], : S.shape[1]]


def _merged(low: Tensor, high: Tensor, scaling: Tensor) -> Tensor:
    """Averages and differences [n, m] to the numbers that they came from, twice as many in each row."""
    mirror = scaling.flip(0) * (-1.0) ** torch.arange(len(scaling))
    bands, filters = torch.stack([low, high], 1), torch.stack([scaling, mirror])[:, None]
    return F.conv_transpose1d(bands, filters, stride=2, padding=len(scaling) - 2)[:, 0]


@functools.cache
def daubechies(half: int) -> tuple[float, ...]:
    """The 2·half numbers of the scaling filter: Daubechies' polynomial, its roots inside the unit circle."""
    ys = np.roots([math.comb(half - 1 + k, k) for k in reversed(range(half))])
    roots = [1 - 2 * y + sign * np.sqrt((1 - 2 * y) ** 2 - 1 + 0j) for y in ys for sign in (1, -1)]
    h = np.real(np.poly([-1.0] * half + [z for z in roots if abs(z) < 1]))
    return tuple((h * math.sqrt(2) / h.sum()).astype(np.float32).tolist())


FAMILY: Family = WaveFT()
