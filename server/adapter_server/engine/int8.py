"""A base's Linears in int8 on the CPU: weights by output, inputs by token, sums in whole numbers (oneDNN).

    W [out, in] ≈ scale[out] · q        x [T, in] ≈ step[T] · (u − 128)        y = step · scale · Σ (u − 128) q + b

A token's step is of its own numbers alone, and whole numbers add up exactly: a row's numbers do not depend on who else
is in the step. The head stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapter_server.errors import BaseNotSupported

MOST = 127
MIDDLE = 128  # what stands for zero in an unsigned input


class Int8Linear(nn.Module):
    """A Linear with weights in int8. `weight` holds them as they are; the product runs on a packed copy."""

    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in], bias [out]: a Linear's own, in any floating dtype."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        wide = weight.detach().float()
        scale = wide.abs().amax(1).clamp_(min=torch.finfo(torch.float32).tiny) / MOST
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
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            u, 1.0, MIDDLE, self._packed, self.scale, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        ).mul_(step)
        y = y if self.bias is None else y.add_(self.bias)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


def hold_in_int8(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its Linears in int8, but for the head. Raises BaseNotSupported."""
    check_processor()
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is nn.Linear and module is not head:
                setattr(parent, name, Int8Linear(module.weight, module.bias))
    return model


def check_processor() -> None:
    """Some processors cut sums of such products off at 16 bits. Raises BaseNotSupported."""
    linear, x = Int8Linear(torch.ones(16, 64), None), torch.ones(2, 64)
    if not torch.allclose(linear(x), torch.full((2, 16), 64.0)):
        raise BaseNotSupported("this processor has no exact products of 8 bits: leave out --quantize cpu-int8")
