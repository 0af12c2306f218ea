"""The service routes, the one shape of every refusal, and how a server ends."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from adapter_server import __version__
from adapter_server.api import lorax, refusals
from adapter_server.api.app import PULSE_S, create_app
from adapter_server.api.envelope import Envelope
from adapter_server.api.hosts import check_host
from adapter_server.config import ServerConfig
from adapter_server.errors import AdapterServerError, InvalidRequest, RequestFailed, VersionGone
from adapter_server.metrics import Metrics
from adapter_server.registry.store import Store
from adapter_server.text import Text
from fakes import INFO, FakeWorker
from serving import Served, serving


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health"])
def test_a_running_server_is_well(served: Served, path: str) -> None:
    assert served.http.get(path).json() == {"status": "ok"}


def test_it_says_what_it_is(served: Served) -> None:
    assert served.http.get("/version").json() == {"version": __version__}
    info = served.http.get("/info").json()
    assert (info["model"], info["max_model_len"], info["vocab_size"]) == ("tiny-base", 256, 257)


def test_tokens_go_both_ways(served: Served) -> None:
    answer = served.http.post("/tokenize", json={"prompt": "hé"}).json()
    assert answer["count"] == len(answer["token_ids"]) == 3
    back = served.http.post("/detokenize", json={"token_ids": answer["token_ids"]})
    assert back.json() == {"text": "hé"}
    assert served.http.post("/detokenize", json={"token_ids": [999]}).status_code == 422


def test_metrics_show_requests_and_never_a_callers_text(served: Served) -> None:
    served.generate(adapter="shout")
    for secret in ({"adapter": "SECRET"}, {"SECRET": 1}, {"prompt": "SECRET"}):
        served.http.post("/generate", json={"prompt": "a", **secret})
    served.http.get("/SECRET")
    response = served.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'adapter_server_requests_total{adapter="shout",mode="unmerged",outcome="eos"}' in response.text
    assert 'adapter_server_refused_total{code="adapter_not_found"}' in response.text
    assert "SECRET" not in response.text


def test_the_documents_describe_the_body(served: Served) -> None:
    document = served.http.get("/openapi.json").json()
    body = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "max_new_tokens" in body["properties"]
    assert "$ref" not in json.dumps(body)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nowhere", b"", 404, "not_found"),
        ("GET", "/generate", b"", 405, "method_not_allowed"),
        ("POST", "/generate", b"{", 422, "invalid_request"),
        ("POST", "/generate", b"[" * 15_000, 422, "invalid_request"),
        ("POST", "/generate", b" " * 20_001, 413, "body_too_large"),
    ],
)
def test_every_refusal_has_the_one_shape(
    served: Served, method: str, path: str, body: bytes, status: int, code: str
) -> None:
    response = served.http.request(method, path, content=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    assert response.headers["server-timing"]
    if status == 405:
        assert error["message"] == "there is no GET /generate: ask with POST"
    assert response.headers.get("connection") == ("close" if status == 413 else None)


def test_a_body_of_unknown_length_has_the_same_limit(served: Served) -> None:
    response = served.http.post("/generate", content=iter([b" " * 9_000] * 3))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_our_own_mistake_is_a_500_with_an_id_to_look_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(served.worker, "submit", fail)
    response = served.generate()
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert response.headers["x-request-id"] in response.json()["error"]["message"]
    assert "secret detail" not in response.text


# Ends


def signal(served: Served) -> None:
    served.server.handle_exit(15, None)


def test_a_signal_drains(own: Served) -> None:
    own.worker.step_s = 0.03
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{own.server.address}/generate", json={"prompt": "x" * 20}))
    )
    asking.start()
    while not own.worker.rows:
        time.sleep(0.01)
    signal(own)
    late = own.generate()
    assert (late.status_code, late.json()["error"]["code"]) == (503, "unavailable")
    assert int(late.headers["retry-after"]) >= 1
    assert own.http.get("/readyz").status_code == 503
    assert own.http.get("/livez").status_code == 200
    asking.join()
    own.thread.join(5)
    assert answers[0].json()["text"] == "x" * 20
    assert (own.server.exit_code, own.thread.is_alive(), own.worker.alive) == (0, False, False)


def test_what_takes_too_long_to_drain_ends_with_what_it_has(own: Served) -> None:
    own.worker.step_s = 0.05
    body = {"prompt": "x" * 200, "stream": True}
    with own.http.stream("POST", "/generate", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        signal(own)
        last = [json.loads(line.removeprefix("data: ")) for line in lines if line][-1]
    assert last["finish_reason"] == "cancelled"
    own.thread.join(5)
    assert not own.thread.is_alive()


def test_a_second_signal_does_not_wait(own: Served) -> None:
    own.worker.step_s = 0.5
    with own.http.stream("POST", "/generate", json={"prompt": "x" * 200, "stream": True}) as response:
        next(response.iter_lines())
        signal(own)
        signal(own)
        own.thread.join(0.9)
        assert own.server.force_exit


def test_a_dead_engine_ends_the_server(own: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_server.api.app.PULSE_S", 1.0)  # time enough to ask on a busy machine
    time.sleep(1.5 * PULSE_S)
    own.worker.alive = False
    assert own.generate().status_code == 503
    assert own.http.get("/livez").status_code == 503
    own.thread.join(5)
    assert (own.server.exit_code, own.thread.is_alive()) == (1, False)


@pytest.mark.parametrize(
    ("host", "insecure", "fine"),
    [
        ("127.0.0.1", False, True),
        ("127.8.8.8", False, True),
        ("::1", False, True),
        ("localhost", False, True),
        ("0.0.0.0", False, False),
        ("::", False, False),
        ("example.com", False, False),
        ("0.0.0.0", True, True),
    ],
)
def test_only_this_machine_may_ask_unless_told_otherwise(host: str, insecure: bool, fine: bool) -> None:
    config = ServerConfig(host=host, insecure=insecure)
    if fine:
        check_host(config)
    else:
        with pytest.raises(InvalidRequest, match="--insecure"):
            check_host(config)


# What a client may send


def test_headers_have_a_limit(served: Served) -> None:
    response = served.http.post("/generate", json={"prompt": "a"}, headers={"x-long": "a" * 70_000})
    assert response.status_code in (400, 431)  # the parser's own answer where they came in several pieces
    raw = f"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Long: {'a' * 65_000}\r\nX-More: {'b' * 900}\r\n\r\n"
    with socket.create_connection((served.http.base_url.host, served.http.base_url.port or 0)) as client:
        client.sendall(raw.encode())
        said = client.recv(65_536).decode()
    assert said.startswith(("HTTP/1.1 431", "HTTP/1.1 400"))
    assert served.generate().status_code == 200


async def exchanged(headers: list[tuple[bytes, bytes]], body: list[bytes], path: str = "/", **config: Any) -> Any:
    """What the envelope alone answers to this; the body's parts come one at a time, and then nothing more."""
    sent: list[Any] = []
    parts = iter(body)

    async def receive() -> Any:
        part = next(parts, None)
        if part is None:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": part, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            while True:
                await receive()
        except AdapterServerError as error:
            await refusals.answer(error, scope["wording"])(scope, receive, send)

    state = SimpleNamespace(state=SimpleNamespace(service=SimpleNamespace(metrics=Metrics())))
    scope = {"type": "http", "path": path, "method": "POST", "headers": headers, "app": state}
    envelope = Envelope(app, ServerConfig(**config), {"/": lorax.worded})
    await envelope(scope, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


@pytest.mark.parametrize(
    ("headers", "body", "config", "status"),
    [
        ([(b"x", b"a" * 200)], [], {"max_header_bytes": 200}, 431),
        ([(b"content-length", b"11")], [], {"max_body_bytes": 10}, 413),
        ([(b"content-length", b"9" * 5000)], [], {"max_body_bytes": 10}, 413),
        ([], [b"123456", b"789012"], {"max_body_bytes": 10}, 413),
        ([], [b"1", b"2"], {"body_timeout_s": 0.05}, 408),
    ],
)
@pytest.mark.parametrize("path", ["/", "/generate"])
def test_what_is_too_much_or_too_slow_is_refused_in_the_paths_own_words(
    headers: list[tuple[bytes, bytes]], body: list[bytes], config: dict[str, Any], status: int, path: str
) -> None:
    got, content = asyncio.run(exchanged(headers, body, path, **config))
    assert got == status
    if path == "/":
        assert content.keys() == {"error", "error_type"}
        assert content["error_type"] == "validation"
    else:
        assert content["error"]["code"] in ("headers_too_large", "body_too_large", "body_too_slow")


def test_a_slow_body_is_answered_and_the_connection_ends(text: Text, adapters: Path) -> None:
    with (
        serving(text, adapters, ServerConfig(body_timeout_s=0.2)) as served,
        socket.create_connection((served.http.base_url.host, served.http.base_url.port or 0), timeout=5) as client,
    ):
        client.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        said = b""
        while part := client.recv(4096):
            said += part
    assert said.startswith(b"HTTP/1.1 408")
    assert b"body_too_slow" in said


def count(served: Served, name: str, label: str) -> float:
    lines = served.http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name) and label in line)


def test_an_admitted_request_that_fails_is_counted_once(own: Served) -> None:
    own.worker.script = lambda request: RequestFailed("no")
    assert own.generate().status_code == 500
    assert count(own, "adapter_server_requests_total", "request_failed") == 1
    assert count(own, "adapter_server_refused_total", "request_failed") == 0
    assert own.http.post("/", json={"inputs": "a"}).status_code == 500
    assert count(own, "adapter_server_refused_total", "request_failed") == 0
    own.worker.script = lambda request: VersionGone("no")
    assert own.generate(adapter="shout").status_code == 424
    assert count(own, "adapter_server_requests_total", "version_gone") == 0
    assert count(own, "adapter_server_refused_total", "version_gone") == 1
    assert count(own, "adapter_server_tokens_total", "prompt") == 0
    own.worker.limit = 0
    assert own.generate().status_code == 429
    assert count(own, "adapter_server_refused_total", "queue_full") == 1


# Clients that do not read


async def stalled(app: Any, config: ServerConfig, body: dict[str, Any]) -> list[Any]:
    """What a client got that takes a first chunk and then waits: a while, or for good."""
    taken: list[Any] = []
    service = app.state.service
    slow = config.write_timeout_s > 1

    async def receive() -> Any:
        if not taken and not service.worker.requests:
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        return await asyncio.sleep(60)

    async def send(message: Any) -> None:
        taken.append(message)
        if len(taken) == 2:
            await asyncio.sleep(1.0 if slow else 60)

    scope = {"type": "http", "path": "/generate", "raw_path": b"/generate", "query_string": b"", "root_path": ""}
    scope |= {"method": "POST", "headers": [], "scheme": "http", "server": ("localhost", 80), "http_version": "1.1"}
    async with app.router.lifespan_context(app):
        await app(scope, receive, send)
        until = asyncio.get_running_loop().time() + 5
        while service.worker.rows or service.bridge.open_requests:
            assert asyncio.get_running_loop().time() < until
            await asyncio.sleep(0.01)
    return taken


def test_a_stream_that_nobody_reads_is_cut_off_and_the_engine_goes_on(text: Text, adapters: Path) -> None:
    config = ServerConfig(stream_buffer_tokens=40)
    app = create_app(lambda deliver: FakeWorker(deliver, step_s=0.002), Store(adapters), text, INFO, config)
    ask = {"prompt": "x" * 200, "stream": True, "logprobs": 1, "max_new_tokens": 50}
    taken = asyncio.run(stalled(app, config, ask))
    events = [
        json.loads(line.removeprefix("data: ")) for m in taken[1:] for line in m["body"].decode().splitlines() if line
    ]
    assert events[-1]["error"]["code"] == "client_too_slow"
    assert 20 <= len(events) - 1 <= 25  # what was there when the buffer was full, and no more
    metrics = app.state.service.metrics
    assert b'outcome="client_too_slow"' in metrics.render(app.state.service.worker.stats(), {})


def test_a_client_that_takes_nothing_is_let_go(text: Text, adapters: Path) -> None:
    config = ServerConfig(write_timeout_s=0.1)
    app = create_app(lambda deliver: FakeWorker(deliver, step_s=0.01), Store(adapters), text, INFO, config)
    start = time.monotonic()
    taken = asyncio.run(stalled(app, config, {"prompt": "x" * 200, "stream": True, "max_new_tokens": 50}))
    assert len(taken) == 2
    assert time.monotonic() - start < 3


def test_pages_of_named_origins_may_ask_and_no_others(text: Text, adapters: Path, served: Served) -> None:
    asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in served.http.options("/generate", headers=asks).headers
    config = ServerConfig(cors_origin=("https://a.example",), api_key=("key",))
    with serving(text, adapters, config) as named:
        allowed = named.http.options("/generate", headers=asks)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://a.example")
        assert named.http.options("/generate", headers=asks | {"Origin": "https://b.example"}).status_code == 400
        refused = named.http.post("/generate", json={"prompt": "a"}, headers={"Origin": "https://a.example"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")
