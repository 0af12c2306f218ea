"""The units of a step on the CPU (`added.h`), of all groups at once: whose tokens are whose changes nearly every step,
what an adapter adds at a group never does.

    Record   of an adapter: its numbers in every group's table, made once
    Units    of a routing: the records of its segments side by side, with the tokens that they are for

so that a step with new rows costs a few copies, however many groups and adapters there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from adapter_server.engine.routing import Segment

if TYPE_CHECKING:
    from adapter_server.engine.added import Entry

BLOCK = 16  # tokens that one thread takes at a time
LANES = 16  # numbers in a vector of any processor, at most
PART = 12  # numbers of a part, in `added.h`
WORD = 8  # bytes of a number in a table
START, COUNT, WEIGHTS, OFFSET, MUL, ADD, LIST, PARTS, BEFORE, UNIT = *range(9), 12  # of a unit, in `added.h`
ACTS, NUMBERS, LANED, ROOM, SHRUNK, FACTS = range(6)

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """What the tables say of one adapter.

    fields [groups, UNIT + 2 · members]: a unit but for its tokens; facts [groups, FACTS]: what is to be known of it.
    `lean`: of segments in one piece, alone on their tokens, these say all that it does.
    """

    fields: Numbers
    facts: Numbers
    lean: bool

    @classmethod
    def of(cls, entries: Mapping[int, Entry], shape: tuple[int, int]) -> Record:
        """`shape`: that of the fields, for every group and the most members that one has."""
        fields, facts = np.zeros(shape, np.int64), np.zeros((shape[0], FACTS), np.int64)
        for index, entry in entries.items():
            fields[index, MUL : MUL + len(entry.fields)] = entry.fields
            facts[index] = entry.facts
        return cls(fields, facts, all(entry.lean for entry in entries.values()))


class Units:
    """Segments that stand in one piece, one or more, in units of up to `most` tokens: `table` [units, groups, width].

    By group: `acting`, how many segments act there; `work`, their multiplications; `shrunk`, the numbers that they
    shrink to; `room`, those that a thread works in; `overlapping`, whether tokens have several units.
    """

    def __init__(self, segments: Sequence[Segment], records: Sequence[Record], most: int) -> None:
        self._segments = segments  # whose adapters' and weights' addresses are named
        facts = np.stack([record.facts for record in records])
        counts = np.array([segment.count for segment in segments])
        sole = np.array([segment.sole for segment in segments])
        per = -(-counts // most)
        self._of = np.repeat(np.arange(len(segments)), per)
        before = most * (np.arange(len(self._of)) - (np.cumsum(per) - per)[self._of])
        self.table = np.stack([records[i].fields for i in self._of.tolist()])
        self._tokens(segments, before, np.minimum(most, counts[self._of] - before))
        self._share(~sole[self._of])
        self.shrunk = self._offsets(facts[self._of][:, :, SHRUNK])
        self._acts = facts[:, :, ACTS] > 0
        self.acting: list[int] = self._acts.sum(0).tolist()
        laned = -(-counts // LANES) @ facts[:, :, LANED]
        self.work: list[int] = (counts @ facts[:, :, NUMBERS] + laned).tolist()
        self.room: list[int] = facts[:, :, ROOM].max(0).tolist()
        self.overlapping: list[bool] = (self._acts & ~sole[:, None]).any(0).tolist()
        self._address = self.table.ctypes.data

    def _tokens(self, segments: Sequence[Segment], before: Numbers, counts: Numbers) -> None:
        """Which tokens each unit is for, behind how many of its segment, and what scales them."""
        starts = np.array([s.tokens.start if isinstance(s.tokens, slice) else 0 for s in segments])[self._of]
        weights = np.array([0 if s.weights is None else s.weights.data_ptr() for s in segments])[self._of]
        self.table[:, :, START] = (starts + before)[:, None]
        self.table[:, :, COUNT] = counts[:, None]
        self.table[:, :, WEIGHTS] = np.where(weights, weights + 4 * before, 0)[:, None]

    def _share(self, shared: npt.NDArray[np.bool_]) -> None:
        """Where tokens have several adapters, what reads y as the base gives it is left to others."""
        if not shared.any():
            return
        own = self.table[shared]
        own[:, :, LIST] += own[:, :, BEFORE] * (PART * WORD)
        own[:, :, PARTS] -= own[:, :, BEFORE]
        own[:, :, (MUL, ADD, BEFORE)] = 0
        self.table[shared] = own

    def _offsets(self, shrunk: Numbers) -> list[int]:
        """Where each unit's shrunk tokens begin, of `shrunk` numbers each; how many numbers there are by group."""
        each = self.table[:, :, COUNT] * shrunk
        ends = np.cumsum(each, 0)
        self.table[:, :, OFFSET] = ends - each
        found: list[int] = ends[-1].tolist()
        return found

    def of(self, group: int) -> tuple[int, int, int, Any]:
        """(address of a group's units, how many, how far apart, what keeps them alive): those of who acts there."""
        count, groups, width = self.table.shape
        if self.acting[group] == len(self._segments):
            return self._address + group * width * WORD, count, groups * width, self.table
        some = np.ascontiguousarray(self.table[self._acts[self._of, group], group])
        return some.ctypes.data, len(some), width, some
