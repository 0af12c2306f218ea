"""What adapters do beyond low rank and vectors, in captured steps: by `kernels/parts.py`, from the table of addresses.

    at a group    scaled and turned inputs, mirrors, sparse and spectral changes, networks behind blocks, own weights
    elsewhere     norms' own weights, token by token; an embedding's rows, which are looked up before the graph

A graph has the parts that some adapter has. Its reference, and what runs without a graph, is `LinearGroup._mixed`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from adapter_server.engine.lowrank import AfterBase
from adapter_server.engine.modules import stream
from adapter_server.engine.operands import ACTS
from adapter_server.engine.placed import GroupPatch, Placed, Product, Separate, check_index
from adapter_server.engine.routing import Routing
from adapter_server.families.base import network_of
from adapter_server.families.deltas import Sparse, Spectral

if TYPE_CHECKING:
    from adapter_server.engine.grouped import Grouped, GroupedSmall
    from adapter_server.engine.kernels import Owners, Tiles
    from adapter_server.engine.site import LinearGroup

READS = {"y": (1, 0), "y + r": (1, 1), "r": (0, 1)}  # what a network's first product is of
ELSEWHERE = -1  # no group
AT_GROUP = ("in_scale", "own", "network")


class Part(NamedTuple):
    """What some adapter does at a member of a group, or at another module."""

    group: int
    name: str  # in_scale, own, network; of a member turn, mirror, sparse, spectral; of another module: module
    member: int = 0
    path: str = ""  # of the other module, or of the one whose input a network reads


class Entry:
    """What the table says of one adapter at one group.

    `whole`: that this is all that it does there; `weighable`: with any weight. A turned input is given its weight
    before the base's product, which is too early where what that gives is scaled.
    """

    def __init__(self, kernels: ModuleType, patch: GroupPatch, columns: Sequence[slice]) -> None:
        """Raises AdapterRefused for an index that lies outside the weight."""
        self.kernels, self.columns, self.whole, self.weighable = kernels, columns, True, True
        self.kept: list[Tensor] = []  # whose addresses are named
        self.parts: set[tuple[str, int, str]] = set()
        self.width = 0  # of a network
        self.fields = [0] * (kernels.ABOVE + kernels.EACH * len(columns))
        if patch.shift is not None:
            self._put("in_scale", 0, kernels.IN_SCALE, [patch.shift])
        if patch.product is not None:
            self._put("own", 0, kernels.OWN, [patch.product.weight, patch.product.bias])
        if patch.block is not None:
            self._network(patch)
        for turned in patch.turns:
            R = turned.turn.R
            step = R[0].numel() if len(R) > 1 else 0
            self.weighable &= turned.scale is None
            self._put("turn", turned.member, kernels.TURN, [R], [R.shape[-1], step])
        for at, mirror in patch.mirrors:
            check_index(mirror.index, at.stop - at.start)
            self._put("mirror", columns.index(at), kernels.MIRROR, [mirror.index, mirror.factor])
        for at, delta in patch.deltas:
            self._delta(at, delta)

    def _delta(self, at: slice, delta: object) -> None:
        S = delta.S if isinstance(delta, Spectral) else delta
        if not isinstance(S, Sparse):
            self.whole = False
            return
        check_index(S.columns, S.inp)
        name, first = ("sparse", self.kernels.SPARSE) if S is delta else ("spectral", self.kernels.SPECTRAL)
        self._put(name, self.columns.index(at), first, [S.starts, S.columns, S.values])

    def _network(self, patch: GroupPatch) -> None:
        network = None if patch.block is None else network_of(patch.block)
        if patch.block is None or network is None or network.act not in ACTS:
            self.whole = False
            return
        tensors = [network.down, network.down_bias, network.up, network.up_bias]
        self.width = len(network.down)
        numbers = [self.width, ACTS[network.act], *READS[network.reads], network.again]
        self._put("network", 0, self.kernels.NETWORK, tensors, numbers, patch.block.reads)

    def _put(
        self, name: str, member: int, first: int, tensors: Iterable[Tensor | None], numbers: Iterable[int] = (),
        path: str = "",
    ) -> None:  # fmt: skip
        """The addresses of tensors, and numbers behind them."""
        self.whole &= (name, member, path) not in self.parts
        self.parts.add((name, member, path))
        at = first if name in AT_GROUP else self.kernels.ABOVE + self.kernels.EACH * member + first
        values = [*(0 if t is None else self._address(t) for t in tensors), *numbers]
        self.fields[at : at + len(values)] = values

    def _address(self, t: Tensor) -> int:
        """Of numbers side by side that begin at whole 16 bytes."""
        t = t.contiguous() if t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)
        self.kept.append(t)
        return t.data_ptr()


def parts_of(placed: Placed) -> frozenset[Part] | None:
    """What an adapter does beyond low rank and vectors; None where kernels do not do all of it."""
    entries = {index: patch.entry for index, patch in placed.groups.items()}
    if placed.unfused or placed.tree is not None or not all(isinstance(e, Entry) and e.whole for e in entries.values()):
        return None
    mine = {Part(i, *part) for i, entry in entries.items() if isinstance(entry, Entry) for part in entry.parts}
    return frozenset(mine | {Part(ELSEWHERE, "module", path=path) for path in placed.others})


def weighable(placed: Placed) -> bool:
    return all(patch.entry.weighable for patch in placed.groups.values() if isinstance(patch.entry, Entry))


class Parts(AfterBase):
    """A captured step's adapters at one group: what they do beyond low rank, and that too."""

    narrow = False
    vectors: frozenset[Placed] = frozenset()

    def __init__(
        self, form: Grouped, group: LinearGroup, parts: Iterable[Part], tiles: Tiles, owners: Owners, width: int,
        small: GroupedSmall | None = None,
    ) -> None:  # fmt: skip
        """`width`: of the widest network; `small`: the low rank's, where adapters have some here."""
        self.group, self.small, self.tiles, self.owners, self.kernels = group, small, tiles, owners, form.kernels
        self.at, self.width, self.outputs = form.table.parts_at(group.index), width, form.outputs(group)
        self.members: dict[str, list[int]] = {}
        self.reads = ""
        for part in sorted(parts):
            self.members.setdefault(part.name, []).append(part.member)
            self.reads = part.path or self.reads

    def beside(self, routing: Routing) -> None:
        """It needs what the base gives."""

    def _of(self, member: int, first: int) -> int:
        """The table's column of a member's field."""
        return int(self.at + self.kernels.ABOVE + self.kernels.EACH * member + first)

    def base(self, base: Product | Separate, x: Tensor) -> Tensor:
        """Of scaled and turned inputs: each member that has some reads its own."""
        moved = {*self.members.get("in_scale", ()), *self.members.get("turn", ())}
        if not moved:
            return base(x)
        scale = self.at + self.kernels.IN_SCALE
        make = partial(self.kernels.inputs, x, self.owners, scale, held=self.group.dtype)
        if len(self.group.outs) == 1:
            return base(make(self._of(0, self.kernels.TURN)))
        inputs = [make(self._of(m, self.kernels.TURN)) if m in moved else x for m in range(len(self.group.outs))]
        return torch.cat([self.group.of_member(own, m) for m, own in enumerate(inputs)], 1)

    def add(self, y: Tensor, x: Tensor) -> None:
        """y [T, outs] is what the base gives; x [T, in] as it came."""
        more = self._mirrored(y) if "mirror" in self.members else None
        r, h = self._hidden(y) if "network" in self.members else (None, None)
        if self.small is not None:
            self.small.add(y, x)
        for member in self.members.get("sparse", ()):
            at = self._of(member, self.kernels.SPARSE)
            self.kernels.add_sparse(y[:, self.group.columns[member]], x, self.owners, at, self.group.dtype)
        if "spectral" in self.members:
            self._add_spectral(y, x)
        if more is not None:
            y.add_(more)
        if r is not None:
            self.kernels.add_hidden(y, r, h, self.tiles, self.owners.table, self._network, self.group.dtype)
        if "own" in self.members:
            at = self.at + self.kernels.OWN
            self.kernels.own_product(y, x, self.tiles, self.owners.table, at, self.group.base_dtype)

    @property
    def _network(self) -> int:
        return int(self.at + self.kernels.NETWORK)

    def _mirrored(self, y: Tensor) -> Tensor:
        more: Tensor = self.kernels.mirrored(
            y, self.owners, self.outputs.blocks, self._of(0, self.kernels.MIRROR), self.outputs.aligned,
            self.group.dtype,
        )  # fmt: skip
        return more

    def _hidden(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(the stream [T, hidden], the networks' first products)"""
        r = stream(self.reads).reshape(y.shape)
        table, at = self.owners.table, self._network
        return r, self.kernels.hidden(y, r, self.tiles, table, at, self.width, self.group.dtype)

    def _add_spectral(self, y: Tensor, x: Tensor) -> None:
        """y[t] += w · Re ifft(S ifft(x[t])), a member's S of the table."""
        waves = torch.fft.ifft(x.float())
        halves = waves.real.contiguous(), waves.imag.contiguous()
        for member in self.members["spectral"]:
            columns, at = self.group.columns[member], self._of(member, self.kernels.SPECTRAL)
            sums = [half.new_zeros(len(x), self.group.outs[member]) for half in halves]
            for total, half in zip(sums, halves, strict=True):
                self.kernels.add_sparse(total, half, self.owners, at, torch.float32)
            y[:, columns] += torch.fft.ifft(torch.complex(*sums)).real
