"""Who asks: what a key may use, and how much of it. A file of keys is TOML:

[[keys]]
name = "reports"                 # shows in the log
sha256 = "9f86d081884c7d65…"     # or key = "…"
adapters = ["sql-*", "shout"]    # patterns of names; none given: all
base = false
tokens_per_minute = 60_000
concurrent = 8
"""

from __future__ import annotations

import hashlib
import json
import time
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from adapter_server.api.schemas import Parts, Strict, parse
from adapter_server.errors import AdapterNotFound, Forbidden, InvalidRequest, RateLimited

ALL = ("*",)
MINUTE_S = 60.0
Pattern = Annotated[str, Field(min_length=1, max_length=256)]
Limit = Annotated[int, Field(ge=1, lt=1 << 53)]


@dataclass(slots=True, eq=False)
class Caller:
    """A key's rights and limits, and what it has used of them. On the event loop alone."""

    name: str = ""
    admin: bool = False
    adapters: tuple[str, ...] = ALL
    base: bool = True
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    running: int = 0
    left: float = 0.0  # tokens of the rate; below 0 while an answer larger than a minute's worth is paid off
    seen: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.left = float(self.tokens_per_minute or 0)

    @property
    def sees_all(self) -> bool:
        return self.base and ALL[0] in self.adapters

    def may_use(self, name: str) -> bool:
        """Whether a name, as it is asked for, fits one of the patterns."""
        return any(fnmatchcase(name, pattern) for pattern in self.adapters)

    def check(self, names: Iterable[str], param: str | None = "adapter") -> None:
        """Raises Forbidden for an adapter that this key may not use, whether or not there is one of that name."""
        for name in names:
            if not self.may_use(name.partition("@")[0]):
                raise Forbidden("this key may not use an adapter of that name: ask for another", param=param)

    def check_base(self) -> None:
        if not self.base:
            raise Forbidden("this key may not use the base model: name an adapter", param="adapter")

    def check_sees_all(self) -> None:
        """What speaks of all adapters is not for keys that may use some."""
        if not self.sees_all:
            raise Forbidden("this speaks of all adapters, and this key may use some: use another key")

    def admit(self, tokens: int) -> None:
        """Takes a place and so many tokens. Raises RateLimited with the seconds until there is room.

        A request larger than a minute's worth passes when nothing of the minute is used, and is paid off afterwards.
        """
        if self.concurrent is not None and self.running >= self.concurrent:
            raise RateLimited(f"this key runs {self.running} requests, its limit: wait for one", retry_after=1)
        if self.tokens_per_minute is not None:
            self._take(tokens, self.tokens_per_minute)
        self.running += 1

    def _take(self, tokens: int, most: int) -> None:
        now, rate = time.monotonic(), most / MINUTE_S
        self.left, self.seen = min(most, self.left + (now - self.seen) * rate), now
        if (missing := min(tokens, most) - self.left) > 0:
            message = f"this key may use {most:,} tokens a minute, and has {max(0, int(self.left)):,} left: wait"
            raise RateLimited(message, retry_after=missing / rate)
        self.left -= tokens

    def release(self, unused: int) -> None:
        """Gives the place back, and the tokens that were not needed."""
        self.running -= 1
        self.left += unused if self.tokens_per_minute is not None else 0


def for_eyes_of(caller: Caller, error: AdapterNotFound) -> AdapterNotFound:
    """The same refusal; without the names that come near, for a key that may not see them all."""
    if caller.sees_all:
        return error
    return AdapterNotFound("there is no adapter of that name, or not at that version", param=error.param)


class KeyBody(Strict):
    """One key of the file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    key: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    admin: bool = False
    adapters: Annotated[list[Pattern], Field(min_length=1, max_length=1024)] | None = None
    base: bool = True
    tokens_per_minute: Limit | None = None
    concurrent: Limit | None = None

    @property
    def digest(self) -> bytes:
        if (self.key is None) == (self.sha256 is None):
            raise InvalidRequest(f"the key {self.name} needs either key or sha256", param="keys")
        return bytes.fromhex(self.sha256) if self.sha256 else digest(str(self.key).encode())

    def caller(self) -> Caller:
        return Caller(
            self.name, self.admin, tuple(self.adapters or ALL), self.base, self.tokens_per_minute, self.concurrent
        )


class KeysBody(Strict):
    """The file."""

    parts: ClassVar[Parts] = (KeyBody,)

    keys: Annotated[list[KeyBody], Field(min_length=1, max_length=20_000)]


def read(file: str) -> dict[bytes, Caller]:
    """The callers of a file, by the digests of their keys. Raises InvalidRequest, which never quotes the file."""
    try:
        content = tomllib.loads(Path(file).read_text())
        body = parse(KeysBody, json.dumps(content).encode())
        found = {key.digest: key.caller() for key in body.keys}
    except (OSError, ValueError, TypeError) as error:  # TypeError: a date, which JSON lacks
        raise InvalidRequest(f"{file} is no file of keys: {error}", param="api_keys_file") from None
    except InvalidRequest as refused:
        raise InvalidRequest(f"{file}: {refused.message}", param="api_keys_file") from None
    if len(found) < len(body.keys) or len({key.name for key in body.keys}) < len(body.keys):
        raise InvalidRequest(f"{file}: a key or a name is there twice", param="api_keys_file")
    return found


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
