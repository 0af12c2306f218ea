"""Compiles every kernel for a CUDA architecture, on a machine without one, and prints their names.

python compiling.py ARCH DTYPE
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SOURCE = Path(__file__).parents[2] / "server" / "adapter_server" / "engine" / "kernels.py"
HELD = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIM = 128


def loaded() -> ModuleType:
    """The module alone: the engine around it takes seconds to import."""
    spec = importlib.util.spec_from_file_location("kernels", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels"] = module
    spec.loader.exec_module(module)
    return module


kernels = loaded()


def compiled(kernel: Any, pointers: Mapping[str, str], constants: Mapping[str, Any], arch: int) -> None:
    kinds = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    kinds |= dict.fromkeys(constants, "constexpr")
    made = triton.compile(ASTSource(kernel, kinds, constants), target=GPUTarget("cuda", arch, 32))
    assert made.asm["cubin"]
    print(kernel.__name__)


def main(arch: int, name: str) -> None:
    held, star = kernels.DTYPES[HELD[name]], f"*{name}"
    plan = {"tokens": "*i32", "weights": "*fp32", "places": "*i32", "table": "*i64", "blocks": "*i32"}
    low = {"HELD": held, "COMPUTE": held, "TOKENS": kernels.TOKENS, "RANKS": kernels.RANKS}
    compiled(kernels._shrink, {**plan, "x": star, "parts": "*fp32"}, {**low, "DEPTH": kernels.DEPTH}, arch)
    compiled(kernels._expand, {**plan, "y": star, "parts": "*fp32"}, {**low, "WIDE": kernels.WIDE}, arch)
    keys = torch.empty(1, 1, DIM, dtype=HELD[name])
    spans = {"CHUNK": kernels.CHUNK, "MOST": kernels.MOST_CHUNKS, "KEYS": kernels._turn(keys)}
    heads = {"HEADS": 32, "WIDTH": DIM, "WIDTHS": DIM}
    rows = {"table": "*i32", "lengths": "*i64", "tokens": "*i64", "parts": "*fp32", "sums": "*fp32"}
    rows |= {"scale": "fp32", "cap": "fp32"}
    options = {"CAPPED": True, "GROUP": 4, "GROUPS": 16, "PAGE": 16, "DIM": DIM, "DIMS": DIM}
    dtypes = {"HELD": held, "COMPUTE": held}
    stores = {"q": star, "keys": star, "values": star}
    compiled(kernels._attend, {**rows, **stores}, {**options, **dtypes, **heads, **spans}, arch)
    compiled(kernels._combine, {**rows, "out": star, "sinks": star}, {"SINKS": True, **heads, **spans}, arch)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
