"""The low-rank products of all adapters of a step, y += w · B (A x), for the sites that read one input.

Two forms, chosen per segment:

    large   more than SMALL tokens: two plain products on the adapter's own tensors
    small   all the others together: rows padded to the largest count, two batched products against a bank

A `Bank` holds the adapters in use side by side, by rank class, so that a step gathers no weights:

    A  [slots, members · rank, in]          xs [slots, count, in] → s [slots, count, members · rank]
    Bt [slots, alike, rank, out] per run    s of a run            → d [slots, alike, count, out]

A run is the neighbouring members of one output width (q/k/v, k/v, gate/up): they expand in one product.

Source of the batched form: Punica's segmented gather (arXiv 2310.18547), with the gather moved from every step to the
steps in which the set of adapters changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapter_server.engine.routing import Routing, Segment, Use

if TYPE_CHECKING:
    from adapter_server.engine.site import LinearGroup, Placed

SMALL = 8  # tokens; below, dispatch costs more than padding
MIN_RANK = 4


def rank_class(rank: int) -> int:
    """The power of two that a rank is padded to in a bank."""
    return max(MIN_RANK, 1 << (rank - 1).bit_length()) if rank else 0


class Bank:
    """The adapters of one rank class that recent steps used, in slots. Slots are one for all groups; tensors lazy."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.slots: list[Placed | None] = []
        self._stacks: dict[int, Stack] = {}

    def assign(self, active: Sequence[Placed]) -> None:
        """Give every active adapter a slot. Idle ones stay until a slot is wanted or most are idle."""
        if len(self.slots) > 2 * len(active):
            self.slots = []
        held = set(self.slots)
        new = [p for p in active if p not in held]
        wanted = set(active)
        for i, placed in enumerate(self.slots):
            if new and placed not in wanted:
                self.slots[i] = new.pop(0)
        self.slots += new

    def drop(self, placed: Placed) -> None:
        """Forget an adapter that was evicted."""
        if placed in self.slots:
            self.slots = [None if p is placed else p for p in self.slots]
            for stack in self._stacks.values():
                stack.release(placed)

    def stack(self, group: LinearGroup) -> Stack:
        """The group's tensors, brought up to date with the slots."""
        stack = self._stacks.get(group.index)
        if stack is None:
            stack = self._stacks[group.index] = Stack(group, self.rank)
        stack.sync(self.slots)
        return stack


class Stack:
    """A bank's tensors at one group: A [slots, members · rank, in] and per run Bt [slots, alike, rank, out]."""

    def __init__(self, group: LinearGroup, rank: int) -> None:
        self.group, self.rank = group, rank
        self.filled: list[Placed | None] = []
        self.A = torch.empty(0)
        self.Bt: list[Tensor] = []

    def sync(self, slots: Sequence[Placed | None]) -> None:
        if len(slots) > len(self.A) or len(slots) * 4 < len(self.A):
            self._allocate(1 << max(0, len(slots) - 1).bit_length())
        for i, placed in enumerate(slots):
            if self.filled[i] is not placed:
                self._fill(i, placed)

    def release(self, placed: Placed) -> None:
        self.filled = [None if p is placed else p for p in self.filled]

    def _allocate(self, slots: int) -> None:
        group, like = self.group, self.group.base.weight
        self.A = like.new_zeros(slots, len(group.outs) * self.rank, group.inp)
        self.Bt = [like.new_zeros(slots, len(run), self.rank, group.outs[run[0]]) for run in group.runs]
        self.filled = [None] * slots

    def _fill(self, slot: int, placed: Placed | None) -> None:
        self.filled[slot] = placed
        patch = placed and placed.groups.get(self.group.index)
        self.A[slot].zero_()
        for Bt, run in zip(self.Bt, self.group.runs, strict=True):
            Bt[slot].zero_()
            for i, m in enumerate(run):
                if patch and (pair := patch.pairs[m]):
                    r = pair[0].shape[0]
                    self.A[slot, m * self.rank : m * self.rank + r] = pair[0]
                    Bt[slot, i, :r] = pair[1]


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the small segments of one rank class stand. slots · count padded places, `span` the tokens they cover.

    `gather` [slots · count] picks a token for each place (None: the tokens stand in place order already);
    `scatter` [tokens of the span] picks a place for each token; `weights` [slots, count, 1] or None.
    """

    bank: Bank
    slots: int
    count: int
    span: slice
    gather: Tensor | None
    scatter: Tensor | None
    weights: Tensor | None


def layouts(routing: Routing, banks: dict[int, Bank], device: torch.device) -> tuple[list[Layout], list[Segment]]:
    """The step's small segments by rank class, and the large ones. Made once a routing, shared by all groups."""
    small: dict[int, list[Segment]] = {}
    large: list[Segment] = []
    for segment in routing.segments:
        if not segment.placed.rank:
            continue
        rank = rank_class(segment.placed.rank)
        slotted = rank in banks and segment.placed in banks[rank].slots
        if slotted and segment.sole and segment.count <= SMALL and isinstance(segment.tokens, slice):
            small.setdefault(rank, []).append(segment)
        else:
            large.append(segment)
    return [_layout(banks[rank], segments, device) for rank, segments in small.items()], large


def arrange(rows: Sequence[tuple[int, tuple[Use, ...]]], banks: dict[int, Bank]) -> list[int]:
    """The order in which rows are packed: adapter by adapter, small ones in the order of their slots.

    Rows are (tokens, adapters on them). Gives the adapters of small segments their slots.
    """
    counts: dict[Placed, int] = {}
    for n, uses in rows:
        for placed, _ in uses:
            counts[placed] = counts.get(placed, 0) + n
    small: dict[int, list[Placed]] = {}
    for placed, n in counts.items():
        if placed.rank:
            small.setdefault(rank_class(placed.rank), []).extend([placed] if n <= SMALL else [])
    for rank, active in small.items():
        banks.setdefault(rank, Bank(rank)).assign(active)
    place = {p: (rank, i) for rank, bank in banks.items() for i, p in enumerate(bank.slots) if p in counts}
    first = {placed: i for i, placed in enumerate(counts)}

    def key(i: int) -> tuple[int, int, int]:
        uses = rows[i][1]
        return (0, 0, 0) if not uses else (*place.get(uses[0][0], (1, 0)), first[uses[0][0]])

    return sorted(range(len(rows)), key=key)


def _layout(bank: Bank, segments: list[Segment], device: torch.device) -> Layout:
    count = max(s.count for s in segments)
    slot_of = {placed: i for i, placed in enumerate(bank.slots)}
    starts = [s.tokens.start for s in segments if isinstance(s.tokens, slice)]
    span = slice(min(starts), max(start + s.count for start, s in zip(starts, segments, strict=True)))
    gather = [0] * (len(bank.slots) * count)
    scatter = [-1] * (span.stop - span.start)
    weights = torch.ones(len(bank.slots), count, 1)
    for start, segment in zip(starts, segments, strict=True):
        place = slot_of[segment.placed] * count
        for i in range(segment.count):
            gather[place + i] = start - span.start + i
            scatter[start - span.start + i] = place + i
        if segment.weights is not None:
            weights[slot_of[segment.placed], : segment.count] = segment.weights.cpu()
    weighted = bool((weights != 1).any())
    if scatter == list(range(len(gather))):
        return Layout(bank, len(bank.slots), count, span, None, None, weights.to(device) if weighted else None)
    return _scattered(bank, count, span, gather, scatter, weights if weighted else None, device)


def _scattered(
    bank: Bank,
    count: int,
    span: slice,
    gather: list[int],
    scatter: list[int],
    weights: Tensor | None,
    device: torch.device,
) -> Layout:
    """Places that are not the tokens in order. A token of the span that is nobody's reads the last, zero place."""
    nobody = len(gather)
    scatter = [nobody if place < 0 else place for place in scatter]
    return Layout(
        bank,
        len(bank.slots),
        count,
        span,
        torch.tensor(gather, device=device),
        torch.tensor(scatter, device=device),
        None if weights is None else weights.to(device),
    )


def add_small(y: Tensor, x: Tensor, layout: Layout, group: LinearGroup, runs: Sequence[int]) -> None:
    """y [T, outs] += w · B (A x) for the small segments of one rank class."""
    stack, n, count = layout.bank.stack(group), layout.slots, layout.count
    xs = x[layout.span]
    xs = xs if layout.gather is None else xs.index_select(0, layout.gather)
    s = torch.bmm(xs.view(n, count, -1), stack.A[:n].transpose(1, 2))
    s = s if layout.weights is None else s * layout.weights
    s = s.view(n, count, len(group.outs), -1).transpose(1, 2)  # [slots, members, count, rank]
    for i in runs:
        run, Bt = group.runs[i], stack.Bt[i][:n].flatten(0, 1)
        d = torch.bmm(s[:, run.start : run.stop].reshape(-1, count, layout.bank.rank), Bt)
        d = d.view(n, len(run), count, -1).transpose(1, 2)  # [slots, count, alike, out]
        target = y[layout.span, group.columns[run.start].start : group.columns[run.stop - 1].stop]
        if layout.scatter is None:
            target.view(d.shape).add_(d)
        else:
            target.add_(_spread(d.reshape(n * count, -1), layout.scatter))


def _spread(d: Tensor, scatter: Tensor) -> Tensor:
    return torch.nn.functional.pad(d, (0, 0, 0, 1)).index_select(0, scatter)


def add_large(y: Tensor, x: Tensor, segment: Segment, group: LinearGroup) -> None:
    """y [T, outs] += w · B (A x) for one adapter's tokens, on its own tensors."""
    patch = segment.placed.groups[group.index]
    if patch.A is None:
        return
    s = x[segment.tokens] @ patch.A.T
    s = s if segment.weights is None else s * segment.weights
    at = 0
    for m, pair in enumerate(patch.pairs):
        if pair is None:
            continue
        r = pair[0].shape[0]
        part = s[:, at : at + r]
        at += r
        if isinstance(segment.tokens, slice):
            y[segment.tokens, group.columns[m]].addmm_(part, pair[1])
        else:
            y[:, group.columns[m]].index_add_(0, segment.tokens, part @ pair[1])
