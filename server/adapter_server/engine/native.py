"""The low-rank products of a group's segments in one call of C, where a C compiler is at hand; None elsewhere.

`lowrank.c` is built once per machine into the user's cache and linked to the OpenMP that torch itself runs on, so that
both share one set of threads. Its reference, and what runs without it, is `lowrank.Banked`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapter_server.engine.lowrank import Adder, PackedRow, by_adapter
from adapter_server.engine.routing import Routing, Segment

if TYPE_CHECKING:
    from adapter_server.engine.placed import Placed
    from adapter_server.engine.site import LinearGroup

SOURCE = Path(__file__).with_name("lowrank.c")
SERIAL = 250_000  # multiplications; below, waking a second thread costs more than it saves
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-c")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None: no compiler, no OpenMP of torch's to share, or not Linux."""
    openmp = next(Path(torch.__file__).parent.glob("lib/libgomp*.so*"), None)
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if platform.system() != "Linux" or openmp is None or compiler is None:
        return None
    try:
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None


def _built(compiler: str) -> Path:
    """The shared object for this source, compiler and processor; made aside and renamed, so that it is whole."""
    key = hashlib.sha256(SOURCE.read_bytes() + repr((FLAGS, compiler, _processor())).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adapter-server"
    target = folder / f"lowrank-{key}.so"
    if not target.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside)
            _run(compiler, *FLAGS, str(SOURCE), "-o", str(made / "lowrank.o"))
            _run(compiler, "-shared", str(made / "lowrank.o"), "-o", str(made / "lowrank.so"))
            (made / "lowrank.so").rename(target)
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
    """The segments of a routing at one group: one call a step."""

    narrow = False
    vectors: frozenset[Placed] = frozenset()

    def beside(self, routing: Routing) -> None:
        """Its products have the same cores."""

    def __init__(self, kernel: ctypes.CDLL, group: LinearGroup, segments: Sequence[Segment]) -> None:
        patches = [segment.placed.groups[group.index] for segment in segments]
        ranks = [patch.addresses[1] for patch in patches]
        ends = list(itertools.accumulate(s.count * rank for s, rank in zip(segments, ranks, strict=True)))
        table: list[int] = []
        for segment, patch in zip(segments, patches, strict=True):
            start = segment.tokens.start if isinstance(segment.tokens, slice) else 0
            table += (start, segment.count, 0 if segment.weights is None else segment.weights.data_ptr())
            table += patch.addresses
        self._alive = segments  # the table points into their tensors
        self._scratch = torch.empty(ends[-1])
        self._table, self._outs = _array(table), _array(group.outs)
        self._offsets = _array([0, *ends[:-1]])
        self._call = kernel.lowrank_add
        work = sum(s.count * patch.numbers for s, patch in zip(segments, patches, strict=True))
        self._threads = 1 if work < SERIAL else torch.get_num_threads()
        self._width, self._inp, self._counts = sum(group.outs), group.inp, (len(segments), len(group.outs), max(ranks))

    def add(self, y: Tensor, x: Tensor) -> None:
        """y [T, outs] += w · B (A x), both contiguous float32."""
        n, members, most = self._counts
        self._call(
            ctypes.c_void_p(y.data_ptr()),
            ctypes.c_int64(self._width),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_int64(self._inp),
            self._table,
            ctypes.c_int64(n),
            self._outs,
            ctypes.c_int64(members),
            ctypes.c_int64(most),
            ctypes.c_void_p(self._scratch.data_ptr()),
            self._offsets,
            ctypes.c_int(self._threads),
        )


def _array(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)
