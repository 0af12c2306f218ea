"""FourierFT (PEFT `tuners/fourierft/layer.py`): a few Fourier coefficients of ΔW, at places drawn from a seed.

ΔW = s·Re ifft2(S)      S [out,in] is zero but for `n_frequency` numbers
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Family, Patch
from adapter_server.families.deltas import Sparse, Spectral
from adapter_server.families.options import as_number, integer
from adapter_server.families.parts import Expected
from adapter_server.families.vera import seed
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping

SPECTRAL = TARGETS | {
    *("bias", "fan_in_fan_out", "init_weights", "n_frequency", "n_frequency_pattern", "random_loc_seed", "scaling"),
}


class FourierFT(Wrapping):
    name = "FOURIERFT"
    known = SPECTRAL
    conv1d = True
    patterns = {"n_frequency_pattern": "n_frequency"}  # noqa: RUF012

    def tensors(self, at: Wrapped) -> Expected:
        return {"fourierft_spectrum": (frequencies(at, 1000),)}

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        scaling = as_number(at.config.get("scaling", 150.0), "scaling")
        values = scaling * read("fourierft_spectrum")
        return Patch(delta=Spectral(Sparse.of(*places(at, len(values)), values, (at.out, at.inp))))


def frequencies(at: Wrapped, default: int) -> int:
    n = integer(at.config, "n_frequency", default, most=1 << 40)
    if n > at.inp * at.out:
        raise AdapterRefused(f"adapter_config.json: 'n_frequency' is {n}, more than {at.path} has weights")
    return n


def places(at: Wrapped, count: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the first `count` places of the seed's permutation."""
    generator = torch.Generator().manual_seed(seed(at.config, "random_loc_seed", 777))
    flat = torch.randperm(at.out * at.inp, generator=generator)[:count]
    return flat // at.inp, flat % at.inp


FAMILY: Family = FourierFT()
