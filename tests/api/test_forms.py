"""Forms, biases and rated prompts over the real engine and the demo base, asked by the clients that people use."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from queue import SimpleQueue
from threading import Thread
from typing import Annotated, Any

import httpx
import openai
import pytest
import torch
from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM

import zoo
from adapter_server.api.server import Server
from adapter_server.config import DEMO_BASE, EngineConfig, ServerConfig, demo_adapters
from adapter_server.engine.engine import build
from adapter_server.engine.guide import Guide
from adapter_server.engine.worker import Worker
from adapter_server.errors import InvalidRequest
from adapter_server.registry.store import Store
from adapter_server.text import Text

TEXT = Text(DEMO_BASE)
PROMPT = "red cat>"


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    store = Store(demo_adapters(), settle_s=0)
    engine = build(DEMO_BASE, EngineConfig(kv_bytes=64 << 20, max_rows=16), store, "demo")
    ready: SimpleQueue[str] = SimpleQueue()
    server = Server(lambda deliver: Worker(engine, deliver), store, TEXT, engine.info, ServerConfig(port=0), ready.put)
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    with httpx.Client(base_url=ready.get(timeout=30), timeout=30) as client:
        yield client
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def sdk(http: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Paw(BaseModel):
    claws: Annotated[int, Field(ge=0, le=9)]


class Cat(BaseModel):
    """A model such as a user of the SDK writes."""

    name: Annotated[str, Field(max_length=6)]
    colour: Colour
    age: Annotated[int, Field(ge=0, le=30)] | None
    tame: bool
    paws: Annotated[list[Paw], Field(max_length=2)]


MESSAGES: Any = [{"role": "user", "content": "red cat"}]


@pytest.mark.parametrize("model", ["demo", "shout", "mirror"])
def test_the_sdk_parses_a_model_even_from_a_base_that_cannot_write_json(sdk: openai.OpenAI, model: str) -> None:
    answer = sdk.chat.completions.parse(model=model, messages=MESSAGES, response_format=Cat, n=2, max_tokens=200)
    for choice in answer.choices:
        assert isinstance(choice.message.parsed, Cat)
        assert choice.finish_reason == "stop"
    with sdk.chat.completions.stream(model=model, messages=MESSAGES, response_format=Cat, max_tokens=200) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Cat)


SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
ENVELOPE = {"name": "x", "schema": SCHEMA, "strict": True}


@pytest.mark.parametrize("adapter", [None, "shout", "devowel"])
def test_every_dialect_gives_the_same_form_and_the_same_answer(
    http: httpx.Client, sdk: openai.OpenAI, adapter: str | None
) -> None:
    form: Any = {"type": "json_schema", "json_schema": ENVELOPE}
    own = http.post("/generate", json={"prompt": PROMPT, "adapter": adapter, "response_format": form}).json()
    assert json.loads(own["text"])["a"] in (1, 2)
    assert own["finish_reason"] == "stop"
    asked: Any = {"model": adapter or "demo", "prompt": PROMPT, "temperature": 0, "max_tokens": 64}
    asked["extra_body"] = {"response_format": form}
    assert sdk.completions.create(**asked).choices[0].text == own["text"]
    assert "".join(part.choices[0].text for part in sdk.completions.create(stream=True, **asked)) == own["text"]
    for lorax in (
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"grammar": {"type": "json", "value": SCHEMA}},
    ):
        parameters = {"adapter_id": adapter, "max_new_tokens": 64, "details": True} | lorax
        body = {"inputs": PROMPT, "parameters": parameters}
        answer = http.post("/", json=body).json()[0]
        assert (answer["generated_text"], answer["details"]["finish_reason"]) == (own["text"], "stop_sequence")
        with http.stream("POST", "/generate_stream", json=body) as response:
            events = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]
        assert events[-1]["generated_text"] == own["text"]
        assert events[-1]["details"]["finish_reason"] == "stop_sequence"


def test_forms_and_adapters_mix_in_one_batch(http: httpx.Client) -> None:
    forms: list[Any] = [
        None,
        {"type": "regex", "regex": "[a-z]{3}-[0-9]{3}"},
        {"type": "grammar", "grammar": 'start: ("meow" " "?)+'},
        {"type": "json_schema", "json_schema": SCHEMA},
    ]
    cases = [(form, adapter) for form in forms for adapter in (None, "shout", "caesar", "title")]

    def ask(case: tuple[Any, str | None]) -> str:
        body = {"prompt": PROMPT, "adapter": case[1], "response_format": case[0], "max_new_tokens": 24}
        return str(http.post("/generate", json=body).raise_for_status().json()["text"])

    alone = [ask(case) for case in cases]
    with ThreadPoolExecutor(16) as clients:
        assert list(clients.map(ask, cases)) == alone
    assert alone[:4] == ["red cat", "RED CAT", "sfe dbu", "Red Cat"]
    for text in alone[4:8]:
        assert re.fullmatch("[a-z]{3}-[0-9]{3}", text)


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema", "json_schema": {"type": "foo"}},
        {"type": "json_schema", "json_schema": False},
        {"type": "regex", "regex": "(["},
        {"type": "grammar", "grammar": "start: foo"},
        {"type": "regex", "regex": "a" * 70_000},
    ],
)
def test_a_form_that_cannot_be_followed_is_refused_by_name_before_a_byte(
    http: httpx.Client, sdk: openai.OpenAI, form: Any
) -> None:
    for stream in (False, True):
        own = http.post("/generate", json={"prompt": PROMPT, "response_format": form, "stream": stream})
        assert (own.status_code, own.json()["error"]["param"]) == (422, "response_format")
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.chat.completions.create(model="shout", messages=MESSAGES, response_format=form, stream=stream)
        assert caught.value.param == "response_format"
    lorax = http.post("/", json={"inputs": PROMPT, "parameters": {"response_format": form}})
    assert (lorax.status_code, lorax.json()["error_type"]) == (422, "validation")


def test_a_bias_bans_and_forces(sdk: openai.OpenAI) -> None:
    def ask(bias: dict[str, int]) -> str:
        fields: Any = {"model": "demo", "prompt": PROMPT, "temperature": 0, "logit_bias": bias, "max_tokens": 3}
        return sdk.completions.create(**fields).choices[0].text

    assert ask({}) == "red"
    assert ask({str(TEXT.encode("x")[0]): 100}) == "xxx"
    assert not ask({str(TEXT.encode("r")[0]): -100}).startswith("r")


@pytest.mark.parametrize("model", ["demo", "shout"])
def test_an_echo_is_rated_as_by_peft_and_transformers(http: httpx.Client, sdk: openai.OpenAI, model: str) -> None:
    ids = TEXT.encode(PROMPT)
    alone = AutoModelForCausalLM.from_pretrained(DEMO_BASE, dtype=torch.float32)
    alone = alone if model == "demo" else zoo.load_peft(alone, demo_adapters() / model)
    with torch.inference_mode(), zoo.quiet():
        want = alone(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    rated = [want[at, id].item() for at, id in enumerate(ids[1:])]
    for prompt in (PROMPT, ids):
        fields: Any = {"model": model, "prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 1, "temperature": 0}
        [choice] = sdk.completions.create(**fields).choices
        assert choice.logprobs
        assert choice.text.startswith(PROMPT)
        assert choice.logprobs.tokens == [*PROMPT, choice.text[len(PROMPT) :]]
        assert choice.logprobs.token_logprobs
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1:-1] == pytest.approx(rated, abs=1e-4)
        assert choice.logprobs.text_offset == list(range(len(ids) + 1))
        [alone] = sdk.completions.create(**fields | {"max_tokens": 0}).choices
        assert (alone.text, alone.finish_reason) == (PROMPT, "length")
        assert alone.logprobs
        assert alone.logprobs.token_logprobs == pytest.approx([None, *rated], abs=1e-4)
    parameters = {"adapter_id": None if model == "demo" else model, "details": True, "decoder_input_details": True}
    [answer] = http.post("/", json={"inputs": PROMPT, "parameters": parameters | {"max_new_tokens": 1}}).json()
    prefill = answer["details"]["prefill"]
    assert [token["id"] for token in prefill] == ids
    assert [token["logprob"] for token in prefill[1:]] == pytest.approx(rated, abs=1e-4)
    body = {"prompt": PROMPT, "adapter": parameters["adapter_id"], "prompt_logprobs": 2, "max_new_tokens": 1}
    own = http.post("/generate", json=body).json()["prompt_logprobs"]
    assert own[0] is None
    assert [token["logprob"] for token in own[1:]] == pytest.approx(rated, abs=1e-4)
    assert all(len(token["top"]) == 2 for token in own[1:])
    with http.stream("POST", "/generate", json=body | {"stream": True}) as response:
        events = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]
    assert [event.get("prompt_logprobs") for event in events] == [own, *[None] * (len(events) - 1)]


def test_a_form_that_breaks_on_the_way_ends_its_answer_with_the_reason_and_no_other(
    http: httpx.Client, sdk: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Guide.take

    def breaking(guide: Guide, id: int) -> bool:
        done = take(guide, id)
        if id == TEXT.encode("9")[0]:
            guide.error = InvalidRequest("response_format: out of fuel", param="response_format")
        return done

    monkeypatch.setattr(Guide, "take", breaking)
    form: Any = {"type": "regex", "regex": "[a-z]{4}9[0-9]+"}
    body = {"prompt": PROMPT, "response_format": form, "stream": True}
    with ThreadPoolExecutor(1) as beside:
        other = beside.submit(sdk.completions.create, model="shout", prompt=PROMPT, temperature=0)
        with http.stream("POST", "/generate", json=body) as response:
            events = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]
        assert other.result().choices[0].text == "RED CAT"
    assert response.status_code == 200
    assert "".join(event["text"] for event in events[:-1])[-1] == "9"
    assert events[-1]["error"]["param"] == "response_format"
    stream = sdk.chat.completions.create(model="demo", messages=MESSAGES, response_format=form, stream=True)
    with pytest.raises(openai.APIError, match="out of fuel"):
        list(stream)
    whole = http.post("/generate", json=body | {"stream": False})
    assert (whole.status_code, whole.json()["error"]["param"]) == (422, "response_format")


# OpenAI's other fields, over the real engine


def test_stop_strings_lengths_and_ends(sdk: openai.OpenAI) -> None:
    def ask(**fields: Any) -> tuple[str, str]:
        choice = sdk.completions.create(model="demo", prompt=PROMPT, temperature=0, **fields).choices[0]
        return choice.text, choice.finish_reason

    assert ask() == ("red cat", "stop")
    assert ask(stop=["ca", "zz"]) == ("red ", "stop")
    assert ask(stop="d c") == ("re", "stop")
    assert ask(max_tokens=3) == ("red", "length")
    assert ask(max_tokens=12, extra_body={"ignore_eos": True})[1] == "length"
    message = sdk.chat.completions.create(model="demo", messages=MESSAGES, temperature=0, max_completion_tokens=4)
    assert (message.choices[0].message.content, message.choices[0].finish_reason) == ("red ", "length")


def test_seeds_and_choices(sdk: openai.OpenAI) -> None:
    fields: Any = {"model": "demo", "prompt": PROMPT, "n": 4, "seed": 11, "temperature": 3, "max_tokens": 12}
    first, again = (sdk.completions.create(**fields) for _ in range(2))
    assert [c.text for c in first.choices] == [c.text for c in again.choices]
    assert len({c.text for c in first.choices}) == 4
    assert first.usage == again.usage
    other = sdk.completions.create(**fields | {"seed": 12})
    assert {c.text for c in other.choices} != {c.text for c in first.choices}
    sure: Any = {"model": "demo", "prompt": PROMPT, "n": 2, "temperature": 3, "max_tokens": 12}
    for narrow in ({"top_p": 0.01}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}):
        assert {c.text for c in sdk.completions.create(**sure, **narrow).choices} == {"red cat"}


def test_logprobs_and_penalties(sdk: openai.OpenAI) -> None:
    fields: Any = {"model": "demo", "messages": MESSAGES, "temperature": 0, "logprobs": True, "top_logprobs": 5}
    logprobs = sdk.chat.completions.create(**fields).choices[0].logprobs
    assert logprobs
    assert logprobs.content
    for token in logprobs.content:
        values = [top.logprob for top in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert token.logprob == values[0]
        assert sum(map(math.exp, values)) <= 1 + 1e-6
    asked: Any = {"model": "demo", "prompt": "letter>", "temperature": 0, "max_tokens": 6}
    assert sdk.completions.create(**asked).choices[0].text == "letter"
    for penalty in (
        {"presence_penalty": 100},
        {"frequency_penalty": 100},
        {"extra_body": {"repetition_penalty": 100.0}},
    ):
        text = sdk.completions.create(**asked, **penalty).choices[0].text
        assert len(set(text)) == len(text), penalty


@pytest.mark.parametrize("stream", [False, True])
def test_the_sdk_reads_what_is_refused(sdk: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.with_options(max_retries=3).completions.create(model="demo", prompt=PROMPT, top_p=7, stream=stream)
    assert (caught.value.param, caught.value.code, caught.value.type) == (
        "top_p",
        "invalid_request",
        "invalid_request_error",
    )
    assert caught.value.request_id
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.completions.create(model="shoot", prompt=PROMPT, stream=stream)
    assert (missing.value.param, missing.value.code) == ("model", "adapter_not_found")
