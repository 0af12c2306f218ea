"""Which form of the hot products a device gets, and the proof at start that it computes what its reference does.

    CUDA, with triton    `kernels/`, once it has agreed with torch on this device, in these dtypes and shapes
    CPU in float32       `cpu.py` and `native.py`, where a C compiler is at hand
    anywhere             plain torch

A kernel that does not compile here, or that differs, is left out with a warning in the log: slower, never wrong.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from adapter_server.engine import cpu, native
from adapter_server.engine.added import Native
from adapter_server.engine.grouped import Grouped
from adapter_server.engine.kv import LayerShape
from adapter_server.engine.lowrank import Banked, LowRank
from adapter_server.engine.proof_of_parts import parts_error
from adapter_server.engine.proofs import TOLERANCE, attention_error, draw_error, low_rank_error, prefill_error
from adapter_server.engine.sampling import Kernel

if TYPE_CHECKING:
    from adapter_server.engine.kernels import Form

log = logging.getLogger(__name__)


@functools.cache
def kernels() -> ModuleType | None:
    """The module of Triton kernels; None where triton is not installed, or does not work."""
    try:
        return importlib.import_module("adapter_server.engine.kernels")
    except ImportError:
        return None
    except Exception as failure:
        log.warning("Triton is installed and does not work, plain torch runs instead: %r", failure)
        return None


def usable(device: torch.device) -> bool:
    """Whether kernels are for this device at all."""
    return device.type == "cuda"


def low_rank(device: torch.device, base: torch.dtype, held: torch.dtype, wanted: bool = True) -> LowRank:
    """The fastest form of the low-rank products here. `held`: the dtype of adapters; x and y are in either's."""
    found = kernels() if wanted and usable(device) else None
    if found is not None and all(_low_rank_agrees(found, device, given, held) for given in {base, held}):
        return Grouped(found, device, _parts_agree(found, device, base, held))
    library = native.library() if wanted and device.type == "cpu" and held == torch.float32 else None
    return Banked() if library is None else Native(library)


def _low_rank_agrees(found: ModuleType, device: torch.device, given: torch.dtype, held: torch.dtype) -> bool:
    """In every form that serving runs: added in place or apart, in tiles of any size."""
    error, least = functools.partial(low_rank_error, found, device, given, held), max(TOLERANCE[given], TOLERANCE[held])
    ways = [(few, apart) for few in (1, 2, found.FEW) for apart in (False, True)]
    return all(_agrees("low-rank products", functools.partial(error, *way), least) for way in ways)


def _parts_agree(found: ModuleType, device: torch.device, base: torch.dtype, held: torch.dtype) -> bool:
    """Where they do not, adapters that do more than low rank and vectors run without captured steps."""
    error, least = functools.partial(parts_error, found, device, base, held), max(TOLERANCE[base], TOLERANCE[held])
    return _agrees("what adapters do beyond low rank", error, 2 * least)


def between(device: torch.device, dtype: torch.dtype, wanted: bool = True) -> ModuleType | None:
    """The kernels of what stands between a block's products; None: the base's own modules run."""
    if not wanted:
        return None
    if usable(device):
        return kernels()
    native_runs = device.type == "cpu" and dtype == torch.float32 and native.library() is not None
    return cpu if native_runs else None


def attending(
    device: torch.device,
    dtype: torch.dtype,
    layers: Iterable[LayerShape],
    heads: int,
    page: int,
    wanted: bool = True,
    slots: bool = False,
) -> ModuleType | None:
    """The kernels, where they compute attention over these layers' heads; None: plain torch does.

    Triton's read pages, of single tokens and of prompts; C's read `slots`, of single tokens alone.
    """
    found = between(device, dtype, wanted)
    if found is None or slots == usable(device):
        return None
    errors = (attention_error,) if slots else (attention_error, prefill_error)
    for shape in sorted(set(layers)):
        if heads % shape[0]:
            return None
        for form in _forms(found, heads, device):
            for error_of in errors:
                error = functools.partial(error_of, found, form, shape, heads, device, dtype, page=page)
                if not _agrees(f"attention over heads of {shape[1]}", error, TOLERANCE[dtype]):
                    return None
    return found


def drawing(device: torch.device, dtype: torch.dtype, wanted: bool = True) -> Kernel | None:
    """What draws tokens of the base's logits and of those that were changed, in float32; None: plain torch does."""
    if not wanted or not usable(device) or (found := kernels()) is None:
        return None
    errors = [functools.partial(draw_error, found, device, given) for given in sorted({dtype, torch.float32}, key=str)]
    if not all(_agrees("drawing tokens", error, 0) for error in errors):
        return None
    draw: Kernel = found.draw
    return draw


def _forms(found: ModuleType, heads: int, device: torch.device) -> list[Form]:
    """Plain, and all at once."""
    sinks = torch.linspace(-1, 1, heads, device=device)
    return [found.Form(0.1), found.Form(0.1, cap=5.0, window=50, sinks=sinks)]


def _agrees(what: str, error: Callable[[], float], tolerance: float) -> bool:
    """Whether a kernel compiles, runs, and is as near to its reference as rounding allows."""
    try:
        far = error()
    except Exception as failure:
        log.warning("the kernel for %s does not run here, plain torch does instead: %r", what, failure)
        return False
    if not far <= tolerance:  # NaN too
        log.warning("the kernel for %s is off by %.3g here, plain torch runs instead", what, far)
        return False
    return True
