"""Each kernel against its line of torch on random input: the largest difference, for the proof at start and the tests.

`found` is the package of kernels, so that what is asked is what serves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adapter_server.engine.kv import LayerShape
from adapter_server.engine.sampling import inverse

if TYPE_CHECKING:
    from adapter_server.engine.kernels import Form, Tiling

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}  # of values about 1, in one product
RANKS, COUNTS = ((3, 16, 0), (40, 8, 5), (16, 16, 16)), (3, 70, 1)  # of the probe's adapters: per member; tokens
INP, OUTS = 1040, (80, 48, 48)
LENGTHS = (1, 200, 16, 333)  # of the probe's rows
CHUNKS = ((0, 2), (150, 70), (5, 17))  # of rows with several new tokens: those before, and the new ones


def low_rank_error(
    found: ModuleType, device: torch.device, given: torch.dtype, held: torch.dtype, few: int = 4, apart: bool = False
) -> float:
    """Of `add_low_rank` on input of dtype `given`: short and long rows, with vectors and without, and padding.

    `few`: the tokens of a short row's tile; `apart`: of `low_rank`.
    """
    draw = draws(device)
    adapters = [_adapter(draw, ranks, held) for ranks in RANKS]
    vectors = [draw(2, sum(OUTS)).to(held) * (0.3 if i != 1 else 0) for i in range(len(RANKS))]
    table = torch.zeros(len(RANKS), found.HEAD + found.MEMBER * len(OUTS), dtype=torch.int64)
    for i, ((A, members), (mul, add), ranks) in enumerate(zip(adapters, vectors, RANKS, strict=True)):
        row = [A.data_ptr(), len(A), *(v.data_ptr() if i != 1 else 0 for v in (mul, add))]
        for m, (Bt, rank) in enumerate(zip(members, ranks, strict=True)):
            row += [Bt.data_ptr(), sum(ranks[:m]), rank]
        table[i] = torch.tensor(row)
    x, y = draw(sum(COUNTS), INP).to(given), draw(sum(COUNTS), sum(OUTS)).to(given)
    want = torch.zeros(y.shape, device=device) if apart else y.to(torch.float32, copy=True)
    starts = [sum(COUNTS[:i]) for i in range(len(COUNTS))]
    for (A, members), both, start, count, ranks in zip(adapters, vectors, starts, COUNTS, RANKS, strict=True):
        small = (x[start : start + count].float() @ A.float().T * 0.5).to(held).float()
        parts = [s @ Bt.float() for s, Bt in zip(torch.split(small, list(ranks), 1), members, strict=True)]
        mul, add = both.float()
        old = want[start : start + count]
        old += 0.5 * (old * mul + add) + torch.cat(parts, 1)
    run = found.low_rank if apart else found.add_low_rank
    run(y, x, _tiles(found, starts, device, few), table.to(device), _outputs(found, device), held)
    return (y.float() - want).abs().max().item()


def _adapter(draw: Callable[..., Tensor], ranks: Sequence[int], held: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """A [Σ r, in] and per member Bt [r, out], such that their products are about 1."""
    A = (draw(sum(ranks), INP) / INP**0.5).to(held)
    return A, [(draw(r, out) / max(1, r) ** 0.5).to(held) for r, out in zip(ranks, OUTS, strict=True)]


def _tiles(found: ModuleType, starts: Sequence[int], device: torch.device, few: int) -> Any:
    """Each adapter's tokens as one row's, and after each run a tile of padding."""
    places: list[tuple[int, ...]] = []
    runs = []
    for size in (found.MANY, few):
        begin = len(places)
        for i, (start, count) in enumerate(zip(starts, COUNTS, strict=True)):
            if (count <= found.FEW) == (size == few):
                places += [(i, start + at, min(size, count - at), 1) for at in range(0, count, size)]
        places.append((0, 0, 0, 0))
        runs.append(found.Run(begin, len(places), size))
    width = math.ceil(max(map(sum, RANKS)) / found.MANY_RANKS) * found.MANY_RANKS
    return found.Tiles(
        torch.arange(sum(COUNTS), dtype=torch.int32, device=device),
        torch.full((sum(COUNTS),), 0.5, device=device),
        torch.tensor(places, dtype=torch.int32, device=device),
        runs,
        width,
        torch.full((found.MOST_SPLITS * sum(COUNTS) * width,), math.nan, device=device),
    )


def _outputs(found: ModuleType, device: torch.device) -> Any:
    blocks = [
        (m, start, out, sum(OUTS[:m]) + start) for m, out in enumerate(OUTS) for start in range(0, out, found.WIDE)
    ]
    aligned = all(out % 16 == 0 for out in OUTS)
    return found.Outputs(torch.tensor(blocks, dtype=torch.int32, device=device), INP, 0, aligned)


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
    pool = _pool(shape, device, dtype, lengths, page)
    q = draws(device)(heads, len(lengths), shape[1]).to(dtype)
    tokens = torch.arange(len(lengths), device=device).flip(0)
    got = torch.full((len(lengths), heads, shape[2]), math.nan, dtype=dtype, device=device)
    rows = found.Rows(pool.table.to(device), torch.tensor(lengths, device=device), tokens, page, max(lengths))
    found.paged_decode(got, q, pool.keys, pool.values, rows, form)
    want = torch.empty(got.shape, device=device)
    for i, length in enumerate(lengths):
        want[tokens[i]] = pool.attention(i, length, q[:, tokens[i]], form)
    return (got.float() - want).abs().max().item()


def prefill_error(
    found: ModuleType,
    form: Form,
    shape: LayerShape,
    heads: int,
    device: torch.device,
    dtype: torch.dtype,
    rows: Sequence[tuple[int, int]] = CHUNKS,
    page: int = 16,
) -> float:
    """Of `paged_prefill` for rows of (tokens before, new tokens), and a tile of padding."""
    pool = _pool(shape, device, dtype, [past + count for past, count in rows], page)
    starts = [sum(count for _, count in rows[:i]) for i in range(len(rows) + 1)]
    q = draws(device)(starts[-1], heads, shape[1]).to(dtype).transpose(0, 1)
    each = [
        (i, starts[i] + at, min(found.QUERIES, count - at), past + at)
        for i, (past, count) in enumerate(rows)
        for at in range(0, count, found.QUERIES)
    ]
    tiles = torch.tensor([*each, (0, 0, 0, 0)], dtype=torch.int32, device=device)
    got = torch.full((starts[-1], heads, shape[2]), math.nan, dtype=dtype, device=device)
    found.paged_prefill(got, q, pool.keys, pool.values, found.Chunks(pool.table.to(device), tiles, page), form)
    want = torch.empty(got.shape, device=device)
    for i, (past, count) in enumerate(rows):
        for t in range(count):
            want[starts[i] + t] = pool.attention(i, past + t + 1, q[:, starts[i] + t], form)
    return (got.float() - want).abs().max().item()


@dataclass(frozen=True, slots=True, eq=False)
class _Pool:
    """Rows' pages in random order: table [rows, pages], keys and values [places, kv_heads, dim]."""

    table: Tensor
    keys: Tensor
    values: Tensor
    page: int

    def attention(self, row: int, length: int, q: Tensor, form: Form) -> Tensor:
        """q [heads, dim] over the last keys of the row's first `length` → [heads, dim_v], in float32."""
        at = torch.arange(0 if form.window is None else max(0, length - form.window), length)
        places = (self.table[row, at // self.page].long() * self.page + at % self.page).to(q.device)
        group = len(q) // self.keys.shape[1]
        k, v = (t[places].float().repeat_interleave(group, 1) for t in (self.keys, self.values))
        return _attention(q.float(), k, v, form)


def _pool(shape: LayerShape, device: torch.device, dtype: torch.dtype, lengths: Sequence[int], page: int) -> _Pool:
    draw, (kv_heads, dim, dim_v) = draws(device), shape
    needs = [math.ceil(length / page) for length in lengths]
    order = torch.randperm(sum(needs), generator=torch.Generator().manual_seed(0)).tolist()
    table = torch.zeros(len(lengths), max(needs), dtype=torch.int32)
    for i, need in enumerate(needs):
        table[i, :need] = torch.tensor([order.pop() for _ in range(need)])
    keys, values = draw(sum(needs) * page, kv_heads, dim).to(dtype), draw(sum(needs) * page, kv_heads, dim_v).to(dtype)
    return _Pool(table, keys, values, page)


def _attention(q: Tensor, k: Tensor, v: Tensor, form: Form) -> Tensor:
    """q [heads, dim], k and v [keys, heads, dim] → [heads, dim_v]: softmax(cap(q · k · scale) and sinks) · v"""
    scores = torch.einsum("hd,khd->hk", q, k) * form.scale
    scores = scores if form.cap is None else form.cap * torch.tanh(scores / form.cap)
    if form.sinks is not None:
        scores = torch.cat([scores, form.sinks.float()[:, None]], 1)
    return torch.einsum("hk,khd->hd", scores.softmax(1)[:, : len(k)], v)


def draws(device: torch.device) -> Callable[..., Tensor]:
    """Random numbers of its own: nobody's seed is touched."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device)


def norm_error(
    found: ModuleType, device: torch.device, dtype: torch.dtype, n: int = 1040, rows: int = 3, centred: bool = False
) -> float:
    """Of `rms_norm` over strided rows, of weights by row, and of `add_rms_norm`."""
    draw = draws(device)
    x, residual = (draw(rows, n + 8).to(dtype)[:, :n] for _ in range(2))
    weight, each = draw(n).to(dtype), draw(rows, n).to(dtype)
    total = residual + x
    got, summed = found.add_rms_norm(x, residual, weight, 1e-5, centred)
    pairs = [
        (found.rms_norm(x, weight, 1e-5, centred), _norm(x, weight, 1e-5, centred)),
        (found.rms_norm(x, each, 1e-5, centred), _norm(x, each, 1e-5, centred)),
        (got, _norm(total, weight, 1e-5, centred)),
        (summed, total),
    ]
    return max(_far(ours, theirs) for ours, theirs in pairs)


def _norm(x: Tensor, weight: Tensor, eps: float, centred: bool) -> Tensor:
    """As transformers' LlamaRMSNorm and GemmaRMSNorm."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * (1 + weight.float())).to(x.dtype) if centred else weight * wide.to(x.dtype)


ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def gated_error(
    found: ModuleType, device: torch.device, dtype: torch.dtype, act: str = "silu", n: int = 1040, rows: int = 3
) -> float:
    both = draws(device)(rows, 2 * n).to(dtype)
    return _far(found.gated(both, act), ACTS[act](both[:, :n]) * both[:, n:])


def rope_error(
    found: ModuleType, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int] = (4, 2, 64),
    normed: bool = False, centred: bool = False, rows: int = 5,
) -> float:  # fmt: skip
    """Of `rope_write` for (heads, kv_heads, dim), over strided rows, the last of them padding: q and both stores."""
    draw, (heads, kv_heads, dim) = draws(device), shape
    width = (heads + 2 * kv_heads) * dim
    mixed = draw(rows, width + 8).to(dtype)[:, :width]
    angles = draw(rows, dim // 2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    keys, values = (draw(rows + 3, kv_heads, dim).to(dtype) for _ in range(2))
    places = torch.tensor([*range(rows + 1, 2, -1), -1], device=device)
    norms = [found.Norm(draw(dim).to(dtype), 1e-6, centred) if normed else None for _ in range(2)]
    wanted = [keys.clone(), values.clone()]
    q, k, v = torch.split(mixed.view(rows, -1, dim), [heads, kv_heads, kv_heads], 1)
    q, k = (x if norm is None else _norm(x, norm.weight, 1e-6, centred) for x, norm in zip((q, k), norms, strict=True))
    q, k = (_rotated(x, cos[:, None], sin[:, None]) for x in (q, k))
    wanted[0][places[:-1]], wanted[1][places[:-1]] = k[:-1], v[:-1]
    got = found.rope_write(mixed, cos, sin, keys, values, places, heads, kv_heads, *norms)
    return max(_far(ours, theirs) for ours, theirs in zip((got, keys, values), (q, *wanted), strict=True))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def more_error(found: ModuleType, device: torch.device, dtype: torch.dtype, rows: int = 5) -> float:
    """Of all that take `More`: as if it had been added in place, at the tokens where it is live."""
    draw, (heads, kv_heads, dim) = draws(device), (4, 2, 32)
    width, live = (heads + 2 * kv_heads) * dim, torch.tensor([i % 2 for i in range(rows)], dtype=torch.int32)
    x, value, residual = (draw(rows, width).to(dtype) for _ in range(3))
    value[live == 0] = math.nan
    both, more = torch.where(live[:, None].to(device) > 0, x + value, x), found.More(value, live.to(device))
    weight, angles = draw(width).to(dtype), draw(rows, dim // 2).repeat(1, 2)
    turn = angles.cos().to(dtype), angles.sin().to(dtype)
    stores = [[draw(rows, kv_heads, dim).to(dtype) for _ in range(2)] for _ in range(2)]
    places = torch.arange(rows, device=device)
    pairs = [
        *zip(
            found.add_rms_norm(x, residual, weight, 1e-5, False, more),
            found.add_rms_norm(both, residual, weight, 1e-5),
            strict=True,
        ),
        (found.gated(x, "silu", more), found.gated(both, "silu")),
        (
            found.rope_write(x, *turn, *stores[0], places, heads, kv_heads, more=more),
            found.rope_write(both, *turn, *stores[1], places, heads, kv_heads),
        ),
        *zip(*stores, strict=True),
    ]
    return max(_far(ours, theirs) for ours, theirs in pairs)


def few_rows_error(
    found: ModuleType, device: torch.device, dtype: torch.dtype, tiling: Tiling, rows: int, biased: bool = False
) -> float:
    """Of `few_rows` over strided rows."""
    draw, inp, outs = draws(device), 2 * tiling.depth, 2 * tiling.outs
    x, weight = draw(rows, inp + 8).to(dtype)[:, :inp], (draw(outs, inp) / inp**0.5).to(dtype)
    bias = draw(outs).to(dtype) if biased else None
    want = x.float() @ weight.float().T + (0 if bias is None else bias.float())
    return _far(found.few_rows(x, weight, bias, tiling), want)


def pick_error(found: ModuleType, device: torch.device, dtype: torch.dtype, vocab: int = 9001, rows: int = 4) -> float:
    """Of `pick`: 0, or NaN where an index differs. The maximum comes several times, and one row holds a NaN."""
    logits = draws(device)(rows, vocab).to(dtype)
    logits[0] = -math.inf
    logits[1, [vocab // 3, vocab // 2, vocab - 1]] = 50.0
    logits[-1, vocab // 2] = math.nan
    ids, best = found.pick(logits)
    if not torch.equal(ids[:-1], logits[:-1].float().argmax(1)) or not bool(best[-1].isnan()):
        return math.nan
    whole = logits[1:-1].float().max(1).values
    return _far(best[1:-1], whole) if bool(best[0] == -math.inf) and 0 <= int(ids[-1]) < vocab else math.nan


NEAR = 1e-5  # of u: a token's chance rounds
SETTINGS = (  # temperature, top_k, top_p, min_p, u: each filter, all, none
    (0.0, 0, 1.0, 0.0, 0.0),
    (1.0, 0, 1.0, 0.0, 0.83),
    (0.7, 50, 1.0, 0.0, 0.61),
    (1.3, 0, 0.9, 0.0, 0.97),
    (1.0, 0, 1.0, 0.1, 0.42),
    (2.0, 200, 0.6, 0.01, 0.77),
    (1.0, 5, 0.9, 0.0, 0.5),
)


def draw_error(found: ModuleType, device: torch.device, dtype: torch.dtype, vocab: int = 4099) -> float:
    """Of `draw`: 0, or NaN where a maximum differs, or a token is not between those of a u that is NEAR less and more.

    Many logits are equal, and the last row holds a NaN.
    """
    logits = (2 * draws(device)(len(SETTINGS), vocab)).to(dtype)
    logits[:, ::3] = logits[:, ::3].round()
    logits[-1, vocab // 2] = math.nan
    settings = torch.tensor(SETTINGS, dtype=torch.float64, device=device)
    ids, best = found.draw(logits, settings)
    (first, whole), (last, _) = (drawn(logits, settings + settings.new_tensor([0, 0, 0, 0, u])) for u in (-NEAR, NEAR))
    order = logits.double().argsort(dim=1, descending=True, stable=True).argsort(1)
    places = order[:-1].gather(1, torch.stack((first, ids, last), 1)[:-1])
    same = torch.equal(best[:-1], whole[:-1]) and bool(best[-1].isnan())
    return 0 if same and bool((places.diff(dim=1) >= 0).all()) and 0 <= int(ids[-1]) < vocab else math.nan


def drawn(logits: Tensor, settings: Tensor) -> tuple[Tensor, Tensor]:
    """As `draw`, by a sort of the whole vocabulary in float64."""
    best, ids = logits.float().max(1)
    warm = settings[:, 0] > 0
    ids[warm] = inverse(logits[warm].double(), settings[warm], logits.shape[1])[0]
    return ids, best


def _far(ours: Tensor, theirs: Tensor) -> float:
    """Differences count relative to what is larger than 1: a unit in the last place grows with its number."""
    return ((ours.float() - theirs.float()).abs() / theirs.float().abs().clamp_min(1)).max().item()
