"""A fold is tried when it is made: weights that do not do what the patch does are never served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import beyond
import rig
import zoo
from adapter_server.engine.snapshot import fold
from adapter_server.errors import AdapterRefused
from adapter_server.families import find
from adapter_server.families.base import Adapter, Patch
from adapter_server.families.facts import ModelBase

PATH = "model.layers.0.self_attn.q_proj"
BASE = ModelBase(zoo.tiny_base("llama"))


@dataclass(frozen=True, slots=True, eq=False)
class Careless(Patch):
    """A family's mistake: a fold that forgets something."""

    def fold(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return Patch.fold(replace(self, out_scale=None), params)


def adapter(patch: Patch) -> Adapter:
    return Adapter(beyond.spec({"peft_type": "LORA"}), {PATH: patch})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "lora_embed", "lora_saved", "oft"])
def test_what_families_make_passes_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    spec, tensors = zoo.read(rig.saved("llama", name))
    made = find(spec.family).load(spec, tensors, BASE)
    assert fold(made, BASE, dtype).patches.keys() == made.patches.keys()


def test_a_fold_that_is_not_the_patch_is_refused() -> None:
    with pytest.raises(AdapterRefused, match=rf"folding {PATH} moved its output by .* allowed are 0\.0001 in float32"):
        fold(adapter(Careless(A=torch.ones(1, 32), B=torch.ones(32, 1), out_scale=torch.full((32,), 1.01))), BASE)


def test_a_sum_that_rounding_swallows_is_refused() -> None:
    """Two huge terms that cancel: what is left of them is below the rounding of the folded weight."""
    huge = torch.full((32, 1), 1e7)
    patch = Patch(weight=1e7 * torch.ones(32, 32), A=torch.ones(1, 32) + 1e-7 * torch.arange(32), B=-huge)
    with pytest.raises(AdapterRefused, match="moved its output"):
        fold(adapter(patch), BASE)


def test_weights_beyond_the_dtype_are_refused() -> None:
    patch = Patch(A=torch.full((1, 32), 1e3), B=torch.full((32, 1), 1e3))
    assert fold(adapter(patch), BASE).patches
    with pytest.raises(AdapterRefused, match="not finite"):
        fold(adapter(patch), BASE, torch.float16)
