"""Steps that read prompts, beside rows that get one token, as captured graphs.

Tokens of all rows are padded to a bucket; every row, whatever its tokens, is cut into tiles that attention reads over
its pages. Tokens of padding write to a page of nobody's and are read by nobody.

    tiles of the low rank    [ many tokens … | few tokens … ]      the latter of rows that have at most FEW
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from adapter_server.engine.capture import ROWS, AddedKey, Captures, Field, Memory, Sheet, added_fields, bucket, whole
from adapter_server.engine.grouped import Grouped, Listed, Place
from adapter_server.engine.kv import KvStep, PagePool
from adapter_server.engine.placed import Placed
from adapter_server.engine.routing import Routing, Step
from adapter_server.engine.site import Plan

if TYPE_CHECKING:
    from adapter_server.engine.kernels import Chunks, Tiles
    from adapter_server.engine.model import Model
    from adapter_server.engine.scheduler import Slice

TOKENS = (32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)  # buckets; steps of more run without
HEAD = "head_"  # before the names of what the sheet has of lm_head's tokens
FEW_TILES = (0, 16)  # of rows with few tokens; beyond, as many as rows


def sheet_of(tokens: int, rows: int, pages: int, tiles: int) -> dict[str, Field]:
    """What a step's data are: name, dtype and shape."""
    each = dict.fromkeys(("ids", "positions", "places"), (torch.int64, (tokens,)))
    rest = {"keep": (torch.int64, (rows,)), "table": (torch.int32, (rows, pages)), "read": (torch.int32, (tiles, 4))}
    return {**each, **added_fields(tokens, tiles + rows), **added_fields(rows, rows, HEAD), **rest}


@dataclass(frozen=True, slots=True)
class PromptKey:
    """What a graph is captured for."""

    tokens: int
    many: int = 0  # tiles of the low rank, of many tokens
    few: int = 0  # and of few
    head: int = 0  # and of few, at the head, if adapters act there
    added: AddedKey | None = None
    whole: Placed | None = None


class Prompts(Captures[PromptKey]):
    """Captured steps of any rows."""

    def __init__(
        self, model: Model, kv: PagePool, max_rows: int, max_len: int, max_tokens: int, memory: Memory
    ) -> None:
        self.rows, self.most = bucket(max_rows, ROWS), min(TOKENS[-1], bucket(max_tokens, TOKENS, TOKENS[-1]))
        self.queries = 1 if kv.kernels is None else int(kv.kernels.QUERIES)  # tokens of a tile
        pages = math.ceil(max_len / kv.page)
        super().__init__(model, kv, sheet_of(self.most, self.rows, pages, self._tiles_of(self.most)), memory)

    def _tiles_of(self, tokens: int) -> int:
        """As many as rows of so many tokens in all may be cut into."""
        return tokens // self.queries + self.rows

    def fit(self, slices: Sequence[Slice], routing: Routing) -> bool:
        """Whether a step of these rows under this routing runs as a graph."""
        ours = len(slices) <= self.rows and routing.tokens <= self.most and not routing.composed
        return ours and all(not s.row.unrated and not s.row.starts for s in slices) and self.capturable(routing)

    def _at_head(self, head: Routing) -> Listed | None:
        """The pairs of the kept tokens; None where no adapter acts on them."""
        touched = any(self.model.head_index in s.placed.groups for s in head.segments)
        return self._form.listed(head, everything=True) if touched else None

    @torch.inference_mode()
    def launch(self, slices: Sequence[Slice], routing: Routing, head: Routing) -> Tensor | None:
        """Run a step → the logits of the rows that sample; None where it could not be captured. `head` routes the kept
        tokens.
        """
        listed = self.listed(routing)
        at_head = None if listed is None else self._at_head(head)
        key = self._key(routing, listed, at_head)
        known = self.find(key, True)
        if known is None:
            return None
        host = self.next_host()
        self._fill(host, slices, key)
        if listed is not None:
            many, few = _parted(listed, self._most_few)
            host.write_pairs(listed.tokens, listed.weights, listed.slots)
            host.write_tiles(0, key.many, many)
            host.write_tiles(key.many, key.many + key.few, few)
        if at_head is not None:
            host.write_pairs(at_head.tokens, at_head.weights, at_head.slots, HEAD)
            host.write_tiles(0, key.head, at_head.places, HEAD)
        self.send(host)
        self.embed(key, routing, lambda tokens: self.sheet["ids"][:tokens])
        known.run()
        return known.logits[: sum(s.last for s in slices)]

    @property
    def _most_few(self) -> int:
        form = self.model.lowrank
        return int(form.kernels.FEW) if isinstance(form, Grouped) else 0

    def _key(self, routing: Routing, listed: Listed | None, at_head: Listed | None) -> PromptKey:
        tokens = bucket(routing.tokens, TOKENS, self.most)
        if listed is None:
            return PromptKey(tokens, whole=whole(routing))
        many, few = (len(places) for places in _parted(listed, self._most_few))
        room = self._tiles_of(tokens)
        few = min(self.rows, bucket(few, FEW_TILES, self.rows))  # the sheet has no more
        head = 0 if at_head is None else self.rows
        return PromptKey(tokens, room if many else 0, few, head, self.added(routing, listed))

    def _fill(self, host: Sheet, slices: Sequence[Slice], key: PromptKey) -> None:
        arrays, at, keep = host.arrays, 0, []
        tiles: list[Place] = []
        for i, s in enumerate(slices):
            lease, start = s.row.lease, s.row.done
            if lease is None:
                raise RuntimeError("a row without a lease was planned")
            span, past = slice(at, at + s.count), s.row.offset + start
            arrays["ids"][span] = s.row.tokens[start : start + s.count]
            arrays["positions"][span] = np.arange(s.row.shift + start, s.row.shift + start + s.count)
            arrays["places"][span] = self._places(lease.pages, past, s.count)
            host.write_pages(i, lease)
            tiles += [(i, at + t, min(self.queries, s.count - t), past + t) for t in range(0, s.count, self.queries)]
            at += s.count
            keep += [at - 1] if s.last else []
        arrays["read"][: len(tiles)] = tiles
        arrays["keep"][: len(keep)] = keep
        self._pad(host, at, key.tokens, len(tiles), len(keep))

    def _places(self, pages: Sequence[int], past: int, count: int) -> np.ndarray:
        at = np.arange(past, past + count)
        held: np.ndarray = np.asarray(pages)[at // self.kv.page] * self.kv.page + at % self.kv.page
        return held

    def _pad(self, host: Sheet, start: int, stop: int, tiles: int, kept: int) -> None:
        """Tokens, tiles and kept ones that are nobody's."""
        arrays = host.arrays
        arrays["ids"][start:stop] = arrays["positions"][start:stop] = 0
        arrays["places"][start:stop] = self.kv.nobodys * self.kv.page
        arrays["read"][tiles:] = 0
        arrays["keep"][kept:] = 0

    def pad(self, host: Sheet) -> None:
        self._pad(host, 0, self.most, 0, 0)
        host.write_pairs([], [], [])
        host.write_tiles(0, len(host.arrays["tiles"]), [])
        host.write_pairs([], [], [], HEAD)
        host.write_tiles(0, self.rows, [], HEAD)

    def run(self, step: Step, key: PromptKey) -> Tensor:
        sheet, n = self.sheet, key.tokens
        return self.model.forward(step, sheet["ids"][:n], sheet["positions"][:n], sheet["keep"])

    def step(self, key: PromptKey) -> Step:
        sheet, n = self.sheet, key.tokens
        routing = self.routing(key, n, self._tiles(key))
        head = Routing(self.rows, plans=routing.plans if key.whole is not None else self._head_plans(key))
        kv = KvStep(self.kv, sheet["places"][:n], [], None, self._chunks(n))
        return Step(routing, head, kv, given=self.given(key, n))

    def _head_plans(self, key: PromptKey) -> dict[int, Plan]:
        if not key.head or key.added is None:
            return {}
        form, sheet = self._form, self.sheet
        runs = [form.kernels.Run(0, key.head, form.kernels.FEW)]
        tokens, weights, places = (sheet[HEAD + name] for name in ("tokens", "weights", "tiles"))
        tiles = form.tiles(tokens, weights, places, runs, key.added.width)
        return {g.index: self._plan(g, key.added, self.rows, tiles, HEAD) for g in self.model.groups if g.head}

    def _chunks(self, tokens: int) -> Chunks:
        kernels = self.kv.kernels
        if kernels is None:
            raise RuntimeError("prompts are captured where kernels read pages alone")
        sheet = self.sheet
        made: Chunks = kernels.Chunks(sheet["table"], sheet["read"][: self._tiles_of(tokens)], self.kv.page)
        return made

    def _tiles(self, key: PromptKey) -> Tiles | None:
        if key.added is None:
            return None
        form, sheet, n = self._form, self.sheet, key.tokens
        kernels, end = form.kernels, key.many + key.few
        runs = [kernels.Run(0, key.many, kernels.MANY), kernels.Run(key.many, end, kernels.FEW)]
        some = [run for run in runs if run.stop > run.start]
        return form.tiles(sheet["tokens"][:n], sheet["weights"][:n], sheet["tiles"][:end], some, key.added.width)


def _parted(listed: Listed, few: int) -> tuple[Sequence[Place], Sequence[Place]]:
    """The tiles of many tokens and those of few."""
    parts: tuple[list[Place], list[Place]] = ([], [])
    for start, stop, tokens in listed.runs:
        parts[tokens <= few].extend(listed.places[start:stop])
    return parts
