"""`LowRank` for CUDA: all adapters of a step in one shrink and one expand a group, on the adapters' own tensors.

    table [adapters, groups · fields] int64    per group: A's address and rows, mul's and add's addresses;
                                               per member: Bt's address, first row in A, rank;
                                               what `parts.py` has of it

A row of the table is written when its adapter first runs; a step's plan names rows. Any ranks run in one launch,
nothing is padded, copied or gathered. Its reference, and what runs without the kernels, is `lowrank.Banked`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor

from adapter_server.engine.lowrank import Adder, AfterBase, ByLowRank, PackedRow, by_adapter
from adapter_server.engine.parts import Entry, Part, parts_of
from adapter_server.engine.routing import Routing, Segment
from adapter_server.families.base import ParamPatch, Patch, as_low_rank
from adapter_server.families.deltas import Rows

if TYPE_CHECKING:
    from adapter_server.engine.kernels import More, Outputs, Owners, Run, Tiles
    from adapter_server.engine.placed import GroupPatch, Placed, Product, Separate
    from adapter_server.engine.site import LinearGroup

FEWEST = 64  # adapters that the table has room for at first
Place = tuple[int, int, int, int]  # table row, first pair, pairs, 1 where its vectors are added too
MOST_ROWS = 64  # trained rows of a weight that run as a low rank
LARGE = 256  # tokens of one adapter's own; above, plain products read its tensors often enough


@dataclass(frozen=True, slots=True, eq=False)
class Listed:
    """A step's (token, adapter) pairs as `kernels.Tiles` has them, on the host."""

    tokens: Sequence[int]
    weights: Sequence[float]
    slots: Sequence[int]  # the table's rows
    places: Sequence[Place]
    runs: Sequence[Run]
    width: int


class Table:
    """The addresses of adapters' tensors on the device, a row each. Rows of adapters that were dropped, or that nobody
    holds any more, are used again.

    Its layout is as wide as the adapters that have run need: groups, members of one, and parts if there were any.
    """

    def __init__(self, kernels: ModuleType, device: torch.device) -> None:
        self.kernels, self.device = kernels, device
        self.groups, self.members, self.has_parts = 1, 1, False
        self.places: WeakKeyDictionary[Placed, int] = WeakKeyDictionary()
        self.free: list[int] = []  # rows of adapters that went
        self._taken = 0  # rows that somebody had
        self._ends: dict[int, finalize[[int], Placed]] = {}  # of those who have a row, by it
        self.width: int = kernels.MANY_RANKS  # the most rows that an A had, in whole blocks
        self.hidden = 1  # the most that a network behind a block had between its products
        self.norms: Mapping[str, int] = {}  # by the paths of norms that take weights by token: they come behind groups
        self.rows = self._empty(0)

    @property
    def fields(self) -> int:
        """Of one group."""
        parts: int = self.kernels.ABOVE + self.kernels.EACH * self.members
        return self._low_rank + (parts if self.has_parts else 0)

    @property
    def _low_rank(self) -> int:
        fields: int = self.kernels.HEAD + self.kernels.MEMBER * self.members
        return fields

    def parts_at(self, group: int) -> int:
        """The column where a group's parts begin."""
        return group * self.fields + self._low_rank

    def norm_at(self, path: str) -> int:
        """The column of a norm's weight."""
        return self.norms[path] * self.fields

    def take(self, placed: Placed) -> int:
        """The adapter's row, written if it is new."""
        if placed not in self.places:
            at = self._free_row()
            self.places[placed], self._ends[at] = at, finalize(placed, self._left, at)
            if self._fits(placed):
                self._put(placed)
            else:
                self._write()
        return self.places[placed]

    def _free_row(self) -> int:
        if self.free:
            return self.free.pop()
        self._taken += 1
        return self._taken - 1

    def drop(self, placed: Placed) -> None:
        if (at := self.places.pop(placed, None)) is not None:
            self._ends[at].detach()
            self._left(at)

    def _left(self, at: int) -> None:
        del self._ends[at]
        self.free.append(at)

    def _fits(self, placed: Placed) -> bool:
        """Whether the layout is wide enough; else it is made so."""
        before, entries = (self.groups, self.members, self.has_parts), _entries(placed)
        last = max((*placed.groups, *(self.norms[path] for path in placed.others if path in self.norms)), default=0)
        self.groups = max(self.groups, 1 + last)
        self.members = max(self.members, *(len(patch.pairs) for patch in placed.groups.values()), 0)
        self.has_parts = self.has_parts or bool(entries)
        rows = max((patch.A.shape[0] for patch in placed.groups.values() if patch.A is not None), default=0)
        self.width = max(self.width, -(-rows // self.kernels.MANY_RANKS) * self.kernels.MANY_RANKS)
        self.hidden = max(self.hidden, *(entry.width for entry in entries.values()), 0)
        return (self.groups, self.members, self.has_parts) == before

    def _put(self, placed: Placed) -> None:
        at = self.places[placed]
        if at >= len(self.rows):
            self.rows = torch.cat([self.rows, self._empty(_room(at + 1) - len(self.rows))])
        self.rows[at] = self._row(placed)

    def _write(self) -> None:
        """Anew and wider."""
        self.rows = self._empty(_room(self._taken))
        for placed, at in self.places.items():
            self.rows[at] = self._row(placed)

    def _empty(self, count: int) -> Tensor:
        return torch.zeros(count, self.groups * self.fields, dtype=torch.int64, device=self.device)

    def _row(self, placed: Placed) -> Tensor:
        row = torch.zeros(self.groups, self.fields, dtype=torch.int64)
        for index, patch in placed.groups.items():
            entry = _entry(patch)
            row[index, : len(entry)] = torch.tensor(entry)
        for index, parts in _entries(placed).items():
            row[index, self._low_rank : self._low_rank + len(parts.fields)] = torch.tensor(parts.fields)
        for path, other in placed.others.items():
            if path in self.norms and isinstance(other, ParamPatch):
                row[self.norms[path], 0] = other.params["weight"].data_ptr()
        return row.view(-1)


def _room(count: int) -> int:
    """Rows for so many adapters, and some more."""
    return max(FEWEST, 1 << (count - 1).bit_length())


def _entries(placed: Placed) -> dict[int, Entry]:
    """What the groups' patches do beyond low rank and vectors, where they do."""
    entries = {index: patch.entry for index, patch in placed.groups.items()}
    return {index: entry for index, entry in entries.items() if isinstance(entry, Entry) and entry.parts}


def _entry(patch: GroupPatch) -> list[int]:
    """A and its rows, mul, add; per member Bt, its first row in A, its rank. 0 for what is not there."""
    mul, add = (0 if vector is None else vector.data_ptr() for vector in (patch.mul, patch.add))
    if patch.A is None:
        return [0, 0, mul, add]
    entry, above = [patch.A.data_ptr(), patch.A.shape[0], mul, add], 0
    for pair in patch.pairs:
        rank = 0 if pair is None else pair[0].shape[0]
        entry += (0 if pair is None else pair[1].data_ptr(), above, rank)
        above += rank
    return entry


class Grouped(ByLowRank):
    """`LowRank` by the Triton kernels."""

    def __init__(self, kernels: ModuleType, device: torch.device, parts: bool = True) -> None:
        """`parts`: whether kernels do what adapters do beyond low rank and vectors."""
        self.kernels, self.table, self.does_parts = kernels, Table(kernels, device), parts
        self.aside = _urgent_stream(device)
        self._parts: WeakKeyDictionary[Placed, frozenset[Part] | None] = WeakKeyDictionary()
        self._touched: WeakKeyDictionary[Placed, tuple[frozenset[int], bool]] = WeakKeyDictionary()
        self._reads: dict[int, str] = {}  # by group: the path where networks read the stream
        self._blocks: dict[int, Tensor] = {}
        self._room = torch.empty(0)

    def arrange(self, rows: Sequence[PackedRow]) -> list[int]:
        return by_adapter(rows)

    def laid(self, patch: Patch) -> Patch:
        """A few trained rows are a low rank, which kernels know."""
        delta = patch.delta
        return as_low_rank(patch) if isinstance(delta, Rows) and len(delta.index) <= MOST_ROWS else super().laid(patch)

    def prepared(self, patch: GroupPatch, columns: Sequence[slice]) -> GroupPatch:
        """With its entry. Raises AdapterRefused."""
        return replace(patch, entry=Entry(self.kernels, patch, columns))

    def parts(self, placed: Placed) -> frozenset[Part] | None:
        """What an adapter does beyond low rank and vectors; None where kernels do not do all of it."""
        if placed not in self._parts:
            self._parts[placed] = self._together(parts_of(placed))
        found = self._parts[placed]
        return found if self.does_parts or not found else None

    def touched(self, placed: Placed) -> tuple[frozenset[int], bool]:
        """The groups where an adapter has a low rank or vectors, and whether it scales the base's output somewhere."""
        if placed not in self._touched:
            groups = placed.groups.items()
            small = frozenset(index for index, patch in groups if patch.A is not None or has_vectors(patch))
            self._touched[placed] = small, any(patch.mul is not None for _, patch in groups)
        return self._touched[placed]

    def _together(self, parts: frozenset[Part] | None) -> frozenset[Part] | None:
        """The same, if its networks read the stream where those before did: a graph has it in one place a group."""
        networks = [part for part in parts or () if part.name == "network"]
        return parts if all(self._reads.setdefault(p.group, p.path) == p.path for p in networks) else None

    def plan(
        self, group: LinearGroup, routing: Routing, touching: Sequence[Segment]
    ) -> tuple[list[Adder], list[Segment]]:
        ranked = [s for s in touching if s.placed.groups[group.index].A is not None]
        small = [s for s in ranked if not _is_large(s)]
        large = [s for s in ranked if _is_large(s)]
        alone = [s for s in routing.segments if s.sole and not _is_large(s)]
        vectors = frozenset(s.placed for s in alone if has_vectors(s.placed.groups.get(group.index)))
        if not small and not vectors:
            return [], large
        if "tiles" not in routing.shared:
            routing.shared["tiles"] = self.on_device(self.listed(routing))
        return [GroupedSmall(self, group, routing.shared["tiles"], vectors)], large

    def forget(self, placed: Placed) -> None:
        self.table.drop(placed)

    def outputs(self, group: LinearGroup) -> Outputs:
        """The group's columns in blocks, and its place in the table's rows."""
        if group.index not in self._blocks:
            blocks = torch.tensor(list(_blocks(group, self.kernels.WIDE)), dtype=torch.int32)
            self._blocks[group.index] = blocks.to(group.device)
        outputs: Outputs = self.kernels.Outputs(
            self._blocks[group.index], group.inp, group.index * self.table.fields, all(o % 16 == 0 for o in group.outs)
        )
        return outputs

    def listed(self, routing: Routing, everything: bool = False) -> Listed:
        """The step's pairs in tiles; made once a routing, shared by all groups. `everything`: of large segments too."""
        name = "listed" if everything else "listed, small"
        if name not in routing.shared:
            segments = [s for s in routing.segments if everything or not _is_large(s)]
            some = [s for s in segments if self._is_listed(s.placed, everything)]
            routing.shared[name] = self._listed(some)
        found: Listed = routing.shared[name]
        return found

    def _is_listed(self, placed: Placed, everything: bool) -> bool:
        """Whether the kernels have anything to do for it. What `everything` asks for is all parts too."""
        return bool(self.touched(placed)[0]) or (everything and bool(self.parts(placed)))

    def _listed(self, segments: Sequence[Segment]) -> Listed:
        tokens = [_tokens(s) for s in segments]
        order: list[int] = []
        weights: list[float] = []
        slots: list[int] = []
        places: dict[tuple[int, bool], list[Place]] = {}
        few = self._few(segments)
        for segment, own, depths in zip(segments, tokens, _layers(tokens), strict=True):
            slot, scales = self.table.take(segment.placed), _weights(segment)
            for kind, mine in _kinds(depths, segment.rows, self.kernels.FEW):
                size = few if kind[1] else self.kernels.MANY
                places.setdefault(kind, []).extend(
                    (slot, len(order) + i, min(size, len(mine) - i), int(segment.sole))
                    for i in range(0, len(mine), size)
                )
                order += [own[i] for i in mine]
                weights += [scales[i] for i in mine]
                slots += [slot] * len(mine)
        kinds = sorted(places)
        ends = list(itertools.accumulate(len(places[kind]) for kind in kinds))
        sizes = [few if short else self.kernels.MANY for _, short in kinds]
        runs = [self.kernels.Run(*each) for each in zip([0, *ends], ends, sizes, strict=False)]
        return Listed(order, weights, slots, [p for kind in kinds for p in places[kind]], runs, self.table.width)

    def _few(self, segments: Sequence[Segment]) -> int:
        """Tokens of a tile of few: no more than adapters have, or most of a tile is empty. Changes no number."""
        most: int = self.kernels.FEW
        if any(n > 1 for s in segments for n in s.rows):
            return most
        return min(most, 1 << round(sum(s.count for s in segments) / max(1, len(segments))).bit_length() - 1)

    def on_device(self, listed: Listed) -> Tiles:
        """A step's pairs where kernels read them."""
        device = self.table.device
        return self.tiles(
            torch.tensor(listed.tokens, dtype=torch.int32, device=device),
            torch.tensor(listed.weights, dtype=torch.float32, device=device),
            torch.tensor(listed.places, dtype=torch.int32, device=device),
            listed.runs,
            listed.width,
        )

    def owners(self, listed: Listed, count: int) -> Owners:
        """Whose each of a step's tokens is, where kernels read it."""
        rows, weights = torch.full((count,), -1, dtype=torch.int32), torch.zeros(count)
        rows[list(listed.tokens)] = torch.tensor(listed.slots, dtype=torch.int32)
        weights[list(listed.tokens)] = torch.tensor(listed.weights)
        made: Owners = self.kernels.Owners(rows.to(self.table.device), weights.to(self.table.device), self.table.rows)
        return made

    def tiles(self, tokens: Tensor, weights: Tensor, places: Tensor, runs: Sequence[Run], width: int) -> Tiles:
        """The same on the device, with room for the small products: one for all steps, which run one after another.
        Who was captured with a smaller one keeps that.
        """
        size = self.kernels.MOST_SPLITS * len(tokens) * width
        if self._room.numel() < size:
            self._room = torch.empty(1 << (size - 1).bit_length(), dtype=torch.float32, device=self.table.device)
        made: Tiles = self.kernels.Tiles(tokens, weights, places, runs, width, self._room)
        return made


class GroupedSmall(AfterBase):
    """A routing's segments at one group. Kernels add in float32; several adapters on a token round several times."""

    def __init__(self, form: Grouped, group: LinearGroup, tiles: Tiles, vectors: frozenset[Placed]) -> None:
        self.kernels, self.tiles, self.held, self.vectors = form.kernels, tiles, group.dtype, vectors
        self.narrow = len({run.tokens for run in tiles.runs}) == len(tiles.runs)  # one of a kind: no token comes twice
        self.table, self.outputs, self.form = form.table.rows, form.outputs(group), form

    def beside(self, routing: Routing) -> Beside | None:
        """The same beside the base's product, where nobody scales what that gives."""
        if not self.narrow or any(self.form.touched(placed)[1] for placed in self.vectors):
            return None
        if "live" not in routing.shared:
            live = torch.zeros(routing.tokens, dtype=torch.int32)
            live[list(self.form.listed(routing).tokens)] = 1
            routing.shared["live"] = live.to(self.form.table.device)
        return Beside(self, routing.shared["live"], self.form.aside)

    def add(self, y: Tensor, x: Tensor) -> None:
        """y [T, outs] += w · (mul · y + add + B (A x)), the vectors of those in `vectors` alone."""
        self.kernels.add_low_rank(y, x, self.tiles, self.table, self.outputs, self.held)

    def write(self, more: Tensor, x: Tensor) -> None:
        """more [T, outs] = w · (add + B (A x)) at the tokens that have adapters."""
        self.kernels.low_rank(more, x, self.tiles, self.table, self.outputs, self.held)


class Beside:
    """The same, computed beside the base's product on a stream of its own, for y's reader to add.

    `live` [T] int32: the tokens that have adapters.
    """

    whole = False

    def __init__(self, small: GroupedSmall, live: Tensor, stream: torch.cuda.Stream | None) -> None:
        self.small, self.live, self.stream = small, live, stream

    def run(self, base: Product | Separate, x: Tensor, outs: int) -> tuple[Tensor, More]:
        """(x · Wᵀ + b [T, outs], what is to be added)."""
        value = torch.empty(len(x), outs, dtype=x.dtype, device=x.device)
        if self.stream is None:
            self.small.write(value, x)
            return base(x), self.small.kernels.More(value, self.live)
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        try:
            with torch.cuda.stream(self.stream):
                self.small.write(value, x)
            y = base(x)
        finally:  # whatever fails: the memory that is written there is freed here, and a capture ends where both have
            here.wait_stream(self.stream)
        return y, self.small.kernels.More(value, self.live)


def _urgent_stream(device: torch.device) -> torch.cuda.Stream | None:
    """One whose few programs go first wherever there is a free place."""
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def has_vectors(patch: GroupPatch | None) -> bool:
    return patch is not None and (patch.mul is not None or patch.add is not None)


def _is_large(segment: Segment) -> bool:
    return segment.count > LARGE and isinstance(segment.tokens, slice)


def _tokens(segment: Segment) -> list[int]:
    return [token for start, stop, _ in segment.spans for token in range(start, stop)]


def _weights(segment: Segment) -> list[float]:
    return [weight for start, stop, weight in segment.spans for _ in range(start, stop)]


def _layers(tokens: Sequence[Sequence[int]]) -> list[list[int]]:
    """Per segment and token: how many segments before it have the token too."""
    seen: dict[int, int] = {}
    layers = []
    for own in tokens:
        layers.append([seen.get(token, 0) for token in own])
        for token in own:
            seen[token] = seen.get(token, 0) + 1
    return layers


def _kinds(depths: Sequence[int], rows: Sequence[int], few: int) -> Iterator[tuple[tuple[int, bool], list[int]]]:
    """A segment's tokens by (how many adapters before, whether their row has few): by the row's own tokens alone."""
    short = [n <= few for n in rows for _ in range(n)]
    for kind in sorted(set(zip(depths, short, strict=True))):
        yield kind, [i for i, each in enumerate(zip(depths, short, strict=True)) if each == kind]


def _blocks(group: LinearGroup, wide: int) -> Iterator[tuple[int, int, int, int]]:
    for member, (columns, out) in enumerate(zip(group.columns, group.outs, strict=True)):
        for start in range(0, out, wide):
            yield member, start, out, columns.start + start
