"""The hot products of the CPU in float32 in C, where a C compiler is at hand; None elsewhere.

    product.c    the base's, from weights in panels         without it: oneDNN's
    lowrank.c    the low ranks of a group's segments        `lowrank.Banked`
                 sparse ones, an adapter's at one Linear    `deltas.Sparse`
    block.c      what stands between products, `cpu.py`     the base's own modules

They are built once per machine into the user's cache and linked to the OpenMP that torch itself runs on, so that both
share one set of threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapter_server.engine.lowrank import Adder, PackedRow, by_adapter
from adapter_server.engine.routing import Routing, Segment
from adapter_server.families.deltas import Delta, Sparse, Spectral

if TYPE_CHECKING:
    from adapter_server.engine.placed import Placed
    from adapter_server.engine.site import LinearGroup

log = logging.getLogger(__name__)

SOURCES = [Path(__file__).with_name(name) for name in ("vectors.h", "lowrank.h", "product.c", "lowrank.c", "block.c")]
BLOCK = 16  # tokens that one thread takes at a time
MOST_LANES = 16  # numbers in a vector of any processor
COUNT, RANKS = 1, 4  # in a segment's row of the table
SERIAL = 250_000  # multiplications; below, waking a second thread costs more than it saves
MOST_ROWS = 128  # of a product from panels; beyond, the library's is as fast
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-c")
TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}
SIGNATURES = {
    "product": "ppnppnnpi",
    "panels_fill": "ppnni",
    "panels_size": "nn",
    "lowrank_add": "pnpnp",
    "sparse_times": "pnpnnppppi",
    "rms_norm": "pppnpnpnnfii",
    "gated": "ppnnnii",
    "rope_write": "ppnpnpnpppnnnnpfipfipi",
    "paged_decode": "pnnpnnpppnppnnnnnnnffnppi",
}  # of the functions in SOURCES, by the letters of TYPES


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None: no compiler, no OpenMP of torch's to share, or not Linux."""
    openmp = next(Path(torch.__file__).parent.glob("lib/libgomp*.so*"), None)
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if platform.system() != "Linux" or openmp is None:
        return None
    if compiler is None:
        log.warning("no C compiler (cc) is on the path: plain torch runs on the CPU, slower; install gcc")
        return None
    try:
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
        return _declared(ctypes.CDLL(str(_built(compiler))))
    except (OSError, subprocess.SubprocessError) as failure:
        log.warning("the kernels in C could not be built, plain torch runs on the CPU, slower: %r", failure)
        return None


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its arguments, so that plain integers can be given for pointers."""
    for name, letters in SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = [TYPES[letter] for letter in letters], None
    found.panels_size.restype = ctypes.c_int64
    return found


def _built(compiler: str) -> Path:
    """The shared object for this source, compiler and processor; made aside and renamed, so that it is whole."""
    source = b"".join(path.read_bytes() for path in SOURCES)
    key = hashlib.sha256(source + repr((FLAGS, compiler, _processor())).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adapter-server"
    target = folder / f"native-{key}.so"
    if not target.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside)
            objects = [made / f"{path.stem}.o" for path in SOURCES if path.suffix == ".c"]
            for path in objects:
                _run(compiler, *FLAGS, str(SOURCES[0].with_name(f"{path.stem}.c")), "-o", str(path))
            _run(compiler, "-shared", *map(str, objects), "-lm", "-o", str(made / "native.so"))
            (made / "native.so").rename(target)
    if target.stat().st_uid != os.getuid():
        raise OSError(f"{target} belongs to somebody else")
    return target


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith("flags")), platform.processor())


class Native:
    """`LowRank` by the kernel, on the adapters' own tensors: nothing is padded, copied or kept."""

    def __init__(self, kernel: ctypes.CDLL) -> None:
        self.kernel = kernel

    def arrange(self, rows: Sequence[PackedRow]) -> list[int]:
        return by_adapter(rows)

    def plan(
        self, group: LinearGroup, routing: Routing, touching: Sequence[Segment]
    ) -> tuple[list[Adder], list[Segment]]:
        small = [s for s in touching if isinstance(s.tokens, slice)]
        large = [s for s in touching if not isinstance(s.tokens, slice)]
        return ([NativeSmall(self.kernel, group, small)] if small else []), large

    def forget(self, placed: Placed) -> None:
        """Nothing is kept."""


class NativeSmall:
    """The segments of a routing at one group: one call a step. Long ones go in as blocks, each for one thread."""

    vectors: frozenset[Placed] = frozenset()

    def __init__(self, kernel: ctypes.CDLL, group: LinearGroup, segments: Sequence[Segment]) -> None:
        self.narrow = group.base_dtype == group.dtype
        patches = [segment.placed.groups[group.index] for segment in segments]
        blocks = [b for s, patch in zip(segments, patches, strict=True) for b in _blocks(s, patch.addresses)]
        ends = list(itertools.accumulate(block[COUNT] * block[RANKS] for block in blocks))
        work = sum(s.count * patch.numbers for s, patch in zip(segments, patches, strict=True))
        self.threads = 1 if work < SERIAL else torch.get_num_threads()
        scratch, arrays = torch.empty(ends[-1]), [_array(v for b in blocks for v in b), _array(group.outs)]
        arrays.append(_array([0, *ends[:-1]]))
        table, outs, offsets = (ctypes.addressof(array) for array in arrays)
        self.table = _array([table, len(blocks), outs, len(group.outs), scratch.data_ptr(), offsets, self.threads])
        self._alive = segments, scratch, arrays  # the table points into their memory
        self._call, self._width, self._inp = kernel.lowrank_add, sum(group.outs), group.inp

    def beside(self, routing: Routing) -> NativeBeside:
        """In the base's own call, where that is ours."""
        return NativeBeside(self)

    def add(self, y: Tensor, x: Tensor) -> None:
        """y [T, outs] += w · B (A x), both contiguous float32."""
        self._call(y.data_ptr(), self._width, x.data_ptr(), self._inp, self.table)


@dataclass(frozen=True, slots=True, eq=False)
class NativeBeside:
    """The base's product and what adapters add to it, in one call."""

    small: NativeSmall

    def run(self, base: Callable[[Tensor], Tensor], x: Tensor, outs: int) -> tuple[Tensor, None]:
        """x [T, in] → (y [T, outs], nothing that is left for the reader to add)."""
        packed = getattr(base, "packed", None)
        if isinstance(packed, Panels) and len(x) <= MOST_ROWS:
            return packed(x, base.bias, self.small), None  # type: ignore[attr-defined]
        y = base(x)
        self.small.add(y, x)
        return y, None


def _blocks(segment: Segment, addresses: tuple[int, ...]) -> list[tuple[int, ...]]:
    """A segment's rows in the kernel's table."""
    start = segment.tokens.start if isinstance(segment.tokens, slice) else 0
    weights = 0 if segment.weights is None else segment.weights.data_ptr()
    return [
        (start + i, min(BLOCK, segment.count - i), weights and weights + 4 * i, *addresses)
        for i in range(0, segment.count, BLOCK)
    ]


def laid(delta: Delta) -> Delta:
    """The same change of a weight in the form that is fastest here."""
    if isinstance(delta, Spectral):
        return Spectral(laid(delta.S))
    if not isinstance(delta, Sparse) or delta.values.device.type != "cpu" or delta.values.dtype != torch.float32:
        return delta
    if (kernel := library()) is None:
        return delta
    return NativeSparse(delta.starts, delta.columns, delta.values, delta.inp, kernel)


@dataclass(frozen=True, slots=True, eq=False)
class NativeSparse(Sparse):
    """`Sparse` by the kernel."""

    kernel: ctypes.CDLL

    def apply(self, x: Tensor) -> Tensor:
        x, rows = x.float().contiguous(), len(self.starts) - 1
        y, scratch = torch.empty(len(x), rows), torch.empty(len(x) + MOST_LANES, self.inp)
        threads = 1 if len(x) * len(self.values) < SERIAL else torch.get_num_threads()
        self.kernel.sparse_times(
            *(y.data_ptr(), rows, x.data_ptr(), self.inp, len(x)),
            *(t.data_ptr() for t in (self.starts, self.columns, self.values, scratch)),
            threads,
        )
        return y


class Panels:
    """A weight [out, in] once more, in the panels of `product.c`."""

    def __init__(self, kernel: ctypes.CDLL, weight: Tensor) -> None:
        """`weight`: contiguous, float32, on the CPU."""
        self.out, self.inp = weight.shape
        self.memory = torch.empty(kernel.panels_size(self.out, self.inp))
        kernel.panels_fill(self.memory.data_ptr(), weight.data_ptr(), self.out, self.inp, torch.get_num_threads())
        self._call = kernel.product

    def __call__(self, x: Tensor, bias: Tensor | None, added: NativeSmall | None = None) -> Tensor:
        """x [T, in], T at most MOST_ROWS → x · Wᵀ + b [T, out], with what adapters add. A row's numbers do not depend
        on the others.
        """
        x, y = x.contiguous(), torch.empty(len(x), self.out)
        threads = 1 if len(x) * self.out * self.inp < SERIAL else torch.get_num_threads()
        table, threads = (None, threads) if added is None else (added.table, max(threads, added.threads))
        after = (0 if bias is None else bias.data_ptr(), self.inp, self.out, table, threads)
        self._call(y.data_ptr(), x.data_ptr(), len(x), self.memory.data_ptr(), *after)
        return y


def _array(values: Iterable[int]) -> ctypes.Array[ctypes.c_int64]:
    listed = list(values)
    return (ctypes.c_int64 * len(listed))(*listed)
