"""Sources: off unless allowed, pinned, the two files alone, no byte beyond the limit, and never by a request."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import fsspec
import huggingface_hub
import pytest
from typer.testing import CliRunner, Result

import files
from adapter_server import cli
from adapter_server.errors import AdapterUnavailable, InvalidRequest
from adapter_server.registry import guard, sources
from adapter_server.registry.store import Store

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REF = f"owner/shouting@{COMMIT}"
LIMIT = 1 << 20
SOUND = {guard.CONFIG: json.dumps(files.CONFIG).encode(), guard.WEIGHTS: files.safetensors(files.tensors(3))}


@dataclass
class Hub:
    """A hub of one repository: what it holds, what it was asked for, and how it misbehaves."""

    contents: dict[str, bytes] = field(default_factory=lambda: dict(SOUND))
    asked: list[str] = field(default_factory=list)
    redirect: str | None = None
    endless: bool = False
    sent: int = 0

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked.append(request.path)
        repository, _, name = request.path.rpartition("/")
        if self.redirect and name == guard.WEIGHTS:
            request.send_response(302)
            request.send_header("Location", self.redirect)
            request.send_header("Content-Length", "0")
            request.end_headers()
        elif self.endless and name == guard.WEIGHTS:
            self.pour(request)
        else:
            found = self.contents.get(name) if repository == f"/owner/shouting/resolve/{COMMIT}" else None
            self.reply(request, found)

    def reply(self, request: BaseHTTPRequestHandler, body: bytes | None) -> None:
        request.send_response(404 if body is None else 200)
        request.send_header("Content-Length", str(len(body or b"")))
        if body is None:
            request.send_header("X-Error-Code", "EntryNotFound")
        request.end_headers()
        request.wfile.write(body or b"")

    def pour(self, request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        try:
            while True:
                self.sent += request.wfile.write(bytes(1 << 16))
        except OSError:  # the client has had enough
            self.endless = False


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.answer(self)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)  # what HF_ENDPOINT sets
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield made
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """An object store in memory, reached as s3."""
    store = fsspec.filesystem("memory")
    real = fsspec.filesystem
    monkeypatch.setattr(fsspec, "filesystem", lambda protocol, **o: store if protocol == "s3" else real(protocol, **o))
    for file, data in SOUND.items():
        store.pipe(f"/bucket/adapters/shout/{file}", data)
    yield store
    store.rm("/bucket", recursive=True)


def add(root: Path, *words: object) -> Result:
    return CliRunner().invoke(cli.app, ["adapters", "add", "--adapters", str(root), *map(str, words)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


def published(root: Path, name: str) -> tuple[bytes, str]:
    """The weights that are served, and where the manifest says that they are from."""
    store = Store(root, settle_s=0)
    return bytes(store.read(store.resolve(name)).data), store.versions(name)[-1].source


def test_from_a_hub_at_its_commit_the_two_files_alone(root: Path, hub: Hub) -> None:
    result = add(root, REF, "--allow-source", "hub")
    assert result.exit_code == 0, result.output
    assert published(root, "shouting") == (SOUND[guard.WEIGHTS], f"hub {REF}")
    assert hub.asked == [f"/owner/shouting/resolve/{COMMIT}/{file}" for file in SOUND]


def test_from_an_object_store(root: Path, bucket: fsspec.AbstractFileSystem) -> None:
    result = add(root, "s3://bucket/adapters/shout/", "--allow-source", "s3", "--name", "loud")
    assert result.exit_code == 0, result.output
    assert published(root, "loud") == (SOUND[guard.WEIGHTS], "s3://bucket/adapters/shout")


@pytest.mark.parametrize("ref", [REF, "s3://bucket/adapters/shout", "gs://bucket/adapters/shout"])
@pytest.mark.parametrize("allowed", [(), ("s3", "gs"), ("hub",)], ids=["none", "stores", "hub"])
def test_what_is_not_allowed_is_not_fetched(root: Path, ref: str, allowed: tuple[str, ...], hub: Hub) -> None:
    if sources.parse(ref).kind in allowed:
        return
    result = add(root, ref, *(word for kind in allowed for word in ("--allow-source", kind)))
    assert result.exit_code == 1
    assert "are off" in " ".join(result.output.split())
    assert hub.asked == []
    assert list(root.iterdir()) == []


def test_the_setting_is_a_variable_too(root: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_SERVER_ALLOW_SOURCE", "s3 hub")
    assert add(root, REF).exit_code == 0
    monkeypatch.setenv("ADAPTER_SERVER_ALLOW_SOURCE", "hub web")
    assert "known are hub, s3, gs" in add(root, REF).output


@pytest.mark.parametrize(
    "ref",
    [
        "owner/name", "owner/name@main", "owner/name@v1", f"owner/name@{COMMIT[:12]}", f"owner/name@{COMMIT.upper()}",
        f"name@{COMMIT}", f"datasets/name@{COMMIT}", f"a/b/c@{COMMIT}", f"../name@{COMMIT}", f"owner/..@{COMMIT}",
        "http://example.org/a", "https://example.org/a", "file:///etc/passwd", "memory://bucket/a", "s3://bucket",
        "s3://bucket/a::file:///etc/passwd", "s3://bucket/../other/a", "s3://user:secret@bucket/a", "s3://bucket/a?b",
        "s3://bucket/a/*", "S3://bucket/a", "gs:/bucket/a", "hf://owner/name", "/nowhere", "", "\0",
    ],
)  # fmt: skip
def test_what_is_no_source_is_refused_unasked(ref: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        sources.parse(ref)
    assert refused.value.message.isprintable()


def test_no_byte_beyond_the_limit(root: Path, hub: Hub) -> None:
    hub.endless = True
    result = add(root, REF, "--allow-source", "hub", "--max-adapter-bytes", LIMIT)
    assert result.exit_code == 1
    assert "the limit: raise --max-adapter-bytes" in " ".join(result.output.split())
    assert hub.sent < 32 * LIMIT  # what lies in sockets and buffers
    hub.endless = False
    hub.contents[guard.CONFIG] = b"{" + b" " * (1 << 20) + b"}"
    assert "allowed are 65,536" in add(root, REF, "--allow-source", "hub").output
    assert list(root.glob("[!.]*")) == []


@pytest.mark.parametrize("where", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/x"])
def test_a_redirect_leads_to_no_file(root: Path, hub: Hub, where: str) -> None:
    hub.redirect = where
    result = add(root, REF, "--allow-source", "hub")
    assert result.exit_code == 1
    assert "cannot be read" in result.output
    assert list(root.iterdir()) == []


def test_what_is_missing_broken_or_hostile_is_refused_by_name(root: Path, hub: Hub) -> None:
    def said() -> str:
        result = add(root, REF, "--allow-source", "hub")
        assert result.exit_code == 1
        return " ".join(result.output.split())

    hub.contents.pop(guard.WEIGHTS)
    assert f"there is no {guard.WEIGHTS}" in said()
    hub.contents[guard.WEIGHTS] = SOUND[guard.WEIGHTS][:-1]
    assert "1 bytes are missing" in said()
    hub.contents[guard.CONFIG] = b"<html>"
    assert "no valid JSON" in said()
    assert list(root.glob("[!.]*")) == []


def test_a_client_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("no s3fs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    place = sources.parse("s3://bucket/a")
    with pytest.raises(AdapterUnavailable, match=r'pip install "adapter-server\[s3\]"'), sources.opened(place, ["s3"]):
        pass


def test_a_stream_that_breaks_off_is_told_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise RuntimeError("the line\nwent dead")

    store = SimpleNamespace(open=lambda *_: nullcontext(SimpleNamespace(read=broken)))
    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: store)
    place = sources.parse("gs://bucket/a")
    with pytest.raises(AdapterUnavailable, match="RuntimeError: the line went dead"), sources.opened(place, ["gs"]):
        pass
