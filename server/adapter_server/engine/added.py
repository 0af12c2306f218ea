"""What a step's adapters add at a group of Linears on the CPU, by `lowrank.c` and `deltas.c`: one call for all of it.

The tables that those read (`added.h`) name the adapters' own tensors, of which nothing is padded, copied or kept. An
adapter's part of them is made once, an `Entry` a group; a routing's once, `Units` for all groups.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from adapter_server.engine.lowrank import Adder, PackedRow, by_adapter
from adapter_server.engine.modules import stream
from adapter_server.engine.native import SERIAL, Added, Panels, Table
from adapter_server.engine.operands import ACTS
from adapter_server.engine.placed import check_index
from adapter_server.engine.routing import Routing, Segment
from adapter_server.engine.units import BLOCK, LANES, PART, UNIT, Record, Units
from adapter_server.families.base import BlockPatch, Network, Patch, as_low_rank, network_of, with_whole_factors
from adapter_server.families.deltas import SIDE, Circulant, Delta, Kronecker, Mirror, Rows, Scaled, Sparse, Spectral

if TYPE_CHECKING:
    from adapter_server.engine.placed import GroupPatch, Placed, Product, Separate, Turned
    from adapter_server.engine.site import LinearGroup

SCALED, SPARSE, SPECTRAL, KRONECKER, CIRCULANT, ROWS, MIRROR, NETWORK = range(8)
STREAM = 9  # where a network's part, which is all of its entry's, names the residual stream
READS = ("y", "y + r", "r")
FORMATS = (torch.float32, torch.bfloat16, torch.float16)  # of A and Bt; the others widen to the first without loss
_NOTHING = torch.empty(0)
WORTH = 4  # times its multiplications: a Kronecker product's are of a whole vector of tokens, and of its own numbers
LARGEST_TURN = 256  # block of a rotation that is read again for each of many tokens
LARGEST = 64  # prime factor of a length that is worth transforming here


class Native:
    """`LowRank` by the kernel. Groups run one after another, and so share the memory that they work in."""

    keeps = frozenset(FORMATS)

    def __init__(self, kernel: ctypes.CDLL) -> None:
        self.kernel = kernel
        self._rooms: dict[str, Tensor] = {}
        self._records: WeakKeyDictionary[Placed, Record] = WeakKeyDictionary()
        self._shape = (0, 0)  # of a record's fields

    def meet(self, index: int, members: int) -> None:
        self._shape = max(self._shape[0], index + 1), max(self._shape[1], UNIT + 2 * members)

    def room(self, name: str, numbers: int) -> Tensor:
        """Working memory. Who was given a smaller one keeps that."""
        if numbers > self._rooms.get(name, _NOTHING).numel():
            self._rooms[name] = torch.empty(numbers)
        return self._rooms.get(name, _NOTHING)

    def arrange(self, rows: Sequence[PackedRow]) -> list[int]:
        return by_adapter(rows)

    def laid(self, patch: Patch) -> Patch:
        """A Kronecker product runs as it is where that is less work than as a low rank, for a vector of tokens too."""
        delta = patch.delta
        if isinstance(delta, Kronecker):
            (o1, i1), (o2, i2) = delta.sizes
            if 0 < delta.rank * (o1 * o2 + i1 * i2) < WORTH * delta.work:
                return as_low_rank(patch)
        return with_whole_factors(patch)

    def prepared(self, patch: GroupPatch, columns: Sequence[slice]) -> GroupPatch:
        """With its entry. Raises AdapterRefused."""
        return replace(patch, entry=Entry(patch, columns[-1].stop))

    def special(self, routing: Routing) -> Sequence[Segment]:
        """All but those in one piece, alone on their tokens, that turn no input and replace no weight, and have no part
        that is left to torch or stands behind a block.
        """
        if "special" not in routing.shared:
            routing.shared["special"] = [s for s in routing.segments if not self._is_lean(s)]
        found: Sequence[Segment] = routing.shared["special"]
        return found

    def _is_lean(self, segment: Segment) -> bool:
        return segment.sole and isinstance(segment.tokens, slice) and self._record(segment.placed).lean

    def plan(
        self, group: LinearGroup, routing: Routing, touching: Sequence[Segment]
    ) -> tuple[list[Adder], list[Segment]]:
        large = [s for s in touching if not isinstance(s.tokens, slice)]
        if not any(group.index in segment.placed.groups for segment in routing.segments):
            return [], large
        units = self.units(routing)
        if units is None or not units.acting[group.index]:
            return [], large
        small = [s for s in touching if isinstance(s.tokens, slice) and _entry(s, group).acts]
        return [NativeSmall(self, group, routing, units, small)], large

    def units(self, routing: Routing) -> Units | None:
        """A routing's, made once for all groups; None where no segment is in one piece."""
        if "units" not in routing.shared:
            segments = [s for s in routing.segments if isinstance(s.tokens, slice)]
            records = [self._record(segment.placed) for segment in segments]
            routing.shared["units"] = Units(segments, records, BLOCK) if segments else None
        found: Units | None = routing.shared["units"]
        return found

    def finer(self, routing: Routing, segment: Segment, most: int) -> Units:
        """One segment's, of fewer tokens each."""
        if ("units", segment, most) not in routing.shared:
            routing.shared["units", segment, most] = Units([segment], [self._record(segment.placed)], most)
        found: Units = routing.shared["units", segment, most]
        return found

    def _record(self, placed: Placed) -> Record:
        if (found := self._records.get(placed)) is None:
            entries = {index: entry_of(placed, index) for index in placed.groups}
            found = self._records[placed] = Record.of(entries, self._shape)
        return found

    def forget(self, placed: Placed) -> None:
        """Its record goes with it."""


class Entry:
    """What the tables say of one adapter at one group."""

    def __init__(self, patch: GroupPatch, width: int) -> None:
        """`width`: of the group's output."""
        self.kept: list[object] = []  # whose addresses are named
        pairs = [(0, 0) if pair is None else (self._at(pair[1]), pair[0].shape[0]) for pair in patch.pairs]
        A = (0, 0, 0) if patch.A is None else (self._at(patch.A), patch.A.shape[0], FORMATS.index(patch.A.dtype))
        vectors = self._at(patch.mul), self._at(patch.add)
        self.numbers = sum(t.numel() for t in (patch.A, *(pair[1] for pair in patch.pairs if pair)) if t is not None)
        self.stream = ""  # path of the module whose input is the residual stream that a network reads
        self.shrunk = A[1]  # numbers of a token's that are shared by all threads
        self.lanes, self.room = 0, 0  # multiplications of LANES tokens at once; numbers that parts need room for
        self.done: list[Delta | Mirror | BlockPatch] = []
        self.parts: list[tuple[int, ...]] = []
        for columns, mirror in patch.mirrors:
            check_index(mirror.index, columns.stop - columns.start)
            self._add(columns, mirror, MIRROR, (mirror.index, mirror.factor), 0, each=len(mirror.index))
        network = None if patch.block is None else network_of(patch.block)
        if patch.block is not None and network is not None and network.act in ACTS:
            self._network(patch.block, network)
        self.before = len(self.parts)
        for columns, delta in patch.deltas:
            if (known := PARTS.get(type(delta))) is not None:
                known(self, columns, delta)
        self.by_token = any(part[0] == NETWORK for part in self.parts)  # tokens are shared out, not numbers
        self.turns = {turned.member: self._turn(turned) for turned in patch.turns}
        if patch.shift is not None:  # of a Linear that stands alone
            self.turns[0] = (self._at(patch.shift), 1, 0)
        self.list = _array(itertools.chain.from_iterable(self.parts))
        parts = (ctypes.addressof(self.list), len(self.parts), self.before) if self.parts else (0, 0, 0)
        self.fields = (*vectors, *parts, *A, *itertools.chain.from_iterable(pairs))  # of a unit, from MUL on
        self.acts = any((A[0], *vectors, self.parts, self.turns))  # whether there is anything for the kernel to do
        self.room = max(self.room, BLOCK * width if self.before else 0)
        left = len(patch.deltas) + len(patch.mirrors) - len(self.done)
        self.lean = not (left or self.turns) and patch.block is None and patch.product is None

    @property
    def facts(self) -> tuple[int, ...]:
        """What `Units` reckon with."""
        return self.acts, self.numbers, self.lanes, self.room, self.shrunk

    def _at(self, t: Tensor | None) -> int:
        if t is None:
            return 0
        t = t.contiguous()
        self.kept.append(t)
        return t.data_ptr()

    def _plan(self, n: int) -> int:
        """The address of a plan to transform n numbers; 0 where there is none."""
        made = plan_of(n)
        self.kept.append(made)
        return 0 if made is None else ctypes.addressof(made[0])

    def _turn(self, turned: Turned) -> tuple[int, int, int]:
        R = turned.turn.R
        return self._at(R), R.shape[0], R.shape[-1]

    def _network(self, block: BlockPatch, network: Network) -> None:
        d, n = network.down.shape
        args = (network.down, network.down_bias, network.up.T, network.up_bias, d, ACTS[network.act])
        again = (0, READS.index(network.reads), network.again)
        self.stream = block.reads if any(again) else ""
        self._add(slice(0, n), block, NETWORK, (*args, *again), BLOCK * (n + d), each=2 * n * d)

    def _add(
        self,
        columns: slice,
        part: Delta | Mirror | BlockPatch,
        kind: int,
        args: Sequence[Tensor | int],
        room: int,
        lanes: int = 0,
        each: int = 0,
    ) -> None:
        """`lanes`: multiplications of LANES tokens at once; `each`: of one token."""
        self.numbers += each
        numbers = [a if isinstance(a, int) else self._at(a) for a in args]
        row = (kind, columns.start, columns.stop - columns.start, *numbers)
        self.parts.append((*row, *(PART - len(row)) * (0,)))
        self.done.append(part)
        self.room, self.lanes = max(self.room, room), self.lanes + lanes

    def sparse(self, columns: slice, delta: Sparse) -> None:
        check_index(delta.columns, delta.inp)
        args = delta.starts, delta.columns, delta.values
        self._add(columns, delta, SPARSE, args, LANES * delta.inp, LANES * len(delta.values))

    def spectral(self, columns: slice, delta: Spectral) -> None:
        S, out = delta.S, columns.stop - columns.start
        check_index(S.columns, S.inp)
        plans = (self._plan(S.inp), self._plan(out))
        if not all(plans):
            return
        passes = S.inp * S.inp.bit_length() + out * out.bit_length()
        args, room = (S.starts, S.columns, S.values, *plans), 4 * LANES * max(S.inp, out)
        self._add(columns, delta, SPECTRAL, args, room, 2 * LANES * (len(S.values) + passes))

    def kronecker(self, columns: slice, delta: Kronecker) -> None:
        (o1, i1), (o2, i2) = delta.left.shape, delta.right.shape
        args = delta.left, delta.right, o1, i1, o2, i2
        self._add(columns, delta, KRONECKER, args, LANES * (i1 * (i2 + o2) + o1), LANES * i1 * o2 * (i2 + o1))

    def circulant(self, columns: slice, delta: Circulant) -> None:
        (half, n, m), b = delta.spectrum.shape, delta.size
        if not (plan := self._plan(b)):
            return
        room, work = half * n + b * m + 4 * b, half * n * m + (n + m) * b * b.bit_length()
        self._add(columns, delta, CIRCULANT, (delta.spectrum, plan), LANES * room, LANES * work)

    def rows(self, columns: slice, delta: Rows) -> None:
        n = len(delta.index)
        check_index(delta.index, delta.out)
        self._add(columns, delta, ROWS, (delta.index, delta.values, n), BLOCK * n, each=delta.values.numel())

    def scaled(self, columns: slice, delta: Scaled) -> None:
        r, out = len(delta.mid), columns.stop - columns.start
        args = delta.A.data_ptr(), delta.A.stride(0), r, delta.mid, delta.B, SIDE, delta.outer
        self.kept.append(delta.A)
        self.shrunk = max(self.shrunk, r)
        self._add(columns, delta, SCALED, args, BLOCK * r, each=r * (delta.A.shape[1] + out))


PARTS: dict[type, Callable[[Entry, slice, Any], None]] = {
    Sparse: Entry.sparse,
    Spectral: Entry.spectral,
    Kronecker: Entry.kronecker,
    Circulant: Entry.circulant,
    Rows: Entry.rows,
    Scaled: Entry.scaled,
}


class NativeSmall:
    """The segments of a routing at one group: one call a step. Long ones go in as units, each for one thread."""

    def __init__(
        self, form: Native, group: LinearGroup, routing: Routing, units: Units, segments: Sequence[Segment]
    ) -> None:
        """`segments`: the special ones."""
        self.narrow = group.base_dtype == group.dtype
        self.vectors = frozenset(s.placed for s in segments if s.sole)
        turning = _panels(group.base) is not None and any(_entry(s, group).turns for s in segments)
        self.inputs = Inputs(form, group, routing.tokens, segments) if turning else None
        self.scaled = frozenset(s.placed for s in segments if self.inputs is not None and s.alone)
        self.done = frozenset(id(part) for s in segments for part in self._done(s, group))
        self._streams = [entry for s in segments if (entry := _entry(s, group)).stream]
        self._call, self._width, self._inp = form.kernel.adapters_add, sum(group.outs), group.inp
        self.most = torch.get_num_threads()  # that there is room for
        self.threads = 1 if units.work[group.index] < SERIAL else self.most
        alone = self.threads > 1 and units.acting[group.index] == 1 and segments
        if alone and _entry(segments[0], group).by_token:  # so that every thread has some
            units = form.finer(routing, segments[0], min(BLOCK, -(-segments[0].count // self.threads)))
        self.table = self._table(form, group, units)

    def _done(self, segment: Segment, group: LinearGroup) -> Sequence[Delta | Mirror | BlockPatch | Turned]:
        """What of a segment's the kernel runs."""
        entry = _entry(segment, group)
        turns = segment.placed.groups[group.index].turns if self.inputs and _turns(segment, entry) else ()
        return [*(entry.done if segment.sole else entry.done[entry.before :]), *turns]

    def _table(self, form: Native, group: LinearGroup, units: Units) -> Table:
        """The struct `added`."""
        at, count, stride, kept = units.of(group.index)
        room, outs = units.room[group.index], _widths(group.outs)
        scratch, rooms = form.room("shrunk", units.shrunk[group.index]), form.room("parts", self.most * room)
        self._alive = units, kept, scratch, rooms  # whose memory the table points into
        return _array([
            *(at, count, stride, ctypes.addressof(outs), len(outs), scratch.data_ptr()),
            *(rooms.data_ptr(), room, self.threads, units.overlapping[group.index]),
            *((0, 0, 0, 0) if self.inputs is None else self.inputs.table),
        ])  # fmt: skip

    def beside(self, routing: Routing) -> NativeBeside:
        """In the base's own call, where that is ours."""
        return NativeBeside(self)

    def base(self, base: Product | Separate, x: Tensor) -> Tensor:
        """The base's product of x, or of what members read instead."""
        panels = _panels(base)
        if panels is None or self.inputs is None or not self.inputs.own:
            return base(x)
        return panels(x, base.bias, Added(self.inputs.alone, self.threads, self.most))

    def note_streams(self) -> None:
        """Where the step's residual stream is, for networks that read it."""
        self._noted = [stream(entry.stream).float().contiguous() for entry in self._streams]
        for entry, noted in zip(self._streams, self._noted, strict=True):
            entry.list[STREAM] = noted.data_ptr()

    def add(self, y: Tensor, x: Tensor) -> None:
        """y [T, outs] += what the segments add, all contiguous float32."""
        self.note_streams()
        self._call(y.data_ptr(), self._width, x.data_ptr(), self._inp, self.table)


class Inputs:
    """What members read instead of x: scaled or turned at the tokens of who does that, and is there alone."""

    def __init__(self, form: Native, group: LinearGroup, tokens: int, segments: Sequence[Segment]) -> None:
        each = [(s, _turns(s, _entry(s, group))) for s in segments]
        members = sorted({member for _, turns in each for member in turns})
        self.own = len(members)
        self.turns = torch.zeros(self.own, tokens, 3, dtype=torch.int64)
        for segment, turns in each:
            for member, turn in turns.items():
                self.turns[members.index(member), segment.tokens] = torch.tensor(turn)
        self.room = form.room("inputs", self.own * tokens * group.inp)
        self.order = _array(members.index(m) if m in members else -1 for m in range(len(group.outs)))
        self.table = (self.turns.data_ptr(), self.room.data_ptr(), ctypes.addressof(self.order), self.own)
        outs = ctypes.addressof(_widths(group.outs)), len(group.outs)
        self.alone = _array([0, 0, 0, *outs, *5 * (0,), *self.table])


@dataclass(frozen=True, slots=True, eq=False)
class NativeBeside:
    """The base's product and what adapters add to it, in one call."""

    small: NativeSmall
    whole: ClassVar[bool] = True

    def run(self, base: Product | Separate, x: Tensor, outs: int) -> tuple[Tensor, None]:
        """x [T, in] → (y [T, outs], nothing that is left for the reader to add)."""
        panels = _panels(base)
        if panels is not None:
            self.small.note_streams()
            return panels(x, base.bias, Added(self.small.table, self.small.threads, self.small.most)), None
        y = base(x)
        self.small.add(y, x)
        return y, None


def _turns(segment: Segment, entry: Entry) -> Mapping[int, tuple[int, int, int]]:
    """By member, what becomes of a segment's input: nothing where it is not alone, or too long for its blocks."""
    few = segment.count <= BLOCK or all(size <= LARGEST_TURN for *_, size in entry.turns.values())
    return entry.turns if segment.alone and few else {}


def _entry(segment: Segment, group: LinearGroup) -> Entry:
    return entry_of(segment.placed, group.index)


def entry_of(placed: Placed, index: int) -> Entry:
    """At the group of this index. Raises RuntimeError where the adapter was laid out by another form."""
    entry = placed.groups[index].entry
    if not isinstance(entry, Entry):
        raise RuntimeError(f"{placed.adapter.spec.name} was not prepared for the kernels in C")
    return entry


@functools.cache
def plan_of(n: int) -> tuple[Table, Tensor] | None:
    """A plan of `deltas.c` for n complex numbers, and what it points to; None where a prime factor is too large."""
    factors: list[int] = []
    left = n
    while left % 4 == 0:
        factors, left = [*factors, 4], left // 4
    for prime in range(2, LARGEST):
        while left % prime == 0:
            factors, left = [*factors, prime], left // prime
    if left > 1:
        return None
    angles = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
    waves = torch.stack([angles.cos(), angles.sin()], 1).float()
    return _array([n, len(factors), waves.data_ptr(), *factors]), waves


def _panels(base: Product | Separate) -> Panels | None:
    return base.packed if isinstance(base.packed, Panels) else None


@functools.cache
def _widths(outs: tuple[int, ...]) -> Table:
    return _array(outs)


def _array(values: Iterable[int]) -> Table:
    listed = list(values)
    return (ctypes.c_int64 * len(listed))(*listed)
