"""A token for each row, drawn from its filtered distribution without a sort.

    draw    the inverse of the filtered distribution, most likely first, of a number u in [0, 1)

Tokens are in the order of their logits, and of their ids where those are equal. Every filter keeps a beginning of that
order, so that the mass it keeps says all of it, and the shortest beginning counts:

    w      = ⌊2⁴⁰ · exp((logit − best) / temperature)⌋, whole numbers: their sums are exact, in whatever order
    top-k    K = w of the first top_k tokens
    top-p    P = w of the fewest first tokens that have top_p · K or more
    min-p    Q = w of the tokens that have min_p · 2⁴⁰ or more
    token    the first at which the sum passes u · min(K, P, Q)

K, P and the token are a search each: for the logit at which a sum, of ones or of w, reaches a goal. It goes over the
logits' own bits, as whole numbers in the same order, DIGIT bits a pass:

    low ├──┼──┼── … ──┤ WAYS bounds ──> sums of what is not below each ──> the last that reaches the goal: the new low

A pass is one launch, in which each program adds up one span of a row, having read what the last pass has found. Tokens
of one logit weigh the same: which of them it is, is a division.

Floor: three searches of 4 passes, 8 in float32, and 8 launches more, however many rows. A pass reads the logits once:
of 32 rows of 128k in bfloat16 8 MB, which fit the L2 cache. It does some 5 · WAYS operations a logit, 340 M in all,
20,000 cycles of 132 multiprocessors of 128 lanes: by count, not as measured, arithmetic binds it. One program a row
would use 32 of the 132. Rows of temperature 0, and searches that a row does not want, end at once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapter_server.engine.kernels.block import pick
from adapter_server.engine.kernels.launch import OPTIONS, on

SPAN, SPAN_WARPS = 4096, 8  # logits of one program
DIGIT, WAYS = 4, 16  # bits that a pass finds, and its bounds
FIELDS = tl.constexpr(5)  # of a row's settings: temperature, top_k, top_p, min_p, u
FOUND = tl.constexpr(3)  # of a search, after each pass: low, the sum above the bound after it, the goal
ONE = tl.constexpr(float(1 << 40))  # what the likeliest token weighs: 2²³ of them have a sum
TOP_K, TOP_P, TOKEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # the searches, in turn


def draw(logits: Tensor, settings: Tensor) -> tuple[Tensor, Tensor]:
    """logits [n, vocab], settings [n, 5] float64 → (ids [n] int64, each row's maximum [n] float32).

    Settings are temperature, top_k, top_p, min_p and u. Temperature 0 takes the likeliest; top_k 0, top_p 1 and min_p 0
    are off. A row whose maximum is not finite has some index of the row. Equal logits have equal tokens in every dtype.

    Reference: (sampling.inverse(logits.double(), settings, vocab)[0], logits.float().max(1).values)
    """
    ids, best = pick(logits)
    if len(logits):
        with on(logits):
            _Search.of(logits, settings, best).write(ids)
    return ids, best


@dataclass(frozen=True, slots=True, eq=False)
class _Search:
    """What launches share. found [n, passes, FOUND]; sums [2, n, splits, WAYS], of this pass and the last in turn."""

    rows: tuple[Tensor, Tensor, Tensor]  # logits, settings, best
    found: Tensor
    sums: Tensor
    masses: Tensor  # [n, splits, 2]: w above the last logit of top-k, and w that min-p keeps
    kept: Tensor  # [n]: min(K, Q)
    ties: Tensor  # [n, splits]: tokens with the logit that was found

    @classmethod
    def of(cls, logits: Tensor, settings: Tensor, best: Tensor) -> _Search:
        n, splits = len(logits), triton.cdiv(logits.shape[1], SPAN)
        whole = functools.partial(torch.empty, dtype=torch.int64, device=logits.device)
        found, sums = whole(n, 8 * logits.itemsize // DIGIT, FOUND.value), whole(2, n, splits, WAYS)
        return cls((logits, settings, best), found, sums, whole(n, splits, 2), whole(n), whole(n, splits))

    def write(self, ids: Tensor) -> None:
        """The tokens of the rows that are drawn."""
        for search in (TOP_K, TOP_P, TOKEN):
            if search == TOP_P:
                self._launch(_weigh, self.masses)
            self._launch(_aim, self.masses, self.kept, spans=False, SEARCH=search)
            for step in range(self.found.shape[1]):
                self._launch(_narrow, self.sums[step % 2], step, last=step + 1, SEARCH=search, FIRST=step == 0)
        self._launch(_count, self.ties)
        self._launch(_place, self.ties, ids, spans=False, SPAN=SPAN)

    def _launch(self, kernel: Any, *more: Tensor | int, last: int = 1, spans: bool = True, **constants: object) -> None:
        """A program for each row or, with `spans`, each span of it. `last` is odd after a search: passes are even."""
        logits, splits, passes = self.rows[0], self.sums.shape[2], self.found.shape[1]
        grid = (len(logits), splits) if spans else (len(logits),)
        constants |= {"SPAN": SPAN} if spans else {}
        kernel[grid](
            *self.rows, self.found, self.sums[last % 2], *more, logits.stride(0), logits.shape[1], splits,
            **constants, PASSES=passes, SPLITS=triton.next_power_of_2(splits), WAYS=WAYS, DIGIT=DIGIT,
            num_warps=SPAN_WARPS, **OPTIONS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["step"])
def _narrow(
    logits, settings, best, found, last, sums, step, row_stride, vocab, splits, SEARCH: tl.constexpr,
    FIRST: tl.constexpr, PASSES: tl.constexpr, SPLITS: tl.constexpr, WAYS: tl.constexpr, DIGIT: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """A span's sums above WAYS bounds from the low that the last pass has found."""
    row, split, way = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, WAYS)
    if _wants(settings, best, row, SEARCH):
        at, shift = found + (row * PASSES + step) * FOUND, (PASSES - 1 - step) * DIGIT
        if FIRST:
            low = tl.load(at)
        else:
            low, above, goal = _reached(at - FOUND, last + row * splits * WAYS, shift + DIGIT, splits, SPLITS, WAYS)
            if split == 0:
                _write(at, low, above, goal)
        x, key, live = _span(logits + row * row_stride, split, vocab, SPAN)
        amount = live.to(tl.int64) if SEARCH == TOP_K else _weight(x, settings, best, row)
        bound = (low + (way.to(tl.int64) << shift)).to(tl.int32)
        total = tl.sum(tl.where(key[None, :] >= bound[:, None], amount[None, :], 0), 1)
        tl.store(sums + (row * splits + split) * WAYS + way, total)


@triton.jit
def _weigh(
    logits, settings, best, found, last, masses, row_stride, vocab, splits, PASSES: tl.constexpr, SPLITS: tl.constexpr,
    WAYS: tl.constexpr, DIGIT: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A span's w above the last logit of top-k, or all of it, and its w that min-p keeps."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if _wants(settings, best, row, TOKEN):
        low = tl.full([], -(1 << 40), tl.int64)  # below all
        if _wants(settings, best, row, TOP_K):
            low, _, _ = _ended(found, last, row, splits, PASSES, SPLITS, WAYS)
        x, key, _ = _span(logits + row * row_stride, split, vocab, SPAN)
        w = _weight(x, settings, best, row)
        least = tl.ceil(tl.load(settings + row * FIELDS + 3) * ONE).to(tl.int64)
        at = masses + (row * splits + split) * 2
        tl.store(at, tl.sum(tl.where(key > low, w, 0), 0))
        tl.store(at + 1, tl.sum(tl.where(w >= least, w, 0), 0))


@triton.jit
def _aim(
    logits, settings, best, found, last, masses, kept, row_stride, vocab, splits, SEARCH: tl.constexpr,
    PASSES: tl.constexpr, SPLITS: tl.constexpr, WAYS: tl.constexpr, DIGIT: tl.constexpr,
):  # fmt: skip
    """A search's goal, from what the one before it has ended with."""
    row = tl.program_id(0).to(tl.int64)
    if _wants(settings, best, row, TOKEN):
        own = settings + row * FIELDS
        if SEARCH == TOP_K:
            goal = tl.minimum(tl.load(own + 1).to(tl.int64), vocab)
        elif SEARCH == TOP_P:
            i = tl.arange(0, SPLITS)
            at = masses + (row * splits + i) * 2
            most = tl.sum(tl.load(at, mask=i < splits, other=0), 0)
            if _wants(settings, best, row, TOP_K):
                _, above, first, w = _weighed(logits, settings, best, found, last, row, splits, PASSES, SPLITS, WAYS)
                most += (first - above) * w
            tl.store(kept + row, tl.minimum(most, tl.sum(tl.load(at + 1, mask=i < splits, other=0), 0)))
            goal = tl.maximum(tl.ceil(tl.load(own + 2) * most.to(tl.float64)).to(tl.int64), 1)
        else:
            most = tl.load(kept + row)
            if _wants(settings, best, row, TOP_P):
                _, above, first, w = _weighed(logits, settings, best, found, last, row, splits, PASSES, SPLITS, WAYS)
                most = tl.minimum(most, above + (first - above + w - 1) // w * w)
            goal = tl.minimum((tl.load(own + 4) * most.to(tl.float64)).to(tl.int64), most - 1) + 1
        lowest = tl.full([], -(1 << (PASSES * DIGIT - 1)), tl.int64)
        _write(found + row * PASSES * FOUND, lowest, tl.full([], 0, tl.int64), goal)


@triton.jit
def _count(
    logits, settings, best, found, last, ties, row_stride, vocab, splits, PASSES: tl.constexpr, SPLITS: tl.constexpr,
    WAYS: tl.constexpr, DIGIT: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """How many tokens of a span have the logit that was found."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if _wants(settings, best, row, TOKEN):
        low, _, _ = _ended(found, last, row, splits, PASSES, SPLITS, WAYS)
        _, key, live = _span(logits + row * row_stride, split, vocab, SPAN)
        tl.store(ties + row * splits + split, tl.sum((live & (key == low)).to(tl.int64), 0))


@triton.jit
def _place(
    logits, settings, best, found, last, ties, ids, row_stride, vocab, splits, PASSES: tl.constexpr,
    SPLITS: tl.constexpr, WAYS: tl.constexpr, DIGIT: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Which of the tokens with that logit it is, lower ids first."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS)
    if _wants(settings, best, row, TOKEN):
        low, above, goal, w = _weighed(logits, settings, best, found, last, row, splits, PASSES, SPLITS, WAYS)
        rank = (goal - 1 - above) // w
        counts = tl.load(ties + row * splits + at, mask=at < splits, other=0)
        before = tl.cumsum(counts, 0) - counts
        here = (before <= rank) & (rank < before + counts)
        split, rank = tl.sum(tl.where(here, at, 0), 0), rank - tl.sum(tl.where(here, before, 0), 0)
        _, key, live = _span(logits + row * row_stride, split, vocab, SPAN)
        tied = live & (key == low)
        chosen = tied & (tl.cumsum(tied.to(tl.int32), 0) == rank + 1)
        tl.store(ids + row, tl.sum(tl.where(chosen, split * SPAN + tl.arange(0, SPAN), 0), 0).to(tl.int64))


@triton.jit
def _wants(settings, best, row, SEARCH: tl.constexpr):
    """Whether there is this search to do: the row is drawn, its maximum finite, and the filter on."""
    own, top = settings + row * FIELDS, tl.load(best + row)
    wants = (tl.load(own) > 0) & (tl.abs(top) < float("inf"))
    if SEARCH == TOP_K:
        wants = wants & (tl.load(own + 1) > 0)
    if SEARCH == TOP_P:
        wants = wants & (tl.load(own + 2) < 1)
    return wants


@triton.jit
def _span(logits, split, vocab, SPAN: tl.constexpr):
    """(logits in float32, their bits as whole numbers in the same order, where there are any). −0 counts as 0."""
    i = split * SPAN + tl.arange(0, SPAN)
    x = tl.load(logits + i, mask=i < vocab, other=float("-inf"))
    BITS: tl.constexpr = x.dtype.primitive_bitwidth
    bits = x.to(tl.int16, bitcast=True).to(tl.int32) if BITS == 16 else x.to(tl.int32, bitcast=True)
    return x.to(tl.float32), _ordered(tl.where(bits == -(1 << (BITS - 1)), 0, bits), BITS), i < vocab


@triton.jit
def _value(key, DTYPE: tl.constexpr):
    """The logit in float32 that a whole number stands for."""
    bits = _ordered(key, DTYPE.primitive_bitwidth)
    whole = bits.to(tl.int16) if DTYPE.primitive_bitwidth == 16 else bits.to(tl.int32)
    return whole.to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _ordered(bits, BITS: tl.constexpr):
    """A float's bits to a whole number in the order of floats, and back."""
    return tl.where(bits < 0, bits ^ ((1 << (BITS - 1)) - 1), bits)


@triton.jit
def _weight(x, settings, best, row):
    """⌊2⁴⁰ · exp((x − best) / temperature)⌋"""
    inverse = (1.0 / tl.load(settings + row * FIELDS)).to(tl.float32)
    return (tl.exp((x - tl.load(best + row)) * inverse) * ONE).to(tl.int64)


@triton.jit
def _weighed(
    logits, settings, best, found, last, row, splits, PASSES: tl.constexpr, SPLITS: tl.constexpr, WAYS: tl.constexpr
):
    """(the logit's number, the sum above it, the goal, what each of its tokens weighs) of a search that has ended."""
    low, above, goal = _ended(found, last, row, splits, PASSES, SPLITS, WAYS)
    return low, above, goal, _weight(_value(low, logits.dtype.element_ty), settings, best, row)


@triton.jit
def _ended(found, last, row, splits, PASSES: tl.constexpr, SPLITS: tl.constexpr, WAYS: tl.constexpr):
    """(the logit's number, the sum above it, the goal) of a search that has ended."""
    at = found + (row * PASSES + PASSES - 1) * FOUND
    return _reached(at, last + row * splits * WAYS, 0, splits, SPLITS, WAYS)


@triton.jit
def _reached(at, sums, shift, splits, SPLITS: tl.constexpr, WAYS: tl.constexpr):
    """(the last bound that reaches the goal, the sum above the one after it, the goal)."""
    low, above, goal = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    split, way = tl.arange(0, SPLITS)[:, None], tl.arange(0, WAYS)[None, :]
    total = tl.sum(tl.load(sums + split * WAYS + way, mask=split < splits, other=0), 0)
    reached = total >= goal
    digit = tl.sum(reached.to(tl.int64), 0) - 1
    return low + (digit << shift), tl.maximum(above, tl.max(tl.where(reached, 0, total), 0)), goal


@triton.jit
def _write(at, low, above, goal):
    tl.store(at, low)
    tl.store(at + 1, above)
    tl.store(at + 2, goal)
