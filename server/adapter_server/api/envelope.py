"""Around every exchange: a request id, the reply's headers, limits on headers and body, a line in the log, no naked
crash.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapter_server.api import refusals
from adapter_server.api.refusals import Wording
from adapter_server.config import ServerConfig
from adapter_server.errors import AdapterServerError, BodyTooLarge, BodyTooSlow, HeadersTooLarge
from adapter_server.registry import guard

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
UPLOAD = re.compile(r"/adapters/[^/]+")
UPLOAD_MORE = guard.MAX_CONFIG_BYTES + (1 << 20)  # beside the weights: the config and the form around both
QUIET = frozenset({"/livez", "/readyz", "/health", "/metrics"})
LEFT = 499  # in the log alone, as nginx has it
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a client: bytes of what it sends, seconds for its body to come and for it to take a part of the answer.

    An upload has its seconds for each part of it.
    """

    headers: int
    body: int
    seconds: float
    write_s: float
    upload: bool = False


class Envelope:
    """ASGI middleware. `reply_headers` in the scope are what routes add; `wordings` are how paths refuse."""

    def __init__(self, app: ASGIApp, config: ServerConfig, wordings: Mapping[str, Wording]) -> None:
        self._app = app
        self._limits = Limits(
            config.max_header_bytes, config.max_body_bytes, config.body_timeout_s, config.write_timeout_s
        )
        self._uploads = replace(self._limits, body=config.max_adapter_bytes + UPLOAD_MORE, upload=True)
        self._wordings = wordings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["wording"] = self._wordings.get(scope["path"], refusals.plainly)
        exchange = _Exchange(scope, receive, send, self._limits_of(scope))
        try:
            await exchange.run(self._app)
        except ClientDisconnect:  # before the request was whole, or without reading: nobody hears an answer
            if exchange.status is not None:
                log.warning("the client does not read its answer", request_id=exchange.id)
            exchange.status = exchange.status or LEFT
        except Exception:
            log.exception("request failed", request_id=exchange.id)
            if exchange.status is not None:
                raise
            await refusals.crash(exchange.id, scope["wording"])(scope, receive, exchange.send)
        finally:
            exchange.report()

    def _limits_of(self, scope: Scope) -> Limits:
        """An upload is as large as an adapter may be."""
        return self._uploads if scope["method"] == "PUT" and UPLOAD.fullmatch(scope["path"]) else self._limits


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits) -> None:
        headers = Headers(scope=scope)
        self.id = _request_id(headers.get("x-request-id", ""))
        self.status: int | None = None
        self._scope, self._receive, self._send = scope, receive, send
        self._start = time.perf_counter()
        self._limits, self._read, self._whole = limits, 0, False
        self._until = asyncio.get_running_loop().time() + limits.seconds
        self._announced = headers.get("content-length", "")
        scope["request_id"] = self.id
        scope["reply_headers"] = {"x-request-id": self.id}

    async def run(self, app: ASGIApp) -> None:
        if refusal := self._refusal():
            self._scope["app"].state.service.metrics.refuse(refusal.code)
            await refusals.answer(refusal, self._scope["wording"])(self._scope, self._receive, self.send)
        else:
            await app(self._scope, self.receive, self.send)

    def _refusal(self) -> AdapterServerError | None:
        """What the headers alone say."""
        if sum(len(name) + len(value) for name, value in self._scope["headers"]) > self._limits.headers:
            return HeadersTooLarge(f"the headers have more than {self._limits.headers:,} bytes: send less of them")
        if self._announced.isdigit() and int(self._announced[:20]) > self._limits.body:
            return self._too_large()
        return None

    async def receive(self) -> Message:
        """A part of the body; once it is whole, whatever comes, whenever it comes."""
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise BodyTooSlow(f"the body did not come within {self._limits.seconds:g} seconds: send faster") from None
        self._read += len(message.get("body", b""))
        if self._read > self._limits.body:
            raise self._too_large()
        self._whole = not message.get("more_body", False)
        if self._limits.upload:
            self._until = asyncio.get_running_loop().time() + self._limits.seconds
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.update(self._scope["reply_headers"])
            headers.setdefault("server-timing", f"total;dur={self._seconds * 1e3:.2f}")
        try:
            async with asyncio.timeout(self._limits.write_s):
                await self._send(message)
        except TimeoutError:
            raise ClientDisconnect from None

    def report(self) -> None:
        quiet = self._scope["path"] in QUIET
        (log.debug if quiet else log.info)(
            "request",
            request_id=self.id,
            method=self._scope["method"],
            path=self._scope["path"],
            status=self.status,
            key=self._scope["caller"].name if "caller" in self._scope else None,
            adapter=self._scope["reply_headers"].get("x-adapter"),
            seconds=round(self._seconds, 4),
        )

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._start

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body has more than {self._limits.body:,} bytes: send less, or raise the limit")


def _request_id(asked: str) -> str:
    """The caller's id if it is fit for a log line, or one of our own."""
    return asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
