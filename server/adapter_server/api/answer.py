"""A request from its admission to its end, the same for every dialect: what the engine says, as text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import NamedTuple

from fastapi import Request

from adapter_server import core
from adapter_server.api import resolve
from adapter_server.api.access import caller_of
from adapter_server.api.bridge import Channel, refusal_of
from adapter_server.api.callers import Caller, for_eyes_of
from adapter_server.api.refusals import ended_by
from adapter_server.api.schemas import GenerateBody
from adapter_server.api.service import Service, note
from adapter_server.core import Finished, FinishReason, Member, Token, Top
from adapter_server.errors import AdapterNotFound, AdapterServerError, InvalidRequest, VersionGone

ATTEMPTS = 3  # at an adapter whose files change between admission and load
LONG_TEXT = 1 << 14  # characters, from which encoding leaves the event loop
LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON lacks


class Piece(NamedTuple):
    """What one token added to the text; the text held back at the end comes without a token."""

    index: int  # type: ignore[assignment]  # a field, not a tuple's search
    text: str
    token: Token | None = None


class Answer:
    """One admitted request as it grows: `steps` until there is an `end`."""

    def __init__(self, service: Service, body: GenerateBody, request: core.Request, http: Request) -> None:
        self.body = body
        self.request = request
        self.produced = 0
        self.text = service.text
        self._end: Finished | None = None
        self._ends = () if body.ignore_eos else service.info.eos
        self._newest = -1
        self._stream = service.text.stream(() if service.info.has_encoder else request.prompt, body.stops, self._ends)
        self._scope = http.scope
        self._bridge = service.bridge
        self._channel: Channel = service.bridge.submit(request, caller_of(http))
        self._watch = asyncio.create_task(self._cancel_when_gone(http))
        self._events: Sequence[Token | Finished] = ()
        self._error: AdapterServerError | None = None
        self._rated: tuple[tuple[float, Top], ...] = ()

    async def first(self) -> AdapterServerError | None:
        """Waits for the first event. An error means that there is no answer."""
        try:
            self._events = await self._channel.next()
        except BaseException:
            self.close()
            raise
        first = self._events[0]
        if isinstance(first, Token):
            self._rated = first.prompt
        refusal = refusal_of(first, 0) if isinstance(first, Finished) else None
        if refusal is None:
            return None
        self._watch.cancel()
        return self.ended_by(refusal)

    async def steps(self) -> AsyncGenerator[list[Piece], None]:
        """What is new, as often as the engine reports. Raises what went wrong on the way."""
        try:
            while True:
                yield self._take(self._events)
                if self._error is not None:
                    raise self.ended_by(self._error)
                if self._end is not None:
                    return
                self._events = await self._channel.next()
        finally:
            self.close()

    def close(self) -> None:
        """Frees the request's place, if it still runs."""
        self._watch.cancel()
        if self._end is None:
            self._bridge.cancel(self.request.id)

    def ended_by(self, error: AdapterServerError) -> AdapterServerError:
        """The same error, known as this request's end. One that is asked again is no request of its own."""
        return error if isinstance(error, VersionGone) else ended_by(self._scope, error)

    @property
    def may_end(self) -> bool:
        """Whether the newest token ends the answer, unless the engine is cut short."""
        sampling = self.request.sampling
        full = self.produced >= sampling.max_new_tokens or sampling.constraint is not None
        return full or self._stream.stopped or self._newest in self._ends

    @property
    def ended(self) -> bool:
        """Whether it has ended, and well."""
        return self._end is not None and self._error is None

    @property
    def end(self) -> Finished:
        """How the engine ended it; only to be asked for once it has."""
        if self._end is None:
            raise RuntimeError("this answer has not ended")
        return self._end

    @property
    def finish_reason(self) -> FinishReason:
        return "stop" if self._stream.stopped else self.end.reason

    @property
    def timing(self) -> dict[str, float | None]:
        """Seconds, once it has ended."""
        spans = {name: getattr(self.end, name) for name in ("queue_s", "load_s", "ttft_s", "total_s")}
        return {name: None if seconds is None else round(seconds, 6) for name, seconds in spans.items()}

    @property
    def server_timing(self) -> str:
        """The header, in milliseconds: all of it once it has ended, before that the time to the first token."""
        spans = self.timing if self._end else {"ttft_s": time.monotonic() - self.request.arrived}
        known = {name.removesuffix("_s"): seconds for name, seconds in spans.items() if seconds is not None}
        return ", ".join(f"{name};dur={seconds * 1e3:.2f}" for name, seconds in known.items())

    @property
    def completion_tokens(self) -> int:
        """The end token counts; what the engine made beyond a stop string does not."""
        return self.produced if self._stream.stopped else max(self.produced, self.end.completion_tokens)

    @property
    def prompt_tokens(self) -> list[Token]:
        """The prompt's own tokens, where their log-probabilities were asked for; the first has none."""
        rated = ((None, ()), *self._rated)
        id = self.request.id
        pairs = zip(self.request.prompt, rated, strict=True) if self.request.sampling.prompt_logprobs else ()
        return [Token(id, at, token, *each) for at, (token, each) in enumerate(pairs)]

    @property
    def adapter(self) -> str:
        """The adapters' names; empty for the base model."""
        return _names(self.request.members)

    @property
    def version(self) -> str:
        return _versions(self.request.members)

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
        self._newest = token.id
        text = self._stream.push(token.id)
        if self._stream.stopped:
            self._bridge.cancel(self.request.id, "stop")
        return Piece(token.index, text, token)

    def _finish(self, end: Finished) -> list[Piece]:
        tail = self._stream.finish()
        self._end = end
        self._error = None if self._stream.stopped else refusal_of(end, self.produced)
        return [Piece(max(0, self.produced - 1), tail)] if tail else []

    async def _cancel_when_gone(self, http: Request) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            continue
        self._bridge.cancel(self.request.id)


async def begin(service: Service, body: GenerateBody, http: Request) -> Answer:
    """An answer whose first event is here. An adapter that was replaced meanwhile is resolved again."""
    service.check_open()
    _check_rights(service, body, http)
    body = _by_own_names(service, body, http)
    arrived = time.monotonic()
    deadline = arrived + _timeout(service, body)
    prompt = await encode(service, body.prompt)
    tried: tuple[Member, ...] = ()
    for attempt in range(ATTEMPTS):
        request = await _admissible(service, body, prompt, arrived, deadline, caller_of(http))
        if attempt and request.members == tried:  # a copy is under way
            await asyncio.sleep(service.store.settle_s)
            request = await _admissible(service, body, prompt, arrived, deadline, caller_of(http))
        tried = request.members
        note(http, x_adapter=_names(request.members) or "base", x_adapter_version=_versions(request.members))
        answer = Answer(service, body, request, http)
        refusal = await answer.first()
        if refusal is None:
            return answer
        if not isinstance(refusal, VersionGone) or attempt == ATTEMPTS - 1:
            raise refusal
    raise RuntimeError("the last attempt returns or raises")


async def begin_all(service: Service, bodies: Sequence[GenerateBody], http: Request) -> list[Answer]:
    """Several answers to one client, each begun; or none, where one is refused."""
    tasks = [asyncio.create_task(begin(service, body, http)) for body in bodies]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        for begun in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(begun, Answer):
                begun.close()
        raise


async def encode(service: Service, prompt: str | Sequence[int]) -> tuple[int, ...]:
    """The prompt's ids, in a thread if that takes long."""
    if isinstance(prompt, str) and len(prompt) > LONG_TEXT:
        return await asyncio.to_thread(resolve.prompt_ids, prompt, service.text, service.info)
    return resolve.prompt_ids(prompt, service.text, service.info)


def logprob_of(token: Token) -> float:
    """The token's own, within what JSON can say."""
    return finite(LOWEST_LOGPROB if token.logprob is None else token.logprob)


def finite(logprob: float) -> float:
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB  # NaN compares false


def token_of(http: Request, seed: int | None) -> str:
    """What decides between an alias' targets, once for all answers of an exchange."""
    token: str = http.scope.setdefault("token", str(http.scope["request_id"] if seed is None else seed))
    return token


def _check_rights(service: Service, body: GenerateBody, http: Request) -> None:
    """By the names as they were asked for."""
    names = [name for name, _ in resolve.adapter_refs(body, service.info)]
    caller_of(http).check(names)
    if not names:
        caller_of(http).check_base()


def _by_own_names(service: Service, body: GenerateBody, http: Request) -> GenerateBody:
    """An alias is the same adapter for all answers of an exchange: by its seed, or by its id."""
    asked = body.adapter
    if not asked or not service.aliases.all():
        return body
    token = token_of(http, body.seed)
    if isinstance(asked, str):
        return body.model_copy(update={"adapter": service.own_name(asked, token)})
    members = [member.model_copy(update={"name": service.own_name(member.name, token)}) for member in asked]
    return body.model_copy(update={"adapter": members})


def _timeout(service: Service, body: GenerateBody) -> float:
    most = service.config.request_timeout_s
    if body.timeout_s is not None and body.timeout_s > most:
        raise InvalidRequest(f"timeout_s can be at most {most:g} on this server", param="timeout_s")
    return body.timeout_s or most


async def _admissible(
    service: Service, body: GenerateBody, prompt: tuple[int, ...], arrived: float, deadline: float, caller: Caller
) -> core.Request:
    make = partial(resolve.admissible, body, prompt, service.store, service.info, arrived, deadline)
    # The store reads files, and hashes them the first time.
    try:
        return await asyncio.to_thread(make) if body.adapter else make()
    except AdapterNotFound as error:
        raise for_eyes_of(caller, error) from None


def _names(members: Sequence[Member]) -> str:
    return "+".join(member.spec.name for member in members)


def _versions(members: Sequence[Member]) -> str:
    return "+".join(member.spec.version for member in members)
