"""Who runs the hot products: kernels where they are right, plain torch where they are not, and a line that says so."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from adapter_server.engine import forms
from adapter_server.engine.added import Native
from adapter_server.engine.grouped import Grouped

kernels = pytest.importorskip("adapter_server.engine.kernels", reason="Triton is not installed")
CPU = torch.device("cpu")
LAYERS, PAGE = [(2, 8, 8)], 4


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As on a CUDA device, in the interpreter; what a server of the tests has done to the log is undone."""
    caplog.set_level("WARNING")
    monkeypatch.setattr(forms, "usable", lambda device: True)


def spoilt(name: str, do: object) -> SimpleNamespace:
    """The kernels, but for one."""
    return SimpleNamespace(**{**vars(kernels), name: do})


def fails(*_: object) -> None:
    raise RuntimeError("no compiler for this architecture")


def nothing(*_: object) -> None:
    """Leaves its output as it was."""


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.soak)], ids=str)
def test_what_agrees_is_used(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    before = torch.random.get_rng_state()
    form = forms.low_rank(CPU, dtype, dtype)
    assert isinstance(form, Grouped)
    assert form.does_parts
    assert forms.attending(CPU, dtype, LAYERS, 4, PAGE) is kernels
    assert not caplog.records
    assert torch.equal(before, torch.random.get_rng_state())  # nobody's seed is touched


@pytest.mark.parametrize(("do", "word"), [(fails, "no compiler"), (nothing, "off by")])
def test_what_fails_or_differs_is_left_out(
    do: object, word: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(forms, "kernels", lambda: spoilt("add_low_rank", do))
    assert not isinstance(forms.low_rank(CPU, torch.float32, torch.float32), Grouped)
    monkeypatch.setattr(forms, "kernels", lambda: spoilt("own_product", do))
    assert not forms._parts_agree(forms.kernels(), CPU, torch.float32, torch.float32)
    monkeypatch.setattr(forms, "kernels", lambda: spoilt("paged_decode", do))
    assert forms.attending(CPU, torch.float32, LAYERS, 4, PAGE) is None
    assert [word in record.getMessage() for record in caplog.records] == [True, True, True]


def test_a_draw_that_fails_or_takes_the_likeliest_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert forms.drawing(CPU, torch.float32) is kernels.draw
    assert forms.drawing(CPU, torch.float32, wanted=False) is None
    for do in (fails, lambda logits, settings: kernels.pick(logits)):
        monkeypatch.setattr(forms, "kernels", functools.partial(spoilt, "draw", do))
        assert forms.drawing(CPU, torch.bfloat16) is None
    assert ["drawing tokens" in record.getMessage() for record in caplog.records] == [True, True]


def test_a_machine_without_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(forms, "kernels", lambda: None)
    assert not isinstance(forms.low_rank(CPU, torch.bfloat16, torch.bfloat16), Grouped)
    assert forms.attending(CPU, torch.float32, LAYERS, 4, PAGE) is None
    assert forms.drawing(CPU, torch.float32) is None
    assert not caplog.records


def test_kernels_may_be_turned_off() -> None:
    assert not isinstance(forms.low_rank(CPU, torch.float32, torch.float32, wanted=False), Grouped)
    assert forms.attending(CPU, torch.float32, LAYERS, 4, PAGE, wanted=False) is None


def test_the_cpu_has_forms_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not forms.usable(CPU)
    assert forms.usable(torch.device("cuda:1"))
    assert not isinstance(forms.low_rank(CPU, torch.float32, torch.float32), Grouped)
    assert not isinstance(forms.low_rank(CPU, torch.bfloat16, torch.bfloat16), Native)
