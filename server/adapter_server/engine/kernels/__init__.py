"""Triton kernels for CUDA, and the only door to triton; `forms.py` decides who comes through it.

    lowrank    the products of a step's adapters
    attention  of rows over their pages
    block      norms, gates, RoPE and the likeliest token
    draw       a token by chance
    linear     a product with few rows
    parts      what adapters do beyond low rank and vectors

Each kernel's reference is a line of torch, in its docstring, and `proofs.py` holds it to that.

What differs from step to step is never compiled in, grids follow from shapes alone, and nothing waits for the device:
a step may be captured as a graph. Sums run in an order that depends on a row's own sizes alone, without atomics: who
else is in the step changes no bit.
"""

from adapter_server.engine.kernels.attention import (
    CHUNK,
    MOST_CHUNKS,
    QUERIES,
    Chunks,
    paged_decode,
    paged_prefill,
)
from adapter_server.engine.kernels.block import add_rms_norm, gated, pick, rms_norm, rope_write
from adapter_server.engine.kernels.draw import draw
from adapter_server.engine.kernels.linear import MOST_ROWS, TILINGS, Tiling, few_rows, takes
from adapter_server.engine.kernels.lowrank import (
    FEW,
    HEAD,
    MANY,
    MANY_RANKS,
    MEMBER,
    MOST_SPLITS,
    WIDE,
    Outputs,
    Run,
    Tiles,
    add_low_rank,
    low_rank,
)
from adapter_server.engine.kernels.parts import (
    ABOVE,
    EACH,
    IN_SCALE,
    MIRROR,
    NETWORK,
    OWN,
    SPARSE,
    SPECTRAL,
    TURN,
    Owners,
    add_hidden,
    add_sparse,
    hidden,
    inputs,
    mirrored,
    own_product,
    own_rows,
)
from adapter_server.engine.operands import Form, More, Norm, Rows

Layers = None  # captured steps do what that is for

__all__ = [
    "ABOVE", "CHUNK", "EACH", "FEW", "HEAD", "IN_SCALE", "MANY", "MANY_RANKS", "MEMBER", "MIRROR", "MOST_CHUNKS",
    "MOST_ROWS", "MOST_SPLITS", "NETWORK", "OWN", "QUERIES", "SPARSE", "SPECTRAL", "TILINGS", "TURN", "WIDE",
    "Chunks", "Form", "Layers", "More", "Norm", "Outputs", "Owners", "Rows", "Run", "Tiles", "Tiling",
    "add_hidden", "add_low_rank", "add_rms_norm", "add_sparse", "draw", "few_rows", "gated", "hidden", "inputs",
    "low_rank", "mirrored", "own_product", "own_rows", "paged_decode", "paged_prefill", "pick", "rms_norm",
    "rope_write", "takes",
]  # fmt: skip
