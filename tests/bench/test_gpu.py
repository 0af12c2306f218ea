"""One JSON of parts, kept as they end; what did not run is named with its reason; no CUDA device is a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from rich.console import Console

from adapter_server.bench import drive, latency, prefill, report
from adapter_server.bench.command import Bench
from adapter_server.bench.drive import Setting
from adapter_server.errors import BaseNotSupported
from scripts import documented, flags


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device can do takes seconds to measure, and is not what is tested here."""
    monkeypatch.setattr(report, "measured_rates", lambda quick, device: {"bytes_per_s": 1e10, "flops_per_s": 1e11})


def failing(size: str, bases: Any, bench: Bench) -> dict[str, Any]:
    raise BaseNotSupported("too large")


def run_latency(size: str, bases: Any, bench: Bench) -> dict[str, Any]:
    return latency.measure(bases.loras(size, 1, 8), latency.Plan([1], 8, 4, 1), bench)


def run_prefill(size: str, bases: Any, bench: Bench) -> dict[str, Any]:
    plan = prefill.Plan(**prefill.QUICK)
    return prefill.measure(bases.loras(size, plan.adapters, plan.rank), plan, bench)


def tiny(
    gpu: ModuleType, parts: list[tuple[str, Any, bool]], budget: float, keep: Callable[[Any], None] = lambda _: None
) -> dict[str, Any]:
    """These parts, on the CPU."""
    made = [gpu.Part(name, "tiny", run, 1.0, apart) for name, run, apart in parts]
    found: dict[str, Any] = gpu.run(made, "cpu", budget, Console(quiet=True), keep)
    return found


def test_parts_share_an_engine_and_are_kept_as_they_end(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[dict[str, Any]] = []
    real = drive.opened
    monkeypatch.setattr(drive, "opened", lambda *args, **limits: opened.append(limits) or real(*args, **limits))
    kept: list[list[str]] = []
    parts = [("latency", run_latency, False), ("prefill", run_prefill, False), ("skew", failing, False)]
    found = tiny(gpu, [*parts, ("prefill", run_prefill, True)], 600, lambda r: kept.append([*names(r)]))
    assert kept == [["latency"], ["latency", "prefill"], ["latency", "prefill"], ["latency", "prefill", "prefill"]]
    assert found["left_out"] == {"skew tiny": "BaseNotSupported: too large"}
    assert opened == [gpu.SHARED, {"max_model_len": 9, "max_rows": 4}]
    assert all(part["answers"]["wrong"] == 0 and part["machine"] for part in found["parts"])
    assert {"machine", "versions", "commit", "date"} <= found.keys()


def names(result: dict[str, Any]) -> list[str]:
    return [part["benchmark"] for part in result["parts"]]


def test_a_set_of_adapters_is_made_once(gpu: ModuleType) -> None:
    bases = gpu.Bases(Setting())
    many = bases.loras("tiny", 3, 2)
    assert bases.loras("tiny", 2, 2) is many
    assert bases.loras("tiny", 2, 2, of="hotload").adapters != many.adapters
    assert bases.loras("tiny", 4, 2).model == many.model
    folder = many.model
    bases.close()
    assert not folder.exists()


def test_a_part_that_has_no_time_is_named(gpu: ModuleType) -> None:
    found = tiny(gpu, [("latency", run_latency, False)], 0.5)
    assert found["parts"] == []
    assert "no time" in found["left_out"]["latency tiny"]


def test_cold_loads_of_two_sizes(gpu: ModuleType) -> None:
    (part,) = tiny(gpu, [("coldload", gpu.run_coldload, True)], 600)["parts"]
    small, large = (line["file_bytes"] for line in part["results"])
    assert 2 < large / small < 4.5
    assert (part["answers"]["checked"], part["answers"]["wrong"]) == (4, 0)


def test_parts_by_name_and_size(gpu: ModuleType) -> None:
    assert {part.size for part in gpu.chosen(["8b"])} == {"8b"}
    assert [part.name for part in gpu.chosen(["rivals 0.6b", "skew"])] == ["rivals", "skew"]
    assert len(gpu.chosen([])) == len(gpu.PARTS)
    with pytest.raises(BaseNotSupported, match=r"no such part: popularity 8b, "):
        gpu.chosen(["speed"])


def test_its_flags_are_documented(gpu: ModuleType) -> None:
    assert flags(gpu) == documented("gpu")


def test_the_first_four_minutes_hold_what_matters_most(gpu: ModuleType) -> None:
    assert sum(part.about_s for part in gpu.PARTS[:4]) <= 240
    assert sum(part.about_s for part in gpu.PARTS) <= gpu.BUDGET_S


def test_without_a_cuda_device_it_is_refused(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(typer.Exit) as left:
        gpu.main(only=None)
    assert left.value.exit_code == 1
    assert "needs a CUDA device" in capsys.readouterr().err


def test_a_run_that_is_cut_off_keeps_its_parts(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(size: str, bases: Any, bench: Bench) -> dict[str, Any]:
        raise KeyboardInterrupt

    parts = (gpu.Part("prefill", "tiny", run_prefill, 1.0), gpu.Part("skew", "tiny", cut_off, 1.0))
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(gpu.report, "facts", lambda: {"date": "2026-01-01", "machine": {}})
    with pytest.raises(KeyboardInterrupt):
        gpu.main(device="cpu", budget_s=600, only=None, commit="abc", out=tmp_path)
    written = json.loads((tmp_path / "2026-01-01-gpu-all.json").read_text())
    assert names(written) == ["prefill"]
    assert written["commit"] == written["parts"][0]["commit"] == "abc"
