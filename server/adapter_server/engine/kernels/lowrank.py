"""The low-rank products of a step's adapters.

    add_low_rank   y[t] += w · (x[t] @ A.T) @ Bt                   for each adapter's tokens t

Source: Punica's shrink and expand (arXiv 2310.18547).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapter_server.engine.kernels.launch import DTYPES, OPTIONS, compute_of, on

TOKENS = 16  # of a tile; what a tensor core takes at least
RANKS, DEPTH, WIDE = 32, 128, 64  # rows of A, of its columns, and columns of Bt, that one program holds
MOST_SPLITS, SPLIT_DEPTH = 8, 512  # of the sum over x's columns: one for each so many of them
HEAD, MEMBER = 2, 3  # fields of a table's row: A's address and rows; per member Bt's address, first row of A, rank


def splits_of(inp: int) -> int:
    """Of the sum over `inp` columns. By the width alone, so that a row's sums have one order in every batch."""
    return max(1, min(MOST_SPLITS, inp // SPLIT_DEPTH))


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
    formats = {"HELD": DTYPES[held], "COMPUTE": compute_of(held), "TOKENS": TOKENS, "RANKS": RANKS, **OPTIONS}
    with on(x):
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
