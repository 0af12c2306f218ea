"""A Linear for few rows, where a matrix product is no more than one read of its weight.

    few_rows   x @ weight.T + bias

Each program streams some rows of the weight past all rows of x, several tiles in flight, and sums in the order of the
columns: nothing is split, so that nothing is added up later and a row's numbers depend on it alone. Bound by memory:
in · out numbers are read once, for 2 · rows FLOPs each. Libraries take forms here that are made for larger products;
which is faster for a shape is timed at start (`few.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapter_server.engine.kernels.launch import OPTIONS, compute_of, on

MOST_ROWS = 32


class Tiling(NamedTuple):
    """Outputs of one program, columns of one turn, warps, turns in flight."""

    outs: int
    depth: int
    warps: int
    stages: int


TILINGS = (Tiling(16, 256, 4, 4), Tiling(32, 128, 4, 5), Tiling(64, 128, 4, 4))


def takes(weight: Tensor, tiling: Tiling) -> bool:
    """Whether the weight [out, in] consists of whole tiles."""
    return weight.shape[0] % tiling.outs == 0 and weight.shape[1] % tiling.depth == 0 and weight.is_contiguous()


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, tiling: Tiling) -> Tensor:
    """x [T ≤ MOST_ROWS, in] → [T, out], weight [out, in].

    Reference: x @ weight.T + bias
    """
    rows, (outs, inp) = len(x), weight.shape
    y = torch.empty(rows, outs, dtype=x.dtype, device=x.device)
    with on(x):
        _few_rows[outs // tiling.outs,](
            y, x, weight, weight if bias is None else bias, rows, x.stride(0), inp, outs,
            BIAS=bias is not None, COMPUTE=compute_of(weight.dtype), ROWS=16 if rows <= 16 else MOST_ROWS,
            OUTS=tiling.outs, DEPTH=tiling.depth, num_warps=tiling.warps, num_stages=tiling.stages, **OPTIONS,
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["rows"])
def _few_rows(
    y, x, weight, bias, rows, x_row, inp, outs,
    BIAS: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y[:, some] = x @ weight[some].T + bias[some], for OUTS outputs."""
    n, r, k = tl.program_id(0) * OUTS + tl.arange(0, OUTS), tl.arange(0, ROWS), tl.arange(0, DEPTH)
    total = tl.zeros((OUTS, ROWS), tl.float32)
    from_weight = weight + n[:, None].to(tl.int64) * inp + k[None, :]
    from_x = x + r[None, :] * x_row + k[:, None]
    for start in range(0, inp, DEPTH):
        part = tl.load(from_weight + start)
        row = tl.load(from_x + start, mask=(r < rows)[None, :], other=0.0)
        total = tl.dot(part.to(COMPUTE), row.to(COMPUTE), total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + n).to(tl.float32)[:, None]
    tl.store(y + r[None, :] * outs + n[:, None], total.to(y.dtype.element_ty), mask=(r < rows)[None, :])
