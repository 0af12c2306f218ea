"""Whose tokens are whose: the routing of a step, and the context in which a forward runs.

Rows are packed adapter by adapter, so that an adapter is one segment:

    tokens   0 1 2 3 | 4 5 | 6 7 8 | 9
    adapter  (base)  | a   | b     | c       segments: a = 4:6, b = 6:9, c = 9:10

Under composition a token belongs to several segments, each with its weight.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from adapter_server.engine.kv import KvStep
    from adapter_server.engine.operands import More
    from adapter_server.engine.placed import Placed

Use = tuple["Placed", float]  # an adapter laid out on the device, and its weight


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """The tokens of one adapter. `tokens` selects them from x [T, …]; `weights` [n, 1] is None where all are 1."""

    placed: Placed
    tokens: slice | Tensor
    count: int
    weights: Tensor | None
    sole: bool  # none of these tokens carries another adapter
    spans: Sequence[tuple[int, int, float]]  # each row's first token, the one behind its last, and its weight

    @property
    def rows(self) -> Sequence[int]:
        """The tokens of each row in it."""
        return [stop - start for start, stop, _ in self.spans]

    @property
    def alone(self) -> bool:
        """Whether these tokens are the adapter's, whole and alone."""
        return self.sole and self.weights is None


@dataclass(slots=True, eq=False)
class Routing:
    """The segments of T packed tokens, and per site group the plan that was made of them (filled on first use)."""

    tokens: int
    segments: tuple[Segment, ...] = ()
    uses: tuple[tuple[Use, ...], ...] = ()  # the distinct sets of adapters; index 0 is the base's, ()
    each: Sequence[int] = ()  # index into `uses` of each token
    sole_use: int | None = None  # where it is one for all tokens
    composed: bool = False
    plans: dict[int, Any] = field(default_factory=dict)
    shared: dict[Hashable, Any] = field(default_factory=dict)  # what the plans of several groups have in common

    @property
    def plain(self) -> bool:
        """Whether the base alone runs; plans made beforehand, for a captured step, are of adapters yet to be named."""
        return not self.segments and not self.plans

    @property
    def inside(self) -> bool:
        """Whether some adapter acts elsewhere than at Linears."""
        if "inside" not in self.shared:
            self.shared["inside"] = any(segment.placed.acts_inside for segment in self.segments)
        return bool(self.shared["inside"])

    @property
    def unfused(self) -> bool:
        """Whether some adapter acts where fused modules do not look: then every module runs as the base has it."""
        if "unfused" not in self.shared:
            self.shared["unfused"] = any(segment.placed.unfused for segment in self.segments)
        return bool(self.shared["unfused"])

    @property
    def read(self) -> frozenset[str]:
        """Paths of the modules whose input, the residual stream, networks behind blocks read."""
        if "read" not in self.shared:
            patches = [patch for segment in self.segments for patch in segment.placed.groups.values()]
            self.shared["read"] = frozenset(patch.block.reads for patch in patches if patch.block is not None)
        found: frozenset[str] = self.shared["read"]
        return found

    def use_of(self, device: torch.device) -> Tensor:
        """[T] index into `uses`. Made when it is first wanted, which is seldom: to copy it waits for the device."""
        if "use_of" not in self.shared:
            self.shared["use_of"] = torch.tensor(self.each, device=device)
        found: Tensor = self.shared["use_of"]
        return found

    def by_token(self, rows: Tensor) -> Tensor:
        """Rows [uses, width] → [T, width]; [1, width] where all tokens are of one use."""
        if self.sole_use is not None:
            return rows[self.sole_use : self.sole_use + 1]
        return rows.index_select(0, self.use_of(rows.device)) if self.each else rows


def route(rows: Sequence[tuple[int, tuple[Use, ...]]], device: torch.device) -> Routing:
    """A routing from the packed rows: each row's number of tokens, and the adapters on them (none: the base)."""
    total = sum(n for n, _ in rows)
    if not any(uses for _, uses in rows):
        return Routing(total)
    spans: dict[Placed, list[tuple[int, int, float, bool]]] = {}
    distinct: dict[tuple[Use, ...], int] = {(): 0}
    each: list[int] = []
    for n, uses in rows:
        start = len(each)
        each += [distinct.setdefault(uses, len(distinct))] * n
        for placed, weight in uses:
            spans.setdefault(placed, []).append((start, start + n, weight, len(uses) == 1))
    segments = tuple(_segment(placed, parts, device) for placed, parts in spans.items())
    composed = any(len(uses) > 1 for uses in distinct)
    sole = each[0] if len(set(each)) == 1 else None
    return Routing(total, segments, tuple(distinct), each, sole, composed)


def _segment(placed: Placed, spans: list[tuple[int, int, float, bool]], device: torch.device) -> Segment:
    count = sum(stop - start for start, stop, _, _ in spans)
    contiguous = all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    tokens: slice | Tensor = slice(spans[0][0], spans[-1][1])
    if not contiguous:
        tokens = torch.cat([torch.arange(start, stop) for start, stop, _, _ in spans]).to(device)
    weights = None
    if any(weight != 1.0 for _, _, weight, _ in spans):
        each = [weight for start, stop, weight, _ in spans for _ in range(start, stop)]
        weights = torch.tensor(each, device=device)[:, None]
    return Segment(placed, tokens, count, weights, all(sole for *_, sole in spans), [span[:3] for span in spans])


def add_to(y: Tensor, segment: Segment, delta: Tensor) -> None:
    """y [T, …] += delta [n, …] at the segment's tokens."""
    if isinstance(segment.tokens, slice):
        y[segment.tokens].add_(delta)
    else:
        y.index_add_(0, segment.tokens, delta.to(y.dtype))


@dataclass(slots=True, eq=False)
class Step:
    """What one forward needs to know beside its input. `head` routes the tokens that lm_head sees."""

    routing: Routing
    head: Routing
    kv: KvStep | None = None
    capture: dict[int, tuple[Tensor, Tensor]] | None = None  # layer: K, V [n, kv_heads, dim], for a soft prompt
    rope_lengths: Sequence[tuple[int, int]] = ()  # (tokens, length) per row: the length that its RoPE sees
    added: dict[int, Tensor] = field(default_factory=dict)  # by layer: what comes behind an attention [1, T, hidden]
    given: Mapping[str, Tensor] = field(default_factory=dict)  # by module path: outputs that were found beforehand
    streams: dict[str, Tensor] = field(default_factory=dict)  # what taps noted: [1, T, hidden] by module path
    carry: tuple[Tensor, Tensor, More | None] | None = None  # a fused layer's output, and what its reader is to add
    ran: tuple[Tensor, Tensor] | None = None  # cos and sin of the layers, where the first one has run them all


class _Context(threading.local):
    step: Step | None = None


_context = _Context()


def current() -> Step | None:
    return _context.step


@contextmanager
def running(step: Step) -> Iterator[Step]:
    """The step of this thread's forward. Refuses nesting: a forward inside a forward has no rows of its own."""
    if _context.step is not None:
        raise RuntimeError("a step is already running on this thread")
    _context.step = step
    try:
        yield step
    finally:
        _context.step = None
