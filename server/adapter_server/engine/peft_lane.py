"""The lane of a base that no patch reaches: an encoder-decoder, a state-space model, whatever else `generate` runs.

Every adapter over it is a tree of its own (`tree.py`), and so is the base. Its rows keep their own past; a lease in the
pool only says how many tokens may be under way.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapter_server.engine.dense import TESTED, DenseModel
from adapter_server.engine.lowrank import Banked
from adapter_server.engine.model import Model
from adapter_server.engine.placed import Placed
from adapter_server.engine.routing import Step
from adapter_server.engine.tree import Decode, Tree, Trees, refusing
from adapter_server.errors import AdapterServerError, BaseNotSupported
from adapter_server.families.base import Adapter
from adapter_server.families.facts import ModelBase


class PeftLane(Model):
    """A base whose every row is PEFT's. It has no sites and no keys and values in the pool."""

    lane = "peft"

    def __init__(self, module: PreTrainedModel, trees: Trees, why: str) -> None:
        self.module = module.eval().requires_grad_(False)
        self.device, self.dtype, self.trees, self.why = module.device, module.dtype, trees, why
        self.base = ModelBase(module)
        self.base.shapes = replace(self.base.shapes, by_peft=True)
        self.plain = plain = Tree(trees.fresh())
        self.layers, self.groups, self.lowrank, self.rope_border, self.loading = {}, [], Banked(), None, None
        self.stable_rope = False  # nothing of a row is kept for others
        self._probe(plain)

    def _probe(self, plain: Tree) -> None:
        """One token of the base. Raises BaseNotSupported where `generate` does not run."""
        try:
            with refusing("the base"), torch.inference_mode():
                Decode(plain, [0, 0], None).logits([0, 0])
        except AdapterServerError as error:
            raise BaseNotSupported(f"{self.why}; and `generate` does not run it either: {error.message}") from error

    @property
    def token_bytes(self) -> int:
        """As many as full attention of all heads would take in every layer, twice where there is an encoder."""
        shapes, both = self.base.shapes, 2 if self.module.config.is_encoder_decoder else 1
        return int(2 * both * shapes.layers * shapes.kv_heads * shapes.head_dim * self.dtype.itemsize)

    def place(self, adapter: Adapter) -> Placed:
        return self.trees.place(adapter)

    def install_sites(self, placed: Placed) -> None:
        """There are none."""

    def forward(self, step: Step, ids: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        raise RuntimeError("the peft lane has no packed rows")


def prepare(
    module: PreTrainedModel,
    pack: bool = True,
    adapters: torch.dtype = torch.float32,
    kernels: bool = True,
    fuse: bool = True,
) -> Model:
    """The base in the fastest lane that it can run in; `why` says what decided. Raises BaseNotSupported."""
    trees = Trees(module)  # before anything of the base is changed
    if module.config.is_encoder_decoder:
        return PeftLane(module, trees, "it is an encoder-decoder")
    if module.config.model_type in TESTED:
        return DenseModel(module, pack, trees, adapters, kernels, fuse)
    try:
        return Model(module, pack, trees, adapters, kernels, fuse)
    except BaseNotSupported as error:
        return PeftLane(module, trees, error.message)
