"""`adapter-server bench memory`: bytes of an adapter on the device and on disk, and how many fit. Nothing is timed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from adapter_server.bench import cells, plots
from adapter_server.bench.command import (
    Bench,
    DeviceFlag,
    OutFlag,
    QuickFlag,
    SizeFlag,
    answers,
    begin,
    finish,
    model,
)
from adapter_server.bench.drive import Ask, drive, ready
from adapter_server.bench.workloads import ATTENTION, LINEARS, Workload, many_loras, prompts
from adapter_server.config import EngineConfig
from adapter_server.engine.engine import Engine
from adapter_server.registry import guard

TARGETS: Mapping[str, tuple[str, ...]] = {"q, k, v, o": ATTENTION, "all linears": LINEARS}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is loaded: so many adapters with room for all, then the same with room for `places`."""

    adapters: int = 24
    places: int = 8
    rank: int = 8
    new: int = 4


QUICK: dict[str, Any] = {"adapters": 4, "places": 2}


def measure(size: str, plan: Plan, bench: Bench) -> dict[str, Any]:
    """The whole as one JSON object."""
    lines = []
    for label, targets in TARGETS.items():
        with many_loras(size, plan.adapters, plan.rank, targets=targets, device=bench.setting.device) as workload:
            before = resident_bytes()
            with bench.opened(workload, max_model_len=64, host_bytes=1) as engine:
                checker = cells.checker_of(engine, bench.setting)
                line = _line(engine, workload, plan, before)
                asks = [Ask(p, f"lora-{i}") for i, p in enumerate(prompts(plan.adapters, 4, workload.shape.vocab))]
                checker.check(asks, [drive(engine, [ask], plan.new).answers[0] for ask in asks])
                line |= _crowded(engine, plan)
                checker.check(asks, [drive(engine, [ask], plan.new).answers[0] for ask in asks])
                line["held_in_places"] = sum(r.state == "ready" for r in engine.stats().residents)
                lines.append({"targets": label, **line})
                result = bench.result("memory", workload, engine, asdict(plan), results=lines, answers=checker.summary)
    return result


def _line(engine: Engine, workload: Workload, plan: Plan, before: int) -> dict[str, Any]:
    alone, device = resident_bytes(), device_bytes(engine)
    for i in range(plan.adapters):
        ready(engine, Ask((), f"lora-{i}"))
    one = engine.pool.used // plan.adapters
    budget = EngineConfig().adapter_bytes
    return {
        "device_bytes": one,
        "file_bytes": (workload.adapters / "lora-0" / guard.WEIGHTS).stat().st_size,
        "budget": budget,
        "fit": budget // one,
        "rss_base": alone - before,
        "rss_per_adapter": (resident_bytes() - alone) // plan.adapters,
        "cuda_per_adapter": (device_bytes(engine) - device) // plan.adapters,
    }


def _crowded(engine: Engine, plan: Plan) -> dict[str, int]:
    """Room for fewer, and none of them there: they are evicted as others are asked for."""
    engine.pool.budget = plan.places * (engine.pool.used // plan.adapters)
    for i in range(plan.adapters):
        engine.call("unload", engine.pool.store.resolve(f"lora-{i}")).result()
    return {"places": plan.places}


def resident_bytes() -> int:
    """Of this process in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def device_bytes(engine: Engine) -> int:
    """What torch holds on a CUDA device; 0 on the CPU."""
    return torch.cuda.memory_allocated() if engine.model.device.type == "cuda" else 0


def table(result: Mapping[str, Any]) -> Table:
    """One line per choice of modules."""
    work = result["workload"]
    title = f"{model(result)}, LoRA r={work['rank']}"
    columns = ("device", "file", "device / file", "fit the default budget", "RSS each", "RSS of the base")
    shown = Table("modules", *columns, title=title, caption=answers(result))
    for line in result["results"]:
        share = f"{line['device_bytes'] / line['file_bytes']:.3f}"
        sizes = [f"{line[name]:,}" for name in ("device_bytes", "file_bytes")]
        rest = [f"{line[name]:,}" for name in ("fit", "rss_per_adapter", "rss_base")]
        shown.add_row(line["targets"], *sizes, share, *rest)
    return shown


def draw(figure: Any, result: Mapping[str, Any]) -> None:
    """Bytes per adapter."""
    names = {"device": "device_bytes", "file": "file_bytes", "RSS": "rss_per_adapter"}
    series = {label: [line[name] for line in result["results"]] for label, name in names.items()}
    axes = figure.subplots()
    plots.bars(axes, list(TARGETS), series, "bytes per adapter")
    axes.legend()


def memory(size: SizeFlag = "35m", quick: QuickFlag = False, device: DeviceFlag = "cpu", out: OutFlag = None) -> None:
    """Bytes of an adapter on the device and on disk, how many fit, and what the process takes."""
    bench = begin(device, None, quick)
    result = measure(size, Plan(**QUICK) if quick else Plan(), bench)
    finish(result, [table(result)], draw, out, bench)
