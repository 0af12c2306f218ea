"""The adapters in memory: loaded beside the engine, evicted by bytes, least recently used first.

    disk ── read, guard ──> host (compiled: `Adapter`, `host.py`) ── place ──> device (`Placed`) ──> rows

A load or a fold runs on a loader's thread and ends in a queue that the engine looks at between steps; everything else
here is called by the engine alone. A failed load fails the requests that waited for it and nothing else. What is
evicted from the device stays in the host tier as long as that has room; what is unloaded leaves both.
"""

from __future__ import annotations

import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adapter_server.core import TIERS, Event, Folded, Loaded, Resident, ResidentState, Spec, Tier
from adapter_server.engine.host import Host
from adapter_server.engine.model import Model
from adapter_server.engine.pauses import Pause, Pauses, at_once
from adapter_server.engine.placed import Placed
from adapter_server.engine.snapshot import check_foldable, fold
from adapter_server.errors import AdapterRefused, AdapterServerError, AdapterUnavailable
from adapter_server.families import find, serving, slow
from adapter_server.families.base import Adapter, Base, Graft
from adapter_server.families.fallback import experts
from adapter_server.families.parts import Fresh
from adapter_server.registry import guard
from adapter_server.registry.store import Blob, Held, Store

Key = tuple[str, str, bool]  # name, version, merged
SHARE = 0.25  # of the time, while rows run, goes into a fold, or into the check of what is published
NICE = 5  # of the thread that folds, beside 0 of the engine's: a quarter of a processor that both want
FEWEST = 8  # tensors of a file that are read as one
MOST_HELD = 64  # loads under way whose files are open: descriptors are few

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
    files: Held | None = None  # open until they are read, so that nobody can take them away
    adapter: Adapter | None = None  # compiled, on its way to the host tier
    placed: Placed | None = None
    bytes: int = 0
    rank: int | None = None
    foldable: bool = True
    live: bool = False  # on the device, and counted
    parked: bool = False  # loaded once, and waiting for room
    reserved: bool = False  # counted, and being laid out again
    gone: bool = False  # out of the books: who comes anew loads it again
    error: AdapterServerError | None = None
    pinned: bool = False
    auto: bool = False  # a snapshot that nobody asked for: the first to go
    rows: int = 0  # running
    wanted: int = 0  # rows that run or wait
    used: float = 0.0
    waiters: list[Future[None]] = field(default_factory=list)  # for the load
    leavers: list[Future[None]] = field(default_factory=list)  # for the end of it

    @property
    def key(self) -> Key:
        return self.spec.name, self.spec.version, self.merged


class Pool:
    """Adapters and snapshots by (name, version, merged), within a budget of device bytes."""

    def __init__(
        self,
        model: Model,
        store: Store,
        budget: int,
        host: Host,
        wake: Callable[[], None] = lambda: None,
        running: Callable[[], bool] = lambda: False,
    ) -> None:
        """`running`: whether rows run that folds give way to."""
        self.model, self.store, self.budget, self.host, self.wake = model, store, budget, host, wake
        self.pauses = model.pause = Pauses(running)
        self.holdings: dict[Key, Holding] = {}
        self.hits: dict[Tier, int] = dict.fromkeys(TIERS, 0)
        self.on_evict: Callable[[Placed], None] = lambda placed: None
        self._leaving: list[Holding] = []  # unloaded while rows still want them
        self._unloaded: set[tuple[str, str]] = set()  # to leave the host tier too, with the last such row
        self._ended: queue.SimpleQueue[Holding] = queue.SimpleQueue()
        self._parked: list[Holding] = []  # loaded once, and waiting for room
        self._quick = ThreadPoolExecutor(1, "adapter-loader")
        self._slow = ThreadPoolExecutor(1, "adapter-folder", _yield_to_steps)

    # What rows ask

    def claim(self, spec: Spec, merged: bool, auto: bool = False) -> Holding:
        """A row is queued that wants this version, until `let_go`. `auto`: it leaves its route to us."""
        self.hits[self._tier(spec, merged)] += 1
        holding = self.want(spec, merged, auto=auto)
        holding.wanted += 1
        return holding

    def renew(self, holding: Holding, merged: bool, auto: bool = False) -> Holding:
        """The same for a waiting row, or another holding of the version: this one made room, or its route changed."""
        kept = not holding.gone or holding in self._leaving
        if kept and holding.merged == merged:
            return holding
        again = self.want(holding.spec, merged, auto=auto)
        again.wanted += 1
        if kept:
            self.let_go(holding, ran=False)
        return again

    def hold(self, holding: Holding) -> None:
        """A row begins to run on it."""
        holding.rows += 1

    def let_go(self, holding: Holding, ran: bool) -> None:
        """A row ended."""
        holding.wanted -= 1
        holding.rows -= ran
        holding.used = time.monotonic()
        self.host.touch(holding.spec.key)
        if holding in self._leaving and not holding.wanted:
            self._leaving.remove(holding)
            self._drop(holding)
            self._clear_host(holding.spec.key)

    def _tier(self, spec: Spec, merged: bool) -> Tier:
        """Where a version is found now."""
        holding = self.holdings.get((*spec.key, merged))
        if holding is not None and holding.live:
            return "device"
        return "disk" if self.host.get(spec.key) is None else "host"

    # Loading

    def want(self, spec: Spec, merged: bool = False, waiter: Future[None] | None = None, auto: bool = False) -> Holding:
        """The holding of this version, whose load begins now if it had not. `auto`: nobody asked for it."""
        self._unloaded.discard(spec.key)
        holding = self.holdings.get((*spec.key, merged))
        if holding is None or holding.error is not None:
            holding = Holding(spec, merged, time.monotonic(), used=time.monotonic(), auto=auto and merged)
            if previous := self.holdings.get(holding.key):
                holding.pinned = previous.pinned
            self.holdings[holding.key] = holding
            self._begin(holding)
        holding.auto = holding.auto and auto
        if waiter is not None:
            self._notify(holding, waiter)
        return holding

    def _begin(self, holding: Holding) -> None:
        """Queue a load. The files are opened at once: whatever becomes of the folder, they can be read."""
        compiled = self.host.get(holding.spec.key) is not None
        if not compiled and sum(h.files is not None for h in self._all()) < MOST_HELD:
            holding.files = self.store.hold(holding.spec)
        lane = self._slow if holding.merged or (not compiled and _is_slow(holding.spec)) else self._quick
        lane.submit(self._load, holding)

    def _notify(self, holding: Holding, waiter: Future[None]) -> None:
        if holding.live:
            waiter.set_result(None)
        else:
            holding.waiters.append(waiter)

    def _load(self, holding: Holding) -> None:
        """On a loader's thread: disk or host to device layout, or the reason why not."""
        self.pauses.share = SHARE if holding.merged else 1.0  # rows wait for a load that could run beside the others
        try:
            with self.model.aside():
                adapter = self._compiled(holding)
                folded = adapter
                if holding.merged:
                    folded = fold(adapter, self.model.base, self.model.dtype, self.pauses)
                holding.placed = self.model.place(folded)
            holding.adapter, holding.bytes = adapter, holding.placed.bytes
            holding.rank, holding.foldable = adapter.rank, adapter.foldable
        except AdapterServerError as error:
            holding.error = error
        except Exception as error:  # whatever a file made the loader do, it ends here
            holding.error = AdapterUnavailable(f"loading {holding.spec.name!r} failed: {error!r}")
            holding.error.__cause__ = error
        finally:
            _close(holding)
        self._ended.put(holding)
        self.wake()

    def _compiled(self, holding: Holding) -> Adapter:
        kept = self.host.get(holding.spec.key)
        return kept or compile_adapter(holding.spec, self.store, self.model.base, holding.files, self.pauses)

    def poll(self) -> list[Event]:
        """Open what has been loaded to rows, as far as there is room. Called between steps."""
        events: list[Event | None] = []
        while not self._ended.empty():
            events.append(self._settle(self._ended.get()))
        events += self._unparked()
        return [event for event in events if event]

    def _unparked(self) -> list[Event | None]:
        """Those that found no room try anew, in order; where one fails, others as large are not tried."""
        waiting, self._parked = [h for h in self._parked if not self._is_over(h)], []
        events: list[Event | None] = []
        short: float = math.inf
        for holding in waiting:
            if holding.bytes < short and self._make_room(holding):
                holding.parked = False
                events.append(self._again(holding))
            else:
                short = min(short, holding.bytes)
                self._parked.append(holding)
        return events

    def _settle(self, holding: Holding) -> Event | None:
        """Ready, failed, or (None) still waiting for room."""
        reserved, holding.reserved = holding.reserved, False
        if self._is_over(holding):
            return None
        if holding.adapter is not None:
            self.host.put(holding.adapter)
            holding.adapter = None
        if holding.error is None and not reserved and not self._make_room(holding):
            if holding.auto:
                self._strike(holding)
                return None
            holding.placed, holding.parked = None, True  # the device has no bytes for it now, nor while it waits
            self._parked.append(holding)
            return None
        if holding.error is None and holding.placed is not None:
            self.model.install_sites(holding.placed)
            holding.live = True
        return self._told(holding)

    def _again(self, holding: Holding) -> Event | None:
        """There is room for a holding that was parked: its bytes are taken, and it is laid out again."""
        if holding.error is not None:
            return self._told(holding)
        holding.reserved = True
        self._begin(holding)
        return None

    def _is_over(self, holding: Holding) -> bool:
        """Whether nobody waits for this load any more."""
        return holding.gone and holding not in self._leaving

    def _told(self, holding: Holding) -> Event:
        _resolve(holding.waiters, holding.error)
        name, version = holding.spec.key
        seconds = time.monotonic() - holding.since
        error = None if holding.error is None else holding.error.message
        if holding.merged:
            return Folded(name, version, seconds, error)
        return Loaded(name, version, seconds, error, self.store.warning(holding.spec))

    def _make_room(self, holding: Holding) -> bool:
        """Evict what nobody uses until this fits. False: rows that run now must finish first."""
        if holding.bytes > self.budget:
            holding.error = AdapterUnavailable(
                f"{holding.spec.name!r} takes {holding.bytes:,} bytes on the device and the budget is {self.budget:,}: "
                "raise --adapter-bytes"
            )
            return True
        idle = [h for h in self.holdings.values() if h.live and not h.rows and not h.pinned]
        idle = [h for h in idle if not h.wanted or not holding.auto]
        for victim in sorted(idle, key=lambda h: (not h.auto, h.wanted > 0, h.used)):
            if self.used + holding.bytes <= self.budget:
                break
            self._strike(victim)
            self._drop(victim)
        if self.used + holding.bytes > self.budget and not self._is_room_coming() and not holding.auto:
            holding.error = AdapterUnavailable(f"no room for {holding.spec.name!r}: everything loaded is pinned")
        return holding.error is not None or self.used + holding.bytes <= self.budget

    def has_room(self, size: int) -> bool:
        """Whether so many bytes fit beside what rows want and what is pinned."""
        kept = sum(h.bytes for h in self._all() if (h.live or h.reserved) and (h.wanted or h.pinned or h.reserved))
        return kept + size <= self.budget

    def _is_room_coming(self) -> bool:
        return bool(self._leaving) or any((h.rows or h.reserved) and not h.pinned for h in self.holdings.values())

    def is_crowded_out(self, holding: Holding) -> bool:
        """Whether it was loaded and waits for room."""
        return holding.reserved or holding.parked

    @property
    def used(self) -> int:
        """Bytes on the device."""
        return sum(h.bytes for h in self._all() if h.live or h.reserved)

    def _all(self) -> list[Holding]:
        return [*self.holdings.values(), *self._leaving]

    def recount(self, placed: Placed) -> None:
        """A soft prompt's keys and values, or a task's mix of skills, came into being after the load: count them."""
        for holding in (*self.holdings.values(), *self._leaving):
            if holding.placed is placed:
                holding.bytes = placed.bytes

    # Letting go

    def evict(self, holding: Holding, waiter: Future[None] | None = None) -> None:
        """Out of the books now; off the device when the last row that wants it has ended, which resolves the waiter."""
        self._strike(holding)
        if waiter is not None:
            holding.leavers.append(waiter)
        if holding.wanted:
            self._leaving.append(holding)
        else:
            self._drop(holding)

    def _strike(self, holding: Holding) -> None:
        if self.holdings.get(holding.key) is holding:
            del self.holdings[holding.key]
        holding.gone = True

    def _drop(self, holding: Holding) -> None:
        holding.live = holding.reserved = False
        if holding.placed is not None:
            self.model.forget(holding.placed)
            self.on_evict(holding.placed)
        _resolve(holding.waiters, None)
        _resolve(holding.leavers, None)

    def unload(self, spec: Spec, waiter: Future[None]) -> None:
        """Let go of an adapter and its snapshot, on device and host; done when the last rows of it have ended."""
        self.unmerge(spec)
        if holding := self.holdings.get((*spec.key, False)):
            self.evict(holding, waiter)
        else:
            waiter.set_result(None)
        self._unloaded.add(spec.key)
        self._clear_host(spec.key)

    def _clear_host(self, key: tuple[str, str]) -> None:
        """The host tier's part of an unload, once no row wants this version any more."""
        if key in self._unloaded and all(h.spec.key != key for h in self._leaving):
            self._unloaded.discard(key)
            self.host.drop(key)

    def unmerge(self, spec: Spec) -> None:
        if holding := self.holdings.get((*spec.key, True)):
            self.evict(holding)

    def pin(self, spec: Spec, waiter: Future[None]) -> None:
        """Never evicted to make room, on device or host; done once it is in memory.

        One that cannot be loaded is not pinned.
        """
        holding = self.want(spec)
        holding.pinned = True
        self.host.pinned.add(spec.key)
        waiter.add_done_callback(lambda done: None if done.exception() is None else self.unpin(spec))
        self._notify(holding, waiter)

    def unpin(self, spec: Spec) -> None:
        if holding := self.holdings.get((*spec.key, False)):
            holding.pinned = False
        self.host.pinned.discard(spec.key)

    def check_mergeable(self, spec: Spec) -> None:
        """As much as is known before a load."""
        plain = self.holdings.get((*spec.key, False))
        known = plain.placed.adapter if plain is not None and plain.placed is not None else self.host.get(spec.key)
        if known is not None:
            check_foldable(known)

    def residents(self, waiting: dict[tuple[str, str], int]) -> tuple[Resident, ...]:
        """One entry per version, on device or host; `waiting` counts the queued rows of each."""
        held: dict[tuple[str, str], list[Holding]] = {}
        for holding in self._all():
            held.setdefault(holding.spec.key, []).append(holding)
        awake = (self._resident(key, mine, waiting.get(key, 0)) for key, mine in held.items())
        return (*awake, *(resident for key, resident in self.host.residents() if key not in held))

    def _resident(self, key: tuple[str, str], mine: list[Holding], waiting: int) -> Resident:
        plain = self.holdings.get((*key, False))
        shown = plain or self.holdings.get((*key, True)) or mine[0]
        known = next((h for h in mine if h.placed is not None), shown)
        return Resident(
            name=key[0],
            version=key[1],
            state=_state(shown),
            family=shown.spec.family,
            rank=known.rank,
            bytes=sum(h.bytes for h in mine if h.live and not h.merged),
            snapshot_bytes=sum(h.bytes for h in mine if h.live and h.merged),
            host_bytes=self.host.bytes_of(key),
            pinned=bool(plain and plain.pinned),
            foldable=known.foldable,
            running=sum(h.rows for h in mine),
            waiting=waiting,
            error=shown.error.message if shown.error else None,
        )

    def expected(self, config: Mapping[str, Any], names: frozenset[str]) -> guard.Expected | None:
        """The tensors that a family expects of this config over this base; None where only PEFT knows."""
        return serving(config, self.model.base.shapes).expected(config, self.model.base.shapes, names)

    def judge(self, spec: Spec, blob: Blob) -> None:
        """Refuses what a load would refuse. On any thread: nothing is kept."""
        before, self.pauses.share = self.pauses.share, SHARE
        try:
            adapter = compile_blob(spec, blob, self.model.base, self.store, self.pauses)
            if adapter.graft is not None:  # nobody but PEFT knows what it takes
                self.model.place(adapter)
        finally:
            self.pauses.share = before

    def close(self) -> None:
        self._quick.shutdown(cancel_futures=True)
        self._slow.shutdown(cancel_futures=True)
        for holding in self._all():
            _close(holding)


def _yield_to_steps() -> None:
    """Folds take what steps leave of the processors: this thread, and those that its products start, come after."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


def compile_adapter(spec: Spec, store: Store, base: Base, files: Held | None = None, pause: Pause = at_once) -> Adapter:
    """Read, check and compile one version, beside its being hashed. Raises AdapterRefused, VersionGone."""
    serving(_typed(spec), base.shapes)  # an unknown kind is not read
    with store.reading(spec, files) as blob:
        return compile_blob(spec, blob, base, store, pause)


def compile_blob(spec: Spec, blob: Blob, base: Base, store: Store, pause: Pause = at_once) -> Adapter:
    """Check and compile what has been read. Raises AdapterRefused."""
    family = serving(_typed(spec), base.shapes)
    guard.check_keys(blob.header, family.expected(spec.config, base.shapes, frozenset(blob.header)))
    adapter = family.load(spec, Tensors(blob, pause), base)
    if adapter.graft is None:
        return adapter
    names = [name for group in experts(spec.config) for name in group]
    return replace(adapter, graft=replace(adapter.graft, experts=tuple(_expert(n, base, store) for n in names)))


def _expert(name: str, base: Base, store: Store) -> Graft:
    """An adapter that another one routes among, at its version of now: a plain LoRA, checked like any other."""
    spec = store.resolve(name)
    if spec.family != "LORA" or spec.config.get("arrow_config"):
        raise AdapterRefused(f"{name!r} is of kind {spec.family}: only plain LoRA adapters can be routed among")
    blob = store.read(spec)
    guard.check_keys(blob.header, find("LORA").expected(spec.config, base.shapes, frozenset(blob.header)))
    return Graft("LORA", spec.config, dict(Tensors(blob)), mergeable=False)


def _typed(spec: Spec) -> Mapping[str, Any]:
    return {**spec.config, "peft_type": spec.family}


class Tensors(Fresh):
    """A file's tensors, of bytes that were checked when they were read.

    Those of a file in one format are parts of one tensor, made at once: most of what a load takes is a tensor's price.
    `pause`: called before each.
    """

    def __init__(self, blob: Blob, pause: Pause = at_once) -> None:
        self._blob, self._given, self._pause = blob, set[str](), pause
        self._span = _together(blob)
        self._wholes: dict[torch.dtype, Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._blob.header)

    def __len__(self) -> int:
        return len(self._blob.header)

    def __contains__(self, name: object) -> bool:
        return name in self._blob.header

    def __getitem__(self, name: str) -> Tensor:
        floating = _DTYPES[self._blob.header[name].dtype].is_floating_point
        return self._made(name, torch.float32 if floating else torch.int64)

    def as_filed(self, key: str) -> Tensor:
        return self._made(key, _DTYPES[self._blob.header[key].dtype])

    def _made(self, name: str, dtype: torch.dtype) -> Tensor:
        self._pause()
        span, data = self._blob.header[name], self._blob.data
        filed = _DTYPES[span.dtype]
        count = (span.end - span.begin) // filed.itemsize
        if self._span is not None and name not in self._given:
            self._given.add(name)
            whole = self._whole(*self._span, filed, dtype)
            return whole.narrow(0, (span.begin - self._span[0]) // filed.itemsize, count).view(span.shape)
        flat = torch.frombuffer(data, dtype=filed, count=count, offset=span.begin) if count else torch.empty(0)
        return flat.reshape(span.shape).to(dtype, copy=True)

    def _whole(self, start: int, end: int, filed: torch.dtype, dtype: torch.dtype) -> Tensor:
        """All numbers of the file as one tensor."""
        if dtype not in self._wholes:
            count = (end - start) // filed.itemsize
            flat = torch.frombuffer(self._blob.data, dtype=filed, count=count, offset=start)
            self._wholes[dtype] = flat.to(dtype, copy=True)
        return self._wholes[dtype]


def _together(blob: Blob) -> tuple[int, int] | None:
    """From where to where a file's numbers lie that are made one tensor.

    None of a file that has several formats, or a tensor that is much of it: such a one may be all that is not kept.
    """
    spans = blob.header.values()
    formats, start, end = {span.dtype for span in spans}, min(s.begin for s in spans), max(s.end for s in spans)
    dtype = _DTYPES[next(iter(formats))]
    if len(formats) > 1 or not dtype.is_floating_point or max(s.end - s.begin for s in spans) * FEWEST >= end - start:
        return None
    return start, end


def _resolve(waiters: list[Future[None]], error: AdapterServerError | None) -> None:
    for waiter in waiters:
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(error)
    waiters.clear()


def _close(holding: Holding) -> None:
    files, holding.files = holding.files, None
    if files is not None:
        files.close()


def _state(holding: Holding) -> ResidentState:
    return "failed" if holding.error else "ready" if holding.live else "loading"


def _is_slow(spec: Spec) -> bool:
    """An unknown kind is refused by its load, not here."""
    try:
        return slow(spec)
    except AdapterServerError:
        return False
