"""The host tier: compiled adapters in main memory, so that a reload needs neither disk nor compiler.

What leaves the device stays here while the budget of bytes lasts; then the least recently used goes, and is on disk
only. Changed by the engine's thread alone; loaders look things up.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from adapter_server.core import Resident
from adapter_server.families.base import Adapter

Key = tuple[str, str]  # name, version


class Kept(NamedTuple):
    adapter: Adapter
    bytes: int
    resident: Resident  # made once: thousands of them are shown many times a second


class Host:
    """Compiled adapters by (name, version), at most `budget` bytes of them."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.pinned: set[Key] = set()
        self.used = 0  # bytes kept
        self._kept: OrderedDict[Key, Kept] = OrderedDict()  # least recently used first

    def get(self, key: Key) -> Adapter | None:
        kept = self._kept.get(key)
        return None if kept is None else kept.adapter

    def put(self, adapter: Adapter) -> None:
        """Keep an adapter if there is room for it, once others that are less recently used have gone."""
        key, size = adapter.spec.key, held_bytes(adapter)
        self._remove(key)
        if sum(map(self.bytes_of, self.pinned)) + size > self.budget:
            return
        for other in [k for k in self._kept if k not in self.pinned] if self.used + size > self.budget else ():
            if self.used + size <= self.budget:
                break
            self._remove(other)
        self.used += size
        self._kept[key] = Kept(adapter, size, _asleep(adapter, size))

    def touch(self, key: Key) -> None:
        """It was used just now."""
        if key in self._kept:
            self._kept.move_to_end(key)

    def drop(self, key: Key) -> None:
        self.pinned.discard(key)
        self._remove(key)

    def _remove(self, key: Key) -> None:
        if kept := self._kept.pop(key, None):
            self.used -= kept.bytes

    def held(self) -> list[Key]:
        return list(self._kept)

    def residents(self) -> list[tuple[Key, Resident]]:
        """All of them, as they are while they are nowhere else."""
        return [(key, kept.resident) for key, kept in self._kept.items()]

    def bytes_of(self, key: Key) -> int:
        """0 where it is not kept."""
        return self._kept[key].bytes if key in self._kept else 0


def _asleep(adapter: Adapter, size: int) -> Resident:
    spec = adapter.spec
    return Resident(
        spec.name, spec.version, "registered", spec.family, adapter.rank, host_bytes=size, foldable=adapter.foldable
    )


def held_bytes(adapter: Adapter) -> int:
    """Bytes of the memory behind its tensors; what several share counts once."""
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in adapter.tensors())}
    return sum(storages.values())
