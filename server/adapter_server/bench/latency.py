"""`adapter-server bench latency`: what an adapter costs, by kind, mode and batch size.

Interleaved: within a round every cell runs once, in an order that turns with the rounds. A cell's figure is the median
over the rounds, its overhead the median of the rounds' own ratios to the base. TTFT is the median over the rows of a
batch; ms per token the median of the steps in which every row decodes.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from adapter_server.bench import plots, report
from adapter_server.bench.drive import Ask, Checker, Run, Tokens, drive, ready
from adapter_server.bench.http import serve
from adapter_server.bench.workloads import VIRTUAL_TOKENS, Workload, one_of_each, prompts
from adapter_server.config import GIB, EngineConfig
from adapter_server.core import Mode
from adapter_server.engine import Engine, build
from adapter_server.registry.store import Store

BATCHES = (1, 4, 8, 32)
QUICK = {"batches": [1, 2], "prompt": 8, "new": 4, "rounds": 1}
WARM_TOKENS = 3
FIGURES = ("ttft_ms", "ms_per_token", "tokens_per_s")

Size = Literal["demo", "tiny", "35m", "200m"]
Figures = dict[str, list[float]]


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


Asked = dict[Cell, list[Ask]]
Drive = Callable[[Sequence[Ask], int], Run]
Check = Callable[[Sequence[Ask], Sequence[Tokens]], None]


def measure(workload: Workload, plan: Plan, console: Console) -> dict[str, Any]:
    """The whole table as one JSON object."""
    quick = workload.size == "tiny"
    before = report.measured_rates(quick)
    cells = _cells(workload, plan)
    asked = {cell: _asks(workload, plan, cell) for cell in cells}
    with _engine(workload, plan) as engine:
        for asks in asked.values():
            ready(engine, asks[0])
        checker = Checker(engine)
        figures = _rounds(partial(drive, engine), plan, asked, checker.check, console)
        over_http = _over_http(engine, workload, plan, asked, checker, console) if plan.http else None
        parameters = engine.info.parameters
    rates = report.faster(before, report.measured_rates(quick))
    return {
        "benchmark": "latency",
        "workload": {"size": workload.size, **asdict(plan), "adapters": dict(workload.kinds)},
        "model": {"parameters": parameters, **asdict(workload.shape), "dtype": "float32"},
        **report.facts(),
        "measured": rates,
        "floor": [_floor(workload, plan, batch, rates) for batch in plan.batches],
        "results": [_line(cell, figures) for cell in cells],
        **({} if over_http is None else {"http": [_line(cell, over_http) for cell in cells]}),
        "answers": checker.summary,
    }


@contextmanager
def _engine(workload: Workload, plan: Plan) -> Iterator[Engine]:
    """Float32, since only there is merged the same as unmerged; room for every snapshot of the table."""
    config = EngineConfig(
        dtype="float32",
        device="cpu",
        max_model_len=plan.length,
        max_rows=max(plan.batches),
        adapter_bytes=16 * GIB,
    )
    engine = build(workload.model, config, Store(workload.adapters, settle_s=0))
    try:
        yield engine
    finally:
        engine.close()


def _cells(workload: Workload, plan: Plan) -> list[Cell]:
    lines = [(kind, mode) for kind, mode in LINES if mode == "base" or kind in workload.kinds]
    return [Cell(kind, mode, batch) for batch in plan.batches for kind, mode in lines]


def _asks(workload: Workload, plan: Plan, cell: Cell) -> list[Ask]:
    adapter = None if cell.mode == "base" else workload.kinds[cell.kind]
    asked = prompts(cell.batch, plan.prompt, workload.shape.vocab)
    return [Ask(prompt, adapter, cell.mode) for prompt in asked]


def _rounds(run: Drive, plan: Plan, asked: Asked, check: Check, console: Console) -> dict[Cell, Figures]:
    """Per cell, each round's figures."""
    figures: dict[Cell, Figures] = {cell: {name: [] for name in FIGURES} for cell in asked}
    with Progress(console=console, transient=True) as progress:
        for asks in progress.track(asked.values(), description="warm up"):
            run(asks, min(WARM_TOKENS, plan.new))
        orders = [turned(list(asked), turn) for turn in range(plan.rounds)]
        for cell in progress.track([cell for order in orders for cell in order], description="measure"):
            ran = run(asked[cell], plan.new)
            check(asked[cell], ran.answers)
            for name, values in figures[cell].items():
                values.append(getattr(ran, name))
    return figures


def _over_http(
    engine: Engine, workload: Workload, plan: Plan, asked: Asked, checker: Checker, console: Console
) -> dict[Cell, Figures]:
    """The same rounds through a real server. Its answers are checked when the engine is ours again."""
    later: list[tuple[Sequence[Ask], Sequence[Tokens]]] = []

    def keep(asks: Sequence[Ask], answers: Sequence[Tokens]) -> None:
        later.append((asks, answers))

    figures = serve(engine, workload, lambda client: _rounds(client.drive, plan, asked, keep, console))
    for asks, answers in later:
        checker.check(asks, answers)
    return figures


def turned(cells: Sequence[Any], turn: int) -> list[Any]:
    """Another one first each round, so that no cell always follows the same."""
    at = (turn * 7) % len(cells)
    return [*cells[at:], *cells[:at]]


def _floor(workload: Workload, plan: Plan, batch: int, rates: Mapping[str, float]) -> dict[str, Any]:
    """Of the base, half-way through the answers."""
    context = plan.prompt + plan.new // 2
    return report.timed_floor(report.floor(workload.shape, batch, context), rates, batch=batch, context=context)


def _line(cell: Cell, rounds: Mapping[Cell, Figures]) -> dict[str, Any]:
    own, base = rounds[cell], rounds[Cell("base", "base", cell.batch)]
    return {
        "cell": cell.label,
        "kind": cell.kind,
        "mode": cell.mode,
        "batch": cell.batch,
        **{name: statistics.median(values) for name, values in own.items()},
        "overhead_percent": overhead(own["ms_per_token"], base["ms_per_token"]),
        "ttft_overhead_percent": overhead(own["ttft_ms"], base["ttft_ms"]),
        "rounds": own,
    }


def overhead(own: Sequence[float], base: Sequence[float]) -> float:
    """In percent: the median of the rounds' own ratios, which a drifting machine moves least."""
    return 100 * (statistics.median(a / b for a, b in zip(own, base, strict=True)) - 1)


def table(result: Mapping[str, Any], over: str = "results") -> Table:
    """One line per kind and mode, one column per batch size."""
    batches, lines = result["workload"]["batches"], result[over]
    shown = Table("", *(f"batch {b}" for b in batches), title=_title(result, over), caption=_caption(result))
    for label in dict.fromkeys(line["cell"] for line in lines):
        shown.add_row(label, *(_figures(line) for line in lines if line["cell"] == label))
    shown.add_row("floor", *(f"{each['ms']:.2f} ms" for each in result["floor"]))
    return shown


def _title(result: Mapping[str, Any], over: str) -> str:
    work, parameters = result["workload"], result["model"]["parameters"] / 1e6
    way = "over HTTP" if over == "http" else "in process"
    return f"{work['size']} ({parameters:.1f}M), prompt {work['prompt']}, {work['new']} new tokens, {way}"


def _caption(result: Mapping[str, Any]) -> str:
    answers = result["answers"]
    counted = f"{answers['checked']} answers checked, {answers['wrong']} wrong, {answers['near_ties']} near ties"
    return f"TTFT ms / ms per token (over the base)\n{counted}"


def _figures(line: Mapping[str, Any]) -> str:
    extra = "" if line["mode"] == "base" else f" ({line['overhead_percent']:+.1f} %)"
    return f"{line['ttft_ms']:.1f} / {line['ms_per_token']:.2f}{extra}"


def latency(
    size: Annotated[Size, typer.Option(help="The demo's base, or random weights of a size")] = "demo",
    batch: Annotated[
        list[int] | None, typer.Option(help="Rows at once; may be repeated", show_default="1 4 8 32")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt", min=1)] = 128,
    new: Annotated[int, typer.Option(help="New tokens of an answer", min=2)] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds; figures are medians over them", min=1)] = 3,
    quick: Annotated[bool, typer.Option(help="A few tokens, to see that it runs")] = False,
    http: Annotated[bool, typer.Option(help="Also over HTTP, against a server on this machine")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write the result here")] = None,
    plot: Annotated[Path | None, typer.Option(help="The plot, a PNG", show_default="in the temporary folder")] = None,
) -> None:
    """Base, unmerged and merged, by family and batch size: a table, a plot, and one last line of JSON."""
    plots.require()
    disable_progress_bar()
    plan = Plan(sorted(batch or BATCHES), prompt, new, rounds, http)
    plan = Plan(**QUICK, http=http) if quick else plan  # type: ignore[arg-type]
    console = Console(stderr=True)
    with one_of_each(size) as workload:
        result = measure(workload, plan, console)
    target = plot or Path(tempfile.gettempdir(), f"adapter-server-latency-{size}.png")
    plots.latency(result, target)
    console.print(f"plot: {target}", highlight=False)
    for over in ("results", "http"):
        if over in result:
            Console(soft_wrap=True).print(table(result, over))
    report.publish(result, json)


def main(args: Sequence[str] | None = None) -> None:
    """The command with these arguments."""
    command = typer.Typer(add_completion=False)
    command.command()(latency)
    command(args=args, prog_name="adapter-server bench latency")
