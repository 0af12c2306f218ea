"""One thread from the start: kinds that PEFT rebuilds from an SVD of the base change their signs with the number.

Logs are short: a rich traceback with every local takes seconds.
"""

import structlog
import torch

torch.set_num_threads(1)
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)
