"""Which device a setting means."""

from __future__ import annotations

import torch


def device_of(wanted: str) -> torch.device:
    """auto: CUDA where there is one."""
    chosen = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(chosen if wanted == "auto" else wanted)
