"""Adapter files made by hand, sound and hostile: safetensors without the library, which would refuse."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
SHAPES = {f"{PREFIX}.lora_A.weight": (2, 8), f"{PREFIX}.lora_B.weight": (8, 2)}


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()}


def frame(header: object, body: bytes = b"") -> bytes:
    """A safetensors file of any header whatever: an object, or its bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + body


def entry(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def safetensors(arrays: dict[str, np.ndarray], dtype: str = "F32") -> bytes:
    header, body = {}, b""
    for name, array in arrays.items():
        raw = array.tobytes()
        header[name] = entry(dtype, array.shape, len(body), len(body) + len(raw))
        body += raw
    return frame(header, body)


def write(folder: Path, seed: int = 0, config: dict[str, Any] | None = None, weights: bytes | None = None) -> Path:
    """A whole adapter, in place."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config or CONFIG))
    (folder / "adapter_model.safetensors").write_bytes(safetensors(tensors(seed)) if weights is None else weights)
    return folder


def age(folder: Path, seconds: float = 3600.0) -> Path:
    """Dates the files back, as `cp -p` of an old adapter does."""
    then = time.time() - seconds
    for file in folder.iterdir():
        os.utime(file, (then, then))
    return folder
