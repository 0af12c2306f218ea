"""The kernel's sparse products against the matrices that they stand for."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from adapter_server.engine import native
from adapter_server.engine.placed import OneDnn, Product
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
    last, alone = laid.apply(x)[-1:], laid.apply(x[-1:])
    assert torch.allclose(last, alone, atol=1e-5)
    assert torch.equal(last, alone) or native.library() is None  # whoever else is there
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


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 8, 13, 32])
@pytest.mark.parametrize(("out", "inp"), [(8, 64), (10, 37), (3, 5), (48, 256), (513, 300)])
def test_a_product_from_panels_is_the_plain_one(out: int, inp: int, tokens: int) -> None:
    """Rows of x and columns that fill no tile; a row's numbers are its own, whoever stands beside it."""
    x, weight, bias = torch.randn(tokens, inp), torch.randn(out, inp), torch.randn(out)
    panels = native.Panels(kernel(), weight)
    y = panels(x, bias)
    assert torch.allclose(y, x @ weight.T + bias, atol=1e-4)
    assert torch.allclose(panels(x, None), x @ weight.T, atol=1e-4)
    for t in range(tokens):
        assert torch.equal(panels(x[t:], bias)[0], y[t])


def test_a_product_of_part_of_a_wider_input() -> None:
    x, weight = torch.randn(5, 2 * IN)[:, IN:], torch.randn(OUT, IN)
    assert torch.allclose(native.Panels(kernel(), weight)(x, None), x @ weight.T, atol=1e-4)


def test_packed_weights_take_the_rows_that_they_are_for() -> None:
    weight, bias = torch.randn(OUT, IN), torch.randn(OUT)
    product = Product(weight, bias, pack=True)
    for rows in (1, native.MOST_ROWS, native.MOST_ROWS + 1):
        x = torch.randn(rows, IN)
        assert torch.allclose(product(x), x @ weight.T + bias, atol=1e-4)
    assert product.bytes > 2 * weight.nbytes
    assert Product(weight, bias, pack=False).packed is None
    assert Product(weight.bfloat16(), None, pack=True).packed is None


def test_without_a_compiler_weights_are_packed_by_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    weight, bias, x = torch.randn(OUT, IN), torch.randn(OUT), torch.randn(3, IN)
    product = Product(weight, bias, pack=True)
    assert isinstance(product.packed, OneDnn)
    assert torch.allclose(product(x), x @ weight.T + bias, atol=1e-4)


def test_functions_are_called_as_they_are_declared() -> None:
    """In C a pointer has a star, and the rest are what TYPES says of their letters."""
    letters = {"float": "f", "i64": "n", "int": "i"}
    found = {}
    for path in native.SOURCES:
        for name, given in re.findall(r"^(?:void|i64) (\w+)\(([^)]*)\)", path.read_text(), re.MULTILINE):
            each = [re.sub(r"\bconst\b", "", argument).split() for argument in given.split(",")]
            found[name] = "".join("p" if "*" in "".join(words) else letters[words[0]] for words in each)
    assert {name: found[name] for name in native.SIGNATURES} == native.SIGNATURES


def test_a_machine_without_a_compiler_is_told_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert native.library.__wrapped__() is None
    assert "install gcc" in caplog.text


def kernel() -> ctypes.CDLL:
    found = native.library()
    if found is None:
        pytest.skip("no C compiler")
    return found
