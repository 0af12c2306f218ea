"""`adapter-server bench prefill`: prompts alone, all at once: tokens/s with adapters over the base's.

Every row asks for one new token, so that nothing but prompts is computed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from adapter_server.bench import cells, plots, report
from adapter_server.bench.command import (
    Bench,
    DeviceFlag,
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
from adapter_server.bench.workloads import Workload, choose, many_loras, prompts

BASE = "base"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run."""

    rows: int = 16
    adapters: int = 16
    rank: int = 16
    prompt: int = 128
    rounds: int = 3


QUICK: dict[str, Any] = {"rows": 4, "adapters": 2, "rank": 4, "prompt": 8, "rounds": 1}


def asked(workload: Workload, plan: Plan) -> dict[str, list[Ask]]:
    """The same prompts for the base, for one adapter, and for all by turns."""
    given = prompts(plan.rows, plan.prompt, workload.shape.vocab)
    by_turns = choose("uniform", plan.rows, plan.adapters)
    return {
        BASE: [Ask(prompt) for prompt in given],
        "1 adapter": [Ask(prompt, "lora-0") for prompt in given],
        f"{plan.adapters} adapters": [Ask(p, f"lora-{i}") for p, i in zip(given, by_turns, strict=True)],
    }


def measure(workload: Workload, plan: Plan, bench: Bench) -> dict[str, Any]:
    """The whole as one JSON object."""
    asks = asked(workload, plan)
    with bench.opened(workload, max_model_len=plan.prompt + 1, max_rows=plan.rows) as engine:
        checker = cells.checker_of(engine, bench.setting)
        found = cells.in_process(engine, asks, 1, plan.rounds, checker, bench.console)
        speeds = {name: [plan.prompt * each for each in own["tokens_per_s"]] for name, own in found.items()}
        lines = [_line(name, speeds) for name in asks]
        bench.look()
        floor = [_floor(workload, plan, bench, adapters) for adapters in (0, 1, plan.adapters)]
        more: dict[str, Any] = {"floor": floor, "results": lines, "answers": checker.summary}
        return bench.result("prefill", workload, engine, asdict(plan), **more)


def _floor(workload: Workload, plan: Plan, bench: Bench, adapters: int) -> dict[str, Any]:
    itemsize = bench.setting.dtype.itemsize
    found = report.prefill_floor(workload.shape, plan.rows, plan.prompt, adapters, plan.rank, itemsize)
    return report.timed_floor(found, bench.rates, rows=plan.rows, prompt=plan.prompt, adapters=adapters)


def _line(name: str, speeds: Mapping[str, list[float]]) -> dict[str, Any]:
    over = cells.ratio(speeds[name], speeds[BASE])
    about = {"rows_on": name, "tokens_per_s": statistics.median(speeds[name]), "over_base": over}
    return about | {"rounds": {"tokens_per_s": speeds[name]}}


def table(result: Mapping[str, Any]) -> Table:
    work = result["workload"]
    title = f"{model(result)}, {work['rows']} prompts of {work['prompt']} tokens"
    shown = Table("", "prompt tokens/s", "over base", title=title, caption=answers(result))
    for line in result["results"]:
        shown.add_row(line["rows_on"], f"{line['tokens_per_s']:.0f}", f"{line['over_base']:.3f}")
    return shown


def draw(figure: Any, result: Mapping[str, Any]) -> None:
    """Prompt tokens per second."""
    lines = result["results"]
    speeds = {"prompts": [line["tokens_per_s"] for line in lines]}
    plots.bars(figure.subplots(), [line["rows_on"] for line in lines], speeds, "prompt tokens/s")


def prefill(
    size: SizeFlag = "35m",
    rounds: RoundsFlag = 3,
    quick: QuickFlag = False,
    device: DeviceFlag = "cpu",
    profile: ProfileFlag = None,
    out: OutFlag = None,
) -> None:
    """Prompts alone, on the base, on one adapter and on 16."""
    bench = begin(device, profile, quick)
    plan = Plan(**QUICK) if quick else Plan(rounds=rounds)
    with many_loras(size, plan.adapters, plan.rank, device=bench.setting.device) as workload:
        result = measure(workload, plan, bench)
    finish(result, [table(result)], draw, out, bench)
