"""Plots of results. matplotlib is imported when one is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapter_server.errors import InvalidRequest

Series = Mapping[str, Sequence[float]]


def require() -> None:
    """Say so before a long run, not after it. Raises InvalidRequest."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidRequest("the plot needs matplotlib: pip install 'adapter-server[bench]'")


def save(result: Mapping[str, Any], target: Path, draw: Callable[[Any, Mapping[str, Any]], None]) -> None:
    """A PNG of a result, drawn by a benchmark on a figure of its own."""
    require()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    draw(figure, result)
    machine = result["machine"]
    where = result["model"]["device"] if machine["gpu"] is None else machine["gpu"]
    figure.suptitle(
        f"{result['benchmark']}, {result['workload']['size']}, {machine['cpu']}, {where}", fontsize="medium"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)


def bars(axes: Any, groups: Sequence[str], series: Series, label: str) -> None:
    """For every group one bar of each series."""
    width = 0.85 / len(series)
    for i, (name, heights) in enumerate(series.items()):
        at = [group + (i - len(series) / 2 + 0.5) * width for group in range(len(heights))]
        axes.bar(at, heights, width, label=name, color=f"C{i % 10}")
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)


def lines(axes: Any, at: Sequence[float], series: Series, label: str, below: str) -> None:
    """One line for each series over the same points."""
    for name, values in series.items():
        axes.plot(at, values, marker="o", label=name)
    axes.set_xlabel(below)
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
