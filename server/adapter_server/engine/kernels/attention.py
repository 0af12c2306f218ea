"""Attention over pages in place.

    paged_decode    softmax(cap(q @ k[places].T · scale) and sinks) @ v[places]         for each row with one new token
    paged_prefill   the same for each token of a row with several, over the keys up to its own

Decode reads every key once: at 32 rows of 1024 keys (8 heads of 128, bfloat16) 134 MB a layer, for 4 FLOPs a number and
head of a group, so that memory bounds it. Its grid is (rows × key heads × chunks) by capacities, PROGRAMS at most or
little more, so that room for long rows costs short ones nothing; chunks of CHUNK keys make some hundreds of programs of
32 rows also where contexts are short. A chunk's numbers are the same whichever program has it.

Sources: split-KV attention as in Flash-Decoding (arXiv 2311.01282), tiles over queries as in FlashAttention-2
(arXiv 2307.08691), pages as in vLLM (arXiv 2309.06180).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapter_server.engine.kernels.launch import DTYPES, OPTIONS, compute_of, on, power
from adapter_server.engine.operands import Form, Rows

CHUNK, MOST_CHUNKS, KEYS = 64, 64, 64  # keys of a chunk at least, chunks of a row at most, keys that one turn reads
ATTEND_WARPS, COMBINE_WARPS, TOGETHER = 4, 4, 8  # chunks that combine reads at once
PROGRAMS = 2048  # where a row could have more chunks than so many programs have, each takes several
QUERIES, PREFILL_WARPS, PREFILL_STAGES = 64, 4, 2  # tokens of a tile with several


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
        _attend[n, kv_heads, min(chunks, triton.cdiv(PROGRAMS, n * kv_heads))](
            parts, sums, q, keys, values, rows.table, rows.lengths, rows.tokens,
            q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
            rows.table.stride(0), form.scale, 0.0 if form.cap is None else form.cap, window, chunks,
            CAPPED=form.cap is not None, HEADS=heads, GROUP=heads // kv_heads, GROUPS=power(heads // kv_heads),
            PAGE=rows.page, DIM=dim, DIMS=power(dim), WIDTH=dim_v, WIDTHS=power(dim_v),
            HELD=DTYPES[values.dtype], COMPUTE=compute_of(values.dtype), num_warps=ATTEND_WARPS, **spans,
        )  # fmt: skip
        _combine[n, heads](
            out, parts, sums, q if form.sinks is None else form.sinks, rows.lengths, rows.tokens,
            out.stride(0), out.stride(1), window, chunks,
            SINKS=form.sinks is not None, HEADS=heads, WIDTH=dim_v, WIDTHS=power(dim_v), num_warps=COMBINE_WARPS,
            TOGETHER=TOGETHER, **spans,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """The rows with several new tokens, cut into tiles of at most QUERIES of a row's.

    table int32 [n, pages]; tiles int32 [tiles, 4]: row of the table, first packed token, tokens (0: padding), position
    of the first.
    """

    table: Tensor
    tiles: Tensor
    page: int


def paged_prefill(out: Tensor, q: Tensor, keys: Tensor, values: Tensor, chunks: Chunks, form: Form) -> None:
    """out [T, heads, dim_v] at the tiles' tokens, from q [heads, T, dim], keys and values [places, kv_heads, dim].

    A token at position p sees the keys 0..p of its row, its own among them.

    Reference: softmax(cap(q[:, t] @ keys[places[: p + 1], h].T * scale) and sinks) @ values[places[: p + 1], h]
    """
    heads, (_, kv_heads, dim), dim_v = q.shape[0], keys.shape, values.shape[2]
    q = q if q.stride(2) == 1 else q.contiguous()
    precise = "tf32x3" if values.dtype == torch.float32 else "ieee"
    with on(q):
        _prefill[len(chunks.tiles), heads](
            out, q, keys, values, q if form.sinks is None else form.sinks, chunks.table, chunks.tiles,
            out.stride(0), out.stride(1), q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), values.stride(0),
            values.stride(1), chunks.table.stride(0), form.scale, 0.0 if form.cap is None else form.cap,
            0 if form.window is None else form.window,
            CAPPED=form.cap is not None, SINKS=form.sinks is not None, GROUP=heads // kv_heads, PAGE=chunks.page,
            DIM=dim, DIMS=power(dim), WIDTH=dim_v, WIDTHS=power(dim_v), HELD=DTYPES[values.dtype],
            COMPUTE=compute_of(values.dtype), PRECISION=precise, QUERIES=QUERIES, KEYS=_turn(keys),
            num_warps=PREFILL_WARPS if power(dim_v) <= 128 else 2 * PREFILL_WARPS, num_stages=PREFILL_STAGES, **OPTIONS,
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


@triton.jit
def _places(pages, p, live, PAGE: tl.constexpr):
    """Where a row's keys `p` are in the pool."""
    page = tl.load(pages + p // PAGE, mask=live, other=0).to(tl.int64)
    return page * PAGE + p % PAGE


@triton.jit
def _scores(asked, k, scale, cap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """q k · scale, within ±cap where that is asked for."""
    s = tl.dot(asked, k, input_precision=PRECISION) * scale
    if CAPPED:
        s = cap * (1.0 - 2.0 / (tl.exp(2.0 * s / cap) + 1.0))
    return s


@triton.jit(do_not_specialize=["table_row", "window", "chunks"])
def _attend(
    parts, sums, q, keys, values, table, lengths, tokens,
    q_head, q_token, k_place, k_head, v_place, v_head, table_row, scale, cap, window, chunks,
    CAPPED: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    PAGE: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, WIDTH: tl.constexpr, WIDTHS: tl.constexpr,
    HELD: tl.constexpr, COMPUTE: tl.constexpr, CHUNK: tl.constexpr, MOST: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Some chunks of a row's keys for the heads of one kv head: Σ exp(s − top) v, and (top, Σ exp(s − top)) of each."""
    row, kv_head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row).to(tl.int32)
    start, each = _spans(length, window, CHUNK, MOST, KEYS)
    g, d, w = tl.arange(0, GROUPS), tl.arange(0, DIMS), tl.arange(0, WIDTHS)
    head = kv_head * GROUP + g
    for chunk in range(tl.program_id(2), tl.cdiv(length - start, each), tl.num_programs(2)):
        begin = start + chunk * each
        end = tl.minimum(begin + each, length)
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
            place = _places(table + row * table_row, p, live, PAGE)
            mask = live[None, :] & (d < DIM)[:, None]
            k = tl.load(keys + place[None, :] * k_place + kv_head * k_head + d[:, None], mask=mask, other=0.0)
            s = _scores(asked, k.to(COMPUTE), scale, cap, CAPPED, "ieee")
            s = tl.where(live[None, :], s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            weight = tl.exp(s - higher[:, None])
            fade = tl.exp(top - higher)
            mask = live[:, None] & (w < WIDTH)[None, :]
            v = tl.load(values + place[:, None] * v_place + kv_head * v_head + w[None, :], mask=mask, other=0.0)
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
    CHUNK: tl.constexpr, MOST: tl.constexpr, KEYS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """out[token, head] = Σ exp(topᵢ − top) partᵢ / Σ exp(topᵢ − top) sumᵢ, in the order of the keys."""
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row).to(tl.int32)
    start, each = _spans(length, window, CHUNK, MOST, KEYS)
    w, chunks_of_row = tl.arange(0, WIDTHS), tl.cdiv(length - start, each)
    top, total = float("-inf"), 0.0
    if SINKS:
        top, total = tl.load(sinks + head).to(tl.float32), 1.0
    mixed = tl.zeros((WIDTHS,), tl.float32)
    for low in range(0, chunks_of_row, TOGETHER):
        chunk = low + tl.arange(0, TOGETHER)
        there = chunk < chunks_of_row
        at = (row.to(tl.int64) * HEADS + head) * chunks + chunk
        tops = tl.load(sums + at * 2, mask=there, other=float("-inf"))
        totals = tl.load(sums + at * 2 + 1, mask=there, other=0.0)
        part = tl.load(parts + at[:, None] * WIDTH + w[None, :], mask=there[:, None] & (w < WIDTH)[None, :], other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        weight, fade = tl.exp(tops - higher), tl.exp(top - higher)
        total = total * fade + tl.sum(weight * totals, 0)
        mixed = mixed * fade + tl.sum(weight[:, None] * part, 0)
        top = higher
    target = out + tl.load(tokens + row).to(tl.int64) * out_token + head * out_head + w
    tl.store(target, (mixed / total).to(out.dtype.element_ty), mask=w < WIDTH)


@triton.jit(do_not_specialize=["table_row", "window"])
def _prefill(
    out, q, keys, values, sinks, table, tiles, out_token, out_head, q_head, q_token, k_place, k_head, v_place, v_head,
    table_row, scale, cap, window,
    CAPPED: tl.constexpr, SINKS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr, WIDTH: tl.constexpr, WIDTHS: tl.constexpr, HELD: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One tile of a row's tokens under one head, over the pages that it sees; nothing of a tile's is split."""
    tile, head = tiles + tl.program_id(0) * 4, tl.program_id(1)
    row, first, count, past = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    if count > 0:
        kv_head, i = head // GROUP, tl.arange(0, QUERIES)
        d, w = tl.arange(0, DIMS), tl.arange(0, WIDTHS)
        live = i < count
        position = past + tl.minimum(i, count - 1)  # one past the end asks as the last, so that it sees a key
        token = (first + i).to(tl.int64)
        wanted = live[:, None] & (d < DIM)[None, :]
        asked = tl.load(q + head.to(tl.int64) * q_head + token[:, None] * q_token + d[None, :], mask=wanted, other=0.0)
        asked = asked.to(COMPUTE)
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        if SINKS:
            top = tl.zeros((QUERIES,), tl.float32) + tl.load(sinks + head).to(tl.float32)
            total += 1.0
        mixed = tl.zeros((QUERIES, WIDTHS), tl.float32)
        end = past + count
        begin = tl.where(window > 0, tl.maximum(past - window + 1, 0), 0)
        for at in range(begin, end, KEYS):
            p = at + tl.arange(0, KEYS)
            place = _places(table + row * table_row, p, p < end, PAGE)
            mask = (p < end)[None, :] & (d < DIM)[:, None]
            k = tl.load(keys + place[None, :] * k_place + kv_head * k_head + d[:, None], mask=mask, other=0.0)
            s = _scores(asked, k.to(COMPUTE), scale, cap, CAPPED, PRECISION)
            seen = (p[None, :] <= position[:, None]) & ((window <= 0) | (p[None, :] > position[:, None] - window))
            s = tl.where(seen, s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            steady = tl.where(higher == float("-inf"), 0.0, higher)  # a token that has seen no key yet
            weight = tl.exp(s - steady[:, None])
            fade = tl.exp(top - steady)
            mask = (p < end)[:, None] & (w < WIDTH)[None, :]
            v = tl.load(values + place[:, None] * v_place + kv_head * v_head + w[None, :], mask=mask, other=0.0)
            total = total * fade + tl.sum(weight, 1)
            part = tl.dot(weight.to(HELD).to(COMPUTE), v.to(COMPUTE), input_precision=PRECISION)
            mixed = mixed * fade[:, None] + part
            top = higher
        target = out + token[:, None] * out_token + head * out_head + w[None, :]
        tl.store(target, (mixed / total[:, None]).to(out.dtype.element_ty), mask=live[:, None] & (w < WIDTH)[None, :])
