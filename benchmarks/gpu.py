"""Everything on a CUDA device in under ten minutes, in bfloat16: one JSON line with all the results as its parts.

    python benchmarks/gpu.py --out benchmarks/results
    python benchmarks/gpu.py --budget-s 240 --only 8b --out benchmarks/results

Parts run in the order of what they tell; one for which too little of the budget is left is left out, by name. The file
is written after each, so that a run that is cut off keeps what it has. Sizes are those of real models with random
weights, made on the device; the parts of a size share its base's folder, its adapters, and mostly one engine.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from adapter_server.bench import drive, hotload, kinds, latency, memory, popularity, prefill, report, skew, trace
from adapter_server.bench.command import Bench, bare
from adapter_server.bench.drive import Setting
from adapter_server.bench.peft_kinds import one_of_every_kind
from adapter_server.bench.workloads import ATTENTION, LINEARS, Workload, any_base, with_loras
from adapter_server.engine.engine import Engine
from adapter_server.engine.process import is_apart
from adapter_server.errors import AdapterServerError, BaseNotSupported
from adapter_server.registry.store import Store

BUDGET_S = 540.0
LARGE, SMALL = "8b", "0.6b"
ROUNDS = 3
WIDE, NARROW = 16, 8  # ranks
SHARED = {"max_model_len": 1024, "max_rows": 64}  # of the engine that parts share: each asks for no more


class Bases:
    """Per size a folder with its base, sets of adapters beside it, and an engine; all made when first asked for."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._folders, self._engines = ExitStack(), ExitStack()
        self._bases: dict[str, Workload] = {}
        self._sets: dict[tuple[object, ...], Workload] = {}
        self._open: dict[str, Engine] = {}

    def loras(self, size: str, count: int, rank: int, targets: Sequence[str] = LINEARS, of: str = "") -> Workload:
        """The base with so many adapters; a set that was made for more serves fewer. `of`: a set of one part's own."""
        key = (size, rank, tuple(targets), of)
        if key not in self._sets or len(self._sets[key].kinds) < count:
            adapters = self._base(size).adapters / "-".join(map(str, (of, rank, len(targets), count)))
            adapters.mkdir()
            empty = replace(self._base(size), adapters=adapters)
            self._sets[key] = with_loras(empty, count, rank, targets, self.setting.device)
        return self._sets[key]

    def _base(self, size: str) -> Workload:
        if size not in self._bases:
            model, adapters, shape = self._folders.enter_context(any_base(size, 0))
            self._bases[size] = Workload(size, model, adapters, {}, shape)
        return self._bases[size]

    def engine(self, workload: Workload) -> Engine:
        """The size's engine, with these adapters registered and none in memory."""
        if workload.size not in self._open:
            opened = drive.opened(workload, self.setting, **SHARED)
            self._open[workload.size] = self._engines.enter_context(opened)
        engine = self._open[workload.size]
        for name in {resident.name for resident in engine.stats().residents}:
            engine.call("unload", engine.pool.store.resolve(name)).result()
        engine.pool.store = Store(workload.adapters, settle_s=0)
        engine.pool.store.judge = engine.pool.judge
        return engine

    def forget(self) -> None:
        """Close the engines, so that their memory is free."""
        self._open.clear()
        self._engines.close()

    def close(self) -> None:
        self.forget()
        self._folders.close()


class Shared(Bench):
    """Where an engine is opened, that of the size is handed out. It stays open, so nothing may close it."""

    def __init__(self, bases: Bases) -> None:
        super().__init__(bases.setting)
        self.bases = bases

    def opened(self, workload: Workload, **_: Any) -> AbstractContextManager[Engine]:
        return nullcontext(self.bases.engine(workload))


@dataclass(frozen=True, slots=True)
class Part:
    """One benchmark at one size, and about how many seconds it takes. One that is `apart` closes its engines itself:
    it has its own, and what the others hold is given back before.
    """

    name: str
    size: str
    run: Callable[[str, Bases, Bench], dict[str, Any]]
    about_s: float
    apart: bool = False


def run_popularity(size: str, bases: Bases, bench: Bench) -> dict[str, Any]:
    plan = popularity.Plan(rounds=ROUNDS, new=48)
    return popularity.measure(bases.loras(size, plan.rows, plan.rank), plan, bench)


def run_http(size: str, bases: Bases, bench: Bench) -> dict[str, Any]:
    plan = popularity.Plan(rounds=ROUNDS, http=True, apart=is_apart("auto", bases.setting.device))
    return popularity.measure(bases.loras(size, plan.rows, plan.rank), plan, bench)


def run_latency(size: str, bases: Bases, bench: Bench) -> dict[str, Any]:
    """One LoRA, unmerged and merged; the other kinds are a matter of `kinds`."""
    made = bases.loras(size, 1, NARROW)
    return latency.measure(replace(made, kinds={"lora-r8": "lora-0"}), latency.Plan([1, 8, 32], 128, 48, ROUNDS), bench)


def run_rivals(size: str, bases: Bases, bench: Bench) -> dict[str, Any]:
    import rivals

    plan = rivals.Plan(rounds=2, sample=1, theirs=8, new=48, continuous=True)
    found: dict[str, Any] = rivals.measure(bases.loras(size, plan.rows, WIDE), plan, bench)
    return found


def run_prefill(size: str, bases: Bases, bench: Bench) -> dict[str, Any]:
    plan = prefill.Plan(prompt=512, rounds=ROUNDS)
    return prefill.measure(bases.loras(size, plan.adapters, plan.rank), plan, bench)


def run_trace(size: str, bases: Bases, bench: Bench) -> dict[str, Any]:
    plan = trace.Plan(adapters=(trace.FEW, trace.MANY), lengths=(8, 128), rows=64, rounds=2, seconds=4.0)
    return trace.measure(bases.loras(size, trace.FILES, trace.RANK, ATTENTION), plan, bench)


def run_hotload(size: str, bases: Bases, bench: Bench) -> dict[str, Any]:
    """On adapters of its own, since it publishes over them."""
    plan = hotload.Plan(rank=WIDE, rounds=2)
    return hotload.measure(bases.loras(size, 2 * plan.places + 1, plan.rank, of="hotload"), plan, bench)


def run_coldload(size: str, bases: Bases, bench: Bench) -> dict[str, Any]:
    """Files of one size and of four times that: at 8b 42 and 168 MB."""
    small = bases.loras(size, 2, NARROW, of="coldload")
    both = with_loras(small, 2, 4 * NARROW, device=bases.setting.device, prefix="large")
    return hotload.measure_cold(both, hotload.Plan(cold=4), bench)


def run_skew(size: str, bases: Bases, bench: Bench) -> dict[str, Any]:
    plan = skew.Plan(rounds=2, warm_s=10.0)
    return skew.measure(bases.loras(size, plan.adapters, plan.rank), plan, bench)


def run_memory(size: str, bases: Bases, bench: Bench) -> dict[str, Any]:
    return memory.measure(size, memory.Plan(adapters=12, places=4), bench)


def run_kinds(size: str, bases: Bases, bench: Bench) -> dict[str, Any]:
    left_out: dict[str, str] = {}
    with one_of_every_kind(size, left_out) as workload:
        return kinds.measure(workload, kinds.Plan(rounds=1), left_out, bench)


PARTS = (
    Part("popularity", LARGE, run_popularity, 50),
    Part("latency", LARGE, run_latency, 35),
    Part("latency", SMALL, run_latency, 30),
    Part("rivals", SMALL, run_rivals, 60),
    Part("rivals", LARGE, run_rivals, 75),
    Part("prefill", LARGE, run_prefill, 15),
    Part("popularity", SMALL, run_http, 50, apart=True),
    Part("trace", SMALL, run_trace, 45, apart=True),
    Part("hotload", SMALL, run_hotload, 40, apart=True),
    Part("coldload", LARGE, run_coldload, 15, apart=True),
    Part("latency", "1b", run_latency, 30),
    Part("skew", SMALL, run_skew, 40, apart=True),
    Part("memory", SMALL, run_memory, 15, apart=True),
    Part("kinds", "35m", run_kinds, 40, apart=True),
)


def run(
    parts: Sequence[Part],
    device: str,
    budget_s: float,
    console: Console,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
    commit: str | None = None,
) -> dict[str, Any]:
    """The parts' results, and why others are not among them; `keep` is given what there is after each."""
    start, known = time.monotonic(), {} if commit is None else {"commit": commit}
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "workload": {"size": "all", "device": device, "budget_s": budget_s},
        **report.facts(),
        **known,
        "parts": [],
        "left_out": {},
        "seconds": 0.0,
        "seconds_by_part": {},
    }
    with _bases(Setting(device)) as bases:
        for part in parts:
            label, began = f"{part.name} {part.size}", time.monotonic()
            left_s = budget_s - (began - start)
            if part.about_s > left_s:
                result["left_out"][label] = f"no time: it takes about {part.about_s:.0f} s, {left_s:.0f} s were left"
                continue
            console.print(f"{label} …", highlight=False)
            try:
                result["parts"].append(_measured(part, device, bases) | known)
            except Exception as error:  # whatever a part raises, the others are to be measured
                bases.forget()
                result["left_out"][label] = f"{type(error).__name__}: {error}"[:300]
                console.print(f"{label}: {result['left_out'][label]}", highlight=False, markup=False)
            result["seconds_by_part"][label] = time.monotonic() - began
            result["seconds"] = time.monotonic() - start
            keep(result)
    return result


@contextmanager
def _bases(setting: Setting) -> Iterator[Bases]:
    bases = Bases(setting)
    try:
        yield bases
    finally:
        bases.close()


def _measured(part: Part, device: str, bases: Bases) -> dict[str, Any]:
    if part.apart:
        bases.forget()
    gc.collect()  # models stand in circles: the last part's are to be gone before this one's are made
    torch.cuda.empty_cache()
    bench = bare(device) if part.apart else Shared(bases)
    bench.look()
    return part.run(part.size, bases, bench)


def chosen(only: Sequence[str]) -> list[Part]:
    """The parts whose name or size is among these; all, where there are none. Raises BaseNotSupported."""
    found = [part for part in PARTS if not only or {part.name, part.size, f"{part.name} {part.size}"} & set(only)]
    if not found:
        raise BaseNotSupported("no such part: " + ", ".join(f"{part.name} {part.size}" for part in PARTS))
    return found


def main(
    device: Annotated[str, typer.Option("--device", help="cuda, or one of several such as cuda:1")] = "cuda",
    budget_s: Annotated[float, typer.Option("--budget-s", help="Seconds in which all of it is to end")] = BUDGET_S,
    only: Annotated[list[str] | None, typer.Option("--only", help="A part's name or size; may be repeated")] = None,
    commit: Annotated[str | None, typer.Option("--commit", help="Of a tree that has no .git")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the result")] = None,
) -> None:
    """Everything on a CUDA device, one JSON line."""
    console = Console(stderr=True)

    def keep(result: dict[str, Any]) -> None:
        if out is not None:
            report.write(result, out / f"{report.name(result)}.json")

    try:
        if not torch.cuda.is_available():
            raise BaseNotSupported(
                "bench-gpu needs a CUDA device and torch sees none: on a machine with one, check `nvidia-smi` and that "
                "torch is a build for CUDA; the CPU's figures come from `make bench`"
            )
        result = run(chosen(only or ()), device, budget_s, console, keep, commit)
    except AdapterServerError as error:
        console.print(f"[bold red]error:[/] {error.message}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    report.publish(result, None if out is None else out / f"{report.name(result)}.json")


if __name__ == "__main__":
    typer.run(main)
