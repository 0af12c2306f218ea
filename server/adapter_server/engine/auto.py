"""`mode: auto`: which rows run on a snapshot, when one is made and let go of, and which rows share a step.

    steps ── seconds ──> Costs ──> Ledger ──> a snapshot of the adapter with the most rows, made in the background
                           │
                           ├──> a row that is admitted: merged or unmerged, once
                           └──> a step's rows: together, or each snapshot's in turn with the rest

At most one snapshot is there by this choice, where no other adapter in use has to go for it.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from adapter_server.core import Mode, Spec
from adapter_server.engine.costs import WORTH, Costs, Kind, Ledger
from adapter_server.engine.pool import Holding, Pool
from adapter_server.engine.scheduler import Row, Slice

if TYPE_CHECKING:
    from adapter_server.engine.placed import Placed

FOLDED_PER_S = 500e6  # bytes of a snapshot that a fold makes in a second, until one was seen
ROW_S = 2.0  # what a row takes, the same
EVERY = 8  # steps between two looks at the ledger
OUSTED = -1.0  # of the time: what is taken from the account of one when another has more rows
AGAIN_S = 30.0  # after a snapshot found no room
RECENT = 8  # sets of rows whose last step is remembered
TRIES = 64  # steps apart, to learn what they cost


class Auto:
    """Belongs to one engine and is called on its thread. `rows` are all of the engine's, waiting ones too."""

    def __init__(self, pool: Pool, rows: Mapping[str, Row], most: int, folds: bool) -> None:
        self.pool, self.rows, self.most, self.folds = pool, rows, most, folds  # most: rows that run at once
        self.costs = Costs()
        self.ledger: Ledger | None = None
        self.target: Spec | None = None  # whom the ledger is about
        self.holding: Holding | None = None  # its snapshot, once one was asked for
        self.decisions: Counter[Mode] = Counter()
        self._folded_per_s, self._row_s = FOLDED_PER_S, ROW_S
        self._not_before: dict[tuple[str, str], float] = {}  # versions that do not fold, or found no room
        self._recent: deque[tuple[str, ...]] = deque(maxlen=RECENT)
        self._running: list[Row] = []  # in all groups, when the last step was planned
        self._turns: dict[Placed | None, int] = {}
        self._tries = TRIES
        self._steps, self._unbooked = 0, 0.0

    # A row

    def merges(self, row: Row, now: float) -> bool:
        """Whether a row of mode auto that is about to start takes the snapshot."""
        request = row.request
        if any(h.merged and h.live and h.gone for h in row.held):
            return True  # unloaded while the row waits: this is all that is left of its version
        if not request.may_merge:
            return False
        spec = request.members[0].spec
        holding = self.pool.holdings.get((*spec.key, True))
        if holding is None or not holding.live:
            return False
        rows = list(self.rows.values())
        gain = None if all(_is_for(row, spec) for row in rows) else self._gain(rows, spec, now)
        return gain is None or gain >= 0

    def _gain(self, rows: Sequence[Row], spec: Spec, now: float) -> float | None:
        """What a snapshot saves where these rows run, or as many of them as can. None: not known, or nothing to ask."""
        own = sum(_is_for(row, spec) for row in rows)
        part = min(1.0, self.most / len(rows))
        return self.costs.gain(max(1, round(own * part)), round((len(rows) - own) * part), now) if own else None

    def ended(self, seconds: float) -> None:
        """A row ran so long: about as long, rows of both routes run beside each other after a change."""
        self._row_s += 0.1 * (seconds - self._row_s)

    # A step

    def turn(self, slices: list[Slice]) -> list[Slice]:
        """Those of a step's slices that run now: all, or one group's, each in its turn."""
        groups: dict[Placed | None, list[Slice]] = {}
        self._running = [s.row for s in slices if s.row.decode is None]
        for s in slices:
            if s.row.decode is None:
                groups.setdefault(s.row.whole, []).append(s)
        if len(groups) < 2 or not self._splits(groups, time.monotonic()):
            self._turns.clear()
            return slices
        last = max(self._turns.values(), default=0)
        self._turns = {placed: self._turns.get(placed, last) for placed in groups}
        chosen = min(groups, key=lambda placed: self._turns[placed])
        self._turns[chosen] = last + 1
        return [s for s in slices if s.row.decode is not None or s.row.whole is chosen]

    def _splits(self, groups: Mapping[Placed | None, Sequence[Slice]], now: float) -> bool:
        rest = len(groups.get(None, ()))
        own = [len(mine) for placed, mine in groups.items() if placed is not None]
        known = self.costs.splits(own, rest, now)
        self._tries = self._tries - 1 if known is None else TRIES
        return self._tries > 0 if known is None else known

    def forget(self) -> None:
        """Something has left the device: hold no part of it."""
        self._turns.clear()
        self._running = []

    def ran(self, slices: Sequence[Slice], seconds: float) -> None:
        """A step's packed rows took so long. Only such steps are compared as give a token to the same rows again."""
        now = time.monotonic()
        rows = tuple(s.row.request.id for s in slices)
        if rows in self._recent and all(s.count == 1 and s.row.emitted > 1 for s in slices) and not self._folding:
            self.costs.note(_kind(slices), len(slices), seconds, now)
        elif rows not in self._recent:
            self._recent.append(rows)
        if not self.folds:
            return
        self._steps, self._unbooked = self._steps + 1, self._unbooked + seconds
        if self._steps % EVERY == 0:
            self._book(now)

    @property
    def _folding(self) -> bool:
        """A fold takes of the machine what steps would have."""
        return self.holding is not None and not self.holding.live

    # The ledger

    def _book(self, now: float) -> None:
        """What a snapshot of the adapter with the most rows would have saved or lost since the last time."""
        seconds, self._unbooked = self._unbooked, 0.0
        if self.holding is not None and self._settled(self.holding, now) is None:
            return
        running = self._running
        top = self._top(running, now)
        if self.holding is None and top is not None and (self.ledger is None or not self.ledger.credit):
            self.target, self.ledger = top, self.ledger if top == self.target else None
        if self.target is None or not running:
            return
        self.ledger = self.ledger or Ledger(self._size(self.target) / self._folded_per_s + self._row_s / 2)
        own = sum(_is_for(row, self.target) for row in running)
        gain = self._gain(running, self.target, now)
        if top not in (None, self.target) and (self.holding is None or self._pays(running, top, own, now)):
            gain = OUSTED
        elif self.holding is not None and not self._carries(running):
            own = 0
        self.ledger.add(gain, own, len(running) - own, seconds)
        if self.holding is None and self.ledger.wanted:
            self._fold(self.target, now)
        elif self.holding is not None and not self.ledger.wanted:
            self.pool.evict(self.holding)
            self._reset()

    def _carries(self, running: Sequence[Row]) -> bool:
        """Whether a row runs on the snapshot. None may lose by one that none runs on: it only takes room."""
        return any(self.holding is not None and row.whole is self.holding.placed for row in running)

    def _pays(self, running: Sequence[Row], spec: Spec, own: int, now: float) -> bool:
        """Whether another adapter, with more rows than the one that has a snapshot, would be known to gain by it."""
        theirs, gain = sum(_is_for(row, spec) for row in running), self._gain(running, spec, now)
        return theirs > own and (theirs == len(running) if gain is None else gain >= WORTH)

    def _settled(self, holding: Holding, now: float) -> Holding | None:
        """The snapshot once it is there. None while it is made, and where it came to nothing."""
        if holding.error is not None or holding.gone or not holding.auto:
            why_not = math.inf if holding.error is not None else now + AGAIN_S
            self._not_before[holding.spec.key] = why_not
            self._reset()
            return None
        if holding.live and self.ledger is not None and not self.ledger.bought:
            self.ledger.bought = True
            self._folded_per_s = holding.bytes / max(1e-3, now - holding.since)
        return holding if holding.live else None

    def _top(self, running: Sequence[Row], now: float) -> Spec | None:
        """The adapter with the most rows that leave their route to us and could have a snapshot."""
        asking = Counter(row.request.members[0].spec for row in running if _is_for(row) and self._can_fold(row, now))
        return next((spec for spec, _ in asking.most_common(1)), None)

    def _can_fold(self, row: Row, now: float) -> bool:
        """Whether weights of its own would be new to it, and can be made."""
        spec = row.request.members[0].spec
        if now < self._not_before.get(spec.key, 0.0) or (*spec.key, True) in self.pool.holdings:
            return False
        plain = self.pool.holdings.get((*spec.key, False))
        return plain is not None and plain.live and plain.foldable and row.whole is None

    def _size(self, spec: Spec) -> int:
        """About the bytes of its snapshot; 0 where it has just left the device."""
        plain = self.pool.holdings.get((*spec.key, False))
        return 0 if plain is None or plain.placed is None else self.pool.model.folded_bytes(plain.placed)

    def _fold(self, spec: Spec, now: float) -> None:
        size = self._size(spec)
        if size and self.pool.has_room(size):
            self.holding = self.pool.want(spec, merged=True, auto=True)
        else:
            self._not_before[spec.key] = now + AGAIN_S
            self._reset()

    def _reset(self) -> None:
        self.ledger = self.target = self.holding = None


def _is_for(row: Row, spec: Spec | None = None) -> bool:
    """Whether a snapshot (of this version) may carry the row."""
    request = row.request
    may = request.mode == "merged" or (request.mode == "auto" and request.may_merge)
    return may and (spec is None or request.members[0].spec.key == spec.key)


def _kind(slices: Sequence[Slice]) -> Kind:
    whole = {s.row.whole for s in slices}
    if len(whole) == 1 and None not in whole:
        return "alone"
    if whole != {None}:
        return "beside"
    return "unmerged" if any(s.row.uses for s in slices) else "plain"
