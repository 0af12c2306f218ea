"""WaveFT (PEFT `tuners/waveft/layer.py`): a few wavelet coefficients of ΔW, at places drawn from a seed.

ΔW = s·idwt2(S)      S [out,in] is zero but for `n_frequency` numbers;  Haar's wavelet (db1), one level, or none at all
"""

from __future__ import annotations

from typing import Any

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
            choice(at.config, "wavelet_family", "db1", ("db1",))
        return {"waveft_spectrum": (frequencies(at, DEFAULT),)}

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        values = as_number(at.config.get("scaling", 25.0), "scaling") * read("waveft_spectrum")
        S = Sparse.of(*places(at, len(values)), values, (at.out, at.inp))
        return added(_haar(S.dense()), read) if _transformed(at.config) else Patch(delta=S)


def _transformed(config: Config) -> bool:
    return flag({"use_idwt": True, **config}, "use_idwt")


def _haar(S: Tensor) -> Tensor:
    """The inverse transform of one level. Quadrants of S, padded to even sides:  | a  h |
    | v  d |"""
    (out, inp), S = S.shape, F.pad(S, (0, S.shape[1] % 2, 0, S.shape[0] % 2))
    top, bottom = S.chunk(2, 0)
    (a, h), (v, d) = top.chunk(2, 1), bottom.chunk(2, 1)
    rows = _merged(a, h, 0), _merged(v, d, 0)
    return _merged(*rows, 1)[:out, :inp]


def _merged(low: Tensor, high: Tensor, dim: int) -> Tensor:
    """Averages and differences to the numbers they came from, twice as many along `dim`."""
    return torch.stack((low + high, low - high), dim + 1).flatten(dim, dim + 1) / 2**0.5


FAMILY: Family = WaveFT()
