"""Forwards that are recorded once as CUDA graphs and run again: what captured steps of all kinds have in common.

    sheet, host ──one copy──> sheet, device ──> the recorded forward ──> logits

What differs from step to step is data in the sheet, so that one graph holds for any mix of adapters. Where there is no
CUDA the forward itself is run again.
"""

from __future__ import annotations

import bisect
import functools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from adapter_server.engine.grouped import Beside, Grouped, GroupedSmall, Listed, Place
from adapter_server.engine.kv import Lease, PagePool
from adapter_server.engine.placed import GroupPatch, Placed
from adapter_server.engine.routing import Routing, Step
from adapter_server.engine.site import Plan

if TYPE_CHECKING:
    from adapter_server.engine.kernels import Tiles
    from adapter_server.engine.model import Model

log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)  # buckets; beyond, multiples of the last
MOST_KEPT = 96  # graphs of a kind; the least recently captured goes first

Field = tuple[torch.dtype, tuple[int, ...]]
Memory = Any  # torch's handle of a pool of memory for graphs; None where there is no CUDA


class Sheet:
    """A step's data in one tensor of bytes, by name; on the host with numpy's view of each."""

    def __init__(self, fields: Mapping[str, Field], device: torch.device, locked: bool = False) -> None:
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in fields.items()}
        starts, end = {}, 0
        for name, size in sizes.items():
            starts[name], end = end, end + -(-size // 16) * 16
        self.bytes = torch.zeros(end, dtype=torch.uint8, device=device, pin_memory=locked)
        self.views = {
            name: self.bytes[starts[name] : starts[name] + sizes[name]].view(dtype).view(shape)
            for name, (dtype, shape) in fields.items()
        }
        self.arrays = {name: view.numpy() for name, view in self.views.items()} if device.type == "cpu" else {}
        self.leases: list[tuple[Lease, int] | None] = [None] * fields["table"][1][0]  # whose pages the table's rows are
        self.sent: torch.cuda.Event | None = None  # when the device has what was written

    def __getitem__(self, name: str) -> Tensor:
        return self.views[name]

    def write_pages(self, i: int, lease: Lease) -> None:
        """The table's row, where it is another's or has grown."""
        known, count = self.leases[i], len(lease.pages)
        start = known[1] if known is not None and known[0] is lease else 0
        if start < count:
            self.arrays["table"][i, start:count] = lease.pages[start:]
            self.leases[i] = lease, count

    def write_pairs(self, tokens: Sequence[int], weights: Sequence[float]) -> None:
        """The low rank's (token, weight) pairs, and which tokens are live."""
        self.arrays["tokens"][: len(tokens)] = tokens
        self.arrays["weights"][: len(weights)] = weights
        self.arrays["live"][:] = 0
        self.arrays["live"][tokens] = 1

    def write_tiles(self, start: int, stop: int, places: Sequence[Place]) -> None:
        """Tiles start..stop−1; those that are left are of no pair."""
        at = start + len(places)
        if places:
            self.arrays["tiles"][start:at] = places
        self.arrays["tiles"][at:stop] = 0


@dataclass(frozen=True, slots=True)
class LowRankKey:
    """What of the low rank is part of a graph."""

    width: int  # of the small products
    scaled: bool  # some adapter scales what the base gives, so that none can run beside it
    groups: frozenset[int]  # that adapters touch


class Key(Protocol):
    """What a graph is captured for."""

    @property
    def low_rank(self) -> LowRankKey | None: ...

    @property
    def whole(self) -> Placed | None:
        """Whose weights all rows run on."""


K = TypeVar("K", bound=Key)


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """A step that can be run again. `logits` [rows, vocab] are its own until the next one runs.

    It holds all that the recorded launches know by address alone: `step`, with the memory of its small products, and
    `table`, the adapters' addresses.
    """

    run: Callable[[], None]
    logits: Tensor
    step: Step
    table: Tensor | None


class Captures(ABC, Generic[K]):
    """Graphs by key over one set of sheets. Called by the engine's thread alone."""

    def __init__(self, model: Model, kv: PagePool, fields: Mapping[str, Field], memory: Memory) -> None:
        """`memory`: where all graphs of an engine keep what they compute."""
        self.model, self.kv, self.device, self.memory = model, kv, model.device, memory
        self.locked = self.device.type == "cuda"
        self.sheet = Sheet(fields, self.device)
        self.hosts = [Sheet(fields, torch.device("cpu"), self.locked) for _ in range(2)]  # in turn: one is on its way
        self.captured: dict[K, Captured] = {}
        self.turn = 0
        self.groups: frozenset[int] = frozenset()  # that adapters have touched
        self.scaled = False  # whether one has scaled the base's output
        self.failed = False

    @abstractmethod
    def pad(self, host: Sheet) -> None:
        """A sheet of nobody's, on which anything runs."""

    @abstractmethod
    def step(self, key: K) -> Step:
        """The step over the device's sheet."""

    @abstractmethod
    def run(self, step: Step, key: K) -> Tensor:
        """The forward → logits [rows, vocab]."""

    def capturable(self, routing: Routing) -> bool:
        """Whether all that adapters do under a routing is data."""
        if "capturable" not in routing.shared:
            routing.shared["capturable"] = self._capturable(routing)
        return not self.failed and bool(routing.shared["capturable"])

    def _capturable(self, routing: Routing) -> bool:
        if routing.plain or whole(routing) is not None:
            return not routing.inside
        if routing.composed or routing.inside or not isinstance(self.model.lowrank, Grouped):
            return False
        return all(_is_narrow(patch) for s in routing.segments for patch in s.placed.groups.values())

    def listed(self, routing: Routing) -> Listed | None:
        """The pairs of a step's low rank; None where there are none."""
        form = self.model.lowrank
        if not isinstance(form, Grouped) or routing.plain or whole(routing) is not None:
            return None
        listed = form.listed(routing, everything=True)
        return listed if listed.places else None

    def low_rank(self, routing: Routing, listed: Listed) -> LowRankKey:
        """Of all adapters that have run, so that few graphs serve many mixes."""
        self.groups |= {index for s in routing.segments for index in s.placed.groups}
        self.scaled = self.scaled or any(p.mul is not None for s in routing.segments for p in s.placed.groups.values())
        return LowRankKey(listed.width, self.scaled, self.groups)

    def next_host(self) -> Sheet:
        """The sheet to write to: the one that was sent longer ago, once it has arrived."""
        self.turn ^= 1
        host = self.hosts[self.turn]
        if host.sent is not None:
            host.sent.synchronize()
        return host

    def send(self, host: Sheet) -> None:
        """What was written to the device, without waiting."""
        self.sheet.bytes.copy_(host.bytes, non_blocking=True)
        if self.locked:
            host.sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            host.sent.record()

    def find(self, key: K, may_capture: bool) -> Captured | None:
        """The graph for a key; None where there is none and none may be captured, or where that does not work: then
        steps run without from now on, slower and as right.
        """
        known = self.captured.get(key)
        if known is not None and not self._is_stale(known):
            return known
        if not may_capture:
            return None
        try:
            return self._capture(key)
        except Exception as failure:
            self.failed = True
            log.warning("a step could not be captured as a CUDA graph, all run without from now on: %r", failure)
            return None

    def _is_stale(self, captured: Captured) -> bool:
        """Whether it reads addresses where they are no more."""
        form = self.model.lowrank
        return captured.table is not None and isinstance(form, Grouped) and captured.table is not form.table.rows

    def _capture(self, key: K) -> Captured:
        """It runs once on padding alone, so that what is compiled or allocated once is there."""
        self.captured = {k: known for k, known in self.captured.items() if not self._is_stale(known)}
        while len(self.captured) >= MOST_KEPT:
            del self.captured[next(iter(self.captured))]
        host = self.next_host()  # a step that nobody waited for may be still to read the other
        self.pad(host)
        self.send(host)
        form, step = self.model.lowrank, self.step(key)
        table = form.table.rows if isinstance(form, Grouped) and key.low_rank is not None else None
        self.captured[key] = captured = Captured(*self._recorded(step, key), step, table)
        return captured

    def _recorded(self, step: Step, key: K) -> tuple[Callable[[], None], Tensor]:
        def run() -> Tensor:
            step.carry = None
            return self.run(step, key)

        if not self.locked:
            logits = run()
            return lambda: (logits.copy_(run()), None)[1], logits
        here, aside, graph = torch.cuda.current_stream(), _aside(self.device), torch.cuda.CUDAGraph()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # a capture that fails does not leave its stream by itself
            try:
                run()
            finally:
                here.wait_stream(aside)
            with torch.cuda.graph(graph, pool=self.memory, stream=aside, capture_error_mode="thread_local"):
                logits = run()
        return graph.replay, logits

    def plans(self, key: K, tiles: Tiles | None, live: Tensor) -> dict[int, Plan]:
        """What each group does: nothing but the base, the low rank of whatever adapters, or one snapshot's product."""
        groups, form, low = self.model.groups, self.model.lowrank, key.low_rank
        if key.whole is not None:
            own = key.whole.groups
            return {g.index: Plan(whole=own[g.index].product if g.index in own else None) for g in groups}
        if low is None or tiles is None or not isinstance(form, Grouped):
            return {}
        small = {g.index: GroupedSmall(form, g, tiles, frozenset()) for g in groups if g.index in low.groups}
        aside = {} if low.scaled else {i: Beside(own, live, form.aside) for i, own in small.items()}
        return {
            g.index: Plan(small=[small[g.index]], beside=aside.get(g.index)) if g.index in small else Plan()
            for g in groups
        }

    def forget(self, placed: Placed) -> None:
        """It leaves the device: no graph may read its weights."""
        self.captured = {key: known for key, known in self.captured.items() if key.whole is not placed}


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """Where steps are run once and captured. cuBLAS keeps working memory (32 MiB on Hopper) for each stream that it has
    seen: of one, and outside of the graphs' own, which must be empty to go and come again when the last graph has gone.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def bucket(count: int, steps: Sequence[int], most: int | None = None) -> int:
    """The first of the steps that holds `count`; beyond them `most`, or a multiple of the last."""
    at = bisect.bisect_left(steps, count)
    if at < len(steps):
        return steps[at]
    return most if most is not None else math.ceil(count / steps[-1]) * steps[-1]


def whole(routing: Routing) -> Placed | None:
    """The adapter that all tokens run on with weights of its own, if they do."""
    only = routing.segments[0] if len(routing.segments) == 1 else None
    if only is None or only.count != routing.tokens or not only.alone or not only.placed.replaces:
        return None
    return only.placed


def _is_narrow(patch: GroupPatch) -> bool:
    """Whether the low-rank kernels do all of it."""
    others = (patch.shift, patch.product, patch.block)
    return all(part is None for part in others) and not (patch.deltas or patch.mirrors or patch.turns)
