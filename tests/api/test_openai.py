"""OpenAI's dialect, asked by OpenAI's own client: fields, streams, models, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adapter_server.api.openai_bodies import derived
from adapter_server.core import Constraint, Request
from adapter_server.errors import AdapterServerError, RequestFailed
from adapter_server.text import Text
from fakes import save_byte_tokenizer
from serving import Served, serving

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, adapters: Path) -> Iterator[Served]:
    """A server whose base has a chat template."""
    folder = save_byte_tokenizer(tmp_path_factory.mktemp("chatty"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with serving(Text(folder), adapters) as served:
        yield served


@pytest.fixture(scope="module")
def sdk(shared: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{shared.server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(served: Served, **fields: Any) -> httpx.Response:
    return served.http.post("/v1/completions", json={"model": "tiny-base", "prompt": "ab", **fields})


def chat(served: Served, *said: str, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": text} for text in said or ("ab",)]
    return served.http.post("/v1/chat/completions", json={"model": "tiny-base", "messages": messages, **fields})


def refused(response: httpx.Response, status: int, param: str | None, code: str = "invalid_request") -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["param"], error["code"]) == (status, param, code), error
    assert response.headers["x-request-id"]
    return str(error["message"])


def ids(text: str) -> list[int]:
    """As the tokenizer of bytes numbers printable letters."""
    return [ord(letter) - ord("!") for letter in text]


# Models


def test_models_are_the_base_and_its_adapters(served: Served, sdk: openai.OpenAI) -> None:
    cards = {card.id: card for card in sdk.models.list()}
    assert [name for name in cards if name != "broken"] == [
        "tiny-base",
        "pirate",
        "prefix",
        "prefix2",
        "shout",
        "tasks",
    ]
    assert cards["tiny-base"].parent is None  # type: ignore[attr-defined]
    assert {card.parent for name, card in cards.items() if name != "tiny-base"} == {"tiny-base"}  # type: ignore[attr-defined]
    assert all(card.root == name for name, card in cards.items())  # type: ignore[attr-defined]
    assert str(served.adapters) not in served.http.get("/v1/models").text


@pytest.mark.parametrize(
    ("asked", "id"), [("shout", "shout"), ("tiny-base:shout", "shout"), ("tiny-base", "tiny-base")]
)
def test_a_model_is_found_by_the_names_that_requests_use(sdk: openai.OpenAI, asked: str, id: str) -> None:
    assert sdk.models.retrieve(asked).id == id


def test_an_unknown_model_is_404(served: Served, sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.models.retrieve("shoot")
    assert (caught.value.param, caught.value.code) == ("model", "adapter_not_found")
    assert "nearest: shout" in refused(complete(served, model="shoot"), 404, "model", "adapter_not_found")
    refused(served.http.get("/v1/models/broken"), 424, "model", "adapter_refused")


# Completions


def test_a_completion_has_all_fields(served: Served, sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(model="shout", prompt="red cat>")
    assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", "shout", "cmpl-")
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == ("red cat>", "stop", 0, None)
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (8, 9, 17)
    version = served.worker.requests[-1].members[0].spec.version
    assert answer.system_fingerprint == f"fp_{version}"


@pytest.mark.parametrize(
    ("model", "members"),
    [
        ("shout", ["shout"]),
        ("tiny-base:shout", ["shout"]),
        ("tiny-base", []),
        ("tiny-base:", []),
        ("", []),
        (None, []),
    ],
)
def test_the_model_names_the_adapter(served: Served, model: str | None, members: list[str]) -> None:
    response = complete(served, model=model)
    assert response.json()["model"] == (model or "tiny-base")
    assert [member.spec.name for member in served.worker.requests[-1].members] == members
    assert response.headers["x-adapter"] == (members or ["base"])[0]


def test_every_field_reaches_the_engine(served: Served, sdk: openai.OpenAI) -> None:
    plain = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "presence_penalty": 0.1, "frequency_penalty": 0.2}
    extra = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True}
    more = {"mode": "unmerged", "scale": 0.5, "unknown": 1, "user": "me", "logit_bias": {"5": -100, "7": 2.5}}
    more["response_format"] = {"type": "regex", "regex": "a+", "unknown": 1}
    sdk.completions.create(model="shout", prompt="ab", max_tokens=2, **plain, extra_body=extra | more)  # type: ignore[call-overload]
    request = served.worker.requests[-1]
    assert {name: getattr(request.sampling, name) for name in plain | extra} == plain | extra
    assert request.sampling.max_new_tokens == 2
    assert request.sampling.logit_bias == ((5, -100.0), (7, 2.5))
    assert request.sampling.constraint == Constraint("regex", "a+")
    assert (request.members[0].weight, request.mode) == (0.5, "unmerged")


def test_defaults_are_openais(served: Served) -> None:
    complete(served)
    chat(served)
    first, second = (request.sampling for request in served.worker.requests)
    assert (first.temperature, first.max_new_tokens) == (1.0, 16)
    assert (second.temperature, second.max_new_tokens) == (1.0, 256 - len("user: ab\nassistant:"))
    complete(served, temperature=None, max_tokens=None, seed=None, stop=None, logprobs=None, stream=None, n=None)
    assert served.worker.requests[-1].sampling == first


@pytest.mark.parametrize(
    ("prompt", "texts", "read"),
    [
        ("ab", ["ab"], 2),
        (ids("abc"), ["abc"], 3),
        (["a", "bc"], ["a", "bc"], 3),
        ([ids("a"), ids("bc")], ["a", "bc"], 3),
    ],
)
def test_prompts_are_texts_or_tokens_one_or_many(served: Served, prompt: Any, texts: list[str], read: int) -> None:
    answer = complete(served, prompt=prompt).json()
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))
    assert answer["usage"]["prompt_tokens"] == read
    assert answer["usage"]["completion_tokens"] == read + len(texts)


def test_n_choices_have_seeds_that_follow_from_the_one_given(served: Served) -> None:
    answer = complete(served, prompt=["a", "b"], n=3, seed=7).json()
    assert [choice["text"] for choice in answer["choices"]] == ["a"] * 3 + ["b"] * 3
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 12,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    wanted = {7, derived(7, 1), derived(7, 2)}
    assert len(wanted) == 3
    assert {request.sampling.seed for request in served.worker.requests} == wanted


@pytest.mark.parametrize(("prompt", "text"), [("ab", "ab"), (ids("ab"), "ab")])
def test_echo_puts_the_prompt_first(served: Served, prompt: Any, text: str) -> None:
    assert complete(served, prompt=prompt, echo=True).json()["choices"][0]["text"] == text * 2
    parts = chunks(complete, served, prompt=prompt, echo=True)
    assert "".join(part["choices"][0]["text"] for part in parts) == text * 2


def test_a_stop_string_ends_a_choice(served: Served) -> None:
    choice = complete(served, prompt="hello world", stop=["o w"]).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hell", "stop")
    choice = complete(served, prompt="hello", max_tokens=2).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("he", "length")


def test_logprobs_of_a_completion(served: Served, sdk: openai.OpenAI) -> None:
    logprobs = sdk.completions.create(model="tiny-base", prompt="hé", logprobs=2).choices[0].logprobs
    assert logprobs
    assert logprobs.token_logprobs == [-0.5] * 4
    assert logprobs.text_offset == [0, 1, 1, 2]
    assert logprobs.tokens
    assert (logprobs.tokens[0], logprobs.tokens[-1]) == ("h", "</s>")
    assert logprobs.top_logprobs
    assert logprobs.top_logprobs[0] == {"h": -0.5}
    assert complete(served, logprobs=0).json()["choices"][0]["logprobs"]["top_logprobs"][0] == {"a": -0.5}


def test_an_echo_has_the_prompts_logprobs_too(served: Served, sdk: openai.OpenAI) -> None:
    choice = sdk.completions.create(model="tiny-base", prompt="hé!", echo=True, logprobs=2, max_tokens=1).choices[0]
    logprobs = choice.logprobs
    assert logprobs
    assert choice.text == "hé!h"
    assert logprobs.tokens
    assert [len(value or []) for value in (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs)] == [5] * 3
    assert logprobs.token_logprobs == [None] + [-0.5] * 4
    assert (logprobs.top_logprobs or [])[:2] == [None, {logprobs.tokens[1]: -0.5}]
    assert logprobs.text_offset == [0, 1, 1, 2, 3]
    assert [request.sampling.prompt_logprobs for request in served.worker.requests] == [2]
    parts = chunks(complete, served, prompt="hé!", echo=True, logprobs=2, max_tokens=1)
    streamed = [part["choices"][0]["logprobs"] for part in parts if part["choices"][0]["logprobs"]]
    for name, values in logprobs.model_dump().items():
        assert [value for each in streamed for value in each[name]] == values


@pytest.mark.parametrize("fields", [{}, {"echo": True}, {"echo": True, "logprobs": 2}, {"logprobs": 1}, {"n": 2}])
def test_no_tokens_at_all_may_be_asked_for(served: Served, sdk: openai.OpenAI, fields: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"model": "tiny-base", "prompt": "hé!", "max_tokens": 0, **fields}
    answer = sdk.completions.create(**asked)
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 0)
    for choice in answer.choices:
        assert (choice.text, choice.finish_reason) == ("hé!" if fields.get("echo") else "", "length")
        told = [None, -0.5, -0.5, -0.5] if fields.get("echo") else []
        assert (choice.logprobs.token_logprobs if choice.logprobs else None) == (told if "logprobs" in fields else None)
    parts = chunks(complete, served, **asked, stream_options={"include_usage": True})
    assert parts[-1]["usage"] == answer.usage.model_dump(exclude_none=True)
    for choice in answer.choices:
        mine = [part["choices"][0] for part in parts[:-1] if part["choices"][0]["index"] == choice.index]
        assert "".join(part["text"] for part in mine) == choice.text
        assert [part["finish_reason"] for part in mine if part["finish_reason"]] == ["length"]
        rated = [part["logprobs"] for part in mine if part["logprobs"]]
        assert rated == ([choice.logprobs.model_dump()] if choice.logprobs and choice.logprobs.tokens else [])


@pytest.mark.parametrize("many", [{}, {"n": 3}])
def test_server_timing_tells_where_the_time_went(served: Served, many: dict[str, Any]) -> None:
    for ask in (complete, chat):
        names = [span.split(";")[0] for span in ask(served, **many).headers["server-timing"].split(", ")]
        assert names == ["queue", "load", "ttft", "total"]
        assert ask(served, stream=True, **many).headers["server-timing"].startswith("ttft;dur=")


# Chats


def test_a_chat_goes_through_the_bases_own_template(served: Served, sdk: openai.OpenAI) -> None:
    parts: Any = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    answer = sdk.chat.completions.create(model="shout", messages=messages)
    said = "system: be brief\nuser: ab\nassistant:"
    assert (answer.choices[0].message.content, answer.choices[0].message.role) == (said, "assistant")
    assert (answer.object, answer.choices[0].finish_reason) == ("chat.completion", "stop")
    assert answer.usage
    assert answer.usage.prompt_tokens == len(said)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_chat_may_be_short(served: Served, field: str) -> None:
    assert chat(served, **{field: 3}).json()["choices"][0]["message"]["content"] == "use"


def test_logprobs_of_a_chat(sdk: openai.OpenAI) -> None:
    message: Any = [{"role": "user", "content": "é"}]
    choice = sdk.chat.completions.create(model="tiny-base", messages=message, logprobs=True, top_logprobs=1).choices[0]
    assert choice.logprobs
    assert choice.logprobs.content
    first = choice.logprobs.content[0]
    assert (first.token, first.logprob, first.bytes, len(first.top_logprobs)) == ("u", -0.5, [117], 1)
    assert any(token.bytes is None for token in choice.logprobs.content)


def test_a_base_without_a_template_says_so(text: Text, adapters: Path) -> None:
    with serving(text, adapters) as served:
        assert "no chat template" in refused(chat(served), 400, "messages")


# Streams


def chunks(ask: Any, served: Served, **fields: Any) -> list[dict[str, Any]]:
    lines = [line for line in ask(served, stream=True, **fields).text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("fields", [{}, {"n": 3, "seed": 1}, {"stop": "c"}, {"logprobs": 2}, {"max_tokens": 2}])
def test_a_streamed_completion_is_the_whole_one(served: Served, fields: dict[str, Any]) -> None:
    asked = {"prompt": ["hé abc", "日本 abc"], "max_tokens": 30} | fields
    whole = complete(served, **asked).json()
    parts = chunks(complete, served, **asked, stream_options={"include_usage": True})
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"] == whole["usage"]
    assert all(part["usage"] is None for part in parts[:-1])
    assert len({part["id"] for part in parts}) == 1
    for choice in whole["choices"]:
        own = [part["choices"][0] for part in parts[:-1] if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own if part["finish_reason"]] == [choice["finish_reason"]]
        if choice["logprobs"]:
            for name, values in choice["logprobs"].items():
                assert [value for part in own if part["logprobs"] for value in part["logprobs"][name]] == values


@pytest.mark.parametrize("n", [1, 4])
def test_a_streamed_chat_is_the_whole_one(served: Served, sdk: openai.OpenAI, n: int) -> None:
    served.worker.step_s = 0.002
    message: Any = [{"role": "user", "content": "hé 日本"}]
    said = dict.fromkeys(range(n), "")
    roles, usage = [], None
    stream = sdk.chat.completions.create(
        model="shout", messages=message, n=n, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
    whole = sdk.chat.completions.create(model="shout", messages=message, n=n)
    assert list(said.values()) == [choice.message.content for choice in whole.choices]
    assert roles == ["assistant"] * n
    assert usage == whole.usage


def test_a_stream_without_usage_has_none(served: Served) -> None:
    assert all("usage" not in part for part in chunks(chat, served))


def test_who_leaves_a_stream_frees_all_its_rows(served: Served, sdk: openai.OpenAI) -> None:
    served.worker.step_s = 0.02
    stream = sdk.completions.create(model="tiny-base", prompt="x" * 200, n=4, max_tokens=50, stream=True)
    next(iter(stream))
    assert len(served.worker.rows) == 4
    stream.close()
    served.worker.step_s = 0.0
    answer = complete(served).json()
    assert answer["choices"][0]["text"] == "ab"
    for thread in served.worker.threads:
        thread.join(1)
    assert not served.worker.rows


def test_an_error_in_mid_stream_reaches_the_client(own: Served) -> None:
    own.worker.step_s = 0.01
    with openai.OpenAI(base_url=f"{own.server.address}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="tiny-base", prompt="x" * 200, max_tokens=50, n=2, stream=True)
        next(iter(stream))
        own.worker.alive = False
        with pytest.raises(openai.APIError, match="engine stopped"):
            list(stream)


# Refusals


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [999]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 2, "n": 65}, "prompt"),
        ({"prompt": ["a", [5]]}, "prompt.0"),
        ({"n": 129}, "n"),
        ({"model": 5}, "model"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"seed": -1}, "seed"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": 5}, "stop"),
        ({"presence_penalty": 101}, "presence_penalty"),
        ({"frequency_penalty": "a"}, "frequency_penalty"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": 1}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "a"}, "suffix"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"ignore_eos": "no"}, "ignore_eos"),
        ({"mode": "fast"}, "mode"),
        ({"scale": 0.5}, "scale"),
        ({"model": "prefix", "scale": 0.5}, "scale"),
        ({"model": "shout", "scale": 101}, "scale"),
        ({"model": "tasks"}, "task_id"),
    ],
)
def test_a_bad_field_of_a_completion_is_400_and_named(served: Served, fields: dict[str, Any], param: str) -> None:
    refused(complete(served, **fields), 400, param)
    assert not served.worker.requests


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "a"}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"logit_bias": [5]}, "logit_bias"),
    ],
)
def test_a_bad_field_of_a_chat_is_400_and_named(served: Served, fields: dict[str, Any], param: str) -> None:
    refused(chat(served, **fields), 400, param)
    assert not served.worker.requests


def test_what_is_too_long_for_the_context_is_a_bad_request(served: Served, sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="256 tokens"):
        sdk.completions.create(model="tiny-base", prompt="x" * 300)
    assert "ask for fewer" in refused(complete(served, max_tokens=255), 400, "prompt", "prompt_too_long")
    assert "connection" not in complete(served, max_tokens=255).headers
    refused(chat(served, "x" * 300), 400, "messages", "prompt_too_long")
    refused(chat(served, "x" * 20_000), 400, "messages", "prompt_too_long")


def test_what_a_server_of_text_can_ignore_is_ignored(served: Served) -> None:
    fields = {"user": "me", "metadata": {}, "logit_bias": {}, "response_format": {"type": "text"}, "zzz": 1}
    assert complete(served, **fields).status_code == 200
    assert chat(served, **fields, tools=[], store=False).status_code == 200


def test_one_refused_choice_refuses_all_and_frees_the_others(served: Served) -> None:
    served.worker.limit, served.worker.step_s = 2, 0.02
    response = complete(served, prompt="x" * 20, n=3)
    refused(response, 429, None, "queue_full")
    assert response.headers["retry-after"] == "2"
    for thread in served.worker.threads:
        thread.join(1)
    assert not served.worker.rows


def test_a_failure_inside_is_a_500_that_is_not_worth_a_retry(served: Served, sdk: openai.OpenAI) -> None:
    def script(request: Request) -> AdapterServerError | None:
        return RequestFailed("not a number")

    served.worker.script = script
    with pytest.raises(openai.InternalServerError) as caught:
        sdk.with_options(max_retries=2).completions.create(model="tiny-base", prompt="ab")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.request_id
    assert len(served.worker.requests) == 1
