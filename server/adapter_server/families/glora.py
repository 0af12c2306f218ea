"""GLoRA (PEFT `tuners/glora/layer.py`): five small paths around weight and bias.

W' = W + W ∘ A + B      b' = b + b ∘ D + E + W C, where the base has a bias
a path is lora Xd Xu, a vector, a constant, or none (whose zeros are in the file)      A, B [out,in]  C [in]  D, E [out]
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adapter_server.families.base import Family, Patch
from adapter_server.families.options import choice
from adapter_server.families.parts import Expected
from adapter_server.families.wrapping import NARROW, Reader, Wrapped, Wrapping

FORMS = {  # config key: its paths, and what they may be
    "config_A_B": ("AB", ("lora", "vector", "constant", "none")),
    "config_C": ("C", ("lora", "vector", "none")),
    "config_D_E": ("DE", ("vector", "constant", "none")),
}
DEFAULTS = {"config_A_B": "lora", "config_C": "lora", "config_D_E": "constant"}


class GLora(Wrapping):
    name = "GLORA"
    known = NARROW | FORMS.keys() | {"bias", "init_weights", "r"}
    slow = True

    def tensors(self, at: Wrapped) -> Expected:
        full = {"A": (at.out, at.inp), "B": (at.out, at.inp), "C": (at.inp, 1), "D": (at.out,), "E": (at.out,)}
        keys: Expected = {}
        for path, form in _forms(at).items():
            keys |= {f"glora_{path}.{name}": s for name, s in _shapes(form, full[path], at.rank()).items()}
        return keys

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        A, B, C, D, E = (_path(read, f"glora_{path}", form) for path, form in _forms(at).items())
        W, bias = read.weight(), read.bias()
        more = None if bias is None else bias * D + E + (W @ C).squeeze(-1)
        return Patch(weight=W + W * A + B, bias=more)


def _forms(at: Wrapped) -> dict[str, str]:
    """{A..E: its form}; without a bias, C, D and E are none."""
    forms = {key: choice(at.config, key, DEFAULTS[key], allowed) for key, (_, allowed) in FORMS.items()}
    bare = () if at.shape.has_bias else ("config_C", "config_D_E")
    return {path: "none" if key in bare else forms[key] for key, (paths, _) in FORMS.items() for path in paths}


def _shapes(form: str, full: tuple[int, ...], r: int) -> Expected:
    if form == "lora":
        return {"Xd": (full[0], r), "Xu": (r, full[1])}
    if form == "vector":
        return {"X": (full[0], 1) if len(full) == 2 else full}
    return {"X": (1,)} if form == "constant" else {"zeros": full}


def _path(read: Reader, name: str, form: str) -> Tensor:
    if form == "lora":
        return read(f"{name}.Xd") @ read(f"{name}.Xu")
    return read(f"{name}.{'zeros' if form == 'none' else 'X'}")


FAMILY: Family = GLora()
