"""Quantised Linears of bitsandbytes: how their weights are read. They stay as they are; adapters run beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_quantised(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes.")


def dequantised(module: nn.Module) -> Tensor:
    """The weight that the module computes with, [out, in] float32: 4 bit exactly, int8 (CB · SCB / 127) as stored."""
    weight: Any = module.weight
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return torch.as_tensor(dequantize_4bit(weight.data, weight.quant_state)).float()
    state: Any = module.state
    scale: Tensor = weight.SCB if weight.SCB is not None else state.SCB
    return torch.mul(weight.data.float(), scale.float()[:, None] / 127)
