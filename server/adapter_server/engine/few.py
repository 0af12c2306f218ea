"""Products with few rows on CUDA: by a Triton kernel or by the library, as timed at start over the base's own weights.

Timed at 1, 8 and 32 rows, as graphs, so that no launch counts; for 1 … 4, 5 … 16 and 17 … 32. Beyond, the library
always. Weights of one shape run in turn, so that a cache does not hold them.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from adapter_server.engine.placed import Product
from adapter_server.engine.proofs import TOLERANCE

if TYPE_CHECKING:
    from adapter_server.engine.kernels import Tiling

log = logging.getLogger(__name__)

TIMED = {4: 1, 16: 8, 32: 32}  # up to so many rows: the rows that are timed
WORTH = 0.97  # of the library's time: below that the kernel is taken
ROUNDS, MOST_WEIGHTS = 5, 16


@dataclass(frozen=True, eq=False)
class FewRows:
    """What a `Product` asks first. None from it means the library."""

    kernels: ModuleType
    tilings: Mapping[int, Tiling | None]  # by the keys of TIMED

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        limit = next((rows for rows in self.tilings if len(x) <= rows), None)
        tiling = None if limit is None else self.tilings[limit]
        if tiling is None or x.stride(1) != 1 or not weight.is_contiguous():
            return None
        y: Tensor = self.kernels.few_rows(x, weight, bias, tiling)
        return y


def _alike(products: Sequence[Product]) -> Iterable[tuple[torch.Size, list[Product]]]:
    """By shape and dtype."""
    alike: dict[tuple[torch.Size, torch.dtype], list[Product]] = defaultdict(list)
    for product in products:
        alike[product.weight.shape, product.weight.dtype].append(product)
    return ((shape, some) for (shape, _), some in alike.items())


def choose(kernels: ModuleType, products: Sequence[Product]) -> None:
    """Give each product the faster form for its shape."""
    for shape, some in _alike(products):
        weights = [product.weight for product in some[:MOST_WEIGHTS]]
        tilings = {limit: _fastest(kernels, weights, rows) for limit, rows in TIMED.items()}
        if any(tilings.values()):
            few = FewRows(kernels, tilings)
            for product in some:
                product.few = few
        log.info("products of %s: %s", tuple(shape), tilings)


@torch.inference_mode()
def _fastest(kernels: ModuleType, weights: Sequence[Tensor], rows: int) -> Tiling | None:
    """The tiling that beats the library at so many rows and agrees with it; None where none does."""
    x = torch.randn(rows, weights[0].shape[1], device=weights[0].device).to(weights[0].dtype)
    want = F.linear(x, weights[0])
    best, chosen = WORTH * _seconds(lambda w: F.linear(x, w), weights), None
    for tiling in kernels.TILINGS:
        if not kernels.takes(weights[0], tiling):
            continue
        try:
            got = kernels.few_rows(x, weights[0], None, tiling)
            seconds = _seconds(lambda w, t=tiling: kernels.few_rows(x, w, None, t), weights)  # type: ignore[misc]
        except Exception as failure:
            log.warning("the Triton kernel for products with few rows does not run here: %r", failure)
            return None
        far = (got.float() - want.float()).abs().max() / want.float().abs().max()
        if far <= TOLERANCE[x.dtype] and seconds < best:
            best, chosen = seconds, tiling
    return chosen


def _seconds(run: Callable[[Tensor], Tensor], weights: Sequence[Tensor]) -> float:
    """Of the fastest of some replays over all the weights."""
    run(weights[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for weight in weights:
            run(weight)
    times: list[float] = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times)
