"""Plots of results. matplotlib is imported when one is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_server.errors import InvalidRequest


def require() -> None:
    """Say so before a long run, not after it. Raises InvalidRequest."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidRequest("the plot needs matplotlib: pip install 'adapter-server[bench]'")


def latency(result: Mapping[str, Any], target: Path) -> None:
    """ms per token and the overhead over the base, grouped by batch size."""
    require()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    _bars(upper, result, "ms_per_token", "ms per token")
    _bars(lower, result, "overhead_percent", "over the base, %")
    batches = result["workload"]["batches"]
    lower.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    lower.axhline(0, color="black", linewidth=0.8)
    upper.legend(ncols=4, fontsize="small")
    work = result["workload"]
    upper.set_title(f"{work['size']}, prompt {work['prompt']}, {work['new']} new tokens, {result['machine']['cpu']}")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)


def _bars(axes: Any, result: Mapping[str, Any], name: str, label: str) -> None:
    lines = result["results"]
    labels = list(dict.fromkeys(line["cell"] for line in lines))
    width = 0.85 / len(labels)
    for i, cell in enumerate(labels):
        heights = [line[name] for line in lines if line["cell"] == cell]
        at = [batch + (i - len(labels) / 2 + 0.5) * width for batch in range(len(heights))]
        axes.bar(at, heights, width, label=cell, color=f"C{i}")
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
