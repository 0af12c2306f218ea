"""Which form a product with few rows gets: the faster one, if it agrees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adapter_server.engine import few
from adapter_server.engine.few import TIMED, choose
from adapter_server.engine.placed import Product

FAST, SLOW = "fast", "slow"


def kernels(off: float = 0.0) -> SimpleNamespace:
    def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, tiling: str) -> Tensor:
        calls.append(tiling)
        return F.linear(x, weight, bias) + off

    calls: list[str] = []
    takes = lambda weight, tiling: weight.shape[1] % 4 == 0  # noqa: E731
    return SimpleNamespace(few_rows=few_rows, takes=takes, TILINGS=(SLOW, FAST), calls=calls)


@pytest.fixture(autouse=True)
def _seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes 1, one tiling 2, the other 0.5."""

    def seconds(run: Callable[[Tensor], Tensor], weights: Sequence[Tensor]) -> float:
        before = len(made.calls)
        run(weights[0])
        return 1.0 if len(made.calls) == before else {SLOW: 2.0, FAST: 0.5}[made.calls[-1]]

    monkeypatch.setattr(few, "_seconds", seconds)


made = kernels()


def test_the_faster_form_runs_where_rows_are_few() -> None:
    product = Product(torch.randn(8, 4), torch.randn(8), pack=False)
    choose(made, [product, other := Product(torch.randn(8, 3), None, pack=False)])
    assert other.few is None
    for rows in (1, max(TIMED), max(TIMED) + 1):
        x = torch.randn(rows, 4)
        made.calls.clear()
        assert torch.equal(product(x), F.linear(x, product.weight, product.bias))
        assert made.calls == ([FAST] if rows <= max(TIMED) else [])


def test_one_that_differs_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = kernels(off=1.0)
    monkeypatch.setattr(made, "calls", wrong.calls)
    product = Product(torch.randn(8, 4), None, pack=False)
    choose(wrong, [product])
    assert product.few is None
