"""Requests through an engine in this process, timed step by step, and their answers checked."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from adapter_server.bench.workloads import IN_PLACE, Workload, base_dtype, llama
from adapter_server.config import GIB, EngineConfig
from adapter_server.core import AskedMode, Finished, Member, Request, Sampling, Token
from adapter_server.engine.engine import Engine
from adapter_server.engine.model import load
from adapter_server.engine.worker import settled
from adapter_server.errors import BaseNotSupported, RequestFailed
from adapter_server.registry.store import Store

Tokens = tuple[int, ...]
NEAR_TIE = 1e-4  # logits closer than this may change places by float32's rounding
NEAR_TIE_16 = 0.05  # and by bfloat16's, of logits about 1
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Setting:
    """Where an engine runs, and the file for a trace of its steps."""

    device: str = "cpu"
    profile: str | None = None

    @property
    def kind(self) -> str:
        return torch.device(self.device).type

    def check(self) -> None:
        """Raises BaseNotSupported where there is no such device."""
        if self.kind == "cuda" and not torch.cuda.is_available():
            raise BaseNotSupported("this machine has no CUDA device: leave out --device, or choose cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the base, and of the adapters beside it."""
        return base_dtype(self.device)

    @property
    def limits(self) -> dict[str, Any]:
        """What an engine on this device is given. It keeps no beginnings of prompts, since rounds repeat them; on CUDA
        adapters are held in the base's format, and a step has room for whole prompts.
        """
        device: dict[str, Any] = {} if self.kind == "cpu" else {"adapter_dtype": "base", "max_step_tokens": 2048}
        return {"prefix_cache_bytes": 0, "adapter_bytes": 16 * GIB, "profile": self.profile, **device}

    @property
    def near(self) -> float:
        return NEAR_TIE if self.kind == "cpu" else NEAR_TIE_16


@contextmanager
def opened(workload: Workload, setting: Setting, **limits: Any) -> Iterator[Engine]:
    """An engine over a workload, float32 on the CPU and bfloat16 elsewhere, within the setting's limits and these.
    Raises BaseNotSupported where there is no such device.
    """
    engine, _ = made(workload, setting, **limits)
    try:
        with settled():
            yield engine
    finally:
        engine.close()


def made(workload: Workload, setting: Setting, **limits: Any) -> tuple[Engine, float]:
    """The same, and the seconds from a loaded base to an engine over it."""
    setting.check()
    dtype = str(setting.dtype).removeprefix("torch.")
    config = EngineConfig(dtype=dtype, device=setting.device, **(setting.limits | limits))  # type: ignore[arg-type]
    store = Store(workload.adapters, settle_s=0)
    module = base_of(workload, setting)
    start = time.perf_counter()
    engine = Engine(module, config, store, workload.size)
    store.judge = engine.pool.judge
    return engine, time.perf_counter() - start


def base_of(workload: Workload, setting: Setting) -> Any:
    """The base as transformers has it, on the device: read from its folder, or made from the seed, each time alike."""
    if workload.size in IN_PLACE:
        return llama(workload.shape, workload.seed, setting.device, setting.dtype)
    return load(workload.model, str(setting.dtype).removeprefix("torch."), torch.device(setting.device))


def engine_of(workload: Workload, setting: Setting, limits: Mapping[str, Any]) -> Engine:
    """The same engine, for a process of its own."""
    disable_progress_bar()
    return made(workload, setting, **limits)[0]


@dataclass(frozen=True, slots=True)
class Ask:
    """One greedy request."""

    prompt: Tokens
    adapter: str | None = None
    mode: AskedMode = "unmerged"
    task_id: int | None = None


@dataclass(slots=True)
class Run:
    """What a batch of requests got, and when. `steps` are the seconds of the steps in which every row decoded."""

    answers: list[Tokens] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)  # to each row's first token
    steps: list[float] = field(default_factory=list)
    total_s: float = 0.0

    @property
    def ttft_ms(self) -> float:
        return 1e3 * statistics.median(self.first_s)

    @property
    def ms_per_token(self) -> float:
        return 1e3 * statistics.median(self.steps) if self.steps else math.nan

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.answers)) / self.total_s


def drive(engine: Engine, asks: Sequence[Ask], new: int) -> Run:
    """All requests at once, to their end. Raises RequestFailed when one fails."""
    start = time.perf_counter()
    requests = [request_of(engine, ask, new) for ask in asks]
    for request in requests:
        engine.submit(request)
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    firsts: dict[str, float] = {}
    run, before = Run(), start
    while engine.busy:
        events = engine.step()
        now = time.perf_counter()
        ids = [event.request_id for event in events if isinstance(event, Token)]
        if len(ids) == len(requests) and len(firsts) == len(requests):
            run.steps.append(now - before)
        firsts |= {id: now - start for id in ids if id not in firsts}
        _take(events, tokens)
        before = now
    run.answers = [tuple(tokens[request.id]) for request in requests]
    run.first_s, run.total_s = [firsts[request.id] for request in requests], time.perf_counter() - start
    return run


def request_of(engine: Engine, ask: Ask, new: int, logprobs: int = 0) -> Request:
    members = () if ask.adapter is None else (Member(engine.pool.store.resolve(ask.adapter)),)
    return Request(
        id=f"bench-{next(_numbers)}",
        prompt=ask.prompt,
        sampling=Sampling(max_new_tokens=new, ignore_eos=True, logprobs=logprobs),
        members=members,
        mode=ask.mode if members else "base",
        task_id=ask.task_id,
        arrived=time.monotonic(),
    )


def _take(events: Sequence[object], tokens: dict[str, list[int]]) -> None:
    for event in events:
        if isinstance(event, Token):
            tokens[event.request_id].append(event.id)
        elif isinstance(event, Finished) and event.reason == "error":
            raise event.error or RequestFailed("the engine gave no answer and no reason")


def ready(engine: Engine, ask: Ask) -> None:
    """Load what a request needs, outside any timing."""
    if ask.adapter is None:
        return
    done = engine.call("merge" if ask.mode == "merged" else "load", engine.pool.store.resolve(ask.adapter))
    while not done.done():
        engine.step()
        time.sleep(0.001)
    done.result()


def gap(engine: Engine, ask: Ask, known: Tokens) -> float:
    """How far the two likeliest next tokens are apart after `known`, in logits."""
    request = request_of(engine, replace(ask, prompt=ask.prompt + known), new=1, logprobs=2)
    engine.submit(request)
    top: tuple[tuple[int, float], ...] = ()
    while engine.busy:
        top = next((event.top for event in engine.step() if isinstance(event, Token)), top)
    return abs(top[0][1] - top[1][1])


def first_difference(left: Tokens, right: Tokens) -> int | None:
    """The index of the first token that differs, or that only one of them has."""
    if left == right:
        return None
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


class Checker:
    """Every answer against the first to the same question, whatever the mode, the batch and the round; the first ones
    may come from rows that were alone. `apart` says how far the two likeliest next tokens are apart.
    """

    def __init__(self, apart: Callable[[Ask, Tokens], float], near: float = NEAR_TIE) -> None:
        self.apart, self.near = apart, near
        self.first: dict[tuple[str | None, Tokens], Tokens] = {}
        self.checked = self.alone = 0
        self.differing: list[dict[str, Any]] = []

    def learn(self, ask: Ask, answer: Tokens) -> None:
        """The answer to a row that ran alone."""
        self.alone += 1
        self.first.setdefault((ask.adapter, ask.prompt), answer)

    def check(self, asks: Sequence[Ask], answers: Sequence[Tokens]) -> None:
        for ask, answer in zip(asks, answers, strict=True):
            self.expect(ask, answer, self.first.setdefault((ask.adapter, ask.prompt), answer))

    def expect(self, ask: Ask, answer: Tokens, right: Tokens) -> None:
        """Count one answer. Of one that differs, how near the tie was at the first token that does."""
        self.checked += 1
        at = first_difference(answer, right)
        if at is None:
            return
        apart = None if at == min(len(answer), len(right)) else self.apart(ask, right[:at])
        self.differing.append({"adapter": ask.adapter, "mode": ask.mode, "at": at, "gap": apart})

    @property
    def wrong(self) -> int:
        """Answers that differ where there was no tie to speak of."""
        return sum(each["gap"] is None or each["gap"] > self.near for each in self.differing)

    @property
    def summary(self) -> dict[str, Any]:
        ties = len(self.differing) - self.wrong
        counts = {"checked": self.checked, "wrong": self.wrong, "near_ties": ties, "alone": self.alone}
        return {**counts, "differing": self.differing}
