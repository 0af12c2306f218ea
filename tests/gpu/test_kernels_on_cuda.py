"""Each kernel against its line of torch, on the device and at the sizes of real models."""

from __future__ import annotations

import pytest
import torch

from adapter_server.engine import forms

kernels = pytest.importorskip("adapter_server.engine.kernels", reason="Triton is not installed")
HALVES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [((8, 128, 128), 32), ((8, 64, 64), 16), ((4, 256, 256), 8), ((16, 192, 128), 16), ((32, 96, 96), 32)]


@pytest.mark.parametrize("held", HALVES, ids=str)
@pytest.mark.parametrize("given", HALVES, ids=str)
@pytest.mark.parametrize(("inp", "outs"), [(4096, (4096, 1024, 1024)), (14336, (4096,)), (1040, (80, 48, 48))])
def test_low_rank(
    inp: int, outs: tuple[int, ...], given: torch.dtype, held: torch.dtype, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(forms, "INP", inp)
    monkeypatch.setattr(forms, "OUTS", outs)
    monkeypatch.setattr(forms, "RANKS", tuple(ranks[: len(outs)] for ranks in ((3, 16, 0), (64, 8, 5), (16, 16, 16))))
    monkeypatch.setattr(forms, "COUNTS", (1, 200, 17))
    error = forms.low_rank_error(kernels, device, given, held)
    assert error < max(forms.TOLERANCE[given], forms.TOLERANCE[held])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("shape", "heads"), SHAPES)
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("sunk", [False, True])
def test_attention(
    shape: tuple[int, int, int], heads: int, dtype: torch.dtype, window: int | None, cap: float | None, sunk: bool,
    device: torch.device,
) -> None:  # fmt: skip
    form = kernels.Form(shape[1] ** -0.5, cap, window, torch.randn(heads, device=device) if sunk else None)
    lengths = [1, 16, 129, 1000, kernels.MOST_CHUNKS * kernels.CHUNK + 77]
    assert forms.attention_error(kernels, form, shape, heads, device, dtype, lengths) < forms.TOLERANCE[dtype]


def test_the_same_bits_every_time(device: torch.device) -> None:
    """Neither kernel has atomics: what ran twice is the same."""
    form = kernels.Form(0.1)
    for error in (
        lambda: forms.low_rank_error(kernels, device, torch.bfloat16, torch.float32),
        lambda: forms.attention_error(kernels, form, (8, 128, 128), 32, device, torch.bfloat16),
    ):
        assert len({error() for _ in range(5)}) == 1
