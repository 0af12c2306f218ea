"""Chat templates of adapters, where the settings allow them: read from the adapter's folder, rendered elsewhere.

A template is a program from outside. It runs in a process without this one's memory, environment or files
(`renderer.py`), whose time and memory are limited; one that went over them is not tried again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused, InvalidRequest
from adapter_server.registry import guard

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
MAX_BYTES = 64 << 10
MAX_CONFIG_BYTES = 4 << 20
PATIENCE_S = 20.0  # for a machine that is busy; processor time is limited far below
LONGEST_LINE = 64 << 20
REMEMBERED = 256  # templates that went over their limits


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template's text; `id` is the first 12 hex digits of its SHA-256."""

    text: str

    @property
    def id(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def of(spec: Spec, root: Path) -> ChatTemplate | None:
    """The template in an adapter's folder. Raises AdapterRefused where there is one that cannot be read."""
    folder = Path(spec.path)
    try:
        if os.path.lexists(folder / FILE):
            return ChatTemplate(bytes(guard.read_private(folder / FILE, root, MAX_BYTES)).decode())
        if not os.path.lexists(folder / CONFIG):
            return None
        text = _configured(json.loads(bytes(guard.read_private(folder / CONFIG, root, MAX_CONFIG_BYTES))))
    except (ValueError, RecursionError) as error:
        raise AdapterRefused(f"adapter {spec.name}: its chat template cannot be read ({error})") from None
    if text is not None and len(text) > MAX_BYTES:
        raise AdapterRefused(f"adapter {spec.name}: its chat template has more than {MAX_BYTES:,} characters")
    return None if text is None else ChatTemplate(text)


def _configured(config: Any) -> str | None:
    """A tokenizer's config has one template, or a list of named ones."""
    found = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


class Renderer:
    """The process that renders, started when it is first needed and again after it was killed. On the event loop."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._lock = asyncio.Lock()
        self._barred: dict[str, None] = {}

    async def render(self, template: ChatTemplate, variables: Mapping[str, Any]) -> str:
        """The text of a conversation. Raises InvalidRequest, whatever the template did."""
        if template.id in self._barred:
            raise _refused("it took too much time or memory before")
        line = json.dumps({"template": template.text, "variables": variables}).encode() + b"\n"
        async with self._lock:
            answer = await self._asked(line)
        if answer is None:
            self._bar(template)
            raise _refused("it takes too much time or memory")
        if "error" in answer:
            raise _refused(answer["error"])
        return answer["text"]

    async def _asked(self, line: bytes) -> dict[str, str] | None:
        """What the process says; None where it is no more."""
        whole = False
        try:
            async with asyncio.timeout(PATIENCE_S):
                said = await self._exchanged(line)
            whole = said.endswith(b"\n")
            return json.loads(said) if whole else None
        except (TimeoutError, ConnectionError, ValueError):
            whole = False
            return None
        finally:
            if not whole:  # cancelled, too: what it says next would be another's
                await self._kill()

    async def _exchanged(self, line: bytes) -> bytes:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", str(Path(__file__).with_name("renderer.py"))),
                stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env={}, cwd="/", limit=LONGEST_LINE,
            )  # fmt: skip
        to, back = self._process.stdin, self._process.stdout
        if to is None or back is None:
            raise ConnectionError
        to.write(line)
        await to.drain()
        return await back.readline()

    def _bar(self, template: ChatTemplate) -> None:
        self._barred[template.id] = None
        while len(self._barred) > REMEMBERED:
            del self._barred[next(iter(self._barred))]

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def close(self) -> None:
        async with self._lock:
            await self._kill()


def _refused(reason: str) -> InvalidRequest:
    return InvalidRequest(f"the adapter's chat template refuses these messages: {reason}", param="messages")
