"""What stands between a block's products, each in one pass over memory (pick: two launches).

    rms_norm      weight · (x · rsqrt(mean(x²) + eps)).to(dtype);  centred: (x · rsqrt(…) · (1 + weight)).to(dtype)
    add_rms_norm  total = residual + x;  rms_norm(total), total
    gated         act(both[:, :n]) · both[:, n:]
    rope_write    x · cos + rotate_half(x) · sin for x = norm(q), norm(k);  keys[places] = k;  values[places] = v
    pick          logits.argmax(1), logits.max(1)

Intermediates are rounded where transformers' modules round them. A row's numbers depend on that row alone. The input
of all but pick may have `More` to be added to it first, rounded where adding in place would have.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapter_server.engine.kernels.launch import OPTIONS, on
from adapter_server.engine.operands import More, Norm, weight_row

WIDEST = 16384  # elements of a normalised row: all of it is in registers at once
SPAN = 4096  # logits that one program looks at: four 16-byte loads a thread in bfloat16
GATE, GATE_WARPS = 1024, 4  # outputs of one program of `gated`
ACTS = ("silu", "gelu", "gelu_pytorch_tanh")
HEADS, HEADS_WARPS = 4, 2  # heads of one program of `rope_write`


def _more(x: Tensor, more: More | None) -> tuple[Tensor, Tensor, int, bool]:
    """As the kernels take it: the value, where it is live, its row's stride, whether there is any."""
    return (x, x, 0, False) if more is None else (more.value, more.live, more.value.stride(0), True)


def rms_norm(x: Tensor, weight: Tensor, eps: float, centred: bool = False) -> Tensor:
    """x [..., n] normalised row by row, as a new tensor; n ≤ WIDEST, the last dimension contiguous.

    weight [n], or [rows, n] of each row its own.

    Reference: weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + eps)).to(x.dtype)
    """
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _normalise(rows, rows, weight, out, out, eps, centred, False, None)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, centred: bool = False, more: More | None = None
) -> tuple[Tensor, Tensor]:
    """x, residual [..., n] → (total's norm, total = residual + x (+ more)), as new tensors.

    Reference: (rms_norm(residual + x, weight, eps, centred), residual + x)
    """
    rows, others = x.reshape(-1, x.shape[-1]), residual.reshape(-1, x.shape[-1])
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _normalise(rows, others, weight, out, total, eps, centred, True, more)
    return out, total


def _normalise(
    rows: Tensor, others: Tensor, weight: Tensor, out: Tensor, total: Tensor, eps: float, centred: bool, added: bool,
    more: More | None,
) -> None:  # fmt: skip
    count, n = rows.shape
    if n > WIDEST:
        raise ValueError(f"rows of {n} elements are wider than the kernel's {WIDEST}")
    if not count:
        return
    block, (value, live, value_row, has) = triton.next_power_of_2(n), _more(rows, more)
    with on(rows):
        _rms_norm[count,](
            rows, others, weight, out, total, value, live, rows.stride(0), others.stride(0), value_row,
            weight_row(weight), eps, n, ADDED=added, MORE=has, CENTRED=centred, BLOCK=block,
            num_warps=max(1, min(16, block // 512)), **OPTIONS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["eps"])
def _rms_norm(
    x, residual, weight, out, total, more, lives, x_row, residual_row, more_row, weight_row, eps, n,
    ADDED: tl.constexpr, MORE: tl.constexpr, CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row] = norm(x[row] + residual[row]) · weight; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    live = i < n
    here = tl.load(x + row * x_row + i, mask=live, other=0.0)
    scale = tl.load(weight + row * weight_row + i, mask=live, other=0.0)
    if MORE:
        here = _with(here, more + row * more_row + i, live & (tl.load(lives + row) != 0))
    if ADDED:
        here = (tl.load(residual + row * residual_row + i, mask=live, other=0.0).to(tl.float32) + here).to(here.dtype)
        tl.store(total + row * n + i, here, mask=live)
    wide = here.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / n + eps)
    tl.store(out + row * n + i, _scaled(wide * factor, scale, CENTRED, out.dtype.element_ty), mask=live)


@triton.jit
def _with(x, more, live):
    """x and what is still to be added to it, rounded."""
    return (x.to(tl.float32) + tl.load(more, mask=live, other=0.0).to(tl.float32)).to(x.dtype)


@triton.jit
def _scaled(wide, scale, CENTRED: tl.constexpr, DTYPE: tl.constexpr):
    """Times a norm's weight, rounded as Llama's (before it) or Gemma's (after it)."""
    if CENTRED:
        return (wide * (1.0 + scale.to(tl.float32))).to(DTYPE)
    return (wide.to(DTYPE).to(tl.float32) * scale.to(tl.float32)).to(DTYPE)


def gated(both: Tensor, act: str, more: More | None = None) -> Tensor:
    """both [T, 2n] → [T, n]: the activation of the left half times the right one; act: silu, gelu, gelu_pytorch_tanh.

    Reference: act(both[:, :n]) * both[:, n:]
    """
    if act not in ACTS:
        raise ValueError(f"no kernel for the activation {act!r}: there are {', '.join(ACTS)}")
    tokens, n = both.shape[0], both.shape[1] // 2
    out, (value, live, value_row, has) = both.new_empty(tokens, n), _more(both, more)
    if tokens:
        with on(both):
            _gated[tokens, triton.cdiv(n, GATE)](
                out, both, value, live, both.stride(0), value_row, n, ACT=act, MORE=has, BLOCK=GATE,
                num_warps=GATE_WARPS, **OPTIONS,
            )  # fmt: skip
    return out


@triton.jit
def _gated(out, both, more, lives, both_row, more_row, n, ACT: tl.constexpr, MORE: tl.constexpr, BLOCK: tl.constexpr):
    """out[row, block] = ACT(both[row, block]) · both[row, n + block]."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    gate = tl.load(both + row * both_row + i, mask=live, other=0.0)
    up = tl.load(both + row * both_row + n + i, mask=live, other=0.0)
    if MORE:
        added = live & (tl.load(lives + row) != 0)
        gate = _with(gate, more + row * more_row + i, added)
        up = _with(up, more + row * more_row + n + i, added)
    x = gate.to(tl.float32)
    if ACT == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        x = x * (1.0 - 1.0 / (tl.exp(1.5957691216057308 * (x + 0.044715 * x * x * x)) + 1.0))
    tl.store(out + row * n + i, (x.to(gate.dtype).to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=live)


def rope_write(
    mixed: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, places: Tensor, heads: int, kv_heads: int,
    q_norm: Norm | None = None, k_norm: Norm | None = None, more: More | None = None,
) -> Tensor:  # fmt: skip
    """mixed [T, (heads + 2 kv_heads) dim], a group's q | k | v → q [T, heads, dim], normed and turned.

    k, normed and turned, and v go to `keys` and `values` [places, kv_heads, dim] at `places` [T] int64; a token whose
    place is below 0 is written nowhere. cos, sin [T, dim], in the dtype in which transformers hands them to a layer.

    Reference: x * cos + torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), -1) * sin  for x = norm(q), norm(k)
    """
    tokens, dim = len(mixed), keys.shape[2]
    q = torch.empty(tokens, heads, dim, dtype=mixed.dtype, device=mixed.device)
    norms = {"Q_NORM": q_norm is not None, "K_NORM": k_norm is not None}
    norms |= {"Q_CENTRED": q_norm is not None and q_norm.centred, "K_CENTRED": k_norm is not None and k_norm.centred}
    value, live, value_row, norms["MORE"] = _more(mixed, more)
    if tokens:
        with on(mixed):
            _rope_write[tokens, triton.cdiv(heads + 2 * kv_heads, HEADS)](
                q, mixed, cos, sin, keys, values, places, q if q_norm is None else q_norm.weight,
                q if k_norm is None else k_norm.weight, 0.0 if q_norm is None else q_norm.eps,
                0.0 if k_norm is None else k_norm.eps, value, live, value_row, mixed.stride(0), cos.stride(0),
                sin.stride(0),
                keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), heads, kv_heads,
                **norms, HALF=dim // 2, HALVES=triton.next_power_of_2(dim // 2), HEADS=HEADS, num_warps=HEADS_WARPS,
                **OPTIONS,
            )  # fmt: skip
    return q


@triton.jit(do_not_specialize=["q_eps", "k_eps"])
def _rope_write(
    q, mixed, cos, sin, keys, values, places, q_weight, k_weight, q_eps, k_eps, more, lives, more_row, mixed_row,
    cos_row, sin_row,
    k_place, k_head, v_place, v_head, heads, kv_heads,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, Q_CENTRED: tl.constexpr, K_CENTRED: tl.constexpr, MORE: tl.constexpr,
    HALF: tl.constexpr, HALVES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Some heads of one token, both halves of each side by side: q's to `q`, k's and v's to their place."""
    token = tl.program_id(0).to(tl.int64)
    head, i = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HALVES)
    is_q, is_k = head < heads, (head >= heads) & (head < heads + kv_heads)
    is_v = (head >= heads + kv_heads) & (head < heads + 2 * kv_heads)
    inside = (i < HALF)[None, :]
    live = (head < heads + 2 * kv_heads)[:, None] & inside
    source = mixed + token * mixed_row + head[:, None] * (2 * HALF) + i[None, :]
    left, right = tl.load(source, mask=live, other=0.0), tl.load(source + HALF, mask=live, other=0.0)
    if MORE:
        added = live & (tl.load(lives + token) != 0)
        beside = more + token * more_row + head[:, None] * (2 * HALF) + i[None, :]
        left, right = _with(left, beside, added), _with(right, beside + HALF, added)
    place = tl.load(places + token)
    to = values + place * v_place + (head - heads - kv_heads)[:, None] * v_head + i[None, :]
    stored = is_v[:, None] & inside & (place >= 0)
    tl.store(to, left, mask=stored)
    tl.store(to + HALF, right, mask=stored)
    left, right = _normed(left, right, q_weight, q_eps, is_q, Q_NORM, Q_CENTRED, i, HALF)
    left, right = _normed(left, right, k_weight, k_eps, is_k, K_NORM, K_CENTRED, i, HALF)
    left, right = _turned(left, right, cos + token * cos_row, sin + token * sin_row, i, HALF)
    to = q + (token * heads + head[:, None]) * (2 * HALF) + i[None, :]
    tl.store(to, left, mask=is_q[:, None] & inside)
    tl.store(to + HALF, right, mask=is_q[:, None] & inside)
    to = keys + place * k_place + (head - heads)[:, None] * k_head + i[None, :]
    stored = is_k[:, None] & inside & (place >= 0)
    tl.store(to, left, mask=stored)
    tl.store(to + HALF, right, mask=stored)


@triton.jit
def _normed(left, right, weight, eps, mine, NORM: tl.constexpr, CENTRED: tl.constexpr, i, HALF: tl.constexpr):
    """Both halves of the heads that are `mine`, normalised; the others as they are."""
    if not NORM:
        return left, right
    a, b = left.to(tl.float32), right.to(tl.float32)
    factor = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
    first = tl.load(weight + i, mask=i < HALF, other=0.0)[None, :]
    second = tl.load(weight + HALF + i, mask=i < HALF, other=0.0)[None, :]
    own = mine[:, None]
    left = tl.where(own, _scaled(a * factor, first, CENTRED, left.dtype), left)
    return left, tl.where(own, _scaled(b * factor, second, CENTRED, right.dtype), right)


@triton.jit
def _turned(left, right, cos, sin, i, HALF: tl.constexpr):
    """x · cos + rotate_half(x) · sin, each product and the sum rounded."""
    dtype = left.dtype
    c, s = tl.load(cos + i, mask=i < HALF, other=0.0), tl.load(sin + i, mask=i < HALF, other=0.0)
    c2, s2 = tl.load(cos + HALF + i, mask=i < HALF, other=0.0), tl.load(sin + HALF + i, mask=i < HALF, other=0.0)
    first = _product(left, c[None, :], dtype) - _product(right, s[None, :], dtype)
    second = _product(right, c2[None, :], dtype) + _product(left, s2[None, :], dtype)
    return first.to(dtype), second.to(dtype)


@triton.jit
def _product(a, b, DTYPE: tl.constexpr):
    """Rounded to DTYPE, in float32."""
    return (a.to(tl.float32) * b.to(tl.float32)).to(DTYPE).to(tl.float32)


def pick(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits [n, vocab] → (the first index of each row's maximum [n] int64, that maximum [n] float32).

    A row that holds a NaN has NaN for its maximum, and some index of the row.

    Reference: (logits.float().argmax(1), logits.float().max(1).values)
    """
    n, vocab = logits.shape
    splits = triton.cdiv(vocab, SPAN)
    ids, best = (torch.empty(n, dtype=d, device=logits.device) for d in (torch.int64, torch.float32))
    places, tops = (torch.empty(n, splits, dtype=d, device=logits.device) for d in (torch.int32, torch.float32))
    if n:
        with on(logits):
            _pick[n, splits](logits, places, tops, logits.stride(0), vocab, splits, SPAN=SPAN, num_warps=4, **OPTIONS)
            _picked[n,](ids, best, places, tops, splits, SPLITS=triton.next_power_of_2(splits), num_warps=1, **OPTIONS)
    return ids, best


@triton.jit
def _pick(logits, places, tops, row_stride, vocab, splits, SPAN: tl.constexpr):
    """A span's maximum and its first index; NaN where the span holds one."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = split * SPAN + tl.arange(0, SPAN)
    x = tl.load(logits + row * row_stride + i, mask=i < vocab, other=float("-inf")).to(tl.float32)
    top, place = _first_of_max(x, i)
    tl.store(tops + row * splits + split, top)
    tl.store(places + row * splits + split, place)


@triton.jit
def _picked(ids, best, places, tops, splits, SPLITS: tl.constexpr):
    """The first of the spans' maxima."""
    row, i = tl.program_id(0), tl.arange(0, SPLITS)
    x = tl.load(tops + row * splits + i, mask=i < splits, other=float("-inf"))
    place = tl.load(places + row * splits + i, mask=i < splits, other=2147483647)
    top, first = _first_of_max(x, place)
    tl.store(best + row, top)
    tl.store(ids + row, first.to(tl.int64))


@triton.jit
def _first_of_max(x, places):
    """(the maximum of x, or NaN where one is there; the least of `places` at it)."""
    broken = tl.max((x != x).to(tl.int32), 0) > 0
    top = tl.max(tl.where(x != x, float("-inf"), x), 0)
    place = tl.min(tl.where((x == top) | broken, places, 2147483647), 0)
    return tl.where(broken, float("nan"), top), place
