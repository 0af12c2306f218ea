"""Steps in which every row gets one token, captured once as CUDA graphs and replayed: a step costs one launch.

    sheet, host ──one copy──> sheet, device ──> ids, positions, places, lengths, pages; pairs and tiles of the low rank
                                    │
                              captured forward ──> logits, and of each row the likeliest token: `out`
                                    ▲                                                            │
                                    └── `source`: whose token of the step before is my input ────┘

What differs from step to step is data in the sheet, so that one graph holds for any mix of adapters. A graph is of a
bucket of rows, of tiles (of the low rank), and of context; rows beyond the step's own are padding, which writes to a
page of nobody's. Since a row's input may come from the step before, the next step is launched before this one's tokens
have reached the host: see `Engine._fly`.
"""

from __future__ import annotations

import bisect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapter_server.engine.grouped import Beside, Grouped, GroupedSmall, Listed, Place
from adapter_server.engine.kv import Decodes, KvStep, Lease, PagePool
from adapter_server.engine.placed import GroupPatch, Placed
from adapter_server.engine.routing import Routing, Step
from adapter_server.engine.sampling import Chosen
from adapter_server.engine.site import Plan

if TYPE_CHECKING:
    from adapter_server.engine.model import Model
    from adapter_server.engine.scheduler import Row, Slice

log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)  # buckets; beyond, multiples of the last
TILES = (0, 1, 4, 16)  # of the low rank; beyond, as many as rows
CONTEXTS = (1024,)  # keys of a row; beyond, as many as a context has
MOST_KEPT = 96  # graphs; the least recently captured goes first
NOBODY = -1  # the token of a row whose logits are not finite

Field = tuple[torch.dtype, tuple[int, ...]]


def sheet_of(rows: int, pages: int) -> dict[str, Field]:
    """What a step's data are: name, dtype and shape."""
    each = dict.fromkeys(("ids", "positions", "places", "source"), (torch.int64, (rows,)))
    small = dict.fromkeys(("lengths", "tokens", "live"), (torch.int32, (rows,)))
    return {
        **each,
        **small,
        "weights": (torch.float32, (rows,)),
        "tiles": (torch.int32, (rows, 4)),
        "table": (torch.int32, (rows, pages)),
    }


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
        self.leases: list[tuple[Lease, int] | None] = [None] * fields["ids"][1][0]  # whose pages the table's rows are

    def __getitem__(self, name: str) -> Tensor:
        return self.views[name]


@dataclass(frozen=True, slots=True)
class Key:
    """What a graph is captured for."""

    rows: int
    tiles: int  # of the low rank
    context: int
    few: int = 0  # tokens of a tile
    width: int = 0  # of the low rank's small products
    scaled: bool = False  # some adapter scales what the base gives, so that none can run beside it
    groups: frozenset[int] = frozenset()  # that adapters touch
    whole: Placed | None = None  # whose weights all rows run on


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """A step that can be run again. `logits` [rows, vocab] are its own until the next one runs."""

    run: Callable[[], None]
    logits: Tensor
    table: Tensor | None  # the adapters' addresses that it reads


@dataclass(slots=True, eq=False)
class Flight:
    """A step that was launched. Its tokens are on their way to the host."""

    slices: Sequence[Slice]  # in packed order
    logits: Tensor
    out: Tensor  # [rows], on the host once it has landed
    landed: Callable[[], None]  # waits for that
    index: dict[Row, int] = field(init=False)

    def __post_init__(self) -> None:
        self.index = {s.row: i for i, s in enumerate(self.slices)}

    def chosen(self) -> list[Chosen]:
        """The likeliest token of each row. Waits for the step."""
        self.landed()
        return [Chosen(max(0, id), ok=id >= 0) for id in self.out[: len(self.slices)].tolist()]


class Graphs:
    """Captures and replays. Called by the engine's thread alone."""

    def __init__(self, model: Model, kv: PagePool, max_rows: int, max_len: int) -> None:
        self.model, self.kv, self.device = model, kv, model.device
        self.rows, self.length = bucket(max_rows, ROWS, None), max_len
        self.pages = math.ceil(max_len / kv.page)
        fields, locked = sheet_of(self.rows, self.pages), self.device.type == "cuda"
        self.sheet = Sheet(fields, self.device)
        self.hosts = [Sheet(fields, torch.device("cpu"), locked) for _ in range(2)]  # in turn: one may be on its way
        self.out = torch.zeros(self.rows, dtype=torch.int64, device=self.device)
        self.outs = [torch.zeros(self.rows, dtype=torch.int64, pin_memory=locked) for _ in range(2)]
        self.order = torch.arange(self.rows, device=self.device)
        self.captured: dict[Key, Captured] = {}
        self.turn = 0
        self.groups: frozenset[int] = frozenset()  # that adapters have touched
        self.scaled = False  # whether one has scaled the base's output
        self.memory = torch.cuda.graph_pool_handle() if locked else None
        self.failed = False

    # What can be captured

    def fit(self, slices: Sequence[Slice], routing: Routing) -> bool:
        """Whether a step of these rows under this routing runs as a graph."""
        if self.failed or len(slices) > self.rows or not all(_is_single(s) for s in slices):
            return False
        if "captured" not in routing.shared:
            routing.shared["captured"] = self._capturable(routing)
        return bool(routing.shared["captured"])

    def _capturable(self, routing: Routing) -> bool:
        if routing.plain or _whole(routing) is not None:
            return not routing.inside
        if routing.composed or routing.inside or not isinstance(self.model.lowrank, Grouped):
            return False
        return all(_is_narrow(patch) for s in routing.segments for patch in s.placed.groups.values())

    # A step

    @torch.inference_mode()
    def launch(self, slices: Sequence[Slice], routing: Routing, before: Flight | None = None) -> Flight | None:
        """Run a step; after `before`, whose tokens are its rows' inputs. None where it would have to be captured first
        and `before` is under way.
        """
        form = self.model.lowrank
        listed = (
            form.listed(routing) if isinstance(form, Grouped) and routing.segments and not _whole(routing) else None
        )
        key = self._key(slices, routing, listed)
        known = self.captured.get(key)
        if known is None or (
            known.table is not None and isinstance(form, Grouped) and known.table is not form.table.rows
        ):
            known = None if before is not None else self._captured(key)
        if known is None:
            return None
        self.turn ^= 1
        host = self.hosts[self.turn]
        self._fill(host, slices, key.rows, before)
        if listed is not None:
            _fill_tiles(host, listed.tokens, listed.weights, listed.places, key.tiles)
        self.sheet.bytes.copy_(host.bytes, non_blocking=True)
        known.run()
        return self._flight(slices, known)

    def _flight(self, slices: Sequence[Slice], captured: Captured) -> Flight:
        out = self.outs[self.turn]
        out.copy_(self.out, non_blocking=True)
        if self.device.type != "cuda":
            return Flight(slices, captured.logits, out.clone(), lambda: None)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return Flight(slices, captured.logits, out, event.synchronize)

    def _key(self, slices: Sequence[Slice], routing: Routing, listed: Listed | None) -> Key:
        rows = bucket(len(slices), ROWS, None)
        most = max(s.row.offset + len(s.row.tokens) + 1 for s in slices)
        context = bucket(most, CONTEXTS, self.length)
        if listed is None:
            return Key(rows, 0, context, whole=_whole(routing))
        self.groups |= {index for s in routing.segments for index in s.placed.groups}
        self.scaled = self.scaled or any(p.mul is not None for s in routing.segments for p in s.placed.groups.values())
        tiles, few = min(rows, bucket(len(listed.places), TILES, rows)), listed.runs[0].tokens
        return Key(rows, tiles, context, few, listed.width, self.scaled, self.groups)

    def _fill(self, host: Sheet, slices: Sequence[Slice], rows: int, before: Flight | None) -> None:
        n, ahead, page, arrays = len(slices), before is not None, self.kv.page, host.arrays
        done = [s.row.done + ahead for s in slices]
        past = [s.row.offset + d for s, d in zip(slices, done, strict=True)]
        leases = [s.row.lease for s in slices if s.row.lease is not None]
        places = [lease.pages[p // page] * page + p % page for lease, p in zip(leases, past, strict=True)]
        arrays["positions"][:n] = [s.row.shift + d for s, d in zip(slices, done, strict=True)]
        arrays["lengths"][:n] = [p + 1 for p in past]
        arrays["places"][:n] = places
        if before is None:
            arrays["ids"][:n] = [s.row.tokens[-1] for s in slices]
            arrays["source"][:n] = NOBODY
        else:
            arrays["source"][:n] = [before.index[s.row] for s in slices]
        for i, lease in enumerate(leases):
            self._write_pages(host, i, lease)
        self._pad(host, n, rows)

    def _write_pages(self, host: Sheet, i: int, lease: Lease) -> None:
        """The table's row, where it is another's or has grown."""
        known, count = host.leases[i], len(lease.pages)
        start = known[1] if known is not None and known[0] is lease else 0
        if start < count:
            host.arrays["table"][i, start:count] = lease.pages[start:]
            host.leases[i] = lease, count

    def _pad(self, host: Sheet, start: int, stop: int) -> None:
        """Rows that are nobody's: one token, whose keys go to the page of nobody."""
        arrays, span = host.arrays, slice(start, stop)
        for name, value in (("ids", 0), ("positions", 0), ("source", NOBODY), ("lengths", 1)):
            arrays[name][span] = value
        arrays["places"][span] = self.kv.nobodys * self.kv.page
        arrays["table"][span, 0] = self.kv.nobodys
        host.leases[span] = [None] * (stop - start)

    # Capturing

    def _captured(self, key: Key) -> Captured | None:
        """A graph, or None from now on where that does not work: steps run without, slower and as right."""
        try:
            return self._capture(key)
        except Exception as failure:
            self.failed = True
            log.warning("a step could not be captured as a CUDA graph, all run without from now on: %r", failure)
            return None

    def _capture(self, key: Key) -> Captured:
        """A graph for the key. It runs once on padding alone, so that what is compiled or allocated once is there."""
        form = self.model.lowrank
        if isinstance(form, Grouped) and any(
            c.table is not None and c.table is not form.table.rows for c in self.captured.values()
        ):
            self.captured.clear()  # they read addresses where they are no more
        while len(self.captured) >= MOST_KEPT:
            del self.captured[next(iter(self.captured))]
        host = self.hosts[0]
        self._pad(host, 0, self.rows)
        _fill_tiles(host, [], [], [], self.rows)
        self.sheet.bytes.copy_(host.bytes)
        step = self._step(key)
        table = form.table.rows if isinstance(form, Grouped) and key.tiles else None
        self.captured[key] = captured = Captured(*self._recorded(step, key.rows), table)
        return captured

    def _recorded(self, step: Step, rows: int) -> tuple[Callable[[], None], Tensor]:
        if self.device.type != "cuda":
            logits = self._run(step, rows)
            return lambda: (logits.copy_(self._run(step, rows)), None)[1], logits
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._run(step, rows)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory, capture_error_mode="thread_local"):
            logits = self._run(step, rows)
        return graph.replay, logits

    def _run(self, step: Step, rows: int) -> Tensor:
        """The forward of the sheet's rows [rows, vocab]; their likeliest tokens go to `out`."""
        sheet, source = self.sheet, self.sheet["source"][:rows]
        before = self.out.index_select(0, source.clamp(min=0)).clamp(min=0)
        ids = torch.where(source >= 0, before, sheet["ids"][:rows])
        step.carry = None
        logits = self.model.forward(step, ids, sheet["positions"][:rows], self.order[:rows])
        self.out[:rows] = self._likeliest(logits)
        return logits

    def _likeliest(self, logits: Tensor) -> Tensor:
        """[rows]; NOBODY where the logits have no finite maximum."""
        kernels = self.kv.kernels
        ids, best = logits.max(-1)[::-1] if kernels is None else kernels.pick(logits)
        return torch.where(torch.isfinite(best), ids, NOBODY)

    def _step(self, key: Key) -> Step:
        sheet, n = self.sheet, key.rows
        order = self.order[:n]
        decodes = Decodes(key.context, sheet["lengths"][:n], order, order, None, sheet["table"][:n])
        routing = Routing(n, plans=self._plans(key))
        return Step(routing, routing, KvStep(self.kv, sheet["places"][:n], [], decodes))

    def _plans(self, key: Key) -> dict[int, Plan]:
        """What each group does: nothing but the base, the low rank of whatever adapters, or one snapshot's product."""
        groups, form = self.model.groups, self.model.lowrank
        if key.whole is not None:
            own = key.whole.groups
            return {g.index: Plan(whole=own[g.index].product if g.index in own else None) for g in groups}
        if not key.tiles or not isinstance(form, Grouped):
            return {}
        sheet, n = self.sheet, key.rows
        runs = [form.kernels.Run(0, key.tiles, key.few)]
        tiles = form.tiles(sheet["tokens"][:n], sheet["weights"][:n], sheet["tiles"][: key.tiles], runs, key.width)
        small = {g.index: GroupedSmall(form, g, tiles, frozenset()) for g in groups if g.index in key.groups}
        aside = {} if key.scaled else {i: Beside(own, sheet["live"][:n], form.aside) for i, own in small.items()}
        return {
            g.index: Plan(small=[small[g.index]], beside=aside.get(g.index)) if g.index in small else Plan()
            for g in groups
        }

    def forget(self, placed: Placed) -> None:
        """It leaves the device: no graph may read its weights."""
        self.captured = {key: known for key, known in self.captured.items() if key.whole is not placed}


def bucket(count: int, steps: Sequence[int], most: int | None) -> int:
    """The first of the steps that holds `count`; beyond them `most`, or a multiple of the last."""
    at = bisect.bisect_left(steps, count)
    if at < len(steps):
        return steps[at]
    return most if most is not None else math.ceil(count / steps[-1]) * steps[-1]


def _fill_tiles(
    host: Sheet, tokens: Sequence[int], weights: Sequence[float], places: Sequence[Place], tiles: int
) -> None:
    arrays, n = host.arrays, len(places)
    arrays["tokens"][: len(tokens)] = tokens
    arrays["weights"][: len(weights)] = weights
    arrays["live"][:] = 0
    arrays["live"][tokens] = 1
    if n:
        arrays["tiles"][:n] = places
    arrays["tiles"][n:tiles] = 0  # of no pair


def _is_single(s: Slice) -> bool:
    """Whether it is one token that gives the next, under the same adapters as the one after it."""
    return s.count == 1 and s.last and not s.row.unrated and not s.row.starts


def _whole(routing: Routing) -> Placed | None:
    """The adapter that all tokens run on with weights of its own, if they do."""
    only = routing.segments[0] if len(routing.segments) == 1 else None
    if only is None or only.count != routing.tokens or not only.alone or not only.placed.replaces:
        return None
    return only.placed


def _is_narrow(patch: GroupPatch) -> bool:
    """Whether the low-rank kernels do all of it."""
    others = (patch.shift, patch.product, patch.block)
    return all(part is None for part in others) and not (patch.deltas or patch.mirrors or patch.turns)
