"""Work beside steps, on threads of its own: it gives way while rows run.

Where steps compute on every processor, what another thread takes of one makes the step of that moment later. So who
folds, or checks what is published, has parts of work, a tensor read, a Linear folded, a group laid out, and while rows
run sleeps between them, in proportion to what they took of its own thread: there is less of it in any one step.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import torch

SLICE_S = 0.001  # of a processor's time
LONGEST_S = 1.0  # that one sleeps, however much was done in one piece
Pause = Callable[[], None]  # called between parts of such work


def at_once() -> None:
    """No pause."""


class Pauses(threading.local):
    """Called between parts of such work, by the thread that does it. Who has not said which share of the time it takes
    while rows run, as the engine's own thread, or takes all of it, as a load does, never sleeps.
    """

    share = 1.0

    def __init__(self, running: Callable[[], bool]) -> None:
        """`running`: whether rows run."""
        self._running, self._since = running, time.thread_time()

    def __call__(self) -> None:
        spent = time.thread_time() - self._since
        if self.share == 1 or spent < SLICE_S:
            return
        if self._running():
            time.sleep(min(LONGEST_S, spent * (1 / self.share - 1)))
        self._since = time.thread_time()


def crowded(device: torch.device) -> bool:
    """Whether steps leave no processor to others."""
    return device.type == "cpu" and _processors() <= torch.get_num_threads()


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
