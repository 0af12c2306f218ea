"""Workloads are what they are named after."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapter_server.bench import report, workloads
from adapter_server.bench.workloads import SHAPES, Trace, calls, many_loras, with_loras


def first(trace: Trace, count: int) -> list[tuple[int, int, int, float]]:
    return [(call.adapter, call.prompt, call.new, round(call.at_s, 4)) for call in calls(trace)[:count]]


def test_the_trace_is_s_loras_number_by_number() -> None:
    """Golden: computed with S-LoRA's own `benchmarks/trace.py` for these arguments."""
    grid = Trace(adapters=200, rate=2, seconds=300)
    made = calls(grid)
    assert first(grid, 3) == [(74, 12, 410, 0.1598), (190, 473, 43, 3.0856), (146, 99, 292, 3.3633)]
    assert len(made) == 600
    assert len({call.adapter for call in made}) == 187
    assert sum(call.prompt for call in made) / 600 == pytest.approx(255.7, abs=0.05)
    assert sum(call.new for call in made) / 600 == pytest.approx(259.1, abs=0.05)
    assert made[-1].at_s == pytest.approx(301.0, abs=0.005)


def test_other_traces_of_s_loras() -> None:
    small = Trace(adapters=100, rate=2, seconds=60)
    assert first(small, 3) == [(37, 510, 158, 1.5296), (95, 355, 422, 1.7304), (73, 480, 485, 2.1327)]
    assert len({call.adapter for call in calls(small)}) == 77
    large = Trace(adapters=2000, rate=10, seconds=120)
    assert first(large, 2) == [(749, 388, 268, 0.0503), (1901, 467, 357, 0.0879)]
    assert len({call.adapter for call in calls(large)}) == 907


@pytest.mark.parametrize(
    ("alpha", "distinct", "top", "begins"), [(0.1, 107, 0.570, [0, 120, 8]), (0.3, 163, 0.225, [7, 168, 70])]
)
def test_the_traces_skew(alpha: float, distinct: int, top: float, begins: list[int]) -> None:
    indices = [call.adapter for call in calls(Trace(200, 2, 300, alpha=alpha))]
    assert indices[:3] == begins
    assert len(set(indices)) == distinct
    assert Counter(indices).most_common(1)[0][1] / 600 == pytest.approx(top, abs=0.001)


def test_the_traces_bursts() -> None:
    assert calls(Trace(200, 2, 300, cv=8))[-1].at_s == pytest.approx(432.54, abs=0.005)


def test_linked_adapters_are_those_of_the_few_files() -> None:
    with many_loras("tiny", 5, 2, files=2) as made:
        weights = [made.adapters / name / "adapter_model.safetensors" for name in made.kinds]
        assert [path.stat().st_ino for path in weights] == [weights[i % 2].stat().st_ino for i in range(5)]
        assert not torch.equal(*(next(iter(load_file(path).values())) for path in weights[:2]))


@pytest.mark.parametrize(("size", "parameters"), [("0.6b", 596.0e6), ("1b", 1235.8e6), ("8b", 8030.3e6)])
def test_large_sizes_are_those_of_real_models(size: str, parameters: float) -> None:
    """By hand from the models' published configs; norms are left out of the floor."""
    shape = SHAPES[size]
    body = sum(inp * out for inp, out in report.linears(shape))
    embeddings = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    assert body + embeddings == pytest.approx(parameters, rel=1e-3)


def test_a_base_in_no_file_has_adapters_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "IN_PLACE", ("tiny",))
    with many_loras("tiny", 2, 2) as made:
        assert not list(made.model.glob("*.safetensors"))
        shapes = {tuple(t.shape) for t in load_file(made.adapters / "lora-1" / "adapter_model.safetensors").values()}
        assert (2, 64) in shapes


def test_kinds_that_begin_at_the_base_begin_at_one_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "IN_PLACE", ("tiny",))
    with workloads.one_of_each("tiny") as made:
        weights = load_file(made.adapters / "dora-r8" / "adapter_model.safetensors")
        scales = load_file(made.adapters / "ia3" / "adapter_model.safetensors")
    norms = [t for name, t in weights.items() if "q_proj.lora_magnitude" in name]
    assert norms[0].mean() == pytest.approx(0.02 * 64**0.5, rel=0.2)  # of 64 weights about 0.02
    assert next(iter(scales.values())).mean() == pytest.approx(1, abs=0.2)


def test_adapters_beside_a_base_in_fewer_bits_are_saved_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "base_dtype", lambda device: torch.bfloat16)
    with many_loras("tiny", 1, 2) as made:
        weights = load_file(made.adapters / "lora-0" / "adapter_model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}


def test_adapters_are_filed_as_they_are_asked_for() -> None:
    with many_loras("tiny", 1, 2, filed="bfloat16") as made:
        weights = load_file(made.adapters / "lora-0" / "adapter_model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}


def test_more_adapters_of_another_rank_stand_in_the_same_folder() -> None:
    with many_loras("tiny", 1, 2) as made:
        both = with_loras(made, 2, 8, prefix="large")
        assert list(both.kinds) == ["lora-0", "large-0", "large-1"]
        assert all((both.adapters / name / "adapter_model.safetensors").exists() for name in both.kinds)
