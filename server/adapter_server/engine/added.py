"""What a step's adapters add at a group of Linears on the CPU, by `lowrank.c` and `deltas.c`: one call for all of it.

The tables that those read (`added.h`) name the adapters' own tensors, of which nothing is padded, copied or kept. An
adapter's part of them is made once, an `Entry`; a routing's once, a `NativeSmall`.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from adapter_server.engine.lowrank import Adder, PackedRow, by_adapter
from adapter_server.engine.modules import stream
from adapter_server.engine.native import MOST_ROWS, SERIAL, Added, Panels, Table
from adapter_server.engine.operands import ACTS
from adapter_server.engine.placed import check_index
from adapter_server.engine.routing import Routing, Segment
from adapter_server.families.base import BlockPatch, Network, Patch, as_low_rank, network_of, with_whole_factors
from adapter_server.families.deltas import SIDE, Circulant, Delta, Kronecker, Mirror, Rows, Scaled, Sparse, Spectral

if TYPE_CHECKING:
    from adapter_server.engine.placed import GroupPatch, Placed, Product, Separate, Turned
    from adapter_server.engine.site import LinearGroup

BLOCK = 16  # tokens that one thread takes at a time
LANES = 16  # numbers in a vector of any processor, at most
PART = 12  # numbers of a part, in `added.h`
SCALED, SPARSE, SPECTRAL, KRONECKER, CIRCULANT, ROWS, MIRROR, NETWORK = range(8)
STREAM = 9  # where a network's part names the residual stream
COUNT = 1  # where a unit says how many tokens it has
READS = ("y", "y + r", "r")
_NOTHING = torch.empty(0)
WORTH = 4  # times its multiplications: a Kronecker product's are of a whole vector of tokens, and of its own numbers
LARGEST_TURN = 256  # block of a rotation that is read again for each of many tokens
LARGEST = 64  # prime factor of a length that is worth transforming here


class Native:
    """`LowRank` by the kernel. Groups run one after another, and so share the memory that they work in."""

    def __init__(self, kernel: ctypes.CDLL) -> None:
        self.kernel = kernel
        self._rooms: dict[str, Tensor] = {}

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
        return replace(patch, entry=Entry(patch))

    def plan(
        self, group: LinearGroup, routing: Routing, touching: Sequence[Segment]
    ) -> tuple[list[Adder], list[Segment]]:
        small = [s for s in touching if isinstance(s.tokens, slice) and _entry(s, group).acts]
        large = [s for s in touching if not isinstance(s.tokens, slice)]
        return ([NativeSmall(self, group, routing, small)] if small else []), large

    def forget(self, placed: Placed) -> None:
        """Nothing is kept."""


class Entry:
    """What the tables say of one adapter at one group."""

    def __init__(self, patch: GroupPatch) -> None:
        self.kept: list[object] = []  # whose addresses are named
        pairs = [(0, 0) if pair is None else (self._at(pair[1]), pair[0].shape[0]) for pair in patch.pairs]
        A = (0, 0) if patch.A is None else (self._at(patch.A), patch.A.shape[0])
        self.low_rank = (*A, *itertools.chain.from_iterable(pairs))
        self.vectors = self._at(patch.mul), self._at(patch.add)
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

    @property
    def acts(self) -> bool:
        """Whether there is anything for the kernel to do."""
        return any((self.low_rank[0], *self.vectors, self.parts, self.turns))

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

    def __init__(self, form: Native, group: LinearGroup, routing: Routing, segments: Sequence[Segment]) -> None:
        self.form, self.narrow = form, group.base_dtype == group.dtype
        self.entries = [_entry(s, group) for s in segments]
        self.vectors = frozenset(s.placed for s in segments if s.sole)
        self.inputs = Inputs(form, group, routing.tokens, segments) if _panels(group.base) is not None else None
        self.scaled = frozenset(s.placed for s in segments if self.inputs is not None and s.alone)
        self.done = frozenset(map(id, self._done(segments, group.index)))
        self._call, self._width, self._inp = form.kernel.adapters_add, sum(group.outs), group.inp
        self.most = torch.get_num_threads()  # that there is room for
        self.threads = 1 if self._work(segments) < SERIAL else self.most
        self.table = self._table(group.outs, segments)

    def _done(self, segments: Sequence[Segment], index: int) -> Iterator[Any]:
        for segment, entry in zip(segments, self.entries, strict=True):
            yield from entry.done if segment.sole else entry.done[entry.before :]
            if self.inputs is not None and _turns(segment, entry):
                yield from segment.placed.groups[index].turns

    def _work(self, segments: Sequence[Segment]) -> int:
        each = zip(segments, self.entries, strict=True)
        return sum(s.count * entry.numbers + -(-s.count // LANES) * entry.lanes for s, entry in each)

    def _most(self, segment: Segment) -> int:
        """Tokens of a unit: fewer of one adapter whose parts are worth it, so that every thread has some."""
        alone = len(self.entries) == 1 and self.entries[0].by_token
        return min(BLOCK, -(-segment.count // self.threads)) if alone else BLOCK

    def _table(self, outs: Sequence[int], segments: Sequence[Segment]) -> Table:
        """The struct `added`."""
        firsts = itertools.accumulate((len(entry.parts) for entry in self.entries), initial=0)
        each = zip(segments, self.entries, firsts, strict=False)
        made = [(u, e.shrunk) for s, e, first in each for u in _units(s, e, first, self._most(s))]
        units, ends = [unit for unit, _ in made], list(itertools.accumulate(unit[COUNT] * n for unit, n in made))
        room = max(max(entry.room, BLOCK * sum(outs) if entry.before else 0) for entry in self.entries)
        scratch = self.form.room("shrunk", ends[-1])
        rooms = self.form.room("parts", self.most * room)
        parts = [part for entry in self.entries for part in entry.parts]
        tables = (itertools.chain.from_iterable(units), outs, [0, *ends[:-1]], itertools.chain.from_iterable(parts))
        arrays = [_array(table) for table in tables]
        self._parts, paths = arrays[-1], [entry.stream for entry in self.entries for _ in entry.parts]
        self._streams = [(i * PART + STREAM, path) for i, path in enumerate(paths) if path]
        at_units, at_outs, offsets, at_parts = (ctypes.addressof(array) for array in arrays)
        self._alive = segments, scratch, rooms, arrays  # the table points into their memory
        overlapping = not all(segment.sole for segment in segments)
        return _array([
            *(at_units, len(units), at_outs, len(outs), scratch.data_ptr(), offsets),
            *(at_parts, rooms.data_ptr(), room, self.threads, overlapping),
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
        self._noted = [stream(path).float().contiguous() for _, path in self._streams]
        for (place, _), noted in zip(self._streams, self._noted, strict=True):
            self._parts[place] = noted.data_ptr()

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
        self.outs = _array(group.outs)
        self.table = (self.turns.data_ptr(), self.room.data_ptr(), ctypes.addressof(self.order), self.own)
        self.alone = _array([0, 0, ctypes.addressof(self.outs), len(group.outs), *7 * (0,), *self.table])


@dataclass(frozen=True, slots=True, eq=False)
class NativeBeside:
    """The base's product and what adapters add to it, in one call."""

    small: NativeSmall
    whole: ClassVar[bool] = True

    def run(self, base: Product | Separate, x: Tensor, outs: int) -> tuple[Tensor, None]:
        """x [T, in] → (y [T, outs], nothing that is left for the reader to add)."""
        panels, inputs = _panels(base), self.small.inputs
        if panels is not None and (len(x) <= MOST_ROWS or (inputs is not None and inputs.own)):
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
    """Raises RuntimeError where the adapter was laid out by another form."""
    entry = segment.placed.groups[group.index].entry
    if not isinstance(entry, Entry):
        raise RuntimeError(f"{segment.placed.adapter.spec.name} was not prepared for the kernels in C")
    return entry


def _units(segment: Segment, entry: Entry, first: int, most: int) -> Iterator[tuple[int, ...]]:
    """A segment's rows in the kernel's table, of at most so many tokens; its parts begin at `first`."""
    start = segment.tokens.start if isinstance(segment.tokens, slice) else 0
    weights = 0 if segment.weights is None else segment.weights.data_ptr()
    parts = (*entry.vectors, first, len(entry.parts), entry.before)
    if not segment.sole:
        parts = (0, 0, first + entry.before, len(entry.parts) - entry.before, 0)
    for i in range(0, segment.count, most):
        count = min(most, segment.count - i)
        yield start + i, count, weights and weights + 4 * i, *parts, *entry.low_rank


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


def _array(values: Iterable[int]) -> Table:
    listed = list(values)
    return (ctypes.c_int64 * len(listed))(*listed)
