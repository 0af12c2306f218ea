"""From main memory to the device through a ring of page-locked memory, which is allocated once, at start.

    tensors ── memcpy ──> [ piece | piece | … ] ── DMA ──> one extent on the device; the copies are views of it

A device reads at its full speed from page-locked memory alone, and to lock memory while serving takes long and may hold
the device up. So compiled adapters lie in ordinary memory and pass through here: while one piece is under way the next
is filled, and an event says when a piece may be filled again. Were the whole host tier locked instead, a reload would
be spared the copy in main memory, which several threads do, beside the DMA; but all of --host-bytes would be locked at
start, kept from the system for good, and cut up by an allocator of ours, and a cold load would be no shorter.

An extent holds what one group of Linears has of an adapter, and goes once the device has laid that out (joined,
transposed, in its own format). No adapter is one extent for as long as it lives: torch's allocator cuts tensors from
segments of many megabytes that it keeps, so that few loads allocate anything, and a hole suits adapters of any size.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

PIECES = 8
ALIGNED = 64  # bytes: where a tensor begins
Part = tuple[int, Tensor]  # where it goes in a piece, and the bytes


class Event(Protocol):
    """A moment on a stream, as torch.cuda has it."""

    def record(self, stream: torch.cuda.Stream | None) -> None: ...

    def synchronize(self) -> None:
        """Until the moment has come, or at once if there was none."""


class Ring:
    """Page-locked pieces, by turns. Safe to use from several threads, which wait for each other a piece at a time."""

    def __init__(self, memory: Tensor, device: torch.device, event: Callable[[], Event]) -> None:
        """`memory` [bytes], uint8."""
        self.device, self.size = device, len(memory) // PIECES
        pieces = [memory[i * self.size : (i + 1) * self.size] for i in range(PIECES)]
        self._turns = itertools.cycle([(piece, event()) for piece in pieces])
        self._lock = threading.Lock()

    def send(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same tensors on the device, in one extent. The copies are in order on the current stream alone."""
        own = [t.contiguous() for t in tensors]
        ends = list(itertools.accumulate(-(-t.nbytes // ALIGNED) * ALIGNED for t in own))
        starts = [0, *ends[:-1]] if ends else []
        extent = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8, device=self.device)
        parts = _parts([t.view(-1).view(torch.uint8) for t in own], starts, self.size)
        for k, mine in enumerate(parts):
            self._pass(extent[k * self.size : (k + 1) * self.size], mine)
        places = zip(own, starts, strict=True)
        return [extent[start : start + t.nbytes].view(t.dtype).view(t.shape) for t, start in places]

    def _pass(self, window: Tensor, parts: Sequence[Part]) -> None:
        """Fill the next piece, once it is free, and send it to its window of the extent."""
        with self._lock:
            piece, free = next(self._turns)
            free.synchronize()
            for at, part in parts:
                piece[at : at + len(part)].copy_(part)
            self._depart(window, piece[: len(window)])
            free.record(self._stream())

    def _depart(self, window: Tensor, piece: Tensor) -> None:
        window.copy_(piece, non_blocking=True)

    def _stream(self) -> torch.cuda.Stream | None:
        """The current one of the ring's own device, which need not be the current device."""
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None


def ring(size: int, device: torch.device) -> Ring | None:
    """A ring of `size` bytes where there is a device that gains from it; 0: none."""
    if device.type != "cuda" or size < PIECES:
        return None
    memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return Ring(memory, device, lambda: torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]


def _parts(sources: Sequence[Tensor], starts: Sequence[int], size: int) -> list[list[Part]]:
    """Per window of `size` bytes, what of the sources lies in it, each source beginning at its own place."""
    windows: list[list[Part]] = []
    for source, start in zip(sources, starts, strict=True):
        stop = start + len(source)
        for k in range(start // size, -(-stop // size)):
            begin, end = max(start, k * size), min(stop, (k + 1) * size)
            windows += [[] for _ in range(k + 1 - len(windows))]
            windows[k].append((begin - k * size, source[begin - start : end - start]))
    return windows
