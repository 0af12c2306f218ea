"""One JSON of parts; what did not run is named with its reason; no CUDA device is a refusal."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import typer
from rich.console import Console

from adapter_server.bench import latency
from adapter_server.bench.command import Bench
from adapter_server.errors import BaseNotSupported


def failing(size: str, bench: Bench) -> dict[str, Any]:
    raise BaseNotSupported("too large")


def tiny(gpu: ModuleType, parts: list[tuple[str, Any]], budget: float) -> dict[str, Any]:
    """These parts, on the CPU."""
    made = [gpu.Part(name, "tiny", run) for name, run in parts]
    found: dict[str, Any] = gpu.run(made, "cpu", budget, Console(quiet=True))
    return found


def test_parts_and_what_was_left_out(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency.Plan, "__init__", short_plan(latency.Plan.__init__))
    found = tiny(gpu, [("latency", gpu.run_latency), ("skew", failing)], 60)
    assert [part["benchmark"] for part in found["parts"]] == ["latency"]
    assert {line["cell"] for line in found["parts"][0]["results"]} == {"base", "lora-r8 unmerged", "lora-r8 merged"}
    assert found["parts"][0]["answers"]["wrong"] == 0
    assert found["left_out"] == {"skew tiny": "BaseNotSupported: too large"}


def short_plan(init: Any) -> Any:
    """Few and short rows, whatever a part asks for."""
    return lambda self, batches, prompt, new, rounds, http=False: init(self, [1, 2], 8, 4, 1)


def test_a_part_that_has_no_time_is_named(gpu: ModuleType) -> None:
    found = tiny(gpu, [("latency", gpu.run_latency)], -1)
    assert found["parts"] == []
    assert "no time" in found["left_out"]["latency tiny"]


def test_without_a_cuda_device_it_is_refused(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(typer.Exit) as left:
        gpu.main()
    assert left.value.exit_code == 1
    assert "needs a CUDA device" in capsys.readouterr().err
