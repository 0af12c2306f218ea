"""Hot replacement under load: versions come and go beneath the requests, and no answer is a mixture or a failure."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

import layouts
import tiny
from adapter_server.config import EngineConfig, ServerConfig
from adapter_server.registry import guard, versions
from adapter_server.registry.store import Store

KEEP, EVERY_S, TOKENS = 3, 0.2, 16


@dataclass
class Heard:
    """What the clients got."""

    said: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)  # version: answers
    failures: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # seconds between two tokens of one answer

    def p99(self) -> float:
        return sorted(self.gaps)[int(0.99 * (len(self.gaps) - 1))]


@contextmanager
def running(folder: Path, layout: layouts.Layout) -> Iterator[tuple[str, Store]]:
    """A server over a tiny base, and where it is."""
    tiny.save_base(folder / "tiny")
    config = EngineConfig(max_rows=16, kv_bytes=64 << 20)
    with layouts.running(
        layout, folder / "tiny", folder / "adapters", config, ServerConfig(keep_versions=KEEP)
    ) as served:
        yield served.address, served.store


def publish(http: httpx.Client, folder: Path, seed: int) -> str:
    made = tiny.save_lora(folder / f"seed{seed}", seed)
    response = http.put("/adapters/hot", files={f: (made / f).read_bytes() for f in (guard.CONFIG, guard.WEIGHTS)})
    assert response.status_code == 201, response.text
    version: str = response.json()["version"]
    return version


def listen(address: str, until: float, heard: Heard) -> None:
    """One client that asks again and again."""
    body = {"prompt": "red cat>", "adapter": "hot", "max_new_tokens": TOKENS, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=address, timeout=30) as http:
        while time.monotonic() < until:
            with http.stream("POST", "/generate", json=body | {"return_token_ids": True}) as response:
                take(response, heard)


def take(response: httpx.Response, heard: Heard) -> None:
    ids: list[int] = []
    last = None
    for line in response.iter_lines():
        event = json.loads(line.removeprefix("data: ")) if line else {}
        if "error" in event:
            heard.failures.append(line)
        if event.get("token_ids"):
            now = time.monotonic()
            heard.gaps += [now - last] if last else []
            ids, last = ids + event["token_ids"], now
    if len(ids) != TOKENS:
        heard.failures.append(f"{response.status_code}: {len(ids)} tokens")
    heard.said.setdefault(response.headers.get("x-adapter-version", ""), set()).add(tuple(ids))


def replaced(
    folder: Path, layout: layouts.Layout, clients: int, seconds: float
) -> tuple[Heard, Heard, list[str], Store]:
    """(heard in quiet, heard while versions are published, the versions, the registry)."""
    quiet, busy = Heard(), Heard()
    with running(folder, layout) as (address, store), httpx.Client(base_url=address, timeout=30) as http:
        made = [publish(http, folder, 0)]
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(lambda _: listen(address, time.monotonic() + seconds / 2, quiet), range(clients)))
            until = time.monotonic() + seconds
            asked = pool.map(lambda _: listen(address, until, busy), range(clients))
            while time.monotonic() < until - EVERY_S:
                time.sleep(EVERY_S)
                made.append(publish(http, folder, len(made)))
                if len(made) % 5 == 0:
                    assert http.post("/adapters/hot/rollback").status_code == 200
            list(asked)
    return quiet, busy, made, store


def check(heard: Heard, made: list[str], store: Store) -> None:
    assert heard.failures == []
    assert all(len(answers) == 1 for answers in heard.said.values())
    assert len(set.union(*heard.said.values())) > 0.9 * len(heard.said)  # a few may say the same by chance
    assert heard.said.keys() <= set(made)
    assert len(heard.said) > len(made) / 2
    left = {path.name for path in versions.shelf(store.root, "hot").iterdir()}
    assert left <= set(made)
    assert len(left) <= KEEP + 2  # those in use at the last publish


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_every_answer_is_wholly_of_one_version(tmp_path: Path, layout: layouts.Layout) -> None:
    _, busy, made, store = replaced(tmp_path, layout, clients=4, seconds=2.5)
    check(busy, made, store)


@pytest.mark.soak
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_a_minute_of_new_versions_holds_nobody_up(tmp_path: Path, layout: layouts.Layout) -> None:
    quiet, busy, made, store = replaced(tmp_path, layout, clients=16, seconds=60)
    check(busy, made, store)
    assert busy.p99() <= 1.5 * quiet.p99(), (busy.p99(), quiet.p99())
