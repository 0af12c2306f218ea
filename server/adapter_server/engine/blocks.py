"""Prefix caching: blocks of keys and values, known by all that they were computed from.

    tokens   0 … 15 | 16 … 31 | 32 … 40
    keys     k₀     | k₁      | (not full)        k₀ = H(salt, tokens 0…15)   k₁ = H(k₀, tokens 16…31)

The salt names the adapters, their weights, the route and the task, so that a block is found by those alone who would
compute the same numbers. H is BLAKE2b: a client cannot make two texts collide.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from adapter_server.core import Mode, Request


@dataclass(slots=True)
class Chain:
    """The keys of one row's full blocks, from the block on in which its own tokens begin; grows with the tokens.

    Blocks before `acts`, the first token that an adapter touches (aLoRA), are the plain base's, whosever row it is.
    """

    salt: bytes
    block: int  # positions in a block
    offset: int  # positions before the first token, an adapter's
    acts: float = 0
    last: bytes = b""
    keys: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, request: Request, mode: Mode, block: int, offset: int, acts: float = 0, acting: Hashable = ()) -> Chain:
        """`acts`: inf where no adapter touches any token. `acting`: which adapters do, and from which token on."""
        return cls(_salt(request, mode, acting), block, offset, acts)

    @property
    def first(self) -> int:
        """The index of the first key's block."""
        return self.offset // self.block

    def upto(self, tokens: Sequence[int], count: int) -> list[bytes]:
        """The keys of the blocks that the first `count` of these tokens fill."""
        full = (self.offset + count) // self.block - self.first
        while len(self.keys) < full:
            start = (self.first + len(self.keys)) * self.block - self.offset
            stop = start + self.block
            salt = self.salt if stop > self.acts else b""
            some = array("q", tokens[max(0, start) : stop]).tobytes()
            self.last = blake2b(self.last + salt + some, digest_size=32).digest()
            self.keys.append(self.last)
        return self.keys[: max(0, full)]


def _salt(request: Request, mode: Mode, acting: Hashable) -> bytes:
    members = [(m.spec.name, m.spec.version, m.weight) for m in request.members]
    return blake2b(repr((members, mode, request.task_id, acting)).encode(), digest_size=32).digest()


class BlockCache:
    """Which cell of memory holds which block; least recently used first. An owner is what a block depends on."""

    def __init__(self) -> None:
        self._cells: OrderedDict[bytes, int] = OrderedDict()
        self._keys: dict[int, bytes] = {}
        self._owners: dict[bytes, tuple[Hashable, ...]] = {}
        self._owned: dict[Hashable, set[bytes]] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._cells

    @property
    def cells(self) -> Iterable[int]:
        return self._keys

    def holds(self, cell: int) -> bool:
        return cell in self._keys

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The cells of the leading blocks that are known."""
        found: list[int] = []
        for key in keys:
            if key not in self._cells:
                break
            self._cells.move_to_end(key)
            found.append(self._cells[key])
        return found

    def put(self, key: bytes, cell: int, owners: Sequence[Hashable]) -> None:
        self._cells[key], self._keys[cell], self._owners[key] = cell, key, tuple(owners)
        for owner in owners:
            self._owned.setdefault(owner, set()).add(key)

    def oldest(self, idle: Callable[[int], bool] = lambda cell: True) -> int | None:
        """Forget the block that has not been used for the longest time; its cell. None where all are in use."""
        key = next((key for key, cell in self._cells.items() if idle(cell)), None)
        return None if key is None else self._forget(key)

    def drop(self, owner: Hashable) -> list[int]:
        """Forget all that depends on this owner; the cells."""
        return [self._forget(key) for key in list(self._owned.get(owner, ()))]

    def _forget(self, key: bytes) -> int:
        for owner in self._owners.pop(key):
            self._owned[owner].discard(key)
            if not self._owned[owner]:
                del self._owned[owner]
        cell = self._cells.pop(key)
        del self._keys[cell]
        return cell
