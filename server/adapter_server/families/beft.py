"""BEFT (PEFT `tuners/beft/layer.py`): a bias on top of the base's, where it has one.  y = W x + b + β   β [1,out]"""

from __future__ import annotations

from typing import Any

from adapter_server.families.base import Family, Patch
from adapter_server.families.parts import Expected
from adapter_server.families.wrapping import NARROW, Reader, Wrapped, Wrapping


class Beft(Wrapping):
    name = "BEFT"
    known = NARROW | {"init_weights"}

    def tensors(self, at: Wrapped) -> Expected:
        return {"beft_bias": (1, at.out)}

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        return Patch(bias=read("beft_bias").flatten())


FAMILY: Family = Beft()
