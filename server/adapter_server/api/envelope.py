"""Around every exchange: a request id, the reply's headers, a limit on the body, a line in the log, no naked crash."""

from __future__ import annotations

import re
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapter_server.api import refusals
from adapter_server.registry import guard

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
UPLOAD = re.compile(r"/adapters/[^/]+")
UPLOAD_MORE = guard.MAX_CONFIG_BYTES + (1 << 20)  # beside the weights: the config and the form around both
QUIET = frozenset({"/livez", "/readyz", "/health", "/metrics"})
log = structlog.get_logger()


class Envelope:
    """ASGI middleware. `reply_headers` in the scope are what routes add."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._limit = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._limit_of(scope))
        try:
            await exchange.run(self._app)
        except Exception:
            log.exception("request failed", request_id=exchange.id)
            if exchange.status is not None:
                raise
            await refusals.crash(exchange.id)(scope, receive, exchange.send)
        finally:
            exchange.report()

    def _limit_of(self, scope: Scope) -> int:
        """An upload is as large as an adapter may be."""
        if scope["method"] != "PUT" or not UPLOAD.fullmatch(scope["path"]):
            return self._limit
        most: int = scope["app"].state.service.config.max_adapter_bytes
        return most + UPLOAD_MORE


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        headers = Headers(scope=scope)
        self.id = _request_id(headers.get("x-request-id", ""))
        self.status: int | None = None
        self._scope, self._receive, self._send = scope, receive, send
        self._start = time.perf_counter()
        self._limit, self._read = limit, 0
        self._announced = headers.get("content-length", "")
        scope["request_id"] = self.id
        scope["reply_headers"] = {"x-request-id": self.id}

    async def run(self, app: ASGIApp) -> None:
        if self._announced.isdigit() and int(self._announced) > self._limit:
            refusal = refusals.plain_answer(413, self._too_large())
            refusal.headers["connection"] = "close"
            await refusal(self._scope, self._receive, self.send)
            return
        await app(self._scope, self.receive, self.send)

    async def receive(self) -> Message:
        message = await self._receive()
        self._read += len(message.get("body", b""))
        if self._read > self._limit:
            raise HTTPException(413, self._too_large())
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.update(self._scope["reply_headers"])
            headers.setdefault("server-timing", f"total;dur={self._seconds * 1e3:.2f}")
        await self._send(message)

    def report(self) -> None:
        quiet = self._scope["path"] in QUIET
        (log.debug if quiet else log.info)(
            "request",
            request_id=self.id,
            method=self._scope["method"],
            path=self._scope["path"],
            status=self.status,
            adapter=self._scope["reply_headers"].get("x-adapter"),
            seconds=round(self._seconds, 4),
        )

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._start

    def _too_large(self) -> str:
        return f"the body has more than {self._limit:,} bytes: send less, or raise the server's limit"


def _request_id(asked: str) -> str:
    """The caller's id if it is fit for a log line, or one of our own."""
    return asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
