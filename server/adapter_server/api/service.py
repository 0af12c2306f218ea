"""What every route works with."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from adapter_server.api.bridge import Bridge, Worker
from adapter_server.api.templates import Renderer
from adapter_server.config import ServerConfig
from adapter_server.core import Info
from adapter_server.errors import AdapterNotFound, Unavailable
from adapter_server.metrics import Metrics
from adapter_server.registry import versions
from adapter_server.registry.aliases import Aliases, pick
from adapter_server.registry.store import Store
from adapter_server.text import Text


@dataclass(slots=True)
class Service:
    """One base model, its adapters and its engine, as the routes see them."""

    worker: Worker
    bridge: Bridge
    store: Store
    text: Text
    info: Info
    config: ServerConfig
    metrics: Metrics
    aliases: Aliases
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while aliases change
    renderer: Renderer = field(default_factory=Renderer)
    starting: bool = False
    uploads: int = 0  # under way
    draining: bool = False
    started: float = field(default_factory=time.time)  # in seconds since 1970

    def own_name(self, ref: str, token: str = "") -> str:
        """A reference by an adapter's own name, where it is by an alias; the token chooses among several."""
        name, at, version = ref.partition("@")
        targets = self.aliases.get(name)
        if not targets or self.store.has(name):  # an adapter that came later is not hidden by an alias
            return ref
        if not at:
            return pick(targets, f"{name} {token}").adapter
        if len(targets) > 1 or targets[0].version:
            raise AdapterNotFound(f"{name} is an alias, which has no versions: ask for it by its name", param="adapter")
        return targets[0].adapter + at + version

    def led_to(self, ref: str) -> list[str]:
        """All that a reference may mean."""
        targets = () if self.store.has(ref) else self.aliases.get(ref)
        return [target.adapter for target in targets] or [ref]

    def aliased(self, name: str) -> set[str]:
        """The versions of an adapter that an alias leads to. On any thread."""
        found = (versions.find(self.store.root, name, word) for word in self.aliases.pins(name))
        return {version.id for version in found if version}

    def needed(self, name: str) -> set[str]:
        """Those, and the versions that open requests run on."""
        return self.bridge.in_use(name) | self.aliased(name)

    def check_open(self) -> None:
        """Raises Unavailable where new work is not taken."""
        if self.starting:
            raise Unavailable("the server is loading its first adapters: retry in a moment", retry_after=1)
        if self.draining:
            raise Unavailable("the server is shutting down: ask another, or retry", retry_after=5)
        if not self.worker.alive:
            raise Unavailable("the engine is not running: retry once the server is back", retry_after=5)


def service_of(request: Request) -> Service:
    """The service of the app that got this request."""
    service: Service = request.app.state.service
    return service


def note(request: Request, **headers: Any) -> None:
    """Headers for the answer, whatever it turns out to be; underscores stand for hyphens."""
    request.scope["reply_headers"].update({name.replace("_", "-"): str(value) for name, value in headers.items()})
