"""The adapters in memory: loaded beside the engine, evicted by bytes, least recently used first.

    disk ── read, guard ──> host (compiled: `Adapter`) ── place ──> device (`Placed`) ──> rows

A load or a fold runs on a loader's thread and ends in a queue that the engine looks at between steps; everything else
here is called by the engine alone. A failed load fails the requests that waited for it and nothing else.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapter_server.core import Event, Folded, Loaded, Resident, Spec
from adapter_server.engine.model import Model
from adapter_server.engine.site import Placed
from adapter_server.engine.snapshot import check_foldable, fold
from adapter_server.errors import AdapterServerError, AdapterUnavailable
from adapter_server.families import find, slow
from adapter_server.families.base import Adapter, Base
from adapter_server.registry import guard
from adapter_server.registry.store import Blob, Store

Key = tuple[str, str, bool]  # name, version, merged

_DTYPES = {
    **{"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
}


@dataclass(slots=True, eq=False)
class Holding:
    """One adapter version, or its snapshot, on its way to the device or there."""

    spec: Spec
    merged: bool
    since: float
    adapter: Adapter | None = None
    placed: Placed | None = None
    bytes: int = 0
    live: bool = False  # on the device, and counted
    gone: bool = False  # out of the books: who wants it loads it again
    error: AdapterServerError | None = None
    pinned: bool = False
    rows: int = 0  # running
    used: float = 0.0
    waiters: list[Future[None]] = field(default_factory=list)

    @property
    def key(self) -> Key:
        return self.spec.name, self.spec.version, self.merged


class Pool:
    """Adapters and snapshots by (name, version, merged), within a budget of device bytes."""

    def __init__(self, model: Model, store: Store, budget: int, wake: Callable[[], None] = lambda: None) -> None:
        self.model, self.store, self.budget, self.wake = model, store, budget, wake
        self.holdings: dict[Key, Holding] = {}
        self.on_evict: Callable[[Placed], None] = lambda placed: None
        self._leaving: list[Holding] = []  # unloaded while rows of theirs still run
        self._ended: queue.SimpleQueue[Holding] = queue.SimpleQueue()
        self._placed: list[Holding] = []  # loaded, and waiting for room
        self._quick = ThreadPoolExecutor(1, "adapter-loader")
        self._slow = ThreadPoolExecutor(1, "adapter-folder")

    def want(self, spec: Spec, merged: bool = False, waiter: Future[None] | None = None) -> Holding:
        """The holding of this version, whose load begins now if it had not."""
        holding = self.holdings.get((*spec.key, merged))
        if holding is None or holding.error is not None:
            holding = Holding(spec, merged, time.monotonic(), used=time.monotonic())
            if previous := self.holdings.get(holding.key):
                holding.pinned = previous.pinned
            self.holdings[holding.key] = holding
            lane = self._slow if merged or _is_slow(spec) else self._quick
            lane.submit(self._load, holding)
        if waiter is not None:
            self._notify(holding, waiter)
        return holding

    def _notify(self, holding: Holding, waiter: Future[None]) -> None:
        if holding.live:
            waiter.set_result(None)
        else:
            holding.waiters.append(waiter)

    def _load(self, holding: Holding) -> None:
        """On a loader's thread: disk to device layout, or the reason why not."""
        try:
            adapter = self._compiled(holding.spec)
            holding.adapter = fold(adapter, self.model.base) if holding.merged else adapter
            holding.placed = self.model.place(holding.adapter)
            holding.bytes = holding.placed.bytes
            if holding.merged:
                holding.adapter = None  # the placed weights are all that a snapshot is for
        except AdapterServerError as error:
            holding.error = error
        except Exception as error:  # whatever a file made the loader do, it ends here
            holding.error = AdapterUnavailable(f"loading {holding.spec.name!r} failed: {error!r}")
            holding.error.__cause__ = error
        self._ended.put(holding)
        self.wake()

    def _compiled(self, spec: Spec) -> Adapter:
        plain = self.holdings.get((*spec.key, False))
        if plain is not None and plain.adapter is not None:
            return plain.adapter
        return compile_adapter(spec, self.store, self.model.base)

    def poll(self) -> list[Event]:
        """Open what has been loaded to rows, as far as there is room. Called between steps."""
        ended = self._placed
        self._placed = []
        while not self._ended.empty():
            ended.append(self._ended.get())
        return [event for holding in ended if (event := self._settle(holding))]

    def _settle(self, holding: Holding) -> Event | None:
        """Ready, failed, or (None) still waiting for room."""
        if holding.gone:
            return None
        if holding.error is None and not self._make_room(holding):
            self._placed.append(holding)
            return None
        if holding.error is None and holding.placed is not None:
            self.model.install_sites(holding.placed)
            holding.live = True
        for waiter in holding.waiters:
            _resolve(waiter, holding.error)
        holding.waiters.clear()
        kind = Folded if holding.merged else Loaded
        error = None if holding.error is None else holding.error.message
        return kind(holding.spec.name, holding.spec.version, time.monotonic() - holding.since, error)

    def _make_room(self, holding: Holding) -> bool:
        """Evict what nobody uses until this fits. False: rows that run now must finish first."""
        if holding.bytes > self.budget:
            holding.error = AdapterUnavailable(
                f"{holding.spec.name!r} takes {holding.bytes:,} bytes on the device and the budget is {self.budget:,}: "
                "raise --adapter-bytes"
            )
            return True
        idle = sorted(
            (h for h in self.holdings.values() if h.live and not h.rows and not h.pinned), key=lambda h: h.used
        )
        for victim in idle:
            if self.used + holding.bytes <= self.budget:
                break
            self.evict(victim)
        if self.used + holding.bytes > self.budget and not any(h.rows for h in self.holdings.values() if not h.pinned):
            holding.error = AdapterUnavailable(f"no room for {holding.spec.name!r}: everything loaded is pinned")
        return holding.error is not None or self.used + holding.bytes <= self.budget

    def is_crowded_out(self, holding: Holding) -> bool:
        """Whether it is loaded and waits for room."""
        return holding in self._placed

    @property
    def used(self) -> int:
        """Bytes on the device."""
        return sum(h.bytes for h in (*self.holdings.values(), *self._leaving) if h.live)

    def recount(self, holding: Holding) -> None:
        """A soft prompt's keys and values came into being after the load: count them."""
        if holding.placed is not None:
            holding.bytes = holding.placed.bytes

    def evict(self, holding: Holding, waiter: Future[None] | None = None) -> None:
        """Out of the books now; off the device when its last row has ended, which resolves the waiter."""
        if self.holdings.get(holding.key) is holding:
            del self.holdings[holding.key]
        holding.gone = True
        if waiter is not None:
            holding.waiters.append(waiter)
        if holding.rows:
            self._leaving.append(holding)
        else:
            self._drop(holding)

    def _drop(self, holding: Holding) -> None:
        holding.live = False
        if holding.placed is not None:
            self.model.forget(holding.placed)
            self.on_evict(holding.placed)
        for waiter in holding.waiters:
            _resolve(waiter, None)
        holding.waiters.clear()

    def hold(self, holding: Holding) -> None:
        """A row begins to run on it."""
        holding.rows += 1

    def let_go(self, holding: Holding) -> None:
        """A row ended."""
        holding.rows -= 1
        holding.used = time.monotonic()
        if holding.gone and not holding.rows:
            self._leaving.remove(holding)
            self._drop(holding)

    def unload(self, spec: Spec, waiter: Future[None]) -> None:
        """Let go of an adapter and its snapshot; done when their last rows have ended."""
        self.unmerge(spec)
        if holding := self.holdings.get((*spec.key, False)):
            self.evict(holding, waiter)
        else:
            waiter.set_result(None)

    def unmerge(self, spec: Spec) -> None:
        if holding := self.holdings.get((*spec.key, True)):
            self.evict(holding)

    def pin(self, spec: Spec, pinned: bool) -> None:
        """Pinned adapters are never evicted to make room."""
        holding = self.want(spec) if pinned else self.holdings.get((*spec.key, False))
        if holding is not None:
            holding.pinned = pinned

    def check_mergeable(self, spec: Spec) -> None:
        """As much as is known before a load."""
        plain = self.holdings.get((*spec.key, False))
        if plain is not None and plain.adapter is not None:
            check_foldable(plain.adapter)

    def residents(self, waiting: dict[tuple[str, str], int]) -> tuple[Resident, ...]:
        """One entry per version; `waiting` counts the queued rows of each."""
        keys = dict.fromkeys(h.spec.key for h in self.holdings.values())
        return tuple(self._resident(key, waiting.get(key, 0)) for key in keys)

    def _resident(self, key: tuple[str, str], waiting: int) -> Resident:
        plain, snapshot = self.holdings.get((*key, False)), self.holdings.get((*key, True))
        shown = plain or snapshot
        assert shown is not None
        return Resident(
            name=key[0],
            version=key[1],
            state="failed" if shown.error else "ready" if shown.live else "loading",
            family=shown.spec.family,
            rank=plain.adapter.rank if plain and plain.adapter else None,
            bytes=plain.bytes if plain and plain.live else 0,
            snapshot_bytes=snapshot.bytes if snapshot and snapshot.live else 0,
            pinned=bool(plain and plain.pinned),
            foldable=plain.adapter.foldable if plain and plain.adapter else True,
            running=sum(h.rows for h in (plain, snapshot) if h),
            waiting=waiting,
            error=shown.error.message if shown.error else None,
        )

    def expected(self, config: Mapping[str, Any], names: frozenset[str]) -> guard.Expected:
        """The tensors that a family expects of this config over this base."""
        return find(str(config["peft_type"]).upper()).expected(config, self.model.base.shapes, names)

    def judge(self, spec: Spec, blob: Blob) -> None:
        """Refuses what a load would refuse. On any thread: nothing is kept."""
        compile_blob(spec, blob, self.model.base)

    def close(self) -> None:
        self._quick.shutdown(cancel_futures=True)
        self._slow.shutdown(cancel_futures=True)


def compile_adapter(spec: Spec, store: Store, base: Base) -> Adapter:
    """Read, check and compile one version. Raises AdapterRefused, VersionGone."""
    find(spec.family)  # an unknown kind is not read
    return compile_blob(spec, store.read(spec), base)


def compile_blob(spec: Spec, blob: Blob, base: Base) -> Adapter:
    """Check and compile what has been read. Raises AdapterRefused."""
    family = find(spec.family)
    guard.check_keys(blob.header, family.expected(spec.config, base.shapes, frozenset(blob.header)))
    return family.load(spec, tensors_of(blob), base)


def tensors_of(blob: Blob) -> dict[str, Tensor]:
    """The file's tensors as copies, float32 or int64; the bytes were checked when they were read."""
    tensors = {}
    for name, span in blob.header.items():
        dtype = _DTYPES[span.dtype]
        count = (span.end - span.begin) // dtype.itemsize
        flat = torch.frombuffer(blob.data, dtype=dtype, count=count, offset=span.begin) if count else torch.empty(0)
        wide = torch.float32 if dtype.is_floating_point else torch.int64
        tensors[name] = flat.reshape(span.shape).to(wide, copy=True)
    return tensors


def _resolve(waiter: Future[None], error: AdapterServerError | None) -> None:
    if error is None:
        waiter.set_result(None)
    else:
        waiter.set_exception(error)


def _is_slow(spec: Spec) -> bool:
    """An unknown kind is refused by its load, not here."""
    try:
        return slow(spec)
    except AdapterServerError:
        return False
