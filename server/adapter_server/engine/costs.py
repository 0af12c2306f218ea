"""What a step costs, learnt from the steps there were: where a snapshot pays, and where it runs by itself.

    plain     no row has an adapter             alone     every row is of the same replaced weights
    unmerged  adapters, no replaced weights     beside    replaced weights next to other rows

A curve of seconds over rows is kept of each kind. Everything here is numbers: no clock, no tensor, no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["plain", "unmerged", "alone", "beside"]
SMOOTHING = 0.1  # a step's share in what is known
SETTLED = 4  # steps before a figure counts
OUTLIER = 2.0  # times what is known: a step that took longer waited for something else
NEAR = 2.0  # how far, as a ratio of rows, a curve is followed beyond what was seen
FORGET_S = 600.0  # after which a figure that no step renewed is of another day
WORTH = 0.03  # of a step's time: what a snapshot must save before one is made
HOPED = 0.1  # what it may save as long as nobody knows
IDLE = 0.03  # of the time: what a snapshot that nobody uses is charged


@dataclass(slots=True)
class Figure:
    """Steps of about so many rows, smoothed."""

    rows: float
    seconds: float
    seen: float
    count: int = 1

    def add(self, rows: int, seconds: float, now: float) -> None:
        part = max(SMOOTHING, 1 / (self.count + 1))
        seconds = min(seconds, OUTLIER * self.seconds) if self.count >= SETTLED else seconds
        self.rows += part * (rows - self.rows)
        self.seconds += part * (seconds - self.seconds)
        self.seen, self.count = now, self.count + 1


@dataclass(slots=True)
class Costs:
    """Seconds of a step by its kind and rows. Times `now` are of any clock that does not go back."""

    figures: dict[Kind, dict[int, Figure]] = field(default_factory=dict)

    def note(self, kind: Kind, rows: int, seconds: float, now: float) -> None:
        curve = self.figures.setdefault(kind, {})
        known = curve.get(bucket(rows))
        if known is None or now - known.seen > FORGET_S:
            curve[bucket(rows)] = Figure(rows, seconds, now)
        else:
            known.add(rows, seconds, now)

    def step(self, kind: Kind, rows: int, now: float) -> float | None:
        """Seconds of such a step: between two that are known, along the line; none where none is near. 0 for no rows.

        Replaced weights alone cost what the base alone does, until it is known better.
        """
        if not rows:
            return 0.0
        found = self._along(kind, rows, now)
        return self._along("plain", rows, now) if found is None and kind == "alone" else found

    def _along(self, kind: Kind, rows: int, now: float) -> float | None:
        curve = self.figures.get(kind, {}).values()
        known = [f for f in curve if f.count >= SETTLED and now - f.seen <= FORGET_S]
        low = max((f for f in known if f.rows <= rows), key=lambda f: f.rows, default=None)
        high = min((f for f in known if f.rows >= rows), key=lambda f: f.rows, default=None)
        if low is None or high is None or low is high:
            near = low or high
            return near.seconds if near and max(near.rows / rows, rows / near.rows) <= NEAR else None
        part = (rows - low.rows) / (high.rows - low.rows)
        return low.seconds + part * (high.seconds - low.seconds)

    def apart(self, own: Sequence[int], rest: int, now: float) -> float | None:
        """Seconds of a token for everybody where each snapshot's rows, and the rest, have steps of their own."""
        return _sum([self._rest(rest, now), *(self.step("alone", rows, now) for rows in own)])

    def together(self, own: Sequence[int], rest: int, now: float) -> float | None:
        """The same in one step."""
        lone = len(own) == 1 and not rest
        return self.step("alone" if lone else "beside", sum(own) + rest, now)

    def _rest(self, rows: int, now: float) -> float | None:
        unmerged = self.step("unmerged", rows, now)
        return self.step("plain", rows, now) if unmerged is None else unmerged

    def splits(self, own: Sequence[int], rest: int, now: float) -> bool | None:
        """Whether rows of snapshots, so many of each, run apart from the rest; None: to be tried to be known."""
        if (together := self.together(own, rest, now)) is None:
            return False
        apart = self.apart(own, rest, now)
        return None if apart is None else apart < together

    def gain(self, own: int, rest: int, now: float) -> float | None:
        """What a snapshot for `own` rows beside `rest` others saves, as a share of the time; None: not known."""
        unmerged = self.step("unmerged", own + rest, now)
        ways = [t for t in (self.apart([own], rest, now), self.together([own], rest, now)) if t is not None]
        return None if not unmerged or not ways else 1 - min(ways) / unmerged


@dataclass(slots=True)
class Ledger:
    """Whether a snapshot of one adapter is worth its price: rent until the rent adds up to it, and no longer.

    While there is none, what it would have saved is added up, and at the price it is made. While there is one, what it
    saves and loses is added up, and at nothing left it goes. So no moment's flood makes one, and no lull takes it.
    """

    price: float  # seconds
    credit: float = 0.0
    bought: bool = False

    def add(self, gain: float | None, own: int, rest: int, seconds: float) -> None:
        """Steps of so many seconds in all, `gain` of which a snapshot saves; `own` rows are the adapter's."""
        if not own:
            gain = -IDLE
        elif gain is None:
            gain = 0.0 if rest else HOPED
        elif gain < WORTH and not self.bought:
            gain = min(gain, -WORTH)
        self.credit = min(self.price, max(0.0, self.credit + gain * seconds))

    @property
    def wanted(self) -> bool:
        return self.credit > 0 if self.bought else self.credit >= self.price


def bucket(rows: int) -> int:
    """Rows to three binary digits: 1 … 8, 10, 12, 14, 16, 20 …"""
    shift = max(0, rows.bit_length() - 3)
    return rows >> shift << shift


def _sum(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None
