"""What every route works with."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from adapter_server.api.bridge import Bridge, Worker
from adapter_server.api.resolve import Info
from adapter_server.config import ServerConfig
from adapter_server.errors import Unavailable
from adapter_server.metrics import Metrics
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
    aliases: dict[str, str] = field(default_factory=dict)  # names that callers gave, and the adapters' own
    uploads: int = 0  # under way
    draining: bool = False
    started: float = field(default_factory=time.time)  # in seconds since 1970

    def own_name(self, ref: str) -> str:
        """A reference by the adapter's own name, where it is by an alias."""
        name, at, version = ref.partition("@")
        return self.aliases.get(name, name) + at + version

    def check_open(self) -> None:
        """Raises Unavailable where new work is not taken."""
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
