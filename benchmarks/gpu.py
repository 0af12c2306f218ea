"""Everything on a CUDA device in under ten minutes, in bfloat16: one JSON line with all the results as its parts.

    python benchmarks/gpu.py --out benchmarks/results

Parts run in the order of what they tell; one that would begin after the budget is left out, by name. Sizes are those of
real models with random weights, made on the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from adapter_server.bench import hotload, kinds, latency, memory, popularity, report, skew, trace
from adapter_server.bench.command import Bench, begin
from adapter_server.bench.peft_kinds import one_of_every_kind
from adapter_server.bench.workloads import ATTENTION, LINEARS, many_loras
from adapter_server.errors import AdapterServerError, BaseNotSupported

BUDGET_S = 540.0
LARGE, SMALL = "8b", "0.6b"


@dataclass(frozen=True, slots=True)
class Part:
    """One benchmark at one size."""

    name: str
    size: str
    run: Callable[[str, Bench], dict[str, Any]]


def run_latency(size: str, bench: Bench) -> dict[str, Any]:
    """One LoRA, unmerged and merged; the other kinds are a matter of `kinds`."""
    plan = latency.Plan([1, 8, 32], 128, 64, 3)
    with many_loras(size, 1, 8) as workload:
        alone = type(workload)(
            size, workload.model, workload.adapters, {"lora-r8": "lora-0"}, workload.shape, workload.seed
        )
        return latency.measure(alone, plan, bench)


def run_popularity(size: str, bench: Bench) -> dict[str, Any]:
    plan = popularity.Plan(rounds=3, http=size == SMALL)
    with many_loras(size, plan.rows, plan.rank) as workload:
        return popularity.measure(workload, plan, bench)


def run_trace(size: str, bench: Bench) -> dict[str, Any]:
    plan = trace.Plan(adapters=(trace.FEW, trace.MANY), lengths=(8, 256), rows=64, rounds=2)
    with many_loras(size, trace.FILES, trace.RANK, targets=ATTENTION) as workload:
        return trace.measure(workload, plan, bench)


def run_hotload(size: str, bench: Bench) -> dict[str, Any]:
    plan = hotload.Plan(rank=16 if size == SMALL else 8)
    with many_loras(size, 2 * plan.places + 1, plan.rank, targets=LINEARS) as workload:
        return hotload.measure(workload, plan, bench)


def run_skew(size: str, bench: Bench) -> dict[str, Any]:
    plan = skew.Plan(rounds=2, warm_s=20.0)
    with many_loras(size, plan.adapters, plan.rank) as workload:
        return skew.measure(workload, plan, bench)


def run_kinds(size: str, bench: Bench) -> dict[str, Any]:
    left_out: dict[str, str] = {}
    with one_of_every_kind(size, left_out) as workload:
        return kinds.measure(workload, kinds.Plan(rounds=2), left_out, bench)


def run_memory(size: str, bench: Bench) -> dict[str, Any]:
    return memory.measure(size, memory.Plan(), bench)


PARTS = (
    Part("popularity", LARGE, run_popularity),
    Part("latency", LARGE, run_latency),
    Part("latency", SMALL, run_latency),
    Part("popularity", SMALL, run_popularity),
    Part("trace", SMALL, run_trace),
    Part("hotload", SMALL, run_hotload),
    Part("latency", "1b", run_latency),
    Part("skew", SMALL, run_skew),
    Part("memory", SMALL, run_memory),
    Part("kinds", "35m", run_kinds),
)


def run(parts: Sequence[Part], device: str, budget_s: float, console: Console) -> dict[str, Any]:
    """The parts' results, and why others are not among them."""
    start = time.monotonic()
    done: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for part in parts:
        label = f"{part.name} {part.size}"
        if time.monotonic() - start > budget_s:
            left_out[label] = f"no time: it would have begun after {budget_s:.0f} s"
            continue
        console.print(f"{label} …", highlight=False)
        try:
            done.append(part.run(part.size, begin(device, None, quick=False)))
        except (AdapterServerError, torch.OutOfMemoryError) as error:
            left_out[label] = f"{type(error).__name__}: {error}"[:300]
    seconds = time.monotonic() - start
    return {
        "benchmark": "gpu",
        "workload": {"size": "all", "device": device, "budget_s": budget_s},
        **report.facts(),
        "seconds": seconds,
        "parts": done,
        "left_out": left_out,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main(
    device: Annotated[str, typer.Option("--device", help="cuda, or one of several such as cuda:1")] = "cuda",
    budget_s: Annotated[float, typer.Option("--budget-s", help="Seconds after which no part begins")] = BUDGET_S,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the result")] = None,
) -> None:
    """Everything on a CUDA device, one JSON line."""
    console = Console(stderr=True)
    try:
        if not torch.cuda.is_available():
            raise BaseNotSupported(
                "bench-gpu needs a CUDA device and torch sees none: on a machine with one, check `nvidia-smi` and that "
                "torch is a build for CUDA; the CPU's figures come from `make bench`"
            )
        result = run(PARTS, device, budget_s, console)
    except AdapterServerError as error:
        console.print(f"[bold red]error:[/] {error.message}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    report.publish(result, None if out is None else out / f"{report.name(result)}.json")


if __name__ == "__main__":
    typer.run(main)
