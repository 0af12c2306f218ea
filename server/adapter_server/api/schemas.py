"""What a request's body may hold. Every number has a range, every list and text a cap; unknown fields are refused."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from adapter_server.errors import InvalidRequest

MAX_IDS = 1 << 20
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(max_length=MAX_IDS, fail_fast=True)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
AdapterRef = Annotated[str, Field(max_length=256)]
Effect = Annotated[float, Field(ge=-100, le=100)]
ModeChoice = Literal["auto", "unmerged", "merged"]

UNIONS = {
    "prompt": "text or a list of token ids",
    "adapter": 'a name, a list of {"name", "weight"}, or null for the base model',
    "stop": "text or a list of at most 16 texts of 1 to 256 characters",
}


class Strict(BaseModel):
    """JSON types as they are, no infinities, no field that is not named here."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class MemberBody(Strict):
    """One adapter of a weighted composition."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    weight: Effect = 1.0


class GenerateBody(Strict):
    """The body of POST /generate."""

    prompt: str | TokenIds
    adapter: AdapterRef | Annotated[list[MemberBody], Field(min_length=1, max_length=8)] | None = None
    mode: ModeChoice = "auto"
    scale: Effect = 1.0
    task_id: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 128
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    return_token_ids: bool = False
    ignore_eos: bool = False
    stream: bool = False
    response_format: Any = None
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = None

    @field_validator("response_format")
    @classmethod
    def _no_format(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("is not supported yet: leave it out")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class TokenizeBody(Strict):
    """The body of POST /tokenize."""

    prompt: str


class DetokenizeBody(Strict):
    """The body of POST /detokenize."""

    token_ids: TokenIds


Body = TypeVar("Body", bound=Strict)


def parse(model: type[Body], data: bytes) -> Body:
    """The body, or InvalidRequest naming the field at fault."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(model, error.errors(include_url=False, include_input=False)) from None


def document(model: type[Strict]) -> dict[str, Any]:
    """The body as OpenAPI describes it. Nested models are written out: `$defs` would not resolve there."""
    schema = model.model_json_schema()
    nested = schema.pop("$defs", {})

    def write_out(part: Any) -> Any:
        if isinstance(part, dict):
            name = str(part.get("$ref", "")).removeprefix("#/$defs/")
            return write_out(nested[name]) if name else {key: write_out(value) for key, value in part.items()}
        return [write_out(value) for value in part] if isinstance(part, list) else part

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": write_out(schema)}}}}


def _refusal(model: type[Strict], errors: list[ErrorDetails]) -> InvalidRequest:
    """The first field at fault; of a union's branches the one that came farthest."""
    field = errors[0]["loc"][:1]
    fault = max((e for e in errors if e["loc"][:1] == field), key=lambda e: len(_path(e)))
    path = _path(fault)
    param = ".".join(path) or None
    return InvalidRequest(f"{param or 'the body'} {_reason(model, fault, path)}", param=param)


def _path(error: ErrorDetails) -> list[str]:
    """Where, without the union branches that pydantic puts between the names."""
    first, *rest = error["loc"] or ("",)
    known = {*GenerateBody.model_fields, *MemberBody.model_fields}
    if error["type"] == "extra_forbidden":
        known.add(str(error["loc"][-1]))
    return [str(first), *(str(at) for at in rest if isinstance(at, int) or at in known)] if first else []


def _reason(model: type[Strict], error: ErrorDetails, path: list[str]) -> str:
    kind = error["type"]
    if kind == "extra_forbidden":
        return _unknown(path[-1], MemberBody if len(path) > 1 else model)
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind.startswith("json_"):
        return f"is not valid JSON: {error['ctx']['error']}"
    if kind.endswith("_type") and len(path) == 1 and path[0] in UNIONS:
        return f"must be {UNIONS[path[0]]}"
    return error["msg"].replace("Input should", "should").replace("Field required", "is required")


def _unknown(name: str, model: type[Strict]) -> str:
    near = difflib.get_close_matches(name, model.model_fields, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(model.model_fields)}"
    return f"is not a field of this request; {hint}"
