"""Serve many PEFT adapters over one resident base model, mixed in one continuous batch."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("adapter-server")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+source"
