"""The hot products of the CPU in float32 in C, where a C compiler is at hand; None elsewhere.

    product.c    the base's, from weights in panels              without it: oneDNN's
    lowrank.c    what a group's segments add, `added.py`         `lowrank.Banked`
    deltas.c     what of it is no low rank                       `deltas.py`
    block.c      what stands between products, `cpu.py`          the base's own modules
    layers.c     all of it, layer upon layer, `layers.py`        the above, one by one

They are built once per machine into the user's cache and linked to the OpenMP that torch itself runs on, so that both
share one set of threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

NAMES = ("vectors.h", "added.h", "layers.h", "product.c", "lowrank.c", "deltas.c", "block.c", "layers.c")
SOURCES = [Path(__file__).with_name(name) for name in NAMES]
SERIAL = 250_000  # multiplications; below, waking a second thread costs more than it saves
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-c")
Table = ctypes.Array[ctypes.c_int64]
TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}
SIGNATURES = {
    "product": "ppnppnnpi",
    "panels_fill": "ppnni",
    "panels_size": "nn",
    "adapters_add": "pnpnp",
    "rms_norm": "pppnpnpnnnfii",
    "gated": "ppnnnii",
    "rope_write": "ppnpnpnpppnnnnpfipfipi",
    "paged_decode": "pnnpnnpppnppnnnnnnnffnppi",
    "layers_run": "pnni",
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


@dataclass(frozen=True, slots=True)
class Added:
    """What adapters add to a product: a table of `added.h`, how many threads it is worth, and has room for."""

    table: Table
    threads: int
    most: int


class Panels:
    """A weight [out, in] once more, in the panels of `product.c`."""

    def __init__(self, kernel: ctypes.CDLL, weight: Tensor) -> None:
        """`weight`: contiguous, float32, on the CPU."""
        self.out, self.inp = weight.shape
        self.memory = torch.empty(kernel.panels_size(self.out, self.inp))
        kernel.panels_fill(self.memory.data_ptr(), weight.data_ptr(), self.out, self.inp, torch.get_num_threads())
        self._call = kernel.product

    def __call__(self, x: Tensor, bias: Tensor | None, added: Added | None = None) -> Tensor:
        """x [T, in] → x · Wᵀ + b [T, out], with what adapters add. A row's numbers do not depend on the others."""
        x, y = x.contiguous(), torch.empty(len(x), self.out)
        threads = 1 if len(x) * self.out * self.inp < SERIAL else torch.get_num_threads()
        threads = threads if added is None else min(max(threads, added.threads), added.most)
        after = (0 if bias is None else bias.data_ptr(), self.inp, self.out, None if added is None else added.table)
        self._call(y.data_ptr(), x.data_ptr(), len(x), self.memory.data_ptr(), *after, threads)
        return y
