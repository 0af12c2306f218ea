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
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from adapter_server.engine.grouped import Beside, Grouped, GroupedSmall, Listed, Place, Table, has_vectors
from adapter_server.engine.kv import Lease, PagePool
from adapter_server.engine.parts import ELSEWHERE, Part, Parts, weighable
from adapter_server.engine.placed import Placed
from adapter_server.engine.routing import Routing, Segment, Step, running
from adapter_server.engine.site import Plan

if TYPE_CHECKING:
    from adapter_server.engine.kernels import Owners, Tiles
    from adapter_server.engine.model import Model
    from adapter_server.engine.site import LinearGroup

log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)  # buckets; beyond, multiples of the last
MOST_COMPOSED = 4  # adapters of a token in a captured step
LATELY = 256  # steps for which graphs keep a part that no adapter has any more
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

    def write_pairs(self, tokens: Sequence[int], weights: Sequence[float], slots: Sequence[int], of: str = "") -> None:
        """The (token, weight, row of the table) triples, and the same by token: who shares one has low ranks alone, and
        these go by the triples. `of`: whose tokens, the step's or the "head_"'s.
        """
        arrays = self.arrays
        arrays[f"{of}tokens"][: len(tokens)] = tokens
        arrays[f"{of}weights"][: len(weights)] = weights
        arrays[f"{of}owners"][:] = -1
        arrays[f"{of}owners"][tokens] = slots
        arrays[f"{of}shares"][tokens] = weights
        arrays[f"{of}live"][:] = 0
        arrays[f"{of}live"][tokens] = 1

    def write_tiles(self, start: int, stop: int, places: Sequence[Place], of: str = "") -> None:
        """Tiles start..stop−1; those that are left are of no pair."""
        at, tiles = start + len(places), self.arrays[f"{of}tiles"]
        if places:
            tiles[start:at] = places
        tiles[at:stop] = 0


@dataclass(frozen=True, slots=True)
class AddedKey:
    """What of all that adapters add is part of a graph."""

    width: int  # of the small products
    scaled: bool  # some adapter scales what the base gives, so that none can run beside it
    groups: frozenset[int]  # that low ranks and vectors touch
    parts: frozenset[Part] = frozenset()  # what there is beyond these
    hidden: int = 0  # width of the largest network
    depths: int = 1  # adapters that a token may have


class Key(Protocol):
    """What a graph is captured for."""

    @property
    def added(self) -> AddedKey | None: ...

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
        self.lately: dict[frozenset[Part], int] = {}  # by adapters' parts: the last step in which one had them
        self.united: tuple[set[frozenset[Part]], frozenset[Part]] = set(), frozenset()  # its keys, and all their parts
        self.count = 0  # of steps
        self.embeds: Tensor | None = None  # [1, most tokens, hidden], where adapters have rows of an embedding
        self.failed = False
        if isinstance(form := model.lowrank, Grouped):
            form.table.norms = {path: len(model.groups) + i for i, path in enumerate(model.norms)}

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
        form = self.model.lowrank
        name = "capturable", isinstance(form, Grouped) and form.does_parts
        if name not in routing.shared:
            routing.shared[name] = self._capturable(routing)
        return not self.failed and bool(routing.shared[name])

    def _capturable(self, routing: Routing) -> bool:
        if routing.plain or whole(routing) is not None:
            return not routing.inside
        form = self.model.lowrank
        if not isinstance(form, Grouped) or max(map(len, routing.uses)) > MOST_COMPOSED:
            return False
        return all(_is_data(form, segment) for segment in routing.segments)

    def listed(self, routing: Routing) -> Listed | None:
        """The pairs of a step's tokens and adapters; None where there are none, or one snapshot has all tokens."""
        form = self.model.lowrank
        if not isinstance(form, Grouped) or routing.plain or whole(routing) is not None:
            return None
        listed = form.listed(routing, everything=True)
        return listed if listed.places else None

    def added(self, routing: Routing, listed: Listed) -> AddedKey:
        """Of all adapters that have run, and the parts of those that did lately: few graphs serve many mixes."""
        if self not in routing.shared:
            routing.shared[self] = self._noted(routing)
        parts = self._lately(routing.shared[self])
        networks = any(part.name == "network" for part in parts)
        hidden, depths = self._form.table.hidden if networks else 0, max(map(len, routing.uses))
        return AddedKey(listed.width, self.scaled, self.groups, parts, hidden, depths)

    def _noted(self, routing: Routing) -> set[frozenset[Part]]:
        """The parts of each of a routing's adapters; looked at once a routing."""
        for groups, scaled in (self._form.touched(segment.placed) for segment in routing.segments):
            self.groups = self.groups if groups <= self.groups else self.groups | groups
            self.scaled = self.scaled or scaled
        return {parts for s in routing.segments if (parts := self._form.parts(s.placed))}

    def _lately(self, running: set[frozenset[Part]]) -> frozenset[Part]:
        """The parts of the adapters of this step and of the last ones."""
        self.count += 1
        self.lately |= dict.fromkeys(running, self.count)
        old = [parts for parts, step in self.lately.items() if self.count - step >= LATELY]
        for parts in old:
            del self.lately[parts]
        if old or self.lately.keys() != self.united[0]:
            self.united = set(self.lately), frozenset().union(*self.lately)
        return self.united[1]

    @property
    def _form(self) -> Grouped:
        if not isinstance(self.model.lowrank, Grouped):
            raise RuntimeError("adapters are captured where kernels add them alone")
        return self.model.lowrank

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
        such steps run without from now on, slower and as right.
        """
        known = self.captured.get(key)
        if known is not None and not self._is_stale(known):
            return known
        if not may_capture:
            return None
        try:
            return self._capture(key)
        except Exception as failure:
            self._give_up(key, failure)
            return None

    def _give_up(self, key: K, failure: Exception) -> None:
        """Steps like this one run without from now on: those with parts, if it had some, or all."""
        if key.added is not None and key.added.parts:
            self._form.does_parts = False
            self.lately, self.united = {}, (set(), frozenset())
        else:
            self.failed = True
        which = "all" if self.failed else "those with more than low ranks"
        log.warning("a step could not be captured as a CUDA graph, %s run without from now on: %r", which, failure)

    def _is_stale(self, captured: Captured) -> bool:
        """Whether it reads addresses where they are no more."""
        return captured.table is not None and captured.table is not self._form.table.rows

    def _capture(self, key: K) -> Captured:
        """It runs once on padding alone, so that what is compiled or allocated once is there."""
        self.captured = {k: known for k, known in self.captured.items() if not self._is_stale(known)}
        while len(self.captured) >= MOST_KEPT:
            del self.captured[next(iter(self.captured))]
        host = self.next_host()  # a step that nobody waited for may be still to read the other
        self.pad(host)
        self.send(host)
        step, table = self.step(key), None if key.added is None else self._form.table.rows
        self.captured[key] = captured = Captured(*self._recorded(step, key), step, table)
        return captured

    def _recorded(self, step: Step, key: K) -> tuple[Callable[[], None], Tensor]:
        def run() -> Tensor:
            step.carry = None
            logits = self.run(step, key)
            step.streams.clear()  # else their memory is no other graph's while this one is kept
            return logits

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

    def routing(self, key: K, tokens: int, tiles: Tiles | None) -> Routing:
        """What adapters do in a captured step of so many tokens, whoever they are."""
        routing = Routing(tokens, plans=self.plans(key, tokens, tiles))
        if key.added is None or not key.added.parts:
            return routing
        owners, table, dtype = self._owners(tokens), self._form.table, self.model.dtype
        routing.shared["read"] = frozenset(part.path for part in key.added.parts if part.name == "network")
        for part in key.added.parts:
            if (norm := self.model.norms.get(part.path)) is not None and part.group == ELSEWHERE:
                routing.shared[norm] = partial(_own_rows, norm.weight, owners, table, part.path, dtype)
        return routing

    def plans(self, key: K, tokens: int, tiles: Tiles | None) -> dict[int, Plan]:
        """What each group does: nothing but the base, whatever adapters add, or one snapshot's product."""
        groups, added = self.model.groups, key.added
        if key.whole is not None:
            own = key.whole.groups
            return {g.index: Plan(whole=own[g.index].product if g.index in own else None) for g in groups}
        if added is None or tiles is None:
            return {}
        return {g.index: self._plan(g, added, tokens, tiles) for g in groups}

    def _plan(self, group: LinearGroup, added: AddedKey, tokens: int, tiles: Tiles, of: str = "") -> Plan:
        """`of`: whose pairs of the sheet the tiles are."""
        form, parts = self._form, [part for part in added.parts if part.group == group.index]
        small = GroupedSmall(form, group, tiles, frozenset()) if group.index in added.groups else None
        if parts:
            return Plan(small=[Parts(form, group, parts, tiles, self._owners(tokens, of), added.hidden, small)])
        if small is None:
            return Plan()
        if added.scaled or added.depths > 1:  # it needs what the base gives, or comes one after another
            return Plan(small=[small])
        return Plan(small=[small], beside=Beside(small, self.sheet[f"{of}live"][:tokens], form.aside))

    def _owners(self, tokens: int, of: str = "") -> Owners:
        form, owners, shares = self._form, self.sheet[f"{of}owners"], self.sheet[f"{of}shares"]
        made: Owners = form.kernels.Owners(owners[:tokens], shares[:tokens], form.table.rows)
        return made

    def given(self, key: K, tokens: int) -> dict[str, Tensor]:
        """What the graph is given of modules that run before it: the embedding, where adapters have rows of it."""
        path = self.model.base.shapes.embed
        if key.added is None or Part(ELSEWHERE, "module", path=path) not in key.added.parts:
            return {}
        if self.embeds is None:
            most, weight = len(self.sheet["ids"]), self.model.module.get_input_embeddings().weight
            self.embeds = torch.zeros(1, most, weight.shape[1], dtype=self.model.dtype, device=self.device)
        return {path: self.embeds[:, :tokens]}

    def embed(self, key: K, routing: Routing, ids: Callable[[int], Tensor]) -> None:
        """Look the step's tokens up, where its graph is given their rows. ids: of so many tokens [T]."""
        for rows in self.given(key, routing.tokens).values():
            with running(Step(routing, routing)):
                rows.copy_(self.model.module.get_input_embeddings()(ids(routing.tokens)[None]))

    def forget(self, placed: Placed) -> None:
        """It leaves the device: no graph may read its weights."""
        self.captured = {key: known for key, known in self.captured.items() if key.whole is not placed}


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """Where steps are run once and captured. cuBLAS keeps working memory (32 MiB on Hopper) for each stream that it has
    seen: of one, and outside of the graphs' own, which must be empty to go and come again when the last graph has gone.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def added_fields(tokens: int, tiles: int, of: str = "", depths: int = 1) -> dict[str, Field]:
    """What a sheet has of adapters, in so many tiles, of tokens that have up to `depths` of them."""
    fields: dict[str, Field] = {"tiles": (torch.int32, (tiles, 4))}
    for name, dtype, size in (("tokens", torch.int32, depths), ("weights", torch.float32, depths)):
        fields[name] = dtype, (tokens * size,)
    for name, dtype in (("live", torch.int32), ("owners", torch.int32), ("shares", torch.float32)):
        fields[name] = dtype, (tokens,)
    return {f"{of}{name}": field for name, field in fields.items()}


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


def _is_data(form: Grouped, segment: Segment) -> bool:
    """Whether kernels do all that an adapter does to its tokens; to those that others have too, low ranks alone."""
    placed = segment.placed
    parts = form.parts(placed)
    if parts is None or (segment.weights is not None and not weighable(placed)):
        return False
    return segment.sole or not (parts or any(has_vectors(patch) for patch in placed.groups.values()))


def _own_rows(weight: Tensor, owners: Owners, table: Table, path: str, held: torch.dtype) -> Tensor:
    """A norm's weight of each token [T, n]."""
    rows: Tensor = table.kernels.own_rows(weight, owners, table.norm_at(path), held)
    return rows
