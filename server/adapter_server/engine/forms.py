"""Which form of the hot products a device gets, and the proof at start that it computes what its reference does.

    CUDA, with triton    `kernels.py`, once it has agreed with torch on this device, in these dtypes and shapes
    CPU in float32       `lowrank.c`, where a C compiler is at hand
    anywhere             plain torch

A kernel that does not compile here, or that differs, is left out with a warning in the log: slower, never wrong.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapter_server.engine import native
from adapter_server.engine.grouped import Grouped
from adapter_server.engine.kv import LayerShape
from adapter_server.engine.lowrank import Banked, LowRank

if TYPE_CHECKING:
    from adapter_server.engine.kernels import Form

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}  # of values about 1, in one product
RANKS, COUNTS = ((3, 16, 0), (40, 8, 5), (16, 16, 16)), (1, 20, 5)  # of the probe's adapters: per member; tokens
INP, OUTS = 1040, (80, 48, 48)
LENGTHS = (1, 200, 16, 333)  # of the probe's rows


@functools.cache
def kernels() -> ModuleType | None:
    """The module of Triton kernels; None where triton is not installed, or does not work."""
    try:
        return importlib.import_module("adapter_server.engine.kernels")
    except ImportError:
        return None
    except Exception as failure:
        log.warning("Triton is installed and does not work, plain torch runs instead: %r", failure)
        return None


def usable(device: torch.device) -> bool:
    """Whether kernels are for this device at all."""
    return device.type == "cuda"


def low_rank(device: torch.device, base: torch.dtype, held: torch.dtype, wanted: bool = True) -> LowRank:
    """The fastest form of the low-rank products here. `held`: the dtype of adapters; x and y are in either's."""
    found = kernels() if wanted and usable(device) else None
    if found is not None and all(_low_rank_agrees(found, device, given, held) for given in {base, held}):
        return Grouped(found, device)
    library = native.library() if device.type == "cpu" and held == torch.float32 else None
    return Banked() if library is None else native.Native(library)


def _low_rank_agrees(found: ModuleType, device: torch.device, given: torch.dtype, held: torch.dtype) -> bool:
    error = functools.partial(low_rank_error, found, device, given, held)
    return _agrees("low-rank products", error, max(TOLERANCE[given], TOLERANCE[held]))


def decoding(
    device: torch.device, dtype: torch.dtype, layers: Iterable[LayerShape], heads: int, page: int, wanted: bool = True
) -> ModuleType | None:
    """The kernels, where they compute attention over these layers' heads; None: plain torch does."""
    if not wanted or not usable(device) or (found := kernels()) is None:
        return None
    for shape in sorted(set(layers)):
        if heads % shape[0]:
            return None
        for form in _forms(found, heads, device):
            error = functools.partial(attention_error, found, form, shape, heads, device, dtype, page=page)
            if not _agrees(f"attention over heads of {shape[1]}", error, TOLERANCE[dtype]):
                return None
    return found


def _forms(found: ModuleType, heads: int, device: torch.device) -> list[Form]:
    """Plain, and all at once."""
    sinks = torch.linspace(-1, 1, heads, device=device)
    return [found.Form(0.1), found.Form(0.1, cap=5.0, window=50, sinks=sinks)]


def _agrees(what: str, error: Callable[[], float], tolerance: float) -> bool:
    """Whether a kernel compiles, runs, and is as near to its reference as rounding allows."""
    try:
        far = error()
    except Exception as failure:
        log.warning("the Triton kernel for %s does not run here, plain torch does instead: %r", what, failure)
        return False
    if not far <= tolerance:  # NaN too
        log.warning("the Triton kernel for %s is off by %.3g here, plain torch runs instead", what, far)
        return False
    return True


def low_rank_error(found: ModuleType, device: torch.device, given: torch.dtype, held: torch.dtype) -> float:
    """The largest difference between `add_low_rank` on random input of dtype `given` and its line of torch."""
    draw = _draws(device)
    adapters = [_adapter(draw, ranks, held) for ranks in RANKS]
    fields = found.HEAD + found.MEMBER * len(OUTS)
    table = torch.zeros(len(RANKS), fields, dtype=torch.int64)
    for i, (A, members, ranks) in enumerate(zip(*zip(*adapters, strict=True), RANKS, strict=True)):
        above = [sum(ranks[:m]) for m in range(len(ranks))]
        row = [A.data_ptr(), len(A)]
        for Bt, at, rank in zip(members, above, ranks, strict=True):
            row += [Bt.data_ptr(), at, rank]
        table[i] = torch.tensor(row)
    x, y = draw(sum(COUNTS), INP).to(given), draw(sum(COUNTS), sum(OUTS)).to(given)
    want = y.to(torch.float32, copy=True)
    starts = [sum(COUNTS[:i]) for i in range(len(COUNTS))]
    for (A, members), start, count, ranks in zip(adapters, starts, COUNTS, RANKS, strict=True):
        small = (x[start : start + count].float() @ A.float().T * 0.5).to(held).float()
        parts = [s @ Bt.float() for s, Bt in zip(torch.split(small, list(ranks), 1), members, strict=True)]
        want[start : start + count] += torch.cat(parts, 1)
    found.add_low_rank(y, x, _tiles(found, starts, device), table.to(device), _outputs(found, device), held)
    return (y.float() - want).abs().max().item()


def _adapter(draw: Callable[..., Tensor], ranks: Sequence[int], held: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """A [Σ r, in] and per member Bt [r, out], such that their products are about 1."""
    A = (draw(sum(ranks), INP) / INP**0.5).to(held)
    return A, [(draw(r, out) / max(1, r) ** 0.5).to(held) for r, out in zip(ranks, OUTS, strict=True)]


def _tiles(found: ModuleType, starts: Sequence[int], device: torch.device) -> Any:
    places = [
        (i, start + at, min(found.TOKENS, count - at))
        for i, (start, count) in enumerate(zip(starts, COUNTS, strict=True))
        for at in range(0, count, found.TOKENS)
    ]
    width = math.ceil(max(map(sum, RANKS)) / found.RANKS) * found.RANKS
    return found.Tiles(
        torch.arange(sum(COUNTS), dtype=torch.int32, device=device),
        torch.full((sum(COUNTS),), 0.5, device=device),
        torch.tensor(places, dtype=torch.int32, device=device),
        [(0, len(places))],
        width,
        torch.full((found.MOST_SPLITS * sum(COUNTS) * width,), math.nan, device=device),
    )


def _outputs(found: ModuleType, device: torch.device) -> Any:
    blocks = [
        (m, start, out, sum(OUTS[:m]) + start) for m, out in enumerate(OUTS) for start in range(0, out, found.WIDE)
    ]
    return found.Outputs(torch.tensor(blocks, dtype=torch.int32, device=device), INP, 0)


def attention_error(
    found: ModuleType,
    form: Form,
    shape: LayerShape,
    heads: int,
    device: torch.device,
    dtype: torch.dtype,
    lengths: Sequence[int] = LENGTHS,
    page: int = 16,
) -> float:
    """The largest difference between `paged_decode` on random input and its line of torch."""
    draw, (kv_heads, dim, dim_v) = _draws(device), shape
    needs = [math.ceil(length / page) for length in lengths]
    order = torch.randperm(sum(needs), generator=torch.Generator().manual_seed(0)).tolist()
    table = torch.zeros(len(lengths), max(needs), dtype=torch.int32)
    for i, need in enumerate(needs):
        table[i, :need] = torch.tensor([order.pop() for _ in range(need)])
    keys, values = draw(sum(needs) * page, kv_heads, dim).to(dtype), draw(sum(needs) * page, kv_heads, dim_v).to(dtype)
    q = draw(heads, len(lengths), dim).to(dtype)
    tokens = torch.arange(len(lengths), device=device).flip(0)
    got = torch.full((len(lengths), heads, dim_v), math.nan, dtype=dtype, device=device)
    rows = found.Rows(table.to(device), torch.tensor(lengths, device=device), tokens, page, max(lengths))
    found.paged_decode(got, q, keys, values, rows, form)
    want = torch.empty(got.shape, device=device)
    for i, length in enumerate(lengths):
        at = torch.arange(length) if form.window is None else torch.arange(max(0, length - form.window), length)
        places = (table[i, at // page].long() * page + at % page).to(device)
        k, v = (t[places].float().repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
        want[tokens[i]] = _attention(q[:, tokens[i]].float(), k, v, form)
    return (got.float() - want).abs().max().item()


def _attention(q: Tensor, k: Tensor, v: Tensor, form: Form) -> Tensor:
    """q [heads, dim], k and v [keys, heads, dim] → [heads, dim_v]: softmax(cap(q · k · scale) and sinks) · v"""
    scores = torch.einsum("hd,khd->hk", q, k) * form.scale
    scores = scores if form.cap is None else form.cap * torch.tanh(scores / form.cap)
    if form.sinks is not None:
        scores = torch.cat([scores, form.sinks.float()[:, None]], 1)
    return torch.einsum("hk,khd->hd", scores.softmax(1)[:, : len(k)], v)


def _draws(device: torch.device) -> Callable[..., Tensor]:
    """Random numbers of its own: nobody's seed is touched."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device)
