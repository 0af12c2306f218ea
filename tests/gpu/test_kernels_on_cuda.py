"""Each kernel against its line of torch, on the device and at the sizes of real models."""

from __future__ import annotations

import pytest
import torch

from adapter_server.engine import proof_of_parts, proofs

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
    monkeypatch.setattr(proofs, "INP", inp)
    monkeypatch.setattr(proofs, "OUTS", outs)
    monkeypatch.setattr(proofs, "RANKS", tuple(ranks[: len(outs)] for ranks in ((3, 16, 0), (64, 8, 5), (16, 16, 16))))
    monkeypatch.setattr(proofs, "COUNTS", (1, 200, 17))
    error = proofs.low_rank_error(kernels, device, given, held)
    assert error < max(proofs.TOLERANCE[given], proofs.TOLERANCE[held])


@pytest.mark.parametrize("held", HALVES, ids=str)
@pytest.mark.parametrize("given", HALVES, ids=str)
@pytest.mark.parametrize("inp", [288, 4096])
def test_parts(
    inp: int, given: torch.dtype, held: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof_of_parts, "INP", inp)
    error = proof_of_parts.parts_error(kernels, device, given, held)
    assert error < 2 * max(proofs.TOLERANCE[given], proofs.TOLERANCE[held])


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
    assert proofs.attention_error(kernels, form, shape, heads, device, dtype, lengths) < proofs.TOLERANCE[dtype]
    assert proofs.prefill_error(kernels, form, shape, heads, device, dtype) < proofs.TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("centred", [False, True])
def test_block(dtype: torch.dtype, centred: bool, device: torch.device) -> None:
    """Norms, gates, RoPE with and without norms of heads, and the choice of a token."""
    near = proofs.TOLERANCE[dtype]
    for n in (64, 1024, 4096, 14336):
        assert proofs.norm_error(kernels, device, dtype, n, 33, centred) < near
        assert all(proofs.gated_error(kernels, device, dtype, act, n, 33) < near for act in proofs.ACTS)
    for shape in ((32, 8, 128), (16, 8, 128), (32, 32, 96), (8, 1, 256), (14, 2, 64)):
        for normed in (False, True):
            assert proofs.rope_error(kernels, device, dtype, shape, normed, centred, 33) < near
    assert all(proofs.pick_error(kernels, device, dtype, vocab, 32) == 0 for vocab in (1000, 151936, 262144))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("vocab", [1000, 32000, 128256, 262144])
def test_draw(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    assert proofs.draw_error(kernels, device, dtype, vocab) == 0


def test_a_token_is_the_same_in_either_format(device: torch.device) -> None:
    """A captured step draws in the base's, any other in float32."""
    logits = 2 * torch.randn(256, 128256, generator=torch.Generator().manual_seed(0)).to(device)
    settings = torch.tensor(proofs.SETTINGS, dtype=torch.float64, device=device).repeat(37, 1)[:256]
    settings[:, 4] = torch.rand(256, generator=torch.Generator().manual_seed(0)).to(device)
    for half in (logits.bfloat16(), logits.half()):
        assert torch.equal(kernels.draw(half, settings)[0], kernels.draw(half.float(), settings)[0])
        alone = [kernels.draw(half[i : i + 1], settings[i : i + 1])[0].item() for i in range(0, 256, 37)]
        assert alone == kernels.draw(half, settings)[0][::37].tolist()


def test_the_same_bits_every_time(device: torch.device) -> None:
    """Neither kernel has atomics: what ran twice is the same."""
    form = kernels.Form(0.1)
    for error in (
        lambda: proofs.low_rank_error(kernels, device, torch.bfloat16, torch.float32),
        lambda: proofs.attention_error(kernels, form, (8, 128, 128), 32, device, torch.bfloat16),
    ):
        assert len({error() for _ in range(5)}) == 1
