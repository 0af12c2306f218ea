"""What the kernels of either device are given: Triton's (`kernels/`) and C's (`cpu.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

ACTS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "relu": 3, "tanh": 4}  # of networks behind blocks


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """An RMS norm's weight [n] and how it is applied: `centred` weights stand for 1 + weight (Gemma)."""

    weight: Tensor
    eps: float
    centred: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class More:
    """What is still to be added to a tensor [T, n]: `value` [T, n], at the tokens where `live` [T] int32 is not 0."""

    value: Tensor
    live: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows with one new token: where each one's keys are, and which packed token asks.

    table int32 [n, pages], lengths [n] with the new token, tokens [n]; `most` is the greatest length.
    """

    table: Tensor
    lengths: Tensor
    tokens: Tensor
    page: int
    most: int


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """How scores become weights: times `scale`, capped by cap · tanh(s / cap), the last `window` keys, sinks [heads]"""

    scale: float
    cap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None


def weight_row(weight: Tensor) -> int:
    """How far apart the weights of two rows stand: a norm's weight is one [n] for all, or [rows, n]."""
    return weight.stride(0) if weight.dim() > 1 else 0
