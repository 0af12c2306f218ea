"""C3A (PEFT `tuners/c3a/`): ΔW of circulant blocks, each given by one row.

ΔW = circulant(w) / in, by way of the Fourier transform      w [out/b, in/b, b]
"""

from __future__ import annotations

from typing import Any

from adapter_server.families.base import Family, Patch
from adapter_server.families.deltas import Circulant
from adapter_server.families.options import integer
from adapter_server.families.parts import Expected
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping


class C3A(Wrapping):
    name = "C3A"
    known = (TARGETS - {"exclude_modules"}) | {"bias", "block_size", "block_size_pattern", "init_weights"}
    patterns = {"block_size_pattern": "block_size"}  # noqa: RUF012

    def tensors(self, at: Wrapped) -> Expected:
        size = integer(at.config, "block_size", 256)
        return {"c3a_kernel": (at.parts(at.out, size, "block_size"), at.parts(at.inp, size, "block_size"), size)}

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        return Patch(delta=Circulant.of(read("c3a_kernel") / at.inp))


FAMILY: Family = C3A()
