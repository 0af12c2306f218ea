"""`adapter-server bench skew`: where merging pays, by the share of the rows that one adapter has (dLoRA's question).

    unmerged   every row on the low rank             merged   every row on its adapter's snapshot
    dominant   the dominant adapter's rows merged, the others unmerged
    auto       what a server chooses by itself, on an engine of its own whose snapshots are its own affair, once it has
               seen the dominant adapter alone for a while, so that it knows what its steps cost

The other rows take turns on the other adapters.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from rich.table import Table

from adapter_server.bench import cells, plots
from adapter_server.bench.command import (
    Bench,
    DeviceFlag,
    HttpFlag,
    OutFlag,
    ProfileFlag,
    QuickFlag,
    RoundsFlag,
    SizeFlag,
    answers,
    begin,
    finish,
    model,
)
from adapter_server.bench.drive import Ask, Run, drive, ready
from adapter_server.bench.workloads import Workload, many_loras, prompts
from adapter_server.core import AskedMode
from adapter_server.engine.engine import Engine

Way = Literal["unmerged", "merged", "dominant", "auto"]
WAYS: tuple[Way, ...] = ("unmerged", "merged", "dominant", "auto")
FIXED: tuple[Way, ...] = ("unmerged", "merged", "dominant")
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
Cell = tuple[float, Way]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run."""

    rows: int = 32
    adapters: int = 8
    rank: int = 16
    prompt: int = 32
    new: int = 32
    rounds: int = 3
    warm_s: float = 60.0  # at most, until `auto` has made up its mind
    http: bool = False


QUICK: dict[str, Any] = {"rows": 4, "adapters": 2, "rank": 4, "prompt": 8, "new": 4, "rounds": 1, "warm_s": 0.0}


def chosen(share: float, rows: int, adapters: int) -> list[int]:
    """Which adapter each row asks for: the first has so large a share; the others take turns."""
    dominant = round(share * rows)
    return [0] * dominant + [1 + i % (adapters - 1) for i in range(rows - dominant)]


def asks(workload: Workload, plan: Plan, share: float, way: Way) -> list[Ask]:
    given = zip(
        prompts(plan.rows, plan.prompt, workload.shape.vocab), chosen(share, plan.rows, plan.adapters), strict=True
    )
    return [Ask(prompt, f"lora-{i}", _mode(way, i)) for prompt, i in given]


def _mode(way: Way, adapter: int) -> AskedMode:
    if way == "dominant":
        return "unmerged" if adapter else "merged"
    return way


def measure(workload: Workload, plan: Plan, bench: Bench) -> dict[str, Any]:
    """The whole as one JSON object."""
    asked = {(share, way): asks(workload, plan, share, way) for share in SHARES for way in WAYS}
    limits = {"max_model_len": plan.prompt + plan.new, "max_rows": plan.rows}
    with (
        bench.opened(workload, **limits, adapter_bytes=64 << 30) as fixed,
        bench.opened(workload, **limits) as free,
    ):
        checker = cells.checker_of(fixed, bench.setting)
        for (_, way), own in asked.items():
            _prepare(free if way == "auto" else fixed, own)
        checker.learn(
            asked[SHARES[0], "unmerged"][0], drive(fixed, asked[SHARES[0], "unmerged"][:1], plan.new).answers[0]
        )
        _warm(free, asked[SHARES[-1], "auto"], plan)
        run = partial(_run, fixed, free)
        found = cells.rounds(run, asked, plan.new, plan.rounds, checker.check, bench.console)
        results = {"results": [_line(cell, found) for cell in asked]}
        if plan.http:
            over = cells.over_http(free, workload, asked, plan.new, plan.rounds, checker, bench.console)
            results["http"] = [_line(cell, over) for cell in asked]
        bench.look()
        context = plan.prompt + plan.new // 2
        floors = [
            bench.floor(workload, plan.rows, context, adapters=count, rank=plan.rank) for count in (0, 1, plan.adapters)
        ]
        return bench.result(
            "skew", workload, fixed, asdict(plan), floor=floors, **results, answers=checker.summary
        )  # fmt: skip


def _prepare(engine: Engine, own: list[Ask]) -> None:
    for ask in dict.fromkeys(Ask((), ask.adapter, ask.mode) for ask in own):
        ready(engine, ask)


def _warm(engine: Engine, own: list[Ask], plan: Plan) -> None:
    """Run the dominant adapter alone until its snapshot has shown what it is worth."""
    ends = time.monotonic() + plan.warm_s
    while time.monotonic() < ends and engine.auto.costs.step("alone", plan.rows, time.monotonic()) is None:
        drive(engine, own, plan.new)


def _run(fixed: Engine, free: Engine, own: list[Ask], new: int) -> Run:
    return drive(free if any(ask.mode == "auto" for ask in own) else fixed, own, new)


def _line(cell: Cell, found: Mapping[Cell, cells.Figures]) -> dict[str, Any]:
    share, way = cell
    own = found[cell]
    over = {f"over_{other}": cells.ratio(own["tokens_per_s"], found[share, other]["tokens_per_s"]) for other in FIXED}
    return {"share": share, "way": way, **over, **cells.line(own, found[share, "unmerged"])}


def auto_over_best(result: Mapping[str, Any]) -> dict[str, float]:
    """By share: the speed of `auto` over that of the better fixed mode, all merged or all unmerged."""
    return {
        f"{line['share']:g}": min(line["over_unmerged"], line["over_merged"])
        for line in result["results"]
        if line["way"] == "auto"
    }


def table(result: Mapping[str, Any]) -> Table:
    """One line per way, one column per share."""
    title = f"{model(result)}, {result['workload']['rows']} rows: tokens/s by the dominant adapter's share"
    shown = Table("", *(f"{share:.0%}" for share in SHARES), title=title, caption=answers(result))
    for way in WAYS:
        shown.add_row(way, *(f"{line['tokens_per_s']:.0f}" for line in result["results"] if line["way"] == way))
    shown.add_row("auto over the better", *(f"{each:.2f}" for each in auto_over_best(result).values()))
    return shown


def draw(figure: Any, result: Mapping[str, Any]) -> None:
    """tokens/s over the share."""
    series: dict[str, list[float]] = {
        way: [x["tokens_per_s"] for x in result["results"] if x["way"] == way] for way in WAYS
    }
    plots.lines(figure.subplots(), SHARES, series, "tokens/s", "share of the dominant adapter")


def skew(
    size: SizeFlag = "35m",
    rounds: RoundsFlag = 3,
    quick: QuickFlag = False,
    http: HttpFlag = False,
    device: DeviceFlag = "cpu",
    profile: ProfileFlag = None,
    out: OutFlag = None,
) -> None:
    """Merged, unmerged and auto, by the share of one adapter."""
    bench = begin(device, profile, quick)
    plan = Plan(**QUICK, http=http) if quick else Plan(rounds=rounds, http=http)
    with many_loras(size, plan.adapters, plan.rank, device=bench.setting.device) as workload:
        result = measure(workload, plan, bench)
    finish(result, [table(result)], draw, out, bench)
