"""Errors as answers: {"error": {"message", "type", "param", "code"}}, or as the dialect of the route words them."""

from __future__ import annotations

import math
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from adapter_server.api.service import service_of
from adapter_server.errors import AdapterServerError, BodyTooLarge, BodyTooSlow, HeadersTooLarge

Wording = Callable[[AdapterServerError], tuple[int, dict[str, Any]]]  # the status and the body of a refusal
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    424: "adapter_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}
CODES = {404: "not_found", 405: "method_not_allowed"}
RETRY = (429, 503)
LAST = (BodyTooLarge, BodyTooSlow, HeadersTooLarge)  # what is left of the request is not read: the connection ends


def shape(message: str, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """The one shape."""
    kind = TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_shape(error: AdapterServerError) -> dict[str, Any]:
    return shape(error.message, error.status, error.code, error.param)


def plainly(error: AdapterServerError) -> tuple[int, dict[str, Any]]:
    """Our own wording."""
    return error.status, error_shape(error)


def speak(request: Request, wording: Wording) -> None:
    """From here on this request is refused in these words."""
    request.scope["wording"] = wording


def ended_by(scope: Scope, error: AdapterServerError) -> AdapterServerError:
    """Says that an admitted request ended this way: it is counted among the requests, not among the refused ones."""
    scope["ended_by"] = error
    return error


def answer(error: AdapterServerError, wording: Wording = plainly) -> JSONResponse:
    """The answer to a refused request, with Retry-After where trying again helps."""
    status, content = wording(error)
    headers = {}
    if status in RETRY:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after or 1)))
    if status == 500:
        headers["x-should-retry"] = "false"  # OpenAI's clients would ask again
    if isinstance(error, LAST):
        headers["connection"] = "close"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(content, status, headers)


def plain_answer(status: int, message: str | None = None) -> JSONResponse:
    """For what no route was asked: unknown paths, wrong methods."""
    phrase = HTTPStatus(status).phrase
    code = CODES.get(status, phrase.lower().replace(" ", "_"))
    return JSONResponse(shape(message or phrase, status, code), status)


def crash(request_id: str, wording: Wording) -> JSONResponse:
    """For our own mistakes: the log has the rest."""
    return answer(AdapterServerError(f"this request failed inside; its id in the log is {request_id}"), wording)


async def _typed(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, AdapterServerError):
        raise error
    if error is not request.scope.get("ended_by"):
        service_of(request).metrics.refuse(error.code)
    return answer(error, request.scope["wording"])


async def _http(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    response = plain_answer(error.status_code, _unrouted(request, error) or error.detail)
    response.headers.update(error.headers or {})
    return response


def _unrouted(request: Request, error: HTTPException) -> str | None:
    """What there is not, and what there is."""
    asked = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        return f"there is no {asked}: ask with {(error.headers or {}).get('Allow', 'another method')}"
    return f"there is no route {asked}" if error.status_code == 404 else None


def install(app: FastAPI) -> None:
    """Makes the app answer every refusal in this shape."""
    app.add_exception_handler(AdapterServerError, _typed)
    app.add_exception_handler(HTTPException, _http)
