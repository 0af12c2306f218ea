"""Ours beside what else runs many adapters, interleaved: end-to-end tokens per second.

    python benchmarks/rivals.py --size 35m --continuous --merged --out benchmarks/results

32 rows, 16 LoRA adapters r=16 on all seven projections, float32, greedy. Within a round every rival runs once; figures
are medians over the rounds, and ratios are medians of the rounds' own ratios. Every answer is compared with PEFT's.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from adapter_server.bench import report
from adapter_server.bench.drive import NEAR_TIE, Ask, Checker, Tokens, drive, gap, ready
from adapter_server.bench.workloads import Popularity, Workload, choose, many_loras, prompts
from adapter_server.config import GIB, EngineConfig
from adapter_server.engine import Engine, build
from adapter_server.registry.store import Store

LAWS: Mapping[str, Popularity] = {
    "ours, uniform": "uniform",
    "ours, identical": "identical",
    "ours, distinct": "distinct",
    "ours, skewed": "skewed",
}
BASE, MIXED, ONE_BY_ONE = "ours, base", "PEFT, mixed batch", "PEFT, one at a time"
GENERATE, CONTINUOUS, MERGED = "transformers, base", "transformers, continuous batching, base", "merged, one adapter"
WARM_TOKENS = 3
RANK = 16
MANY, ONE = "ours, uniform", "ours, identical"
LLAMA_MANY, LLAMA_BASE = "llama-server f32, 16 adapters", "llama-server f32, base"
STREAM = "one stream, ms per token, ours / llama-server f32"

Size = Literal["tiny", "35m", "200m"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run."""

    rows: int = 32
    adapters: int = 16
    prompt: int = 64
    new: int = 64
    rounds: int = 3
    sample: int = 2  # requests of PEFT's one at a time that a round measures
    continuous: bool = False
    merged: bool = False


QUICK = Plan(rows=4, adapters=2, prompt=8, new=4, rounds=1, sample=1, continuous=False, merged=True)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One rival's round. `seconds` is for all rows, scaled up where only some of them ran."""

    seconds: float
    answers: Mapping[int, Tokens]  # by row
    step_ms: float | None = None


Rival = Callable[[int, int], Outcome]  # given the round's number, and how many new tokens


class Scene:
    """The models, the prompts, and every rival as a function of the round."""

    def __init__(self, workload: Workload, plan: Plan, llama: Any = None) -> None:
        self.workload, self.plan, self.llama = workload, plan, llama
        self.prompts = prompts(plan.rows, plan.prompt, workload.shape.vocab)
        self.engine = self._engine()
        self.plain = _load(workload)
        self.peft = self._peft()
        self.asks = {name: self._asks(choose(law, plan.rows, self._count(law))) for name, law in LAWS.items()}
        self.asks[BASE] = [Ask(prompt) for prompt in self.prompts]

    def _engine(self) -> Engine:
        plan = self.plan
        config = EngineConfig(
            dtype="float32",
            device="cpu",
            max_model_len=plan.prompt + plan.new,
            max_rows=plan.rows,
            adapter_bytes=8 * GIB,
            prefix_cache_bytes=0,  # rounds repeat their prompts
        )
        return build(self.workload.model, config, Store(self.workload.adapters, settle_s=0))

    def _peft(self) -> Any:
        names = list(self.workload.kinds)[: self.plan.adapters]
        model = PeftModel.from_pretrained(_load(self.workload), self.workload.adapters / names[0], names[0])
        for name in names[1:]:
            model.load_adapter(self.workload.adapters / name, name)
        return model.eval()

    def _count(self, law: Popularity) -> int:
        return self.plan.rows if law == "distinct" else self.plan.adapters

    def _asks(self, chosen: Sequence[int]) -> list[Ask]:
        return [Ask(prompt, f"lora-{i}") for prompt, i in zip(self.prompts, chosen, strict=True)]

    @property
    def rivals(self) -> dict[str, Rival]:
        """By name, in the order of the table."""
        ours: dict[str, Rival] = {name: self._ours(asks) for name, asks in self.asks.items()}
        rivals: dict[str, Rival] = {MIXED: self.mixed, ONE_BY_ONE: self.one_by_one, GENERATE: self.generate}
        if self.plan.merged:
            rivals[MERGED] = self._merged()
        if self.plan.continuous:
            rivals[CONTINUOUS] = self.continuous
        if self.llama is not None:
            rivals |= {LLAMA_MANY: self._llama(self.asks[MANY]), LLAMA_BASE: self._llama(self.asks[BASE])}
        return ours | rivals

    def _llama(self, asks: Sequence[Ask]) -> Rival:
        """llama-server over HTTP, all rows at once; `lora-3` is its adapter 3."""
        given = [ask.prompt for ask in asks]
        adapters = [None if ask.adapter is None else int(ask.adapter.rpartition("-")[2]) for ask in asks]
        return lambda _, new: _timed(lambda: self.llama.batch(given, adapters, new))

    def one_stream(self, new: int) -> dict[str, float]:
        """ms per token of one row on one adapter."""
        ask = self.asks[ONE][0]
        found = {"ours": drive(self.engine, [ask], new).ms_per_token}
        return found if self.llama is None else found | {"llama-server f32": self.llama.ms_per_token(ask.prompt, new)}

    def _ours(self, asks: Sequence[Ask]) -> Rival:
        for ask in asks:
            ready(self.engine, ask)

        def run(_: int, new: int) -> Outcome:
            ran = drive(self.engine, asks, new)
            return Outcome(ran.total_s, dict(enumerate(ran.answers)), ran.ms_per_token)

        return run

    def mixed(self, _: int, new: int) -> Outcome:
        """`adapter_names` in `generate`: every row its own adapter, in one batch."""
        names = [ask.adapter for ask in self.asks[MANY]]
        return _timed(lambda: _generate(self.peft, self.prompts, new, adapter_names=names))

    def one_by_one(self, turn: int, new: int) -> Outcome:
        """`set_adapter`, then `generate`, for some of the requests; the time is scaled to all of them."""
        plan = self.plan
        rows = [(turn * plan.sample + i) % plan.rows for i in range(plan.sample)]
        start, answers = time.perf_counter(), {}
        for row in rows:
            self.peft.set_adapter(self.asks[MANY][row].adapter)
            answers[row] = _generate(self.peft, [self.prompts[row]], new)[0]
        return Outcome((time.perf_counter() - start) * plan.rows / plan.sample, answers)

    def generate(self, _: int, new: int) -> Outcome:
        """The base alone, one static batch."""
        return _timed(lambda: _generate(self.plain, self.prompts, new))

    def _merged(self) -> Rival:
        """A model with one adapter folded in, one static batch: what a server of one adapter would run."""
        name = next(iter(self.workload.kinds))
        folded = PeftModel.from_pretrained(_load(self.workload), self.workload.adapters / name).merge_and_unload()
        return lambda _, new: _timed(lambda: _generate(folded, self.prompts, new))

    def continuous(self, _: int, new: int) -> Outcome:
        """transformers' continuous batching, which knows no adapters."""
        config = _greedy(self.plain, new)
        start = time.perf_counter()
        outputs = self.plain.generate_batch([list(p) for p in self.prompts], generation_config=config)
        seconds = time.perf_counter() - start
        ordered = sorted(outputs.items(), key=lambda item: int(item[0].rpartition("_")[2]))
        return Outcome(seconds, {row: tuple(out.generated_tokens) for row, (_, out) in enumerate(ordered)})


def _load(workload: Workload) -> Any:
    return AutoModelForCausalLM.from_pretrained(workload.model, dtype=torch.float32).eval()


def _greedy(model: Any, new: int) -> Any:
    config = type(model.generation_config).from_model_config(model.config)
    config.update(max_new_tokens=new, min_new_tokens=None, do_sample=False, eos_token_id=None)
    return config


@torch.inference_mode()
def _generate(model: Any, asked: Sequence[Tokens], new: int, **options: Any) -> list[Tokens]:
    ids = torch.tensor(asked)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=_greedy(model, new),
        **options,
    )
    return [tuple(row) for row in out[:, ids.shape[1] :].tolist()]


def _timed(work: Callable[[], list[Tokens]]) -> Outcome:
    start = time.perf_counter()
    answers = work()
    return Outcome(time.perf_counter() - start, dict(enumerate(answers)))


def measure(size: str, plan: Plan, console: Console) -> dict[str, Any]:
    """Everything as one JSON object."""
    with many_loras(size, max(plan.rows, plan.adapters), RANK) as workload, _scene(workload, plan) as scene:
        streams: list[dict[str, float]] = []
        before = report.measured_rates(quick=size == "tiny")
        rounds = _rounds(scene.rivals, plan, console, lambda: streams.append(scene.one_stream(plan.new)))
        rates = report.faster(before, report.measured_rates(quick=size == "tiny"))
        return {
            "benchmark": "rivals",
            "workload": {"size": size, **asdict(plan), "rank": RANK, "dtype": "float32"},
            "model": {"parameters": scene.engine.info.parameters, **asdict(workload.shape)},
            **report.facts(),
            "measured": rates,
            "floor": [_floor(workload, plan, adapters, rates) for adapters in (0, plan.adapters, plan.rows)],
            "results": [_line(name, outcomes, plan) for name, outcomes in rounds.items()],
            "one_stream": {name: statistics.median(each[name] for each in streams) for name in streams[0]},
            "ratios": _ratios(rounds) | _stream_ratio(streams),
            "answers": _answers(scene, rounds),
            "notes": {
                ONE_BY_ONE: f"{plan.sample} of {plan.rows} requests a round, time scaled to all",
                "llama-server": _agreement(rounds) if scene.llama else "not measured: set LLAMA_SERVER",
            },
        }


def _floor(workload: Workload, plan: Plan, adapters: int, rates: Mapping[str, float]) -> dict[str, Any]:
    """Of a decode step with so many adapters, half-way through the answers."""
    context = plan.prompt + plan.new // 2
    found = report.floor(workload.shape, plan.rows, context, adapters, RANK)
    return report.timed_floor(found, rates, rows=plan.rows, context=context, adapters=adapters)


@contextmanager
def _scene(workload: Workload, plan: Plan) -> Iterator[Scene]:
    with warnings.catch_warnings():
        for noise in (UserWarning, FutureWarning):  # what PEFT and generate say of each other, and of options we mean
            warnings.simplefilter("ignore", noise)
        with _llama(workload, plan) as llama:
            scene = Scene(workload, plan, llama)
            try:
                yield scene
            finally:
                scene.engine.close()


@contextmanager
def _llama(workload: Workload, plan: Plan) -> Iterator[Any]:
    """llama-server where LLAMA_SERVER names its binary, else None. It idles while others are measured."""
    if not os.environ.get("LLAMA_SERVER"):
        yield None
        return
    from llama import llama_server

    names = list(workload.kinds)[: plan.adapters]
    with llama_server(workload, names, plan.rows, plan.prompt + plan.new, torch.get_num_threads()) as running:
        yield running


def _stream_ratio(streams: Sequence[Mapping[str, float]]) -> dict[str, float]:
    pairs = [each["ours"] / each["llama-server f32"] for each in streams if "llama-server f32" in each]
    return {STREAM: statistics.median(pairs)} if pairs else {}


def _agreement(rounds: Mapping[str, Sequence[Outcome]]) -> str:
    """How many of its tokens are ours: random weights have many near ties, and its kernels round otherwise."""
    shares = []
    for theirs, ours in ((LLAMA_MANY, MANY), (LLAMA_BASE, BASE)):
        pairs = [(rounds[theirs][0].answers[row], rounds[ours][0].answers[row]) for row in rounds[ours][0].answers]
        same = sum(a == b for one, other in pairs for a, b in zip(one, other, strict=False))
        shares.append(f"{same / sum(len(other) for _, other in pairs):.1%}")
    return f"tokens that are ours: {shares[0]} with adapters, {shares[1]} of the base"


def _rounds(
    rivals: Mapping[str, Rival], plan: Plan, console: Console, after: Callable[[], None]
) -> dict[str, list[Outcome]]:
    """A few tokens untimed, then the rounds, another rival first in each; `after` each round something else."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in rivals}
    names = list(rivals)
    with Progress(console=console, transient=True) as progress:
        for name in progress.track(names, description="warm up"):
            rivals[name](0, min(WARM_TOKENS, plan.new))
        orders = [names[turn % len(names) :] + names[: turn % len(names)] for turn in range(plan.rounds)]
        turns = [(turn, name) for turn, order in enumerate(orders) for name in order]
        for turn, name in progress.track(turns, description="measure"):
            gc.collect()
            outcomes[name].append(rivals[name](turn, plan.new))
            if name == orders[turn][-1]:
                after()
    return outcomes


def _line(name: str, outcomes: Sequence[Outcome], plan: Plan) -> dict[str, Any]:
    speeds = [plan.rows * plan.new / outcome.seconds for outcome in outcomes]
    steps = [outcome.step_ms for outcome in outcomes if outcome.step_ms is not None]
    return {
        "rival": name,
        "tokens_per_s": statistics.median(speeds),
        "step_ms": statistics.median(steps) if steps else None,
        "rounds": {"tokens_per_s": speeds, "step_ms": steps or None},
    }


def _ratios(rounds: Mapping[str, Sequence[Outcome]]) -> dict[str, float]:
    """How many times faster ours with all adapters is than every other line; like beside like; popularity's price."""
    pairs = {f"{MANY} / {name}": (MANY, name) for name in rounds if name != MANY}
    pairs |= {f"{BASE} / {name}": (BASE, name) for name in (GENERATE, CONTINUOUS, LLAMA_BASE) if name in rounds}
    pairs |= {f"{name} / {BASE}": (name, BASE) for name in LAWS if name != MANY}
    pairs |= {f"{ONE} / {MERGED}": (ONE, MERGED)} if MERGED in rounds else {}
    ratios = {label: _ratio(rounds[ours], rounds[theirs], "seconds") for label, (ours, theirs) in pairs.items()}
    decode = {f"{name} / {BASE}, decode step": _ratio(rounds[name], rounds[BASE], "step_ms") for name in LAWS}
    return ratios | decode


def _ratio(ours: Sequence[Outcome], theirs: Sequence[Outcome], of: str) -> float:
    """Speed of ours over speed of theirs."""
    pairs = zip(ours, theirs, strict=True)
    return float(statistics.median(getattr(b, of) / getattr(a, of) for a, b in pairs))


def _answers(scene: Scene, rounds: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    """Ours against PEFT's and transformers' on the same rows, and ours against itself; gaps are in logits."""
    pairs = [(MANY, MIXED), (MANY, ONE_BY_ONE), (BASE, GENERATE)]
    pairs += [(BASE, CONTINUOUS)] if CONTINUOUS in rounds else []
    pairs += [(ONE, MERGED)] if MERGED in rounds else []
    pairs += [(name, name) for name in scene.asks]
    against = {f"{ours} = {theirs}": _compare(scene, rounds, ours, theirs) for ours, theirs in pairs}
    names = ("checked", "wrong", "near_ties")
    return {**{name: sum(each[name] for each in against.values()) for name in names}, "near": NEAR_TIE, "of": against}


def _compare(scene: Scene, rounds: Mapping[str, Sequence[Outcome]], ours: str, theirs: str) -> dict[str, Any]:
    """Every answer of theirs, in every round, against the first of ours."""
    checker, first = Checker(partial(gap, scene.engine)), rounds[ours][0].answers
    for outcome in rounds[theirs]:
        for row, answer in outcome.answers.items():
            checker.expect(scene.asks[ours][row], first[row], answer)
    return checker.summary


def table(result: Mapping[str, Any]) -> Table:
    work, answers = result["workload"], result["answers"]
    caption = f"{answers['checked']} answers checked, {answers['wrong']} wrong, {answers['near_ties']} near ties"
    shown = Table("", "tokens/s", "ms per step", f"{MANY}, over it", title=_title(work), caption=caption)
    for line in result["results"]:
        step = "" if line["step_ms"] is None else f"{line['step_ms']:.1f}"
        ratio = result["ratios"].get(f"{MANY} / {line['rival']}")
        shown.add_row(line["rival"], f"{line['tokens_per_s']:.0f}", step, "" if ratio is None else f"{ratio:.2f} x")
    return shown


def _title(work: Mapping[str, Any]) -> str:
    return f"{work['size']}, {work['rows']} rows, prompt {work['prompt']}, {work['new']} new tokens"


def main(
    size: Annotated[Size, typer.Option("--size", help="Random weights of a size")] = "35m",
    rounds: Annotated[int, typer.Option(help="Rounds; figures are medians over them", min=1)] = 3,
    continuous: Annotated[bool, typer.Option("--continuous", help="Also transformers' continuous batching")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="Also a model with one adapter merged")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few rows and tokens, to see that it runs")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the result")] = None,
) -> None:
    """Ours beside PEFT and transformers: a table, and one last line of JSON."""
    disable_progress_bar()
    plan = QUICK if quick else Plan(rounds=rounds, continuous=continuous, merged=merged)
    result = measure(size, plan, Console(stderr=True))
    Console(soft_wrap=True).print(table(result))
    report.publish(result, None if out is None else out / f"{report.name(result)}.json")


if __name__ == "__main__":
    typer.run(main)
