"""Which rows run in a step, and how many tokens of each: continuous batching with chunked prefill.

    waiting   by turns, fair among adapters; a row whose adapter is still loading steps aside and keeps its turn
    running   one token a step once its prompt is in; before that, chunks of the prompt within the step's token budget

When pages run out, the row admitted last gives its place back and is computed again later (recompute).
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from adapter_server.core import Mode, Request, Top
from adapter_server.engine.blocks import Chain
from adapter_server.engine.guide import Guide
from adapter_server.engine.kv import KvPool, Lease, PagePool
from adapter_server.engine.placed import Placed, Prefix
from adapter_server.engine.pool import Holding
from adapter_server.engine.routing import Use
from adapter_server.engine.sampling import Draw
from adapter_server.engine.tree import Decode
from adapter_server.engine.turns import Turns


@dataclass(slots=True, eq=False)
class Row:
    """A running request: its tokens so far, how many have keys and values, and where those are."""

    request: Request
    tokens: list[int]
    seed: int
    mode: Mode  # of auto, from the start of the row on
    uses: tuple[Use, ...] = ()
    starts: tuple[int, ...] = ()  # aLoRA among them: per use, the first of `tokens` that it acts on
    prefix: Prefix | None = None
    whole: Placed | None = None  # what replaces all weights that it touches, a snapshot: no row runs on less
    held: list[Holding] = field(default_factory=list)
    decode: Decode | None = None  # what PEFT computes of it, in its own lane
    turn: int = 0  # of that lane: the step in which it last had one
    lease: Lease | None = None
    done: int = 0  # of `tokens`
    chain: Chain | None = None  # None: nothing of this row is kept
    cached: int = 0  # tokens of the prompt whose keys and values were known
    started: float | None = None
    loading: float | None = None  # since when it waits for its adapter
    load_s: float = 0.0
    first: float | None = None  # when its first token came
    guide: Guide | None = None
    rated: list[tuple[float, Top]] = field(default_factory=list)  # of the prompt's tokens, from the second

    @classmethod
    def of(cls, request: Request) -> Row:
        seed = request.sampling.seed
        mode: Mode = "unmerged" if request.mode == "auto" else request.mode
        return cls(request, list(request.prompt), secrets.randbits(63) if seed is None else seed, mode)

    @property
    def offset(self) -> int:
        """Positions taken before the prompt, by a prefix or a soft prompt."""
        return self.prefix.tokens if self.prefix else 0

    @property
    def shift(self) -> int:
        """The position of the prompt's first token."""
        return self.prefix.tokens if self.prefix and self.prefix.shifts else 0

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.done

    @property
    def emitted(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def unrated(self) -> bool:
        """Whether logits of the prompt's own tokens are wanted still."""
        return self.request.sampling.prompt_logprobs > 0 and len(self.rated) < len(self.request.prompt) - 1

    @property
    def border(self) -> int:
        """How many of `tokens` are done that stand before the last adapter's start."""
        return min(self.done, max(self.starts, default=0))

    @property
    def acts(self) -> float:
        """The first of `tokens` whose keys and values depend on an adapter; inf where none does."""
        if not self.uses and self.prefix is None:
            return math.inf
        return min(self.starts, default=0) if self.prefix is None else 0

    @property
    def acting(self) -> tuple[tuple[tuple[str, str], int], ...]:
        """Which adapters act from their start on, and where that is."""
        keys = (placed.adapter.spec.key for placed, _ in self.uses)
        return tuple(zip(keys, self.starts, strict=True)) if self.starts else ()

    def routed(self, start: int, stop: int) -> list[tuple[int, tuple[Use, ...]]]:
        """Tokens start..stop−1 in runs of one set of adapters: (how many, which)."""
        if not self.starts:
            return [(stop - start, self.uses)]
        cuts = sorted({start, stop, *(s for s in self.starts if start < s < stop)})
        return [(b - a, self._at(a)) for a, b in itertools.pairwise(cuts)]

    def _at(self, token: int) -> tuple[Use, ...]:
        return tuple(use for use, start in zip(self.uses, self.starts, strict=True) if start <= token)

    @property
    def draw(self) -> Draw:
        mask = None if self.guide is None else self.guide.mask
        return Draw(self.request.sampling, self.seed, self.tokens, len(self.request.prompt), mask)


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """What one row does in a step: `count` of its pending tokens. `last` when none remains, so that it samples."""

    row: Row
    count: int

    @property
    def last(self) -> bool:
        return self.count == self.row.pending

    @property
    def routed(self) -> list[tuple[int, tuple[Use, ...]]]:
        return self.row.routed(self.row.done, self.row.done + self.count)

    @property
    def rated(self) -> range:
        """Of which of its tokens the logits are wanted because of the prompt's token that follows; counted from 0."""
        row = self.row
        if not row.unrated:
            return range(0)
        first = max(row.done, len(row.rated))
        return range(first - row.done, min(self.count, len(row.request.prompt) - 1 - row.done))

    @property
    def kept(self) -> range:
        """The tokens whose logits are wanted; the last of them samples, if this slice does."""
        rated = self.rated
        if not rated:
            return range(self.count - self.last, self.count)
        return range(rated.start, rated.stop + self.last)


@dataclass(slots=True)
class Scheduler:
    """The waiting and the running rows. `admit` says whether a row's adapter is ready, and readies the row.

    `starved` says that a row has waited long for device memory that running adapters hold: then nobody overtakes it, so
    that those rows end and make room.
    """

    kv: KvPool
    max_rows: int
    max_tokens: int
    admit: Callable[[Row], bool]
    starved: Callable[[Row], bool] = lambda row: False
    waiting: Turns = field(default_factory=Turns)
    running: list[Row] = field(default_factory=list)
    preemptions: int = 0

    def plan(self) -> list[Slice]:
        """The step: every decode first, then prompts under way, then new rows, within the token budget."""
        decodes = [Slice(row, 1) for row in list(self.running) if row.pending == 1 and self._grown(row)]
        decodes = [s for s in decodes if s.row.lease is not None]  # a later row may have taken an earlier one's place
        budget = self.max_tokens - len(decodes)
        prefills: list[Slice] = []
        for row in [*(r for r in self.running if r.pending > 1), *self._admitted(budget)]:
            if (count := min(row.pending, budget)) > 0:
                prefills.append(Slice(row, count))
                budget -= count
        return decodes + prefills

    def _grown(self, row: Row) -> bool:
        """Room for one more token; where there is none, the rows admitted last make it."""
        while row.lease is not None and not self.kv.grow(row.lease, row.offset + len(row.tokens)):
            if not self._reclaim():
                self._preempt(self.running[-1])
        return row.lease is not None

    def _reclaim(self) -> bool:
        return isinstance(self.kv, PagePool) and self.kv.reclaim()

    def _preempt(self, row: Row) -> None:
        self.release(row)
        self.waiting.appendleft(row)
        self.preemptions += 1

    def _admitted(self, budget: int) -> list[Row]:
        """New rows, in the order of their turns, while tokens, places and rows last."""
        budget -= sum(min(r.pending, budget) for r in self.running if r.pending > 1)
        admitted: list[Row] = []
        for row in self.waiting.next():
            if budget <= 0 or len(self.running) >= self.max_rows:
                break
            if not self.admit(row):
                if self.starved(row):
                    break
                continue
            if not self._start(row):
                break
            self.waiting.began(row)
            self.running.append(row)
            admitted.append(row)
            budget -= row.pending
        return admitted

    def _start(self, row: Row) -> bool:
        """Places for the prefix and all tokens known so far, other prefixes' that nobody reads among them."""
        row.lease = self._leased(row) or (self._leased(row) if self._reclaim() else None)
        return row.lease is not None

    def _leased(self, row: Row) -> Lease | None:
        lease = self.kv.start(row.prefix, self._known(row))
        if lease is None or self.kv.grow(lease, row.offset + len(row.tokens)):
            row.done = 0 if lease is None else lease.filled - row.offset
            row.cached = row.cached if row.emitted else row.done
            return lease
        self.kv.release(lease)
        return None

    def _known(self, row: Row) -> list[bytes]:
        """The keys of the blocks that may be known: all but the last token's, whose logits are wanted; or all are."""
        if self.kv.blocks is None or row.decode is not None:
            return []
        row.chain = row.chain or Chain.of(row.request, row.mode, self.kv.block, row.offset, row.acts, row.acting)
        return [] if row.unrated else row.chain.upto(row.tokens, len(row.tokens) - 1)

    def remember(self, row: Row) -> None:
        """Keep what has been computed of this row, for those that begin with the same."""
        if row.chain is not None and row.lease is not None:
            owners = [m.spec.key for m in row.request.members]
            self.kv.remember(row.lease, row.chain.first, row.chain.upto(row.tokens, row.done), owners)

    def release(self, row: Row, scrub: bool = False) -> None:
        """Take a row out of the step's reach, with all that it holds here."""
        if row in self.running:
            self.running.remove(row)
            self.waiting.ended(row)
        elif row in self.waiting:
            self.waiting.remove(row)
        if row.lease is not None:
            self.kv.release(row.lease, scrub)
        row.lease, row.done = None, 0
