"""What an adapter changes at a Linear that is no low rank and yet far smaller than a weight.

Delta   y += ΔW x           Sparse: some numbers of W    Spectral: some of its Fourier coefficients
                            Kronecker: w₁ ⊗ w₂           Circulant: blocks of one row each    Rows: some outputs
                            Scaled: vectors around matrices that modules share
Turn    W (x R)             the input rotated, block by block
Mirror  y += f ∘ y[index]   outputs mixed in pairs
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says once that CSR is in beta: the products used here have tests
    torch.sparse_csr_tensor([0, 1], [0], torch.zeros(1), (1, 1), check_invariants=True)

SIDE = 64  # columns of a block
DENSE = 4  # a matrix is held as sparse when no more than one in so many of its numbers is not zero


class Delta(Protocol):
    """ΔW [out, in], never written out but for a fold.

    Its products are of float32 whatever it is held in, to be rounded once, where they are added.
    """

    def apply(self, x: Tensor) -> Tensor:
        """x [T, in] → ΔW x [T, out], float32."""

    def dense(self) -> Tensor:
        """ΔW [out, in], float32, on the device that it is held on."""

    def tensors(self) -> Iterator[Tensor]: ...

    def to(self, device: torch.device, dtype: torch.dtype) -> Self: ...


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """What tensors take of memory. Of one memory that several are parts of, no more than all of it."""
    whole: dict[int, int] = {}
    parts: dict[int, int] = {}
    for t in tensors:
        storage = t.untyped_storage()
        at = storage.data_ptr()
        whole[at], parts[at] = storage.nbytes(), parts.get(at, 0) + t.nbytes
    return sum(min(size, whole[at]) for at, size in parts.items())


class TensorFields:
    """A dataclass whose tensors, its parts' among them, are iterated and moved together; indices keep their dtype."""

    def tensors(self) -> Iterator[Tensor]:
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, TensorFields):
                yield from value.tensors()

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        moved = {name: _moved(v, device, dtype) for name, v in values.items() if isinstance(v, Tensor | TensorFields)}
        return dataclasses.replace(self, **moved)  # type: ignore[type-var]


def _moved(value: Tensor | TensorFields, device: torch.device, dtype: torch.dtype) -> Tensor | TensorFields:
    whole = isinstance(value, Tensor) and not value.is_floating_point()
    return value.to(device) if whole else value.to(device, dtype)  # type: ignore[call-arg]


@dataclass(frozen=True, slots=True, eq=False)
class Sparse(TensorFields):
    """n numbers of ΔW by rows: row i has numbers starts[i] … starts[i+1] − 1. A place that comes twice counts twice."""

    starts: Tensor  # [out + 1], int32
    columns: Tensor  # [n], int32
    values: Tensor  # [n]
    inp: int

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Sparse:
        """From n places (row, column), in any order."""
        order = torch.argsort(rows * shape[1] + columns)
        counts = torch.bincount(rows, minlength=shape[0])
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        return cls(starts, columns[order].int(), values[order].contiguous(), shape[1])

    def apply(self, x: Tensor) -> Tensor:
        return self._times(x.float())

    def _times(self, x: Tensor) -> Tensor:
        shape = len(self.starts) - 1, self.inp
        matrix = torch.sparse_csr_tensor(self.starts, self.columns, self.values.float(), shape, check_invariants=False)
        out: Tensor = (matrix @ x.T).T
        return out

    def dense(self) -> Tensor:
        out, device = len(self.starts) - 1, self.values.device
        counts = self.starts.diff().long()
        rows = torch.arange(out, device=device).repeat_interleave(counts, output_size=len(self.values))
        zeros = torch.zeros(out, self.inp, device=device)
        return zeros.index_put((rows, self.columns.long()), self.values.float(), accumulate=True)


@dataclass(frozen=True, slots=True, eq=False)
class Spectral(TensorFields):
    """ΔW = Re ifft2(S), S a sparse matrix: the input transformed, S, the output transformed back."""

    S: Sparse

    def apply(self, x: Tensor) -> Tensor:
        waves = torch.fft.ifft(x.float())
        real, imaginary = self.S.apply(torch.cat([waves.real, waves.imag])).chunk(2)
        out: Tensor = torch.fft.ifft(torch.complex(real, imaginary)).real
        return out

    def dense(self) -> Tensor:
        delta: Tensor = torch.fft.ifft2(self.S.dense()).real
        return delta

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """In float32 always: each number of S acts on all of ΔW, so that its rounding does."""
        return TensorFields.to(self, device, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker(TensorFields):
    """ΔW = left ⊗ right: output (a, b) reads input (i, j) by left[a, i] · right[b, j].

    A factor that is a low rank is left · left_in, right · right_in.
    """

    left: Tensor  # [o1, i1 or a rank]
    right: Tensor  # [o2, i2 or a rank]
    left_in: Tensor | None = None  # [rank, i1]
    right_in: Tensor | None = None  # [rank, i2]

    @property
    def rank(self) -> int:
        """Of the low rank that it is; 0 where it is none."""
        (o1, i1), (o2, i2) = self.sizes
        rank = min(self.left.shape) * min(self.right.shape)
        return rank if 2 * rank <= min(o1 * o2, i1 * i2) else 0

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(out, in) of the left factor and of the right one."""
        return _size(self.left, self.left_in), _size(self.right, self.right_in)

    @property
    def work(self) -> int:
        """Multiplications of a token, factor by factor."""
        (o1, i1), (o2, i2) = self.sizes
        return i1 * o2 * (i2 + o1)

    def whole(self) -> Kronecker:
        """The same from factors that are no products."""
        return Kronecker(_product(self.left, self.left_in), _product(self.right, self.right_in))

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """(A, B) with ΔW = B A, of the product of the factors' ranks; None where that is no low rank."""
        if not self.rank:
            return None
        (L1, R1), (L2, R2) = _halves(self.left, self.left_in), _halves(self.right, self.right_in)
        return torch.kron(R1, R2), torch.kron(L1, L2)

    def apply(self, x: Tensor) -> Tensor:
        left, right = _product(self.left, self.left_in), _product(self.right, self.right_in)
        pairs = x.float().view(-1, left.shape[1], right.shape[1])  # [T, i1, i2]
        return (left @ F.linear(pairs, right)).flatten(1)

    def dense(self) -> Tensor:
        return torch.kron(_product(self.left, self.left_in), _product(self.right, self.right_in))


def _product(a: Tensor, b: Tensor | None) -> Tensor:
    return a.float() if b is None else a.float() @ b.float()


def _size(a: Tensor, b: Tensor | None) -> tuple[int, int]:
    """(out, in) of a factor."""
    return len(a), (a if b is None else b).shape[1]


def _halves(a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """A factor [out, in] as L · R; a whole one's smaller side is its rank."""
    if b is not None:
        return a, b
    out, inp = a.shape
    eye = torch.eye(min(out, inp), dtype=a.dtype, device=a.device)
    return (a, eye) if inp <= out else (eye, a)


@dataclass(frozen=True, slots=True, eq=False)
class Scaled(TensorFields):
    """ΔW = outer ∘ B (mid ∘ A), A and B parts of what all modules of an adapter share."""

    A: Tensor  # [r, in]
    mid: Tensor  # [r]
    B: Tensor  # [⌈out/SIDE⌉, r, SIDE], its columns' transposes side by side, as kernels read them
    outer: Tensor  # [out]

    @classmethod
    def within(cls, A: Tensor, mid: Tensor, B: Tensor, outer: Tensor, inp: int) -> Scaled:
        """A module's part of A [≥ r, ≥ in] and of B in blocks."""
        return cls(A[: len(mid), :inp], mid, B[: -(-len(outer) // SIDE)], outer)

    @staticmethod
    def blocks(B: Tensor) -> Tensor:
        """B [out, r] in that form, of which a narrower module's is the first part."""
        out, r = B.shape
        return F.pad(B.T, (0, -out % SIDE)).view(r, -1, SIDE).transpose(0, 1).contiguous()

    @property
    def rank(self) -> int:
        return len(self.mid)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(A, B) with ΔW = B A, of this module alone."""
        B = self.B.transpose(1, 2).flatten(0, 1)[: len(self.outer)]
        return self.mid[:, None] * self.A, self.outer[:, None] * B

    def apply(self, x: Tensor) -> Tensor:
        A, B = self.low_rank()
        return F.linear(F.linear(x.float(), A.float()), B.float())

    def dense(self) -> Tensor:
        A, B = self.low_rank()
        return B.float() @ A.float()


@dataclass(frozen=True, slots=True, eq=False)
class Circulant(TensorFields):
    """Blocks [b, b] of ΔW, each row the one above moved on by one: a product of Fourier transforms.

    The kernels' spectra are held, per frequency as the real matrix of a complex product: [c d; −d c].
    """

    spectrum: Tensor  # [b/2 + 1, 2 · in/b, 2 · out/b]
    size: int  # b

    @classmethod
    def of(cls, kernel: Tensor) -> Circulant:
        """kernel [out/b, in/b, b]: a block's first row."""
        waves = torch.fft.rfft(kernel.float()).conj().permute(2, 1, 0)
        c, d = waves.real, waves.imag
        upper, lower = torch.cat([c, d], 2), torch.cat([-d, c], 2)
        return cls(torch.cat([upper, lower], 1).contiguous(), kernel.shape[2])

    def apply(self, x: Tensor) -> Tensor:
        f, n, m = self.spectrum.shape
        waves = torch.view_as_real(torch.fft.rfft(x.float().view(len(x), -1, self.size)))  # [T, in/b, f, 2]
        y = torch.bmm(waves.permute(2, 0, 3, 1).reshape(f, -1, n), self.spectrum)
        y = y.view(f, len(x), 2, m // 2).permute(1, 3, 0, 2).contiguous()  # [T, out/b, f, 2]
        out: Tensor = torch.fft.irfft(torch.view_as_complex(y), self.size).flatten(1)
        return out

    def dense(self) -> Tensor:
        n, m, b = self.spectrum.shape[1] // 2, self.spectrum.shape[2] // 2, self.size
        c, d = self.spectrum[:, :n, :m], self.spectrum[:, :n, m:]
        kernel = torch.fft.irfft(torch.complex(c, -d).permute(2, 1, 0), b)
        steps = torch.arange(b, device=kernel.device)
        at = (steps - steps[:, None]) % b  # [row, column]: which number of the first row
        delta: Tensor = kernel[:, :, at].transpose(1, 2).reshape(m * b, n * b)
        return delta

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """In float32 always, as a spectrum's."""
        return TensorFields.to(self, device, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Rows(TensorFields):
    """Some outputs alone: ΔW[index] = values, and zero elsewhere."""

    index: Tensor  # [n], int64, distinct
    values: Tensor  # [n, in]
    out: int

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(A, B) with ΔW = B A, of as many ranks as there are rows."""
        B = self.values.new_zeros(self.out, len(self.index))
        B[self.index, torch.arange(len(self.index), device=B.device)] = 1
        return self.values, B

    def apply(self, x: Tensor) -> Tensor:
        y = F.linear(x.float(), self.values.float())
        return y.new_zeros(len(x), self.out).index_copy_(1, self.index, y)

    def dense(self) -> Tensor:
        zeros = torch.zeros(self.out, self.values.shape[1], device=self.values.device)
        return zeros.index_copy(0, self.index, self.values.float())


@dataclass(frozen=True, slots=True, eq=False)
class Turn(TensorFields):
    """The input turned block by block before W: x R, one R for all blocks or one each."""

    R: Tensor  # [1 or in/b, b, b]

    def apply(self, x: Tensor) -> Tensor:
        """x [..., in] → x R [..., in]."""
        b = self.R.shape[-1]
        blocks = x.reshape(-1, x.shape[-1] // b, b).transpose(0, 1)  # [in/b, T, b]
        return torch.matmul(blocks, self.R).transpose(0, 1).reshape(x.shape)

    def fold(self, W: Tensor) -> Tensor:
        """W [out, in] → W Rᵀ, which reads the input as it is."""
        return Turn(self.R.float().mT).apply(W)


@dataclass(frozen=True, slots=True, eq=False)
class Mirror(TensorFields):
    """y[i] += factor[i] · u[index[i]], u the outputs before."""

    index: Tensor  # [out], int64
    factor: Tensor  # [out]

    def apply(self, u: Tensor) -> Tensor:
        """u [..., out] → what is added."""
        return u[..., self.index] * self.factor


def sparse(dense: Tensor) -> Sparse | None:
    """A matrix [out, in] that is mostly zero, by its other numbers; None where that would not be smaller."""
    rows, columns = dense.nonzero(as_tuple=True)
    if len(rows) * DENSE > dense.numel():
        return None
    return Sparse.of(rows, columns, dense[rows, columns], (dense.shape[0], dense.shape[1]))
