"""Serve many PEFT adapters over one resident base model, mixed in one continuous batch."""

import os
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("adapter-server")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+source"

# oneDNN keeps compiled products by their shapes, 0.3 MB each and 1024 of them twice: prompts of many lengths would fill
# 800 MB. Read when torch is loaded; what the environment says goes first.
for _name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "128")
