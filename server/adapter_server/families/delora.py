"""DeLoRA (PEFT `tuners/delora/layer.py`): a low rank of unit directions, its strength apart.

y = W x + b + B diag(λ / (r ‖Aᵢ‖ ‖Bᵢ‖)) A (w ∘ x)      A [r,in]  B [out,r]  λ [1]  w [in], both norms at least 1e-4
"""

from __future__ import annotations

from typing import Any

from adapter_server.families.base import Family, Patch
from adapter_server.families.parts import Expected
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping


class DeLora(Wrapping):
    name = "DELORA"
    known = TARGETS | {
        *("bias", "delora_lambda", "init_weights", "lambda_pattern", "module_dropout", "r", "rank_pattern"),
    }
    patterns = {"rank_pattern": "r"}  # noqa: RUF012

    def tensors(self, at: Wrapped) -> Expected:
        r = at.rank()
        return {"delora_A": (r, at.inp), "delora_B": (at.out, r), "delora_lambda": (1,), "delora_w_norm": (at.inp,)}

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        A, B = read("delora_A"), read("delora_B")
        norms = A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=0).clamp(min=1e-4)  # [r]
        return Patch(A=A * read("delora_w_norm"), B=B * (read("delora_lambda") / at.rank() / norms))


FAMILY: Family = DeLora()
