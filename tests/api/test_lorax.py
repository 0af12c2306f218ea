"""LoRAX's dialect: its bodies, answers, streams and errors."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest

from adapter_server.core import Constraint
from adapter_server.errors import AdapterRefused, AdapterServerError, RequestFailed, Unavailable
from serving import Served

ROUTES = ("/", "/generate", "/generate_stream")


def ask(served: Served, inputs: str = "ab", path: str = "/generate", **parameters: Any) -> httpx.Response:
    return served.http.post(path, json={"inputs": inputs, "parameters": parameters})


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    return [json.loads(line.removeprefix("data:")) for line in response.text.split("\n\n") if line]


def refused(response: httpx.Response, status: int, kind: str, said: str = "") -> None:
    content = response.json()
    assert set(content) == {"error", "error_type"}
    assert (response.status_code, content["error_type"]) == (status, kind), content
    assert said in content["error"]


def test_an_answer_is_its_text(served: Served) -> None:
    response = ask(served, "red cat>", adapter_id="shout")
    assert response.json() == {"generated_text": "red cat>"}
    told = {"x-adapter-id": "shout", "x-adapter-source": "local", "x-model-id": "tiny-base"}
    told |= {"x-prompt-tokens": "8", "x-generated-tokens": "9", "x-total-tokens": "17"}
    assert told.items() <= dict(response.headers).items()
    assert response.headers["server-timing"].startswith("queue;dur=")
    assert ask(served, path="/generate_stream").headers["server-timing"].startswith("ttft;dur=")


def test_the_root_answers_a_list_of_one(served: Served) -> None:
    assert ask(served, path="/").json() == [{"generated_text": "ab"}]


@pytest.mark.parametrize("body", [{"inputs": "ab"}, {"inputs": "ab", "parameters": None}, {"inputs": "ab", "zzz": 1}])
def test_parameters_may_be_missing_and_the_unknown_is_left_alone(served: Served, body: dict[str, Any]) -> None:
    response = served.http.post("/generate", json=body)
    assert response.json() == {"generated_text": "ab"}
    assert "x-adapter-id" not in response.headers
    assert served.worker.requests[-1].sampling.temperature == 0


def test_details_tell_of_every_token(served: Served) -> None:
    asked = {"details": True, "decoder_input_details": True, "seed": 7, "return_k_alternatives": 2}
    content = ask(served, "hé", **asked).json()
    details = content["details"]
    assert (details["finish_reason"], details["seed"], details["skipped_tokens"]) == ("eos_token", 7, 0)
    assert (details["prompt_tokens"], details["generated_tokens"]) == (3, 4)
    assert [token["logprob"] for token in details["prefill"]] == [None, -0.5, -0.5]
    tokens = details["tokens"]
    assert "".join(token["text"] for token in tokens if not token["special"]) == content["generated_text"] == "hé"
    assert tokens[-1] == {
        "id": 256,
        "text": "</s>",
        "logprob": -0.5,
        "special": True,
        "skipped": False,
        "alternative_tokens": [{"id": 256, "text": "</s>", "logprob": -0.5}] * 2,
    }


def test_the_full_text_begins_with_the_prompt(served: Served) -> None:
    assert ask(served, return_full_text=True).json() == {"generated_text": "abab"}


@pytest.mark.parametrize(
    ("fields", "reason"), [({"stop": ["b"]}, "stop_sequence"), ({"max_new_tokens": 1}, "length"), ({}, "eos_token")]
)
def test_answers_end_for_a_reason(served: Served, fields: dict[str, Any], reason: str) -> None:
    assert ask(served, details=True, **fields).json()["details"]["finish_reason"] == reason


def test_a_long_prompt_may_be_cut_to_its_end(served: Served) -> None:
    assert ask(served, "abcdef", truncate=2).json() == {"generated_text": "ef"}


@pytest.mark.parametrize(
    ("fields", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.7}, 0.7),
        ({"temperature": 1.0}, 0.0),
        ({"temperature": 0.0, "do_sample": True}, 0.0),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.9, "temperature": 0.5}, 0.5),
    ],
)
def test_it_samples_where_lorax_would(served: Served, fields: dict[str, Any], temperature: float) -> None:
    ask(served, **fields)
    sampling = served.worker.requests[-1].sampling
    assert sampling.temperature == temperature
    assert (sampling.top_k, sampling.top_p) == (fields.get("top_k", 0), fields.get("top_p", 1.0))


def test_other_fields_reach_the_engine(served: Served) -> None:
    fields = {"seed": 7, "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.2}
    ask(served, max_new_tokens=1, ignore_eos_token=True, **fields)
    sampling = served.worker.requests[-1].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert (sampling.max_new_tokens, sampling.ignore_eos) == (1, True)


@pytest.mark.parametrize("strategy", [{}, {"merge_strategy": "linear"}, {"merge_strategy": None, "density": 0.0}])
def test_merged_adapters_are_an_exact_composition(served: Served, strategy: dict[str, Any]) -> None:
    response = ask(served, merged_adapters={"ids": ["shout", "pirate"], "weights": [0.25, 0.75], **strategy})
    assert response.headers["x-adapter-id"] == "shout+pirate"
    members = served.worker.requests[-1].members
    assert [(member.spec.name, member.weight) for member in members] == [("shout", 0.25), ("pirate", 0.75)]


# Streams


@pytest.mark.parametrize("path", ["/generate_stream", "/"])
@pytest.mark.parametrize(
    "fields", [{}, {"stop": ["本"]}, {"stop": ["zz"]}, {"max_new_tokens": 3}, {"return_full_text": True}]
)
def test_a_stream_says_the_same_as_the_whole_answer(served: Served, path: str, fields: dict[str, Any]) -> None:
    asked = {"adapter_id": "shout", "details": True, **fields}
    whole = ask(served, "hé 日本z", **asked).json()
    body = {"inputs": "hé 日本z", "parameters": asked, "stream": True}
    *before, last = events(served.http.post(path, json=body))
    assert last["generated_text"] == whole["generated_text"]
    assert all(event["generated_text"] is event["details"] is None for event in before)
    assert [event["token"] for event in (*before, last)] == whole["details"]["tokens"]
    shown = ("finish_reason", "prompt_tokens", "generated_tokens", "seed")
    assert last["details"] == {name: whole["details"][name] for name in shown}


def test_a_stream_tells_no_details_unasked(served: Served) -> None:
    assert events(ask(served, path="/generate_stream"))[-1]["details"] is None


def test_a_stream_that_breaks_says_so(own: Served) -> None:
    own.worker.step_s = 0.01
    with own.http.stream("POST", "/generate_stream", json={"inputs": "x" * 100}) as response:
        lines = response.iter_lines()
        next(lines)
        own.worker.alive = False
        last = [json.loads(line.removeprefix("data:")) for line in lines if line][-1]
    assert last["error_type"] == "healthcheck"
    assert "engine stopped" in last["error"]


# Refusals


@pytest.mark.parametrize(
    "parameters",
    [
        {"adapter_id": 5},
        {"adapter_source": "s3"},
        {"adapter_source": "hub"},
        {"adapter_id": "shout", "merged_adapters": {"ids": ["shout"], "weights": [1.0]}},
        {"merged_adapters": {"ids": [], "weights": []}},
        {"merged_adapters": {"ids": ["shout", "pirate"], "weights": [1.0]}},
        {"merged_adapters": {"ids": ["shout"]}},
        {"merged_adapters": {"ids": [""], "weights": [1.0]}},
        {"merged_adapters": {"ids": ["shout"], "weights": [1.0], "merge_strategy": "ties"}},
        {"merged_adapters": {"ids": ["prefix", "prefix2"], "weights": [1.0, 1.0]}},
        {"best_of": 2},
        {"temperature": -1},
        {"repetition_penalty": 0},
        {"presence_penalty": 101},
        {"frequency_penalty": "a"},
        {"top_k": -1},
        {"top_p": 0},
        {"typical_p": 0.5},
        {"do_sample": "yes"},
        {"max_new_tokens": 0},
        {"max_new_tokens": 255},
        {"ignore_eos_token": 1},
        {"return_full_text": 1},
        {"stop": [""]},
        {"truncate": 0},
        {"watermark": True},
        {"details": "all"},
        {"decoder_input_details": 1},
        {"return_k_alternatives": 21},
        {"seed": -1},
        {"response_format": {"type": "json_schema"}},
        {"response_format": 5},
        {"grammar": {"type": "regex", "value": {}}},
        {"grammar": {"type": "json", "value": "{"}},
        {"grammar": {"type": "regex", "value": ""}},
        {"grammar": {"type": "json", "value": {}}, "response_format": {"type": "json_object"}},
    ],
)
@pytest.mark.parametrize("path", ROUTES)
def test_a_bad_field_is_a_matter_of_validation(served: Served, path: str, parameters: dict[str, Any]) -> None:
    refused(ask(served, path=path, **parameters), 422, "validation")
    assert not served.worker.requests


@pytest.mark.parametrize(
    ("asked", "constraint"),
    [
        (
            {"response_format": {"type": "json_object", "schema": {"type": "array"}}},
            ("json_schema", '{"type": "array"}'),
        ),
        ({"response_format": {"type": "json_object", "schema": None}}, ("json_schema", '{"type": "object"}')),
        ({"grammar": {"type": "json", "value": {"type": "array"}}}, ("json_schema", '{"type": "array"}')),
        ({"grammar": {"type": "regex", "value": "[0-9]+"}}, ("regex", "[0-9]+")),
    ],
)
def test_a_form_is_asked_for_as_loraxs_and_tgis_clients_do(served: Served, asked: Any, constraint: Any) -> None:
    assert ask(served, "ab", **asked).status_code == 200
    assert served.worker.requests[-1].sampling.constraint == Constraint(*constraint)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "raw", [b'{"parameters": {}}', b'{"inputs": ""}', b'{"inputs": 5}', b'{"inputs": "a", "parameters": []}']
)
def test_inputs_are_needed(served: Served, path: str, raw: bytes) -> None:
    refused(served.http.post(path, content=raw), 422, "validation")


def test_an_empty_expression_is_told_what_it_should_be(served: Served) -> None:
    refused(ask(served, grammar={"type": "regex", "value": ""}), 422, "validation", "for regex an expression")


def test_what_a_stream_cannot_tell_is_refused(served: Served) -> None:
    response = ask(served, path="/generate_stream", details=True, decoder_input_details=True)
    refused(response, 422, "validation", "decoder_input_details")


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (AdapterRefused("bad files"), 424, "generation"),
        (RequestFailed("nan"), 500, "generation"),
        (Unavailable("going down", retry_after=1), 503, "healthcheck"),
    ],
)
def test_a_failure_has_loraxs_shape_and_is_no_stream(
    served: Served, path: str, error: AdapterServerError, status: int, kind: str
) -> None:
    served.worker.script = lambda request: error
    refused(ask(served, path=path), status, kind, error.message)


def test_adapters_and_queues_are_refused_in_its_shape(served: Served) -> None:
    refused(ask(served, adapter_id="nobody"), 404, "generation", "no adapter")
    refused(ask(served, "x" * 300), 422, "validation", "256 tokens")
    served.worker.limit = 0
    response = ask(served)
    refused(response, 429, "overloaded")
    assert response.headers["retry-after"] == "2"


def test_an_answer_that_is_cut_short_is_none(served: Served) -> None:
    worker = served.worker
    worker.step_s = 0.02
    threading.Timer(0.1, lambda: worker.rows.update(dict.fromkeys(worker.rows, "cancelled"))).start()
    refused(ask(served, "x" * 100), 503, "healthcheck", "shut down")


def test_our_own_dialect_is_untouched(served: Served) -> None:
    assert served.http.post("/generate", json={"prompt": 'about "inputs"'}).json()["text"] == 'about "inputs"'
    assert served.http.post("/generate", content=b'["inputs"]').json()["error"]["code"] == "invalid_request"
    assert served.http.post("/generate", content=b'{"inputs"').json()["error"]["code"] == "invalid_request"


def test_info_speaks_its_words_too(served: Served) -> None:
    info = served.http.get("/info").json()
    assert (info["model_id"], info["max_total_tokens"], info["max_input_length"]) == ("tiny-base", 256, 255)


def test_tokens_are_told_as_lorax_tells_them(served: Served) -> None:
    answer = served.http.post("/tokenize", json={"inputs": "hé!", "add_special_tokens": False})
    tokens = answer.json()
    assert [token["id"] for token in tokens] == served.http.post("/tokenize", json={"prompt": "hé!"}).json()[
        "token_ids"
    ]
    assert tokens[0] == {"id": tokens[0]["id"], "text": "h", "start": 0, "stop": 1}
    assert tokens[-1]["text"] == "!"
    assert served.http.post("/tokenize", json={"inputs": "ab"}).status_code == 200
    for body in ({"inputs": ""}, {"inputs": 5}, {"inputs": "x" * 5000}):
        refusal = served.http.post("/tokenize", json=body)
        assert (refusal.status_code, refusal.json()["error_type"]) == (422, "validation")
