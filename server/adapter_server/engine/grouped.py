"""`LowRank` for CUDA: all adapters of a step in one shrink and one expand a group, on the adapters' own tensors.

    table [adapters, groups · fields] int64    per group: A's address and rows, mul's and add's addresses;
                                               per member: Bt's address, first row in A, rank

A row of the table is written when its adapter first runs; a step's plan names rows. Any ranks run in one launch,
nothing is padded, copied or gathered. Its reference, and what runs without the kernels, is `lowrank.Banked`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapter_server.engine.lowrank import Adder, PackedRow, by_adapter
from adapter_server.engine.routing import Routing, Segment

if TYPE_CHECKING:
    from adapter_server.engine.kernels import Outputs, Tiles
    from adapter_server.engine.placed import GroupPatch, Placed
    from adapter_server.engine.site import LinearGroup

LARGE = 256  # tokens of one adapter's own; above, plain products read its tensors often enough


class Table:
    """The addresses of adapters' tensors on the device, a row each. Rows of adapters that went are used again."""

    def __init__(self, kernels: ModuleType, device: torch.device) -> None:
        self.kernels, self.device = kernels, device
        self.groups, self.members = 1, 1
        self.held: list[Placed | None] = []
        self.rows = torch.empty(0, 0, dtype=torch.int64)

    @property
    def fields(self) -> int:
        """Of one group."""
        fields: int = self.kernels.HEAD + self.kernels.MEMBER * self.members
        return fields

    def take(self, placed: Placed) -> int:
        """The adapter's row, written if it is new."""
        if placed in self.held:
            return self.held.index(placed)
        free = self.held.index(None) if None in self.held else len(self.held)
        self.held[free : free + 1] = [placed]
        if self._fits(placed):
            self.rows[free] = self._row(placed)
        else:
            self._write()
        return free

    def drop(self, placed: Placed) -> None:
        if placed in self.held:
            self.held[self.held.index(placed)] = None

    def _fits(self, placed: Placed) -> bool:
        groups = max(self.groups, 1 + max(placed.groups, default=0))
        members = max(self.members, *(len(patch.pairs) for patch in placed.groups.values()), 0)
        fits = (groups, members) == (self.groups, self.members) and len(self.held) <= len(self.rows)
        self.groups, self.members = groups, members
        return fits

    def _write(self) -> None:
        """Anew and larger: a group or member was seen for the first time, or more adapters than ever."""
        count = max(16, 1 << (len(self.held) - 1).bit_length())
        empty = torch.zeros(self.groups * self.fields, dtype=torch.int64)
        rows = [empty if placed is None else self._row(placed) for placed in self.held]
        self.rows = torch.stack([*rows, *[empty] * (count - len(rows))]).to(self.device)

    def _row(self, placed: Placed) -> Tensor:
        row = torch.zeros(self.groups, self.fields, dtype=torch.int64)
        for index, patch in placed.groups.items():
            entry = _entry(patch)
            row[index, : len(entry)] = torch.tensor(entry)
        return row.view(-1)


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


class Grouped:
    """`LowRank` by the Triton kernels."""

    def __init__(self, kernels: ModuleType, device: torch.device) -> None:
        self.kernels, self.table = kernels, Table(kernels, device)
        self._blocks: dict[int, Tensor] = {}

    def arrange(self, rows: Sequence[PackedRow]) -> list[int]:
        return by_adapter(rows)

    def plan(
        self, group: LinearGroup, routing: Routing, touching: Sequence[Segment]
    ) -> tuple[list[Adder], list[Segment]]:
        small = [s for s in touching if not _is_large(s)]
        large = [s for s in touching if _is_large(s)]
        alone = [s for s in routing.segments if s.sole and not _is_large(s)]
        vectors = frozenset(s.placed for s in alone if _has_vectors(s.placed.groups.get(group.index)))
        if not small and not vectors:
            return [], large
        if "tiles" not in routing.shared:
            routing.shared["tiles"] = self._tiles([s for s in routing.segments if not _is_large(s)])
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

    def _tiles(self, segments: Sequence[Segment]) -> Tiles:
        """The step's pairs in tiles; made once a routing, shared by all groups."""
        segments = [s for s in segments if any(_is_small(patch) for patch in s.placed.groups.values())]
        tokens = [_tokens(s) for s in segments]
        order: list[int] = []
        weights: list[float] = []
        places: dict[tuple[int, bool], list[tuple[int, int, int, int]]] = {}
        for segment, own, depths in zip(segments, tokens, _layers(tokens), strict=True):
            slot, scales = self.table.take(segment.placed), _weights(segment)
            for kind, mine in _kinds(depths, segment.rows, self.kernels.FEW):
                size = self.kernels.FEW if kind[1] else self.kernels.MANY
                places.setdefault(kind, []).extend(
                    (slot, len(order) + i, min(size, len(mine) - i), int(segment.sole))
                    for i in range(0, len(mine), size)
                )
                order += [own[i] for i in mine]
                weights += [scales[i] for i in mine]
        return self._on_device(order, weights, places, segments)

    def _on_device(
        self,
        order: list[int],
        weights: list[float],
        places: dict[tuple[int, bool], list[tuple[int, int, int, int]]],
        segments: Sequence[Segment],
    ) -> Tiles:
        device, block = self.table.device, self.kernels.MANY_RANKS
        kinds = sorted(places)
        ends = list(itertools.accumulate(len(places[kind]) for kind in kinds))
        rows = [p.A.shape[0] for s in segments for p in s.placed.groups.values() if p.A is not None]
        width = -(-max(rows, default=1) // block) * block
        tiles: Tiles = self.kernels.Tiles(
            torch.tensor(order, dtype=torch.int32, device=device),
            torch.tensor(weights, dtype=torch.float32, device=device),
            torch.tensor([place for kind in kinds for place in places[kind]], dtype=torch.int32, device=device),
            [self.kernels.Run(a, b, few) for a, b, (_, few) in zip([0, *ends], ends, kinds, strict=False)],
            width,
            torch.empty(self.kernels.MOST_SPLITS * len(order) * width, dtype=torch.float32, device=device),
        )
        return tiles


class GroupedSmall:
    """A routing's segments at one group. Kernels add in float32; several adapters on a token round several times."""

    def __init__(self, form: Grouped, group: LinearGroup, tiles: Tiles, vectors: frozenset[Placed]) -> None:
        self.kernels, self.tiles, self.held, self.vectors = form.kernels, tiles, group.dtype, vectors
        self.narrow = len({run.few for run in tiles.runs}) == len(tiles.runs)  # one run of a kind: no token comes twice
        self.table, self.outputs = form.table.rows, form.outputs(group)

    def add(self, y: Tensor, x: Tensor) -> None:
        """y [T, outs] += w · (mul · y + add + B (A x)), the vectors of those in `vectors` alone."""
        self.kernels.add_low_rank(y, x, self.tiles, self.table, self.outputs, self.held)


def _has_vectors(patch: GroupPatch | None) -> bool:
    return patch is not None and (patch.mul is not None or patch.add is not None)


def _is_small(patch: GroupPatch) -> bool:
    """Whether the kernels have anything to do for it."""
    return patch.A is not None or _has_vectors(patch)


def _is_large(segment: Segment) -> bool:
    return segment.count > LARGE and isinstance(segment.tokens, slice)


def _tokens(segment: Segment) -> list[int]:
    if isinstance(segment.tokens, slice):
        return list(range(segment.tokens.start, segment.tokens.stop))
    tokens: list[int] = segment.tokens.tolist()
    return tokens


def _weights(segment: Segment) -> list[float]:
    if segment.weights is None:
        return [1.0] * segment.count
    weights: list[float] = segment.weights[:, 0].tolist()
    return weights


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
