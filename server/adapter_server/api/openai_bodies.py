"""What a body in OpenAI's dialect may hold, and what it asks for in our own words."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, field_validator

from adapter_server.api.schemas import (
    BIASES,
    FORMATS,
    MOST_NEW,
    NOT_YET,
    STOPS,
    AdapterRef,
    Alternatives,
    Biases,
    Effect,
    GenerateBody,
    Lenient,
    LenientFormat,
    MinP,
    ModeChoice,
    NewTokens,
    Parts,
    Penalty,
    Repetition,
    Seed,
    Stop,
    TaskId,
    Temperature,
    TokenIds,
    TopK,
    TopP,
    Unions,
)
from adapter_server.errors import InvalidRequest

MOST_CHOICES = 128
PASSED = (  # fields that mean the same in both dialects
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "ignore_eos", "mode", "scale", "task_id"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "response_format"),
)
Ids = Sequence[int]
Item = TypeVar("Item")
Some = Annotated[list[Item], Field(max_length=MOST_CHOICES)]


class CompletionAsk(GenerateBody):
    """Our own body, with the defaults of a completion."""

    temperature: Temperature = 1.0
    max_new_tokens: NewTokens = 16


class ChatAsk(GenerateBody):
    """The same for a chat, whose answer may fill the context."""

    temperature: Temperature = 1.0
    max_new_tokens: NewTokens = MOST_NEW


class StreamOptions(Lenient):
    """What a stream has besides its text."""

    include_usage: bool = False


class CommonBody(Lenient):
    """The fields of both routes. `null` is as good as left out."""

    parts: ClassVar[Parts] = (StreamOptions, LenientFormat)
    unions: ClassVar[Unions] = {"stop": STOPS, "logit_bias": BIASES, "response_format": FORMATS}

    model: AdapterRef | None = None
    max_tokens: NewTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    response_format: LenientFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: Repetition | None = None
    ignore_eos: bool | None = None
    mode: ModeChoice | None = None
    scale: Effect | None = None
    task_id: TaskId | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    def passed(self) -> dict[str, Any]:
        """The fields that reach the engine as they are."""
        return {name: value for name in PASSED if (value := getattr(self, name)) is not None}


class CompletionBody(CommonBody):
    """The body of POST /v1/completions."""

    unions: ClassVar[Unions] = {**CommonBody.unions, "prompt": "text, token ids, or a list of either"}

    prompt: str | TokenIds | Some[str] | Some[TokenIds]
    max_tokens: Annotated[int, Field(ge=0, le=MOST_NEW)] | None = None  # 0: the prompt alone
    logprobs: Alternatives | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> list[str | Ids]:
        many = isinstance(self.prompt, list) and bool(self.prompt) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if many else [self.prompt]  # type: ignore[arg-type, list-item]

    def check(self) -> None:
        """What no field alone can say."""
        check_stream(self)
        if len(self.prompts) * self.choices > MOST_CHOICES:
            raise InvalidRequest(f"prompts times n can be at most {MOST_CHOICES}: ask in parts", param="prompt")
        if self.best_of is not None and self.best_of != self.choices:
            raise InvalidRequest("best_of is not supported: leave it out", param="best_of")
        if self.suffix:
            raise InvalidRequest("suffix is not supported: leave it out", param="suffix")

    def asked(self, prompt: Ids, adapter: str | None) -> list[GenerateBody]:
        """The requests that this prompt makes, one for each choice."""
        given = self.passed() | {"prompt": list(prompt), "adapter": adapter}
        if self.max_tokens is not None:
            given["max_new_tokens"] = max(1, self.max_tokens)  # the engine's least
        if self.logprobs is not None:
            given["logprobs"] = max(1, self.logprobs)  # 0 asks for the chosen token's own
            given["prompt_logprobs"] = given["logprobs"] if self.echo else 0
        return [CompletionAsk(**given | seeded) for seeded in seeds(self)]


class Part(Lenient):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Lenient):
    """A message of a conversation."""

    parts: ClassVar[Parts] = (Part,)
    unions: ClassVar[Unions] = {"content": 'text, or a list of {"type": "text", "text"}'}

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[Part], Field(max_length=4096)] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatBody(CommonBody):
    """The body of POST /v1/chat/completions."""

    parts: ClassVar[Parts] = (*CommonBody.parts, Message)

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: NewTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: Any = None
    functions: Any = None

    @field_validator("tools", "functions")
    @classmethod
    def _no_tools(cls, value: Any) -> None:
        if value:
            raise ValueError(NOT_YET)

    def check(self) -> None:
        """What no field alone can say."""
        check_stream(self)
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")

    def asked(self, prompt: Ids, adapter: str | None) -> list[GenerateBody]:
        """The requests that this conversation makes, one for each choice."""
        given = self.passed() | {"prompt": list(prompt), "adapter": adapter}
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if most is not None:
            given["max_new_tokens"] = most
        if self.logprobs:
            given["logprobs"] = max(1, self.top_logprobs or 0)
        return [ChatAsk(**given | seeded) for seeded in seeds(self)]


def check_stream(body: CommonBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")


def seeds(body: CommonBody) -> list[dict[str, int]]:
    """A seed for each choice: the first has the one given, the others seeds that follow from it."""
    if body.seed is None:
        return [{}] * body.choices
    return [{"seed": derived(body.seed, number)} for number in range(body.choices)]


def derived(seed: int, number: int) -> int:
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1 if number else seed


def adapter_of(model: str | None, base: str) -> str | None:
    """The adapter that `model` means: its name, `base:name`, or none for the base itself."""
    return model.removeprefix(f"{base}:") if model else None
