"""`adapter-server bench hotload`: what running rows feel while adapters load, are published, merged and evicted.

Rows decode, half on the base and half on one adapter, with and without such deeds beside them, in turn: the result is
the ratio of the 99th percentiles of their inter-token latencies. Then one request alone on an adapter that is not in
memory, against the same when it is; and 16 adapters by turns in room for 16 and for 8.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.progress import Progress
from rich.table import Table

from adapter_server.bench import plots
from adapter_server.bench.cells import ratio
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
from adapter_server.bench.drive import Ask, Checker, Tokens, made
from adapter_server.bench.http import serve, within
from adapter_server.bench.play import Arrival, Deed, Stage, check, figures, learn, live, medians
from adapter_server.bench.workloads import Workload, many_loras, prompts
from adapter_server.engine.engine import Engine
from adapter_server.registry import guard

CALM, BUSY = "without", "while loading"
DEEDS = ("load", "publish", "merge", "unmerge", "unload")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run."""

    rows: int = 8
    prompt: int = 16
    new: int = 256
    rank: int = 8
    period_s: float = 0.25  # from one deed to the next
    cold: int = 8  # cold loads
    places: int = 8  # the room of the second half of thrashing, in adapters; twice as many take turns
    turns: int = 3  # of each adapter there
    rounds: int = 3
    http: bool = False


QUICK: dict[str, Any] = {
    "rows": 2,
    "prompt": 4,
    "new": 24,
    "period_s": 0.02,
    "cold": 2,
    "places": 2,
    "turns": 2,
    "rounds": 1,
}


class Scene:
    """A stage, its adapters and what is asked of them. `lora-0` is the running rows' own; deeds never touch it."""

    def __init__(self, stage: Stage, engine: Engine, workload: Workload, plan: Plan, bench: Bench) -> None:
        self.stage, self.engine, self.workload, self.plan, self.bench = stage, engine, workload, plan, bench
        self.checker = Checker(stage.gap, bench.setting.near)
        self.names = [name for name in workload.kinds if name != "lora-0"]
        given = prompts(plan.rows, plan.prompt, workload.shape.vocab)
        self.running = [Arrival(0.0, Ask(p, "lora-0" if i % 2 else None), plan.new) for i, p in enumerate(given)]
        self.done: list[str] = []

    def measure(self) -> dict[str, Any]:
        """Everything, as JSON."""
        learn(self.stage, self.checker, self.running[:2])
        stall = self._stall()
        cold = cold_loads(self.stage, self.workload, self.names, self.running[0].ask.prompt, self.plan.cold)
        return {**stall, "cold": cold, "thrash": self._thrash()}

    def _stall(self) -> dict[str, Any]:
        found: dict[str, list[dict[str, float]]] = {CALM: [], BUSY: []}
        whole = self._play(())["whole_s"]
        with Progress(console=self.bench.console, transient=True) as progress:
            for turn in progress.track(range(2 * self.plan.rounds), description="play"):
                way = BUSY if turn % 2 else CALM
                found[way].append(self._play(self._deeds(whole) if way == BUSY else ()))
        p99 = {way: [each["itl_p99_ms"] for each in plays] for way, plays in found.items()}
        return {
            "results": [{"way": way, **medians(plays)} for way, plays in found.items()],
            "itl_p99_ratio": ratio(p99[BUSY], p99[CALM]),
            "deeds": {name: self.done.count(name) for name in DEEDS},
        }

    def _play(self, deeds: Sequence[Deed]) -> dict[str, float]:
        replies = self.stage.play(self.running, deeds)
        check(self.checker, self.running, replies)
        return figures(replies) | {"whole_s": max(reply.times[-1] for reply in replies)}

    def _deeds(self, whole_s: float) -> list[Deed]:
        """Through the adapters by turns, one deed a period, as long as the rows run."""
        order = itertools.cycle((deed, name) for name in self.names for deed in DEEDS)
        count = int(whole_s / self.plan.period_s)
        return [self._deed(self.plan.period_s * (i + 1), *next(order)) for i in range(count)]

    def _deed(self, due_s: float, deed: str, name: str) -> Deed:
        def work() -> None:
            self.done.append(deed)
            if deed == "publish":
                other = self.names[(self.names.index(name) + 1) % len(self.names)]
                self.stage.publish(name, self.workload.adapters / other)
            else:
                self.stage.operate(deed, name)  # type: ignore[arg-type]

        return Deed(due_s, deed, work)

    def _thrash(self) -> dict[str, Any]:
        """Twice as many adapters as there are places, one request after another is due: a row's time each."""
        names = self.names[: 2 * self.plan.places]
        for name in self.workload.kinds:
            self.stage.operate("unload", name)
        self.stage.operate("load", names[0])
        one = self.engine.pool.used
        budget, found = self.engine.pool.budget, {}
        (alone,) = self.stage.play([Arrival(0.0, Ask(self.running[0].ask.prompt, names[0]), 8)])
        given = prompts(len(names) * self.plan.turns, self.plan.prompt, self.workload.shape.vocab, seed=7)
        asked = [Arrival(i * alone.total_s / 2, Ask(p, names[i % len(names)]), 8) for i, p in enumerate(given)]
        try:
            for places in (2 * self.plan.places, self.plan.places):
                for name in names:
                    self.stage.operate("unload", name)
                self.engine.pool.budget = places * one
                replies = self.stage.play(asked)
                check(self.checker, asked, replies)
                found[str(places)] = figures(replies)
        finally:
            self.engine.pool.budget = budget
        return {"adapters": len(names), "adapter_bytes": one, "by_places": found}


def cold_loads(stage: Stage, workload: Workload, names: Sequence[str], prompt: Tokens, count: int) -> dict[str, Any]:
    """To the first token of one request, its adapter on disk only (in the page cache) and in memory."""
    cold: list[float] = []
    warm: list[float] = []
    for i in range(count):
        ask = Arrival(0.0, Ask(prompt, names[i % len(names)]), 2)
        stage.operate("unload", names[i % len(names)])
        for times in (cold, warm):
            (reply,) = stage.play([ask])
            times.append(1e3 * reply.ttft_s)
    size = (workload.adapters / names[0] / guard.WEIGHTS).stat().st_size
    load = statistics.median(c - w for c, w in zip(cold, warm, strict=True))
    return {
        "file_bytes": size, "ttft_cold_ms": statistics.median(cold), "ttft_warm_ms": statistics.median(warm),
        "load_ms": load, "rounds": {"cold": cold, "warm": warm},
    }  # fmt: skip


def measure_cold(workload: Workload, plan: Plan, bench: Bench) -> dict[str, Any]:
    """Cold loads alone, of the adapters `PREFIX-0`, `PREFIX-1`, … by prefix, and how soon the engine is ready."""
    prompt = prompts(1, plan.prompt, workload.shape.vocab)[0]
    limits = {"max_model_len": 2 * plan.prompt}
    found: dict[str, Any] = {}
    with bench.opened(workload, **limits) as engine:
        with live(engine) as stage:
            checker = Checker(stage.gap, bench.setting.near)
            for prefix in dict.fromkeys(name.rpartition("-")[0] for name in workload.kinds):
                names = [name for name in workload.kinds if name.startswith(f"{prefix}-")]
                asked = [Arrival(0.0, Ask(prompt, name), 2) for name in names]
                learn(stage, checker, asked)
                found[prefix] = cold_loads(stage, workload, names, prompt, plan.cold)
                check(checker, asked, [stage.play([each])[0] for each in asked])
        cold = sorted(found.values(), key=lambda each: int(each["file_bytes"]))
        return bench.result("coldload", workload, engine, asdict(plan), results=cold, answers=checker.summary)


def measure(workload: Workload, plan: Plan, bench: Bench) -> dict[str, Any]:
    """The whole as one JSON object."""
    limits = {"max_model_len": 2 * plan.prompt + plan.new, "max_rows": max(32, plan.rows)}
    with bench.opened(workload, **limits) as engine:
        ready_s = _ready_s(workload, bench, limits)
        bench.look()
        floor = [bench.floor(workload, plan.rows, plan.prompt + plan.new // 2, adapters=1, rank=plan.rank)]
        with live(engine) as stage:
            scene = Scene(stage, engine, workload, plan, bench)
            found = scene.measure()
        checked = scene.checker
        more: dict[str, Any] = {}
        if plan.http:
            with bench.opened(workload, **limits) as second:
                more["http"], other = serve(
                    within(second), workload, lambda client: _both(client, second, workload, plan, bench)
                )
            checked.checked += other.checked
            checked.alone += other.alone
            checked.differing += other.differing
        found |= {"floor": floor, "ready_s": ready_s, **more, "answers": checked.summary}
        return bench.result("hotload", workload, engine, asdict(plan), **found)


def _ready_s(workload: Workload, bench: Bench, limits: Mapping[str, Any]) -> float:
    """From a loaded base to an engine that can answer; a second one, so that no first use of the machine is in it."""
    second, seconds = made(workload, bench.setting, **limits)
    second.close()
    return seconds


def _both(stage: Stage, engine: Engine, workload: Workload, plan: Plan, bench: Bench) -> tuple[dict[str, Any], Checker]:
    scene = Scene(stage, engine, workload, plan, bench)
    return scene.measure(), scene.checker


def tables(result: Mapping[str, Any]) -> list[Table]:
    ways = [("in process", result)] + ([("over HTTP", result["http"])] if "http" in result else [])
    return [_table(result, found, way) for way, found in ways]


def _table(result: Mapping[str, Any], found: Mapping[str, Any], way: str) -> Table:
    title = f"{model(result)}, {result['workload']['rows']} rows, {way}"
    shown = Table("", "ITL ms", "p99", "TTFT ms", "p99", title=title, caption=answers(result))
    names = ("itl_ms", "itl_p99_ms", "ttft_ms", "ttft_p99_ms")
    lines = {line["way"]: line for line in found["results"]}
    lines |= {
        f"{n} adapters in {places} places": each
        for places, each in found["thrash"]["by_places"].items()
        for n in [found["thrash"]["adapters"]]
    }
    for label, line in lines.items():
        shown.add_row(label, *(f"{line[name]:.3g}" for name in names))
    cold = found["cold"]
    shown.add_row("one request, cold / warm", "", "", f"{cold['ttft_cold_ms']:.3g} / {cold['ttft_warm_ms']:.3g}", "")
    shown.add_row("p99 while loading, over without", "", f"{found['itl_p99_ratio']:.2f}", "", "")
    return shown


def draw(figure: Any, result: Mapping[str, Any]) -> None:
    """Inter-token latency with and without deeds, and TTFT with room and without."""
    left, right = figure.subplots(1, 2)
    lines = result["results"]
    names = {"median": "itl_ms", "p99": "itl_p99_ms"}
    series = {label: [line[name] for line in lines] for label, name in names.items()}
    plots.bars(left, [line["way"] for line in lines], series, "inter-token latency, ms")
    left.legend()
    places = result["thrash"]["by_places"]
    names = {"median": "ttft_ms", "p99": "ttft_p99_ms"}
    series = {label: [each[name] for each in places.values()] for label, name in names.items()}
    plots.bars(right, [f"{each} places" for each in places], series, "TTFT, ms")


def hotload(
    size: SizeFlag = "35m",
    rounds: RoundsFlag = 3,
    quick: QuickFlag = False,
    http: HttpFlag = False,
    device: DeviceFlag = "cpu",
    profile: ProfileFlag = None,
    out: OutFlag = None,
) -> None:
    """What running rows feel while adapters load, are published, merged and evicted; cold loads; thrashing."""
    bench = begin(device, profile, quick)
    plan = Plan(**QUICK, http=http) if quick else Plan(rounds=rounds, http=http)
    with many_loras(size, 2 * plan.places + 1, plan.rank, device=bench.setting.device) as workload:
        result = measure(workload, plan, bench)
    finish(result, tables(result), draw, out, bench)
