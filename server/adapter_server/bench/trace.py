"""`adapter-server bench trace`: S-LoRA's trace with more and more registered adapters, arrivals by a clock.

The draws are S-LoRA's own (`workloads.calls`); the rate is 1.25 times what this machine finishes with one adapter, as
its tables are taken above saturation, and lengths are short enough for a CPU. Adapters have r=8 on q, k, v and o. Each
number of adapters has a registry of its own, and every play begins with none of them in memory; the few and the many
are played once more with theirs in main memory, as S-LoRA has them. Prompts differ from round to round, so that nothing
is known from before.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

from adapter_server.bench import plots
from adapter_server.bench.cells import ratio, turned
from adapter_server.bench.command import (
    Bench,
    DeviceFlag,
    FiledFlag,
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
from adapter_server.bench.drive import Ask, Checker
from adapter_server.bench.http import serve, within
from adapter_server.bench.play import Arrival, Stage, check, figures, learn, live, medians
from adapter_server.bench.workloads import (
    ATTENTION,
    Filed,
    Trace,
    Workload,
    another,
    calls,
    link,
    many_loras,
    prompts,
)
from adapter_server.engine.engine import Engine
from adapter_server.registry.store import Store

FEW, MANY = 5, 2000  # whose ratio is the result
RANK = 8
FILES = 16  # distinct adapters on disk; the others are hard links to them
OVERLOAD = 1.25
WAYS = {  # what is shown of a result, and where its ratios stand
    "results": ("in process", "ratios"),
    "warm": ("in process, adapters in memory", "warm_ratios"),
    "http": ("over HTTP", "http_ratios"),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run."""

    adapters: tuple[int, ...] = (1, FEW, 20, 100, 200, MANY)
    seconds: float = 10.0
    lengths: tuple[int, int] = (4, 64)  # of prompts and of answers, the upper bound not included
    rows: int = 32
    capacity_s: float = 3.0  # about so long the capacity is measured
    rounds: int = 3
    alone: int = 4  # requests of each play that are asked again, alone
    http: bool = False
    filed: Filed | None = None  # the format of the adapters' files, where it is not the base's


QUICK: dict[str, Any] = {
    "adapters": (1, FEW, 20),
    "seconds": 0.5,
    "lengths": (2, 6),
    "rows": 4,
    "capacity_s": 0.1,
    "rounds": 1,
    "alone": 1,
}


def arrivals(plan: Plan, adapters: int, rate: float, turn: int, vocab: int) -> list[Arrival]:
    """The trace with so many adapters; a round's prompts are its own."""
    trace = Trace(adapters, rate, plan.seconds, plan.lengths, plan.lengths)
    made = calls(trace)
    given = prompts(len(made), plan.lengths[1], vocab, seed=1000 + turn)
    return [
        Arrival(call.at_s, Ask(prompt[: call.prompt], f"lora-{call.adapter}"), call.new)
        for call, prompt in zip(made, given, strict=True)
    ]


@contextmanager
def registries(workload: Workload, plan: Plan) -> Iterator[dict[int, Path]]:
    """A folder for each number of adapters, of hard links to those of the workload."""
    folders = {count: workload.adapters.parent / f"registry-{count}" for count in plan.adapters}
    names = list(workload.kinds)
    for count, folder in folders.items():
        for i in range(count):
            link(workload.adapters / names[i % len(names)], folder / f"lora-{i}")
    yield folders


def capacity(stage: Stage, plan: Plan, vocab: int) -> float:
    """Requests per second that are finished on one adapter when the queue is never empty: the second of two tries."""
    count, rate = 2 * plan.rows, 0.0
    for turn in range(2):
        given = prompts(count, plan.lengths[1], vocab, seed=turn)
        lengths = [(call.prompt, call.new) for call in calls(Trace(1, 1.0, float(count), plan.lengths, plan.lengths))]
        asked = [Arrival(0.0, Ask(p[:i], "lora-0"), n) for p, (i, n) in zip(given, lengths, strict=True)]
        rate = figures(stage.play(asked))["requests_per_s"]
        count = max(2 * plan.rows, min(int(plan.capacity_s * rate), 20 * plan.rows))
    return rate


class Plays:
    """The traces on a stage, in rounds."""

    def __init__(self, plan: Plan, vocab: int, rate: float, bench: Bench) -> None:
        self.plan, self.vocab, self.rate, self.bench = plan, vocab, rate, bench
        self.found: dict[int, list[dict[str, float]]] = {count: [] for count in plan.adapters}
        self.distinct: dict[int, int] = {}
        self.requests = 0

    def rounds(self, play: Callable[[int, list[Arrival]], dict[str, float]]) -> list[dict[str, Any]]:
        """Every number of adapters once a round, another first in each."""
        orders = [(turn, count) for turn in range(self.plan.rounds) for count in turned(self.plan.adapters, turn)]
        with Progress(console=self.bench.console, transient=True) as progress:
            for turn, count in progress.track(orders, description="play"):
                asked = arrivals(self.plan, count, self.rate, turn, self.vocab)
                self.requests = len(asked)
                self.distinct[count] = len({each.ask.adapter for each in asked})
                self.found[count].append(play(count, asked))
        about = {count: {"adapters": count, "distinct": self.distinct[count]} for count in self.plan.adapters}
        return [about[count] | medians(self.found[count]) for count in self.plan.adapters]


def played(stage: Stage, checker: Checker, asked: Sequence[Arrival], alone: int) -> dict[str, float]:
    """One play's figures. A sample of its requests is asked again, alone; of the others the lengths are checked."""
    replies = stage.play(asked)
    sample = range(0, len(asked), max(1, len(asked) // alone))
    for i, (arrival, reply) in enumerate(zip(asked, replies, strict=True)):
        if i in sample:
            learn(stage, checker, [arrival])
            check(checker, [arrival], [reply])
        elif len(reply.ids) != arrival.new:
            checker.expect(arrival.ask, tuple(reply.ids), ())
    checker.first.clear()  # another registry has other adapters under the same names
    return figures(replies)


def measure(workload: Workload, plan: Plan, bench: Bench) -> dict[str, Any]:
    """The whole as one JSON object."""
    limits = {
        "max_model_len": 2 * plan.lengths[1],
        "max_rows": plan.rows,
        "adapter_bytes": 2 << 30,
        "max_waiting": 1 << 16,
    }
    vocab = workload.shape.vocab
    with ExitStack() as stack:
        folders = stack.enter_context(registries(workload, plan))
        engine = stack.enter_context(bench.opened(workload, **limits))
        stage = stack.enter_context(live(engine))
        stores = {count: Store(folder, settle_s=0) for count, folder in folders.items()}
        checker = Checker(stage.gap, bench.setting.near)
        rate = OVERLOAD * capacity(stage, plan, vocab)

        def play(count: int, asked: list[Arrival]) -> dict[str, float]:
            engine.pool.store = stores[count]
            found = played(stage, checker, asked, plan.alone)
            forget(stage, engine)
            return found

        def warm_play(count: int, asked: list[Arrival]) -> dict[str, float]:
            engine.pool.store = stores[count]
            for name in sorted({each.ask.adapter for each in asked if each.ask.adapter}):
                stage.operate("load", name)
            return play(count, asked)

        plays = Plays(plan, vocab, rate, bench)
        results: dict[str, Any] = {"results": plays.rounds(play), "ratios": _ratios(plays)}
        warm = Plays(replace(plan, adapters=tuple(n for n in plan.adapters if n in (FEW, MANY))), vocab, rate, bench)
        results |= {"warm": warm.rounds(warm_play), "warm_ratios": _ratios(warm)}
        if plan.http:
            over = Plays(plan, vocab, rate, bench)
            results["http"] = over.rounds(_by_http(workload, plan, bench, folders, limits, checker))
            results["http_ratios"] = _ratios(over)
        bench.look()
        floors = [_floor(workload, plan, bench, min(count, plan.rows)) for count in plan.adapters]
        work = {**asdict(plan), "rank": RANK, "targets": ATTENTION, "rate": rate, "requests": plays.requests}
        return bench.result("trace", workload, engine, work, floor=floors, **results, answers=checker.summary)


def forget(stage: Stage, engine: Engine) -> None:
    """Every adapter out of memory."""
    for name in {resident.name for resident in engine.stats().residents}:
        stage.operate("unload", name)


def _by_http(
    workload: Workload,
    plan: Plan,
    bench: Bench,
    folders: Mapping[int, Path],
    limits: Mapping[str, Any],
    checker: Checker,
) -> Callable[[int, list[Arrival]], dict[str, float]]:
    """A server for each play, over the registry of its number of adapters."""

    def play(count: int, asked: list[Arrival]) -> dict[str, float]:
        with bench.opened(workload, **limits) as engine:
            engine.pool.store = Store(folders[count], settle_s=0)

            def work(client: Stage) -> dict[str, float]:
                own = Checker(client.gap, bench.setting.near)
                found = played(client, own, asked, plan.alone)
                checker.checked += own.checked
                checker.alone += own.alone
                checker.differing += own.differing
                return found

            return serve(within(engine), workload, work)

    return play


def _ratios(plays: Plays) -> dict[str, float]:
    """Requests per second with so many adapters over those with the few."""
    speeds = {count: [each["requests_per_s"] for each in found] for count, found in plays.found.items()}
    return {f"{count} / {FEW}": ratio(own, speeds[FEW]) for count, own in speeds.items() if count != FEW}


def _floor(workload: Workload, plan: Plan, bench: Bench, adapters: int) -> dict[str, Any]:
    context = statistics.mean(plan.lengths)
    more: dict[str, Any] = {"adapters": adapters, "rank": RANK, "targets": ATTENTION}
    held = bench.held(plan.filed)
    return bench.floor(workload, plan.rows, int(1.5 * context), held=held, **more)


def tables(result: Mapping[str, Any]) -> list[Table]:
    return [_table(result, over) for over in WAYS if over in result]


def _table(result: Mapping[str, Any], over: str) -> Table:
    work, (way, ratios) = result["workload"], WAYS[over]
    title = f"{model(result)}, {work['requests']} requests, {work['rate']:.3g} a second, {way}"
    shown = Table("adapters", "asked for", "requests/s", f"over {FEW}", "TTFT ms", "p99", "ITL p99 ms", title=title)
    shown.caption = answers(result)
    for line in result[over]:
        against = result[ratios].get(f"{line['adapters']} / {FEW}", 1.0)
        numbers = (line["requests_per_s"], against, line["ttft_ms"], line["ttft_p99_ms"], line["itl_p99_ms"])
        shown.add_row(str(line["adapters"]), str(line["distinct"]), *(f"{number:.3g}" for number in numbers))
    return shown


def draw(figure: Any, result: Mapping[str, Any]) -> None:
    """Throughput and time to the first token over the number of adapters."""
    upper, lower = figure.subplots(2, 1, sharex=True)
    at = [line["adapters"] for line in result["results"]]
    ways = {"in process": "results", "over HTTP": "http"}
    series = {way: result[over] for way, over in ways.items() if over in result}
    for axes, name, label in ((upper, "requests_per_s", "requests/s"), (lower, "ttft_ms", "TTFT ms")):
        plots.lines(axes, at, {way: [x[name] for x in lines] for way, lines in series.items()}, label, "adapters")
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)


def trace(
    size: SizeFlag = "35m",
    rounds: RoundsFlag = 3,
    quick: QuickFlag = False,
    http: HttpFlag = False,
    filed: FiledFlag = None,
    device: DeviceFlag = "cpu",
    profile: ProfileFlag = None,
    out: OutFlag = None,
) -> None:
    """S-LoRA's trace, from one registered adapter to 2,000: arrivals by a clock, and every adapter cold at first."""
    bench = begin(device, profile, quick)
    own: dict[str, Any] = {"http": http, "filed": another(filed, bench.setting.device)}
    plan = Plan(**QUICK, **own) if quick else Plan(rounds=rounds, **own)
    with many_loras(size, FILES, RANK, targets=ATTENTION, device=bench.setting.device, filed=filed) as workload:
        result = measure(workload, plan, bench)
    finish(result, tables(result), draw, out, bench)
