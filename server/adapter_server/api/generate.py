"""POST /generate, whole or as Server-Sent Events. Nothing is sent before the first event of the engine is here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from adapter_server.api import access, lorax
from adapter_server.api.answer import Answer, Piece, begin, finite, logprob_of
from adapter_server.api.described import GENERATED, STREAMED
from adapter_server.api.refusals import error_shape
from adapter_server.api.schemas import GenerateBody, document, parse
from adapter_server.api.service import note, service_of
from adapter_server.api.sse import EventStream, data, quote, reply
from adapter_server.core import Token
from adapter_server.errors import AdapterServerError

router = APIRouter(dependencies=[Depends(access.inference)])


@router.post(
    "/generate",
    summary="Generate text with an adapter, a composition, or the base model",
    openapi_extra=document(
        GenerateBody,
        {"prompt": "red cat>", "max_new_tokens": 16},
        {"prompt": "red cat>", "max_new_tokens": 16, "stream": True},
    ),
    responses=GENERATED | STREAMED,
)
async def generate(request: Request) -> Response:
    """One JSON answer, or with `stream` Server-Sent Events. A body in LoRAX's form gets LoRAX's answer."""
    raw = await request.body()
    if lorax.spoken(raw):
        return await lorax.generate(request, raw)
    body = parse(GenerateBody, raw)
    answer = await begin(service_of(request), body, request)
    if body.stream:
        note(request, server_timing=answer.server_timing)
        return EventStream(_events(answer))
    content = await _whole(answer)
    note(request, server_timing=answer.server_timing)
    return reply(content)


async def _events(answer: Answer) -> AsyncIterator[bytes]:
    try:
        async with aclosing(answer.steps()) as steps:
            prompt = _prompt_logprobs(answer)
            async for pieces in steps:
                if prompt or answer.body.logprobs:
                    yield b"".join(data(_event(answer, piece) | prompt) for piece in pieces)
                else:
                    yield b"".join(_plain(answer, piece) for piece in pieces)
                prompt = {} if pieces else prompt
    except AdapterServerError as error:
        yield data(error_shape(error))
        return
    yield data(_summary(answer))


def _plain(answer: Answer, piece: Piece) -> bytes:
    """The event of most tokens, put together by hand: it is written for every one."""
    ids = f',"token_ids":[{piece.token.id if piece.token else ""}]' if answer.body.return_token_ids else ""
    return f'data: {{"index":{piece.index},"text":{quote(piece.text)}{ids}}}\n\n'.encode()


def _event(answer: Answer, piece: Piece) -> dict[str, Any]:
    event: dict[str, Any] = {"index": piece.index, "text": piece.text}
    if answer.body.return_token_ids:
        event["token_ids"] = [piece.token.id] if piece.token else []
    if answer.body.logprobs:
        event["logprobs"] = [_logprob(answer, piece.token)] if piece.token else []
    return event


async def _whole(answer: Answer) -> dict[str, Any]:
    pieces = [piece async for step in answer.steps() for piece in step]
    content = {"text": "".join(piece.text for piece in pieces)} | _summary(answer)
    tokens = [piece.token for piece in pieces if piece.token]
    if answer.body.return_token_ids:
        content["token_ids"] = [token.id for token in tokens]
    if answer.body.logprobs:
        content["logprobs"] = [_logprob(answer, token) for token in tokens]
    return content | _prompt_logprobs(answer)


def _prompt_logprobs(answer: Answer) -> dict[str, Any]:
    """One for each token of the prompt, `null` for the first; nothing where none were asked for."""
    tokens = answer.prompt_tokens
    return {"prompt_logprobs": [None, *(_logprob(answer, token) for token in tokens[1:])]} if tokens else {}


def _summary(answer: Answer) -> dict[str, Any]:
    """The fields that are known at the end."""
    return {
        "finish_reason": answer.finish_reason,
        "adapter": answer.adapter or None,
        "adapter_version": answer.version or None,
        "mode": answer.end.mode or answer.request.mode,
        "usage": {
            "prompt_tokens": len(answer.request.prompt),
            "completion_tokens": answer.completion_tokens,
            "cached_tokens": answer.end.cached_tokens,
        },
        "timing": answer.timing,
    }


def _logprob(answer: Answer, token: Token) -> dict[str, Any]:
    top = [_choice(answer, id, finite(value)) for id, value in token.top]
    return _choice(answer, token.id, logprob_of(token)) | {"top": top}


def _choice(answer: Answer, id: int, value: float) -> dict[str, Any]:
    return {"token_id": id, "text": answer.text.token(id), "logprob": value}
