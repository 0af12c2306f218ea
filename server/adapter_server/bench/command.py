"""What the commands of `adapter-server bench` share: their flags, and how a result is shown, drawn and filed."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from adapter_server.bench import drive, plots, report
from adapter_server.bench.drive import Setting
from adapter_server.bench.workloads import Filed, Shape, Size, Workload, format_of
from adapter_server.engine.engine import Engine

SizeFlag = Annotated[Size, typer.Option("--size", help="The demo's base, or random weights of a size")]
RoundsFlag = Annotated[int, typer.Option("--rounds", help="Rounds; figures are medians over them", min=1)]
QuickFlag = Annotated[bool, typer.Option("--quick", help="A few rows and tokens, to see that it runs")]
HttpFlag = Annotated[bool, typer.Option("--http", help="Over HTTP too, against a server on this machine")]
OutFlag = Annotated[
    Path | None, typer.Option("--out", help="Folder for the result and the plot", show_default="the temporary folder")
]
DeviceFlag = Annotated[str, typer.Option("--device", help="cpu, cuda, or one of several such as cuda:1")]
ProcessFlag = Annotated[
    Literal["auto", "on", "off"],
    typer.Option("--engine-process", help="Over HTTP, the engine in a process of its own; auto: on CUDA"),
]
FiledFlag = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option("--filed", help="Format of the adapters' files", show_default="the base's"),
]
ProfileFlag = Annotated[str | None, typer.Option("--profile", help="Write a trace of 64 steps here")]
Draw = Callable[[Any, Mapping[str, Any]], None]


@dataclass(slots=True)
class Bench:
    """What every benchmark has: where it runs, where progress is shown, what the device can do at its best."""

    setting: Setting
    quick: bool = False
    console: Console = field(default_factory=lambda: Console(stderr=True))
    rates: dict[str, float] = field(default_factory=dict)

    def opened(self, workload: Workload, **limits: Any) -> AbstractContextManager[Engine]:
        """An engine over the workload, within the setting's limits and these."""
        return drive.opened(workload, self.setting, **limits)

    def look(self) -> None:
        """Measure the device; of several looks the better counts."""
        now = report.measured_rates(self.quick, self.setting.device)
        self.rates = report.faster(self.rates, now) if self.rates else now

    def result(
        self, name: str, workload: Workload, engine: Engine, work: Mapping[str, Any], **found: Any
    ) -> dict[str, Any]:
        """The result as one JSON object, with all that stands beside its figures."""
        self.look()
        about = {"device": engine.info.device, "dtype": engine.info.dtype}
        return {
            "benchmark": name,
            "workload": {"size": workload.size, **work},
            "model": {"parameters": engine.info.parameters, **shape_of(workload.shape), **about},
            **report.facts(),
            "measured": self.rates,
            **found,
        }

    def held(self, filed: Filed | None) -> int:
        """Bytes of an adapter's number as steps read it: on the CPU as it is filed, elsewhere in the base's format."""
        on_cpu = torch.device(self.setting.device).type == "cpu"
        return (format_of(filed, self.setting.device) if on_cpu else self.setting.dtype).itemsize

    def floor(self, workload: Workload, rows: int, context: int, **more: Any) -> dict[str, Any]:
        """What a decode step must read and compute at the least; call it after a look."""
        found = report.floor(workload.shape, rows, context, itemsize=self.setting.dtype.itemsize, **more)
        about = {"rows": rows, "context": context, "adapters": more.get("adapters", 0)}
        return report.timed_floor(found, self.rates, **about)


def shape_of(shape: Shape) -> dict[str, Any]:
    """A shape as JSON."""
    return {name: getattr(shape, name) for name in shape.__slots__}


def begin(device: str, profile: str | None, quick: bool) -> Bench:
    """Before anything long: what is missing is said now. Raises InvalidRequest, BaseNotSupported."""
    plots.require()
    return bare(device, profile, quick)


def bare(device: str, profile: str | None = None, quick: bool = False) -> Bench:
    """The same without a plot at its end. Raises BaseNotSupported."""
    disable_progress_bar()
    bench = Bench(Setting(device, profile), quick)
    bench.setting.check()
    bench.look()
    return bench


def finish(result: Mapping[str, Any], tables: Sequence[Table], draw: Draw, out: Path | None, bench: Bench) -> None:
    """Tables and the last line on stdout, the plot and the result in the folder."""
    name = report.name(result)
    target = (out or Path(tempfile.gettempdir())) / f"{name}.png"
    plots.save(result, target, draw)
    bench.console.print(f"plot: {target}", highlight=False, soft_wrap=True)
    for table in tables:
        Console(soft_wrap=True).print(table)
    report.publish(result, None if out is None else out / f"{name}.json")


def answers(result: Mapping[str, Any]) -> str:
    """How many were checked, and what was wrong, in one line."""
    found = result["answers"]
    return f"{found['checked']} answers checked, {found['wrong']} wrong, {found['near_ties']} near ties"


def model(result: Mapping[str, Any]) -> str:
    return f"{result['workload']['size']} ({result['model']['parameters'] / 1e6:.1f}M)"


def main(name: str, args: Sequence[str] | None = None) -> None:
    """A benchmark's command with these arguments: the function that has its module's name."""
    command = typer.Typer(add_completion=False)
    command.command()(getattr(importlib.import_module(f"adapter_server.bench.{name}"), name))
    command(args=args, prog_name=f"adapter-server bench {name}")
