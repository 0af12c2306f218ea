"""What all kernels are launched with."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"enable_fp_fusion": True}  # triton's default is about to change
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def compute_of(dtype: torch.dtype) -> tl.dtype:
    """What products are formed in. Triton's interpreter multiplies bfloat16 by its bits: there in float32, as exact."""
    return DTYPES[torch.float32 if dtype == torch.bfloat16 and triton.knobs.runtime.interpret else dtype]


def on(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whichever the tensors are on."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def power(n: int) -> int:
    """The power of two that a tensor core takes for it."""
    return max(16, 1 << (n - 1).bit_length())
