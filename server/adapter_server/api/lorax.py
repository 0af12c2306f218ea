"""LoRAX's dialect: its bodies, answers, streams and errors, over the same engine.

What LoRAX has and this server has not (other adapter sources, other ways of merging, best_of, …) is refused by name.
Its linear merge is served as the exact weighted composition, per module, of the adapters themselves.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field, field_validator

from adapter_server.api import access
from adapter_server.api.answer import Answer, Piece, begin, encode, finite, logprob_of
from adapter_server.api.described import GENERATED, STREAMED
from adapter_server.api.refusals import speak
from adapter_server.api.resolve import check_length
from adapter_server.api.schemas import (
    FORMATS,
    MOST_STOPS,
    STOPS,
    AdapterRef,
    Alternatives,
    Effect,
    GenerateBody,
    GrammarText,
    Lenient,
    LenientFormat,
    MemberName,
    NewTokens,
    Parts,
    Penalty,
    Repetition,
    ResponseFormat,
    Schema,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    Unions,
    check_shape,
    document,
    parse,
)
from adapter_server.api.service import Service, note, service_of
from adapter_server.api.sse import EventStream, data, reply
from adapter_server.core import Info, Token
from adapter_server.errors import AdapterServerError, DeadlineExceeded, InvalidRequest, PromptTooLong, Unavailable

REASONS = {"eos": "eos_token", "stop": "stop_sequence", "length": "length"}
KINDS = {**dict.fromkeys((408, 413, 422, 431), "validation"), 429: "overloaded", 503: "healthcheck"}  # or "generation"
PASSED = ("seed", "stop", "max_new_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty")
WARPERS = ("temperature", "top_k", "top_p")
EXAMPLE = {"inputs": "red cat>", "parameters": {"max_new_tokens": 16, "details": True}}
NOT_HERE = "is not supported: leave it out"
Json = dict[str, Any]


def worded(error: AdapterServerError) -> tuple[int, Json]:
    """A refusal in LoRAX's shape. What does not fit the context is a matter of validation there."""
    status = 422 if isinstance(error, PromptTooLong) else error.status
    return status, {"error": error.message, "error_type": KINDS.get(status, "generation")}


async def _speak(request: Request) -> None:
    speak(request, worded)


router = APIRouter(dependencies=[Depends(_speak), Depends(access.inference)], responses=GENERATED)


class MergedAdapters(Lenient):
    """Adapters that answer together."""

    ids: Annotated[list[MemberName], Field(min_length=1, max_length=8)]
    weights: Annotated[list[Effect], Field(max_length=8)]
    merge_strategy: Literal["linear"] | None = None


class Grammar(Lenient):
    """The form of an answer in the words of clients that TGI has too."""

    unions: ClassVar[Unions] = {"value": "a JSON schema, or for regex an expression"}

    type: Literal["json", "json_schema", "regex"]
    value: Schema | Annotated[GrammarText, Field(min_length=1)]

    def format(self) -> ResponseFormat:
        if isinstance(self.value, str) == (self.type != "regex"):
            raise InvalidRequest(f"a grammar of type {self.type} has another value", param="grammar")
        if isinstance(self.value, str):
            return ResponseFormat(type="regex", regex=self.value)
        return ResponseFormat(type="json_schema", json_schema=self.value)


class Parameters(Lenient):
    """How to generate. `null` is as good as left out."""

    parts: ClassVar[Parts] = (MergedAdapters, LenientFormat, Grammar)
    unions: ClassVar[Unions] = {"stop": STOPS, "response_format": FORMATS, "grammar": FORMATS}

    adapter_id: AdapterRef | None = None
    adapter_source: Literal["local"] | None = None
    merged_adapters: MergedAdapters | None = None
    best_of: Literal[1] | None = None
    temperature: Temperature | None = None
    repetition_penalty: Repetition | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    typical_p: Any = None
    do_sample: bool | None = None
    max_new_tokens: NewTokens | None = None
    ignore_eos_token: bool | None = None
    return_full_text: bool | None = None
    stop: Stop | None = None
    truncate: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    watermark: Any = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_k_alternatives: Alternatives | None = None
    seed: Seed | None = None
    response_format: LenientFormat | None = None
    grammar: Grammar | None = None

    @field_validator("typical_p", "watermark")
    @classmethod
    def _not_here(cls, value: Any) -> None:
        if value:
            raise ValueError(NOT_HERE)

    @property
    def format(self) -> ResponseFormat | None:
        """The form asked for, in either way."""
        if self.grammar is None:
            return self.response_format
        if self.response_format is not None:
            raise InvalidRequest("give either response_format or grammar", param="grammar")
        return self.grammar.format()

    @property
    def adapter(self) -> str | list[Json] | None:
        """As our own body names it."""
        merged = self.merged_adapters
        if merged is None:
            return self.adapter_id
        if self.adapter_id:
            raise InvalidRequest("give either adapter_id or merged_adapters", param="merged_adapters")
        if len(merged.weights) != len(merged.ids):
            raise InvalidRequest("merged_adapters needs as many weights as ids", param="merged_adapters")
        return [{"name": name, "weight": weight} for name, weight in zip(merged.ids, merged.weights, strict=True)]

    def warpers(self) -> Json:
        """Sampling where LoRAX would sample; it is greedy unless something asks for more."""
        given: Json = {name: value for name in WARPERS if (value := getattr(self, name)) is not None}
        warm = given.setdefault("temperature", 1.0) != 1 or len(given) > 1 or self.do_sample
        return given if warm else {}


class LoraxTokens(Lenient):
    """The body of POST /tokenize in LoRAX's form."""

    inputs: Annotated[str, Field(min_length=1)]
    add_special_tokens: bool | None = None


class LoraxBody(Lenient):
    """The body of POST /, /generate and /generate_stream."""

    parts: ClassVar[Parts] = (Parameters,)

    inputs: Annotated[str, Field(min_length=1)]
    stream: bool | None = None
    parameters: Parameters | None = None

    @property
    def how(self) -> Parameters:
        return self.parameters or Parameters()

    def asked(self, prompt: Sequence[int], stream: bool) -> GenerateBody:
        """The same request in our own words."""
        how = self.how
        given = {name: value for name in PASSED if (value := getattr(how, name)) is not None}
        given |= how.warpers() | {"prompt": list(prompt), "adapter": how.adapter, "stream": stream}
        given |= {"ignore_eos": bool(how.ignore_eos_token), "response_format": how.format}
        if how.decoder_input_details and how.details:
            given["prompt_logprobs"] = 1
        if stream or how.details:  # a token there has always its logprob
            given |= {"logprobs": how.return_k_alternatives or 1}
        return GenerateBody(**given)


def info(base: Info) -> Json:
    """What GET /info says in LoRAX's words."""
    return {
        "model_id": base.model,
        "model_dtype": base.dtype,
        "model_device_type": base.device,
        "max_best_of": 1,
        "max_stop_sequences": MOST_STOPS,
        "max_input_length": base.max_model_len - 1,
        "max_total_tokens": base.max_model_len,
    }


# Routes


def spoken(body: bytes) -> bool:
    """Whether a body is written in LoRAX's form."""
    if b'"inputs"' not in body and b'"parameters"' not in body:
        return False
    check_shape(body)
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and bool({"inputs", "parameters"} & content.keys())


@router.post("/", summary="As LoRAX's client asks", openapi_extra=document(LoraxBody, EXAMPLE), responses=STREAMED)
async def root(request: Request) -> Response:
    """A list of one answer, or with `stream` Server-Sent Events."""
    body = parse(LoraxBody, await request.body())
    return await _stream(request, body) if body.stream else reply([await _whole(request, body)])


@router.post(
    "/generate_stream",
    summary="As LoRAX streams",
    openapi_extra=document(LoraxBody, EXAMPLE),
    response_class=Response,
    responses=STREAMED,
)
async def generate_stream(request: Request) -> Response:
    """Server-Sent Events, one for each token."""
    return await _stream(request, parse(LoraxBody, await request.body()))


async def generate(request: Request, raw: bytes) -> Response:
    """POST /generate, for a body in LoRAX's form."""
    speak(request, worded)
    return reply(await _whole(request, parse(LoraxBody, raw)))


async def tokenize(request: Request, raw: bytes) -> Response:
    """POST /tokenize, for a body in LoRAX's form."""
    speak(request, worded)
    service, body = service_of(request), parse(LoraxTokens, raw)
    check_length(len(body.inputs), service.text, service.info)
    spans = await asyncio.to_thread(service.text.spans, body.inputs, body.add_special_tokens is not False)
    return reply([{"id": id, "text": body.inputs[at:to], "start": at, "stop": to} for id, at, to in spans])


async def _begin(request: Request, body: LoraxBody, stream: bool) -> Answer:
    service = service_of(request)
    prompt = await encode(service, body.inputs)
    answer = await begin(service, body.asked(prompt[-(body.how.truncate or 0) :], stream), request)
    note(request, x_model_id=service.info.model, x_prompt_tokens=len(answer.request.prompt))
    if answer.adapter:
        note(request, x_adapter_id=answer.adapter, x_adapter_source="local")
    return answer


# Whole answers


async def _whole(request: Request, body: LoraxBody) -> Json:
    answer = await _begin(request, body, stream=False)
    pieces = [piece async for step in answer.steps() for piece in step]
    if unfinished := _unfinished(answer):
        raise answer.ended_by(unfinished)
    _tell(request, answer)
    content: Json = {"generated_text": _full(body, "".join(piece.text for piece in pieces))}
    if body.how.details:
        content["details"] = _details(service_of(request), body, answer, pieces)
    return content


def _unfinished(answer: Answer) -> AdapterServerError | None:
    """LoRAX has no partial answers."""
    if answer.finish_reason == "timeout":
        return DeadlineExceeded("the deadline passed before the answer was whole: ask for less, or stream")
    if answer.finish_reason == "cancelled":
        return Unavailable("the server shut down before the answer was whole: ask another", retry_after=5)
    return None


def _tell(request: Request, answer: Answer) -> None:
    read, written, end = len(answer.request.prompt), answer.completion_tokens, answer.end
    note(request, server_timing=answer.server_timing, x_generated_tokens=written, x_total_tokens=read + written)
    note(request, x_queue_time=round(end.queue_s * 1e3), x_total_time=round(end.total_s * 1e3))


def _full(body: LoraxBody, text: str) -> str:
    return body.inputs + text if body.how.return_full_text else text


def _details(service: Service, body: LoraxBody, answer: Answer, pieces: Sequence[Piece]) -> Json:
    return _ending(answer) | {
        "skipped_tokens": 0,
        "prefill": [_read(service, token) for token in answer.prompt_tokens],
        "tokens": [_token(body, answer, token, text) for token, text in _by_token(pieces)],
    }


def _read(service: Service, token: Token) -> Json:
    """A token of the prompt."""
    logprob = None if token.logprob is None else finite(token.logprob)
    return {"id": token.id, "text": service.text.token(token.id), "logprob": logprob}


def _ending(answer: Answer) -> Json:
    return {
        "finish_reason": REASONS[answer.finish_reason],
        "prompt_tokens": len(answer.request.prompt),
        "generated_tokens": answer.completion_tokens,
        "seed": answer.request.sampling.seed,
    }


def _by_token(pieces: Sequence[Piece]) -> list[tuple[Token, str]]:
    """Each token with its text; text that was held back belongs to the last one."""
    found: list[tuple[Token, str]] = []
    for piece in pieces:
        if piece.token:
            found.append((piece.token, piece.text))
        elif found:
            token, text = found.pop()
            found.append((token, text + piece.text))
    return found


def _token(body: LoraxBody, answer: Answer, token: Token, text: str) -> Json:
    special = token.id in answer.text.special_ids
    shown: Json = {
        "id": token.id,
        "text": answer.text.token(token.id) if special else text,
        "logprob": logprob_of(token),
        "special": special,
        "skipped": False,
    }
    if body.how.return_k_alternatives:
        name = answer.text.token
        shown["alternative_tokens"] = [{"id": id, "text": name(id), "logprob": finite(p)} for id, p in token.top]
    return shown


# Streams


async def _stream(request: Request, body: LoraxBody) -> Response:
    if body.how.decoder_input_details:
        raise InvalidRequest("decoder_input_details is not for streams", param="parameters.decoder_input_details")
    answer = await _begin(request, body, stream=True)
    note(request, server_timing=answer.server_timing)
    return EventStream(_events(answer, body))


async def _events(answer: Answer, body: LoraxBody) -> AsyncIterator[bytes]:
    """A token that may be the last waits for the end, because the last event has both."""
    text, held = "", list[Piece]()
    try:
        async with aclosing(answer.steps()) as steps:
            async for pieces in steps:
                text += "".join(piece.text for piece in pieces)
                held += pieces
                ready = 0 if answer.ended else len(held) - answer.may_end
                yield b"".join(_event(body, answer, pair) for pair in _by_token(held[:ready]))
                held = held[ready:]
        if unfinished := _unfinished(answer):
            raise unfinished
    except AdapterServerError as error:
        yield data(worded(error)[1])
        return
    *before, last = _by_token(held)
    for pair in before:
        yield _event(body, answer, pair)
    yield _event(body, answer, last, _full(body, text), _ending(answer) if body.how.details else None)


def _event(
    body: LoraxBody, answer: Answer, pair: tuple[Token, str], text: str | None = None, details: Json | None = None
) -> bytes:
    return data({"token": _token(body, answer, *pair), "generated_text": text, "details": details})
