"""One thread from the start: kinds that PEFT rebuilds from an SVD of the base change their signs with the number.

Triton reads its setting when it is first imported, whoever does that: kernels are interpreted where there is no CUDA.
Logs are short: a rich traceback with every local takes seconds.
"""

import logging
import os
from collections.abc import Iterator

import pytest
import structlog
import torch

torch.set_num_threads(1)
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ]
)


@pytest.fixture(autouse=True)
def _no_log_to_streams_that_are_closed() -> Iterator[None]:
    """A command that a test runs in this process leaves a handler, to a stream that goes with the test."""
    yield
    for handler in list(logging.root.handlers):
        if isinstance(handler, logging.StreamHandler) and getattr(handler.stream, "closed", False):
            logging.root.removeHandler(handler)
