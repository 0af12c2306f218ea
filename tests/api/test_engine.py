"""The routes over the real engine and a tiny base: what a client sees is what each adapter alone would say."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import openai
import pytest

import files
import layouts
import tiny
from adapter_server.api.server import Server
from adapter_server.config import EngineConfig, ServerConfig
from adapter_server.engine.engine import build
from adapter_server.engine.worker import Worker
from adapter_server.registry.store import Store
from adapter_server.text import Text

ADAPTERS = (None, "one", "two", "three")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    tiny.save_base(folder / "tiny")
    for seed, name in enumerate(filter(None, ADAPTERS)):
        files.age(tiny.save_lora(folder / "adapters" / name, seed))
    return folder


@pytest.fixture(scope="module", params=layouts.LAYOUTS)
def http(root: Path, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    adapters = shutil.copytree(root / "adapters", root / f"adapters-{request.param}")
    config = EngineConfig(max_rows=16, kv_bytes=64 << 20)
    with layouts.running(request.param, root / "tiny", adapters, config) as running:
        running.http.headers["x-adapters"] = str(adapters)
        yield running.http


def ask(http: httpx.Client, adapter: str | None, prompt: str = "red cat>", **fields: Any) -> dict[str, Any]:
    fields = {"max_new_tokens": 12, "return_token_ids": True, "ignore_eos": True} | fields
    response = http.post("/generate", json={"prompt": prompt, "adapter": adapter, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_all_mixed_is_as_each_alone(http: httpx.Client) -> None:
    cases = [(name, f"prompt {n}") for n in range(8) for name in ADAPTERS]
    alone = [ask(http, *case)["token_ids"] for case in cases]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda case: ask(http, *case)["token_ids"], cases))
    assert together == alone
    assert len({tuple(ids) for ids in alone[:4]}) == 4


def test_a_stream_carries_the_same_tokens(http: httpx.Client) -> None:
    plain = ask(http, "one", logprobs=2)
    body = {"prompt": "red cat>", "adapter": "one", "max_new_tokens": 12, "return_token_ids": True, "stream": True}
    with http.stream("POST", "/generate", json=body | {"ignore_eos": True, "logprobs": 2}) as response:
        events = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]
    assert [id for event in events[:-1] for id in event["token_ids"]] == plain["token_ids"]
    assert "".join(event["text"] for event in events[:-1]) == plain["text"]
    assert [entry["token_id"] for event in events[:-1] for entry in event["logprobs"]] == plain["token_ids"]
    assert all(len(entry["top"]) == 2 for entry in plain["logprobs"])


def test_a_snapshot_says_the_same_and_auto_takes_it(http: httpx.Client) -> None:
    unmerged = ask(http, "two")
    assert http.post("/adapters/two/merge").json()["merged"] is True
    merged = ask(http, "two")
    assert (unmerged["mode"], merged["mode"]) == ("unmerged", "merged")
    assert merged["token_ids"] == unmerged["token_ids"]
    assert http.post("/adapters/two/unmerge").json()["merged"] is False
    assert ask(http, "two")["mode"] == "unmerged"


@pytest.mark.parametrize("operation", ["load", "pin", "unpin", "unload"])
def test_adapters_are_moved_by_hand(http: httpx.Client, operation: str) -> None:
    adapter = http.post(f"/adapters/three/{operation}").json()
    assert adapter["state"] == ("registered" if operation == "unload" else "ready")
    assert adapter["pinned"] is (operation == "pin")


def test_who_goes_away_frees_the_row(http: httpx.Client) -> None:
    body = json.dumps({"prompt": "x" * 50, "max_new_tokens": 200, "ignore_eos": True, "adapter": "one"}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    before = ended(http, "cancelled")
    with socket.create_connection((http.base_url.host, http.base_url.port or 0)) as client:
        client.sendall(head + body)
        time.sleep(0.03)
    until = time.monotonic() + 5
    while ended(http, "cancelled") == before:
        assert time.monotonic() < until
        time.sleep(0.02)


def ended(http: httpx.Client, outcome: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("adapter_server_requests_total") and f'"{outcome}"' in line]
    return sum(float(line.split()[-1]) for line in found)


def test_every_answer_is_wholly_of_one_version(http: httpx.Client, root: Path) -> None:
    folder, staged = Path(http.headers["x-adapters"], "swap"), root / "staged"
    tiny.save_lora(folder, 10)
    said: dict[str, set[tuple[int, ...]]] = {}

    def client(_: int) -> None:
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            answer = ask(http, "swap")
            said.setdefault(answer["adapter_version"], set()).add(tuple(answer["token_ids"]))

    wait_for(http, "swap")
    with ThreadPoolExecutor(4) as pool:
        clients = pool.map(client, range(4))
        time.sleep(0.5)
        tiny.save_lora(staged, 11)
        for file in staged.iterdir():
            os.replace(file, folder / file.name)
        list(clients)
    assert len(said) == 2
    assert all(len(answers) == 1 for answers in said.values())


def wait_for(http: httpx.Client, name: str) -> None:
    until = time.monotonic() + 2
    while http.post(f"/adapters/{name}/load").status_code != 200:
        assert time.monotonic() < until, "a new folder answers within two seconds"
        time.sleep(0.05)


# Dialects


@pytest.fixture(scope="module")
def sdk(http: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("adapter", ["one", "three"])
def test_every_dialect_gives_the_same_answer(http: httpx.Client, sdk: openai.OpenAI, adapter: str) -> None:
    own = ask(http, adapter)["text"]
    more = {"ignore_eos": True}
    fields: Any = {"model": adapter, "prompt": "red cat>", "max_tokens": 12, "temperature": 0, "extra_body": more}
    assert sdk.completions.create(**fields).choices[0].text == own
    assert "".join(chunk.choices[0].text for chunk in sdk.completions.create(stream=True, **fields)) == own
    parameters = {"adapter_id": adapter, "max_new_tokens": 12, "ignore_eos_token": True, "details": True}
    body = {"inputs": "red cat>", "parameters": parameters}
    assert http.post("/", json=body).json()[0]["generated_text"] == own
    with http.stream("POST", "/generate_stream", json=body) as response:
        events = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]
    assert events[-1]["generated_text"] == own
    assert (len(events), events[-1]["details"]["finish_reason"]) == (12, "length")


def test_choices_differ_and_come_again_with_their_seed(sdk: openai.OpenAI) -> None:
    fields: Any = {"model": "two", "prompt": ["red cat>", "blue"], "n": 4, "seed": 5, "max_tokens": 12}
    first, again = (sdk.completions.create(**fields) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == len(texts) == 8
    assert [choice.text for choice in again.choices] == texts


def test_a_merge_in_loraxs_words_is_our_composition(http: httpx.Client) -> None:
    weights = [0.3, 0.7]
    own = ask(http, [{"name": n, "weight": w} for n, w in zip(("one", "two"), weights, strict=True)])  # type: ignore[arg-type]
    merged = {"ids": ["one", "two"], "weights": weights, "merge_strategy": "linear"}
    parameters = {"merged_adapters": merged, "max_new_tokens": 12, "ignore_eos_token": True}
    answer = http.post("/generate", json={"inputs": "red cat>", "parameters": parameters})
    assert answer.json() == {"generated_text": own["text"]}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_engine_dies_everybody_is_told_and_the_process_ends(root: Path) -> None:
    store = Store(root / "adapters", settle_s=0.1)
    engine = build(root / "tiny", EngineConfig(max_rows=4, kv_bytes=16 << 20), store)
    ready: SimpleQueue[str] = SimpleQueue()
    config = ServerConfig(port=0)
    server = Server(lambda deliver: Worker(engine, deliver), store, Text(root / "tiny"), engine.info, config, ready.put)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    step, steps = engine.step, iter(range(1 << 30))

    def dies() -> Any:
        if engine.scheduler.running and next(steps) > 3:
            raise MemoryError("the loop's own end")
        return step()

    engine.step = dies  # type: ignore[method-assign]
    body = {"prompt": "red cat>", "max_new_tokens": 200, "ignore_eos": True}
    with httpx.Client(base_url=ready.get(timeout=20), timeout=30) as client, ThreadPoolExecutor(4) as pool:
        streamed = pool.submit(client.post, "/generate", json=body | {"stream": True})
        waiting = [pool.submit(client.post, "/generate", json=body) for _ in range(3)]
        answers = [future.result() for future in waiting]
        events = streamed.result()
        assert {answer.status_code for answer in answers} == {503}
        assert {answer.json()["error"]["code"] for answer in answers} == {"unavailable"}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
        assert events.status_code == 503 or "unavailable" in events.text.splitlines()[-2]
        with suppress(httpx.TransportError):  # it may be gone by now
            assert client.get("/livez").status_code == 503
            assert client.get("/readyz").status_code == 503
    thread.join(10)
    assert (thread.is_alive(), server.exit_code) == (False, 1)


@pytest.mark.soak  # all that is imported is compiled anew; `test_architecture.py` finds an assert at once
def test_hostile_requests_are_refused_without_asserts_too(root: Path) -> None:
    """`python -O` drops every assert: the server is the same."""
    files.age(files.write(root / "hostile" / "broken", 3, weights=b"no safetensors"))
    files.age(tiny.save_lora(root / "hostile" / "fine", 5))
    command = [sys.executable, "-O", "-m", "adapter_server.cli", "serve", str(root / "tiny"), "--port", "0"]
    command += ["--adapters", str(root / "hostile"), "--api-key", "key", "--kv-bytes", "16M"]
    log = root / "optimised.log"
    with log.open("w") as told, subprocess.Popen(command, stderr=told, stdout=told) as process:
        try:
            until = time.monotonic() + 60
            while not (found := re.search(r"http://\S+", log.read_text())):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until
                time.sleep(0.1)
            with httpx.Client(base_url=found[0], timeout=30, headers={"Authorization": "Bearer key"}) as client:
                for body, status in HOSTILE:
                    assert client.post("/generate", content=body).status_code == status, body[:80]
                assert client.post("/generate", content=b"{}", headers={"Authorization": "Bearer k"}).status_code == 401
                assert client.post("/adapters/fine/load").status_code == 403
                assert client.get("/v1/models/..%2f..%2fetc").status_code in (403, 404)
                fine = client.post("/generate", json={"prompt": "a", "adapter": "fine", "max_new_tokens": 2})
                assert fine.status_code == 200
        finally:
            process.terminate()
            process.wait(20)


HOSTILE = [
    (b"", 422),
    (b"[" * 100_000, 422),
    (b'{"prompt": "a", "adapter": "../../etc"}', 404),
    (b'{"prompt": "a", "adapter": "broken"}', 424),
    (b'{"prompt": "a", "adapter": "nobody"}', 404),
    (b'{"prompt": [-1]}', 422),
    (b'{"prompt": [999999999]}', 422),
    (b'{"prompt": "a", "max_new_tokens": ' + b"9" * 5000 + b"}", 422),
    (b'{"prompt": "a", "temperature": NaN}', 422),
    (b'{"prompt": "a", "logprobs": 21}', 422),
    (b'{"prompt": "a", "max_new_tokens": 100000}', 413),
    (b'{"prompt": "a", "task_id": 1, "adapter": "fine"}', 422),
    (b'{"prompt": "a", "mode": "merged", "scale": 2, "adapter": "fine"}', 422),
    (b'{"inputs": "", "parameters": {}}', 422),
]
