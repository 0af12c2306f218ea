"""The kernel's sparse products against the matrices that they stand for."""

from __future__ import annotations

import ctypes

import pytest
import torch

from adapter_server.engine import native
from adapter_server.families.deltas import Rows, Sparse, Spectral

OUT, IN = 70, 90


def few(count: int) -> Sparse:
    return Sparse.of(torch.randint(OUT, (count,)), torch.randint(IN, (count,)), torch.randn(count), (OUT, IN))


@pytest.mark.parametrize("count", [0, 1, 900])
@pytest.mark.parametrize("tokens", [1, 5, 16, 37, 400])
def test_a_sparse_product_is_its_matrix(count: int, tokens: int) -> None:
    delta, x = few(count), torch.randn(tokens, IN)
    laid = native.laid(delta)
    assert isinstance(laid, native.NativeSparse) == (native.library() is not None)
    assert torch.allclose(laid.apply(x), x @ delta.dense().T, atol=1e-4)
    assert torch.equal(laid.apply(x)[-1:], laid.apply(x[-1:]))  # whoever else is there
    assert list(laid.tensors()) == list(delta.tensors())


def test_a_part_of_a_wider_input() -> None:
    delta, x = few(50), torch.randn(3, 2 * IN)[:, IN:]
    assert torch.allclose(native.laid(delta).apply(x), x @ delta.dense().T, atol=1e-4)


def test_a_spectrum_keeps_its_transforms() -> None:
    delta, x = Spectral(few(50)), torch.randn(3, IN)
    laid = native.laid(delta)
    assert torch.allclose(laid.apply(x), x @ delta.dense().T, atol=1e-4)


def test_what_has_no_faster_form_stays_as_it_is() -> None:
    rows, half = Rows(torch.tensor([1]), torch.randn(1, IN), OUT), few(5).to(torch.device("cpu"), torch.bfloat16)
    assert native.laid(rows) is rows
    assert native.laid(half) is half


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("out", "inp"), [(8, 64), (10, 37), (3, 5), (513, 300)])
def test_products_with_few_rows(out: int, inp: int, tokens: int) -> None:
    """Rows of the weight and columns that fill no tile; a row's numbers are its own whoever stands beside it."""
    x, weight, bias = torch.randn(tokens, inp), torch.randn(out, inp), torch.randn(out)
    few = native.NativeFew(kernel(), most=4)
    y = few(x, weight, bias)
    if tokens > 4:
        assert y is None
        return
    assert y is not None
    assert torch.allclose(y, x @ weight.T + bias, atol=1e-4)
    assert torch.allclose(few(x[:1], weight, None), x[:1] @ weight.T, atol=1e-4)  # type: ignore[arg-type]


def kernel() -> ctypes.CDLL:
    found = native.library()
    if found is None:
        pytest.skip("no C compiler")
    return found
