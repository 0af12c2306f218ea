"""Batches of requests compared with each other: rounds in which each runs once, figures that are medians over them.

Interleaved: the order turns with the rounds. A ratio is the median of the rounds' own ratios, which a machine that
drifts moves least. TTFT is the median over the rows of a batch; ms per token the median of the steps in which every
row decodes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from adapter_server.bench.drive import Ask, Checker, Run, Setting, Tokens, drive, gap, ready
from adapter_server.bench.http import serve, within
from adapter_server.bench.workloads import Workload
from adapter_server.engine.engine import Engine

WARM_TOKENS = 3
FIGURES = ("ttft_ms", "ms_per_token", "tokens_per_s")

Figures = dict[str, list[float]]
Drive = Callable[[Sequence[Ask], int], Run]
Check = Callable[[Sequence[Ask], Sequence[Tokens]], None]
Key = TypeVar("Key", bound=Hashable)


def rounds(
    run: Drive, asked: Mapping[Key, Sequence[Ask]], new: int, count: int, check: Check, console: Console
) -> dict[Key, Figures]:
    """Per cell, each round's figures; a few tokens of each run untimed before."""
    figures: dict[Key, Figures] = {cell: {name: [] for name in FIGURES} for cell in asked}
    with Progress(console=console, transient=True) as progress:
        for asks in progress.track(asked.values(), description="warm up"):
            run(asks, min(WARM_TOKENS, new))
        orders = [turned(list(asked), turn) for turn in range(count)]
        for cell in progress.track([cell for order in orders for cell in order], description="measure"):
            ran = run(asked[cell], new)
            check(asked[cell], ran.answers)
            for name, values in figures[cell].items():
                values.append(getattr(ran, name))
    return figures


def in_process(
    engine: Engine, asked: Mapping[Key, Sequence[Ask]], new: int, count: int, checker: Checker, console: Console
) -> dict[Key, Figures]:
    """The rounds by an engine of this process. The first row of each cell runs alone beforehand."""
    for asks in asked.values():
        for ask in dict.fromkeys(replace(ask, prompt=()) for ask in asks):
            ready(engine, ask)
    for asks in asked.values():
        checker.learn(asks[0], drive(engine, asks[:1], new).answers[0])
    return rounds(partial(drive, engine), asked, new, count, checker.check, console)


def over_http(
    engine: Engine,
    workload: Workload,
    asked: Mapping[Key, Sequence[Ask]],
    new: int,
    count: int,
    checker: Checker,
    console: Console,
) -> dict[Key, Figures]:
    """The same rounds through a real server. Its answers are checked when the engine is ours again."""
    later: list[tuple[Sequence[Ask], Sequence[Tokens]]] = []

    def keep(asks: Sequence[Ask], answers: Sequence[Tokens]) -> None:
        later.append((asks, answers))

    figures = serve(within(engine), workload, lambda client: rounds(client.drive, asked, new, count, keep, console))
    for asks, answers in later:
        checker.check(asks, answers)
    return figures


def checker_of(engine: Engine, setting: Setting) -> Checker:
    """One that asks this engine, while nothing else does, how near a tie was."""
    return Checker(partial(gap, engine), setting.near)


def turned(cells: Sequence[Any], turn: int) -> list[Any]:
    """Another one first each round, so that no cell always follows the same."""
    at = (turn * 7) % len(cells)
    return [*cells[at:], *cells[:at]]


def line(own: Figures, base: Figures) -> dict[str, Any]:
    """One cell's figures beside its base's."""
    return {
        **{name: statistics.median(values) for name, values in own.items()},
        "overhead_percent": overhead(own["ms_per_token"], base["ms_per_token"]),
        "ttft_overhead_percent": overhead(own["ttft_ms"], base["ttft_ms"]),
        "rounds": own,
    }


def overhead(own: Sequence[float], base: Sequence[float]) -> float:
    """In percent: the median of the rounds' own ratios."""
    return 100 * (ratio(own, base) - 1)


def ratio(own: Sequence[float], base: Sequence[float]) -> float:
    """The median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(own, base, strict=True))
