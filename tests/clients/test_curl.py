"""curl: whole answers, streams as they come, its time-out, and every kind of refusal by its status."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import live
from adapter_server.config import ServerConfig
from live import Live

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
KEY = "may-ask"


@pytest.fixture(scope="module")
def demo() -> Iterator[Live]:
    with live.demo(config=ServerConfig(api_key=(KEY,), max_body_bytes=10_000)) as running:
        yield running


def curl(demo: Live, path: str, *words: str, key: str = KEY) -> subprocess.CompletedProcess[str]:
    command = ["curl", "-s", "-H", f"Authorization: Bearer {key}", *words, demo.address + path]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def status(demo: Live, path: str, *words: str, key: str = KEY) -> str:
    return curl(demo, path, "-o", "/dev/null", "-w", "%{http_code}", *words, key=key).stdout


def test_it_needs_no_header_of_its_own(demo: Live) -> None:
    answer = json.loads(curl(demo, "/generate", "-d", '{"prompt": "red cat>", "adapter": "shout"}').stdout)
    assert (answer["text"], answer["finish_reason"]) == ("RED CAT", "eos")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", '{"prompt": "red cat>", "adapter": "shout", "stream": true}'),
        ("/generate_stream", '{"inputs": "red cat>", "parameters": {"adapter_id": "shout"}}'),
        ("/v1/completions", '{"prompt": "red cat>", "model": "shout", "temperature": 0, "stream": true}'),
    ],
)
def test_a_stream_comes_event_by_event(demo: Live, path: str, body: str) -> None:
    command = ["curl", "-sN", "-H", f"Authorization: Bearer {KEY}", "-d", body, demo.address + path]
    came: list[float] = []
    with demo.slowly(0.03), subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line.strip():
                assert line.startswith("data: ")
                came.append(time.monotonic())
    assert process.returncode == 0
    assert len(came) >= 8
    assert came[-1] - came[0] >= 0.1  # not all at the end


def test_its_time_out_frees_the_place(demo: Live) -> None:
    body = '{"prompt": "red cat>", "adapter": "caesar", "max_new_tokens": 400, "ignore_eos": true}'
    with demo.slowly(0.02):
        ended = curl(demo, "/generate", "--max-time", "0.5", "-d", body)
        assert ended.returncode == 28  # curl's word for a time-out
        demo.settle(5)
        ended = curl(demo, "/generate", "-N", "--max-time", "3", "-d", body[:-1] + ', "stream": true}')
        assert (ended.returncode, ended.stdout.startswith("data: ")) == (28, True)
        demo.settle(5)


@pytest.mark.parametrize(
    ("path", "words", "expected"),
    [
        ("/generate", ("-d", '{"prompt": "a", "adapter": "nobody"}'), "404"),
        ("/generate", ("-d", '{"prompt": "a", "top_p": 2}'), "422"),
        ("/generate", ("-d", "{"), "422"),
        ("/generate", ("-d", '{"prompt": "a", "timeout_s": 1e-9}'), "504"),
        ("/generate", ("-d", "x" * 20_000), "413"),
        ("/generate", (), "405"),
        ("/v1/completions", ("-d", '{"prompt": "a", "top_p": 2}'), "400"),
        ("/generate_stream", ("-d", '{"inputs": ""}'), "422"),
        ("/adapters", (), "403"),
        ("/nowhere", (), "404"),
    ],
)
def test_a_refusal_has_its_status(demo: Live, path: str, words: tuple[str, ...], expected: str) -> None:
    assert status(demo, path, *words) == expected
    assert curl(demo, path, "--fail", *words).returncode == 22


def test_without_its_key_it_is_refused(demo: Live) -> None:
    assert status(demo, "/info", key="wrong") == "401"
    assert status(demo, "/livez", key="wrong") == "200"


def test_an_upload_may_be_expected(demo: Live, tmp_path: Path) -> None:
    """curl asks first, with `Expect: 100-continue`, where a body is large."""
    large = tmp_path / "large.json"
    large.write_text(json.dumps({"prompt": "x" * 3_000}))
    assert status(demo, "/generate", "-H", "Expect: 100-continue", "-d", f"@{large}") == "413"
