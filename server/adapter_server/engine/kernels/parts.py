"""What adapters do at a group beyond low rank and vectors, on the tensors that a table names; one adapter a token.

    own_rows   rows[t] = the adapter's own vector, or the base's        norms' weights
    inputs     x'[t] = x[t] + w · (z − x[t]), z = x[t] R or in_scale ⊙ x[t]   turned and scaled inputs
    mirrored   more[t] = w · factor · y[t, index]                        outputs mixed in pairs
    add_sparse y[t] += w · S x[t]                                        some numbers of a weight
    own_product  y[t] = y[t] + w · (W' x[t] + b' − y[t])                 replaced weights
    hidden     h[p] = act(down z[t] + its bias), z = y, y + r or r       a bottleneck's first product
    add_hidden y[t] += w · (up h[p] + its bias + again · r[t])           and its second

Those of a single token read `Owners`: whose each token is. The products read the low rank's `Tiles`, on tensor cores,
and a weight once per tile. All are bound by memory: each reads an adapter's tensors once a token or tile, and x and y.
A token that is nobody's is copied, added nothing to, or not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapter_server.engine.kernels.launch import DTYPES, OPTIONS, compute_of, on
from adapter_server.engine.kernels.lowrank import FEW, WIDE, Run, Tiles, _block, _pointer

SPAN, SPAN_WARPS = 256, 2  # columns of one program of a token's own
OUTS, DEPTH, PRODUCT_WARPS = 64, 64, 4  # of a product's program: columns, and how many of the input at once
LEAST = 16  # tokens of a tensor core's tile
IN_SCALE, OWN, NETWORK = 0, 1, 3  # a group's fields: in_scale − 1; W', b'; those of `hidden`
ABOVE = NETWORK + 9  # of them; behind them the members'
TURN, MIRROR, SPARSE, SPECTRAL = 0, 3, 5, 8  # a member's: R, its size, step; index, factor; starts, columns, values
EACH = SPECTRAL + 3  # of them


@dataclass(frozen=True, slots=True, eq=False)
class Owners:
    """Whose tokens are whose: rows [T] int32 of the table, −1 for nobody, weights [T] float32; and the table."""

    rows: Tensor
    weights: Tensor
    table: Tensor


def own_rows(base: Tensor, owners: Owners, at: int, held: torch.dtype) -> Tensor:
    """base [n] → rows [T, n]: base + w · (own − base) of each token, `own` at the table's column `at`.

    Reference: torch.stack([base if own is None else base + w * (own - base) for each token])
    """
    tokens, n = len(owners.rows), len(base)
    out = torch.empty(tokens, n, dtype=base.dtype, device=base.device)
    with on(base):
        _own_rows[tokens, triton.cdiv(n, SPAN)](
            out, base, owners.rows, owners.weights, owners.table, owners.table.stride(0), at, n, HELD=DTYPES[held],
            SPAN=SPAN, num_warps=SPAN_WARPS, **OPTIONS,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["table_row", "at"])
def _own_rows(out, base, owners, weights, table, table_row, at, n, HELD: tl.constexpr, SPAN: tl.constexpr):
    token, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    field, weight, owned = _field(owners, weights, table, table_row, at, token)
    wide = tl.load(base + c, mask=c < n, other=0.0).to(tl.float32)
    own = tl.load(_pointer(field, HELD) + c, mask=(c < n) & _has(field, owned), other=0.0).to(tl.float32)
    wide = tl.where(_has(field, owned), _mixed(wide, own, weight), wide)
    tl.store(out + token * n + c, wide.to(out.dtype.element_ty), mask=c < n)


@triton.jit
def _field(owners, weights, table, table_row, at, token):
    """(the field of the token's adapter, its weight, whether it has one); of nobody's the first adapter's field, 0."""
    owner = tl.load(owners + token)
    weight = tl.load(weights + token, mask=owner >= 0, other=0.0)
    return table + tl.maximum(owner, 0).to(tl.int64) * table_row + at, weight, owner >= 0


@triton.jit
def _mixed(old, own, weight):
    """old + weight · (own − old), and no less than own itself where it has all the weight."""
    return tl.where(weight == 1.0, own, old + weight * (own - old))


@triton.jit
def _has(field, owned):
    return owned & (tl.load(field) != 0)


def inputs(x: Tensor, owners: Owners, scale_at: int, turn_at: int, held: torch.dtype) -> Tensor:
    """x [T, in] → the input of one member [T, in], its scale and its turn at these columns of the table.

    Reference: x + w * (x * shift + turn(x) - x) for each token
    """
    tokens, inp = x.shape
    out = torch.empty(tokens, inp, dtype=x.dtype, device=x.device)
    with on(x):
        _inputs[tokens, triton.cdiv(inp, SPAN)](
            out, x, owners.rows, owners.weights, owners.table, x.stride(0), owners.table.stride(0), scale_at, turn_at,
            inp, HELD=DTYPES[held], SPAN=SPAN, num_warps=SPAN_WARPS, **OPTIONS,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["table_row", "scale_at", "turn_at"])
def _inputs(
    out, x, owners, weights, table, x_row, table_row, scale_at, turn_at, inp, HELD: tl.constexpr, SPAN: tl.constexpr
):
    token, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    row, weight, owned = _field(owners, weights, table, table_row, 0, token)
    x += token * x_row
    here = tl.load(x + c, mask=c < inp, other=0.0)
    wide = here.to(tl.float32)
    scaled = _has(row + scale_at, owned)
    shift = tl.load(_pointer(row + scale_at, HELD) + c, mask=(c < inp) & scaled, other=0.0).to(tl.float32)
    turn = row + turn_at
    if _has(turn, owned):
        R, size, step = _pointer(turn, HELD), tl.load(turn + 1).to(tl.int32), tl.load(turn + 2)
        block, column = c // size, c % size
        total = tl.zeros((SPAN,), tl.float32)
        for j in range(size):
            part = tl.load(x + block * size + j, mask=c < inp, other=0.0).to(tl.float32)
            turned = tl.load(R + block * step + j * size + column, mask=c < inp, other=0.0)
            total += part * turned.to(tl.float32)
        wide += weight * (total - wide)
    else:
        wide += weight * wide * shift
    tl.store(out + token * inp + c, wide.to(here.dtype), mask=c < inp)


def mirrored(y: Tensor, owners: Owners, blocks: Tensor, at: int, aligned: bool, held: torch.dtype) -> Tensor:
    """y [T, outs], contiguous → what mirrors add to it, in float32; `at`: the first member's column of the table.

    Reference: w * factor * y[t, index] for each token and member, 0 where there is none
    """
    more = torch.empty(y.shape, dtype=torch.float32, device=y.device)
    with on(y):
        _mirrored[len(y), len(blocks)](
            more, y, owners.rows, owners.weights, owners.table, blocks, y.stride(0), owners.table.stride(0), at,
            HELD=DTYPES[held], ALIGNED=aligned, EACH=EACH, WIDE=WIDE, num_warps=1, **OPTIONS,
        )  # fmt: skip
    return more


@triton.jit(do_not_specialize=["table_row", "at"])
def _mirrored(
    more, y, owners, weights, table, blocks, y_row, table_row, at, HELD: tl.constexpr, ALIGNED: tl.constexpr,
    EACH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    token, c = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    member, begin, out, to = _block(blocks + tl.program_id(1) * 4, ALIGNED, WIDE)
    field, weight, owned = _field(owners, weights, table, table_row, at + member * EACH, token)
    inside, has = begin + c < out, _has(field, owned)
    index = tl.load(_pointer(field, tl.int64) + begin + c, mask=inside & has, other=0)
    factor = tl.load(_pointer(field + 1, HELD) + begin + c, mask=inside & has, other=0.0).to(tl.float32)
    other = tl.load(y + token * y_row + to - begin + index, mask=inside & has, other=0.0).to(tl.float32)
    tl.store(more + token * y_row + to + c, weight * factor * other, mask=inside)


def add_sparse(y: Tensor, x: Tensor, owners: Owners, at: int, held: torch.dtype) -> None:
    """y [T, out] += w · S x, x [T, in]; S of dtype `held` by rows, at the table's column `at`: starts, columns, values.

    Reference: y[t] += w * (S @ x[t]) for each token
    """
    tokens, out = y.shape
    with on(x):
        _add_sparse[tokens, triton.cdiv(out, SPAN)](
            y, x, owners.rows, owners.weights, owners.table, y.stride(0), x.stride(0), owners.table.stride(0), at, out,
            HELD=DTYPES[held], SPAN=SPAN, num_warps=SPAN_WARPS, **OPTIONS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["table_row", "at"])
def _add_sparse(
    y, x, owners, weights, table, y_row, x_row, table_row, at, outs, HELD: tl.constexpr, SPAN: tl.constexpr
):
    token, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    field, weight, owned = _field(owners, weights, table, table_row, at, token)
    if _has(field, owned):
        starts, columns, values = _pointer(field, tl.int32), _pointer(field + 1, tl.int32), _pointer(field + 2, HELD)
        i, end = tl.load(starts + o, mask=o < outs, other=0), tl.load(starts + o + 1, mask=o < outs, other=0)
        total = tl.zeros((SPAN,), tl.float32)
        for _ in range(tl.max(end - i, 0)):
            column = tl.load(columns + i, mask=i < end, other=0)
            value = tl.load(values + i, mask=i < end, other=0.0).to(tl.float32)
            total += value * tl.load(x + token * x_row + column, mask=i < end, other=0.0).to(tl.float32)
            i += 1
        target = y + token * y_row + o
        wide = tl.load(target, mask=o < outs, other=0.0).to(tl.float32) + weight * total
        tl.store(target, wide.to(y.dtype.element_ty), mask=o < outs)


def own_product(y: Tensor, x: Tensor, tiles: Tiles, table: Tensor, at: int, held: torch.dtype) -> None:
    """y [T, outs] = y + w · (W' x + b' − y), x [T, in]; W' [outs, in] and b' of dtype `held`, at the column `at`.

    Reference: y[t] += w * (F.linear(x[t], W, b) - y[t]) for the tokens t of each adapter that has a W
    """
    for run, grid, options in _launches(tiles, y.shape[1], held):
        with on(x):
            _own_product[grid](
                y, x, tiles.tokens, tiles.weights, tiles.places, table, y.stride(0), x.stride(0), table.stride(0), at,
                x.shape[1], y.shape[1], run.start, **options,
            )  # fmt: skip


def _launches(tiles: Tiles, columns: int, held: torch.dtype) -> list[tuple[Run, tuple[int, int], dict[str, object]]]:
    """Each run's grid, and what its program is compiled for."""
    shared = {"HELD": DTYPES[held], "COMPUTE": compute_of(held), "OUTS": OUTS, "DEPTH": DEPTH, **OPTIONS}
    shared |= {"PRECISION": "tf32x3" if held == torch.float32 else "ieee", "num_warps": PRODUCT_WARPS}
    blocks = triton.cdiv(columns, OUTS)
    return [
        (run, (run.stop - run.start, blocks), {**shared, "TOKENS": LEAST if run.tokens <= FEW else run.tokens})
        for run in tiles.runs
    ]


@triton.jit(do_not_specialize=["table_row", "at", "start"])
def _own_product(
    y, x, tokens, weights, places, table, y_row, x_row, table_row, at, inp, outs, start, HELD: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr, OUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    field, first, count = _tile(places, table, table_row, at, start)
    if (count > 0) & (tl.load(field) != 0):
        token, weight, live = _tokens(tokens, weights, first, count, TOKENS)
        o = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
        total = _product(x, x, token, live, x_row, field, _pointer(field, HELD), o, outs, inp, False, HELD, COMPUTE,
                         PRECISION, TOKENS, OUTS, DEPTH)  # fmt: skip
        biased = tl.load(field + 1) != 0
        total += tl.load(_pointer(field + 1, HELD) + o, mask=(o < outs) & biased, other=0.0).to(tl.float32)[None, :]
        target, mask = y + token[:, None] * y_row + o[None, :], live[:, None] & (o < outs)[None, :]
        old = tl.load(target, mask=mask, other=0.0).to(tl.float32)
        tl.store(target, _mixed(old, total, weight[:, None]).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _tile(places, table, table_row, at, start):
    """(the field of the tile's adapter, its first pair, its pairs)"""
    place = places + (start + tl.program_id(0)) * 4
    return table + tl.load(place).to(tl.int64) * table_row + at, tl.load(place + 1), tl.load(place + 2)


@triton.jit
def _tokens(tokens, weights, first, count, TOKENS: tl.constexpr):
    """(which tokens a tile's are, their weights, which of them are there)"""
    i = tl.arange(0, TOKENS)
    live = i < count
    token = tl.load(tokens + first + i, mask=live, other=0).to(tl.int64)
    return token, tl.load(weights + first + i, mask=live, other=0.0), live


@triton.jit
def _product(
    a, b, token, live, a_row, which, M, o, outs, inp, BOTH: tl.constexpr, HELD: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, TOKENS: tl.constexpr, OUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """a[token] @ M[o].T, M [outs, inp] → [TOKENS, OUTS] float32; BOTH: of a, b or a + b, as the fields `which` say."""
    total, d = tl.zeros((TOKENS, OUTS), tl.float32), tl.arange(0, DEPTH)
    for low in range(0, inp, DEPTH):
        k = low + d
        at, mask = token[:, None] * a_row + k[None, :], live[:, None] & (k < inp)[None, :]
        if BOTH:
            left = tl.load(a + at, mask=mask & (tl.load(which) != 0), other=0.0).to(tl.float32)
            left += tl.load(b + at, mask=mask & (tl.load(which + 1) != 0), other=0.0).to(tl.float32)
        else:
            left = tl.load(a + at, mask=mask, other=0.0).to(tl.float32)
        mask = (k < inp)[:, None] & (o < outs)[None, :]
        right = tl.load(M + o[None, :].to(tl.int64) * inp + k[:, None], mask=mask, other=0.0)
        total = tl.dot(left.to(HELD).to(COMPUTE), right.to(COMPUTE), total, input_precision=PRECISION)
    return total


def hidden(y: Tensor, r: Tensor, tiles: Tiles, table: Tensor, at: int, width: int, held: torch.dtype) -> Tensor:
    """y, r [T, n], of equal strides → h [pairs, width]; an adapter's d ≤ width. At the table's column `at`: down's
    address, its bias's, up's, its bias's, d, its activation, and 1 each where z has y and r, and how often r is added.

    Reference: act(F.linear(y[t] * has_y + r[t] * has_r, down, bias)) for the tokens t of each adapter that has a down
    """
    h = torch.empty(len(tiles.tokens), width, dtype=torch.float32, device=y.device)
    for run, grid, options in _launches(tiles, width, held):
        with on(y):
            _hidden[grid](
                h, y, r, tiles.tokens, tiles.weights, tiles.places, table, width, y.stride(0), table.stride(0), at,
                y.shape[1], run.start, **options,
            )  # fmt: skip
    return h


@triton.jit(do_not_specialize=["table_row", "at", "start"])
def _hidden(
    h, y, r, tokens, weights, places, table, width, y_row, table_row, at, inp, start, HELD: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr, OUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    field, first, count = _tile(places, table, table_row, at, start)
    n, o = tl.load(field + 4).to(tl.int32), tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    if (count > 0) & (tl.load(field) != 0) & (tl.program_id(1) * OUTS < n):
        token, _, live = _tokens(tokens, weights, first, count, TOKENS)
        total = _product(y, r, token, live, y_row, field + 6, _pointer(field, HELD), o, n, inp, True, HELD, COMPUTE,
                         PRECISION, TOKENS, OUTS, DEPTH)  # fmt: skip
        total += tl.load(_pointer(field + 1, HELD) + o, mask=o < n, other=0.0).to(tl.float32)[None, :]
        to = h + (first + tl.arange(0, TOKENS))[:, None].to(tl.int64) * width + o[None, :]
        tl.store(to, _activated(total, tl.load(field + 5)), mask=live[:, None] & (o < n)[None, :])


@triton.jit
def _activated(x, act):
    """By its number in `operands.ACTS`."""
    gate = 1.0 / (1.0 + tl.exp(-x))
    tanh = 1.0 - 2.0 / (tl.exp(1.5957691216057308 * (x + 0.044715 * x * x * x)) + 1.0)
    y = tl.where(act == 1, 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476)), x * gate)
    y = tl.where(act == 2, 0.5 * x * (1.0 + tanh), y)
    y = tl.where(act == 3, tl.maximum(x, 0.0), y)
    return tl.where(act == 4, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0), y)


def add_hidden(y: Tensor, r: Tensor, h: Tensor, tiles: Tiles, table: Tensor, at: int, held: torch.dtype) -> None:
    """y [T, n] += w · (up h + its bias + again · r), h of `hidden`.

    Reference: y[t] += w * (F.linear(h, up, bias) + again * r[t]) for the tokens t of each adapter that has an up
    """
    for run, grid, options in _launches(tiles, y.shape[1], held):
        with on(y):
            _add_hidden[grid](
                y, r, h, tiles.tokens, tiles.weights, tiles.places, table, h.shape[1], y.stride(0), r.stride(0),
                table.stride(0), at, y.shape[1], run.start, **options,
            )  # fmt: skip


@triton.jit(do_not_specialize=["table_row", "at", "start"])
def _add_hidden(
    y, r, h, tokens, weights, places, table, width, y_row, r_row, table_row, at, outs, start, HELD: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr, OUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    field, first, count = _tile(places, table, table_row, at, start)
    if (count > 0) & (tl.load(field) != 0):
        token, weight, live = _tokens(tokens, weights, first, count, TOKENS)
        o, pair = tl.program_id(1) * OUTS + tl.arange(0, OUTS), (first + tl.arange(0, TOKENS)).to(tl.int64)
        n, again = tl.load(field + 4).to(tl.int32), tl.load(field + 8)
        total = _product(h, h, pair, live, width, field, _pointer(field + 2, HELD), o, outs, n, False, HELD, COMPUTE,
                         PRECISION, TOKENS, OUTS, DEPTH)  # fmt: skip
        total += tl.load(_pointer(field + 3, HELD) + o, mask=o < outs, other=0.0).to(tl.float32)[None, :]
        mask = live[:, None] & (o < outs)[None, :]
        stream = tl.load(r + token[:, None] * r_row + o[None, :], mask=mask & (again != 0), other=0.0).to(tl.float32)
        target = y + token[:, None] * y_row + o[None, :]
        wide = tl.load(target, mask=mask, other=0.0).to(tl.float32) + weight[:, None] * (total + again * stream)
        tl.store(target, wide.to(y.dtype.element_ty), mask=mask)
