"""Compiles every kernel for a CUDA architecture, on a machine without one, and prints their names.

python compiling.py ARCH DTYPE FORMS       `each`: in every form that is compiled here, `one`: in the first of them
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ENGINE = Path(__file__).parents[2] / "server" / "adapter_server" / "engine"
HELD = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIM = 128
FORMS = sys.argv[3]
done: set[str] = set()


def without_the_engine() -> None:
    """Its package without what it imports, which takes seconds: the kernels need none of it."""
    sys.path.insert(0, str(ENGINE.parents[1]))
    engine = ModuleType("adapter_server.engine")
    engine.__path__ = [str(ENGINE)]
    sys.modules["adapter_server.engine"] = engine


without_the_engine()
attention, block, draw, launch, linear, lowrank, parts = (
    importlib.import_module(f"adapter_server.engine.kernels.{name}")
    for name in ("attention", "block", "draw", "launch", "linear", "lowrank", "parts")
)


def compiled(kernel: Any, pointers: Mapping[str, str], constants: Mapping[str, Any], arch: int, warps: int = 4) -> None:
    if kernel.__name__ in done and FORMS == "one":
        return
    done.add(kernel.__name__)
    kinds = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    kinds |= dict.fromkeys(constants, "constexpr")
    made = triton.compile(
        ASTSource(kernel, kinds, constants), target=GPUTarget("cuda", arch, 32), options={"num_warps": warps}
    )
    assert made.asm["cubin"]
    print(kernel.__name__)


def low_rank(arch: int, name: str) -> None:
    held, star = launch.DTYPES[HELD[name]], f"*{name}"
    plan = {"tokens": "*i32", "weights": "*fp32", "places": "*i32", "table": "*i64", "blocks": "*i32"}
    plan |= {"x": star, "y": star, "parts": "*fp32"}
    few, wide = {"HELD": held, "RANKS": lowrank.RANKS}, {"ALIGNED": True, "ADDED": True, "WIDE": lowrank.WIDE}
    for tokens in (1, 2, lowrank.FEW):
        few["TOKENS"] = tokens
        compiled(lowrank._shrink_few, plan, {**few, "SPAN": 256}, arch, lowrank.SHRINK_WARPS)
        compiled(lowrank._expand_few, plan, {**few, **wide, "SPLITS": 16}, arch, lowrank.EXPAND_WARPS)
    many = {"HELD": held, "COMPUTE": held, "TOKENS": lowrank.MANY, "SPLITS": lowrank.MANY_SPLITS}
    many["PRECISION"] = "tf32x3" if name == "fp32" else "ieee"
    shrink = {"RANKS": lowrank.MANY_RANKS, "DEPTH": lowrank.DEPTH}
    compiled(lowrank._shrink_many, plan, {**many, **shrink}, arch, lowrank.MANY_WARPS)
    compiled(lowrank._expand_many, plan, {**many, **wide, "RANKS": lowrank.RANKS}, arch, lowrank.MANY_WARPS)


def attended(arch: int, name: str) -> None:
    held, star = launch.DTYPES[HELD[name]], f"*{name}"
    keys = torch.empty(1, 1, DIM, dtype=HELD[name])
    spans = {"CHUNK": attention.CHUNK, "MOST": attention.MOST_CHUNKS, "KEYS": attention._turn(keys)}
    heads = {"HEADS": 32, "WIDTH": DIM, "WIDTHS": DIM}
    rows = {"table": "*i32", "lengths": "*i64", "tokens": "*i64", "parts": "*fp32", "sums": "*fp32"}
    rows |= {"scale": "fp32", "cap": "fp32"}
    options = {"CAPPED": True, "GROUP": 4, "GROUPS": 16, "PAGE": 16, "DIM": DIM, "DIMS": DIM}
    dtypes = {"HELD": held, "COMPUTE": held}
    stores = {"q": star, "keys": star, "values": star}
    compiled(attention._attend, {**rows, **stores}, {**options, **dtypes, **heads, **spans}, arch)
    tiles = {"table": "*i32", "tiles": "*i32", "out": star, "sinks": star, "scale": "fp32", "cap": "fp32", **stores}
    precise = {"PRECISION": "tf32x3" if name == "fp32" else "ieee", "QUERIES": attention.QUERIES, "KEYS": spans["KEYS"]}
    shape = {
        "CAPPED": True,
        "SINKS": True,
        "GROUP": 4,
        "PAGE": 16,
        "DIM": DIM,
        "DIMS": DIM,
        "WIDTH": DIM,
        "WIDTHS": DIM,
    }
    compiled(attention._prefill, tiles, {**shape, **dtypes, **precise}, arch, attention.PREFILL_WARPS)
    compiled(
        attention._combine,
        {**rows, "out": star, "sinks": star},
        {"SINKS": True, "TOGETHER": attention.TOGETHER, **heads, **spans},
        arch,
    )


def blocks(arch: int, name: str) -> None:
    star = f"*{name}"
    norm = {**dict.fromkeys(("x", "residual", "weight", "out", "total"), star), "eps": "fp32"}
    more = {"more": star, "lives": "*i32"}
    norm |= more
    compiled(block._rms_norm, norm, {"ADDED": True, "MORE": True, "CENTRED": True, "BLOCK": block.WIDEST}, arch, 16)
    for act in block.ACTS:
        sizes = {"ACT": act, "MORE": True, "BLOCK": block.GATE}
        compiled(block._gated, {"out": star, "both": star, **more}, sizes, arch)
    names = ("q", "mixed", "cos", "sin", "keys", "values", "q_weight", "k_weight")
    rope = {**dict.fromkeys(names, star), **more, "places": "*i64", "q_eps": "fp32", "k_eps": "fp32"}
    for normed, dim in ((False, 80), (True, 128)):
        norms = dict.fromkeys(("Q_NORM", "K_NORM", "Q_CENTRED", "K_CENTRED", "MORE"), normed)
        half = {"HALF": dim // 2, "HALVES": 64, "HEADS": block.HEADS}
        compiled(block._rope_write, rope, {**norms, **half}, arch, block.HEADS_WARPS)
    best = {"places": "*i32", "tops": "*fp32", "ids": "*i64", "best": "*fp32", "logits": star}
    compiled(block._pick, best, {"SPAN": block.SPAN}, arch)
    compiled(block._picked, best, {"SPLITS": 64}, arch, 1)


def drawn(arch: int, name: str) -> None:
    shared = dict.fromkeys(("found", "last", "sums", "masses", "kept", "ties", "ids"), "*i64")
    shared |= {"logits": f"*{name}", "settings": "*fp64", "best": "*fp32"}
    passes = 8 * HELD[name].itemsize // draw.DIGIT
    sizes = {"PASSES": passes, "SPLITS": 32, "WAYS": draw.WAYS, "DIGIT": draw.DIGIT}
    spans = {**sizes, "SPAN": draw.SPAN}
    for search in (draw.TOP_K.value, draw.TOP_P.value, draw.TOKEN.value):
        compiled(draw._aim, shared, {**sizes, "SEARCH": search}, arch, draw.SPAN_WARPS)
        narrow = {**spans, "SEARCH": search, "FIRST": search == draw.TOP_K.value}
        compiled(draw._narrow, shared, narrow, arch, draw.SPAN_WARPS)
    for kernel in (draw._weigh, draw._count, draw._place):
        compiled(kernel, shared, spans, arch, draw.SPAN_WARPS)


def few_rows(arch: int, name: str) -> None:
    some = dict.fromkeys(("y", "x", "weight", "bias"), f"*{name}")
    for tiling in linear.TILINGS:
        tile = {"ROWS": linear.MOST_ROWS, "OUTS": tiling.outs, "DEPTH": tiling.depth}
        sizes = {"BIAS": True, "COMPUTE": launch.DTYPES[HELD[name]], **tile}
        compiled(linear._few_rows, some, sizes, arch, tiling.warps)


def beyond_low_rank(arch: int, name: str) -> None:
    held, star = {"HELD": launch.DTYPES[HELD[name]]}, f"*{name}"
    some = dict.fromkeys(("out", "base", "x", "y", "r"), star) | dict.fromkeys(("more", "h"), "*fp32")
    some |= dict.fromkeys(("owners", "blocks", "tokens", "places"), "*i32") | {"weights": "*fp32", "table": "*i64"}
    span = {**held, "SPAN": parts.SPAN}
    for kernel in (parts._own_rows, parts._inputs, parts._add_sparse):
        compiled(kernel, some, span, arch, parts.SPAN_WARPS)
    compiled(parts._mirrored, some, {**held, "ALIGNED": True, "EACH": parts.EACH, "WIDE": parts.WIDE}, arch, 1)
    tile = {"COMPUTE": launch.DTYPES[HELD[name]], "PRECISION": "tf32x3" if name == "fp32" else "ieee"}
    tile |= {"OUTS": parts.OUTS, "DEPTH": parts.DEPTH, **held}
    for tokens in (parts.LEAST, lowrank.MANY):
        for kernel in (parts._own_product, parts._hidden, parts._add_hidden):
            compiled(kernel, some, {**tile, "TOKENS": tokens}, arch, parts.PRODUCT_WARPS)


if __name__ == "__main__":
    for some in (low_rank, attended, blocks, drawn, few_rows, beyond_low_rank):
        some(int(sys.argv[1]), sys.argv[2])
