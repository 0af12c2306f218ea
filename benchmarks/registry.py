"""What thousands of registered adapters cost while nobody uses them: start-up, list, memory, a name looked up.

    python benchmarks/registry.py --adapters 10000        one JSON line at the end

Half are folders copied by hand, half published versions. Files are hard links to a few, so that the disk holds little.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from adapter_server.registry import guard, versions
from adapter_server.registry.publish import Publisher
from adapter_server.registry.store import Store

CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
PROBES = 200  # adapters that are asked for by name


def safetensors(seed: int) -> bytes:
    """Two factors of rank 8, by hand."""
    arrays = {f"lora_{side}": np.random.default_rng(seed).random((8, 64), dtype=np.float32) for side in "AB"}
    header, body = {}, b""
    for name, array in arrays.items():
        span = [len(body), len(body) + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": span}
        body += array.tobytes()
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + body


def fill(root: Path, count: int) -> None:
    """`a0 … an`: every second one published."""
    config, weights = json.dumps(CONFIG).encode(), safetensors(0)
    first = root / "a0"
    first.mkdir(parents=True)
    (first / guard.CONFIG).write_bytes(config)
    (first / guard.WEIGHTS).write_bytes(weights)
    Publisher(Store(root)).publish("a1", config, io.BytesIO(weights))
    id = versions.linked(root, "a1")
    shelf = versions.shelf(root, "a1") / id
    for i in range(2, count):
        folder = versions.shelf(root, f"a{i}") / id if i % 2 else root / f"a{i}"
        folder.mkdir(parents=True)
        for file in shelf.iterdir() if i % 2 else (shelf / guard.CONFIG, shelf / guard.WEIGHTS):
            os.link(file, folder / file.name)
        if i % 2:
            (root / f"a{i}").symlink_to(versions.target(f"a{i}", id))


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def measure(root: Path, count: int) -> dict[str, float]:
    before, stores = resident(), list[Store]()
    start = seconds(lambda: stores.append(Store(root, settle_s=0)))
    store = stores[0]
    sweep = seconds(Publisher(store).recover)
    known = resident()
    first_list = seconds(store.entries)
    names = [f"a{i}" for i in range(0, count, max(1, count // PROBES))]
    first = [seconds(lambda name=name: store.resolve(name)) for name in names]  # type: ignore[misc]
    again = [seconds(lambda name=name: store.resolve(name)) for name in names]  # type: ignore[misc]
    return {
        "start_s": round(start, 3),
        "sweep_s": round(sweep, 3),
        "first_list_s": round(first_list, 3),
        "list_s": round(seconds(store.entries), 3),
        "scan_s": round(seconds(store.refresh), 3),
        "first_resolve_us": round(statistics.median(first) * 1e6, 1),
        "resolve_us": round(statistics.median(again) * 1e6, 1),
        "bytes_per_adapter": round((known - before) / count),
        "bytes_per_listed_adapter": round((resident() - before) / count),
    }


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapters", type=int, default=10_000)
    count = parser.parse_args().adapters
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "adapters"
        fill(root, count)
        figures = measure(root, count)
    machine = {"cpus": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}
    print(json.dumps({"benchmark": "registry", "adapters": count, **figures, "machine": machine, "commit": commit()}))


if __name__ == "__main__":
    main()
