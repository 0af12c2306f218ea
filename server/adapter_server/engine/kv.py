"""The pool of keys and values: one interface, two layouts, over the same flat storage.

Per layer K and V are [places, kv_heads, dim]. A row's token at position p stands at

    slots (CPU)    slot · length + p                           a row owns one contiguous slot: contexts are views
    pages (CUDA)   page_table[p // page] · page + p % page     rows own pages; full prefix pages are shared

New keys are written by flat index in both; only reading and book-keeping differ. Blocks that have been computed before
are found in a `BlockCache`: pages are shared in place, slots copy them from cells that stand behind the slots.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from adapter_server.engine.blocks import BlockCache
from adapter_server.engine.placed import Prefix

if TYPE_CHECKING:
    from adapter_server.engine.kernels import Chunks

LayerShape = tuple[int, int, int]  # kv_heads, key dim, value dim


@dataclass(slots=True, eq=False)
class Lease:
    """A row's places in the pool. `pages[i]` holds positions i·page to (i+1)·page − 1; a slot is one large page."""

    pages: list[int] = field(default_factory=list)
    filled: int = 0  # positions that the pool had filled when the row began: its prefix, and blocks known before


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Some new tokens of one row in the step: packed at `start`, at positions `past`.. of the row's `lease`."""

    lease: Lease
    start: int
    count: int
    past: int

    @property
    def context(self) -> int:
        return self.past + self.count


class KvPool(ABC):
    """Keys and values of all rows. `total` and `used` count tokens; `cells` are places that no row's lease has.

    `blocks` knows what has been computed before; None where nothing is kept.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerShape],
        places: int,
        page: int,
        dtype: torch.dtype,
        device: torch.device,
        cells: int = 0,
    ) -> None:
        self.page, self.places, self.device = page, places, device
        self.block = page  # positions of a cached block
        self.blocks: BlockCache | None = None
        self.kernels: ModuleType | None = None  # what reads rows in place, where `forms.attending` has accepted it
        self.free = list(range(places // page))[::-1]
        both = places + cells
        self.keys = {i: _zeros((both, heads, dk), dtype, device) for i, (heads, dk, _) in layers.items()}
        self.values = {i: _zeros((both, heads, dv), dtype, device) for i, (heads, _, dv) in layers.items()}

    @property
    def total(self) -> int:
        return self.places

    @property
    def used(self) -> int:
        return self.places - len(self.free) * self.page

    @abstractmethod
    def start(self, prefix: Prefix | None, keys: Sequence[bytes] = ()) -> Lease | None:
        """A lease for a new row, its prefix and the known of its blocks in place; None when there is no room."""

    @abstractmethod
    def grow(self, lease: Lease, length: int) -> bool:
        """Make room for `length` positions. False, and nothing taken, when the pool is full."""

    @abstractmethod
    def release(self, lease: Lease, scrub: bool = False) -> None:
        """Give a row's places back; `scrub` zeroes them, for a row that may have left NaN behind."""

    @abstractmethod
    def remember(self, lease: Lease, first: int, keys: Sequence[bytes], owners: Sequence[Hashable]) -> None:
        """Keep the row's blocks `first`.. under these keys, for whoever begins with the same."""

    @abstractmethod
    def drop(self, owner: Hashable) -> None:
        """Forget the blocks that depend on this owner."""

    def forget(self, prefix: Prefix) -> None:  # noqa: B027 - only pages share prefixes
        """A prefix is about to go."""

    def _zero(self, pages: Sequence[int]) -> None:
        places = self.indices(Lease(list(pages)), 0, len(pages) * self.page)
        for store in (*self.keys.values(), *self.values.values()):
            store.index_fill_(0, places, 0)

    def indices(self, lease: Lease, start: int, stop: int) -> Tensor:
        """The places of positions start..stop−1."""
        pages = torch.tensor(lease.pages, device=self.device)
        positions = torch.arange(start, stop, device=self.device)
        return pages[positions // self.page] * self.page + positions % self.page

    def write(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v [T, kv_heads, dim] into their places [T]."""
        self.keys[layer].index_copy_(0, places, k)
        self.values[layer].index_copy_(0, places, v)

    def _write_prefix(self, lease: Lease, prefix: Prefix, start: int) -> None:
        places = self.indices(lease, start, prefix.tokens)
        for layer, (k, v) in enumerate(prefix.layers):
            self.write(layer, places, k[start:], v[start:])

    @abstractmethod
    def plan(self, chunks: Sequence[Chunk], tokens: int) -> KvStep:
        """What attention needs to know of a step's chunks; made once, used by every layer."""


@dataclass(slots=True, eq=False)
class Decodes:
    """The rows with one new token, read as one padded batch of n rows and `context` keys.

    `take` [n] is the packed token of each row; `put` [decodes] the batch row of each, in the order of `tokens`.
    """

    context: int
    lengths: Tensor  # [n]
    take: Tensor
    tokens: Tensor
    put: Tensor | None
    table: Tensor | None = None  # [n, pages] int32, for pages
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by sliding window
    _places: Tensor | None = None

    def places(self, page: int) -> Tensor | None:
        """[n, context], for pages; made once a step, and only where keys are gathered."""
        if self._places is None and self.table is not None:
            at = torch.arange(self.context, device=self.table.device)
            self._places = self.table[:, at // page].long() * page + at % page
        return self._places

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[n, 1, 1, context] to be added to the scores."""
        if window not in self.masks:
            at = torch.arange(self.context, device=self.lengths.device)
            seen = at < self.lengths[:, None]
            if window is not None:
                seen &= at >= self.lengths[:, None] - window
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)
            self.masks[window] = bias[:, None, None, :]
        return self.masks[window]


@dataclass(slots=True, eq=False)
class KvStep:
    """One step's view of the pool: where new keys go, and the rows that are read."""

    pool: KvPool
    places: Tensor  # [T]
    prefills: Sequence[tuple[Chunk, Tensor | slice]]  # with the places of the whole context
    decodes: Decodes | None
    chunks: Chunks | None = None  # in place of `prefills`, where kernels read them

    def batch(self, layer: int, n: int) -> tuple[Tensor, Tensor]:
        """K, V of the decode rows, each [n, kv_heads, context, dim]."""
        decodes = self._decoding()
        return tuple(  # type: ignore[return-value]
            self._rows(store[layer], n, decodes).transpose(1, 2) for store in (self.pool.keys, self.pool.values)
        )

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """K, V of the decode rows in packed order, each [rows, kv_heads, context, dim], as copies."""
        decodes = self._decoding()
        keys, values = self.batch(layer, decodes.take.shape[0])
        return (keys, values) if decodes.put is None else (keys[decodes.put], values[decodes.put])

    def _decoding(self) -> Decodes:
        if self.decodes is None:
            raise RuntimeError("no row of this step decodes")
        return self.decodes

    def _rows(self, store: Tensor, n: int, decodes: Decodes) -> Tensor:
        places = decodes.places(self.pool.page)
        if places is None:
            slots = store[: self.pool.places].view(-1, self.pool.page, *store.shape[1:])
            return slots[:n, : decodes.context]
        return store.index_select(0, places.view(-1)).view(n, decodes.context, *store.shape[1:])

    def context(self, layer: int, places: Tensor | slice) -> tuple[Tensor, Tensor]:
        """K, V of one row's context, each [1, kv_heads, context, dim]."""
        return tuple(  # type: ignore[return-value]
            store[layer][places].transpose(0, 1)[None] for store in (self.pool.keys, self.pool.values)
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, since a masked place must never hold a NaN; on the CPU memory is taken only when it is written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


class SlotPool(KvPool):
    """A contiguous slot of `length` places per row: the CPU's layout. A row that was admitted never runs out.

    store   [ slot 0 | slot 1 | … | cells of `block` places each, which hold what has been computed before ]
    """

    def __init__(
        self,
        layers: Mapping[int, LayerShape],
        slots: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        cells: int = 0,
        block: int = 16,
    ) -> None:
        super().__init__(layers, slots * length, length, dtype, device, cells * block)
        self.block = block
        self.blocks = BlockCache() if cells else None
        self._free_cells = list(range(cells))[::-1]

    def grow(self, lease: Lease, length: int) -> bool:
        return length <= self.page

    def start(self, prefix: Prefix | None, keys: Sequence[bytes] = ()) -> Lease | None:
        if not self.free:
            return None
        self.free.sort(reverse=True)  # the lowest slot, so that the batch over slots stays tight
        lease = Lease([self.free.pop()])
        if prefix is not None:
            self._write_prefix(lease, prefix, 0)
            lease.filled = prefix.tokens
        if self.blocks is not None and (cells := self.blocks.find(keys)):
            first = lease.filled // self.block
            self._copy(self._cells(cells), self._slot(lease, first, len(cells)))
            lease.filled = (first + len(cells)) * self.block
        return lease

    def release(self, lease: Lease, scrub: bool = False) -> None:
        if scrub:
            self._zero(lease.pages)
        self.free += lease.pages
        lease.pages = []

    def remember(self, lease: Lease, first: int, keys: Sequence[bytes], owners: Sequence[Hashable]) -> None:
        if self.blocks is None:
            return
        new = [i for i, key in enumerate(keys) if key not in self.blocks]
        cells = [self._free_cells.pop() if self._free_cells else self.blocks.oldest() for _ in new]
        kept = [(i, cell) for i, cell in zip(new, cells, strict=True) if cell is not None]
        if not kept:
            return
        whole = self._slot(lease, first, len(keys)).view(-1, self.block)
        self._copy(whole[[i for i, _ in kept]].view(-1), self._cells([cell for _, cell in kept]))
        for i, cell in kept:
            self.blocks.put(keys[i], cell, owners)

    def drop(self, owner: Hashable) -> None:
        if self.blocks is not None:
            self._free_cells += self.blocks.drop(owner)

    def _slot(self, lease: Lease, first: int, count: int) -> Tensor:
        """The places of a row's blocks first..first + count − 1."""
        at = lease.pages[0] * self.page + first * self.block
        return torch.arange(at, at + count * self.block)

    def _cells(self, cells: Sequence[int]) -> Tensor:
        starts = torch.tensor(cells)[:, None] * self.block + self.places
        return (starts + torch.arange(self.block)).view(-1)

    def _copy(self, source: Tensor, target: Tensor) -> None:
        source, target = source.to(self.device), target.to(self.device)
        for store in (*self.keys.values(), *self.values.values()):
            store.index_copy_(0, target, store.index_select(0, source))

    def plan(self, chunks: Sequence[Chunk], tokens: int) -> KvStep:
        places, prefills, decodes = [0] * tokens, [], []
        for chunk in chunks:
            first = chunk.lease.pages[0] * self.page + chunk.past
            places[chunk.start : chunk.start + chunk.count] = range(first, first + chunk.count)
            if chunk.count == 1:
                decodes.append(chunk)
            else:
                prefills.append((chunk, slice(first - chunk.past, first + chunk.count)))
        at = torch.tensor(places, device=self.device)
        return KvStep(self, at, prefills, self._decodes(decodes) if decodes else None)

    def _decodes(self, chunks: Sequence[Chunk]) -> Decodes:
        """For kernels a slot is a large page. Else the batch is slots 0..n−1; a slot of no decode row reads token 0,
        and nobody reads its answer.
        """
        slots = [chunk.lease.pages[0] for chunk in chunks]
        if self.kernels is not None:
            contexts, tokens = [chunk.context for chunk in chunks], torch.tensor([chunk.start for chunk in chunks])
            table = torch.tensor(slots, dtype=torch.int32)[:, None]
            return Decodes(max(contexts), torch.tensor(contexts), tokens, tokens, None, table)
        take, lengths = [0] * (max(slots) + 1), [1] * (max(slots) + 1)
        for slot, chunk in zip(slots, chunks, strict=True):
            take[slot], lengths[slot] = chunk.start, chunk.context
        tokens = torch.tensor([chunk.start for chunk in chunks], device=self.device)
        put = torch.tensor(slots, device=self.device)
        return Decodes(
            max(lengths), torch.tensor(lengths, device=self.device), torch.tensor(take, device=self.device), tokens, put
        )


class PagePool(KvPool):
    """Pages of `page` places: CUDA's layout. Whoever holds a page counts as its reader; one without readers is free,
    unless it is a cached block, which stays until its place is needed. A prefix's full pages are shared by reference,
    its last one is copied.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerShape],
        pages: int,
        page: int,
        dtype: torch.dtype,
        device: torch.device,
        cached: bool = False,
    ) -> None:
        super().__init__(layers, pages * page, page, dtype, device, page)
        self.nobodys = pages  # the page that rows of padding write to
        self.blocks = BlockCache() if cached else None
        self._prefixes: dict[Prefix, Lease] = {}
        self._readers = [0] * pages

    @property
    def used(self) -> int:
        idle = 0 if self.blocks is None else sum(self._idle(page) for page in self.blocks.cells)
        return super().used - idle * self.page

    def _idle(self, page: int) -> bool:
        return not self._readers[page]

    def grow(self, lease: Lease, length: int) -> bool:
        need = math.ceil(length / self.page) - len(lease.pages)
        if need > len(self.free) and not self._emptied(need - len(self.free)):
            return False
        self._take(lease, [self.free.pop() for _ in range(need)])
        return True

    def _emptied(self, count: int) -> bool:
        """Whether so many cached blocks could go, the oldest first."""
        for _ in range(count):
            page = None if self.blocks is None else self.blocks.oldest(self._idle)
            if page is None:
                return False
            self.free.append(page)
        return True

    def _take(self, lease: Lease, pages: Sequence[int]) -> None:
        for page in pages:
            self._readers[page] += 1
        lease.pages += pages

    def start(self, prefix: Prefix | None, keys: Sequence[bytes] = ()) -> Lease | None:
        lease, common = Lease(), Lease() if prefix is None else self._shared(prefix)
        if common is None:
            return None
        self._take(lease, common.pages)
        if self.blocks is not None:
            self._take(lease, self.blocks.find(keys))
        known = len(lease.pages) * self.page
        lease.filled = max(known, prefix.tokens if prefix else 0)
        if not self.grow(lease, lease.filled):
            self.release(lease)
            return None
        if prefix is not None and known < prefix.tokens:
            self._write_prefix(lease, prefix, known)
        return lease

    def _shared(self, prefix: Prefix) -> Lease | None:
        """The full pages of a prefix, written when the first row asks for them."""
        if prefix not in self._prefixes:
            lease, full = Lease(), prefix.tokens // self.page * self.page
            if not self.grow(lease, full):
                return None
            if full:
                places = self.indices(lease, 0, full)
                for layer, (k, v) in enumerate(prefix.layers):
                    self.write(layer, places, k[:full], v[:full])
            self._prefixes[prefix] = lease
        return self._prefixes[prefix]

    def release(self, lease: Lease, scrub: bool = False) -> None:
        for page in lease.pages:
            self._readers[page] -= 1
        left = [p for p in lease.pages if self._idle(p) and (self.blocks is None or not self.blocks.holds(p))]
        if scrub and left:
            self._zero(left)
        self.free += left
        lease.pages = []

    def remember(self, lease: Lease, first: int, keys: Sequence[bytes], owners: Sequence[Hashable]) -> None:
        if self.blocks is None:
            return
        for key, page in zip(keys, lease.pages[first:], strict=False):
            if key not in self.blocks and not self.blocks.holds(page):
                self.blocks.put(key, page, owners)

    def drop(self, owner: Hashable) -> None:
        if self.blocks is not None:
            self.free += [page for page in self.blocks.drop(owner) if self._idle(page)]

    def forget(self, prefix: Prefix) -> None:
        if lease := self._prefixes.pop(prefix, None):
            self.release(lease)

    def reclaim(self) -> bool:
        """Let go of prefixes that no row reads, so that rows find pages. True if there were any."""
        idle = [p for p, lease in self._prefixes.items() if lease.pages and self._readers[lease.pages[0]] == 1]
        for prefix in idle:
            self.forget(prefix)
        return bool(idle)

    def plan(self, chunks: Sequence[Chunk], tokens: int) -> KvStep:
        parts = [self.indices(chunk.lease, chunk.past, chunk.context) for chunk in chunks]
        several = [chunk for chunk in chunks if chunk.count > 1]
        decodes = [chunk for chunk in chunks if chunk.count == 1]
        step = KvStep(self, torch.cat(parts), [], self._decodes(decodes) if decodes else None)
        if several and self.kernels is not None:
            step.chunks = self._chunks(several, self.kernels)
        else:
            step.prefills = [(chunk, self.indices(chunk.lease, 0, chunk.context)) for chunk in several]
        return step

    def _table(self, chunks: Sequence[Chunk]) -> Tensor:
        """[n, pages] int32: each row's pages, as many as the longest has."""
        width = max(math.ceil(chunk.context / self.page) for chunk in chunks)
        rows = [(c.lease.pages + [0] * width)[:width] for c in chunks]
        return torch.tensor(rows, dtype=torch.int32, device=self.device)

    def _chunks(self, chunks: Sequence[Chunk], kernels: ModuleType) -> Chunks:
        size = kernels.QUERIES
        tiles = [
            (i, chunk.start + at, min(size, chunk.count - at), chunk.past + at)
            for i, chunk in enumerate(chunks)
            for at in range(0, chunk.count, size)
        ]
        made: Chunks = kernels.Chunks(
            self._table(chunks), torch.tensor(tiles, dtype=torch.int32, device=self.device), self.page
        )
        return made

    def _decodes(self, chunks: Sequence[Chunk]) -> Decodes:
        context = max(chunk.context for chunk in chunks)
        table = self._table(chunks)
        tokens = torch.tensor([chunk.start for chunk in chunks], device=self.device)
        lengths = torch.tensor([chunk.context for chunk in chunks], device=self.device)
        return Decodes(context, lengths, tokens, tokens, None, table)


def bytes_per_token(layers: Mapping[int, LayerShape], dtype: torch.dtype) -> int:
    return sum(heads * (dk + dv) for heads, dk, dv in layers.values()) * dtype.itemsize
