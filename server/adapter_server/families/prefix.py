"""Prefix tuning and cartridges: keys and values before the prompt, written raw (PEFT `peft_model.py`, `get_prompt`).

The file's `prompt_embeddings` is already projected, whatever `prefix_projection` says:

    [n, 2L·kv·d] → [n, 2L, kv, d];  layer l:  K = [:, 2l]   V = [:, 2l+1]   each [n, kv, d]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adapter_server.core import Spec
from adapter_server.families.base import Adapter, Base, Family, Shapes
from adapter_server.families.options import Config, integer
from adapter_server.families.parts import Expected, Taker
from adapter_server.families.prompt import VIRTUAL, check_virtual


@dataclass(frozen=True, slots=True)
class Prefix:
    name: str
    known: frozenset[str]
    slow: bool = False
    before_the_prompt: ClassVar[bool] = True

    def expected(self, config: Config, shapes: Shapes, names: frozenset[str]) -> Expected:
        check_virtual(config, self.known)
        width = 2 * shapes.layers * shapes.kv_heads * shapes.head_dim
        return {"prompt_embeddings": (integer(config, "num_virtual_tokens", None), width)}

    def load(self, spec: Spec, tensors: Mapping[str, Tensor], base: Base) -> Adapter:
        check_virtual(spec.config, self.known)
        take, shapes = Taker(tensors), base.shapes
        pairs = take("prompt_embeddings").view(-1, 2 * shapes.layers, shapes.kv_heads, shapes.head_dim)
        take.done()
        keys, values = pairs[:, 0::2].unbind(1), pairs[:, 1::2].unbind(1)
        return Adapter(spec, prefix=tuple((k.clone(), v.clone()) for k, v in zip(keys, values, strict=True)))


FAMILIES: tuple[Family, ...] = (
    Prefix("PREFIX_TUNING", VIRTUAL | {"encoder_hidden_size", "init_weights", "prefix_projection"}),
    Prefix("CARTRIDGE", VIRTUAL | {"num_frozen_tokens"}),
)
