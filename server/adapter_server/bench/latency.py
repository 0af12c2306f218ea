"""`adapter-server bench latency`: what an adapter costs, by kind, mode and batch size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
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
from adapter_server.bench.drive import Ask
from adapter_server.bench.workloads import VIRTUAL_TOKENS, Workload, one_of_each, prompts
from adapter_server.core import Mode

BATCHES = (1, 4, 8, 32)
QUICK = {"batches": [1, 2], "prompt": 8, "new": 4, "rounds": 1}


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of the table, at one batch size."""

    kind: str
    mode: Mode
    batch: int

    @property
    def label(self) -> str:
        return self.kind if self.mode == "base" else f"{self.kind} {self.mode}"


LINES: tuple[tuple[str, Mode], ...] = (
    ("base", "base"),
    ("lora-r8", "unmerged"),
    ("lora-r8", "merged"),
    ("dora-r8", "unmerged"),
    ("ia3", "unmerged"),
    ("ia3", "merged"),
    ("prefix", "unmerged"),
    ("prompt", "unmerged"),
    ("bottleneck", "unmerged"),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run."""

    batches: list[int]
    prompt: int
    new: int
    rounds: int
    http: bool = False

    @property
    def length(self) -> int:
        return self.prompt + self.new + VIRTUAL_TOKENS


def measure(workload: Workload, plan: Plan, bench: Bench) -> dict[str, Any]:
    """The whole table as one JSON object."""
    asked = {cell: _asks(workload, plan, cell) for cell in _cells(workload, plan)}
    limits = {"max_model_len": plan.length, "max_rows": max(plan.batches)}
    with bench.opened(workload, **limits) as engine:
        checker = cells.checker_of(engine, bench.setting)
        found = cells.in_process(engine, asked, plan.new, plan.rounds, checker, bench.console)
        lines = {"results": [_line(cell, found) for cell in asked]}
        if plan.http:
            found = cells.over_http(engine, workload, asked, plan.new, plan.rounds, checker, bench.console)
            lines["http"] = [_line(cell, found) for cell in asked]
        bench.look()
        context = plan.prompt + plan.new // 2
        floors = [{"batch": batch, **bench.floor(workload, batch, context)} for batch in plan.batches]
        work = {**asdict(plan), "adapters": dict(workload.kinds)}
        return bench.result("latency", workload, engine, work, floor=floors, **lines, answers=checker.summary)


def _cells(workload: Workload, plan: Plan) -> list[Cell]:
    lines = [(kind, mode) for kind, mode in LINES if mode == "base" or kind in workload.kinds]
    return [Cell(kind, mode, batch) for batch in plan.batches for kind, mode in lines]


def _asks(workload: Workload, plan: Plan, cell: Cell) -> list[Ask]:
    adapter = None if cell.mode == "base" else workload.kinds[cell.kind]
    asked = prompts(cell.batch, plan.prompt, workload.shape.vocab)
    return [Ask(prompt, adapter, cell.mode) for prompt in asked]


def _line(cell: Cell, rounds: Mapping[Cell, cells.Figures]) -> dict[str, Any]:
    own, base = rounds[cell], rounds[Cell("base", "base", cell.batch)]
    about = {"cell": cell.label, "kind": cell.kind, "mode": cell.mode, "batch": cell.batch}
    return about | cells.line(own, base)


def table(result: Mapping[str, Any], over: str = "results") -> Table:
    """One line per kind and mode, one column per batch size."""
    batches, lines = result["workload"]["batches"], result[over]
    caption = f"TTFT ms / ms per token (over the base)\n{answers(result)}"
    shown = Table("", *(f"batch {b}" for b in batches), title=_title(result, over), caption=caption)
    for label in dict.fromkeys(line["cell"] for line in lines):
        shown.add_row(label, *(_figures(line) for line in lines if line["cell"] == label))
    shown.add_row("floor", *(f"{each['ms']:.2f} ms" for each in result["floor"]))
    return shown


def _title(result: Mapping[str, Any], over: str) -> str:
    work, way = result["workload"], "over HTTP" if over == "http" else "in process"
    return f"{model(result)}, prompt {work['prompt']}, {work['new']} new tokens, {way}"


def _figures(line: Mapping[str, Any]) -> str:
    extra = "" if line["mode"] == "base" else f" ({line['overhead_percent']:+.1f} %)"
    return f"{line['ttft_ms']:.1f} / {line['ms_per_token']:.2f}{extra}"


def draw(figure: Any, result: Mapping[str, Any]) -> None:
    """ms per token and the overhead over the base, grouped by batch size."""
    upper, lower = figure.subplots(2, 1, sharex=True)
    groups = [f"batch {batch}" for batch in result["workload"]["batches"]]
    labels = dict.fromkeys(line["cell"] for line in result["results"])
    for axes, name, label in ((upper, "ms_per_token", "ms per token"), (lower, "overhead_percent", "over the base, %")):
        series = {cell: [line[name] for line in result["results"] if line["cell"] == cell] for cell in labels}
        plots.bars(axes, groups, series, label)
    upper.legend(ncols=4, fontsize="small")


def latency(
    size: SizeFlag = "demo",
    batch: Annotated[
        list[int] | None, typer.Option(help="Rows at once; may be repeated", show_default="1 4 8 32")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt", min=1)] = 128,
    new: Annotated[int, typer.Option(help="New tokens of an answer", min=2)] = 64,
    rounds: RoundsFlag = 3,
    quick: QuickFlag = False,
    http: HttpFlag = False,
    device: DeviceFlag = "cpu",
    profile: ProfileFlag = None,
    out: OutFlag = None,
) -> None:
    """Base, unmerged and merged, by family and batch size: a table, a plot, and one last line of JSON."""
    bench = begin(device, profile, quick)
    plan = Plan(sorted(batch or BATCHES), prompt, new, rounds, http)
    plan = Plan(**QUICK, http=http) if quick else plan  # type: ignore[arg-type]
    with one_of_each(size) as workload:
        result = measure(workload, plan, bench)
    finish(result, [table(result, over) for over in ("results", "http") if over in result], draw, out, bench)
