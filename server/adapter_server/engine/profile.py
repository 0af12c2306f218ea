"""Where a step's time goes: its parts by name, and a trace of some steps for Perfetto or chrome://tracing.

A part's marker is one shared object that does nothing, unless a trace is being taken.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch

SKIP = 8  # steps with rows before the trace begins: the first of a process are no example
STEPS = 64  # of the trace
Part = Literal["plan", "route", "forward", "sampling", "events"]
log = logging.getLogger(__name__)

_OFF = nullcontext()


def part(name: Part) -> AbstractContextManager[object]:
    """Names what happens within, in a trace."""
    return torch.profiler.record_function(name) if Profile.running else _OFF


class Profile:
    """A trace of STEPS steps in one file. Its calls come from the engine's thread, which is the one it sees."""

    running = False  # any: torch's profiler is one a process

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.done = False
        self._seen = 0
        self._profiler: torch.profiler.profile | None = None

    def before(self) -> None:
        """A step is about to run rows."""
        if self._seen == SKIP:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
            Profile.running = True

    def after(self) -> None:
        """It has; after the last one the file is written."""
        self._seen += 1
        if self._profiler is not None and self._seen == SKIP + STEPS:
            self.close()

    def close(self) -> None:
        """Write what there is. A file that cannot be written is said, and ends nothing else."""
        Profile.running = False
        profiler, self._profiler = self._profiler, None
        self.done = True
        if profiler is None:
            return
        profiler.stop()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.path))
            log.info("a trace of %d steps is in %s", self._seen - SKIP, self.path)
        except (OSError, RuntimeError) as error:
            log.error("the trace could not be written to %s: %s", self.path, error)
