"""The engine: requests in, events out, one forward a step for every row of every adapter.

step():  poll loads → drop the late → plan → forward → sample → advance
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapter_server.config import EngineConfig
from adapter_server.core import Event, Finished, FinishReason, Folded, Info, Loaded, Op, Request, Spec, Stats, Token
from adapter_server.engine import forms
from adapter_server.engine.auto import Auto
from adapter_server.engine.device import device_of
from adapter_server.engine.graphs import Flight, Graphs
from adapter_server.engine.guide import Guides
from adapter_server.engine.host import Host
from adapter_server.engine.kv import Chunk, KvPool, PagePool, SlotPool
from adapter_server.engine.model import Model, context_length, load
from adapter_server.engine.pauses import crowded
from adapter_server.engine.peft_lane import prepare
from adapter_server.engine.placed import Placed, Prefix
from adapter_server.engine.pool import Pool
from adapter_server.engine.profile import Profile, part
from adapter_server.engine.prompts import Prompts
from adapter_server.engine.ring import ring
from adapter_server.engine.routing import Routing, Step, route
from adapter_server.engine.sampling import Chosen, Draw, Kernel, choose, rate
from adapter_server.engine.scheduler import Row, Scheduler, Slice
from adapter_server.engine.tree import Decode
from adapter_server.errors import (
    AdapterServerError,
    BaseNotSupported,
    DeadlineExceeded,
    InvalidRequest,
    PromptTooLong,
    RequestFailed,
)
from adapter_server.families import known
from adapter_server.families.base import Adapter
from adapter_server.registry.store import Store

PATIENCE_S = 1.0  # that a loaded adapter waits for room before its rows hold up later ones
SMALL_BASE = 8_000_000  # parameters: below, one thread is faster than two (seen: 1.5-2.5 times at 1.3M)
TASKS_KEPT = 16  # of one adapter with skills, on the device
TURNS = 4  # rows of the peft lane that get a token in one step, so that packed rows need not wait for all of them
ROUTINGS_KEPT = 8  # groups of rows that may take turns
SLOTS_AT_LEAST = 16  # rows that the automatic context length leaves room for


def build(model: str | Path, config: EngineConfig, store: Store, name: str | None = None) -> Engine:
    """Load a base and make it ready; it goes by `name`, or its folder's, or its hub id.

    Raises BaseNotSupported, PlugInBroken.
    """
    known()  # a broken plug-in is told of before minutes of loading
    device = device_of(config.device)
    name = name or (Path(model).resolve().name if Path(model).exists() else str(model))
    return Engine(load(model, config.dtype, device, config.quantize), config, store, name, tokenizer=model)


class Engine:
    """One base, its pool of adapters, its rows. Everything here is called by one thread."""

    def __init__(
        self,
        module: PreTrainedModel,
        config: EngineConfig,
        store: Store,
        name: str = "base",
        tokenizer: str | Path | None = None,
    ) -> None:
        self.config = config
        _turn_to(module.device)
        if threads := config.threads or _few_threads(module):
            torch.set_num_threads(threads)
        self.model = prepare(module, config.pack_weights, _adapter_dtype(module, config), config.kernels, config.fuse)
        self.kv, length = self._kv()
        self.draw = forms.drawing(self.model.device, self.model.dtype, config.kernels)
        self.graphs, self.prompts = self._graphs(length)
        self.info = _info(module, self.model, name, length)
        self.guides = Guides(tokenizer, self.info.vocab, self.info.eos, config.max_grammar_bytes)
        self.model.ring = ring(config.ring_bytes, self.model.device)
        tight = crowded(self.model.device)
        host = Host(config.host_bytes)
        self.pool = Pool(
            self.model, store, config.adapter_bytes, host, running=lambda: tight and bool(self.scheduler.running)
        )
        self.pool.on_evict = self._evicted
        self.scheduler = Scheduler(self.kv, config.max_rows, config.max_step_tokens, self._admit, self._starved)
        self.profile = None if config.profile is None else Profile(config.profile)
        self.steps = 0
        self.forming: list[Row] = []  # whose constraint is being compiled
        self._rows: dict[str, Row] = {}
        self._doomed: list[tuple[Row, AdapterServerError]] = []
        self.auto = Auto(self.pool, self._rows, config.max_rows, config.auto_merge)
        self._routings: dict[tuple[tuple[Row, int, int], ...], tuple[list[int], Routing]] = {}  # order, routing
        self._flight: Flight | None = None  # the step whose tokens are still to be read
        self._landed_at = 0.0
        self._unread = False  # whether a step may be under way that nobody has waited for, nor will

    def _kv(self) -> tuple[KvPool, int]:
        """The pool that the budget allows, and the context length: the base's own, or what leaves room for rows."""
        config, model = self.config, self.model
        places = config.kv_bytes // model.token_bytes
        length = min(
            context_length(model.module.config.get_text_config()),
            config.max_model_len or max(512, places // SLOTS_AT_LEAST),
        )
        if places < length:
            raise BaseNotSupported(
                f"{config.kv_bytes:,} bytes hold the keys and values of {places} tokens, a context has {length}: "
                "raise --kv-bytes or lower --max-model-len"
            )
        cached = config.prefix_cache_bytes if model.stable_rope else 0
        layout = config.kv_layout if config.kv_layout != "auto" else "slots" if model.device.type == "cpu" else "pages"
        if layout == "slots":
            slots = min(config.max_rows, places // length)
            cells = cached // (model.token_bytes * config.page_tokens)
            slot_pool = SlotPool(
                model.layers, slots, length, model.dtype, model.device, cells, config.page_tokens
            )  # fmt: skip
            slot_pool.kernels = self._attending(slots=True)
            return slot_pool, length
        pages = places // config.page_tokens
        page_pool = PagePool(model.layers, pages, config.page_tokens, model.dtype, model.device, cached > 0)
        page_pool.kernels = self._attending(slots=False)
        return page_pool, length

    def _attending(self, slots: bool) -> ModuleType | None:
        """What reads a layout in place, where there is such and the lane asks for it."""
        config, model = self.config, self.model
        if model.lane != "packed":
            return None
        heads, shapes = model.module.config.get_text_config().num_attention_heads, model.layers.values()
        return forms.attending(model.device, model.dtype, shapes, heads, config.page_tokens, config.kernels, slots)

    def _graphs(self, length: int) -> tuple[Graphs | None, Prompts | None]:
        """Captured steps, where attention and the low rank have kernels, and a key does not depend on the row's end."""
        model, kv, config = self.model, self.kv, self.config
        captures = config.graphs and isinstance(kv, PagePool) and kv.kernels is not None
        if not captures or not isinstance(kv, PagePool) or not model.stable_rope:
            return None, None
        memory = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None
        return (
            Graphs(model, kv, config.max_rows, length, memory, self.draw),
            Prompts(model, kv, config.max_rows, length, config.max_step_tokens, memory),
        )

    # Requests

    def submit(self, request: Request) -> None:
        """Queue a request, and begin loading its adapters. Raises InvalidRequest, PromptTooLong."""
        self._check(request, offset=0)
        row = Row.of(request)
        constraint = request.sampling.constraint
        row.guide = None if constraint is None else self.guides.want(constraint)
        self._rows[request.id] = row
        if row.guide is None:
            self._queue(row)
        else:
            self.forming.append(row)

    def _queue(self, row: Row) -> None:
        self.scheduler.waiting.append(row)
        merged, auto = self._merged(row, time.monotonic()), row.request.mode == "auto"
        row.held = [self.pool.claim(m.spec, merged, auto) for m in row.request.members]
        row.loading = None if all(h.live for h in row.held) else time.monotonic()

    def _merged(self, row: Row, now: float) -> bool:
        """Whether a row that has not started yet takes a snapshot."""
        return self.auto.merges(row, now) if row.request.mode == "auto" else row.mode == "merged"

    def _check(self, request: Request, offset: int) -> None:
        if not request.prompt or not all(0 <= t < self.info.vocab for t in request.prompt):
            raise InvalidRequest("prompt: token ids must be one or more of the base's vocabulary", param="prompt")
        room = min(self.info.max_model_len, self.kv.total) - offset
        if len(request.prompt) + request.sampling.max_new_tokens > room:
            raise PromptTooLong(
                f"{len(request.prompt)} prompt tokens and max_new_tokens {request.sampling.max_new_tokens} do not fit "
                f"the {room} tokens of context{' that the adapter leaves' if offset else ''}: shorten the prompt",
                param="prompt",
            )

    def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> list[Event]:
        """End a request now; its place is free for the next step."""
        row = self._rows.get(request_id)
        return [] if row is None else [self._finish(row, reason)]

    def call(self, op: Op, spec: Spec) -> Future[None]:
        """An operator's word on an adapter; the future ends when it is done."""
        done: Future[None] = Future()
        try:
            self._call(op, spec, done)
        except AdapterServerError as error:
            done.set_exception(error)
        return done

    def _call(self, op: Op, spec: Spec, done: Future[None]) -> None:
        if op == "load":
            self.pool.want(spec, waiter=done)
        elif op == "merge":
            self.pool.check_mergeable(spec)
            self.pool.want(spec, merged=True, waiter=done)
        elif op == "unload":
            self.pool.unload(spec, done)
        elif op == "pin":
            self.pool.pin(spec, done)
        else:
            (self.pool.unmerge if op == "unmerge" else self.pool.unpin)(spec)
            done.set_result(None)

    # The step

    @property
    def busy(self) -> bool:
        """Whether a step would have something to do, beside waiting for loads."""
        return bool(self._rows)

    def step(self) -> list[Event]:
        """One forward for all rows that can run. Events in the order in which they came about."""
        _turn_to(self.model.device)
        events = [*self._settled(), *self._formed(), *self._expired(time.monotonic())]
        if self._flight is not None:
            return events + self._seen(functools.partial(self._fly, self._flight))
        with part("plan"):
            slices = self.auto.turn(self.scheduler.plan())
        events += self._failed(self._doomed)
        self._doomed = []
        if slices:
            events += self._seen(functools.partial(self._run, slices))
        return events

    def _seen(self, work: Callable[[], list[Event]]) -> list[Event]:
        """A step's work, for whoever profiles it."""
        if self.profile is None:
            return work()
        self.profile.before()
        events = work()
        self.profile.after()
        self.profile = None if self.profile.done else self.profile
        return events

    # Steps that are launched before the last one's tokens have been read

    def _took_off(self, slices: list[Slice]) -> bool:
        """Launch a step of single tokens and come back at once, where the tokens are all that is wanted."""
        if self.graphs is None or not all(_flies(s.row, self.draw is not None) for s in slices):
            return False
        ordered, routing = self._routed(slices)
        if not self.graphs.fit(ordered, routing):
            return False
        self._flight = self.graphs.launch(ordered, routing, None, _any_drawn(ordered))
        self._landed_at = time.perf_counter()
        return self._flight is not None

    def _fly(self, flight: Flight) -> list[Event]:
        """Launch the step after `flight`, whose tokens are its input, then read those. That a row has ended is seen a
        step late, and what it got in that step is dropped.
        """
        self._flight = None
        try:
            with part("route"):
                following = self._following(flight)
            with part("sampling"):
                chosen = flight.chosen()
        except Exception as error:
            return self._lost(flight.slices, error)
        self._flight = following
        now, before = time.perf_counter(), self._landed_at
        self._landed_at = now
        with part("events"):
            going = [(s, c) for s, c in zip(flight.slices, chosen, strict=True) if s.row.lease is not None]
            events = self._advance([s for s, _ in going], [c for _, c in going])
        if going:  # else the engine may have been idle since
            self.auto.ran(flight.slices, now - before)
        return events

    def _following(self, flight: Flight) -> Flight | None:
        """The next step, launched; None where there is something to plan first."""
        rows = [s.row for s in flight.slices if s.row.lease is not None and not _is_full(s.row)]
        if self.graphs is None or not rows or self._must_plan(flight, rows):
            return None
        slices, routing = self._routed([Slice(row, 1) for row in rows])
        if not self.graphs.fit(slices, routing):
            return None
        following = self.graphs.launch(slices, routing, flight, _any_drawn(slices))
        self.steps += following is not None
        return following

    def _must_plan(self, flight: Flight, rows: Sequence[Row]) -> bool:
        scheduler = self.scheduler
        if any(row not in flight.index for row in scheduler.running):
            return True
        if scheduler.waiting and len(scheduler.running) < scheduler.max_rows:
            return True
        return not all(row.lease and self.kv.grow(row.lease, row.offset + len(row.tokens) + 1) for row in rows)

    def _settled(self) -> list[Event]:
        """News of loads, and the end of the rows whose adapter failed."""
        news = self.pool.poll()
        if any(isinstance(e, Loaded | Folded) and e.error for e in news):
            lost = [(r, h.error) for r in self.scheduler.waiting for h in r.held if h.error is not None]
            return [*news, *self._failed(dict(lost).items())]
        return news

    def _formed(self) -> list[Event]:
        """Rows whose constraint is compiled wait with the others now; those whose constraint was refused end."""
        ready: list[Row] = []
        forming: list[Row] = []
        for row in self.forming:
            (ready if row.guide is None or row.guide.ready else forming).append(row)
        self.forming = forming
        refused = [(row, row.guide.error) for row in ready if row.guide is not None and row.guide.error is not None]
        for row in ready:
            if row.guide is None or row.guide.error is None:
                self._queue(row)
        return self._failed(refused)

    def _expired(self, now: float) -> list[Event]:
        late = [r for r in self._rows.values() if r.request.deadline is not None and now > r.request.deadline]
        return [self._finish(row, "timeout") for row in late]

    def _failed(self, rows: Iterable[tuple[Row, AdapterServerError]]) -> list[Event]:
        return [self._finish(row, "error", error) for row, error in list(rows)]

    def _admit(self, row: Row) -> bool:
        """Whether a waiting row's adapters are on the device; if so, lay them on the row."""
        if row.started is not None:
            return True
        now = time.monotonic()
        merged, auto = self._merged(row, now), row.request.mode == "auto"
        row.held = [self.pool.renew(h, merged, auto) for h in row.held]
        if not all(h.live for h in row.held):
            row.loading = row.loading or now
            return False
        try:
            self._lay(row)
        except AdapterServerError as error:
            self._doomed.append((row, error))
            return False
        if auto:
            row.mode = "merged" if merged else "unmerged"
            self.auto.decisions[row.mode] += 1
        row.started = now
        row.load_s = 0.0 if row.loading is None else now - row.loading
        for holding in row.held:
            self.pool.hold(holding)
        return True

    def _starved(self, row: Row) -> bool:
        late = row.loading is not None and time.monotonic() - row.loading > PATIENCE_S
        return late and any(self.pool.is_crowded_out(h) for h in row.held)

    def _lay(self, row: Row) -> None:
        """Set a row's adapters and what stands before its prompt. Raises InvalidRequest, PromptTooLong."""
        request = row.request
        placed = [h.placed for h in row.held if h.placed is not None]
        weights = [m.weight for m in request.members]
        weighted = [(p, w) for each, w in zip(placed, weights, strict=True) for p in self._parts(each, request.task_id)]
        started = [(p, w, p.adapter.start(request.prompt)) for p, w in weighted]
        acting = [(p, w, start) for p, w, start in started if start is not None and p.acts]
        row.uses = tuple((p, w) for p, w, _ in acting)
        row.whole = row.uses[0][0] if len(row.uses) == 1 and row.uses[0][1] == 1 and row.uses[0][0].replaces else None
        row.starts = tuple(start for *_, start in acting) if any(start for *_, start in acting) else ()
        before = [p for p in placed if p.prefixes or p.adapter.embeds is not None or p.adapter.tasks]
        if len(before) > 1:
            raise InvalidRequest("a request carries at most one prefix or soft prompt", param="adapter")
        row.prefix = self._prefix(before[0], request.task_id) if before else None
        row.decode = self._decode(request, placed, weights)
        self._check(request, row.offset)

    def _decode(self, request: Request, placed: Sequence[Placed], weights: Sequence[float]) -> Decode | None:
        """PEFT's part, for a row of its lane. Raises InvalidRequest for what has no meaning there."""
        trees = [p.tree for p in placed] or [self.model.plain]
        tree = next(filter(None, trees), None)
        if tree is None:
            return None
        if len(placed) > 1:
            raise InvalidRequest("an adapter of the peft lane has no sum with others: ask it alone", param="adapter")
        if request.sampling.prompt_logprobs:
            raise InvalidRequest("the peft lane rates no prompts: leave prompt_logprobs out", param="prompt_logprobs")
        weight = weights[0] if weights else 1.0
        tree.check(weight, request.task_id)
        return Decode(tree, request.prompt, request.task_id, weight)

    def _prefix(self, placed: Placed, task_id: int | None) -> Prefix:
        """An adapter's keys and values; a soft prompt's are computed when they are first asked for."""
        tasks, embeds = placed.adapter.tasks, placed.adapter.embeds
        key = _task(placed.adapter, task_id)
        if key not in placed.prefixes:
            soft = embeds if key is None else tasks[key]
            if soft is None:
                raise RequestFailed("the adapter stands before the prompt and has nothing to put there")
            if len(soft) >= self.info.max_model_len:
                raise PromptTooLong(f"the adapter's {len(soft)} virtual tokens fill the context", param="adapter")
            placed.prefixes[key] = self.model.encode(soft)
            self.pool.recount(placed)
        return placed.prefixes[key]

    def _parts(self, placed: Placed, task_id: int | None) -> list[Placed]:
        """An adapter and, where it has skills, what they are for the task: mixed when it is first asked for."""
        if not placed.adapter.skills:
            return [placed]
        key = _task(placed.adapter, task_id)
        if key is None:
            raise RequestFailed("the adapter says that it has tasks, and has none")
        mixed = placed.tasks.pop(key, None) or self.model.place(placed.adapter.mixed(key))
        if len(placed.tasks) >= TASKS_KEPT:
            self._routings.clear()
            self.model.forget(placed.tasks.pop(next(iter(placed.tasks))))
        placed.tasks[key] = mixed
        self.pool.recount(placed)
        return [placed, mixed]

    def _evicted(self, placed: Placed) -> None:
        if self._unread:  # it may read the adapter still, whose memory is a loader's from here on
            _wait(self.model.device)
            self._unread = False
        self._routings.clear()  # its rows hold what they ran on
        for captured in (self.graphs, self.prompts):
            if captured is not None:
                captured.forget(placed)
        self.auto.forget()
        self.kv.drop(placed.adapter.spec.key)
        for prefix in placed.prefixes.values():
            self.kv.forget(prefix)

    def _run(self, slices: list[Slice]) -> list[Event]:
        """The packed rows in one step, then those of the peft lane whose turn it is."""
        self.steps += 1
        try:
            if self._took_off(slices):
                return []
        except Exception as error:
            return self._lost(slices, error)
        packed = [s for s in slices if s.row.decode is None]
        alone = sorted((s for s in slices if s.row.decode is not None), key=lambda s: s.row.turn)
        events = self._run_timed(packed) if packed else []
        for s in alone[:TURNS]:
            events += self._run_alone(s)
        return events

    def _run_timed(self, slices: list[Slice]) -> list[Event]:
        start = time.perf_counter()
        events = self._run_packed(slices)
        self.auto.ran(slices, time.perf_counter() - start)
        return events

    def _run_packed(self, slices: list[Slice]) -> list[Event]:
        """Forward and sample; a failure of the whole step ends its rows and nothing else."""
        try:
            slices, chosen = self._forward(slices)
        except Exception as error:
            return self._lost(slices, error)
        with part("events"):
            return self._advance(slices, chosen)

    def _lost(self, slices: Sequence[Slice], error: Exception) -> list[Event]:
        """The step has failed: so have its rows, those that had not ended, and no other."""
        self._unread = True
        self._routings.clear()
        return [self._finish(s.row, "error", _crashed(error), scrub=True) for s in slices if s.row.lease is not None]

    def _run_alone(self, s: Slice) -> list[Event]:
        """One row of the peft lane. Its kinds need not be causal: the prompt is read at once, with its last chunk."""
        s.row.turn = self.steps
        if not s.last or s.row.decode is None:
            return self._advance([s], [])
        try:
            with torch.inference_mode():
                if s.row.guide is not None:
                    self.guides.look([s.row.guide])()
                chosen = _chosen(s.row.decode.logits(s.row.tokens), [s.row.draw], self.draw)
        except Exception as error:
            return [self._finish(s.row, "error", _crashed(error))]
        return self._advance([s], chosen)

    def _forward(self, slices: list[Slice]) -> tuple[list[Slice], list[Chosen]]:
        """The step's forward, or a lane's several; the slices come back with a token for each that samples."""
        guides = [s.row.guide for s in slices if s.last and s.row.guide is not None]
        looked = self.guides.look(guides) if guides else None
        parts = [[slices[i] for i in places] for places in self.model.split([s.count for s in slices])]
        done = [self._packed(each) for each in parts]
        chosen: list[Chosen] = []
        if logits := [each for _, each in done if each is not None]:
            with part("sampling"):
                if looked is not None:
                    looked()
                draws = [s.row.draw for ran, _ in done for s in ran if s.last]
                chosen = _chosen(torch.cat(logits), draws, self.draw)
        self._unread = not chosen
        return [s for ran, _ in done for s in ran], chosen

    def _packed(self, slices: list[Slice]) -> tuple[list[Slice], Tensor | None]:
        """One forward; the slices in packed order, and the logits of those that sample."""
        with part("route"):
            slices, routing = self._routed(slices)
        if (logits := self._captured(slices, routing)) is not None:
            return slices, logits if len(logits) else None
        chunks: list[Chunk] = []
        ids: list[int] = []
        positions: list[int] = []
        keep: list[int] = []
        rates = False
        for s in slices:
            row, start = s.row, s.row.offset + s.row.done
            if row.lease is None:
                raise RuntimeError("a row without a lease was planned")
            chunks.append(Chunk(row.lease, len(ids), s.count, start))
            ids += row.tokens[row.done : row.done + s.count]
            positions += range(row.shift + row.done, row.shift + row.done + s.count)
            if row.unrated:
                rates = True
                keep += [len(ids) - s.count + i for i in s.kept]
            elif s.last:
                keep.append(len(ids) - 1)
        device = self.model.device
        step = Step(routing, self._head(slices, routing), self.kv.plan(chunks, len(ids)), rope_lengths=_lengths(slices))
        ids_, positions_ = (torch.tensor(v, device=device) for v in (ids, positions))
        with part("forward"):
            logits = self.model.forward(step, ids_, positions_, torch.tensor(keep or [0], device=device))
        if rates:
            return slices, _sampled(slices, logits)
        return slices, logits if keep else None

    def _captured(self, slices: list[Slice], routing: Routing) -> Tensor | None:
        """The logits of the rows that sample, by a captured step; None where none holds this."""
        if self.graphs is None or self.prompts is None:
            return None
        with part("forward"):
            if self.graphs.fit(slices, routing):
                flight = self.graphs.launch(slices, routing)
                return None if flight is None else flight.logits[: len(slices)]
            fits = self.prompts.fit(slices, routing)
            return self.prompts.launch(slices, routing, self._head(slices, routing)) if fits else None

    def _routed(self, slices: list[Slice]) -> tuple[list[Slice], Routing]:
        """The slices adapter by adapter, and their routing: an earlier step's, while the same rows do the same."""
        key = tuple((s.row, s.count, s.row.border) for s in slices)
        if (known := self._routings.pop(key, None)) is not None:
            self._routings[key] = known
            return [slices[i] for i in known[0]], known[1]
        runs = [s.routed for s in slices]
        places = self.model.lowrank.arrange([(s.count, r[-1][1]) for s, r in zip(slices, runs, strict=True)])
        routing = route([run for i in places for run in runs[i]], self.model.device)
        if len(self._routings) >= ROUTINGS_KEPT:
            del self._routings[next(iter(self._routings))]
        self._routings[key] = places, routing
        return [slices[i] for i in places], routing

    def _head(self, slices: Sequence[Slice], routing: Routing) -> Routing:
        """lm_head sees one token of each row that samples, and those that rate the prompt's."""
        if len(slices) == routing.tokens and all(s.last for s in slices):
            return routing
        runs = [
            run
            for s in slices
            if (kept := s.kept)
            for run in s.row.routed(s.row.done + kept.start, s.row.done + kept.stop)
        ]
        return route(runs or [(1, ())], self.model.device)

    def _advance(self, slices: Sequence[Slice], chosen: Sequence[Chosen]) -> list[Event]:
        now, events, answers = time.monotonic(), [], iter(chosen)
        for s in slices:
            samples = s.last
            s.row.done += s.count
            if samples:
                events += self._emit(s.row, next(answers), now)
        return events

    def _emit(self, row: Row, chosen: Chosen, now: float) -> list[Event]:
        if not chosen.ok or (row.guide is not None and row.guide.error is not None):
            return [self._finish(row, "error", _failure(row, chosen), scrub=True)]
        if row.unrated:
            said = "the lane of this adapter tells no logprobs of a prompt: leave them out"
            return [self._finish(row, "error", InvalidRequest(said, param="prompt_logprobs"))]
        if row.first is None:
            row.first = now
            self.scheduler.remember(row)
        row.tokens.append(chosen.id)
        self.scheduler.waiting.charge(row)
        if row.shift + len(row.tokens) - 1 == self.model.rope_border:
            row.done = 0  # its keys are of other frequencies from here on
        rated = tuple(row.rated) if row.emitted == 1 else ()
        mode = row.mode if row.emitted == 1 else None
        token = Token(row.request.id, row.emitted - 1, chosen.id, chosen.logprob, chosen.top, rated, mode)
        reason = self._reason(row, chosen.id)
        return [token] if reason is None else [token, self._finish(row, reason)]

    def _reason(self, row: Row, id: int) -> FinishReason | None:
        """Why this token is a row's last, if it is."""
        sampling, guide = row.request.sampling, row.guide
        if id in self.info.eos and not (sampling.ignore_eos and guide is None):
            return "eos"
        if guide is not None and guide.take(id):
            return "stop"
        return "length" if row.emitted >= sampling.max_new_tokens else None

    def _finish(
        self, row: Row, reason: FinishReason, error: AdapterServerError | None = None, scrub: bool = False
    ) -> Finished:
        now, request = time.monotonic(), row.request
        del self._rows[request.id]
        if row in self.forming:
            self.forming.remove(row)
        if error is None:
            self.scheduler.remember(row)
        self.scheduler.release(row, scrub)
        for holding in row.held:
            self.pool.let_go(holding, ran=row.started is not None)
        if row.started is not None:
            self.auto.ended(now - row.started)
        if reason == "timeout" and row.first is None:
            error = DeadlineExceeded("the deadline passed before the first token; ask for more time or try later")
        return Finished(
            request.id,
            reason,
            error,
            completion_tokens=row.emitted,
            cached_tokens=row.cached,
            queue_s=max(0.0, (row.started or now) - request.arrived - row.load_s),
            load_s=row.load_s,
            ttft_s=None if row.first is None else row.first - request.arrived,
            total_s=now - request.arrived,
            mode=row.mode,
        )

    def abandon(self, reason: FinishReason, error: AdapterServerError | None = None) -> list[Event]:
        """End everything, at shutdown or when the loop has died."""
        return [self._finish(row, reason, error) for row in list(self._rows.values())]

    def stats(self) -> Stats:
        waiting = Counter(key for row in self.scheduler.waiting for key in {m.spec.key for m in row.request.members})
        return Stats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting) + len(self.forming),
            kv_used_tokens=self.kv.used,
            kv_total_tokens=self.kv.total,
            preemptions=self.scheduler.preemptions,
            steps=self.steps,
            residents=self.pool.residents(waiting),
            hits=dict(self.pool.hits),
            decisions=dict(self.auto.decisions),
        )

    def on_wake(self, wake: Callable[[], None]) -> None:
        """What a loader's thread calls when a load has ended, and the guides' when a constraint is compiled."""
        self.pool.wake = self.guides.wake = wake

    def end_profile(self) -> None:
        """Write the trace of the steps there were. On the thread that ran them, or torch's profiler falls over."""
        if self.profile is not None:
            self.profile.close()
            self.profile = None

    def close(self) -> None:
        self.end_profile()
        self.guides.close()
        self.pool.close()


def _task(adapter: Adapter, task_id: int | None) -> int | None:
    """The task of a request, None for adapters without. Raises InvalidRequest."""
    if not (known := adapter.tasks_known):
        return None
    if task_id is None or not 0 <= task_id < known:
        raise InvalidRequest(f"task_id must be 0 to {known - 1} for this adapter", param="task_id")
    return task_id


def _chosen(logits: Tensor, draws: Sequence[Draw], kernel: Kernel | None) -> list[Chosen]:
    """A token for each row. Where that fails, it fails for the rows alone for which it fails."""
    try:
        return choose(logits, draws, kernel)
    except Exception:
        return [_chosen_alone(row[None], draw, kernel) for row, draw in zip(logits, draws, strict=True)]


def _chosen_alone(logits: Tensor, draw: Draw, kernel: Kernel | None) -> Chosen:
    try:
        return choose(logits, [draw], kernel)[0]
    except Exception as error:
        return Chosen(0, ok=False, failure=error)


def _failure(row: Row, chosen: Chosen) -> AdapterServerError:
    """Why a row that should have a token has none."""
    if row.guide is not None and row.guide.error is not None:
        return row.guide.error
    if chosen.failure is None:
        return RequestFailed("the model's logits are not finite for this request; its adapter is the likely cause")
    name = type(chosen.failure).__name__
    error = RequestFailed(f"no token could be chosen for this request ({name}); see the server's log")
    error.__cause__ = chosen.failure
    return error


def _sampled(slices: Sequence[Slice], logits: Tensor) -> Tensor | None:
    """Of the kept tokens' logits those that choose new ones; the others rate tokens of the prompts."""
    own, at = [], 0
    for s in slices:
        if ids := [s.row.tokens[s.row.done + i + 1] for i in s.rated]:
            s.row.rated += rate(logits[at : at + len(ids)], ids, s.row.request.sampling.prompt_logprobs)
            at += len(ids)
        if s.last:
            own.append(at)
            at += 1
    return logits[own] if own else None


def _flies(row: Row, draws: bool) -> bool:
    """Whether a captured step, which `draws` by chance or not, can choose this row's token: no more is wanted of the
    logits, nothing changes them first, and no constraint waits to hear of it.
    """
    s = row.request.sampling
    plain = (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) == (1, 0, 0)
    wants = s.logprobs or s.logit_bias or (s.temperature > 0 and not draws)
    return plain and not wants and row.guide is None and row.decode is None


def _any_drawn(slices: Sequence[Slice]) -> bool:
    return any(s.row.request.sampling.temperature > 0 for s in slices)


def _is_full(row: Row) -> bool:
    """Whether the token that is on its way is the row's last."""
    return row.emitted + 1 >= row.request.sampling.max_new_tokens


def _crashed(error: Exception) -> RequestFailed:
    failure = RequestFailed(f"the step that ran this request failed ({type(error).__name__}); see the server's log")
    failure.__cause__ = error
    return failure


def _turn_to(device: torch.device) -> None:
    """Streams, events and captured graphs are of the thread's current device, whichever its tensors are on."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _wait(device: torch.device) -> None:
    """Until all that was launched is done."""
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()


def _adapter_dtype(module: PreTrainedModel, config: EngineConfig) -> torch.dtype:
    return module.dtype if config.adapter_dtype == "base" else torch.float32


def _few_threads(module: PreTrainedModel) -> int:
    """One for a base so small that handing work to a second thread costs more than it saves; 0: torch's own choice."""
    return 1 if module.num_parameters() < SMALL_BASE else 0


def _lengths(slices: Sequence[Slice]) -> list[tuple[int, int]]:
    """(tokens, length that RoPE sees) per row: its whole prompt while that is read, then one more each step."""
    return [(s.count, s.row.shift + len(s.row.tokens)) for s in slices]


def _info(module: PreTrainedModel, model: Model, name: str, length: int) -> Info:
    ends = module.generation_config.eos_token_id if module.generation_config is not None else None
    ends = module.config.get_text_config().eos_token_id if ends is None else ends
    return Info(
        model=name,
        max_model_len=length,
        vocab=model.base.shapes.vocab,
        eos=frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=sum(math.prod(p.shape) for p in module.parameters()),
        lane=model.lane,
        lane_why=model.why,
        has_encoder=bool(module.config.is_encoder_decoder),
        commit=getattr(module.config, "_commit_hash", None),
    )
