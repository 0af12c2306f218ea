"""Attention over packed rows, registered with transformers' AttentionInterface.

The model calls it per layer with the new tokens' queries, keys and values after RoPE, all rows packed in [1, T]. New
keys go to the pool; rows with several new tokens are read one by one, rows with one new token as one padded batch.
Where kernels read pages in place, either kind goes at once.
`fused.py` calls `attend` itself, after it has written the keys.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from adapter_server.engine.kv import Decodes, KvStep, PagePool
from adapter_server.engine.routing import Segment, Step, add_to, current
from adapter_server.families.base import GatedPrompt

if TYPE_CHECKING:
    from adapter_server.engine.kernels import Chunks, Form

NAME = "adapter_server"


class Probe:
    """While one is set, attention notes each layer's kv_heads, key dim and value dim, the module that called, and how
    its scores become weights. See `model.py`.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[int, int, int]] = {}
        self.callers: dict[int, nn.Module] = {}
        self.scores: dict[int, Scores] = {}


_probe: Probe | None = None


def set_probe(probe: Probe | None) -> None:
    global _probe  # noqa: PLW0603 - the interface is a global of transformers' too
    _probe = probe


class Scores:
    """How one layer's scores become weights: scale, soft cap, sinks, sliding window."""

    def __init__(self, scaling: float, softcap: float | None, sinks: Tensor | None, window: int | None) -> None:
        self.scaling, self.softcap, self.sinks, self.window = scaling, softcap, sinks, window

    @property
    def simple(self) -> bool:
        return self.softcap is None and self.sinks is None

    def form(self, kernels: ModuleType) -> Form:
        """As the kernels take it."""
        form: Form = kernels.Form(self.scaling, self.softcap, self.window, self.sinks)
        return form

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """q [n, heads, t, dim], k and v [n, kv_heads, context, dim], bias added to the scores → [n, heads, t, dim_v].

        bias None means causal with t = context.
        """
        if self.simple and bias is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scaling, enable_gqa=True)
        if self.simple:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scaling, enable_gqa=True)
        return self._eager(q, k, v, causal(q.shape[2], k.shape[2], None, q) if bias is None else bias)

    def _eager(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """The textbook form, for soft caps (Gemma 2) and sinks (gpt-oss)."""
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = (q @ k.transpose(-1, -2)) * self.scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores + bias
        if self.sinks is None:
            return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1, dtype=torch.float32)[..., :-1]
        return weights.to(v.dtype) @ v


def causal(t: int, context: int, window: int | None, like: Tensor) -> Tensor:
    """[t, context] to be added: query i stands at position context − t + i."""
    query = torch.arange(context - t, context, device=like.device)[:, None]
    key = torch.arange(context, device=like.device)[None, :]
    seen = key <= query if window is None else (key <= query) & (key > query - window)
    return torch.zeros(t, context, dtype=like.dtype, device=like.device).masked_fill_(~seen, -math.inf)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, T, dim], key and value [1, kv_heads, T, dim] → ([1, T, heads, dim_v], None)."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux, sliding_window)
    if _probe is not None:
        _probe.layers[layer] = (key.shape[1], key.shape[3], value.shape[3])
        _probe.callers[layer], _probe.scores[layer] = module, scores
    step = current()
    if step is None or step.kv is None:
        return _alone(step, layer, query, key, value, scores).transpose(1, 2), None
    step.kv.pool.write(layer, step.kv.places, key[0].transpose(0, 1), value[0].transpose(0, 1))
    return attend(step, step.kv, layer, query, value.shape[3], scores), None


def attend(step: Step, kv: KvStep, layer: int, query: Tensor, width: int, scores: Scores) -> Tensor:
    """query [1, heads, T, dim] over the pool, which has the new keys → [1, T, heads, width of a value]."""
    fresh = query.new_empty if kv.chunks is None else query.new_zeros  # tiles leave out tokens of padding
    out = fresh(1, query.shape[2], query.shape[1], width)
    for chunk, places in kv.prefills:
        span = slice(chunk.start, chunk.start + chunk.count)
        k, v = kv.context(layer, places)
        q = query[:, :, span]
        bias = None
        if chunk.past or (scores.window is not None and chunk.context > scores.window):
            bias = causal(chunk.count, chunk.context, scores.window, q)
        out[:, span] = scores.attend(q, k, v, bias).transpose(1, 2)
    if kv.chunks is not None:
        _prefill(out, query, layer, kv, kv.chunks, scores)
    if kv.decodes is not None:
        _decode(out, query, layer, kv, kv.decodes, scores)
    for segment in step.routing.segments:
        if prompt := segment.placed.gated.get(layer):
            _gated(out, query, layer, step, segment, prompt)
    return out


def _prefill(out: Tensor, query: Tensor, layer: int, kv: KvStep, chunks: Chunks, scores: Scores) -> None:
    """All rows with several new tokens at once, where their pages are."""
    pool = kv.pool
    if not isinstance(pool, PagePool) or pool.kernels is None:
        raise RuntimeError("tiles of pages were planned without kernels to read them")
    pool.kernels.paged_prefill(
        out[0], query[0], pool.keys[layer], pool.values[layer], chunks, scores.form(pool.kernels)
    )


def _decode(out: Tensor, query: Tensor, layer: int, kv: KvStep, decodes: Decodes, scores: Scores) -> None:
    """One query per row: the heads of a kv head become the queries of one small attention."""
    pool = kv.pool
    if (kernels := pool.kernels) is not None:
        rows = kernels.Rows(decodes.table, decodes.lengths, decodes.tokens, pool.page, decodes.context)
        form = scores.form(kernels)
        kernels.paged_decode(out[0], query[0], pool.keys[layer], pool.values[layer], rows, form)
        return
    n = decodes.take.shape[0]
    k, v = kv.batch(layer, n)
    q = query[0].index_select(1, decodes.take).transpose(0, 1)  # [n, heads, dim]
    bias = decodes.mask(scores.window, query.dtype)
    if scores.simple:
        y = scores.attend(q.reshape(n, k.shape[1], -1, q.shape[2]), k, v, bias).reshape(n, q.shape[1], -1)
    else:
        y = scores.attend(q.unsqueeze(2), k, v, bias).squeeze(2)
    out[0].index_copy_(0, decodes.tokens, y if decodes.put is None else y.index_select(0, decodes.put))


def _gated(out: Tensor, query: Tensor, layer: int, step: Step, segment: Segment, prompt: GatedPrompt) -> None:
    """What an adapter's own prompts add, by the queries of its tokens; behind the last Linear, it waits in the step."""
    more = prompt.attend(query[0][:, segment.tokens])  # [n, heads, dim]
    more = more if segment.weights is None else more * segment.weights[:, :, None]
    if not prompt.behind:
        add_to(out[0], segment, more)
        return
    if layer not in step.added:
        step.added[layer] = torch.zeros_like(out).flatten(2)
    add_to(step.added[layer][0], segment, more.flatten(1))


def _alone(step: Step | None, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """One sequence with no past: a soft prompt, whose keys and values are kept, or a look at the model's structure."""
    if step is not None and step.capture is not None:
        step.capture[layer] = (k[0].transpose(0, 1).contiguous(), v[0].transpose(0, 1).contiguous())
    bias = causal(q.shape[2], q.shape[2], scores.window, q)
    return scores.attend(q, k, v, bias)


AttentionInterface.register(NAME, packed_attention)
