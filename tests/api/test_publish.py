"""Uploading, going back and deleting over HTTP: what a client sees, refused or not."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import files
from adapter_server.config import ServerConfig
from adapter_server.registry import guard
from adapter_server.text import Text
from serving import Served, serving

MOST = 40_000


@pytest.fixture(scope="module")
def live(text: Text, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    config = ServerConfig(max_body_bytes=1000, max_adapter_bytes=MOST, keep_versions=2)
    with serving(text, tmp_path_factory.mktemp("published"), config) as served:
        yield served


def put(live: Served, name: str, seed: int = 1, **other: bytes) -> httpx.Response:
    parts = {"config": json.dumps(files.CONFIG).encode(), "weights": files.safetensors(files.tensors(seed))} | other
    upload = {guard.CONFIG: parts["config"], guard.WEIGHTS: parts["weights"]}
    return live.http.put(f"/adapters/{name}", files=upload)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def error(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_an_upload_is_served_at_once(live: Served) -> None:
    response = put(live, "fresh")
    assert response.status_code == 201, response.text
    made = response.json()
    assert (made["name"], made["family"], made["state"]) == ("fresh", "LORA", "registered")
    assert response.headers["x-adapter-version"] == made["version"]
    answer = live.generate(adapter="fresh").json()
    assert answer["adapter_version"] == made["version"]


def slow_upload(live: Served, name: str, until: threading.Event) -> httpx.Response:
    """The last bytes of a form come when the event is set."""
    whole = httpx.Request("PUT", live.http.base_url, files={guard.CONFIG: b"{}", guard.WEIGHTS: b"x"})
    body = whole.read()

    def pieces() -> Iterator[bytes]:
        yield body[:20]
        until.wait(10)
        yield body[20:]

    return live.http.put(f"/adapters/{name}", content=pieces(), headers={"content-type": whole.headers["content-type"]})


def test_few_uploads_are_under_way_at_once(live: Served) -> None:
    until, most = threading.Event(), ServerConfig().max_uploads
    with ThreadPoolExecutor(most) as threads:
        held = [threads.submit(slow_upload, live, f"slow{i}", until) for i in range(most)]
        wait_until(lambda: live.server._service.uploads == most)
        response = put(live, "late")
        assert error(response) == (429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        until.set()
        assert [error(done.result()) for done in held] == [(422, "adapter_refused")] * most
    assert put(live, "late").status_code == 201


def test_an_upload_that_stalls_gives_its_place_up(text: Text, tmp_path: Path) -> None:
    with serving(text, tmp_path, ServerConfig(request_timeout_s=0.2, max_uploads=1)) as live:
        where = live.http.base_url
        with socket.create_connection((where.host, where.port or 0), timeout=10) as client:
            client.sendall(b"PUT /adapters/slow HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n")
            client.sendall(b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n")  # and no more
            answer = b""
            while b"deadline_exceeded" not in answer and (part := client.recv(1 << 16)):
                answer += part
        assert answer.startswith(b"HTTP/1.1 504 ")
        assert b"deadline_exceeded" in answer
        assert put(live, "next").status_code == 201


def test_versions_are_listed_newest_first_and_go_back(live: Served) -> None:
    for seed in (1, 2, 3):
        put(live, "many", seed)
    shown = live.http.get("/adapters/many").json()["versions"]
    assert [(v["number"], v["current"], v["source"]) for v in shown] == [(3, True, "upload"), (2, False, "upload")]
    assert live.generate(adapter="many@v2").json()["adapter_version"] == shown[1]["version"]
    back = live.http.post("/adapters/many/rollback")
    assert (back.status_code, back.json()["version"]) == (200, shown[1]["version"])
    assert live.generate(adapter="many").json()["adapter_version"] == shown[1]["version"]
    listed = live.http.get(f"/adapters/many@{shown[0]['version']}").json()
    assert [v["version"] for v in listed["versions"] if v["current"]] == [shown[1]["version"]]
    assert error(live.http.post("/adapters/many/rollback")) == (409, "version_conflict")


def test_a_deleted_adapter_is_gone(live: Served) -> None:
    put(live, "leaving")
    response = live.http.delete("/adapters/leaving")
    assert (response.status_code, response.content) == (204, b"")
    assert error(live.generate(adapter="leaving")) == (404, "adapter_not_found")
    assert error(live.http.delete("/adapters/leaving")) == (404, "adapter_not_found")
    assert error(live.http.post("/adapters/leaving/rollback")) == (404, "adapter_not_found")


@pytest.mark.parametrize(
    ("name", "other", "said"),
    [
        ("bad", {"config": b"{"}, "adapter_config.json: no valid JSON"),
        ("bad", {"config": b" " * 70_000}, "allowed are 65,536"),
        ("bad", {"weights": b"x" * 100}, "adapter_model.safetensors: a header"),
        ("bad", {"weights": files.safetensors({"x": np.full(1, np.nan, np.float32)})}, "NaN or infinity"),
        ("base", {}, "is reserved"),
        ("a b", {}, "is not allowed"),
        ("x" * 129, {}, "is not allowed"),
    ],
)
def test_what_is_unsound_is_refused_whole(live: Served, name: str, other: dict[str, bytes], said: str) -> None:
    response = put(live, name, **other)
    assert error(response) == (422, "adapter_refused")
    assert said in response.json()["error"]["message"]
    assert not (live.adapters / name).exists()


@pytest.mark.parametrize(
    "body",
    [
        {"json": {}},
        {"content": b"x"},
        {"files": {guard.CONFIG: b"{}"}},
        {"files": {guard.WEIGHTS: b""}},
        {"data": {guard.CONFIG: "{}", guard.WEIGHTS: "x"}},
        {"files": {"a": b"", "b": b"", "c": b""}},
        {"content": b"--x\r\nbroken", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        {"content": b"", "headers": {"content-type": "multipart/form-data"}},
    ],
)
def test_what_is_no_upload_is_told_how(live: Served, body: dict[str, Any]) -> None:
    response = live.http.put("/adapters/bad", **body)
    assert error(response) == (422, "invalid_request"), response.text
    assert "-F adapter_config.json=@adapter_config.json" in response.json()["error"]["message"]


def test_bodies_beyond_all_limits_end_early(live: Served) -> None:
    assert error(put(live, "bad", weights=b"\0" * (MOST + (2 << 20)))) == (413, "body_too_large")
    assert error(live.http.post("/adapters/bad/rollback", content=b"x" * 2000)) == (413, "body_too_large")
    assert error(live.http.put("/adapters/bad/rollback", content=b"x" * 2000)) == (413, "body_too_large")


def test_an_upload_over_a_folder_being_copied_is_a_conflict(live: Served) -> None:
    os.makedirs(live.adapters / "half")
    assert error(put(live, "half")) == (409, "version_conflict")


def test_a_disk_that_refuses_is_said(live: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adapter_server.registry.disk.Disk.write", full)
    response = put(live, "full")
    assert error(response) == (500, "storage_failed")
    assert "No space left" in response.json()["error"]["message"]
    assert not Path(live.adapters / "full").exists()
