"""Renders chat templates that came with adapters: a program of its own, which may be killed at any moment.

A line of JSON in, {"template", "variables"}; a line out, {"text"} or {"error"}. It imports nothing of this package,
opens no file, and its memory and processor time have limits that the system keeps.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_S = 1  # for one template, and up to one more: the system counts in whole seconds
MEMORY = 512 << 20
MOST_CHARACTERS = 4 << 20
LONGEST_ERROR = 300


class Generation(Extension):
    """`{% generation %}` marks what a model writes: it matters in training alone."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """As transformers renders a base's own template."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], cache_size=0
    )
    made.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False, **how})
    made.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return made


def refuse(message: str) -> NoReturn:
    """What a template calls that does not like the messages."""
    raise TemplateError(message)


@lru_cache(32)
def compiled(template: str) -> Template:
    return environment().from_string(template)


def render(template: str, variables: dict[str, Any]) -> str:
    pieces, length = [], 0
    for piece in compiled(template).generate(**variables):
        length += len(piece)
        if length > MOST_CHARACTERS:
            raise TemplateError(f"more than {MOST_CHARACTERS:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def answer(line: bytes) -> dict[str, str]:
    """Whatever a template does wrong, the one after it is rendered."""
    try:
        return {"text": render(**json.loads(line))}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:LONGEST_ERROR]}


def limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main() -> None:
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        limit(kind, most)
    for line in sys.stdin.buffer:
        limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + CPU_S)
        sys.stdout.write(json.dumps(answer(line)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
