"""POST /generate, whole or as Server-Sent Events. Nothing is sent before the first event of the engine is here."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from adapter_server import core
from adapter_server.api import resolve
from adapter_server.api.bridge import Channel, refusal_of
from adapter_server.api.refusals import error_shape
from adapter_server.api.schemas import GenerateBody, document, parse
from adapter_server.api.service import Service, note, service_of
from adapter_server.core import Finished, Member, Token
from adapter_server.errors import AdapterServerError, InvalidRequest, VersionGone

ATTEMPTS = 3  # at an adapter whose files change between admission and load
LONG_TEXT = 1 << 14  # characters, from which encoding leaves the event loop
LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON lacks
router = APIRouter()
_dumps: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


@router.post(
    "/generate",
    summary="Generate text with an adapter, a composition, or the base model",
    openapi_extra=document(GenerateBody),
)
async def generate(request: Request) -> Response:
    """One JSON answer, or with `stream` Server-Sent Events."""
    body = parse(GenerateBody, await request.body())
    answer = await begin(service_of(request), body, request)
    if body.stream:
        note(request, server_timing=f"ttft;dur={answer.age_ms:.2f}")
        return EventStream(_events(answer))
    content = await _whole(answer)
    note(request, server_timing=_server_timing(content["timing"]))
    return Response(_dumps(content), media_type="application/json")


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added to the text; the text held back at the end comes without a token."""

    index: int
    text: str
    token: Token | None = None


class Answer:
    """One admitted request as it grows: `steps` until there is an `end`."""

    def __init__(self, service: Service, body: GenerateBody, request: core.Request, http: Request) -> None:
        self.body = body
        self.request = request
        self.end: Finished | None = None
        self.produced = 0
        self.text = service.text
        hidden = () if body.ignore_eos else service.info.eos
        self._stream = service.text.stream(request.prompt, body.stops, hidden)
        self._bridge = service.bridge
        self._channel: Channel = service.bridge.submit(request)
        self._watch = asyncio.create_task(self._cancel_when_gone(http))
        self._events: Sequence[Token | Finished] = ()
        self._error: AdapterServerError | None = None

    async def first(self) -> AdapterServerError | None:
        """Waits for the first event. An error means that there is no answer."""
        try:
            self._events = await self._channel.next()
        except BaseException:
            self._close()
            raise
        first = self._events[0]
        refusal = refusal_of(first, 0) if isinstance(first, Finished) else None
        if refusal is not None:
            self._watch.cancel()
        return refusal

    async def steps(self) -> AsyncIterator[list[Piece]]:
        """What is new, as often as the engine reports. Raises what went wrong on the way."""
        try:
            while True:
                yield self._take(self._events)
                if self._error is not None:
                    raise self._error
                if self.end is not None:
                    return
                self._events = await self._channel.next()
        finally:
            self._close()

    @property
    def age_ms(self) -> float:
        return (time.monotonic() - self.request.arrived) * 1e3

    def summary(self) -> dict[str, Any]:
        """The fields that are known at the end."""
        assert self.end is not None
        end, stopped = self.end, self._stream.stopped
        return {
            "finish_reason": "stop" if stopped else end.reason,
            "adapter": _names(self.request.members) or None,
            "adapter_version": _versions(self.request.members) or None,
            "mode": self.request.mode,
            "usage": {
                "prompt_tokens": len(self.request.prompt),
                "completion_tokens": self.produced if stopped else max(self.produced, end.completion_tokens),
                "cached_tokens": end.cached_tokens,
            },
            "timing": {
                "queue_s": round(end.queue_s, 6),
                "load_s": round(end.load_s, 6),
                "ttft_s": None if end.ttft_s is None else round(end.ttft_s, 6),
                "total_s": round(end.total_s, 6),
            },
        }

    def _take(self, events: Sequence[Token | Finished]) -> list[Piece]:
        pieces = []
        for event in events:
            if isinstance(event, Finished):
                pieces += self._finish(event)
            elif not self._stream.stopped:
                pieces.append(self._piece(event))
        return pieces

    def _piece(self, token: Token) -> Piece:
        self.produced += 1
        text = self._stream.push(token.id)
        if self._stream.stopped:
            self._bridge.cancel(self.request.id, "stop")
        return Piece(token.index, text, token)

    def _finish(self, end: Finished) -> list[Piece]:
        tail = self._stream.finish()
        self.end = end
        self._error = None if self._stream.stopped else refusal_of(end, self.produced)
        return [Piece(max(0, self.produced - 1), tail)] if tail else []

    async def _cancel_when_gone(self, http: Request) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            continue
        self._bridge.cancel(self.request.id)

    def _close(self) -> None:
        self._watch.cancel()
        if self.end is None:
            self._bridge.cancel(self.request.id)


async def begin(service: Service, body: GenerateBody, http: Request) -> Answer:
    """An answer whose first event is here. An adapter that was replaced meanwhile is resolved again."""
    service.check_open()
    arrived = time.monotonic()
    deadline = arrived + _timeout(service, body)
    prompt = await _encode(service, body)
    tried: tuple[Member, ...] = ()
    for attempt in range(ATTEMPTS):
        request = await _admissible(service, body, prompt, arrived, deadline)
        if attempt and request.members == tried:  # a copy is under way
            await asyncio.sleep(service.store.settle_s)
            request = await _admissible(service, body, prompt, arrived, deadline)
        tried = request.members
        note(http, x_adapter=_names(request.members) or "base", x_adapter_version=_versions(request.members))
        answer = Answer(service, body, request, http)
        refusal = await answer.first()
        if refusal is None:
            return answer
        if not isinstance(refusal, VersionGone) or attempt == ATTEMPTS - 1:
            raise refusal
    raise AssertionError("the last attempt returns or raises")


def _timeout(service: Service, body: GenerateBody) -> float:
    most = service.config.request_timeout_s
    if body.timeout_s is not None and body.timeout_s > most:
        raise InvalidRequest(f"timeout_s can be at most {most:g} on this server", param="timeout_s")
    return body.timeout_s or most


async def _encode(service: Service, body: GenerateBody) -> tuple[int, ...]:
    if isinstance(body.prompt, str) and len(body.prompt) > LONG_TEXT:
        return await asyncio.to_thread(resolve.prompt_ids, body.prompt, service.text, service.info)
    return resolve.prompt_ids(body.prompt, service.text, service.info)


async def _admissible(
    service: Service, body: GenerateBody, prompt: tuple[int, ...], arrived: float, deadline: float
) -> core.Request:
    residents = service.worker.stats().residents
    make = partial(resolve.admissible, body, prompt, service.store, service.info, residents, arrived, deadline)
    # The store reads files, and hashes them the first time.
    return await asyncio.to_thread(make) if body.adapter else make()


class EventStream(Response):
    """Server-Sent Events. The iterator is closed however the answer ends."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._chunks) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _events(answer: Answer) -> AsyncIterator[bytes]:
    try:
        async with aclosing(answer.steps()) as steps:  # type: ignore[type-var]
            async for pieces in steps:
                yield b"".join(_data(_event(answer, piece)) for piece in pieces)
    except AdapterServerError as error:
        yield _data(error_shape(error))
        return
    yield _data(answer.summary())


def _data(content: dict[str, Any]) -> bytes:
    return f"data: {_dumps(content)}\n\n".encode()


def _event(answer: Answer, piece: Piece) -> dict[str, Any]:
    event: dict[str, Any] = {"index": piece.index, "text": piece.text}
    if answer.body.return_token_ids:
        event["token_ids"] = [piece.token.id] if piece.token else []
    if answer.body.logprobs:
        event["logprobs"] = [_logprob(answer, piece.token)] if piece.token else []
    return event


async def _whole(answer: Answer) -> dict[str, Any]:
    pieces = [piece async for step in answer.steps() for piece in step]
    content = {"text": "".join(piece.text for piece in pieces)} | answer.summary()
    tokens = [piece.token for piece in pieces if piece.token]
    if answer.body.return_token_ids:
        content["token_ids"] = [token.id for token in tokens]
    if answer.body.logprobs:
        content["logprobs"] = [_logprob(answer, token) for token in tokens]
    return content


def _logprob(answer: Answer, token: Token) -> dict[str, Any]:
    top = [_choice(answer, id, value) for id, value in token.top]
    value = LOWEST_LOGPROB if token.logprob is None else token.logprob
    return _choice(answer, token.id, value) | {"top": top}


def _choice(answer: Answer, id: int, value: float) -> dict[str, Any]:
    return {"token_id": id, "text": answer.text.token(id), "logprob": max(value, LOWEST_LOGPROB)}


def _names(members: Sequence[Member]) -> str:
    return "+".join(member.spec.name for member in members)


def _versions(members: Sequence[Member]) -> str:
    return "+".join(member.spec.version for member in members)


def _server_timing(timing: dict[str, float | None]) -> str:
    known = {name.removesuffix("_s"): value for name, value in timing.items() if value is not None}
    return ", ".join(f"{name};dur={value * 1e3:.2f}" for name, value in known.items())
