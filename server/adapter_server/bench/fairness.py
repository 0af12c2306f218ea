"""`adapter-server bench fairness`: one adapter's trickle beside another's flood.

At the start `lora-0` sends more than the rows can hold; while that lasts `lora-1` sends one request now and then:
alone, beside the flood, and, for comparison, as requests of the flood's own adapter, which wait their turn behind it.
"""

from __future__ import annotations

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
from adapter_server.bench.drive import Ask, Checker
from adapter_server.bench.play import Arrival, Stage, check, figures, learn, live, medians
from adapter_server.bench.workloads import Workload, many_loras, prompts

ALONE, BESIDE, WITHIN = "alone", "beside the flood", "of the flood's own adapter"
FLOOD, TRICKLE = "lora-0", "lora-1"
LATEST = 0.7  # of the flood's seconds: when the last of the trickle comes


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run."""

    rows: int = 8
    rank: int = 16
    flood: int = 64  # requests at once
    trickle: int = 8  # requests by turns
    prompt: int = 16
    new: int = 32
    rounds: int = 3


QUICK: dict[str, Any] = {"rows": 2, "rank": 4, "flood": 8, "trickle": 2, "prompt": 4, "new": 6, "rounds": 1}


class Scene:
    """The flood, and a trickle at the moments that the flood's own length gives."""

    def __init__(self, stage: Stage, workload: Workload, plan: Plan, checker: Checker) -> None:
        self.stage, self.plan, self.checker = stage, plan, checker
        given = prompts(plan.flood + plan.trickle, plan.prompt, workload.shape.vocab)
        self.flood = [Arrival(0.0, Ask(prompt, FLOOD), plan.new) for prompt in given[: plan.flood]]
        self.late = given[plan.flood :]
        self.seconds = 0.0  # that the flood takes by itself

    def measure(self, bench: Bench) -> list[dict[str, Any]]:
        """One line per way, every way once a round."""
        for name in (FLOOD, TRICKLE):
            self.stage.operate("load", name)
            learn(self.stage, self.checker, [Arrival(0.0, Ask(self.late[0], name), self.plan.new)])
        self.seconds = max(reply.times[-1] for reply in self.stage.play(self.flood))
        ways = {ALONE: (TRICKLE, ()), BESIDE: (TRICKLE, self.flood), WITHIN: (FLOOD, self.flood)}
        found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        turns = [way for _ in range(self.plan.rounds) for way in ways]
        with Progress(console=bench.console, transient=True) as progress:
            for way in progress.track(turns, description="play"):
                found[way].append(self._play(*ways[way]))
        return [_line(way, found) for way in ways]

    def _play(self, adapter: str, flood: Sequence[Arrival]) -> dict[str, float]:
        """The trickle's figures alone."""
        step = LATEST * self.seconds / len(self.late)
        late = [Arrival((i + 1) * step, Ask(prompt, adapter), self.plan.new) for i, prompt in enumerate(self.late)]
        asked = [*flood, *late]
        replies = self.stage.play(asked)
        check(self.checker, asked, replies)
        return figures(replies[len(flood) :])


def _line(way: str, found: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    own, alone = found[way], found[ALONE]
    over = {
        f"{name.removesuffix('_ms')}_over_alone": ratio([each[name] for each in own], [each[name] for each in alone])
        for name in ("ttft_ms", "ttft_p99_ms", "latency_ms")
    }
    return {"way": way, **over, **medians([dict(each) for each in own])}


def measure(workload: Workload, plan: Plan, bench: Bench) -> dict[str, Any]:
    """The whole as one JSON object."""
    limits = {"max_model_len": plan.prompt + plan.new, "max_rows": plan.rows}
    with bench.opened(workload, **limits) as engine, live(engine) as stage:
        checker = Checker(stage.gap, bench.setting.near)
        scene = Scene(stage, workload, plan, checker)
        lines = scene.measure(bench)
        bench.look()
        floor = [bench.floor(workload, plan.rows, plan.prompt + plan.new // 2, adapters=2, rank=plan.rank)]
        more: dict[str, Any] = {"floor": floor, "flood_s": scene.seconds, "answers": checker.summary}
        return bench.result("fairness", workload, engine, asdict(plan), results=lines, **more)


def table(result: Mapping[str, Any]) -> Table:
    """One line per way."""
    work = result["workload"]
    title = f"{model(result)}, {work['trickle']} requests beside {work['flood']} at once, {work['rows']} rows"
    names = {
        "TTFT ms": "ttft_ms", "over alone": "ttft_over_alone", "completion ms": "latency_ms",
        "over alone ": "latency_over_alone",
    }  # fmt: skip
    shown = Table("the trickle", *names, title=title, caption=answers(result))
    for line in result["results"]:
        shown.add_row(line["way"], *(f"{line[name]:.3g}" for name in names.values()))
    return shown


def draw(figure: Any, result: Mapping[str, Any]) -> None:
    """The trickle's time to its first token and to its last."""
    lines, names = result["results"], {"first token": "ttft_ms", "completion": "latency_ms"}
    axes = figure.subplots()
    series = {label: [line[name] for line in lines] for label, name in names.items()}
    plots.bars(axes, [line["way"] for line in lines], series, "ms")
    axes.legend()


def fairness(
    size: SizeFlag = "35m",
    rounds: RoundsFlag = 3,
    quick: QuickFlag = False,
    device: DeviceFlag = "cpu",
    profile: ProfileFlag = None,
    out: OutFlag = None,
) -> None:
    """One adapter's trickle beside another's flood."""
    bench = begin(device, profile, quick)
    plan = Plan(**QUICK) if quick else Plan(rounds=rounds)
    with many_loras(size, 2, plan.rank, device=bench.setting.device) as workload:
        result = measure(workload, plan, bench)
    finish(result, [table(result)], draw, out, bench)
