"""What OpenAPI says of answers: every status that a route can have, and the shape of its refusals."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, ConfigDict

Responses = dict[int | str, dict[str, Any]]
EVENTS = "text/event-stream"


class Fault(BaseModel):
    """What is wrong, and what to do."""

    model_config = ConfigDict(extra="forbid")
    message: str
    type: str
    param: str | None
    code: str


class Refusal(BaseModel):
    """The one shape of a refusal."""

    model_config = ConfigDict(extra="forbid")
    error: Fault


class LoraxRefusal(BaseModel):
    """The same in LoRAX's words."""

    model_config = ConfigDict(extra="forbid")
    error: str
    error_type: str


def refused(*statuses: int, shape: Any = Refusal) -> Responses:
    """These statuses, each a refusal of this shape."""
    return {status: {"model": shape, "description": HTTPStatus(status).phrase} for status in statuses}


def answered(*media: str, why: str = "The answer") -> Responses:
    """A 200 of these media types."""
    return {200: {"description": why, "content": {kind: {"schema": {}} for kind in media}}}


ANYWHERE = refused(403, 408, 413, 431, 500)  # a foreign Host header, too slow, too large, a mistake of ours
KEYED = refused(401)
# What can be wrong with a prompt, its adapter, the engine.
ASKED = (401, 403, 404, 408, 413, 424, 429, 431, 500, 503, 504)
GENERATED = refused(422, *ASKED, shape=Refusal | LoraxRefusal)
COMPLETED = refused(400, *ASKED)
STREAMED = answered(EVENTS, why="An answer, or its events where a stream is asked for")
PLAIN = answered("text/plain")
