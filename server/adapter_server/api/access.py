"""Who may ask: keys, checked by the routers' dependencies, and the Host header of a server that has none."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterable
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from adapter_server.api import callers, refusals
from adapter_server.api.callers import Caller
from adapter_server.api.hosts import is_loopback
from adapter_server.config import ServerConfig
from adapter_server.errors import Forbidden, InvalidRequest, Unauthorized

Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


class Keys:
    """Callers by their keys. No kind of key: what it is for is open to all.

    A key is looked up by a hash that a secret of this process goes into, and compared in constant time: neither tells
    anything of a key that is nearly right, however many there are.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._secret = secrets.token_bytes(32)
        self._known: dict[bytes, tuple[bytes, Caller]] = {}
        listed = callers.read(config.api_keys_file) if config.api_keys_file else {}
        flags = {key: Caller("inference") for key in _digests(config.api_key, "api_key")}
        admins = {key: Caller("admin", admin=True) for key in _digests(config.admin_key, "admin_key")}
        for key, caller in (listed | flags | admins).items():
            self._known[self._index(key)] = key, caller
        self._anybody = Caller()
        self._open = not (config.api_key or config.api_keys_file)
        self._unkept = not self._known
        self._has_admin = any(caller.admin for _, caller in self._known.values())

    def inference(self, given: Bearer) -> Caller:
        """An admin key will do as well."""
        caller = self._find(given) or (self._anybody if self._open else None)
        if caller is None:
            raise Unauthorized(f"{_fault(given)}: send Authorization: Bearer and an API key of this server")
        return caller

    def admin(self, given: Bearer) -> Caller:
        """An inference key is known here, and not enough."""
        if self._unkept:
            return self._anybody
        caller = self._find(given)
        if caller is None:
            raise Unauthorized(f"{_fault(given)}: send Authorization: Bearer and an admin key of this server")
        if not caller.admin:
            hint = "use an admin key" if self._has_admin else "the server must be started with --admin-key for that"
            raise Forbidden(f"this key is for inference: {hint}")
        return caller

    def _index(self, key: bytes) -> bytes:
        return hmac.digest(self._secret, key, "sha256")

    def _find(self, given: Bearer) -> Caller | None:
        mine = callers.digest(given.credentials.encode("latin-1") if given else b"")  # a header's bytes, as they came
        theirs, caller = self._known.get(self._index(mine), (bytes(len(mine)), None))
        return caller if hmac.compare_digest(mine, theirs) else None


async def inference(request: Request, given: Bearer) -> None:
    """A dependency of routers that answer prompts, or tell of the server."""
    request.scope["caller"] = _keys(request).inference(given)


async def whole(request: Request) -> None:
    """After `inference`, for what speaks of all adapters."""
    caller_of(request).check_sees_all()


async def admin(request: Request, given: Bearer) -> None:
    """A dependency of routers that move or change adapters; a key may be limited to some of them."""
    request.scope["caller"] = _keys(request).admin(given)
    if name := request.path_params.get("name"):
        caller_of(request).check([name], "name")


def caller_of(request: Request) -> Caller:
    """Whose key this request came with."""
    caller: Caller = request.scope["caller"]
    return caller


def _keys(request: Request) -> Keys:
    keys: Keys = request.app.state.keys
    return keys


def _digests(keys: Iterable[str], name: str) -> tuple[bytes, ...]:
    if not all(keys):
        raise InvalidRequest(f"{name} is empty: a key has at least one character", param=name)
    return tuple(callers.digest(key.encode("utf-8", "surrogateescape")) for key in keys)


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
