"""The process: uvicorn and signals."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Coroutine
from types import FrameType

import structlog
import uvicorn

from adapter_server.api.app import Connect, create_app
from adapter_server.api.protocol import Protocol
from adapter_server.api.service import Service
from adapter_server.config import ServerConfig
from adapter_server.core import Info
from adapter_server.errors import AdapterServerError
from adapter_server.registry.store import Store
from adapter_server.text import Text

TICK_S = 0.02
LAST_WORDS_S = 1.0  # for the answers of cancelled requests to leave
KEEP_ALIVE_S = 75  # longer than clients keep a connection: whoever closes first must not be who is asked
SLOW_READER_S = 5  # for clients that do not read what they are sent, once nothing runs
Announce = Callable[[str], None]
log = structlog.get_logger()


class Server(uvicorn.Server):
    """On the first signal it drains and leaves with 0; on the second it leaves at once. A dead engine leaves 1."""

    def __init__(
        self, connect: Connect, store: Store, text: Text, info: Info, config: ServerConfig, announce: Announce
    ) -> None:
        app = create_app(connect, store, text, info, config, on_death=self._die)
        super().__init__(
            uvicorn.Config(
                app,
                config.host,
                config.port,
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                http=Protocol,
                h11_max_incomplete_event_size=config.max_header_bytes,
                timeout_graceful_shutdown=SLOW_READER_S,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self.exit_code = 0
        self._service = app.state.service
        self._drain_s = config.drain_timeout_s
        self._announce = announce
        self._loop: asyncio.AbstractEventLoop
        self.failure: AdapterServerError | None = None  # why it could not start
        self._tasks: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens at once, so that probes are answered; requests are taken when the first adapters are loaded."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._begin(self._open())

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        self._tasks.add(self._loop.create_task(work))

    async def _open(self) -> None:
        try:
            await preload(self._service)
        except AdapterServerError as error:
            self.failure = error
            self._die()
        else:
            self._announce(self.address)

    @property
    def address(self) -> str:
        """Where it listens, the port as bound."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining or not self.started:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        log.info("draining", signal=signal.Signals(sig).name, requests=self._service.bridge.open_requests)
        self._loop.call_soon_threadsafe(lambda: self._begin(self._drain()))

    async def _drain(self) -> None:
        """Running requests finish; those that take too long end as cancelled, with the text they have."""
        await self._quiet(self._drain_s)
        self._service.bridge.cancel_all()
        await self._quiet(LAST_WORDS_S)
        self.should_exit = True

    async def _quiet(self, seconds: float) -> None:
        until = self._loop.time() + seconds
        while self._service.bridge.open_requests and self._loop.time() < until:
            await asyncio.sleep(TICK_S)

    def _die(self) -> None:
        self.exit_code = 1
        self.should_exit = True


async def preload(service: Service) -> None:
    """Loads what the settings name, and opens the doors. Raises the refusal of one that cannot be loaded."""
    config = service.config
    asked = [ref for word in config.preload for ref in word.split(",") if ref]
    for name in [target for ref in asked for target in service.led_to(ref)]:
        try:
            spec = await asyncio.to_thread(service.store.resolve, name)
            await asyncio.wrap_future(service.worker.call("pin" if config.preload_pinned else "load", spec))
        except AdapterServerError as error:
            error.message = f"--preload {name}: {error.message}"
            raise
    service.starting = False
