"""The pool of keys and values: one interface, two layouts, over the same flat storage.

Per layer K and V are [places, kv_heads, dim]. A row's token at position p stands at

    slots (CPU)    slot · length + p                           a row owns one contiguous slot: contexts are views
    pages (CUDA)   page_table[p // page] · page + p % page     rows own pages; full prefix pages are shared

New keys are written by flat index in both; only reading and book-keeping differ.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from adapter_server.engine.site import Prefix

LayerShape = tuple[int, int, int]  # kv_heads, key dim, value dim


@dataclass(slots=True, eq=False)
class Lease:
    """A row's places in the pool. `pages[i]` holds positions i·page to (i+1)·page − 1; a slot is one large page."""

    pages: list[int] = field(default_factory=list)
    shared: int = 0  # how many of the first pages belong to a prefix


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
    """Keys and values of all rows. `total` and `used` count tokens."""

    def __init__(
        self, layers: Mapping[int, LayerShape], places: int, page: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.page, self.places, self.device = page, places, device
        self.free = list(range(places // page))[::-1]
        self.keys = {i: _zeros((places, heads, dk), dtype, device) for i, (heads, dk, _) in layers.items()}
        self.values = {i: _zeros((places, heads, dv), dtype, device) for i, (heads, _, dv) in layers.items()}

    @property
    def total(self) -> int:
        return self.places

    @property
    def used(self) -> int:
        return self.places - len(self.free) * self.page

    @abstractmethod
    def start(self, prefix: Prefix | None) -> Lease | None:
        """A lease for a new row, its prefix in place; None when there is no room."""

    def grow(self, lease: Lease, length: int) -> bool:
        """Make room for `length` positions. False, and nothing taken, when the pool is full."""
        need = math.ceil(length / self.page) - len(lease.pages)
        if need > len(self.free):
            return False
        lease.pages += [self.free.pop() for _ in range(need)]
        return True

    def release(self, lease: Lease, scrub: bool = False) -> None:
        """Give a row's places back; `scrub` zeroes them, for a row that may have left NaN behind."""
        own = lease.pages[lease.shared :]
        if scrub and own:
            self._zero(own)
        self.free += own
        lease.pages, lease.shared = [], 0

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
    places: Tensor | None = None  # [n, context], for pages
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by sliding window

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

    def batch(self, layer: int, n: int) -> tuple[Tensor, Tensor]:
        """K, V of the decode rows, each [n, kv_heads, context, dim]."""
        assert self.decodes is not None
        return tuple(  # type: ignore[return-value]
            self._rows(store[layer], n, self.decodes).transpose(1, 2) for store in (self.pool.keys, self.pool.values)
        )

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """K, V of the decode rows in packed order, each [rows, kv_heads, context, dim], as copies."""
        assert self.decodes is not None
        keys, values = self.batch(layer, self.decodes.take.shape[0])
        put = self.decodes.put
        return (keys, values) if put is None else (keys[put], values[put])

    def _rows(self, store: Tensor, n: int, decodes: Decodes) -> Tensor:
        if decodes.places is None:
            return store.view(-1, self.pool.page, *store.shape[1:])[:n, : decodes.context]
        return store.index_select(0, decodes.places.view(-1)).view(n, decodes.context, *store.shape[1:])

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
    """A contiguous slot of `length` places per row: the CPU's layout. A row that was admitted never runs out."""

    def __init__(
        self, layers: Mapping[int, LayerShape], slots: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layers, slots * length, length, dtype, device)

    def grow(self, lease: Lease, length: int) -> bool:
        return length <= self.page

    def start(self, prefix: Prefix | None) -> Lease | None:
        if not self.free:
            return None
        self.free.sort(reverse=True)  # the lowest slot, so that the batch over slots stays tight
        lease = Lease([self.free.pop()])
        if prefix is not None:
            self._write_prefix(lease, prefix, 0)
        return lease

    def plan(self, chunks: Sequence[Chunk], tokens: int) -> KvStep:
        places, prefills, decodes = torch.empty(tokens, dtype=torch.long), [], []
        for chunk in chunks:
            first = chunk.lease.pages[0] * self.page + chunk.past
            places[chunk.start : chunk.start + chunk.count] = torch.arange(first, first + chunk.count)
            if chunk.count == 1:
                decodes.append(chunk)
            else:
                prefills.append((chunk, slice(first - chunk.past, first + chunk.count)))
        return KvStep(self, places.to(self.device), prefills, self._decodes(decodes) if decodes else None)

    def _decodes(self, chunks: Sequence[Chunk]) -> Decodes:
        """The batch is slots 0..n−1; a slot of no decode row reads token 0, and nobody reads its answer."""
        slots = [chunk.lease.pages[0] for chunk in chunks]
        take, lengths = [0] * (max(slots) + 1), [1] * (max(slots) + 1)
        for slot, chunk in zip(slots, chunks, strict=True):
            take[slot], lengths[slot] = chunk.start, chunk.context
        tokens = torch.tensor([chunk.start for chunk in chunks], device=self.device)
        put = torch.tensor(slots, device=self.device)
        return Decodes(
            max(lengths), torch.tensor(lengths, device=self.device), torch.tensor(take, device=self.device), tokens, put
        )


class PagePool(KvPool):
    """Pages of `page` places: CUDA's layout. A prefix's full pages are shared by reference, its last one copied."""

    def __init__(
        self, layers: Mapping[int, LayerShape], pages: int, page: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layers, pages * page, page, dtype, device)
        self._prefixes: dict[Prefix, Lease] = {}
        self._readers: dict[int, int] = {}  # first page of a shared prefix: rows that read it
        self._orphans: dict[int, Lease] = {}

    def start(self, prefix: Prefix | None) -> Lease | None:
        if prefix is None:
            return Lease() if self.free else None
        common = self._shared(prefix)
        if common is None:
            return None
        lease = Lease(list(common.pages), len(common.pages))
        if not self.grow(lease, prefix.tokens):
            return None
        if common.pages:
            self._readers[common.pages[0]] += 1
        if prefix.tokens % self.page:
            self._write_prefix(lease, prefix, prefix.tokens - prefix.tokens % self.page)
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
                self._readers[lease.pages[0]] = 0
            self._prefixes[prefix] = lease
        return self._prefixes[prefix]

    def release(self, lease: Lease, scrub: bool = False) -> None:
        first = lease.pages[0] if lease.shared else None
        super().release(lease, scrub)
        if first is not None:
            self._readers[first] -= 1
            self._sweep(first)

    def forget(self, prefix: Prefix) -> None:
        lease = self._prefixes.pop(prefix, None)
        if lease is not None and lease.pages:
            self._orphans[lease.pages[0]] = lease
            self._sweep(lease.pages[0])

    def reclaim(self) -> bool:
        """Let go of prefixes that no row reads, so that rows find pages. True if there were any."""
        idle = [p for p, lease in self._prefixes.items() if lease.pages and not self._readers[lease.pages[0]]]
        for prefix in idle:
            self.forget(prefix)
        return bool(idle)

    def _sweep(self, first: int) -> None:
        if first in self._orphans and not self._readers[first]:
            self.free += self._orphans.pop(first).pages
            del self._readers[first]

    def plan(self, chunks: Sequence[Chunk], tokens: int) -> KvStep:
        parts = [self.indices(chunk.lease, chunk.past, chunk.context) for chunk in chunks]
        prefills: list[tuple[Chunk, Tensor | slice]] = [
            (chunk, self.indices(chunk.lease, 0, chunk.context)) for chunk in chunks if chunk.count > 1
        ]
        decodes = [chunk for chunk in chunks if chunk.count == 1]
        return KvStep(self, torch.cat(parts), prefills, self._decodes(decodes) if decodes else None)

    def _decodes(self, chunks: Sequence[Chunk]) -> Decodes:
        context = max(chunk.context for chunk in chunks)
        width = math.ceil(context / self.page)
        table = torch.tensor([(c.lease.pages + [0] * width)[:width] for c in chunks], device=self.device)
        at = torch.arange(context, device=self.device)
        tokens = torch.tensor([chunk.start for chunk in chunks], device=self.device)
        lengths = torch.tensor([chunk.context for chunk in chunks], device=self.device)
        return Decodes(context, lengths, tokens, tokens, None, table[:, at // self.page] * self.page + at % self.page)


def bytes_per_token(layers: Mapping[int, LayerShape], dtype: torch.dtype) -> int:
    return sum(heads * (dk + dv) for heads, dk, dv in layers.values()) * dtype.itemsize
