"""OpenAI's dialect: models, completions and chats. The adapter is chosen by `model`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import APIRouter, Depends, Request, Response

from adapter_server.api import access, resolve, templates
from adapter_server.api.answer import LONG_TEXT, Answer, Piece, begin_all, encode, finite, logprob_of, token_of
from adapter_server.api.callers import for_eyes_of
from adapter_server.api.described import COMPLETED, KEYED, STREAMED, refused
from adapter_server.api.openai_bodies import ChatBody, CompletionBody, adapter_of
from adapter_server.api.refusals import shape, speak
from adapter_server.api.schemas import GenerateBody, document, parse
from adapter_server.api.service import Service, note, service_of
from adapter_server.api.sse import DONE, EventStream, data, dumps, reply, together
from adapter_server.core import Token
from adapter_server.errors import AdapterNotFound, AdapterServerError, InvalidRequest, NotMergeable, PromptTooLong

PARAMS = {"adapter": "model", "max_new_tokens": "max_tokens"}  # our fields by their names here
REASONS = {"eos": "stop"}
Json = dict[str, Any]


def worded(error: AdapterServerError) -> tuple[int, Json]:
    """A refusal as OpenAI's clients expect it: what the caller can mend is a 400."""
    status = 400 if isinstance(error, InvalidRequest | NotMergeable | PromptTooLong) else error.status
    return status, shape(error.message, status, error.code, PARAMS.get(error.param or "", error.param))


def _worded_for_chats(error: AdapterServerError) -> tuple[int, Json]:
    """What a prompt is elsewhere, messages are here."""
    status, content = worded(error)
    if content["error"]["param"] == "prompt":
        content["error"]["param"] = "messages"
    return status, content


async def _speak(request: Request) -> None:
    speak(request, worded)


router = APIRouter(prefix="/v1", dependencies=[Depends(_speak), Depends(access.inference)], responses=KEYED)


# Models


@router.get("/models", summary="The base and its adapters, as OpenAI lists models")
async def list_models(request: Request) -> Json:
    """The base first. An adapter's `parent` is the base; no `root` is a path."""
    service, caller = service_of(request), access.caller_of(request)
    entries = await asyncio.to_thread(service.store.entries)
    names = dict.fromkeys([*(entry.name for entry in entries if entry.spec), *service.aliases.all()])
    cards = [_card(service, name) for name in names if caller.may_use(name)]
    return {"object": "list", "data": [_card(service), *cards] if caller.base else cards}


@router.get("/models/{model:path}", summary="One of them", responses=refused(400, 404, 422, 424))
async def show_model(request: Request, model: str) -> Json:
    """By the names that `model` may have in a request."""
    service, caller = service_of(request), access.caller_of(request)
    name = adapter_of(model, service.info.model) or ""
    if name in ("", service.info.model):
        caller.check_base()
        return _card(service)
    caller.check([name])
    try:
        spec = await asyncio.to_thread(service.store.resolve, service.own_name(name))
    except AdapterNotFound as error:
        raise for_eyes_of(caller, error) from None
    return _card(service, name if service.aliases.get(name) else spec.name)


def _card(service: Service, name: str | None = None) -> Json:
    base = service.info.model
    return {
        "id": name or base,
        "object": "model",
        "created": int(service.started),
        "owned_by": "adapter-server",
        "root": name or base,
        "parent": base if name else None,
        "max_model_len": service.info.max_model_len,
    }


# The two forms


class Form(Protocol):
    """How a completion and a chat word the same answer."""

    prefix: str
    whole: str
    part: str

    def opening(self, prompt: str) -> Json | None: ...
    def grown(self, text: str) -> Json: ...
    def said(self, text: str) -> Json: ...
    def logprobs(self, answer: Answer, tokens: Sequence[Token], offsets: Sequence[int], top: int) -> Json: ...


class Completion:
    """Plain text."""

    prefix, whole, part = "cmpl-", "text_completion", "text_completion"

    def opening(self, prompt: str) -> Json | None:
        return self.grown(prompt) if prompt else None

    def grown(self, text: str) -> Json:
        return {"text": text}

    def said(self, text: str) -> Json:
        return {"text": text}

    def logprobs(self, answer: Answer, tokens: Sequence[Token], offsets: Sequence[int], top: int) -> Json:
        """The first token of a prompt has no log-probability."""
        name = answer.text.token
        own = [None if token.logprob is None else finite(token.logprob) for token in tokens]
        best = [{name(id): finite(value) for id, value in token.top[:top]} for token in tokens]
        pairs = zip(tokens, own, best, strict=True)
        return {
            "tokens": [name(token.id) for token in tokens],
            "token_logprobs": own,
            "top_logprobs": [None if value is None else some | {name(token.id): value} for token, value, some in pairs],
            "text_offset": list(offsets),
        }


class Chat:
    """Messages."""

    prefix, whole, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def opening(self, prompt: str) -> Json | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def grown(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}

    def said(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, answer: Answer, tokens: Sequence[Token], offsets: Sequence[int], top: int) -> Json:
        return {"content": [self._token(answer, token, top) for token in tokens], "refusal": None}

    def _token(self, answer: Answer, token: Token, top: int) -> Json:
        others = [_named(answer, id, finite(value)) for id, value in token.top[:top]]
        return _named(answer, token.id, logprob_of(token)) | {"top_logprobs": others}


def _named(answer: Answer, id: int, logprob: float) -> Json:
    """A token that is a part of a character has no bytes that its text could tell."""
    text = answer.text.token(id)
    return {
        "token": text,
        "logprob": logprob,
        "bytes": None if "\N{REPLACEMENT CHARACTER}" in text else [*text.encode()],
    }


# Routes


@router.post(
    "/completions",
    summary="Go on from a prompt, or from several",
    openapi_extra=document(CompletionBody, {"prompt": "red cat>", "max_tokens": 16}),
    responses=COMPLETED | STREAMED,
)
async def completions(request: Request) -> Response:
    """One JSON answer, or with `stream` Server-Sent Events."""
    service, body = service_of(request), parse(CompletionBody, await request.body())
    body.check()
    prompts = [await encode(service, prompt) for prompt in body.prompts]
    adapter = adapter_of(body.model, service.info.model)
    asked = [each for prompt in prompts for each in body.asked(prompt, adapter)]
    echoed = [_echo(service, given, ids) if body.echo else "" for given, ids in zip(body.prompts, prompts, strict=True)]
    return await _answer(request, body, asked, Completion(), [text for text in echoed for _ in range(body.choices)])


def _echo(service: Service, given: str | Sequence[int], ids: Sequence[int]) -> str:
    return given if isinstance(given, str) else service.text.decode(ids)


@router.post(
    "/chat/completions",
    summary="Answer a conversation",
    openapi_extra=document(ChatBody, {"messages": [{"role": "user", "content": "red cat"}], "max_tokens": 16}),
    responses=COMPLETED | STREAMED,
)
async def chat_completions(request: Request) -> Response:
    """One JSON answer, or with `stream` Server-Sent Events. The template is the base's own."""
    speak(request, _worded_for_chats)
    service, body = service_of(request), parse(ChatBody, await request.body())
    body.check()
    adapter = adapter_of(body.model, service.info.model)
    template = await _template(request, service, body, adapter)
    asked = body.asked(await _conversation(service, body, template), adapter)
    return await _answer(request, body, asked, Chat(), [""] * body.choices)


async def _template(
    request: Request, service: Service, body: ChatBody, adapter: str | None
) -> templates.ChatTemplate | None:
    """The adapter's own, where the settings allow it and it has one."""
    if not service.config.adapter_chat_templates or adapter in (None, "", service.info.model):
        return None
    caller = access.caller_of(request)
    caller.check([str(adapter)])
    ref = service.own_name(str(adapter), token_of(request, body.seed))
    try:
        spec = await asyncio.to_thread(service.store.resolve, ref)
    except AdapterNotFound as error:
        raise for_eyes_of(caller, error) from None
    template = await asyncio.to_thread(templates.of, spec, service.store.root)
    if template is not None:
        note(request, x_chat_template=template.id)
    return template


async def _conversation(service: Service, body: ChatBody, template: templates.ChatTemplate | None) -> tuple[int, ...]:
    messages = [{"role": message.role, "content": message.text} for message in body.messages]
    length = sum(len(message["content"]) for message in messages)
    resolve.check_length(length, service.text, service.info)
    if template is not None:
        said = await service.renderer.render(template, service.text.chat_variables(messages))
        resolve.check_length(len(said), service.text, service.info)
        return await encode(service, await asyncio.to_thread(service.text.encode_chat, said))
    long = length > LONG_TEXT
    ids = await asyncio.to_thread(service.text.chat, messages) if long else service.text.chat(messages)
    return await encode(service, ids)


async def _answer(
    request: Request,
    body: CompletionBody | ChatBody,
    asked: Sequence[GenerateBody],
    form: Form,
    echoed: Sequence[str],
) -> Response:
    service = service_of(request)
    answers = await begin_all(service, asked, request)
    top = (body.logprobs or 0) if isinstance(body, CompletionBody) else (body.top_logprobs or 0)
    silent = isinstance(body, CompletionBody) and body.max_tokens == 0
    choices = [Choice(*each, form, top, silent) for each in zip(range(len(answers)), answers, echoed, strict=True)]
    head = {
        "id": form.prefix + request.scope["request_id"],
        "created": int(time.time()),
        "model": body.model or service.info.model,
        "system_fingerprint": f"fp_{answers[0].version or 'base'}",
    }
    call = Call(head, form, choices, body.choices)
    if body.stream:
        note(request, server_timing=answers[0].server_timing)
        return EventStream(_events(call, bool(body.stream_options and body.stream_options.include_usage)))
    content = await _whole(call)
    note(request, server_timing=max(answers, key=lambda answer: answer.end.total_s).server_timing)
    return reply(content)


# Answers


@dataclass(slots=True)
class Choice:
    """One of the answers as it grows. `offset` counts the characters that are out, the echoed prompt's first.

    A silent one was asked for its prompt alone, and its token is dropped.
    """

    index: int
    answer: Answer
    echo: str
    form: Form
    top: int
    silent: bool = False
    offset: int = 0

    async def steps(self) -> AsyncGenerator[list[Piece], None]:
        """The answer's."""
        async with aclosing(self.answer.steps()) as steps:
            async for pieces in steps:
                yield [] if self.silent else pieces

    def opening(self) -> Json | None:
        """What comes before the answer, and the log-probabilities of the prompt."""
        said = self.form.opening(self.echo)
        return said and self.grown(said, self.prompt_logprobs())

    def prompt_logprobs(self) -> Json | None:
        """Of the echoed prompt, where they are asked for."""
        stream = self.answer.text.stream()
        pieces = [Piece(token.index, stream.push(token.id), token) for token in self.answer.prompt_tokens]
        logprobs = self.logprobs(pieces) if pieces else None
        self.offset = len(self.echo)
        return logprobs

    def logprobs(self, pieces: Sequence[Piece]) -> Json | None:
        """Of these pieces, which are the next; to be asked once for each."""
        offsets = []
        for piece in pieces:
            if piece.token:
                offsets.append(self.offset)
            self.offset += len(piece.text)
        tokens = [piece.token for piece in pieces if piece.token]
        return self.form.logprobs(self.answer, tokens, offsets, self.top) if self.answer.body.logprobs else None

    def said(self, pieces: Sequence[Piece]) -> Json:
        """The whole of it."""
        text = self.echo + "".join(piece.text for piece in pieces)
        before, logprobs = self.prompt_logprobs(), self.logprobs(pieces)
        if before and logprobs:
            logprobs = {name: before[name] + some for name, some in logprobs.items()}
        return {
            "index": self.index,
            **self.form.said(text),
            "logprobs": logprobs,
            "finish_reason": self.reason,
        }

    def grown(self, said: Mapping[str, Any], logprobs: Json | None = None, reason: str | None = None) -> Json:
        """In these words."""
        return {"index": self.index, **said, "logprobs": logprobs, "finish_reason": reason}

    def parts(self, pieces: Sequence[Piece]) -> list[Json]:
        """What a step of the engine adds; nothing where no text became certain."""
        text, logprobs = "".join(piece.text for piece in pieces), self.logprobs(pieces)
        worth = text or (logprobs and any(piece.token for piece in pieces))
        parts = [self.grown(self.form.grown(text), logprobs)] if worth else []
        return [*parts, self.grown(self.form.grown(""), reason=self.reason)] if self.answer.ended else parts

    @property
    def reason(self) -> str:
        return "length" if self.silent else REASONS.get(self.answer.finish_reason, self.answer.finish_reason)


@dataclass(frozen=True, slots=True)
class Call:
    """All the choices of one exchange; each prompt has so many of them."""

    head: Json
    form: Form
    choices: list[Choice]
    per_prompt: int

    def steps(self) -> AsyncGenerator[tuple[int, list[Piece]], None]:
        return together([choice.steps() for choice in self.choices])

    def frame(self, with_usage: bool) -> Callable[[Json], bytes]:
        """How a part becomes a chunk: what stands around it is the same every time."""
        before = f'data: {dumps({**self.head, "object": self.form.part})[:-1]},"choices":['
        after = "]" + (',"usage":null' if with_usage else "") + "}\n\n"
        return lambda part: f"{before}{dumps(part)}{after}".encode()

    def usage(self) -> Json:
        firsts = [choice.answer for choice in self.choices[:: self.per_prompt]]
        read = sum(len(answer.request.prompt) for answer in firsts)
        written = sum(choice.answer.completion_tokens for choice in self.choices if not choice.silent)
        cached = sum(answer.end.cached_tokens for answer in firsts)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


async def _whole(call: Call) -> Json:
    pieces: list[list[Piece]] = [[] for _ in call.choices]
    async with aclosing(call.steps()) as steps:
        async for number, step in steps:
            pieces[number] += step
    said = [choice.said(each) for choice, each in zip(call.choices, pieces, strict=True)]
    return {**call.head, "object": call.form.whole, "choices": said, "usage": call.usage()}


async def _events(call: Call, with_usage: bool) -> AsyncIterator[bytes]:
    chunk = call.frame(with_usage)
    try:
        async with aclosing(call.steps()) as steps:
            for choice in call.choices:
                if opening := choice.opening():
                    yield chunk(opening)
            async for number, step in steps:
                parts = call.choices[number].parts(step)
                yield b"".join(map(chunk, parts))
    except AdapterServerError as error:
        yield data(worded(error)[1])
        return
    if with_usage:
        yield data({**call.head, "object": call.form.part, "choices": [], "usage": call.usage()})
    yield DONE
