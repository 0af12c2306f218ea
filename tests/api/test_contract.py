"""The OpenAPI document against the server: what schemathesis makes of it never fails, and every answer is a documented
one. Then bodies of any kind for POST /generate, after which the engine answers as before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS, load_all_checks, not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import schemas  # noqa: F401 - before there is a thread that could parse beside it

import live
from adapter_server.api.app import create_app
from adapter_server.config import EngineConfig, ServerConfig, demo_adapters
from adapter_server.registry.store import Store
from fakes import INFO, FakeWorker

CONTEXT = 96  # tokens; a chat may fill it, up to 128 times
SURE = live.Question("shout", "red cat>", "RED CAT")
# A body may fit the document and still have no meaning: token ids beyond the vocabulary, a scale without an adapter.
BEYOND = {"positive_data_acceptance", "max_response_time"}
load_all_checks()
OWN = [check for name, check in zip(CHECKS.get_all_names(), CHECKS.get_all(), strict=True) if name not in BEYOND]


def operations() -> list[str]:
    """Each method and path that the document has."""
    app = create_app(FakeWorker, Store(demo_adapters()), None, INFO, ServerConfig())  # type: ignore[arg-type]
    return [f"{method.upper()} {path}" for path, item in app.openapi()["paths"].items() for method in item]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[live.Live]:
    """With keys, and adapters that may be lost."""
    adapters = tmp_path_factory.mktemp("registry") / "adapters"
    shutil.copytree(demo_adapters(), adapters)
    config = ServerConfig(api_key=("may-ask",), admin_key=("may-all",), request_timeout_s=20)
    with live.demo(adapters, EngineConfig(max_model_len=CONTEXT), config) as running:
        yield running


@pytest.fixture(scope="module")
def schema(demo: live.Live) -> Any:
    return schemathesis.openapi.from_url(f"{demo.address}/openapi.json", headers=dict(demo.http.headers))


def examine(demo: live.Live, schema: Any, operation: str, count: int) -> None:
    """So many requests that fit the document, and as many that do not."""
    method, path = operation.split()
    described = schema[path][method]

    @settings(max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(
        described.as_strategy(generation_mode=GenerationMode.POSITIVE)
        | described.as_strategy(generation_mode=GenerationMode.NEGATIVE)
    )
    def every(case: Any) -> None:
        response = case.call(headers=live.bearer(demo.server._service.config))
        late = response.status_code == 504 and "timeout_s" in case.body  # as the caller wished
        case.validate_response(response, checks=OWN, excluded_checks=[not_a_server_error] if late else [])

    every()


@pytest.mark.parametrize("operation", operations())
def test_every_answer_is_a_documented_one(demo: live.Live, schema: Any, operation: str) -> None:
    examine(demo, schema, operation, 12)
    demo.settle()
    assert demo.ask(SURE).json()["text"] == SURE.answer


@pytest.mark.soak
@pytest.mark.parametrize("operation", operations())
def test_every_answer_is_a_documented_one_at_length(demo: live.Live, schema: Any, operation: str) -> None:
    examine(demo, schema, operation, 1000)
    demo.settle()
    assert demo.ask(SURE).json()["text"] == SURE.answer


# Bodies of any kind

NAMES = ["shout", "title", "devowel", "exclaim", "hyphens", "nobody", "shout@v1", "shout@000000000000", "../shout", ""]
LETTERS = st.text(st.characters(), max_size=40)  # halves of surrogate pairs too
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | LETTERS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(LETTERS, inner, max_size=4),
    max_leaves=8,
)
MEMBERS = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from(NAMES)}, optional={"weight": st.floats(-3, 3)}), max_size=4
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.sampled_from(["red cat>", "日本>", "x" * 90, "x" * 500]) | LETTERS | st.lists(st.integers(-1, 300)),
    "adapter": st.sampled_from([None, *NAMES]) | MEMBERS,
    "mode": st.sampled_from(["auto", "unmerged", "merged", "both"]),
    "scale": st.sampled_from([0, 1, 1.0, 0.5, -2, 101]),
    "task_id": st.integers(-1, 3),
    "max_new_tokens": st.sampled_from([0, 1, 5, 20, 95, 1 << 20, 1 << 40]),
    "temperature": st.sampled_from([0, 1e-300, 0.7, 1, 100, -1]),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 300),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0, 3),
    "presence_penalty": st.floats(-101, 101),
    "frequency_penalty": st.floats(-101, 101),
    "seed": st.integers(-1, 1 << 64),
    "stop": st.sampled_from(["a", "", ["T", "\n"], ["x"] * 17]),
    "logprobs": st.integers(-1, 21),
    "return_token_ids": st.booleans(),
    "ignore_eos": st.booleans(),
    "stream": st.booleans(),
    "timeout_s": st.sampled_from([5, 1e-9, 0, 1e9]),
    "zzz": st.none(),
}


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """A prompt and a few other fields, so that many reach the engine."""
    names = draw(st.lists(st.sampled_from([*FIELDS]), max_size=4, unique=True))
    return {name: draw(FIELDS[name]) for name in ["prompt", *names]}


def whole(response: httpx.Response) -> bool:
    """Whether a 200 has an end; of a stream, as its last event."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        return "finish_reason" in response.json()
    events = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line]
    return "finish_reason" in events[-1] and not any("error" in event for event in events)


def throw(demo: live.Live, kind: st.SearchStrategy[Any], count: int) -> None:
    """So many bodies at /generate. Each is answered, or refused as the document says; after each the engine is well."""
    described = demo.http.get("/openapi.json").json()["paths"]["/generate"]["post"]["responses"]

    @settings(max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(kind)
    def every(body: Any) -> None:
        response = demo.http.post("/generate", content=json.dumps(body))
        assert str(response.status_code) in described
        late = response.status_code == 504 and "timeout_s" in body
        assert response.status_code < 500 or late, response.text
        if response.status_code == 200:
            assert whole(response), response.text
        else:
            assert {"message", "type", "param", "code"} == set(response.json()["error"])
        assert demo.ask(SURE).json()["text"] == SURE.answer

    every()
    demo.settle()


@pytest.mark.parametrize("kind", [bodies(), JUNK], ids=["bodies", "junk"])
def test_no_body_harms_the_engine(demo: live.Live, kind: st.SearchStrategy[Any]) -> None:
    throw(demo, kind, 30)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", [bodies(), JUNK], ids=["bodies", "junk"])
def test_no_body_harms_the_engine_at_length(demo: live.Live, kind: st.SearchStrategy[Any]) -> None:
    throw(demo, kind, 5000)
