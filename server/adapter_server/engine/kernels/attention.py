"""Attention over pages in place.

    paged_decode   softmax(cap(q @ k[places].T · scale) + sinks) @ v[places]          for each row

Source: split-KV attention as in Flash-Decoding (arXiv 2311.01282).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapter_server.engine.kernels.launch import DTYPES, OPTIONS, compute_of, on, power

CHUNK, MOST_CHUNKS, KEYS = 128, 64, 64  # keys of a chunk at least, chunks of a row at most, keys that one turn reads


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows with one new token: where each one's keys are, and which packed token asks.

    table int32 [n, pages], lengths [n] with the new token, tokens [n]; `most` is the greatest length.
    """

    table: Tensor
    lengths: Tensor
    tokens: Tensor
    page: int
    most: int


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """How scores become weights: times `scale`, capped by cap · tanh(s / cap), the last `window` keys, sinks [heads]"""

    scale: float
    cap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None


def paged_decode(out: Tensor, q: Tensor, keys: Tensor, values: Tensor, rows: Rows, form: Form) -> None:
    """out [T, heads, dim_v] at the rows' tokens, from q [heads, T, dim], keys and values [places, kv_heads, dim].

    Reference: softmax(cap(q[:, t] @ keys[places, h].T * scale) and sinks) @ values[places, h] for each row and head
    """
    n, heads, (_, kv_heads, dim), dim_v = len(rows.tokens), q.shape[0], keys.shape, values.shape[2]
    q = q if q.stride(2) == 1 else q.contiguous()
    seen = rows.most if form.window is None else min(rows.most, form.window)
    chunks = min(MOST_CHUNKS, triton.cdiv(seen, CHUNK))
    parts = torch.empty(n, heads, chunks, dim_v, dtype=torch.float32, device=q.device)
    sums = torch.empty(n, heads, chunks, 2, dtype=torch.float32, device=q.device)
    window = 0 if form.window is None else form.window
    spans = {"CHUNK": CHUNK, "MOST": MOST_CHUNKS, "KEYS": _turn(keys), **OPTIONS}
    with on(q):
        _attend[n, kv_heads, chunks](
            parts, sums, q, keys, values, rows.table, rows.lengths, rows.tokens,
            q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
            rows.table.stride(0), form.scale, 0.0 if form.cap is None else form.cap, window, chunks,
            CAPPED=form.cap is not None, HEADS=heads, GROUP=heads // kv_heads, GROUPS=power(heads // kv_heads),
            PAGE=rows.page, DIM=dim, DIMS=power(dim), WIDTH=dim_v, WIDTHS=power(dim_v),
            HELD=DTYPES[values.dtype], COMPUTE=compute_of(values.dtype), **spans,
        )  # fmt: skip
        _combine[n, heads](
            out, parts, sums, q if form.sinks is None else form.sinks, rows.lengths, rows.tokens,
            out.stride(0), out.stride(1), window, chunks,
            SINKS=form.sinks is not None, HEADS=heads, WIDTH=dim_v, WIDTHS=power(dim_v), **spans,
        )  # fmt: skip


def _turn(keys: Tensor) -> int:
    """Keys at a time: fewer where they are wide, so that they fit in shared memory."""
    narrow = power(keys.shape[2]) * keys.element_size() <= 256
    return KEYS if narrow else KEYS // 2


@triton.jit
def _spans(length, window, CHUNK: tl.constexpr, MOST: tl.constexpr, KEYS: tl.constexpr):
    """(first key seen, keys of a chunk) of a row: by its own length, so that it is one in every batch."""
    start = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    each = tl.cdiv(tl.cdiv(length - start, MOST), KEYS) * KEYS
    return start, tl.maximum(each, CHUNK)


@triton.jit(do_not_specialize=["table_row", "window", "chunks"])
def _attend(
    parts, sums, q, keys, values, table, lengths, tokens,
    q_head, q_token, k_place, k_head, v_place, v_head, table_row, scale, cap, window, chunks,
    CAPPED: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    PAGE: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, WIDTH: tl.constexpr, WIDTHS: tl.constexpr,
    HELD: tl.constexpr, COMPUTE: tl.constexpr, CHUNK: tl.constexpr, MOST: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One chunk of a row's keys for the heads of one kv head: Σ exp(s − top) v, and (top, Σ exp(s − top))."""
    row, kv_head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    start, each = _spans(length, window, CHUNK, MOST, KEYS)
    begin = start + chunk * each
    end = tl.minimum(begin + each, length)
    if begin < end:
        g, d, w = tl.arange(0, GROUPS), tl.arange(0, DIMS), tl.arange(0, WIDTHS)
        head = kv_head * GROUP + g
        token = tl.load(tokens + row).to(tl.int64)
        asked = tl.load(
            q + head[:, None].to(tl.int64) * q_head + token * q_token + d[None, :],
            mask=(g < GROUP)[:, None] & (d < DIM)[None, :],
            other=0.0,
        ).to(COMPUTE)
        top = tl.full((GROUPS,), float("-inf"), tl.float32)
        total = tl.zeros((GROUPS,), tl.float32)
        mixed = tl.zeros((GROUPS, WIDTHS), tl.float32)
        for at in range(begin, end, KEYS):
            p = at + tl.arange(0, KEYS)
            live = p < end
            page = tl.load(table + row * table_row + p // PAGE, mask=live, other=0).to(tl.int64)
            place = page * PAGE + p % PAGE
            k = tl.load(
                keys + place[None, :] * k_place + kv_head * k_head + d[:, None],
                mask=live[None, :] & (d < DIM)[:, None],
                other=0.0,
            )
            s = tl.dot(asked, k.to(COMPUTE), input_precision="ieee") * scale
            if CAPPED:
                s = cap * (1.0 - 2.0 / (tl.exp(2.0 * s / cap) + 1.0))
            s = tl.where(live[None, :], s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            weight = tl.exp(s - higher[:, None])
            fade = tl.exp(top - higher)
            v = tl.load(
                values + place[:, None] * v_place + kv_head * v_head + w[None, :],
                mask=live[:, None] & (w < WIDTH)[None, :],
                other=0.0,
            )
            total = total * fade + tl.sum(weight, 1)
            mixed = mixed * fade[:, None] + tl.dot(weight.to(HELD).to(COMPUTE), v.to(COMPUTE), input_precision="ieee")
            top = higher
        to = (row.to(tl.int64) * HEADS + head) * chunks + chunk
        tl.store(parts + to[:, None] * WIDTH + w[None, :], mixed, mask=(g < GROUP)[:, None] & (w < WIDTH)[None, :])
        tl.store(sums + to * 2, top, mask=g < GROUP)
        tl.store(sums + to * 2 + 1, total, mask=g < GROUP)


@triton.jit(do_not_specialize=["window", "chunks"])
def _combine(
    out, parts, sums, sinks, lengths, tokens, out_token, out_head, window, chunks,
    SINKS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTHS: tl.constexpr,
    CHUNK: tl.constexpr, MOST: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """out[token, head] = Σ exp(topᵢ − top) partᵢ / Σ exp(topᵢ − top) sumᵢ, in the order of the keys."""
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row).to(tl.int32)
    start, each = _spans(length, window, CHUNK, MOST, KEYS)
    w = tl.arange(0, WIDTHS)
    at = (row.to(tl.int64) * HEADS + head) * chunks
    top = tl.load(sums + at * 2)
    if SINKS:
        top = tl.maximum(top, tl.load(sinks + head).to(tl.float32))
    for chunk in range(1, tl.cdiv(length - start, each)):
        top = tl.maximum(top, tl.load(sums + (at + chunk) * 2))
    total = tl.exp(tl.load(sinks + head).to(tl.float32) - top) if SINKS else 0.0
    mixed = tl.zeros((WIDTHS,), tl.float32)
    for chunk in range(0, tl.cdiv(length - start, each)):
        fade = tl.exp(tl.load(sums + (at + chunk) * 2) - top)
        total += fade * tl.load(sums + (at + chunk) * 2 + 1)
        mixed += fade * tl.load(parts + (at + chunk) * WIDTH + w, mask=w < WIDTH, other=0.0)
    target = out + tl.load(tokens + row).to(tl.int64) * out_token + head * out_head + w
    tl.store(target, (mixed / total).to(out.dtype.element_ty), mask=w < WIDTH)
