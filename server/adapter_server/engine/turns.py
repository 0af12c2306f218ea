"""Whose turn it is: the waiting rows, fair among adapters.

Each adapter has an account of the tokens that it was served (Sheng et al., "Fairness in Serving Large Language Models",
2024: the virtual token counter). The next place goes to a row of the adapter with the smallest account, in order of
arrival among its own. One that comes back from idleness begins level with the others: idleness saves nothing up.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapter_server.engine.scheduler import Row

PROMPT_TOKEN, NEW_TOKEN = 1.0, 2.0  # what a token costs on the account, as in the paper
Account = tuple[bool, tuple[tuple[str, str], ...]]  # asks for snapshots, and which versions; none: the base


def account(row: Row) -> Account:
    return row.request.mode == "merged", tuple(m.spec.key for m in row.request.members)


class Turns:
    """The waiting rows by account. Iterating gives them account by account, each in order of arrival."""

    def __init__(self) -> None:
        self._rows: dict[Account, deque[Row]] = {}
        self._served: dict[Account, float] = {}
        self._running: dict[Account, int] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        for rows in list(self._rows.values()):
            yield from list(rows)

    def append(self, row: Row) -> None:
        self._queue(account(row)).append(row)
        self._count += 1

    def appendleft(self, row: Row) -> None:
        """Back to the head of its queue: it had its turn already."""
        self._queue(account(row)).appendleft(row)
        self._count += 1

    def remove(self, row: Row) -> None:
        key = account(row)
        self._rows[key].remove(row)
        self._count -= 1
        if not self._rows[key]:
            del self._rows[key]
            self._close(key)

    def _queue(self, key: Account) -> deque[Row]:
        if key not in self._served:
            self._served[key] = min(self._served.values(), default=0.0)
        return self._rows.setdefault(key, deque())

    def began(self, row: Row) -> None:
        """A waiting row has its place: its prompt is charged."""
        key = account(row)
        self._running[key] = self._running.get(key, 0) + 1
        self.charge(row, PROMPT_TOKEN * row.pending)
        self.remove(row)

    def charge(self, row: Row, tokens: float = NEW_TOKEN) -> None:
        """A running row was served."""
        self._served[account(row)] += tokens

    def ended(self, row: Row) -> None:
        """A running row gave its place back."""
        key = account(row)
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]
            self._close(key)

    def _close(self, key: Account) -> None:
        """An adapter without rows has no account."""
        if key not in self._rows and key not in self._running:
            del self._served[key]

    def next(self) -> Iterator[Row]:
        """Rows in the order of their turns. One that is still there when the next is asked for was not admitted: then
        its adapter's later rows wait with it.
        """
        heap = [(self._served[key], i, key) for i, key in enumerate(self._rows)]
        heapq.heapify(heap)
        while heap:
            _, i, key = heapq.heappop(heap)
            row = self._rows[key][0]
            yield row
            if (rest := self._rows.get(key)) and rest[0] is not row:
                heapq.heappush(heap, (self._served[key], i, key))
