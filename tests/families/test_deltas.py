"""Every form is the matrix that it stands for, in memory that its own numbers take."""

from __future__ import annotations

import pytest
import torch

from adapter_server.families.base import Patch
from adapter_server.families.deltas import Circulant, Delta, Kronecker, Mirror, Rows, Sparse, Spectral, Turn, sparse

OUT, IN = 8, 12


def places(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randint(OUT, (n,)), torch.randint(IN, (n,)), torch.randn(n)


DELTAS: dict[str, Delta] = {
    "sparse": Sparse.of(*places(20), (OUT, IN)),
    "empty": Sparse.of(*places(0), (OUT, IN)),
    "spectral": Spectral(Sparse.of(*places(20), (OUT, IN))),
    "rows": Rows(torch.tensor([1, 6]), torch.randn(2, IN), OUT),
    "kronecker": Kronecker(torch.randn(2, 3), torch.randn(4, 4)),
    "circulant": Circulant.of(torch.randn(2, 3, 4)),
    "circulant of odd blocks": Circulant.of(torch.randn(3, 4, 3)),
}


@pytest.mark.parametrize("name", DELTAS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_delta_is_its_matrix(name: str, tokens: int) -> None:
    delta, x = DELTAS[name], torch.randn(tokens, IN)
    assert torch.allclose(delta.apply(x), x @ delta.dense().T, atol=1e-5)


@pytest.mark.parametrize("name", DELTAS)
def test_a_matrix_lies_where_its_numbers_do(name: str) -> None:
    """A module beside it may have weights of its own: then all of its group are folded on the device."""
    assert DELTAS[name].to(torch.device("meta"), torch.float32).dense().is_meta


@pytest.mark.parametrize("name", DELTAS)
def test_products_are_of_float32(name: str) -> None:
    """Rounded once, where they are added; what acts on the whole weight is not rounded before."""
    x = torch.randn(3, IN).half()
    half = DELTAS[name].to(torch.device("cpu"), torch.float16)
    assert half.apply(x).dtype == half.dense().dtype == torch.float32
    if name.startswith(("spectral", "circulant")):
        assert torch.equal(half.dense(), DELTAS[name].dense())


def test_places_that_come_twice_count_twice() -> None:
    rows, columns = torch.tensor([7, 0, 7]), torch.tensor([11, 3, 11])
    dense = Sparse.of(rows, columns, torch.tensor([1.0, 2.0, 3.0]), (OUT, IN)).dense()
    assert (dense[7, 11], dense[0, 3], dense.count_nonzero()) == (4, 2, 2)


def test_spectral_is_the_inverse_transform() -> None:
    rows, columns, values = places(9)
    S = torch.zeros(OUT, IN).index_put((rows, columns), values, accumulate=True)
    dense = Spectral(Sparse.of(rows, columns, values, (OUT, IN))).dense()
    assert torch.allclose(dense, torch.fft.ifft2(S).real, atol=1e-6)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_turn_folds_into_the_weight(blocks: int) -> None:
    turn, W, x = Turn(torch.randn(blocks, 4, 4)), torch.randn(OUT, IN), torch.randn(5, IN)
    assert torch.allclose(turn.apply(x) @ W.T, x @ turn.fold(W).T, atol=1e-5)


@pytest.mark.parametrize("name", ["turn", "mirror", "delta", "all"])
def test_fold_is_apply(name: str) -> None:
    turn, mirror = Turn(torch.randn(3, 4, 4)), Mirror(torch.randperm(OUT), torch.randn(OUT))
    parts = {"turn": turn, "mirror": mirror, "delta": DELTAS["sparse"]}
    chosen = parts if name == "all" else {name: parts[name]}
    patch = Patch(**chosen, gain=torch.rand(OUT), bias=torch.randn(OUT), out_scale=torch.rand(OUT))
    module, x = torch.nn.Linear(IN, OUT).requires_grad_(False), torch.randn(2, 5, IN)
    folded = patch.fold({"weight": module.weight, "bias": module.bias})
    assert torch.allclose(patch.apply(x, module), x @ folded["weight"].T + folded["bias"], atol=1e-5)


def test_parts_are_counted_and_move_with_their_patch() -> None:
    patch = Patch(delta=DELTAS["sparse"], turn=Turn(torch.randn(3, 4, 4)), bias=torch.randn(OUT))
    moved = patch.to(torch.device("cpu"), torch.bfloat16)
    assert len(list(patch.tensors())) == 5
    assert {t.dtype for t in moved.tensors()} == {torch.bfloat16, torch.int32}


def test_what_is_not_sparse_stays_a_matrix() -> None:
    dense = torch.zeros(OUT, IN)
    dense[2, 3] = dense[5, 0] = 1
    assert torch.equal(sparse(dense).dense(), dense)
    assert sparse(torch.randn(OUT, IN)) is None
