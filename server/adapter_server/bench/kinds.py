"""`adapter-server bench kinds`: every kind that PEFT has, against the base alone, and all of them in one batch.

A kind's rows and the base's run next to each other in every round. `overhead` is in percent of the base's ms per
token; `bytes` are what the adapter takes on the device, `file_bytes` its weights on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

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
from adapter_server.bench.drive import Ask, drive, ready
from adapter_server.bench.peft_kinds import one_of_every_kind
from adapter_server.bench.workloads import VIRTUAL_TOKENS, Workload, prompts
from adapter_server.engine.engine import Engine
from adapter_server.errors import AdapterServerError
from adapter_server.registry import guard

ALL = "all"
TASKED = "MULTITASK_PROMPT_TUNING"
Cell = tuple[str, bool]  # kind or ALL, whether the adapters are on


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run."""

    rows: int = 4
    prompt: int = 16
    new: int = 24
    rounds: int = 3
    http: bool = False


QUICK: dict[str, Any] = {"rows": 1, "prompt": 4, "new": 4, "rounds": 1}


def measure(workload: Workload, plan: Plan, left_out: dict[str, str], bench: Bench) -> dict[str, Any]:
    """The whole as one JSON object."""
    limits = {"max_model_len": plan.prompt + plan.new + VIRTUAL_TOKENS, "max_rows": max(64, plan.rows)}
    with bench.opened(workload, **limits) as engine:
        served = [kind for kind in workload.kinds if _fits(engine, workload, kind, left_out)]
        asked = _asked(workload, plan, served)
        checker = cells.checker_of(engine, bench.setting)
        found = cells.in_process(engine, asked, plan.new, plan.rounds, checker, bench.console)
        results: dict[str, Any] = {
            "kinds": {kind: _line(kind, found) | _bytes(engine, workload, kind) for kind in served},
            ALL: {"rows": len(served), **_line(ALL, found)},
        }
        if plan.http:
            over = cells.over_http(engine, workload, asked, plan.new, plan.rounds, checker, bench.console)
            results["http"] = {kind: _line(kind, over) for kind in (*served, ALL)}
        bench.look()
        floor = [bench.floor(workload, rows, plan.prompt + plan.new // 2) for rows in (plan.rows, len(served))]
        return bench.result(
            "kinds", workload, engine, asdict(plan), floor=floor, **results, left_out=left_out, answers=checker.summary
        )  # fmt: skip


def _fits(engine: Engine, workload: Workload, kind: str, left_out: dict[str, str]) -> bool:
    """Whether it loads and answers over this base."""
    ask = Ask((5, 6, 7), workload.kinds[kind], task_id=0 if kind == TASKED else None)
    try:
        ready(engine, ask)
        drive(engine, [ask], 2)
    except AdapterServerError as error:
        left_out[kind] = error.message[:200]
        return False
    return True


def _asked(workload: Workload, plan: Plan, served: list[str]) -> dict[Cell, list[Ask]]:
    given = prompts(max(plan.rows, len(served)), plan.prompt, workload.shape.vocab)

    def ask(prompt: tuple[int, ...], kind: str, on: bool) -> Ask:
        return Ask(prompt, workload.kinds[kind], task_id=0 if kind == TASKED else None) if on else Ask(prompt)

    cells_: dict[Cell, list[Ask]] = {}
    for on in (False, True):
        cells_[ALL, on] = [ask(prompt, kind, on) for prompt, kind in zip(given, served, strict=False)]
    for kind in served:
        for on in (False, True):
            cells_[kind, on] = [ask(prompt, kind, on) for prompt in given[: plan.rows]]
    return cells_


def _line(kind: str, found: Mapping[Cell, cells.Figures]) -> dict[str, Any]:
    own, base = found[kind, True], found[kind, False]
    line = cells.line(own, base)
    return {"overhead": line["overhead_percent"], "ms_per_token": line["ms_per_token"], "rounds": line["rounds"]}


def _bytes(engine: Engine, workload: Workload, kind: str) -> dict[str, int]:
    name = workload.kinds[kind]
    held = {resident.name: resident.bytes for resident in engine.stats().residents}
    return {"bytes": held[name], "file_bytes": (workload.adapters / name / guard.WEIGHTS).stat().st_size}


def table(result: Mapping[str, Any]) -> Table:
    """One line per kind."""
    work = result["workload"]
    title = f"{model(result)}, {work['rows']} rows of each kind, then one row of all {result[ALL]['rows']} kinds"
    shown = Table("", "ms per token", "over base, %", "bytes", "file bytes", title=title, caption=answers(result))
    for kind, line in result["kinds"].items():
        numbers = (f"{line['ms_per_token']:.2f}", f"{line['overhead']:+.1f}")
        shown.add_row(kind, *numbers, f"{line['bytes']:,}", f"{line['file_bytes']:,}")
    shown.add_row("all in one batch", f"{result[ALL]['ms_per_token']:.2f}", f"{result[ALL]['overhead']:+.1f}", "", "")
    for kind, reason in result["left_out"].items():
        shown.add_row(kind, "left out", reason, "", "")
    return shown


def draw(figure: Any, result: Mapping[str, Any]) -> None:
    """Overhead by kind."""
    lines = {**result["kinds"], "all in one batch": result[ALL]}
    axes = figure.subplots()
    plots.bars(axes, list(lines), {"unmerged": [line["overhead"] for line in lines.values()]}, "over the base, %")
    axes.tick_params(axis="x", labelrotation=90)
    axes.axhline(0, color="black", linewidth=0.8)


def kinds(
    size: SizeFlag = "35m",
    rounds: RoundsFlag = 3,
    quick: QuickFlag = False,
    http: HttpFlag = False,
    device: DeviceFlag = "cpu",
    profile: ProfileFlag = None,
    out: OutFlag = None,
) -> None:
    """Every kind that PEFT has, against the base alone, and all of them in one batch."""
    bench = begin(device, profile, quick)
    plan = Plan(**QUICK, http=http) if quick else Plan(rounds=rounds, http=http)
    left_out: dict[str, str] = {}
    with one_of_every_kind(size, left_out) as workload:
        result = measure(workload, plan, left_out, bench)
    finish(result, [table(result)], draw, out, bench)
