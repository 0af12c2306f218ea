"""What stands beside every figure: the machine, the versions, the commit; and the physical floor of a step."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from adapter_server import __version__
from adapter_server.bench.workloads import LINEARS, Shape

LIBRARIES = ("torch", "transformers", "peft")
READ_BYTES = 256 << 20  # well beyond any cache
SQUARE = 2048


def facts() -> dict[str, Any]:
    """Machine, versions, commit and date. Names no host and no path."""
    return {
        "machine": machine(),
        "versions": {"python": platform.python_version(), "adapter-server": __version__}
        | {library: version(library) for library in LIBRARIES},
        **commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine() -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def commit() -> dict[str, Any]:
    """The commit of the source tree, and whether files differ from it; nothing for an installed wheel."""
    head = _git("rev-parse", "--short=12", "HEAD")
    return {"commit": head, "dirty": None if head is None else bool(_git("status", "--porcelain", "-uno"))}


def _git(*words: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@dataclass(frozen=True, slots=True)
class Floor:
    """What one decode step must read and compute at the least."""

    weight_bytes: int
    kv_bytes: int
    adapter_bytes: int
    flops: int

    def ms(self, bandwidth: float, rate: float) -> float:
        """bandwidth in bytes/s, rate in FLOP/s: the slower of reading and computing."""
        read = self.weight_bytes + self.kv_bytes + self.adapter_bytes
        return 1e3 * max(read / bandwidth, self.flops / rate)


def floor(
    shape: Shape,
    rows: int,
    context: int,
    adapters: int = 0,
    rank: int = 0,
    itemsize: int = 4,
    targets: Sequence[str] = LINEARS,
    held: int | None = None,
) -> Floor:
    """Rows with `context` keys each, on so many LoRA adapters in all, or on the base alone. `itemsize`: bytes of a
    base's number; `held`: of an adapter's, where it has others.

    The embedding is looked up, so only the head counts of the two.
    """
    weights = sum(inp * out for inp, out in linears(shape)) + shape.vocab * shape.hidden
    low_rank = rank * sum(inp + out for inp, out in linears(shape, targets))
    kv = shape.layers * 2 * shape.kv_heads * shape.head_dim
    attention = 4 * context * shape.layers * shape.heads * shape.head_dim
    return Floor(
        weight_bytes=weights * itemsize,
        kv_bytes=rows * context * kv * itemsize,
        adapter_bytes=adapters * low_rank * (held or itemsize),
        flops=rows * (2 * weights + attention + (2 * low_rank if adapters else 0)),
    )


def prefill_floor(shape: Shape, rows: int, prompt: int, adapters: int = 0, rank: int = 0, itemsize: int = 4) -> Floor:
    """Rows that read prompts of so many tokens: each weight once, each key and value written, and the head for the last
    token of each alone.
    """
    one, tokens = floor(shape, 1, 0, adapters, rank, itemsize), rows * prompt
    head = 2 * shape.vocab * shape.hidden
    attention = rows * 2 * prompt**2 * shape.layers * shape.heads * shape.head_dim  # half of the square: causal
    return Floor(
        weight_bytes=one.weight_bytes,
        kv_bytes=tokens * shape.layers * 2 * shape.kv_heads * shape.head_dim * itemsize,
        adapter_bytes=one.adapter_bytes,
        flops=tokens * (one.flops - head) + rows * head + attention,
    )


def linears(shape: Shape, targets: Sequence[str] = LINEARS) -> list[tuple[int, int]]:
    """(in, out) of these products of every layer."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    h, mlp = shape.hidden, shape.mlp
    sizes = ((h, q), (h, kv), (h, kv), (q, h), (h, mlp), (h, mlp), (mlp, h))
    return [size for name, size in zip(LINEARS, sizes, strict=True) if name in targets] * shape.layers


def measured_rates(quick: bool = False, device: str = "cpu") -> dict[str, float]:
    """A device's read bandwidth in bytes/s and FLOP/s in the base's number format, the best of a few."""
    shrink, scale = (8, 1) if quick else (1, 1 if device == "cpu" else 4)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    weights = torch.ones(scale * READ_BYTES // 4 // 4096 // shrink, 4096, dtype=dtype, device=device)
    side = scale * SQUARE // shrink
    vector, square = torch.ones(4096, dtype=dtype, device=device), torch.ones(side, side, dtype=dtype, device=device)
    return {
        "bytes_per_s": weights.nbytes / _best(lambda: weights @ vector, device),
        "flops_per_s": 2 * side**3 / _best(lambda: square @ square, device),
    }


def faster(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What the machine could do at its better moment: it may have had other work at one of them."""
    return {name: max(rate, after[name]) for name, rate in before.items()}


def _best(work: Callable[[], object], device: str, times: int = 7) -> float:
    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    seconds = []
    for _ in range(times):
        wait()
        start = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def timed_floor(found: Floor, rates: Mapping[str, float], **about: Any) -> dict[str, Any]:
    """In bytes, FLOPs, and the milliseconds that they take at the measured rates."""
    return {**about, **asdict(found), "ms": found.ms(rates["bytes_per_s"], rates["flops_per_s"])}


def rounded(value: Any) -> Any:
    """Floats to five significant digits, all the way down; what has no figure is null, since JSON knows no NaN."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def publish(result: Mapping[str, Any], path: Path | None) -> None:
    """The result as the last line of stdout, and in a file when one is named."""
    if path is not None:
        write(result, path)
    print(json.dumps(rounded(result)), flush=True)


def write(result: Mapping[str, Any], path: Path) -> None:
    """The result in a file, which is the old or the new one at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(rounded(result), indent=1) + "\n")
    aside.replace(path)


def name(result: Mapping[str, Any]) -> str:
    """Date, benchmark, size, and the format of adapters that are not in the base's, as results are filed."""
    work = result["workload"]
    return "-".join([result["date"][:10], result["benchmark"], work["size"], *filter(None, [work.get("filed")])])
