"""`adapter-server bench popularity`: 32 rows, all on one adapter, each on its own, and between (Punica's workload).

    identical   all on the first          distinct   each on its own
    uniform     16 adapters, two rows each    skewed   16 adapters, the k-th with probability ∝ k^−1.5

tokens/s are end to end, prompts included. Over HTTP it also says what HTTP, events and metrics take of a step: the
base alone, 64 streams, by an engine in this process and by a server, in turn. Behind the server the engine may have a
process of its own (`--engine-process`), as `serve` gives it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from adapter_server.bench import cells, plots
from adapter_server.bench.command import (
    Bench,
    DeviceFlag,
    FiledFlag,
    HttpFlag,
    OutFlag,
    ProcessFlag,
    ProfileFlag,
    QuickFlag,
    RoundsFlag,
    SizeFlag,
    answers,
    begin,
    finish,
    model,
)
from adapter_server.bench.drive import Ask, Run, drive
from adapter_server.bench.http import Client, apart, serve, within
from adapter_server.bench.workloads import Filed, Popularity, Workload, another, choose, many_loras, prompts
from adapter_server.engine.process import is_apart

LAWS: tuple[Popularity, ...] = ("identical", "distinct", "uniform", "skewed")
BASE = "base"
SLACK, LAUNCHES_MS = 1.5, 0.15


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run."""

    rows: int = 32
    adapters: int = 16
    rank: int = 16
    prompt: int = 64
    new: int = 64
    rounds: int = 3
    streams: int = 64  # over HTTP, of the base alone
    http: bool = False
    apart: bool = False  # there, the engine in a process of its own
    filed: Filed | None = None  # the format of the adapters' files, where it is not the base's


QUICK: dict[str, Any] = {"rows": 4, "adapters": 2, "rank": 4, "prompt": 8, "new": 4, "rounds": 1, "streams": 4}


def asked(workload: Workload, plan: Plan) -> dict[str, list[Ask]]:
    """By law, and the base alone: the same prompts."""
    given = prompts(plan.rows, plan.prompt, workload.shape.vocab)

    def by(law: Popularity) -> list[Ask]:
        chosen = choose(law, plan.rows, plan.rows if law == "distinct" else plan.adapters)
        return [Ask(prompt, f"lora-{i}") for prompt, i in zip(given, chosen, strict=True)]

    return {**{law: by(law) for law in LAWS}, BASE: [Ask(prompt) for prompt in given]}


def measure(workload: Workload, plan: Plan, bench: Bench) -> dict[str, Any]:
    """The whole as one JSON object."""
    asks = asked(workload, plan)
    limits = {"max_model_len": plan.prompt + plan.new, "max_rows": max(plan.rows, plan.streams)}
    with bench.opened(workload, **limits) as engine:
        checker = cells.checker_of(engine, bench.setting)
        found = cells.in_process(engine, asks, plan.new, plan.rounds, checker, bench.console)
        bench.look()
        used = {name: len({ask.adapter for ask in own if ask.adapter}) for name, own in asks.items()}
        lines = [_line(n, found) | _decode(workload, plan, bench, used[n], found[n], found[BASE]) for n in asks]
        results: dict[str, Any] = {"results": lines}
        if plan.http:
            over = cells.over_http(engine, workload, asks, plan.new, plan.rounds, checker, bench.console)
            results["http"] = [_line(name, over) for name in asks]
        floors = [_floor(workload, plan, bench, adapters) for adapters in (0, 1, plan.adapters, plan.rows)]
        more = {"floor": floors, **results, "answers": checker.summary}
        if plan.http:
            more["http_share"] = http_share(workload, plan, bench)
        return bench.result("popularity", workload, engine, asdict(plan), **more)


def _floor(workload: Workload, plan: Plan, bench: Bench, adapters: int) -> dict[str, Any]:
    held = bench.held(plan.filed)
    return bench.floor(workload, plan.rows, plan.prompt + plan.new // 2, adapters=adapters, rank=plan.rank, held=held)


def _line(name: str, found: Mapping[str, cells.Figures]) -> dict[str, Any]:
    over = cells.ratio(found[name]["tokens_per_s"], found[BASE]["tokens_per_s"])
    return {"popularity": name, "tokens_per_s_over_base": over, **cells.line(found[name], found[BASE])}


def _decode(
    workload: Workload, plan: Plan, bench: Bench, adapters: int, own: cells.Figures, base: cells.Figures
) -> dict[str, Any]:
    """Of the steps in which every row decodes: the speed over the base's, the ms that adapters add, and their aim."""
    floor = _floor(workload, plan, bench, adapters)
    pairs = list(zip(own["ms_per_token"], base["ms_per_token"], strict=True))
    return {
        "adapters": adapters,
        "decode_over_base": statistics.median(base / own for own, base in pairs),
        "added_ms": statistics.median(own - base for own, base in pairs),
        "added_aim_ms": added_aim_ms(floor["adapter_bytes"], bench.rates["bytes_per_s"]) if adapters else 0.0,
    }


def added_aim_ms(adapter_bytes: int, bandwidth: float) -> float:
    """What a step on these adapters should cost at the most: their bytes read one and a half times, and launches."""
    return 1e3 * SLACK * adapter_bytes / bandwidth + LAUNCHES_MS


def http_share(workload: Workload, plan: Plan, bench: Bench) -> dict[str, Any]:
    """Of a step over HTTP, what the engine does not spend: two engines, one of them behind a server, in turn.

    A step lasts as long as it does on average, while all streams run.
    """
    asks = [Ask(prompt) for prompt in prompts(plan.streams, 8, workload.shape.vocab)]
    limits = {"max_model_len": 8 + plan.new, "max_rows": plan.streams}
    with bench.opened(workload, **limits) as inside:

        def rounds(client: Client) -> list[tuple[float, float]]:
            pairs = [
                (_mean_ms(drive(inside, asks, plan.new)), _mean_ms(client.drive(asks, plan.new)))
                for _ in range(plan.rounds + 1)
            ]
            return pairs[1:]

        if plan.apart:
            pairs = serve(apart(workload, bench.setting, **limits), workload, rounds)
        else:
            with bench.opened(workload, **limits) as behind:
                pairs = serve(within(behind), workload, rounds)
    shares = [1 - alone / over for alone, over in pairs]
    return {"streams": plan.streams, "apart": plan.apart, "share": statistics.median(shares), "rounds": pairs}


def _mean_ms(run: Run) -> float:
    return 1e3 * statistics.fmean(run.steps)


def tables(result: Mapping[str, Any]) -> list[Table]:
    return [_table(result, over) for over in ("results", "http") if over in result]


def _table(result: Mapping[str, Any], over: str) -> Table:
    work, way = result["workload"], "over HTTP" if over == "http" else "in process"
    title = f"{model(result)}, {work['rows']} rows, prompt {work['prompt']}, {work['new']} new tokens, {way}"
    names = {
        "tokens/s": "tokens_per_s", "over base": "tokens_per_s_over_base", "ms per step": "ms_per_token",
        "decode over base": "decode_over_base", "added ms": "added_ms", "aim": "added_aim_ms", "TTFT ms": "ttft_ms",
    }  # fmt: skip
    names = {label: name for label, name in names.items() if name in result[over][0]}
    shown = Table("", *names, title=title, caption=answers(result))
    for line in result[over]:
        shown.add_row(line["popularity"], *(f"{line[name]:.3g}" for name in names.values()))
    return shown


def draw(figure: Any, result: Mapping[str, Any]) -> None:
    """tokens/s by popularity."""
    lines: Sequence[Mapping[str, Any]] = result["results"]
    series = {"in process": [line["tokens_per_s"] for line in lines]}
    if "http" in result:
        series["over HTTP"] = [line["tokens_per_s"] for line in result["http"]]
    axes = figure.subplots()
    plots.bars(axes, [line["popularity"] for line in lines], series, "tokens/s")
    axes.legend()


def popularity(
    size: SizeFlag = "35m",
    rounds: RoundsFlag = 3,
    quick: QuickFlag = False,
    http: HttpFlag = False,
    engine_process: ProcessFlag = "auto",
    filed: FiledFlag = None,
    device: DeviceFlag = "cpu",
    profile: ProfileFlag = None,
    out: OutFlag = None,
) -> None:
    """32 rows that share adapters or each have their own, beside the base alone."""
    bench = begin(device, profile, quick)
    own: dict[str, Any] = {
        "http": http,
        "apart": is_apart(engine_process, device),
        "filed": another(filed, bench.setting.device),
    }
    plan = Plan(**QUICK, **own) if quick else Plan(rounds=rounds, **own)
    with many_loras(size, plan.rows, plan.rank, device=bench.setting.device, filed=filed) as workload:
        result = measure(workload, plan, bench)
    finish(result, tables(result), draw, out, bench)
