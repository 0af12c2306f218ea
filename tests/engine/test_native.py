"""The kernel's sparse products against the matrices that they stand for."""

from __future__ import annotations

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
