"""SHiRA (PEFT `tuners/shira/layer.py`): r (in + out) numbers of the weight, wherever the file says.

W' = W + sparse(indices, values)      values [n]  indices [2,n] of rows and columns
"""

from __future__ import annotations

from typing import Any

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Family, Patch
from adapter_server.families.deltas import Sparse
from adapter_server.families.parts import Expected, Integers
from adapter_server.families.wrapping import NARROW, Reader, Wrapped, Wrapping


class Shira(Wrapping):
    name = "SHIRA"
    known = NARROW | {"fan_in_fan_out", "init_weights", "mask_type", "r", "random_seed"}

    def tensors(self, at: Wrapped) -> Expected:
        n = at.rank(default=32) * (at.inp + at.out)
        if n > at.inp * at.out:
            raise AdapterRefused(f"adapter_config.json: 'r' makes more numbers than {at.path} has weights")
        return {"shira_weight": (n,), "shira_indices": Integers((2, n))}

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        rows, columns = read.integers("shira_indices", max(at.inp, at.out))
        if int(rows.max()) >= at.out or int(columns.max()) >= at.inp:
            raise AdapterRefused(f"tensor '{at.path}.shira_indices' holds indices outside the weight")
        return Patch(delta=Sparse.of(rows, columns, read("shira_weight"), (at.out, at.inp)))


FAMILY: Family = Shira()
