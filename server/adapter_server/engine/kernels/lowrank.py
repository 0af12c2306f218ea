"""The low-rank products of a step's adapters, and the vectors of those that are alone on their tokens.

    add_low_rank   y[t] += w · (mul · y[t] + add + (x[t] @ A.T) @ Bt)           for each adapter's tokens t
    low_rank       more[t] = w · (add + (x[t] @ A.T) @ Bt)                      the same for somebody else to add

Two launches: shrink writes partial sums of x @ A.T, expand adds them up and passes over y once. Both are bound by
memory. Per adapter and group they read A (rows · in), Bt (rank · out) and the vectors once per tile, and per token x,
y twice, and the partial sums (splits · rank float32, from the cache); they compute 2 · rank · (in + out) FLOPs a token.

A row of up to FEW tokens goes in tiles of 1, 2 or FEW tokens, where products are fused multiply-adds in float32: at so
few tokens these keep up with memory, and a tensor core's tile would be nearly empty. A program holds one block of A,
loaded in one go, so that all its bytes are in flight at once: RANKS rows of `span_of(in)` columns, 8 to 32 kB in
bfloat16; a group has some hundreds of programs. One of expand holds RANKS rows of Bt, WIDE columns each: 4 kB, in one
warp, whose sums over ranks need no barrier. Longer rows go in tiles of MANY tokens on tensor cores, which read A much
seldomer; adapters in float32 take three products in tf32 for one. Which way a row goes, and how its sums are split,
depends on its own number of tokens and the group's width alone.

Source: Punica's shrink and expand (arXiv 2310.18547).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapter_server.engine.kernels.launch import DTYPES, OPTIONS, compute_of, on, power

FEW, MANY = 4, 64  # tokens of a tile; FEW is written out in the kernels
RANKS, WIDE = 16, 128  # rows of A that one program holds, and columns of Bt
SHRINK_WARPS, EXPAND_WARPS = 4, 1  # of tiles of FEW
PROGRAMS = 2048  # of shrink; beyond, each takes several blocks of A's rows: `width` may be another adapter's
MOST_SPLITS, LEAST_SPAN = 16, 256  # of the sum over x's columns
MANY_SPLITS, MANY_RANKS, DEPTH, MANY_WARPS = 4, 32, 64, 4
HEAD, MEMBER = 4, 3  # fields: addresses of A, rows of A, addresses of mul and add; per member Bt's, first row, rank


def span_of(inp: int) -> int:
    """The columns of x in one partial sum of few tokens. By the width alone."""
    return max(LEAST_SPAN, power(-(-inp // MOST_SPLITS)))


class Run(NamedTuple):
    """The tiles start..stop−1, all of at most `tokens` tokens (1, 2, FEW or MANY), in which no token comes twice."""

    start: int
    stop: int
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """The (token, adapter) pairs of a step, adapter by adapter, cut into tiles.

    tokens, weights [pairs]; places [tiles, 4]: table row, first pair, pairs, 1 where its vectors are added too.
    A tile of 0 pairs is padding. Runs go one after the other: several where tokens have several adapters.
    """

    tokens: Tensor
    weights: Tensor
    places: Tensor
    runs: Sequence[Run]
    width: int  # of the small products: the most rows that an adapter's A has, in whole blocks of MANY_RANKS
    scratch: Tensor  # [MOST_SPLITS · pairs · width] float32


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """A group's columns in blocks of WIDE [blocks, 4]: member, first column in it, its width, its place in y."""

    blocks: Tensor
    inp: int
    at: int  # where a table's row has the group
    aligned: bool  # every member's width is a multiple of 16


def add_low_rank(y: Tensor, x: Tensor, tiles: Tiles, table: Tensor, outputs: Outputs, held: torch.dtype) -> None:
    """y [T, outs] += w · (mul · y + add + B (A x)), x [T, in], on the tensors of dtype `held` that the table names.

    Reference: for each adapter's tokens t and each member, y[t, columns] += w * (mul * y0 + add + (x[t] @ A.T) @ Bt)
    """
    with on(x):
        for run in tiles.runs:
            (_few if run.tokens <= FEW else _many)(y, x, tiles, run, table, outputs, held, True)


def low_rank(more: Tensor, x: Tensor, tiles: Tiles, table: Tensor, outputs: Outputs, held: torch.dtype) -> None:
    """more [T, outs] = w · (add + B (A x)) at the tokens of the tiles; the others are not written.

    Reference: for each adapter's tokens t and each member, more[t, columns] = w * (add + (x[t] @ A.T) @ Bt)
    """
    with on(x):
        for run in tiles.runs:
            (_few if run.tokens <= FEW else _many)(more, x, tiles, run, table, outputs, held, False)


def _few(
    y: Tensor, x: Tensor, tiles: Tiles, run: Run, table: Tensor, outputs: Outputs, held: torch.dtype, added: bool
) -> None:
    count, pairs, span = run.stop - run.start, len(tiles.tokens), span_of(outputs.inp)
    splits = triton.cdiv(outputs.inp, span)
    blocks = min(tiles.width // RANKS, triton.cdiv(PROGRAMS, count * splits))
    _shrink_few[count, blocks, splits](
        x, tiles.scratch, tiles.tokens, tiles.places, table, x.stride(0), table.stride(0), outputs.at, outputs.inp,
        pairs, tiles.width, run.start, HELD=DTYPES[held], TOKENS=run.tokens, RANKS=RANKS, SPAN=span,
        num_warps=max(SHRINK_WARPS, span // 128), **OPTIONS,
    )  # fmt: skip
    _expand_few[count, len(outputs.blocks)](
        y, tiles.scratch, tiles.tokens, tiles.weights, tiles.places, table, outputs.blocks, y.stride(0),
        table.stride(0), outputs.at, pairs, tiles.width, run.start, splits, HELD=DTYPES[held],
        ADDED=added, ALIGNED=outputs.aligned, TOKENS=run.tokens, RANKS=RANKS, WIDE=WIDE,
        SPLITS=triton.next_power_of_2(splits),
        num_warps=EXPAND_WARPS, **OPTIONS,
    )  # fmt: skip


def _many(
    y: Tensor, x: Tensor, tiles: Tiles, run: Run, table: Tensor, outputs: Outputs, held: torch.dtype, added: bool
) -> None:
    count, pairs, precise = run.stop - run.start, len(tiles.tokens), "tf32x3" if held == torch.float32 else "ieee"
    formats = {"HELD": DTYPES[held], "COMPUTE": compute_of(held), "TOKENS": MANY, "PRECISION": precise}
    _shrink_many[count, tiles.width // MANY_RANKS, MANY_SPLITS](
        x, tiles.scratch, tiles.tokens, tiles.places, table, x.stride(0), table.stride(0), outputs.at, outputs.inp,
        pairs, tiles.width, run.start, SPLITS=MANY_SPLITS, RANKS=MANY_RANKS, DEPTH=DEPTH, num_warps=MANY_WARPS,
        **formats, **OPTIONS,
    )  # fmt: skip
    _expand_many[count, len(outputs.blocks)](
        y, tiles.scratch, tiles.tokens, tiles.weights, tiles.places, table, outputs.blocks, y.stride(0),
        table.stride(0), outputs.at, pairs, tiles.width, run.start, SPLITS=MANY_SPLITS, ADDED=added,
        ALIGNED=outputs.aligned,        RANKS=RANKS, WIDE=WIDE, num_warps=MANY_WARPS, **formats, **OPTIONS,
    )  # fmt: skip


@triton.jit
def _pointer(field, DTYPE: tl.constexpr):
    """A tensor's, from the table: torch's begin at whole 16 bytes, which loads of a whole vector have to know."""
    return tl.multiple_of(tl.load(field).to(tl.pointer_type(DTYPE)), 16)


@triton.jit(do_not_specialize=["table_row", "at", "pairs", "start"])
def _shrink_few(
    x, parts, tokens, places, table, x_row, table_row, at, inp, pairs, width, start,
    HELD: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """parts [splits, pairs, width] = x[tokens][:, split] @ A[:, split].T for a tile, blocks of A's rows, a split."""
    place = places + (start + tl.program_id(0)) * 4
    first, count = tl.load(place + 1), tl.load(place + 2)
    field = table + tl.load(place).to(tl.int64) * table_row + at
    rows = tl.load(field + 1).to(tl.int32)
    begin, split = tl.program_id(1) * RANKS, tl.program_id(2)
    if (count > 0) & (begin < rows):
        A, k = _pointer(field, HELD), split * SPAN + tl.arange(0, SPAN)
        for low in range(begin, rows, tl.num_programs(1) * RANKS):
            r = low + tl.arange(0, RANKS)
            mask = (r < rows)[:, None] & (k < inp)[None, :]
            a = tl.load(A + r[:, None].to(tl.int64) * inp + k[None, :], mask=mask, other=0.0)
            x0 = _row(x, tokens, first, 0, count, x_row, k, k < inp)  # all loads first, so that they wait together
            if TOKENS > 1:
                x1 = _row(x, tokens, first, 1, count, x_row, k, k < inp)
            if TOKENS > 2:
                x2 = _row(x, tokens, first, 2, count, x_row, k, k < inp)
                x3 = _row(x, tokens, first, 3, count, x_row, k, k < inp)
            wide = a.to(tl.float32)
            to = parts + (split * pairs + first).to(tl.int64) * width + r
            tl.store(to, _dots(wide, x0, HELD), mask=r < rows)
            if TOKENS > 1:
                tl.store(to + width, _dots(wide, x1, HELD), mask=(r < rows) & (count > 1))
            if TOKENS > 2:
                tl.store(to + 2 * width, _dots(wide, x2, HELD), mask=(r < rows) & (count > 2))
                tl.store(to + 3 * width, _dots(wide, x3, HELD), mask=(r < rows) & (count > 3))


@triton.jit
def _row(x, tokens, first, i, count, row_stride, columns, inside):
    """Of x at the tile's i-th token; zeros where the tile has none."""
    token = tl.load(tokens + first + i, mask=i < count, other=0).to(tl.int64)
    return tl.load(x + token * row_stride + columns, mask=inside & (i < count), other=0.0)


@triton.jit
def _dots(wide, row, HELD: tl.constexpr):
    return tl.sum(wide * row.to(HELD).to(tl.float32)[None, :], 1)


@triton.jit(do_not_specialize=["table_row", "at", "pairs", "start", "splits"])
def _expand_few(
    y, parts, tokens, weights, places, table, blocks, y_row, table_row, at, pairs, width, start, splits,
    HELD: tl.constexpr, ADDED: tl.constexpr, ALIGNED: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr,
    WIDE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """y[tokens, columns] += weights · (mul · y + add + parts.sum(0) @ Bt) for a tile and a block of a member's columns;
    not ADDED, y is what is added alone.
    """
    place, first, count, own = _tile(places, start)
    member, begin, out, to = _block(blocks + tl.program_id(1) * 4, ALIGNED, WIDE)
    row = table + tl.load(place).to(tl.int64) * table_row + at
    field, rank, above = _member(row, member)
    if _touched(row, rank, count, own, ADDED):
        c = tl.arange(0, WIDE)
        inside = begin + c < out
        known = inside & ADDED
        y0 = _row(y, tokens, first, 0, count, y_row, to + c, known)
        if TOKENS > 1:
            y1 = _row(y, tokens, first, 1, count, y_row, to + c, known)
        if TOKENS > 2:
            y2 = _row(y, tokens, first, 2, count, y_row, to + c, known)
            y3 = _row(y, tokens, first, 3, count, y_row, to + c, known)
        mul, add = _vector(row + 2, own, to + c, inside, HELD), _vector(row + 3, own, to + c, inside, HELD)
        Bt = _pointer(field, HELD)
        total0 = tl.zeros((WIDE,), tl.float32)
        total1, total2, total3 = total0, total0, total0
        for low in range(0, rank, RANKS):
            r = low + tl.arange(0, RANKS)
            mask = (r < rank)[:, None] & inside[None, :]
            more = tl.load(Bt + r[:, None].to(tl.int64) * out + (begin + c)[None, :], mask=mask, other=0.0)
            source, live, wide = parts + above + r, r < rank, more.to(tl.float32)
            p0 = _parts(source, first, 0, count, pairs, width, live, splits, SPLITS)
            if TOKENS > 1:
                p1 = _parts(source, first, 1, count, pairs, width, live, splits, SPLITS)
            if TOKENS > 2:
                p2 = _parts(source, first, 2, count, pairs, width, live, splits, SPLITS)
                p3 = _parts(source, first, 3, count, pairs, width, live, splits, SPLITS)
            total0 += tl.sum(wide * _small(p0, weights, first, 0, count, HELD)[:, None], 0)
            if TOKENS > 1:
                total1 += tl.sum(wide * _small(p1, weights, first, 1, count, HELD)[:, None], 0)
            if TOKENS > 2:
                total2 += tl.sum(wide * _small(p2, weights, first, 2, count, HELD)[:, None], 0)
                total3 += tl.sum(wide * _small(p3, weights, first, 3, count, HELD)[:, None], 0)
        _add(y, y0, mul, add, total0, tokens, weights, first, 0, count, y_row, to + c, inside)
        if TOKENS > 1:
            _add(y, y1, mul, add, total1, tokens, weights, first, 1, count, y_row, to + c, inside)
        if TOKENS > 2:
            _add(y, y2, mul, add, total2, tokens, weights, first, 2, count, y_row, to + c, inside)
            _add(y, y3, mul, add, total3, tokens, weights, first, 3, count, y_row, to + c, inside)


@triton.jit
def _block(block, ALIGNED: tl.constexpr, WIDE: tl.constexpr):
    """(member, first column in it, its width, its place in y)"""
    member, begin, out, to = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    begin = tl.multiple_of(begin, WIDE)
    if ALIGNED:
        out, to = tl.multiple_of(out, 16), tl.multiple_of(to, 16)
    return member, begin, out, to


@triton.jit
def _tile(places, start):
    """(the program's tile, its first pair, how many, whether its vectors are added too)"""
    place = places + (start + tl.program_id(0)) * 4
    return place, tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)


@triton.jit
def _member(row, member):
    """(where the table names a member's Bt, its rank, its first row in A)"""
    field = row + 4 + 3 * member
    return field, tl.load(field + 2).to(tl.int32), tl.load(field + 1).to(tl.int32)


@triton.jit
def _touched(row, rank, count, own, ADDED: tl.constexpr):
    """Whether there is something to write: y where it changes, and all of what is to be added, if it be 0."""
    touched = count > 0
    if ADDED:
        touched = touched & ((rank > 0) | ((own > 0) & ((tl.load(row + 2) != 0) | (tl.load(row + 3) != 0))))
    return touched


@triton.jit
def _vector(field, own, columns, inside, HELD: tl.constexpr):
    """The group's mul or add at these columns in float32; zeros where the adapter has none, or is not alone."""
    has = (own > 0) & (tl.load(field) != 0)
    return tl.load(_pointer(field, HELD) + columns, mask=inside & has, other=0.0).to(tl.float32)


@triton.jit
def _parts(source, first, i, count, pairs, width, live, splits, SPLITS: tl.constexpr):
    """The partial sums [splits, ranks] of the tile's i-th token; zeros where the tile has none."""
    split = tl.arange(0, SPLITS)
    at = source[None, :] + (split * pairs + first + i)[:, None].to(tl.int64) * width
    return tl.load(at, mask=live[None, :] & (split < splits)[:, None] & (i < count), other=0.0)


@triton.jit
def _small(parts, weights, first, i, count, HELD: tl.constexpr):
    """w · A x of the tile's i-th token, rounded as the adapter is held."""
    weight = tl.load(weights + first + i, mask=i < count, other=0.0)
    return (tl.sum(parts, 0) * weight).to(HELD).to(tl.float32)


@triton.jit
def _add(y, old, mul, add, total, tokens, weights, first, i, count, y_row, columns, inside):
    """y = old + w (old · mul + add) + total at the tile's i-th token."""
    token = tl.load(tokens + first + i, mask=i < count, other=0).to(tl.int64)
    weight = tl.load(weights + first + i, mask=i < count, other=0.0)
    wide = old.to(tl.float32)
    new = wide + weight * (wide * mul + add) + total
    tl.store(y + token * y_row + columns, new.to(old.dtype), mask=inside & (i < count))


@triton.jit(do_not_specialize=["table_row", "at", "pairs", "start"])
def _shrink_many(
    x, parts, tokens, places, table, x_row, table_row, at, inp, pairs, width, start, SPLITS: tl.constexpr,
    HELD: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """As `_shrink_few`, on tensor cores."""
    place = places + (start + tl.program_id(0)) * 4
    first, count = tl.load(place + 1), tl.load(place + 2)
    field = table + tl.load(place).to(tl.int64) * table_row + at
    rows = tl.load(field + 1).to(tl.int32)
    begin, split = tl.program_id(1) * RANKS, tl.program_id(2)
    if (count > 0) & (begin < rows):
        A = _pointer(field, HELD)
        span = tl.cdiv(tl.cdiv(inp, SPLITS), DEPTH) * DEPTH
        i, r, d = tl.arange(0, TOKENS), begin + tl.arange(0, RANKS), tl.arange(0, DEPTH)
        token = tl.load(tokens + first + i, mask=i < count, other=0).to(tl.int64)
        total = tl.zeros((TOKENS, RANKS), tl.float32)
        for low in range(split * span, tl.minimum((split + 1) * span, inp), DEPTH):
            k = low + d
            live = (i < count)[:, None] & (k < inp)[None, :]
            part = tl.load(x + token[:, None] * x_row + k[None, :], mask=live, other=0.0)
            mask = (r < rows)[None, :] & (k < inp)[:, None]
            a = tl.load(A + r[None, :].to(tl.int64) * inp + k[:, None], mask=mask, other=0.0)
            total = tl.dot(part.to(HELD).to(COMPUTE), a.to(COMPUTE), total, input_precision=PRECISION)
        target = parts + (split * pairs + first + i)[:, None].to(tl.int64) * width + r[None, :]
        tl.store(target, total, mask=(i < count)[:, None] & (r < rows)[None, :])


@triton.jit(do_not_specialize=["table_row", "at", "pairs", "start"])
def _expand_many(
    y, parts, tokens, weights, places, table, blocks, y_row, table_row, at, pairs, width, start, SPLITS: tl.constexpr,
    ADDED: tl.constexpr, ALIGNED: tl.constexpr, HELD: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """As `_expand_few`, on tensor cores."""
    place, first, count, own = _tile(places, start)
    member, begin, out, to = _block(blocks + tl.program_id(1) * 4, ALIGNED, WIDE)
    row = table + tl.load(place).to(tl.int64) * table_row + at
    field, rank, above = _member(row, member)
    if _touched(row, rank, count, own, ADDED):
        i, c = tl.arange(0, TOKENS), tl.arange(0, WIDE)
        live, inside = i < count, begin + c < out
        Bt, weight = _pointer(field, HELD), tl.load(weights + first + i, mask=live, other=0.0)[:, None]
        total = tl.zeros((TOKENS, WIDE), tl.float32)
        for low in range(0, rank, RANKS):
            r = low + tl.arange(0, RANKS)
            small = tl.zeros((TOKENS, RANKS), tl.float32)
            for split in range(SPLITS):
                source = parts + (split * pairs + first + i)[:, None].to(tl.int64) * width + (above + r)[None, :]
                small += tl.load(source, mask=live[:, None] & (r < rank)[None, :], other=0.0)
            mask = (r < rank)[:, None] & inside[None, :]
            more = tl.load(Bt + r[:, None].to(tl.int64) * out + (begin + c)[None, :], mask=mask, other=0.0)
            part = (small * weight).to(HELD).to(COMPUTE)
            total = tl.dot(part, more.to(COMPUTE), total, input_precision=PRECISION)
        mul, add = _vector(row + 2, own, to + c, inside, HELD), _vector(row + 3, own, to + c, inside, HELD)
        token = tl.load(tokens + first + i, mask=live, other=0).to(tl.int64)
        target = y + token[:, None] * y_row + (to + c)[None, :]
        mask = live[:, None] & inside[None, :]
        old = tl.load(target, mask=mask & ADDED, other=0.0)
        wide = old.to(tl.float32)
        new = wide + weight * (wide * mul[None, :] + add[None, :]) + total
        tl.store(target, new.to(old.dtype), mask=mask)
