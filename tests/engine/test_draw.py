"""Tokens drawn without a sort against those of a sort, in Triton's interpreter where there is no CUDA device."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from torch import Tensor

from adapter_server.core import Sampling
from adapter_server.engine import proofs
from adapter_server.engine.sampling import Draw, choose

kernels = pytest.importorskip("adapter_server.engine.kernels", reason="Triton is not installed")
CPU = torch.device("cpu")
HALVES = [torch.float32, torch.bfloat16, torch.float16]
FILTERS = list(itertools.product((0.0, 0.3, 1.0, 2.0), (0, 1, 47), (1.0, 0.9, 0.1), (0.0, 0.05)))
HALF = torch.bfloat16
MANY = [
    (0.0, 0, HALF),
    pytest.param(0.01, 1, HALF, marks=pytest.mark.soak),
    pytest.param(1.0, 2, HALF, marks=pytest.mark.soak),
    pytest.param(1.0, 3, torch.float16, marks=pytest.mark.soak),
    (1.0, 4, torch.float32),
    pytest.param(8.0, 5, HALF, marks=pytest.mark.soak),
]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def settings(*rows: tuple[float, ...]) -> Tensor:
    """(temperature, top_k, top_p, min_p, u) each."""
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fewer logits, so that a small vocabulary has several, and the last of them is not whole."""
    monkeypatch.setattr(sys.modules["adapter_server.engine.kernels.draw"], "SPAN", 256)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("vocab", [5, 4099])
def test_it_is_the_inverse_of_the_filtered_distribution(vocab: int, dtype: torch.dtype) -> None:
    assert proofs.draw_error(kernels, CPU, dtype, vocab) == 0


@pytest.mark.usefixtures("spans")
@pytest.mark.parametrize(("scale", "part", "dtype"), MANY, ids=str)
def test_every_filter_with_every_other(scale: float, part: int, dtype: torch.dtype) -> None:
    """Over logits that are all equal, flat, plain and peaked."""
    rows = settings(*((*each, i * 0.618 % 1) for i, each in enumerate(FILTERS[part::6])))
    logits = (noise(len(rows), 301) * scale).to(dtype)
    for ours, theirs in zip(kernels.draw(logits, rows), proofs.drawn(logits, rows), strict=True):
        assert torch.equal(ours, theirs)


def test_of_equal_logits_the_lower_ids_come_first() -> None:
    us = [0.0, 0.24, 0.26, 0.5, 0.99]
    equal = torch.tensor([0.0, -3.0, -0.0, 1.0, 0.0, 1.0]).expand(5, -1).contiguous()
    assert kernels.draw(equal, settings(*((1e-5, 0, 1, 0, u) for u in us)))[0].tolist() == [3, 3, 3, 5, 5]
    assert kernels.draw(equal, settings(*((1e9, 4, 1, 0, u) for u in us)))[0].tolist() == [3, 3, 5, 0, 2]
    assert kernels.draw(equal, settings(*((1e9, 0, 2 / 3, 0, u) for u in us)))[0].tolist() == [3, 3, 5, 0, 2]
    assert kernels.draw(equal, settings(*((1, 0, 1, 1.0, u) for u in us)))[0].tolist() == [3, 3, 3, 5, 5]


@pytest.mark.usefixtures("spans")
@pytest.mark.parametrize("dtype", [HALF, pytest.param(torch.float16, marks=pytest.mark.soak)], ids=str)
def test_neither_the_batch_nor_the_format_of_the_logits_changes_a_token(dtype: torch.dtype) -> None:
    """A captured step draws in the base's format, any other in float32."""
    rows = settings((1, 0, 0.9, 0, 0.3), (0.5, 40, 1, 0, 0.9), (2, 0, 1, 0.01, 0.7), (0, 0, 1, 0, 0))
    logits = noise(4, 700).to(dtype)
    together = kernels.draw(logits, rows)[0].tolist()
    assert kernels.draw(logits.float(), rows)[0].tolist() == together
    for i in (0, 2):
        assert kernels.draw(logits[i : i + 1], rows[i : i + 1])[0].item() == together[i]


def test_rows_that_are_not_finite_say_so_and_leave_the_others_alone() -> None:
    logits = noise(6, 40)
    logits[0, 7] = math.nan
    logits[1, 7] = math.inf
    logits[2] = -math.inf
    logits[3, :39] = -math.inf
    logits[4, 20:] = -math.inf
    ids, best = kernels.draw(logits, settings(*[(2, 30, 0.999, 0, 0.999)] * 6))
    assert torch.isfinite(best).tolist() == [False, False, False, True, True, True]
    assert all(0 <= id < 40 for id in ids.tolist())
    assert ids[3] == 39
    assert ids[4] < 20
    assert ids[5] == proofs.drawn(logits[5:], settings((2, 30, 0.999, 0, 0.999)))[0]


@pytest.mark.usefixtures("spans")
def test_the_number_that_rounds_to_one_draws_the_last_token_with_a_chance() -> None:
    logits = noise(1, 300)
    ids, _ = kernels.draw(logits, settings((1, 3, 1, 0, 1 - 2.0**-53)))
    assert ids.item() == logits[0].topk(3).indices[2]


def test_no_rows_have_no_tokens() -> None:
    assert kernels.draw(torch.zeros(0, 9), torch.zeros(0, 5, dtype=torch.float64))[0].shape == (0,)


def test_tokens_are_chosen_by_it_where_it_is_given() -> None:
    """After biases and penalties, beside rows that are greedy, and those that are broken."""
    more: list[dict[str, object]] = [{}, {"top_k": 3}, {"logit_bias": ((7, 9.0),)}, {"repetition_penalty": 1.5}]
    warm = [{"temperature": 0.8, "top_p": 0.95, **each} for each in more]
    draws = [Draw(Sampling(**each), i, (1, 2), 1) for i, each in enumerate([*warm, {}, warm[0]])]  # type: ignore[arg-type]
    logits = noise(6, 60)
    logits[5, 0] = math.nan
    ours, theirs = choose(logits, draws, kernels.draw), choose(logits, draws)
    assert [c.id for c in ours[:5]] == [c.id for c in theirs[:5]]
    assert [c.ok for c in ours] == [True] * 5 + [False]
