"""Who may ask: keys, checked by the routers' dependencies, and the Host header of a server that has none."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from adapter_server.api import refusals
from adapter_server.config import ServerConfig
from adapter_server.errors import Forbidden, InvalidRequest, Unauthorized

Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


class Keys:
    """The digests of the keys. No kind of key: what it is for is open to all."""

    def __init__(self, config: ServerConfig) -> None:
        self._inference = _digests(config.api_key, "api_key")
        self._admin = _digests(config.admin_key, "admin_key")

    def check_inference(self, given: Bearer) -> None:
        """An admin key will do as well."""
        if self._inference and not _known(given, self._inference + self._admin):
            raise Unauthorized(f"{_fault(given)}: send Authorization: Bearer and an API key of this server")

    def check_admin(self, given: Bearer) -> None:
        """An inference key is known here, and not enough."""
        if not (self._inference or self._admin) or _known(given, self._admin):
            return
        if _known(given, self._inference):
            hint = "use an admin key" if self._admin else "the server must be started with --admin-key for that"
            raise Forbidden(f"this key is for inference: {hint}")
        raise Unauthorized(f"{_fault(given)}: send Authorization: Bearer and an admin key of this server")


async def inference(request: Request, given: Bearer) -> None:
    """A dependency of routers that answer prompts, or tell of the server."""
    _keys(request).check_inference(given)


async def admin(request: Request, given: Bearer) -> None:
    """A dependency of routers that move or change adapters."""
    _keys(request).check_admin(given)


def _keys(request: Request) -> Keys:
    keys: Keys = request.app.state.keys
    return keys


def _digests(keys: Iterable[str], name: str) -> tuple[bytes, ...]:
    if not all(keys):
        raise InvalidRequest(f"{name} is empty: a key has at least one character", param=name)
    return tuple(_digest(key.encode("utf-8", "surrogateescape")) for key in keys)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _known(given: HTTPAuthorizationCredentials | None, digests: Iterable[bytes]) -> bool:
    """All are compared, each in constant time: how long it takes tells nothing."""
    mine = _digest(given.credentials.encode("latin-1") if given else b"")  # a header's bytes, as they came
    return sum([hmac.compare_digest(mine, digest) for digest in digests]) > 0


def _fault(given: HTTPAuthorizationCredentials | None) -> str:
    return "this key is not known" if given else "there is no key"


class HostGuard:
    """ASGI middleware for a server that trusts its own machine: a web page elsewhere may lead a browser here by a name
    that it has pointed at loopback, but the Host header then has that name."""

    def __init__(self, app: ASGIApp, own: str) -> None:
        self._app = app
        self._own = own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and not self._fits(Headers(scope=scope).get("host", "localhost")):
            message = "the Host header is not this machine's: ask localhost, or start the server with --api-key"
            app = refusals.answer(Forbidden(message), scope["wording"])
        await app(scope, receive, send)

    def _fits(self, header: str) -> bool:
        try:
            name = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        return name == self._own.lower() or is_loopback(name)


def guards_host(config: ServerConfig) -> bool:
    """With keys a page elsewhere gains nothing: it has none."""
    return is_loopback(config.host) and not config.api_key and not config.insecure


def check_host(config: ServerConfig) -> None:
    """Without keys only this machine may ask, unless somebody says otherwise."""
    if config.insecure or config.api_key or is_loopback(config.host):
        return
    raise InvalidRequest(
        f"{config.host} is not a loopback address and anybody who reaches it could use this server: "
        "listen on 127.0.0.1, or set --api-key, or add --insecure if the network is trusted",
        param="host",
    )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
