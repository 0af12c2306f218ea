"""Steps in which every row gets one token, as captured graphs.

A graph is of a bucket of rows, of tiles (of the low rank), and of context; rows beyond the step's own are padding,
which writes to a page of nobody's. It ends in each row's token, `out`, which the next step takes as input:

    sheet ──> ids, or of the step before: out[source] ──> forward ──> logits ──> out

So the next step is launched before this one's tokens have reached the host: see `Engine._fly`. Where some row is drawn
by chance the graph is another, which reads what each is drawn by from the sheet, its random number too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapter_server.engine.capture import (
    MOST_COMPOSED,
    ROWS,
    AddedKey,
    Captured,
    Captures,
    Field,
    Memory,
    Sheet,
    added_fields,
    bucket,
    whole,
)
from adapter_server.engine.grouped import Listed
from adapter_server.engine.kv import Decodes, KvStep, PagePool
from adapter_server.engine.placed import Placed
from adapter_server.engine.routing import Routing, Step
from adapter_server.engine.sampling import Chosen, Kernel

if TYPE_CHECKING:
    from adapter_server.engine.kernels import Tiles
    from adapter_server.engine.model import Model
    from adapter_server.engine.scheduler import Row, Slice

TILES = (1, 4, 16)  # of the low rank; beyond, as many as rows
CONTEXTS = (1024,)  # keys of a row; beyond, as many as a context has
NOBODY = -1  # the token of a row whose logits are not finite


def sheet_of(rows: int, pages: int) -> dict[str, Field]:
    """What a step's data are: name, dtype and shape."""
    each = dict.fromkeys(("ids", "positions", "places", "source"), (torch.int64, (rows,)))
    rest = {"lengths": (torch.int32, (rows,)), "settings": (torch.float64, (rows, 5))}
    added = added_fields(rows, rows * MOST_COMPOSED, depths=MOST_COMPOSED)
    return {**each, **rest, **added, "table": (torch.int32, (rows, pages))}


@dataclass(frozen=True, slots=True)
class GraphKey:
    """What a graph is captured for."""

    rows: int
    context: int
    tiles: int = 0  # of the low rank, for each of the adapters that a token may have
    few: int = 0  # tokens of a tile
    added: AddedKey | None = None
    whole: Placed | None = None
    drawn: bool = False  # whether some row's token is drawn by chance


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
        """The token of each row. Waits for the step."""
        self.landed()
        return [Chosen(max(0, id), ok=id >= 0) for id in self.out[: len(self.slices)].tolist()]


class Graphs(Captures[GraphKey]):
    """Captured steps of single tokens."""

    def __init__(
        self, model: Model, kv: PagePool, max_rows: int, max_len: int, memory: Memory, draw: Kernel | None = None
    ) -> None:
        self.rows, self.length, self.draw = bucket(max_rows, ROWS), max_len, draw
        super().__init__(model, kv, sheet_of(self.rows, math.ceil(max_len / kv.page)), memory)
        self.out = torch.zeros(self.rows, dtype=torch.int64, device=self.device)
        self.outs = [torch.zeros(self.rows, dtype=torch.int64, pin_memory=self.locked) for _ in range(2)]
        self.order = torch.arange(self.rows, device=self.device)

    def fit(self, slices: Sequence[Slice], routing: Routing) -> bool:
        """Whether a step of these rows under this routing runs as a graph."""
        return len(slices) <= self.rows and all(_is_single(s) for s in slices) and self.capturable(routing)

    @torch.inference_mode()
    def launch(
        self, slices: Sequence[Slice], routing: Routing, before: Flight | None = None, drawn: bool = False
    ) -> Flight | None:
        """Run a step; after `before`, whose tokens are its rows' inputs. None where it would have to be captured first
        and `before` is under way. Rows with a temperature are drawn where it says `drawn`.
        """
        listed = self.listed(routing)
        key = replace(self._key(slices, routing, listed), drawn=drawn)
        known = self.find(key, before is None)
        if known is None:
            return None
        host = self.next_host()
        self._fill(host, slices, key, before)
        if listed is not None:
            host.write_pairs(listed.tokens, listed.weights, listed.slots)
            self._write_tiles(host, listed, key)
        self.send(host)
        self.embed(key, routing, self._ids)
        known.run()
        return self._flight(slices, known)

    def _flight(self, slices: Sequence[Slice], captured: Captured) -> Flight:
        out = self.outs[self.turn]
        out.copy_(self.out, non_blocking=True)
        if not self.locked:
            return Flight(slices, captured.logits, out.clone(), lambda: None)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return Flight(slices, captured.logits, out, event.synchronize)

    def _write_tiles(self, host: Sheet, listed: Listed, key: GraphKey) -> None:
        """One run of tiles after the other; a token's adapters go one after another."""
        places = [listed.places[run.start : run.stop] for run in listed.runs]
        for i in range(1 if key.added is None else key.added.depths):
            host.write_tiles(i * key.tiles, (i + 1) * key.tiles, places[i] if i < len(places) else [])

    def _key(self, slices: Sequence[Slice], routing: Routing, listed: Listed | None) -> GraphKey:
        rows = bucket(len(slices), ROWS)
        context = bucket(max(s.row.offset + len(s.row.tokens) + 1 for s in slices), CONTEXTS, self.length)
        if listed is None:
            return GraphKey(rows, context, whole=whole(routing))
        tiles = min(rows, bucket(max(run.stop - run.start for run in listed.runs), TILES, rows))
        return GraphKey(rows, context, tiles, listed.runs[0].tokens, self.added(routing, listed))

    def _fill(self, host: Sheet, slices: Sequence[Slice], key: GraphKey, before: Flight | None) -> None:
        n, ahead, page, arrays = len(slices), before is not None, self.kv.page, host.arrays
        done = [s.row.done + ahead for s in slices]
        past = [s.row.offset + d for s, d in zip(slices, done, strict=True)]
        leases = [s.row.lease for s in slices if s.row.lease is not None]
        arrays["positions"][:n] = [s.row.shift + d for s, d in zip(slices, done, strict=True)]
        arrays["lengths"][:n] = [p + 1 for p in past]
        arrays["places"][:n] = [lease.pages[p // page] * page + p % page for lease, p in zip(leases, past, strict=True)]
        if before is None:
            arrays["ids"][:n] = [s.row.tokens[-1] for s in slices]
            arrays["source"][:n] = NOBODY
        else:
            arrays["source"][:n] = [before.index[s.row] for s in slices]
        if key.drawn:
            arrays["settings"][:n] = [s.row.draw.settings(ahead) for s in slices]
        for i, lease in enumerate(leases):
            host.write_pages(i, lease)
        self._pad(host, n, key.rows)

    def _pad(self, host: Sheet, start: int, stop: int) -> None:
        """Rows that are nobody's: one token, whose keys go to the page of nobody."""
        arrays, span = host.arrays, slice(start, stop)
        for name, value in (("ids", 0), ("positions", 0), ("source", NOBODY), ("lengths", 1), ("settings", 0)):
            arrays[name][span] = value
        arrays["places"][span] = self.kv.nobodys * self.kv.page
        arrays["table"][span, 0] = self.kv.nobodys
        host.leases[span] = [None] * (stop - start)

    def pad(self, host: Sheet) -> None:
        self._pad(host, 0, self.rows)
        host.write_pairs([], [], [])
        host.write_tiles(0, self.rows * MOST_COMPOSED, [])

    def run(self, step: Step, key: GraphKey) -> Tensor:
        """The forward of the sheet's rows [rows, vocab]; their tokens go to `out`."""
        sheet, rows = self.sheet, key.rows
        logits = self.model.forward(step, self._ids(rows), sheet["positions"][:rows], self.order[:rows])
        ids, best = self._chosen(logits, key)
        self.out[:rows] = torch.where(torch.isfinite(best), ids, NOBODY)
        return logits

    def _ids(self, rows: int) -> Tensor:
        """Each row's token: from the sheet, or of the step before."""
        source = self.sheet["source"][:rows]
        before = self.out.index_select(0, source.clamp(min=0)).clamp(min=0)
        return torch.where(source >= 0, before, self.sheet["ids"][:rows])

    def _chosen(self, logits: Tensor, key: GraphKey) -> tuple[Tensor, Tensor]:
        """(each row's token, its largest logit) [rows]."""
        if key.drawn and self.draw is not None:
            return self.draw(logits, self.sheet["settings"][: key.rows])
        kernels = self.kv.kernels
        ids, best = logits.max(-1)[::-1] if kernels is None else kernels.pick(logits)
        return ids, best

    def step(self, key: GraphKey) -> Step:
        sheet, n = self.sheet, key.rows
        order = self.order[:n]
        decodes = Decodes(key.context, sheet["lengths"][:n], order, order, None, sheet["table"][:n])
        routing = self.routing(key, n, self._tiles(key))
        return Step(routing, routing, KvStep(self.kv, sheet["places"][:n], [], decodes), given=self.given(key, n))

    def _tiles(self, key: GraphKey) -> Tiles | None:
        if key.added is None:
            return None
        form, sheet, n = self._form, self.sheet, key.rows
        pairs, tiles = n * key.added.depths, key.tiles
        runs = [form.kernels.Run(i * tiles, (i + 1) * tiles, key.few) for i in range(key.added.depths)]
        places = sheet["tiles"][: runs[-1].stop]
        return form.tiles(sheet["tokens"][:pairs], sheet["weights"][:pairs], places, runs, key.added.width)


def _is_single(s: Slice) -> bool:
    """Whether it is one token that gives the next, under the same adapters as the one after it."""
    return s.count == 1 and s.last and not s.row.unrated and not s.row.starts
