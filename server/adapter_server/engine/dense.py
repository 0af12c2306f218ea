"""The dense lane: bases whose attention does not go through transformers' AttentionInterface.

Their rows run in dense forwards, each row's past handed over as a cache of ours over the slot pool:

    a prompt's chunk     [1, count]   one forward a row
    all decode rows      [rows, 1]    one forward, contexts padded to the longest, a 2D mask over them

So nothing is padded in the tokens themselves, and sites, routing, scheduler and sampling are the packed lane's own.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from adapter_server.engine.attention import Probe
from adapter_server.engine.kv import KvStep
from adapter_server.engine.model import Model
from adapter_server.engine.placed import Prefix
from adapter_server.engine.routing import Routing, Step, running
from adapter_server.engine.tree import Trees

TESTED = ("bloom", "falcon", "gptj", "mpt", "codegen", "xglm")  # GPT Neo's windows count keys from the left: not exact


class StepLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values for one forward, in the pool."""

    def __init__(self, layer: int, kv: KvStep) -> None:
        super().__init__()
        self.layer, self.kv = layer, kv

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """key_states, value_states [B, kv_heads, q, dim] → the contexts of the rows [B, kv_heads, context, dim]."""
        k, v = (states.transpose(1, 2).flatten(0, 1) for states in (key_states, value_states))
        self.kv.pool.write(self.layer, self.kv.places, k, v)
        if self.kv.decodes is None:
            return self.kv.context(self.layer, self.kv.prefills[0][1])
        return self.kv.rows(self.layer)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return _context(self.kv), 0

    def get_seq_length(self) -> int:
        return _context(self.kv) - _queries(self.kv)

    def get_max_length(self) -> int:
        return -1


class DenseModel(Model):
    """A base in the dense lane. Same sites, same steps; the forward is another."""

    lane = "dense"
    why = "its attention does not go through transformers' AttentionInterface"

    def __init__(
        self,
        module: PreTrainedModel,
        pack: bool = True,
        trees: Trees | None = None,
        adapters: torch.dtype = torch.float32,
        kernels: bool = True,
        fuse: bool = True,
    ) -> None:
        self._accepts = set(inspect.signature(module.forward).parameters)
        super().__init__(module, pack, trees, adapters, kernels, fuse)

    def _adopt(self) -> None:
        """These bases keep the attention that they have."""

    @torch.inference_mode()
    def _seen(self) -> Probe:
        seen, ids = Probe(), torch.zeros(1, 2, dtype=torch.long, device=self.device)
        for i, layer in enumerate(self.module(input_ids=ids, use_cache=True).past_key_values.layers):
            seen.layers[i] = (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        return seen

    def split(self, counts: list[int]) -> list[list[int]]:
        """Each prompt's chunk alone, all decode rows together."""
        decodes = [i for i, count in enumerate(counts) if count == 1]
        return [[i] for i, count in enumerate(counts) if count > 1] + ([decodes] if decodes else [])

    @torch.inference_mode()
    def forward(self, step: Step, ids: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        """ids, positions [T]: one row's chunk, or one token of each of T rows."""
        kv = step.kv
        if kv is None:
            raise RuntimeError("a dense forward has a pool")
        shape = (-1, 1) if kv.decodes is not None else (1, -1)
        asked = {
            "input_ids": ids.view(shape),
            "position_ids": positions.view(shape),
            "attention_mask": _mask(kv),
            "past_key_values": Cache(layers=[StepLayer(i, kv) for i in sorted(self.layers)]),
            "use_cache": True,
            "logits_to_keep": 0 if kv.decodes is not None else keep,
        }
        with running(step):
            logits: Tensor = self.module(**{k: v for k, v in asked.items() if k in self._accepts}).logits
        return logits.flatten(0, 1)[keep] if kv.decodes is not None else logits[0]

    @torch.inference_mode()
    def encode(self, embeds: Tensor) -> Prefix:
        n = embeds.shape[0]
        with running(Step(Routing(n), Routing(n))):
            layers = self.module(inputs_embeds=embeds[None], use_cache=True).past_key_values.layers
        return Prefix(tuple((pair.keys[0].transpose(0, 1), pair.values[0].transpose(0, 1)) for pair in layers))


def _context(kv: KvStep) -> int:
    return kv.decodes.context if kv.decodes is not None else kv.prefills[0][0].context


def _queries(kv: KvStep) -> int:
    return 1 if kv.decodes is not None else kv.prefills[0][0].count


def _mask(kv: KvStep) -> Tensor:
    """[rows, context] of 0 and 1: what of each row's context exists."""
    at = torch.arange(_context(kv), device=kv.places.device)
    if kv.decodes is None:
        return torch.ones_like(at)[None]
    lengths = kv.decodes.lengths if kv.decodes.put is None else kv.decodes.lengths[kv.decodes.put]
    return (at < lengths[:, None]).long()
