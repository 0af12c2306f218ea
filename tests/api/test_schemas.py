"""Every field has a type, a range and a cap; a refusal names the field."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from adapter_server.api import lorax, openai_bodies, schemas, vllm
from adapter_server.api.schemas import GenerateBody, parse
from adapter_server.errors import InvalidRequest


def fault(data: bytes | dict[str, Any]) -> InvalidRequest:
    raw = data if isinstance(data, bytes) else json.dumps({"prompt": "a", **data}).encode()
    with pytest.raises(InvalidRequest) as caught:
        parse(GenerateBody, raw)
    return caught.value


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "prompt": [None, 5, ["a"], [-1], [True], [1.5], {}],
        "adapter": [5, [], ["a"], [{}], [{"name": ""}], [{"name": "a"}] * 9, "x" * 257, True],
        "mode": ["base", "fast", None, 1],
        "scale": [101, -101, "1", None, float("nan"), float("inf"), True],
        "task_id": [-1, 1.5, "1", 1 << 31],
        "max_new_tokens": [0, -1, 1.0, 1.5, "5", None, 1 << 21, 10**400],
        "temperature": [-0.1, 101, float("nan"), float("inf")],
        "top_p": [0, 1.1],
        "top_k": [-1, 0.5, 1 << 31],
        "min_p": [-0.1, 1.1],
        "repetition_penalty": [0, 101],
        "presence_penalty": [101, -101],
        "frequency_penalty": [101, -101],
        "seed": [-1, 1 << 63, 1.5],
        "stop": ["", [""], ["a"] * 17, "x" * 257, 5, [5]],
        "logprobs": [-1, 21, True],
        "return_token_ids": [1, "true"],
        "ignore_eos": [None],
        "stream": ["yes"],
        "logit_bias": [5, {"a": 1}, {"-1": 1}, {"5": 101}, {"5": "a"}, {str(i): 1 for i in range(1025)}],
        "prompt_logprobs": [-1, 21, True],
        "response_format": [
            "x",
            {},
            {"type": "xml"},
            {"type": "json_schema"},
            {"type": "json_schema", "json_schema": "x"},
            {"type": "regex"},
            {"type": "regex", "regex": ""},
            {"type": "regex", "grammar": "a"},
            {"type": "grammar", "grammar": 5},
            {"type": "json_object", "zzz": 1},
        ],
        "timeout_s": [0, -1, 100_000],
    }.items(),
)
def test_a_value_out_of_range_is_refused_by_its_field(field: str, values: list[Any]) -> None:
    for value in values:
        error = fault({field: value})
        assert error.param is not None, value
        assert error.param.split(".")[0] == field, value
        assert error.message.startswith(error.param), value
        assert "\n" not in error.message


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"max_tokens": 5}, "max_tokens", "'max_new_tokens'"),
        ({"adaptor": "a"}, "adaptor", "'adapter'"),
        ({"adapter": [{"name": "a", "wieght": 1}]}, "adapter.0.wieght", "'weight'"),
        ({"zzz": 1}, "zzz", "known are prompt"),
        ({"": 1}, None, "known are prompt"),
        ({"prompt": 5}, "prompt", "text or a list of token ids"),
        ({"prompt": [1, "a"]}, "prompt.1", "integer"),
        ({"adapter": 5}, "adapter", "null for the base"),
        ({"response_format": {}}, "response_format.type", "is required"),
        ({"response_format": {"type": "regex"}}, "response_format", "needs regex"),
        ({"response_format": {"type": "regex", "regexp": "a"}}, "response_format.regexp", "'regex'"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"5": 200}}, "logit_bias", "less than or equal to 100"),
        ({"top_p": 3}, "top_p", "less than or equal to 1"),
        ({"stop": ""}, "stop", "stop should have at least 1 character"),
        ({"stop": ["a"] * 17}, "stop", "stop should have at most 16 items, not 17"),
    ],
)
def test_the_message_says_what_to_do(fields: dict[str, Any], param: str, said: str) -> None:
    error = fault(fields)
    assert error.param == param
    assert said in error.message


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b'"a"', b"null", b'{"prompt": "\\ud800"}', b"\xff", b"[" * 100_000, b'{"a":' * 5000],
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    fault(raw)


@pytest.mark.parametrize("word", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_json_that_is_no_number_is_refused(word: bytes) -> None:
    assert fault(b'{"prompt": "a", "temperature": ' + word + b"}").param == "temperature"


def test_a_missing_prompt_is_named() -> None:
    assert fault(b"{}").message == "prompt is required"


def test_defaults_and_both_forms_of_stop() -> None:
    body = parse(GenerateBody, b'{"prompt": "a", "temperature": 1, "stop": "x"}')
    assert (body.temperature, body.stops, body.max_new_tokens, body.mode) == (1.0, ["x"], 128, "auto")
    assert parse(GenerateBody, b'{"prompt": "a", "stop": ["x", "y"], "response_format": null}').stops == ["x", "y"]
    assert parse(GenerateBody, b'{"prompt": "a", "stop": null, "seed": null}').stops == []


# Shape and caps


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'{"prompt": "a", "x": ' + b"[" * 65 + b"]" * 65 + b"}", "nested deeper than 64"),
        (b'{"a":' * 3_000_000, "nested deeper"),
        (b"[" + b"[]," * 2_000_000 + b"[]]", "more than 200,000"),
        (b'{"prompt": [' + b'"a",' * 2_000_000 + b'"a"]}', "more than 200,000"),
        (b'{"prompt": "' + b'\\"' * 4_000_000, "JSON"),
        (b'{"prompt": "' + b"[" * 4_000_000, "JSON"),
    ],
)
def test_a_body_that_would_cost_much_is_refused_at_little_cost(raw: bytes, said: str) -> None:
    start = time.process_time()
    assert said in fault(raw).message
    assert time.process_time() - start < 1


def test_brackets_and_quotes_within_texts_are_no_shape() -> None:
    prompt = '[{"' * 1000 + "\\" * 7
    assert parse(GenerateBody, json.dumps({"prompt": prompt}).encode()).prompt == prompt


BODIES = [
    *(schemas.GenerateBody, schemas.TokenizeBody, schemas.DetokenizeBody, openai_bodies.CompletionBody),
    *(openai_bodies.ChatBody, lorax.LoraxBody, vllm.LoadBody, vllm.UnloadBody),
]
FREE_TEXT = {"prompt", "inputs", "content", "text", "suffix"}  # as long as a body may be, or the context


def uncapped(schema: Any, at: str = "", name: str = "") -> Iterator[str]:
    """Where a schema has a number or a list without bounds, or a text without a cap."""
    kind = schema.get("type")
    lowest, highest = schema.keys() & {"minimum", "exclusiveMinimum"}, schema.keys() & {"maximum", "exclusiveMaximum"}
    if kind in ("integer", "number") and "const" not in schema and not (lowest and highest):
        yield at
    if kind == "array" and "maxItems" not in schema:
        yield at
    if kind == "string" and name not in FREE_TEXT and not schema.keys() & {"maxLength", "enum", "const"}:
        yield at
    for key, part in schema.get("properties", {}).items():
        yield from uncapped(part, f"{at}.{key}", key)
    for part in (*schema.get("anyOf", ()), *filter(None, [schema.get("items")])):
        yield from uncapped(part, at, name)


@pytest.mark.parametrize("model", BODIES, ids=lambda model: model.__name__)
def test_every_number_list_and_text_has_a_cap(model: type[schemas.Strict]) -> None:
    body = schemas.document(model)["requestBody"]["content"]["application/json"]["schema"]
    assert list(uncapped(body)) == []


# Forms


SCHEMA = {"type": "object", "properties": {"schema": {"type": "string"}}}


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"type": "json_object"}, "json_schema", {"type": "object"}),
        ({"type": "json_object", "schema": SCHEMA}, "json_schema", SCHEMA),
        ({"type": "json_schema", "schema": SCHEMA}, "json_schema", SCHEMA),
        ({"type": "json_schema", "json_schema": SCHEMA}, "json_schema", SCHEMA),
        ({"type": "json_schema", "json_schema": True}, "json_schema", True),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": 1}},
            "json_schema",
            SCHEMA,
        ),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "json_schema", {"type": "object"}),
        ({"type": "regex", "regex": "a+"}, "regex", "a+"),
        ({"type": "grammar", "grammar": 'start: "a"'}, "lark", 'start: "a"'),
    ],
)
def test_a_form_is_one_constraint_in_the_words_of_every_dialect(given: Any, kind: str, text: Any) -> None:
    body = parse(GenerateBody, json.dumps({"prompt": "a", "response_format": given}).encode())
    assert body.response_format is not None
    constraint = body.response_format.constraint
    assert constraint is not None
    assert (constraint.kind, json.loads(constraint.text) if kind == "json_schema" else constraint.text) == (kind, text)


def test_text_is_no_constraint() -> None:
    body = parse(GenerateBody, b'{"prompt": "a", "response_format": {"type": "text"}}')
    assert body.response_format is not None
    assert body.response_format.constraint is None
