"""Quantised Linears: how they are known, and how their weights are read. Adapters run beside them.

Of bitsandbytes the stored numbers are read. Any other kind that transformers loads (GPTQ, AWQ, torchao, quanto, FP8) is
asked what it makes of the unit vectors, which is its weight whatever the format.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

ASKED_AT_ONCE = 512  # unit vectors


def is_quantised(module: nn.Module) -> bool:
    """A module with a Linear's features whose weight is no plain matrix of numbers of two bytes or more."""
    if type(module).__module__.startswith("bitsandbytes."):
        return True
    if not _is_size(module, "in_features") or not _is_size(module, "out_features"):
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter):
        return True
    return not (weight.is_floating_point() and weight.itemsize > 1 and weight.dim() == 2)


def _is_size(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), int)


def dequantised(module: nn.Module) -> Tensor:
    """The weight that the module computes with, [out, in] float32."""
    weight: Any = getattr(module, "weight", None)
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return torch.as_tensor(dequantize_4bit(weight.data, weight.quant_state)).float()
    if getattr(weight, "SCB", None) is not None or hasattr(getattr(module, "state", None), "SCB"):
        return _int8(module, weight)
    return _asked(module)


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """What a tensor is stored in: itself, or the parts of a class of torch's quantisation libraries."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))


def _int8(module: nn.Module, weight: Any) -> Tensor:
    """CB · SCB / 127, as stored."""
    state: Any = module.state
    scale: Tensor = weight.SCB if weight.SCB is not None else state.SCB
    return torch.mul(weight.data.float(), scale.float()[:, None] / 127)


@torch.no_grad()
def _asked(module: nn.Module) -> Tensor:
    """y(e_i) − b for every unit vector, by the class's own forward: the instance's may be a site's."""
    inp, like = int(module.in_features), _compute(module)  # type: ignore[arg-type]
    bias = getattr(module, "bias", None)
    parts = []
    for start in range(0, inp, ASKED_AT_ONCE):
        units = torch.zeros(min(ASKED_AT_ONCE, inp - start), inp, dtype=like.dtype, device=like.device)
        units[torch.arange(len(units)), torch.arange(start, start + len(units))] = 1
        y: Tensor = type(module).forward(module, units).float()
        parts.append(y if bias is None else y - bias.float())
    return torch.cat(parts).T.contiguous()


def _compute(module: nn.Module) -> Tensor:
    """A tensor of the dtype and on the device that the module computes in: its weight's, its bias's, its scales'."""
    found = [t for t in (getattr(module, "weight", None), getattr(module, "bias", None)) if isinstance(t, Tensor)]
    found += module.buffers()
    wide = (t for t in found if t.is_floating_point() and t.itemsize > 1)
    return next(wide, torch.empty(0, device=found[0].device if found else None))
