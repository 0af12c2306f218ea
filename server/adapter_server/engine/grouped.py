"""`LowRank` for CUDA: all adapters of a step in one shrink and one expand a group, on the adapters' own tensors.

    table [adapters, groups · fields] int64    per group: A's address and rows; per member Bt's address, row in A, rank

A row of the table is written when its adapter first runs; a step's plan names rows. Any ranks run in one launch,
nothing is padded, copied or gathered. Its reference, and what runs without the kernels, is `lowrank.Banked`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

FEWEST = 64  # adapters that the table has room for at first
LARGE = 256  # tokens of one adapter's own; above, plain products read its tensors often enough


@dataclass(frozen=True, slots=True, eq=False)
class Listed:
    """A step's (token, adapter) pairs as `kernels.Tiles` has them, on the host."""

    tokens: Sequence[int]
    weights: Sequence[float]
    places: Sequence[tuple[int, int, int]]
    layers: Sequence[tuple[int, int]]
    width: int


class Table:
    """The addresses of adapters' tensors on the device, a row each. Rows of adapters that went are used again."""

    def __init__(self, kernels: ModuleType, device: torch.device) -> None:
        self.kernels, self.device = kernels, device
        self.groups, self.members = 1, 1
        self.held: list[Placed | None] = []
        self.width = kernels.RANKS  # the most rows that an A had, in whole blocks
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
        rows = max((patch.A.shape[0] for patch in placed.groups.values() if patch.A is not None), default=0)
        self.width = max(self.width, -(-rows // self.kernels.RANKS) * self.kernels.RANKS)
        fits = (groups, members) == (self.groups, self.members) and len(self.held) <= len(self.rows)
        self.groups, self.members = groups, members
        return fits

    def _write(self) -> None:
        """Anew and larger: a group or member was seen for the first time, or more adapters than ever."""
        count = max(FEWEST, 1 << (len(self.held) - 1).bit_length())
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
    """A and its rows; per member Bt, its first row in A, its rank."""
    if patch.A is None:
        return [0, 0]
    entry, above = [patch.A.data_ptr(), patch.A.shape[0]], 0
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
        if not small:
            return [], large
        if "tiles" not in routing.shared:
            routing.shared["tiles"] = self._on_device(self.listed(routing))
        return [GroupedSmall(self, group, routing.shared["tiles"])], large

    def forget(self, placed: Placed) -> None:
        self.table.drop(placed)

    def outputs(self, group: LinearGroup) -> Outputs:
        """The group's columns in blocks, and its place in the table's rows."""
        if group.index not in self._blocks:
            blocks = torch.tensor(list(_blocks(group, self.kernels.WIDE)), dtype=torch.int32)
            self._blocks[group.index] = blocks.to(group.device)
        outputs: Outputs = self.kernels.Outputs(
            self._blocks[group.index], group.inp, group.index * self.table.fields
        )  # fmt: skip
        return outputs

    def listed(self, routing: Routing) -> Listed:
        """The step's pairs in tiles; made once a routing, shared by all groups."""
        if "listed" not in routing.shared:
            segments = [s for s in routing.segments if s.placed.rank and not _is_large(s)]
            routing.shared["listed"] = self._listed(segments)
        found: Listed = routing.shared["listed"]
        return found

    def _listed(self, segments: Sequence[Segment]) -> Listed:
        slots = [self.table.take(s.placed) for s in segments]
        tokens, weights = [_tokens(s) for s in segments], [_weights(s) for s in segments]
        layers, at = _layers(tokens), 0
        tiles: list[list[tuple[int, int, int]]] = [[] for _ in range(1 + max(map(max, layers)))]
        order: list[int] = []
        each: list[float] = []
        for slot, own, scales, depths in zip(slots, tokens, weights, layers, strict=True):
            for depth in sorted(set(depths)):
                mine = [i for i, d in enumerate(depths) if d == depth]
                order += [own[i] for i in mine]
                each += [scales[i] for i in mine]
                tiles[depth] += [
                    (slot, at + i, min(self.kernels.TOKENS, len(mine) - i))
                    for i in range(0, len(mine), self.kernels.TOKENS)
                ]
                at += len(mine)
        ends = list(itertools.accumulate(len(layer) for layer in tiles))
        places = [place for layer in tiles for place in layer]
        return Listed(order, each, places, list(zip([0, *ends], ends, strict=False)), self.table.width)

    def _on_device(self, listed: Listed) -> Tiles:
        device = self.table.device
        return self.tiles(
            torch.tensor(listed.tokens, dtype=torch.int32, device=device),
            torch.tensor(listed.weights, dtype=torch.float32, device=device),
            torch.tensor(listed.places, dtype=torch.int32, device=device),
            listed.width,
            listed.layers,
        )

    def tiles(
        self, tokens: Tensor, weights: Tensor, places: Tensor, width: int, layers: Sequence[tuple[int, int]] = ()
    ) -> Tiles:
        """The same on the device, with room for the small products; one layer of all tiles, unless said."""
        size = self.kernels.MOST_SPLITS * len(tokens) * width
        scratch = torch.empty(size, dtype=torch.float32, device=self.table.device)
        made: Tiles = self.kernels.Tiles(tokens, weights, places, layers or [(0, len(places))], width, scratch)
        return made


class GroupedSmall:
    """A routing's segments at one group. Kernels add in float32; several adapters on a token round several times."""

    def __init__(self, form: Grouped, group: LinearGroup, tiles: Tiles) -> None:
        self.kernels, self.tiles, self.held = form.kernels, tiles, group.dtype
        self.narrow = len(tiles.layers) == 1
        self.table, self.outputs = form.table.rows, form.outputs(group)

    def add(self, y: Tensor, x: Tensor) -> None:
        """y [T, outs] += w · B (A x)."""
        self.kernels.add_low_rank(y, x, self.tiles, self.table, self.outputs, self.held)


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


def _blocks(group: LinearGroup, wide: int) -> Iterator[tuple[int, int, int, int]]:
    for member, (columns, out) in enumerate(zip(group.columns, group.outs, strict=True)):
        for start in range(0, out, wide):
            yield member, start, out, columns.start + start
