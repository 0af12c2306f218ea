"""The adapter routes, and the folder that changes under them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import files
from adapter_server.core import Resident
from adapter_server.errors import AdapterUnavailable, NotMergeable
from adapter_server.text import Text
from serving import Served, serving


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def test_the_list_has_every_adapter_sound_or_broken(served: Served) -> None:
    served.generate(adapter="shout")
    answer = served.http.get("/adapters").json()
    assert answer["base"] == "tiny-base"
    found = {adapter["name"]: adapter for adapter in answer["adapters"]}
    assert set(found) == {"shout", "pirate", "prefix", "prefix2", "tasks", "broken"}
    shout = found["shout"]
    assert (shout["family"], shout["state"], shout["tiers"]) == ("LORA", "registered", ["disk"])
    assert shout["bytes"] > 0
    assert shout["served"] >= 1
    assert abs(shout["last_used"] - time.time()) < 60


def test_one_adapter_is_joined_with_what_the_engine_holds(served: Served) -> None:
    version = served.generate(adapter="shout").json()["adapter_version"]
    now = Resident(
        "shout", version, "ready", "LORA", rank=8, bytes=64, snapshot_bytes=9, host_bytes=32, pinned=True, running=2
    )
    served.worker.residents = (now, Resident("shout", "0" * 12, "ready", "LORA", running=1))
    shout = served.http.get("/adapters/shout").json()
    assert (shout["version"], shout["rank"], shout["device_bytes"], shout["snapshot_bytes"]) == (version, 8, 64, 9)
    assert (shout["pinned"], shout["merged"], shout["running"], shout["tiers"]) == (
        True,
        True,
        3,
        ["disk", "host", "device"],
    )
    assert shout["host_bytes"] == 32
    assert shout["versions"] == [
        {"version": version, "current": True, "state": "ready"},
        {"version": "0" * 12, "current": False, "state": "ready"},
    ]
    assert served.http.get(f"/adapters/shout@{version}").json() == shout


def test_a_broken_one_says_why(served: Served) -> None:
    served.generate(adapter="broken")
    broken = served.http.get("/adapters/broken").json()
    assert broken["state"] == "failed"
    assert "safetensors" in broken["reason"]
    assert broken["version"] is None


@pytest.mark.parametrize("operation", ["load", "unload", "pin", "unpin", "merge", "unmerge"])
def test_operations_reach_the_engine_and_answer_with_the_adapter(served: Served, operation: str) -> None:
    response = served.http.post(f"/adapters/shout/{operation}")
    assert response.status_code == 200
    assert response.json()["name"] == response.headers["x-adapter"] == "shout"
    assert served.worker.calls == [(operation, "shout")]


def test_operations_are_refused_in_the_one_shape(served: Served) -> None:
    served.worker.refuse = NotMergeable("prefixes have no merged form")
    response = served.http.post("/adapters/prefix/merge")
    assert (response.status_code, response.json()["error"]["code"]) == (409, "not_mergeable")
    served.worker.refuse = AdapterUnavailable("does not fit")
    assert served.http.post("/adapters/shout/load").status_code == 424
    assert served.http.post("/adapters/nobody/load").status_code == 404
    assert served.http.get("/adapters/nobody").status_code == 404
    response = served.http.post("/adapters/shout/explode")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


@pytest.fixture
def changing(text: Text, tmp_path: Path) -> Iterator[Served]:
    files.age(files.write(tmp_path / "shout"))
    with serving(text, tmp_path) as served:
        yield served


def test_a_new_folder_answers_within_two_seconds(changing: Served) -> None:
    files.write(changing.adapters / "fresh", 3)
    wait_until(lambda: changing.generate(adapter="fresh").status_code == 200, 2.0)


def test_a_removed_adapter_is_unloaded_and_leaves_the_metrics(changing: Served) -> None:
    changing.generate(adapter="shout")
    changing.worker.residents = (Resident("shout", "0" * 12, "ready", "LORA", pinned=True),)
    assert 'adapter="shout"' in changing.http.get("/metrics").text
    shutil.rmtree(changing.adapters / "shout")
    wait_until(lambda: changing.worker.calls == [("unpin", "shout"), ("unload", "shout")])
    assert 'adapter="shout"' not in changing.http.get("/metrics").text
    assert changing.generate(adapter="shout").status_code == 404


def test_a_replaced_adapter_lets_the_old_version_go_and_keeps_its_pin(changing: Served) -> None:
    before = changing.generate(adapter="shout").json()["adapter_version"]
    changing.worker.residents = (Resident("shout", before, "ready", "LORA", pinned=True),)
    files.write(changing.adapters / "shout", 8)
    wait_until(lambda: ("unload", "shout") in changing.worker.calls)
    assert changing.worker.calls == [("pin", "shout"), ("unpin", "shout"), ("unload", "shout")]
    assert changing.generate(adapter="shout").json()["adapter_version"] != before
