"""What a request's body may hold. Every number has a range, every list and text a cap, and all of it a shape.

Unknown fields are refused in our own dialect, and left alone in those of others (`Lenient`).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from adapter_server.core import Constraint
from adapter_server.errors import InvalidRequest

MAX_IDS = 1 << 20
MAX_DEPTH = 64  # of lists and objects within each other
MAX_PARTS = 200_000  # texts and brackets of one body
_PARTS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[][{}]', re.DOTALL)  # a text without an end runs to the end
_SUBJECT = re.compile(r"^\w+ should")  # the field's name stands there already
_STEP = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_IDS, fail_fast=True)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
AdapterRef = Annotated[str, Field(max_length=256)]
MemberName = Annotated[AdapterRef, Field(min_length=1)]  # never the base
Effect = Annotated[float, Field(ge=-100, le=100)]
ModeChoice = Literal["auto", "unmerged", "merged"]
TaskId = Annotated[int, Field(ge=0, lt=1 << 31)]
MOST_NEW = 1 << 20
NewTokens = Annotated[int, Field(ge=1, le=MOST_NEW)]
Temperature = Annotated[float, Field(ge=0, le=100)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=0, lt=1 << 31)]
MinP = Annotated[float, Field(ge=0, le=1)]
Repetition = Annotated[float, Field(ge=0.01, le=100)]  # what a smaller one divides by it is beyond float32
Penalty = Annotated[float, Field(ge=-100, le=100)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
MOST_STOPS = 16
Stop = StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)]
Alternatives = Annotated[int, Field(ge=0, le=20)]
MOST_BIASES = 1024
Biases = Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASES)]
GrammarText = Annotated[str, Field(max_length=1 << 20)]
Schema = dict[str, Any] | bool
ANY_OBJECT: Schema = {"type": "object"}
ENVELOPE = {"name", "description", "schema", "strict"}  # what OpenAI puts a schema into
STOPS = f"text or a list of at most {MOST_STOPS} texts of 1 to 256 characters"
BIASES = "an object of token ids, each with a number from -100 to 100"
FORMATS = 'an object with a "type", or null'
Parts = tuple["type[Strict]", ...]
Unions = Mapping[str, str]
NOT_YET = "is not supported yet: leave it out"


class Strict(BaseModel):
    """JSON types as they are, no infinities, no field that is not named here."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    parts: ClassVar[Parts] = ()  # the models nested in this one
    unions: ClassVar[Unions] = {}  # what a field of several types must be


class Lenient(Strict):
    """Fields that are not named here are left alone."""

    model_config = ConfigDict(extra="ignore")


class MemberBody(Strict):
    """One adapter of a weighted composition."""

    name: MemberName
    weight: Effect = 1.0


class ResponseFormat(Strict):
    """The form that an answer must have, in the words of every dialect."""

    unions: ClassVar[Unions] = {"json_schema": "a JSON schema", "schema": "a JSON schema"}

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: Schema | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None  # LoRAX's place for it
    regex: GrammarText | None = None
    grammar: GrammarText | None = None

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None and self.schema_ is None:
            raise ValueError("of type json_schema needs json_schema")
        if self.type in ("regex", "grammar") and not getattr(self, self.type):
            raise ValueError(f"of type {self.type} needs {self.type}")
        return self

    @property
    def constraint(self) -> Constraint | None:
        if self.type == "regex" and self.regex:
            return Constraint("regex", self.regex)
        if self.type == "grammar" and self.grammar:
            return Constraint("lark", self.grammar)
        return None if self.type == "text" else Constraint("json_schema", json.dumps(self._schema()))

    def _schema(self) -> Schema:
        given = self.json_schema if self.schema_ is None else self.schema_
        if self.type == "json_object" and self.schema_ is None:
            return ANY_OBJECT
        if isinstance(given, dict) and given.keys() <= ENVELOPE and given.keys() & {"name", "schema"}:
            given = given.get("schema")
        return ANY_OBJECT if given is None else given


class LenientFormat(ResponseFormat):
    """The same in dialects whose unknown fields are left alone."""

    model_config = ConfigDict(extra="ignore")


class GenerateBody(Strict):
    """The body of POST /generate."""

    parts: ClassVar[Parts] = (MemberBody, ResponseFormat)
    unions: ClassVar[Unions] = {
        "prompt": "text or a list of token ids",
        "adapter": 'a name, a list of {"name", "weight"}, or null for the base model',
        "stop": STOPS,
        "logit_bias": BIASES,
        "response_format": FORMATS,
    }

    prompt: str | TokenIds
    adapter: AdapterRef | Annotated[list[MemberBody], Field(min_length=1, max_length=8)] | None = None
    mode: ModeChoice = "auto"
    scale: Effect = 1.0
    task_id: TaskId | None = None
    max_new_tokens: NewTokens = 128
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: MinP = 0.0
    repetition_penalty: Repetition = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    seed: Seed | None = None
    stop: Stop | None = None
    logit_bias: Biases | None = None
    logprobs: Alternatives = 0
    prompt_logprobs: Alternatives = 0
    return_token_ids: bool = False
    ignore_eos: bool = False
    stream: bool = False
    response_format: ResponseFormat | None = None
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = None

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


def check_shape(data: bytes) -> None:
    """Refuses what would cost much to read, by brackets and quotes alone. Whether it is JSON is not looked at."""
    depth = 0
    for parts, match in enumerate(_PARTS.finditer(data), 1):
        depth += _STEP.get(match[0], 0)
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"the body is nested deeper than {MAX_DEPTH} levels: send it flat")
        if parts > MAX_PARTS:
            raise InvalidRequest(f"the body has more than {MAX_PARTS:,} texts and brackets: send fewer at once")


def parse(model: type[Body], data: bytes) -> Body:
    """The body, or InvalidRequest naming the field at fault."""
    check_shape(data)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(model, error.errors(include_url=False, include_input=False)) from None


def document(model: type[Strict], *examples: dict[str, Any]) -> dict[str, Any]:
    """The body as OpenAPI describes it. Nested models are written out: `$defs` would not resolve there."""
    schema = model.model_json_schema()
    nested = schema.pop("$defs", {})

    def write_out(part: Any) -> Any:
        if isinstance(part, dict):
            name = str(part.get("$ref", "")).removeprefix("#/$defs/")
            return write_out(nested[name]) if name else {key: write_out(value) for key, value in part.items()}
        return [write_out(value) for value in part] if isinstance(part, list) else part

    shown = {f"example {number}": {"value": value} for number, value in enumerate(examples, 1)}
    content = {"schema": write_out(schema)} | ({"examples": shown} if shown else {})
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def _refusal(model: type[Strict], errors: list[ErrorDetails]) -> InvalidRequest:
    """The first field at fault; of a union's branches the one that came farthest."""
    field = errors[0]["loc"][:1]
    fault = max(
        (e for e in errors if e["loc"][:1] == field), key=lambda e: (e["type"] == "too_long", len(_path(model, e)))
    )
    path = _path(model, fault)
    param = ".".join(path) or None
    return InvalidRequest(f"{param or 'the body'} {_reason(model, fault, path)}", param=param)


def _path(model: type[Strict], error: ErrorDetails) -> list[str]:
    """Where, without the union branches that pydantic puts between the names."""
    if not error["loc"]:
        return []
    first, *rest = error["loc"]
    known = {name for part in _nested(model) for name in part.model_fields}
    if error["type"] == "extra_forbidden":
        known.add(str(error["loc"][-1]))
    return [str(first), *(str(at) for at in rest if isinstance(at, int) or at in known)]


def _nested(model: type[Strict]) -> Iterator[type[Strict]]:
    yield model
    for part in model.parts:
        yield from _nested(part)


def _models(annotation: Any) -> Iterator[type[Strict]]:
    """Those in a field's type."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _reason(model: type[Strict], error: ErrorDetails, path: list[str]) -> str:
    kind = error["type"]
    if kind == "extra_forbidden":
        owner = model if len(path) == 1 else next(_models(model.model_fields[path[0]].annotation), model)
        return _unknown(path[-1], owner)
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind.startswith("json_"):
        return f"is not valid JSON: {error['ctx']['error']}"
    unions = {name: text for part in _nested(model) for name, text in part.unions.items()}
    if kind.endswith(("_type", "_parsing")) and path and path[-1] in unions:
        return f"must be {unions[path[-1]]}"
    said = _SUBJECT.sub("should", error["msg"]).replace(" after validation", "")
    return said.replace("Field required", "is required")


def _unknown(name: str, model: type[Strict]) -> str:
    known = [field.alias or name for name, field in model.model_fields.items()]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return f"is not a field of this request; {hint}"
