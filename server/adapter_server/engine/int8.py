"""A base's Linears in int8 on the CPU: weights by output, inputs by token, sums in whole numbers (oneDNN).

    W [out, in] ≈ scale[out] · q        x [T, in] ≈ step[T] · (u − 128)        y = step · scale · Σ (u − 128) q + b

A token's step is of its own numbers alone, and whole numbers add up exactly: a row's numbers do not depend on who else
is in the step. The head stays as it is.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

MOST = 127
FEWER = 63  # weights of 7 bits: two products of them and an unsigned input fit into 16 bits
MIDDLE = 128  # what stands for zero in an unsigned input


class Int8Linear(nn.Module):
    """A Linear with weights in int8. `weight` holds them as they are; the product runs on a packed copy."""

    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in], bias [out]: a Linear's own, in any floating dtype."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        wide = weight.detach().float()
        scale = wide.abs().amax(1).clamp_(min=torch.finfo(torch.float32).tiny) / largest_weight()
        whole = (wide / scale[:, None]).round_().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)
        self.register_buffer("scale", scale)
        self._zeros = torch.zeros(self.out_features, dtype=torch.int32)
        self._packed = torch.ops.onednn.qlinear_prepack(whole, None)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → y [..., out], in x's dtype."""
        rows = x.reshape(-1, self.in_features).float()
        step = rows.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny) / MOST
        u = (rows / step).add_(MIDDLE + 0.5).to(torch.uint8)
        y = _product(u, self._packed, self.scale, self._zeros).mul_(step)
        y = y if self.bias is None else y.add_(self.bias)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


def hold_in_int8(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its Linears in int8, but for the head."""
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is nn.Linear and module is not head:
                setattr(parent, name, Int8Linear(module.weight, module.bias))
    return model


def _product(u: Tensor, packed: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    """u [T, in] unsigned, zeros [out] → scale · Σ (u − MIDDLE) q [T, out]."""
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        u, 1.0, MIDDLE, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y


@functools.cache
def largest_weight() -> int:
    """127; 63 on processors that cut sums of two products off at 16 bits (AVX2 without VNNI), which would be wrong."""
    packed = torch.ops.onednn.qlinear_prepack(torch.full((16, 64), MOST, dtype=torch.int8), None)
    u = torch.full((2, 64), 255, dtype=torch.uint8)
    y = _product(u, packed, torch.ones(16), torch.zeros(16, dtype=torch.int32))
    return MOST if bool((y == 64 * MOST * (255 - MIDDLE)).all()) else FEWER
