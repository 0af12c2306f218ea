"""Ours beside what else runs many adapters, interleaved: end-to-end tokens per second.

    python benchmarks/rivals.py --size 35m --continuous --merged --out benchmarks/results
    python benchmarks/rivals.py --size 8b --device cuda --rounds 2 --theirs 8 --continuous --out benchmarks/results

32 rows, 16 LoRA adapters r=16 on all seven projections, greedy; float32 on the CPU, base and adapters in bfloat16 on
CUDA. Within a round every rival runs once; figures are medians over the rounds, and ratios are medians of the rounds'
own ratios. Every answer is compared with PEFT's. Of PEFT's slow ways a part may stand for the whole: --sample of the
requests one at a time, and --theirs of the new tokens, the others at the median step of those.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import ContinuousBatchingConfig, StoppingCriteria

from adapter_server.bench import report
from adapter_server.bench.command import Bench, DeviceFlag, bare
from adapter_server.bench.drive import Ask, Checker, Tokens, base_of, drive, gap, ready
from adapter_server.bench.workloads import IN_PLACE, Popularity, Workload, choose, many_loras, prompts
from adapter_server.engine.engine import Engine
from adapter_server.errors import AdapterServerError, RequestFailed

PAGE = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"  # in transformers 5.17
LAWS: Mapping[str, Popularity] = {
    "ours, uniform": "uniform",
    "ours, identical": "identical",
    "ours, distinct": "distinct",
    "ours, skewed": "skewed",
}
BASE, MIXED, ONE_BY_ONE = "ours, base", "PEFT, mixed batch", "PEFT, one at a time"
GENERATE, CONTINUOUS, MERGED = "transformers, base", "transformers, continuous batching, base", "merged, one adapter"
WARM_TOKENS = 3
BLOCK_TOKENS = 256  # of a page of transformers' continuous batching
RANK = 16
MANY, ONE = "ours, uniform", "ours, identical"
LLAMA_MANY, LLAMA_BASE = "llama-server f32, 16 adapters", "llama-server f32, base"
STREAM = "one stream, ms per token, ours / llama-server f32"

Size = Literal["tiny", "35m", "200m", "0.6b", "1b", "8b"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run."""

    rows: int = 32
    adapters: int = 16
    prompt: int = 64
    new: int = 64
    rounds: int = 3
    sample: int = 2  # requests of PEFT's one at a time that a round measures
    theirs: int = 0  # new tokens that PEFT makes; 0: all
    continuous: bool = False
    merged: bool = False


QUICK = Plan(rows=4, adapters=2, prompt=8, new=4, rounds=1, sample=1, continuous=True, merged=True)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One rival's round. `seconds` is for all rows and tokens, scaled up where only some of them ran."""

    seconds: float
    answers: Mapping[int, Tokens]  # by row
    step_ms: float | None = None


Rival = Callable[[int, int], Outcome]  # given the round's number, and how many new tokens


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing: it notes when each token of a `generate` was there."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter() - self.start)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @property
    def step_s(self) -> float | None:
        """The median step after the prompt's."""
        steps = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        return statistics.median(steps) if steps else None


@dataclass(slots=True)
class Generated:
    """What a `generate` gave, and the seconds that so many new tokens take at its pace."""

    answers: list[Tokens]
    seconds: float
    step_s: float | None

    def whole_s(self, new: int) -> float:
        return self.seconds + (new - len(self.answers[0])) * (self.step_s or 0.0)


class Scene:
    """The models, the prompts, and every rival as a function of the round."""

    def __init__(self, workload: Workload, plan: Plan, engine: Engine, bench: Bench, llama: Any = None) -> None:
        self.workload, self.plan, self.engine, self.bench, self.llama = workload, plan, engine, bench, llama
        self.end = ExitStack()
        self.prompts = prompts(plan.rows, plan.prompt, workload.shape.vocab)
        self.plain = base_of(workload, bench.setting)
        self.peft = self._peft()
        self.asks = {name: self._asks(choose(law, plan.rows, self._count(law))) for name, law in LAWS.items()}
        self.asks[BASE] = [Ask(prompt) for prompt in self.prompts]

    def _peft(self) -> Any:
        """All adapters in the base's own format, over the same memory as the plain base."""
        names = list(self.workload.kinds)[: self.plan.adapters]
        device = self.bench.setting.device
        how = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True, "torch_device": device}
        model = PeftModel.from_pretrained(_twin(self.plain), self.workload.adapters / names[0], names[0], **how)
        for name in names[1:]:
            model.load_adapter(self.workload.adapters / name, name, **how)
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
            rivals[CONTINUOUS] = self._continuous()
        if self.llama is not None:
            rivals |= {LLAMA_MANY: self._llama(self.asks[MANY]), LLAMA_BASE: self._llama(self.asks[BASE])}
        return ours | rivals

    def _llama(self, asks: Sequence[Ask]) -> Rival:
        """llama-server over HTTP, all rows at once; `lora-3` is its adapter 3."""
        given = [ask.prompt for ask in asks]
        adapters = [None if ask.adapter is None else int(ask.adapter.rpartition("-")[2]) for ask in asks]

        def run(_: int, new: int) -> Outcome:
            start = time.perf_counter()
            answers = self.llama.batch(given, adapters, new)
            return Outcome(time.perf_counter() - start, dict(enumerate(answers)))

        return run

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
        ran = _generate(self.peft, self.prompts, self.short(new), adapter_names=names)
        return _outcome(ran, new)

    def one_by_one(self, turn: int, new: int) -> Outcome:
        """`set_adapter`, then `generate`, for some of the requests; the time is scaled to all of them."""
        plan = self.plan
        rows = [(turn * plan.sample + i) % plan.rows for i in range(plan.sample)]
        seconds, answers = 0.0, {}
        for row in rows:
            start = time.perf_counter()
            self.peft.set_adapter(self.asks[MANY][row].adapter)
            seconds += time.perf_counter() - start
            ran = _generate(self.peft, [self.prompts[row]], self.short(new))
            seconds += ran.whole_s(new)
            answers[row] = ran.answers[0]
        return Outcome(seconds * plan.rows / plan.sample, answers)

    def short(self, new: int) -> int:
        """How many of the new tokens PEFT makes."""
        return min(new, self.plan.theirs or new)

    def generate(self, _: int, new: int) -> Outcome:
        """The base alone, one static batch."""
        return _outcome(_generate(self.plain, self.prompts, new), new)

    def _merged(self) -> Rival:
        """A model with one adapter folded in, one static batch: what a server of one adapter would run."""
        name = next(iter(self.workload.kinds))
        own = base_of(self.workload, self.bench.setting)
        folded = PeftModel.from_pretrained(own, self.workload.adapters / name).merge_and_unload()
        return lambda _, new: _outcome(_generate(folded, self.prompts, new), new)

    def _continuous(self) -> Rival:
        """transformers' continuous batching, which knows no adapters. Its manager stays, and time runs by the requests'
        own clocks, so that no start and no end of its thread counts. It is sized by its first run, so that all of them
        have all tokens.
        """
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # warns of what is meant here
        model, given = _twin(self.plain), [list(prompt) for prompt in self.prompts]
        blocks = len(given) * (2 + (self.plan.prompt + self.plan.new) // BLOCK_TOKENS)
        how = ContinuousBatchingConfig(**{PAGE: BLOCK_TOKENS}, num_blocks=blocks)
        options = {"continuous_batching_config": how, "persistent_manager": True, "record_timestamps": True}

        def run(_: int, new: int) -> Outcome:
            config = _greedy(model, self.plan.new)
            outputs = list(model.generate_batch(given, generation_config=config, **options).values())
            if len(outputs) != len(given):
                raise RequestFailed(f"only {len(outputs)} of {len(given)} rows were answered")
            seconds = max(out.timestamps[-1] for out in outputs) - min(out.created_time for out in outputs)
            return Outcome(seconds, {row: tuple(out.generated_tokens) for row, out in enumerate(outputs)})

        self.end.callback(model.destroy_cached_continuous_batching_manager)
        return run


def _twin(model: Any) -> Any:
    """Modules of their own over the same weights, which nobody writes to."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _greedy(model: Any, new: int) -> Any:
    config = type(model.generation_config).from_model_config(model.config)
    config.update(max_new_tokens=new, min_new_tokens=None, do_sample=False, eos_token_id=None)
    return config


@torch.inference_mode()
def _generate(model: Any, asked: Sequence[Tokens], new: int, **options: Any) -> Generated:
    ids = torch.tensor(asked, device=model.device)
    clock = Clock()
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=_greedy(model, new),
        stopping_criteria=[clock],
        **options,
    )
    answers = [tuple(row) for row in out[:, ids.shape[1] :].tolist()]
    return Generated(answers, time.perf_counter() - clock.start, clock.step_s)


def _outcome(ran: Generated, new: int) -> Outcome:
    step_ms = None if ran.step_s is None else 1e3 * ran.step_s
    return Outcome(ran.whole_s(new), dict(enumerate(ran.answers)), step_ms)


def measure(workload: Workload, plan: Plan, bench: Bench) -> dict[str, Any]:
    """Everything as one JSON object."""
    with _scene(workload, plan, bench) as scene:
        streams: list[dict[str, float]] = []
        left_out: dict[str, str] = {}
        rounds = _rounds(scene, left_out, lambda: streams.append(scene.one_stream(plan.new)))
        bench.look()
        work = {**asdict(plan), "rank": RANK, "dtype": scene.engine.info.dtype}
        return bench.result(
            "rivals",
            workload,
            scene.engine,
            work,
            floor=[_floor(workload, plan, adapters, bench) for adapters in (0, plan.adapters, plan.rows)],
            results=[_line(name, outcomes, plan) for name, outcomes in rounds.items()],
            one_stream={name: statistics.median(each[name] for each in streams) for name in streams[0]},
            ratios=_ratios(rounds) | _stream_ratio(streams),
            answers=_answers(scene, rounds),
            notes=_notes(plan, scene.llama, rounds),
            left_out=left_out,
        )


def _floor(workload: Workload, plan: Plan, adapters: int, bench: Bench) -> dict[str, Any]:
    """Of a decode step with so many adapters, half-way through the answers."""
    return bench.floor(workload, plan.rows, plan.prompt + plan.new // 2, adapters=adapters, rank=RANK)


@contextmanager
def _scene(workload: Workload, plan: Plan, bench: Bench) -> Iterator[Scene]:
    limits = {"max_model_len": plan.prompt + plan.new, "max_rows": plan.rows}
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        for noise in (UserWarning, FutureWarning):  # what PEFT and generate say of each other, and of options we mean
            warnings.simplefilter("ignore", noise)
        llama = stack.enter_context(_llama(workload, plan, bench))
        scene = Scene(workload, plan, stack.enter_context(bench.opened(workload, **limits)), bench, llama)
        with scene.end:
            yield scene


@contextmanager
def _llama(workload: Workload, plan: Plan, bench: Bench) -> Iterator[Any]:
    """llama-server on the CPU where LLAMA_SERVER names its binary, else None. It idles while others are measured, and
    reads the base from its folder.
    """
    if not os.environ.get("LLAMA_SERVER") or bench.setting.kind != "cpu" or workload.size in IN_PLACE:
        yield None
        return
    from llama import llama_server

    names = list(workload.kinds)[: plan.adapters]
    with llama_server(workload, names, plan.rows, plan.prompt + plan.new, torch.get_num_threads()) as running:
        yield running


def _notes(plan: Plan, llama: Any, rounds: Mapping[str, Sequence[Outcome]]) -> dict[str, str]:
    """What is scaled, and what is missing."""
    notes = {ONE_BY_ONE: f"{plan.sample} of {plan.rows} requests a round, time scaled to all"}
    if 0 < plan.theirs < plan.new:
        tokens = f"{plan.theirs} of {plan.new} new tokens, the others at the median step of these"
        notes = {MIXED: tokens, ONE_BY_ONE: f"{notes[ONE_BY_ONE]}; {tokens}"}
    found = LLAMA_MANY in rounds and LLAMA_BASE in rounds
    return notes | {"llama-server": f"{llama.version}; {_agreement(rounds)}" if found else "not measured"}


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


def _rounds(scene: Scene, left_out: dict[str, str], after: Callable[[], None]) -> dict[str, list[Outcome]]:
    """A few tokens untimed, then the rounds, another rival first in each; `after` each round something else. A rival
    that cannot run here is left out, with its reason.
    """
    plan, rivals = scene.plan, scene.rivals
    with Progress(console=scene.bench.console, transient=True) as progress:
        for name in progress.track(list(rivals), description="warm up"):
            if reason := _warm(rivals[name], plan, ours=name in scene.asks):
                left_out[name] = reason
        names = [name for name in rivals if name not in left_out]
        outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
        orders = [names[turn % len(names) :] + names[: turn % len(names)] for turn in range(plan.rounds)]
        turns = [(turn, name) for turn, order in enumerate(orders) for name in order]
        for turn, name in progress.track(turns, description="measure"):
            gc.collect()
            outcomes[name].append(rivals[name](turn, plan.new))
            if name == orders[turn][-1]:
                after()
    return outcomes


def _warm(rival: Rival, plan: Plan, ours: bool) -> str | None:
    """Why it cannot run, if it cannot. Our own failures are errors."""
    try:
        rival(0, min(WARM_TOKENS, plan.new))
    except Exception as error:  # the others' libraries raise what they like; the rest is to be measured all the same
        if ours:
            raise
        return f"{type(error).__name__}: {error}"[:300]
    return None


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
    steps = [(name, BASE) for name in LAWS] + [(MANY, MIXED), (BASE, GENERATE)]
    decode = {
        f"{ours} / {theirs}, decode step": _ratio(rounds[ours], rounds[theirs], "step_ms")
        for ours, theirs in steps
        if theirs in rounds
    }
    return ratios | decode


def _ratio(ours: Sequence[Outcome], theirs: Sequence[Outcome], of: str) -> float:
    """Speed of ours over speed of theirs."""
    pairs = zip(ours, theirs, strict=True)
    return float(statistics.median(getattr(b, of) / getattr(a, of) for a, b in pairs))


def _answers(scene: Scene, rounds: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    """Ours against PEFT's and transformers' on the same rows, and ours against itself; gaps are in logits."""
    pairs = [(MANY, MIXED), (MANY, ONE_BY_ONE), (BASE, GENERATE), (BASE, CONTINUOUS), (ONE, MERGED)]
    pairs += [(name, name) for name in scene.asks]
    against = {
        f"{ours} = {theirs}": _compare(scene, rounds, ours, theirs) for ours, theirs in pairs if theirs in rounds
    }
    counts = {name: sum(each[name] for each in against.values()) for name in ("checked", "wrong", "near_ties")}
    return {**counts, "near": scene.bench.setting.near, "of": against}


def _compare(scene: Scene, rounds: Mapping[str, Sequence[Outcome]], ours: str, theirs: str) -> dict[str, Any]:
    """Every answer of theirs, in every round, against the first of ours, as far as theirs was to go."""
    checker = Checker(partial(gap, scene.engine), scene.bench.setting.near)
    first = rounds[ours][0].answers
    length = scene.short(scene.plan.new) if theirs in (MIXED, ONE_BY_ONE) else scene.plan.new
    for outcome in rounds[theirs]:
        for row, answer in outcome.answers.items():
            checker.expect(scene.asks[ours][row], first[row][:length], answer)
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
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt", min=1)] = 64,
    new: Annotated[int, typer.Option(help="New tokens of an answer", min=2)] = 64,
    sample: Annotated[int, typer.Option(help="Requests of PEFT's one at a time in a round", min=1)] = 2,
    theirs: Annotated[int, typer.Option(help="New tokens that PEFT makes, the others scaled; 0: all", min=0)] = 0,
    continuous: Annotated[bool, typer.Option("--continuous", help="Also transformers' continuous batching")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="Also a model with one adapter merged")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few rows and tokens, to see that it runs")] = False,
    device: DeviceFlag = "cpu",
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the result")] = None,
) -> None:
    """Ours beside PEFT and transformers: a table, and one last line of JSON."""
    chosen = Plan(prompt=prompt, new=new, rounds=rounds, sample=sample, theirs=theirs)
    plan = QUICK if quick else replace(chosen, continuous=continuous, merged=merged)
    try:
        bench = bare(device, quick=quick)
        with many_loras(size, max(plan.rows, plan.adapters), RANK, device=device) as workload:
            result = measure(workload, plan, bench)
    except AdapterServerError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error.message}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    Console(soft_wrap=True).print(table(result))
    report.publish(result, None if out is None else out / f"{report.name(result)}.json")


if __name__ == "__main__":
    typer.run(main)
