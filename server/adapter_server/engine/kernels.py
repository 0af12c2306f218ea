"""Triton kernels for CUDA: the low-rank products of a step's adapters, and attention of rows with one new token.

The only door to triton; `forms.py` decides who comes through it. Each kernel's reference is one line of torch:

    add_low_rank   y[t] += w · (x[t] @ A.T) @ Bt                   for each adapter's tokens t
    paged_decode   softmax(cap(q @ k[places].T · scale) + sinks) @ v[places]          for each row

What differs from step to step is never compiled in: the probe at start compiles all that serving runs.

Both sum in an order that depends on a row's own sizes alone, without atomics: who else is in the step changes no bit.
Sources: Punica's shrink and expand (arXiv 2310.18547), split-KV attention as in Flash-Decoding (arXiv 2311.01282).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16  # of a tile; what a tensor core takes at least
RANKS, DEPTH, WIDE = 32, 128, 64  # rows of A, of its columns, and columns of Bt, that one program holds
MOST_SPLITS, SPLIT_DEPTH = 8, 512  # of the sum over x's columns: one for each so many of them
HEAD, MEMBER = 2, 3  # fields of a table's row: A's address and rows; per member Bt's address, first row of A, rank

CHUNK, MOST_CHUNKS, KEYS = 128, 64, 64  # keys of a chunk at least, chunks of a row at most, keys that one turn reads

OPTIONS = {"enable_fp_fusion": True}  # triton's default is about to change
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def splits_of(inp: int) -> int:
    """Of the sum over `inp` columns. By the width alone, so that a row's sums have one order in every batch."""
    return max(1, min(MOST_SPLITS, inp // SPLIT_DEPTH))


def _compute(dtype: torch.dtype) -> tl.dtype:
    """What products are formed in. Triton's interpreter multiplies bfloat16 by its bits: there in float32, as exact."""
    return DTYPES[torch.float32 if dtype == torch.bfloat16 and triton.knobs.runtime.interpret else dtype]


def _on(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whichever the tensors are on."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """The (token, adapter) pairs of a step, adapter by adapter, cut into tiles of at most TOKENS.

    tokens, weights [pairs]; places [tiles, 3]: table row, first pair, pairs. `layers` are the ranges of tiles in which
    no token comes twice: one, or under composition several, that add one after the other.
    """

    tokens: Tensor
    weights: Tensor
    places: Tensor
    layers: Sequence[tuple[int, int]]
    width: int  # of the small products: the most rows that an adapter's A has, in whole blocks
    scratch: Tensor  # [MOST_SPLITS · pairs · width] float32


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """A group's columns in blocks [blocks, 4]: member, first column in it, its width, its place in y."""

    blocks: Tensor
    inp: int
    at: int  # where a table's row has the group


def add_low_rank(y: Tensor, x: Tensor, tiles: Tiles, table: Tensor, outputs: Outputs, held: torch.dtype) -> None:
    """y [T, outs] += w · B (A x), x [T, in], on the tensors of dtype `held` that the table [adapters, fields] names.

    Reference: for each adapter's tokens t and each member, y[t, columns] += w * (x[t] @ A.T) @ Bt
    """
    pairs, splits = len(tiles.tokens), splits_of(outputs.inp)
    formats = {"HELD": DTYPES[held], "COMPUTE": _compute(held), "TOKENS": TOKENS, "RANKS": RANKS, **OPTIONS}
    with _on(x):
        _shrink[len(tiles.places), tiles.width // RANKS, splits](
            x, tiles.scratch, tiles.tokens, tiles.places, table, x.stride(0), table.stride(0), outputs.at, outputs.inp,
            pairs, tiles.width, splits, DEPTH=DEPTH, **formats,
        )  # fmt: skip
        for start, stop in tiles.layers:
            _expand[stop - start, len(outputs.blocks)](
                y, tiles.scratch, tiles.tokens, tiles.weights, tiles.places, table, outputs.blocks, y.stride(0),
                table.stride(0), outputs.at, pairs, tiles.width, start, splits, WIDE=WIDE, **formats,
            )  # fmt: skip


@triton.jit(do_not_specialize=["table_row", "at", "pairs", "splits"])
def _shrink(
    x, parts, tokens, places, table, x_row, table_row, at, inp, pairs, width, splits,
    HELD: tl.constexpr, COMPUTE: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """parts [splits, pairs, width] = x[tokens][:, split] @ A[:, split].T for a tile, a block of A's rows, a split."""
    place = places + tl.program_id(0) * 3
    first, count = tl.load(place + 1), tl.load(place + 2)
    field = table + tl.load(place).to(tl.int64) * table_row + at
    rows = tl.load(field + 1).to(tl.int32)
    begin = tl.program_id(1) * RANKS
    if begin < rows:
        A = tl.multiple_of(tl.load(field), 16).to(tl.pointer_type(HELD))
        split = tl.program_id(2)
        span = tl.cdiv(tl.cdiv(inp, splits), DEPTH) * DEPTH
        i, r, d = tl.arange(0, TOKENS), begin + tl.arange(0, RANKS), tl.arange(0, DEPTH)
        token = tl.load(tokens + first + i, mask=i < count, other=0).to(tl.int64)
        total = tl.zeros((TOKENS, RANKS), tl.float32)
        for start in range(split * span, tl.minimum((split + 1) * span, inp), DEPTH):
            k = start + d
            live = (i < count)[:, None] & (k < inp)[None, :]
            part = tl.load(x + token[:, None] * x_row + k[None, :], mask=live, other=0.0)
            weight = tl.load(
                A + r[None, :].to(tl.int64) * inp + k[:, None],
                mask=(r < rows)[None, :] & (k < inp)[:, None],
                other=0.0,
            )
            total = tl.dot(part.to(HELD).to(COMPUTE), weight.to(COMPUTE), total, input_precision="ieee")
        target = parts + (split * pairs + first + i)[:, None].to(tl.int64) * width + r[None, :]
        tl.store(target, total, mask=(i < count)[:, None] & (r < rows)[None, :])


@triton.jit(do_not_specialize=["table_row", "at", "pairs", "start", "splits"])
def _expand(
    y, parts, tokens, weights, places, table, blocks, y_row, table_row, at, pairs, width, start, splits,
    HELD: tl.constexpr, COMPUTE: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y[tokens, columns] += weights * parts.sum(0)[:, member's] @ Bt for a tile and a block of columns."""
    place = places + (start + tl.program_id(0)) * 3
    first, count = tl.load(place + 1), tl.load(place + 2)
    block = blocks + tl.program_id(1) * 4
    member, begin, out, to = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    field = table + tl.load(place).to(tl.int64) * table_row + at + 2 + 3 * member
    rank = tl.load(field + 2).to(tl.int32)
    if rank > 0:
        Bt = tl.multiple_of(tl.load(field), 16).to(tl.pointer_type(HELD))
        above = tl.load(field + 1).to(tl.int32)
        i, c = tl.arange(0, TOKENS), begin + tl.arange(0, WIDE)
        live, inside = i < count, c < out
        weight = tl.load(weights + first + i, mask=live, other=0.0)
        total = tl.zeros((TOKENS, WIDE), tl.float32)
        for low in range(0, rank, RANKS):
            r = low + tl.arange(0, RANKS)
            small = tl.zeros((TOKENS, RANKS), tl.float32)
            for split in range(splits):
                source = parts + (split * pairs + first + i)[:, None].to(tl.int64) * width + (above + r)[None, :]
                small += tl.load(source, mask=live[:, None] & (r < rank)[None, :], other=0.0)
            small = (small * weight[:, None]).to(HELD).to(COMPUTE)
            more = tl.load(
                Bt + r[:, None].to(tl.int64) * out + c[None, :],
                mask=(r < rank)[:, None] & inside[None, :],
                other=0.0,
            )
            total = tl.dot(small, more.to(COMPUTE), total, input_precision="ieee")
        token = tl.load(tokens + first + i, mask=live, other=0).to(tl.int64)
        target = y + token[:, None] * y_row + (to + tl.arange(0, WIDE))[None, :]
        mask = live[:, None] & inside[None, :]
        old = tl.load(target, mask=mask, other=0.0)
        tl.store(target, (old.to(tl.float32) + total).to(old.dtype), mask=mask)


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
    with _on(q):
        _attend[n, kv_heads, chunks](
            parts, sums, q, keys, values, rows.table, rows.lengths, rows.tokens,
            q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
            rows.table.stride(0), form.scale, 0.0 if form.cap is None else form.cap, window, chunks,
            CAPPED=form.cap is not None, HEADS=heads, GROUP=heads // kv_heads, GROUPS=_power(heads // kv_heads),
            PAGE=rows.page, DIM=dim, DIMS=_power(dim), WIDTH=dim_v, WIDTHS=_power(dim_v),
            HELD=DTYPES[values.dtype], COMPUTE=_compute(values.dtype), **spans,
        )  # fmt: skip
        _combine[n, heads](
            out, parts, sums, q if form.sinks is None else form.sinks, rows.lengths, rows.tokens,
            out.stride(0), out.stride(1), window, chunks,
            SINKS=form.sinks is not None, HEADS=heads, WIDTH=dim_v, WIDTHS=_power(dim_v), **spans,
        )  # fmt: skip


def _turn(keys: Tensor) -> int:
    """Keys at a time: fewer where they are wide, so that they fit in shared memory."""
    narrow = _power(keys.shape[2]) * keys.element_size() <= 256
    return KEYS if narrow else KEYS // 2


def _power(n: int) -> int:
    """The power of two that a tensor core takes for it."""
    return max(16, 1 << (n - 1).bit_length())


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
