"""What stands between a block's products, in C for the CPU in float32: the names and meanings of `kernels/`.

    rms_norm      weight · x · rsqrt(mean(x²) + eps);  centred: (1 + weight) · …
    add_rms_norm  total = residual + x;  rms_norm(total), total
    gated         act(both[:, :n]) · both[:, n:]
    rope_write    x · cos + rotate_half(x) · sin for x = norm(q), norm(k);  keys[places] = k;  values[places] = v
    paged_decode  softmax(cap(q @ k[places].T · scale) and sinks) @ v[places] for each row with one new token

`fused.py` and `forms.py` accept what they take of them by proof; `native.py` builds them. They are called where
`native.library()` is there.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from adapter_server.engine import native
from adapter_server.engine.layers import Layers
from adapter_server.engine.operands import Form, More, Norm, Rows, weight_row

__all__ = ["Form", "Layers", "More", "Norm", "Rows", "add_rms_norm", "gated", "paged_decode", "rms_norm", "rope_write"]

ACTS = {"silu": 0, "gelu": 1, "gelu_pytorch_tanh": 2}
SERIAL = 1 << 18  # numbers; below, waking a second thread costs more than it saves


def rms_norm(x: Tensor, weight: Tensor, eps: float, centred: bool = False) -> Tensor:
    """x [..., n] normalised row by row, as a new tensor; weight [n], or [rows, n] of each its own."""
    rows = _rows(x)
    out = torch.empty(x.shape)
    _normalise(out, None, rows, None, weight, eps, centred)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, centred: bool = False, more: More | None = None
) -> tuple[Tensor, Tensor]:
    """x, residual [..., n] → (total's norm, total = residual + x (+ more)), as new tensors."""
    out, total = torch.empty(x.shape), torch.empty(x.shape)
    _normalise(out, total, _whole(_rows(x), more), _rows(residual), weight, eps, centred)
    return out, total


def _normalise(
    out: Tensor, total: Tensor | None, rows: Tensor, others: Tensor | None, weight: Tensor, eps: float, centred: bool
) -> None:
    count, n = rows.shape
    _kernel().rms_norm(
        out.data_ptr(), _address(total), rows.data_ptr(), rows.stride(0), _address(others),
        0 if others is None else others.stride(0), weight.data_ptr(), weight_row(weight), count, n, eps, centred,
        _threads(rows.numel()),
    )  # fmt: skip


def gated(both: Tensor, act: str, more: More | None = None) -> Tensor:
    """both [T, 2n] → [T, n]: the activation of the left half times the right one; act: one of ACTS."""
    if act not in ACTS:
        raise ValueError(f"no kernel for the activation {act!r}: there are {', '.join(ACTS)}")
    both, n = _whole(both, more), both.shape[1] // 2
    out = torch.empty(len(both), n)
    threads = _threads(both.numel())
    _kernel().gated(out.data_ptr(), both.data_ptr(), both.stride(0), len(both), n, ACTS[act], threads)
    return out


def rope_write(
    mixed: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, places: Tensor, heads: int, kv_heads: int,
    q_norm: Norm | None = None, k_norm: Norm | None = None, more: More | None = None,
) -> Tensor:  # fmt: skip
    """mixed [T, (heads + 2 kv_heads) dim], a group's q | k | v → q [T, heads, dim], normed and turned.

    k, normed and turned, and v go to `keys` and `values` [places, kv_heads, dim], contiguous, at `places` [T] int64; a
    token whose place is below 0 is written nowhere. cos, sin [T, dim]. Raises ValueError for those of another shape.
    """
    mixed, dim = _whole(mixed, more), keys.shape[2]
    if not cos.shape == sin.shape == (len(mixed), dim):
        raise ValueError(f"cos and sin of {len(mixed)} tokens and {dim} numbers are needed, not {tuple(cos.shape)}")
    q, room = torch.empty(len(mixed), heads, dim), torch.empty(len(mixed), dim)
    _kernel().rope_write(
        q.data_ptr(), mixed.data_ptr(), mixed.stride(0), cos.data_ptr(), cos.stride(0), sin.data_ptr(), sin.stride(0),
        keys.data_ptr(), values.data_ptr(), places.data_ptr(), len(mixed), heads, kv_heads, dim, *_norm(q_norm),
        *_norm(k_norm), room.data_ptr(), _threads(mixed.numel()),
    )  # fmt: skip
    return q


def paged_decode(out: Tensor, q: Tensor, keys: Tensor, values: Tensor, rows: Rows, form: Form) -> None:
    """out [T, heads, dim_v] at the rows' tokens, from q [heads, T, dim], keys and values [places, kv_heads, dim]."""
    n, heads, (_, kv_heads, dim), wide = len(rows.tokens), q.shape[0], keys.shape, values.shape[2]
    q = q if q.stride(2) == 1 else q.contiguous()
    scratch = torch.empty(n * heads * rows.most)
    sinks = None if form.sinks is None else form.sinks.float().contiguous()
    _kernel().paged_decode(
        out.data_ptr(), out.stride(0), out.stride(1), q.data_ptr(), q.stride(0), q.stride(1), keys.data_ptr(),
        values.data_ptr(), rows.table.data_ptr(), rows.table.stride(0), rows.lengths.data_ptr(),
        rows.tokens.data_ptr(), n, rows.most, rows.page, kv_heads, heads // kv_heads, dim, wide, form.scale,
        form.cap or 0.0, form.window or 0, _address(sinks), scratch.data_ptr(),
        _threads(n * rows.most * kv_heads * (dim + wide)),
    )  # fmt: skip


def _kernel() -> ctypes.CDLL:
    """Raises RuntimeError where there is no compiler: who calls has asked before."""
    if (found := native.library()) is None:
        raise RuntimeError("the kernels in C have not been built on this machine")
    return found


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _whole(x: Tensor, more: More | None) -> Tensor:
    """x with what is still to be added to it."""
    return x if more is None else torch.where(more.live[:, None] != 0, x + more.value, x)


def _norm(norm: Norm | None) -> tuple[int, float, bool]:
    return (0, 0.0, False) if norm is None else (norm.weight.data_ptr(), norm.eps, norm.centred)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _threads(numbers: int) -> int:
    return 1 if numbers < SERIAL else torch.get_num_threads()
