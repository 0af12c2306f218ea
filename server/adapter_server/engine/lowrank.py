"""The low-rank products of all adapters of a step, y += w · B (A x), for the sites that read one input.

    large   segments of many tokens: plain products on the adapter's own tensors
    small   all the others together, in a form of the machine's: `Native` (C, `added.py`) or `Banked` (plain torch)

Banked pads rows to the largest count, for two batched products against a bank.

A `Bank` holds the adapters in use side by side, by rank class, so that a step gathers no weights:

    A  [slots, members · rank, in]          xs [slots, count, in] → s [slots, count, members · rank]
    Bt [slots, alike, rank, out] per run    s of a run            → d [slots, alike, count, out]

A run is the neighbouring members of one output width (q/k/v, k/v, gate/up): they expand in one product.

Source of the batched form: Punica's segmented gather (arXiv 2310.18547), with the gather moved from every step to the
steps in which the set of adapters changes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from adapter_server.engine.routing import Routing, Segment, Use
from adapter_server.families.base import Patch, as_low_rank
from adapter_server.families.deltas import Rows

if TYPE_CHECKING:
    from adapter_server.engine.operands import More
    from adapter_server.engine.placed import GroupPatch, Placed, Product, Separate
    from adapter_server.engine.site import LinearGroup

SMALL = 8  # tokens; below, dispatch costs more than padding
FEW = 3  # adapters; below, the plain products cost no more, and need no copy in a bank
MIN_RANK = 4

PackedRow = tuple[int, tuple[Use, ...]]  # a row's tokens in the step, and the adapters on it


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
        """Give every active adapter a slot. Idle ones keep theirs until it is wanted: they may be back soon."""
        held, wanted = set(self.slots), set(active)
        new = [p for p in active if p not in held]
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
        if len(slots) > len(self.A):
            self._allocate(1 << max(0, len(slots) - 1).bit_length())
        for i, placed in enumerate(slots):
            if self.filled[i] is not placed:
                self._fill(i, placed)

    def release(self, placed: Placed) -> None:
        self.filled = [None if p is placed else p for p in self.filled]

    def _allocate(self, slots: int) -> None:
        group = self.group
        zeros = functools.partial(torch.zeros, dtype=group.dtype, device=group.device)
        self.A = zeros((slots, len(group.outs) * self.rank, group.inp))
        self.Bt = [zeros((slots, len(run), self.rank, group.outs[run[0]])) for run in group.runs]
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
    `scatter` [tokens of the span] picks a place for each token, the one past the end where it is nobody's (`holes`);
    `weights` [slots, count, 1] or None.
    """

    bank: Bank
    slots: int
    count: int
    span: slice
    gather: Tensor | None
    scatter: Tensor | None
    holes: bool
    weights: Tensor | None


class Apart(Protocol):
    """The base's product at a group together with what adapters add to it.

    `whole`: nothing of it is ever left for y's reader.
    """

    @property
    def whole(self) -> bool: ...

    def run(self, base: Product | Separate, x: Tensor, outs: int) -> tuple[Tensor, More | None]:
        """x [T, in], contiguous → (y [T, outs], what of it is left for y's reader to add)."""


class Adder(Protocol):
    """The small segments of a routing at one group, ready to run.

    `narrow`: x and y may stay in the base's dtype; what is added is rounded once all the same. Of special segments,
    `vectors`: the adapters whose mul and add it adds too. `scaled`: those whose in_scale it applies. `done`: the ids
    of the deltas, mirrors, turns and blocks that it runs.
    """

    @property
    def narrow(self) -> bool: ...

    @property
    def vectors(self) -> frozenset[Placed]: ...

    @property
    def scaled(self) -> frozenset[Placed]: ...

    @property
    def done(self) -> frozenset[int]: ...

    def base(self, base: Product | Separate, x: Tensor) -> Tensor:
        """The base's product, of scaled and turned inputs where it does that."""

    def add(self, y: Tensor, x: Tensor) -> None:
        """y [T, outs] += w · B (A x)."""

    def beside(self, routing: Routing) -> Apart | None:
        """The same computed beside the base's product, where that is possible."""


class LowRank(Protocol):
    """A form in which small segments run."""

    @property
    def keeps(self) -> frozenset[torch.dtype]:
        """Formats of factors that it reads as they are; others are held as the group computes."""

    def meet(self, index: int, members: int) -> None:
        """The base has a group of this index and so many members; told of each before an adapter is laid out."""

    def arrange(self, rows: Sequence[PackedRow]) -> list[int]:
        """The order in which a step's rows are packed: adapter by adapter."""

    def laid(self, patch: Patch) -> Patch:
        """The same patch in the form that runs fastest here."""

    def prepared(self, patch: GroupPatch, columns: Sequence[slice]) -> GroupPatch:
        """With what can be made of it beforehand, on a loader's thread; `columns`: the members' in the group."""

    def special(self, routing: Routing) -> Sequence[Segment]:
        """The segments that have to be looked at group by group: the others run small, in all that they do."""

    def plan(
        self, group: LinearGroup, routing: Routing, touching: Sequence[Segment]
    ) -> tuple[Sequence[Adder], Sequence[Segment]]:
        """Who runs small, and what is left to run large: `touching` are the special segments that touch this group."""

    def forget(self, placed: Placed) -> None:
        """An adapter has been evicted."""


class ByLowRank:
    """What forms have in common that run low ranks and vectors alone."""

    keeps = frozenset[torch.dtype]()

    def meet(self, index: int, members: int) -> None:
        """Nothing is made beforehand."""

    def laid(self, patch: Patch) -> Patch:
        return patch if isinstance(patch.delta, Rows) else as_low_rank(patch)

    def prepared(self, patch: GroupPatch, columns: Sequence[slice]) -> GroupPatch:
        return patch

    def special(self, routing: Routing) -> Sequence[Segment]:
        return routing.segments


class AfterBase:
    """What adders have in common that leave the base's product and all but low ranks and vectors to others."""

    scaled: frozenset[Placed] = frozenset()
    done: frozenset[int] = frozenset()

    def base(self, base: Product | Separate, x: Tensor) -> Tensor:
        return base(x)


def by_adapter(rows: Sequence[PackedRow]) -> list[int]:
    """The base's rows first, then adapter by adapter in order of appearance."""
    first: dict[Placed, int] = {}
    for _, uses in rows:
        for placed, _ in uses:
            first.setdefault(placed, len(first))
    return sorted(range(len(rows)), key=lambda i: first[rows[i][1][0][0]] if rows[i][1] else -1)


class Banked(ByLowRank):
    """`LowRank` in plain torch: batched products against banks, by rank class."""

    def __init__(self) -> None:
        self.banks: dict[int, Bank] = {}

    def arrange(self, rows: Sequence[PackedRow]) -> list[int]:
        """Adapter by adapter, small ones in the order of their slots, which they are given here."""
        counts: dict[Placed, int] = {}
        for n, uses in rows:
            for placed, _ in uses:
                counts[placed] = counts.get(placed, 0) + n
        small: dict[int, list[Placed]] = {}
        for placed, n in counts.items():
            if placed.rank and n <= SMALL:
                small.setdefault(rank_class(placed.rank), []).append(placed)
        for rank, active in small.items():
            if len(active) >= FEW:
                self.banks.setdefault(rank, Bank(rank)).assign(active)
        place = {p: (rank, i) for rank, bank in self.banks.items() for i, p in enumerate(bank.slots)}
        order = by_adapter(rows)
        return sorted(order, key=lambda i: place.get(rows[i][1][0][0], (1, 0)) if rows[i][1] else (0, 0))

    def plan(
        self, group: LinearGroup, routing: Routing, touching: Sequence[Segment]
    ) -> tuple[list[Adder], list[Segment]]:
        if "layouts" not in routing.shared:
            routing.shared["layouts"] = self._layouts(routing, group.device)
        made, large = routing.shared["layouts"]
        touching = [s for s in touching if s.placed.groups[group.index].A is not None]
        runs = [(layout, _touched(layout, group, touching)) for layout in made]
        return [Small(layout, group, run) for layout, run in runs if run], [s for s in large if s in touching]

    def forget(self, placed: Placed) -> None:
        for bank in self.banks.values():
            bank.drop(placed)

    def _layouts(self, routing: Routing, device: torch.device) -> tuple[list[Layout], list[Segment]]:
        """The step's small segments by rank class, and the large ones. Made once a routing, shared by all groups."""
        small: dict[int, list[Segment]] = {}
        large: list[Segment] = []
        for segment in routing.segments:
            rank = rank_class(segment.placed.rank)
            if rank in self.banks and _is_small(segment) and segment.placed in self.banks[rank].slots:
                small.setdefault(rank, []).append(segment)
            elif rank:
                large.append(segment)
        made: list[Layout] = []
        for rank, segments in small.items():
            slots = 1 + max(self.banks[rank].slots.index(s.placed) for s in segments)
            if len(segments) < FEW or len(segments) * 3 < slots:  # mostly idle: not worth reading
                large += segments
            else:
                made.append(_layout(self.banks[rank], slots, segments, device))
        return made, large


def _is_small(segment: Segment) -> bool:
    return segment.sole and segment.count <= SMALL and isinstance(segment.tokens, slice)


def _touched(layout: Layout, group: LinearGroup, touching: Sequence[Segment]) -> list[int]:
    """The runs of which some adapter of the layout touches a member."""
    slots = set(layout.bank.slots)
    pairs = [s.placed.groups[group.index].pairs for s in touching if s.placed in slots]
    return [i for i, run in enumerate(group.runs) if any(pair[m] for pair in pairs for m in run)]


def _layout(bank: Bank, slots: int, segments: list[Segment], device: torch.device) -> Layout:
    count = max(s.count for s in segments)
    slot_of = {placed: i for i, placed in enumerate(bank.slots)}
    starts = [s.tokens.start for s in segments if isinstance(s.tokens, slice)]
    span = slice(min(starts), max(start + s.count for start, s in zip(starts, segments, strict=True)))
    nobody = slots * count
    gather, scatter = [0] * nobody, [nobody] * (span.stop - span.start)
    weights = torch.ones(slots, count, 1)
    for start, segment in zip(starts, segments, strict=True):
        place = slot_of[segment.placed] * count
        for i in range(segment.count):
            gather[place + i] = start - span.start + i
            scatter[start - span.start + i] = place + i
        if segment.weights is not None:
            weights[slot_of[segment.placed], : segment.count] = segment.weights.cpu()
    ordered = scatter == list(range(nobody))
    return Layout(
        bank,
        slots,
        count,
        span,
        None if ordered else torch.tensor(gather, device=device),
        None if ordered else torch.tensor(scatter, device=device),
        nobody in scatter,
        weights.to(device) if bool((weights != 1).any()) else None,
    )


class Small(AfterBase):
    """The small segments of one rank class at one group: batched products, on views that are made once a routing."""

    narrow = False
    vectors: frozenset[Placed] = frozenset()

    def beside(self, routing: Routing) -> None:
        """Its products have the same cores."""

    def __init__(self, layout: Layout, group: LinearGroup, runs: Sequence[int]) -> None:
        stack, n = layout.bank.stack(group), layout.slots
        self.layout, self.members = layout, len(group.outs)
        self.A = stack.A[:n].transpose(1, 2)
        self.runs = [(group.runs[i], group.span(group.runs[i]), stack.Bt[i][:n].flatten(0, 1)) for i in runs]

    def add(self, y: Tensor, x: Tensor) -> None:
        """y [T, outs] += w · B (A x)."""
        layout, n, count = self.layout, self.layout.slots, self.layout.count
        xs = x[layout.span]
        xs = xs if layout.gather is None else xs.index_select(0, layout.gather)
        s = torch.bmm(xs.view(n, count, -1), self.A)
        s = s if layout.weights is None else s * layout.weights
        s = s.view(n, count, self.members, -1).transpose(1, 2)  # [slots, members, count, rank]
        for run, columns, Bt in self.runs:
            d = torch.bmm(s[:, run.start : run.stop].reshape(-1, count, layout.bank.rank), Bt)
            d = d.view(n, len(run), count, -1).transpose(1, 2)  # [slots, count, alike, out]
            target = y[layout.span, columns]
            if layout.scatter is None:
                target.view(d.shape).add_(d)
            else:
                target.add_(_spread(d.reshape(n * count, -1), layout))


def _spread(d: Tensor, layout: Layout) -> Tensor:
    """[places, width] → [tokens of the span, width], zeros for who is nobody's."""
    d = torch.nn.functional.pad(d, (0, 0, 0, 1)) if layout.holes else d
    return d.index_select(0, layout.scatter) if layout.scatter is not None else d


def add_large(y: Tensor, x: Tensor, segment: Segment, group: LinearGroup) -> None:
    """y [T, outs] += w · B (A x) for one adapter's tokens, on its own tensors."""
    patch = segment.placed.groups[group.index]
    if patch.A is None:
        return
    s = x[segment.tokens] @ patch.A.to(x.dtype).T
    s = s if segment.weights is None else s * segment.weights
    at = 0
    for m, pair in enumerate(patch.pairs):
        if pair is None:
            continue
        r = pair[0].shape[0]
        part = s[:, at : at + r]
        at += r
        if isinstance(segment.tokens, slice):
            y[segment.tokens, group.columns[m]].addmm_(part, pair[1].to(x.dtype))
        else:
            y[:, group.columns[m]].index_add_(0, segment.tokens, part @ pair[1].to(x.dtype))
