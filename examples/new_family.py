"""A kind of adapter of your own, in a package of your own: the server finds it by an entry point.

    y = W x + b + t (a · x)      a [in]  t [out], one pair for each module that the config targets

Beside this module the package needs one thing, in its pyproject.toml:

    [project.entry-points."adapter_server.families"]
    tilt = "new_family:FAMILY"

Once it is installed where the server runs, folders with "peft_type": "TILT" are served like any other: mixed in the
batch, weighted, composed, merged. `save` writes such a folder from a model's trained vectors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from adapter_server.families.base import Family, Patch
from adapter_server.families.parts import ROOT, Expected
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping


class Tilt(Wrapping):
    """`Wrapping` resolves targets, saved modules and strictness; what is left is what a module has and what it does."""

    name = "TILT"
    known = TARGETS
    conv1d = True

    def tensors(self, at: Wrapped) -> Expected:
        return {"tilt_a": (at.inp,), "tilt_t": (at.out,)}

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        return Patch(A=read("tilt_a")[None], B=read("tilt_t")[:, None])


FAMILY: Family = Tilt()


def save(vectors: Mapping[str, tuple[Tensor, Tensor]], folder: Path) -> None:
    """{module path: (a, t)} → a folder that the server reads."""
    folder.mkdir(parents=True)
    config = {"peft_type": "TILT", "target_modules": list(vectors)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {f"{ROOT}{path}.tilt_a": a.contiguous() for path, (a, _) in vectors.items()}
    tensors |= {f"{ROOT}{path}.tilt_t": t.contiguous() for path, (_, t) in vectors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
