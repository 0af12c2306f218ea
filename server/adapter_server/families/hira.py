"""HiRA (PEFT `tuners/hira/layer.py`): the base's weight times a low rank, number by number.

W' = W + W ∘ (B A)      A [r,in]  B [out,r]
"""

from __future__ import annotations

from typing import Any

from adapter_server.families.base import Family, Patch
from adapter_server.families.parts import Expected
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping


class Hira(Wrapping):
    name = "HIRA"
    known = TARGETS | {"fan_in_fan_out", "hira_dropout", "init_weights", "r", "rank_pattern"}
    slow = True
    conv1d = True
    patterns = {"rank_pattern": "r"}  # noqa: RUF012

    def tensors(self, at: Wrapped) -> Expected:
        r = at.rank(default=32)
        return {"hira_A": (r, at.inp), "hira_B": (at.out, r)}

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        W = read.weight()
        return Patch(weight=W + W * (read("hira_B") @ read("hira_A")))


FAMILY: Family = Hira()
