"""POST /generate: answers, streams, routes, and people who go away."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from adapter_server.core import Request, Resident
from adapter_server.errors import AdapterRefused, AdapterServerError, RequestFailed, VersionGone
from serving import Served


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)


def refused(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), error
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


def test_an_answer_has_all_fields(served: Served) -> None:
    response = served.generate("red cat>", adapter="shout", logprobs=2, return_token_ids=True)
    answer = response.json()
    assert response.status_code == 200
    assert (answer["text"], answer["finish_reason"], answer["mode"]) == ("red cat>", "eos", "unmerged")
    assert answer["adapter"] == "shout"
    assert len(answer["adapter_version"]) == 12
    assert answer["usage"] == {"prompt_tokens": 8, "completion_tokens": 9, "cached_tokens": 0}
    assert set(answer["timing"]) == {"queue_s", "load_s", "ttft_s", "total_s"}
    assert len(answer["token_ids"]) == len(answer["logprobs"]) == 9
    assert answer["logprobs"][0]["text"] == "r"
    assert len(answer["logprobs"][0]["top"]) == 2


def test_the_headers_name_the_adapter_and_the_time(served: Served) -> None:
    response = served.generate(adapter="shout")
    assert response.headers["x-adapter"] == "shout"
    assert response.headers["x-adapter-version"] == response.json()["adapter_version"]
    assert "total;dur=" in response.headers["server-timing"]
    assert response.headers["x-request-id"]
    assert served.generate().headers["x-adapter"] == "base"


@pytest.mark.parametrize(("asked", "kept"), [("mine-1", True), ("with space", False), ("x" * 200, False)])
def test_the_callers_request_id_comes_back_if_it_is_fit_for_a_log(served: Served, asked: str, kept: bool) -> None:
    response = served.http.post("/generate", json={"prompt": "a"}, headers={"X-Request-Id": asked})
    assert (response.headers["x-request-id"] == asked) is kept


@pytest.mark.parametrize("adapter", [None, "", "tiny-base"])
def test_no_adapter_is_the_base_model(served: Served, adapter: str | None) -> None:
    answer = served.generate(adapter=adapter).json()
    assert (answer["adapter"], answer["adapter_version"], answer["mode"]) == (None, None, "base")
    assert served.worker.requests[-1].members == ()


def test_a_prompt_may_be_token_ids(served: Served) -> None:
    assert served.http.post("/generate", json={"prompt": [5, 6, 7]}).json()["usage"]["prompt_tokens"] == 3
    assert served.worker.requests[-1].prompt == (5, 6, 7)


def test_a_version_may_be_named(served: Served) -> None:
    version = served.generate(adapter="shout").json()["adapter_version"]
    assert served.generate(adapter=f"shout@{version}").json()["adapter_version"] == version
    refused(served.generate(adapter="shout@000000000000"), 404, "adapter_not_found", "adapter")


def test_a_composition_reaches_the_engine_with_its_weights(served: Served) -> None:
    asked = [{"name": "shout", "weight": 0.7}, {"name": "pirate"}]
    answer = served.generate(adapter=asked, scale=0.5).json()
    assert answer["adapter"] == "shout+pirate"
    assert [member.weight for member in served.worker.requests[-1].members] == [0.35, 0.5]


def test_sampling_reaches_the_engine(served: Served) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 7}
    served.generate(**fields, max_new_tokens=1, ignore_eos=True)
    sampling = served.worker.requests[-1].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert (sampling.max_new_tokens, sampling.ignore_eos) == (1, True)


def test_a_stop_string_ends_the_answer_and_frees_the_row(served: Served) -> None:
    served.worker.step_s = 0.01
    answer = served.generate("hello world, and much more", stop=["o w", "zz"], return_token_ids=True).json()
    assert (answer["text"], answer["finish_reason"]) == ("hell", "stop")
    assert answer["usage"]["completion_tokens"] == len(answer["token_ids"]) == len("hello w")


def test_a_stream_says_the_same_as_the_plain_answer(served: Served) -> None:
    fields: dict[str, Any] = {"adapter": "shout", "return_token_ids": True, "logprobs": 1, "stop": "!"}
    plain = served.generate("hé 日本 x! y", **fields).json()
    response = served.generate("hé 日本 x! y", **fields, stream=True)
    *parts, end = events(response)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-adapter"] == "shout"
    assert "ttft;dur=" in response.headers["server-timing"]
    assert "".join(part["text"] for part in parts) == plain["text"] == "hé 日本 x"
    assert [id for part in parts for id in part["token_ids"]] == plain["token_ids"]
    assert [part["index"] for part in parts] == list(range(len(parts)))
    assert end["finish_reason"] == "stop"
    assert end["usage"] == plain["usage"]
    assert set(end["timing"]) == {"queue_s", "load_s", "ttft_s", "total_s"}


def test_text_that_was_held_back_comes_at_the_end(served: Served) -> None:
    *parts, end = events(served.generate("abc", stop=["cd"], stream=True))
    assert "".join(part["text"] for part in parts) == "abc"
    assert end["finish_reason"] == "eos"


def test_many_at_once_do_not_mix(served: Served) -> None:
    from concurrent.futures import ThreadPoolExecutor

    served.worker.step_s = 0.001
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda n: served.generate(f"prompt number {n}").json()["text"], range(64)))
    assert texts == [f"prompt number {n}" for n in range(64)]


# Routes


@pytest.fixture
def folded(served: Served) -> Served:
    version = served.generate(adapter="shout").json()["adapter_version"]
    served.worker.residents = (Resident("shout", version, "ready", "LORA", snapshot_bytes=1),)
    return served


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({}, "merged"),
        ({"seed": 1}, "unmerged"),
        ({"scale": 0.5}, "unmerged"),
        ({"mode": "unmerged"}, "unmerged"),
        ({"adapter": "pirate"}, "unmerged"),
        ({"adapter": "pirate", "mode": "merged"}, "merged"),
        ({"adapter": [{"name": "shout"}]}, "merged"),
        ({"adapter": [{"name": "shout"}, {"name": "pirate"}]}, "unmerged"),
        ({"adapter": None, "mode": "merged"}, "base"),
    ],
)
def test_auto_takes_the_snapshot_where_nothing_speaks_against_it(
    folded: Served, fields: dict[str, Any], mode: str
) -> None:
    assert folded.generate(**{"adapter": "shout", **fields}).json()["mode"] == mode


def test_an_adapter_with_tasks_gets_its_task(served: Served) -> None:
    assert served.generate(adapter="tasks", task_id=2).status_code == 200
    assert served.worker.requests[-1].task_id == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"adapter": "shout", "mode": "merged", "scale": 2}, "scale"),
        ({"adapter": [{"name": "shout"}, {"name": "pirate"}], "mode": "merged"}, "mode"),
        ({"adapter": [{"name": "shout"}, {"name": "shout"}]}, "adapter"),
        ({"adapter": [{"name": "prefix"}, {"name": "prefix2"}]}, "adapter"),
        ({"adapter": [{"name": "prefix", "weight": 0.5}, {"name": "shout"}]}, "adapter"),
        ({"adapter": "prefix", "scale": 0.5}, "scale"),
        ({"scale": 0.5}, "scale"),
        ({"adapter": "shout", "task_id": 0}, "task_id"),
        ({"task_id": 0}, "task_id"),
        ({"adapter": "tasks"}, "task_id"),
        ({"adapter": "tasks", "task_id": 3}, "task_id"),
        ({"timeout_s": 1000}, "timeout_s"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [257]}, "prompt"),
    ],
)
def test_what_has_no_meaning_is_refused_by_its_name(served: Served, fields: dict[str, Any], param: str) -> None:
    assert refused(served.http.post("/generate", json={"prompt": "a", **fields}), 422, "invalid_request", param)
    assert not served.worker.requests


def test_an_unknown_adapter_is_404_and_a_broken_one_424(served: Served) -> None:
    refused(served.generate(adapter="nobody"), 404, "adapter_not_found", "adapter")
    refused(served.generate(adapter="broken", stream=True), 424, "adapter_refused", "adapter")


@pytest.mark.parametrize(("adapter", "fits"), [(None, 246), ("prefix", 238)])
def test_the_context_holds_prompt_prefix_and_new_tokens(served: Served, adapter: str | None, fits: int) -> None:
    prompt = "0123456789"
    assert served.generate(prompt, adapter=adapter, max_new_tokens=fits).status_code == 200
    message = refused(
        served.generate(prompt, adapter=adapter, max_new_tokens=fits + 1), 413, "prompt_too_long", "prompt"
    )
    assert "256" in message
    assert served.generate("x" * 200).status_code == 200
    assert served.worker.requests[-1].sampling.max_new_tokens == 56
    refused(served.generate("x" * 256), 413, "prompt_too_long", "prompt")
    refused(served.generate("x" * 10_000), 413, "prompt_too_long", "prompt")


# What goes wrong


def test_a_full_queue_is_429_with_a_time_to_wait(served: Served) -> None:
    served.worker.limit = 0
    for stream in (False, True):
        response = served.generate(stream=stream)
        refused(response, 429, "queue_full")
        assert response.headers["retry-after"] == "2"


@pytest.mark.parametrize("error", [AdapterRefused("a bad file"), RequestFailed("inside")])
def test_a_refused_stream_is_no_200(served: Served, error: AdapterServerError) -> None:
    served.worker.script = lambda request: error
    refused(served.generate(adapter="shout", stream=True), error.status, error.code)
    assert served.generate(adapter="shout").headers["x-adapter"] == "shout"


def test_an_error_in_mid_stream_is_an_event(own: Served) -> None:
    own.worker.step_s = 0.01
    with own.http.stream("POST", "/generate", json={"prompt": "x" * 100, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        own.worker.alive = False
        rest = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert response.status_code == 200
    assert rest[-1]["error"]["code"] == "unavailable"


def test_an_adapter_replaced_before_its_load_is_resolved_again(served: Served) -> None:
    gone: list[Request] = []

    def script(request: Request) -> AdapterServerError | None:
        gone.append(request)
        return VersionGone("files changed") if len(gone) < 3 else None

    served.worker.script = script
    assert served.generate(adapter="shout").json()["text"] == "ab"
    assert len({request.id for request in gone}) == 3
    served.worker.script = lambda request: VersionGone("files changed")
    refused(served.generate(adapter="shout"), 424, "version_gone")


def test_a_deadline_before_the_first_token_is_504_and_after_it_a_partial_answer(served: Served) -> None:
    served.worker.step_s = 0.8
    refused(served.generate(timeout_s=0.05), 504, "deadline_exceeded")
    served.worker.step_s = 0.05
    answer = served.generate("x" * 100, timeout_s=0.2).json()
    assert answer["finish_reason"] == "timeout"
    assert 0 < len(answer["text"]) < 100


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wait", [0.0, 0.1])
def test_who_goes_away_frees_the_place(served: Served, stream: bool, wait: float) -> None:
    served.worker.step_s = 0.05
    url = served.http.base_url
    body = json.dumps({"prompt": "x" * 200, "stream": stream}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((url.host, url.port or 0)) as client:
        client.sendall(head + body)
        wait_until(lambda: bool(served.worker.rows))
        time.sleep(wait)
    wait_until(lambda: not served.worker.rows, 1.0)
