"""OSF (PEFT `tuners/osf/`): the base's smaller singular directions, trained; the large ones stay.

W' = W + U diag(S) V − U₀ diag(S₀) V₀      U [out,k]  S [k]  V [k,in];  U₀, S₀, V₀ are found again
k = min(in, out) − effective_rank, which is half of it unless said otherwise: a share in 0..1 or a number
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Family, Patch, Shapes
from adapter_server.families.options import Config, as_number, table
from adapter_server.families.parts import Expected
from adapter_server.families.targets import pattern
from adapter_server.families.wrapping import NARROW, Reader, Wrapped, Wrapping, low_rank


class Osf(Wrapping):
    name = "OSF"
    known = NARROW | {"effective_rank", "init_weights", "rank_pattern", "target_svd_config"}
    slow = True

    def per_module(self, config: Config, shapes: Shapes, paths: list[str]) -> list[Config]:
        """A pattern of `rank_pattern` is looked for anywhere in the path."""
        table_ = table(config, "rank_pattern")
        found: list[tuple[Callable[[str], Any], Any]] = [
            (pattern(text, "rank_pattern").search, rank) for text, rank in table_.items()
        ]
        chosen = [next((rank for search, rank in found if search(p)), config.get("effective_rank")) for p in paths]
        return [{**config, "effective_rank": rank} for rank in chosen]

    def tensors(self, at: Wrapped) -> Expected:
        k = _low(at)
        names = "osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low"
        return dict(zip(names, ((at.out, k), (k,), (k, at.inp)), strict=True))

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        U, S, V = (read(f"osf_svd_params.{name}_low") for name in "USV")
        U0, S0, V0 = torch.linalg.svd(read.weight(), full_matrices=False)
        high = len(S0) - len(S)
        A, B = torch.cat([V, V0[high:]]), torch.cat([U * S, -U0[:, high:] * S0[high:]], 1)
        return low_rank(A, B, read)


def _low(at: Wrapped) -> int:
    """k (PEFT `osf/model.py`, `_resolve_rank`)."""
    least, value = min(at.inp, at.out), at.config["effective_rank"]
    if value is None:
        return least - least // 2
    number = as_number(value, "effective_rank")
    high = int(least * number) if isinstance(value, float) and 0 < value <= 1 else int(number)
    if not 0 < high < least:
        raise AdapterRefused(f"adapter_config.json: 'effective_rank' leaves nothing to train at {at.path}")
    return least - high


FAMILY: Family = Osf()
