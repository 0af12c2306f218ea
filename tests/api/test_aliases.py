"""Aliases over HTTP: switched in one step, shared out, kept over a restart, and never in an adapter's way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import httpx
import pytest

import files
from adapter_server.api.server import Server
from adapter_server.config import ServerConfig
from adapter_server.errors import AdapterUnavailable
from adapter_server.registry.publish import Publisher
from adapter_server.registry.store import Store
from adapter_server.text import Text
from fakes import INFO, FakeWorker
from serving import Served, serving


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate(("shout", "pirate")):
        files.age(files.write(tmp_path / "adapters" / name, seed))
    publisher = Publisher(Store(tmp_path / "adapters"))
    for seed in (11, 12):
        folder = files.write(tmp_path / "new", seed)
        with (folder / "adapter_model.safetensors").open("rb") as weights:
            publisher.publish("sql", (folder / "adapter_config.json").read_bytes(), weights)
    return tmp_path / "adapters"


@pytest.fixture
def served(text: Text, root: Path) -> Iterator[Served]:
    with serving(text, root) as served:
        yield served


def put(served: Served, name: str, adapter: Any) -> httpx.Response:
    return served.http.put(f"/aliases/{name}", json={"adapter": adapter})


def version(served: Served, adapter: str, **fields: Any) -> str:
    return str(served.generate(adapter=adapter, **fields).headers["x-adapter-version"])


def test_an_alias_leads_to_a_version_until_it_is_switched(served: Served) -> None:
    one, two = version(served, "sql@v1"), version(served, "sql@v2")
    assert put(served, "prod-sql", "sql@v1").json() == {
        "name": "prod-sql",
        "adapter": [{"name": "sql@v1", "share": 1.0}],
    }
    answer = served.generate(adapter="prod-sql")
    assert (answer.headers["x-adapter"], answer.headers["x-adapter-version"]) == ("sql", one)
    assert (answer.json()["adapter"], answer.json()["adapter_version"]) == ("sql", one)
    put(served, "prod-sql", "sql@v2")
    assert version(served, "prod-sql") == two
    chat = served.http.post("/v1/completions", json={"model": "prod-sql", "prompt": "ab"})
    assert (chat.json()["model"], chat.headers["x-adapter-version"]) == ("prod-sql", two)
    lorax = {"inputs": "ab", "parameters": {"adapter_id": "prod-sql"}}
    assert served.http.post("/", json=lorax).headers["x-adapter-version"] == two
    assert "prod-sql" in [card["id"] for card in served.http.get("/v1/models").json()["data"]]
    assert served.http.get("/aliases/prod-sql").json()["adapter"][0]["name"] == "sql@v2"
    assert [alias["name"] for alias in served.http.get("/aliases").json()["aliases"]] == ["prod-sql"]
    assert served.http.delete("/aliases/prod-sql").status_code == 204
    assert served.generate(adapter="prod-sql").status_code == 404
    assert served.http.delete("/aliases/prod-sql").status_code == 404
    assert served.http.get("/aliases/prod-sql").status_code == 404


def test_a_canary_gets_its_share_and_a_seed_or_an_id_decides(served: Served) -> None:
    one, two = version(served, "sql@v1"), version(served, "sql@v2")
    put(served, "prod", [{"name": "sql@v1", "share": 70}, {"name": "sql@v2", "share": 30}])
    chosen = Counter(version(served, "prod", seed=seed) for seed in range(60))
    assert chosen.keys() == {one, two}
    assert chosen[one] > chosen[two]
    for seed in range(8):
        assert len({version(served, "prod", seed=seed) for _ in range(3)}) == 1
    ids = {
        served.http.post(
            "/generate", json={"prompt": "a", "adapter": "prod"}, headers={"X-Request-Id": "same"}
        ).headers["x-adapter-version"]
        for _ in range(5)
    }
    assert len(ids) == 1


def test_all_answers_of_one_exchange_are_of_one_version(served: Served) -> None:
    put(served, "prod", [{"name": "sql@v1"}, {"name": "sql@v2"}])
    for seed in range(4):
        served.worker.requests.clear()
        body = {"model": "prod", "prompt": ["a", "b"], "n": 8, "seed": seed, "max_tokens": 1}
        assert served.http.post("/v1/completions", json=body).status_code == 200
        assert len({request.members[0].spec.version for request in served.worker.requests}) == 1


def test_aliases_outlive_the_server_and_so_do_vllms_names(text: Text, root: Path) -> None:
    with serving(text, root) as served:
        put(served, "prod", "sql@v1")
        served.http.post("/v1/load_lora_adapter", json={"lora_name": "theirs", "lora_path": "shout"})
    with serving(text, root) as again:
        assert again.generate(adapter="prod").json()["adapter"] == "sql"
        assert again.generate(adapter="theirs").json()["adapter"] == "shout"
        taken = again.http.post("/v1/load_lora_adapter", json={"lora_name": "theirs", "lora_path": "shout"})
        assert taken.status_code == 400
        assert again.http.post("/v1/unload_lora_adapter", json={"lora_name": "theirs"}).status_code == 200
    with serving(text, root) as last:
        assert last.generate(adapter="theirs").status_code == 404


@pytest.mark.parametrize(
    ("name", "adapter", "status"),
    [
        ("shout", "pirate", 409),
        ("tiny-base", "pirate", 409),
        ("SHOUT", "pirate", 422),
        ("base", "pirate", 422),
        ("a,b", "pirate", 422),
        ("a@v1", "pirate", 422),
        ("fine", "nobody", 404),
        ("fine", "sql@v9", 404),
        ("fine", "", 404),
        ("fine", "fine", 404),
        ("fine", [], 422),
        ("fine", [{"name": "shout", "share": 0}], 422),
        ("fine", [{"name": "shout", "weight": 1}], 422),
        ("fine", [{"name": "shout"}] * 9, 422),
        ("fine", 5, 422),
    ],
)
def test_what_an_alias_cannot_be_is_refused(served: Served, name: str, adapter: Any, status: int) -> None:
    response = put(served, name, adapter)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]
    assert not served.http.get("/aliases").json()["aliases"]


def test_an_alias_of_an_alias_there_is_none(served: Served) -> None:
    put(served, "one", "shout")
    assert put(served, "two", "one").status_code == 404


def test_an_adapter_that_comes_later_is_not_hidden(served: Served) -> None:
    put(served, "loud", "shout")
    with (served.adapters / "pirate" / "adapter_model.safetensors").open("rb") as weights:
        config = (served.adapters / "pirate" / "adapter_config.json").read_bytes()
        upload = {"adapter_config.json": config, "adapter_model.safetensors": weights}
        assert served.http.put("/adapters/loud", files=upload).status_code == 409
    files.age(files.write(served.adapters / "loud", 5))
    until = 100
    while served.generate(adapter="loud").headers.get("x-adapter") != "loud" and until:
        until -= 1
    assert served.generate(adapter="loud").json()["adapter"] == "loud"


def test_versions_of_an_alias_stay_when_others_are_pruned(text: Text, root: Path) -> None:
    with serving(text, root, ServerConfig(keep_versions=1)) as served:
        put(served, "prod", "sql@v1")
        for seed in (13, 14, 15):
            folder = files.write(served.adapters.parent / "more", seed)
            with (folder / "adapter_model.safetensors").open("rb") as weights:
                config = (folder / "adapter_config.json").read_bytes()
                upload = {"adapter_config.json": config, "adapter_model.safetensors": weights}
                assert served.http.put("/adapters/sql", files=upload).status_code == 201
        numbers = [v.get("number") for v in served.http.get("/adapters/sql").json()["versions"]]
        assert numbers == [5, 1]
        assert served.generate(adapter="prod").status_code == 200


# Preloading


def test_what_is_preloaded_is_there_before_the_first_request(text: Text, root: Path) -> None:
    with serving(text, root, ServerConfig(preload=("shout,sql@v1", "pirate"))) as served:
        assert served.worker.calls == [("load", "shout"), ("load", "sql"), ("load", "pirate")]
        put(served, "prod", [{"name": "sql@v1"}, {"name": "sql@v2"}])
    with serving(text, root, ServerConfig(preload=("prod",), preload_pinned=True)) as served:
        assert served.worker.calls == [("pin", "sql"), ("pin", "sql")]
        assert served.http.get("/readyz").status_code == 200


def test_until_then_it_is_alive_and_not_ready(text: Text, root: Path) -> None:
    worker = FakeWorker(lambda events: None)
    loading: SimpleQueue[Any] = SimpleQueue()
    call = worker.call

    def slow(op: str, spec: Any) -> Any:
        done = call("load", spec).__class__()
        loading.put(done)
        return done

    worker.call = slow  # type: ignore[method-assign]
    ready: SimpleQueue[str] = SimpleQueue()
    config = ServerConfig(port=0, preload=("shout",))
    server = Server(lambda deliver: worker, Store(root), text, INFO, config, ready.put)
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    done = loading.get(timeout=20)
    assert ready.empty()
    with httpx.Client(base_url=server.address, timeout=20) as http:
        assert http.get("/livez").status_code == 200
        assert http.get("/readyz").status_code == 503
        early = http.post("/generate", json={"prompt": "a"})
        assert (early.status_code, early.json()["error"]["code"]) == (503, "unavailable")
        done.set_result(None)
        assert ready.get(timeout=20) == server.address
        assert http.get("/readyz").status_code == 200
    server.should_exit = True
    thread.join(20)


@pytest.mark.parametrize(("name", "said"), [("shout", "no room"), ("nobody", "no adapter")])
def test_one_that_cannot_be_loaded_ends_the_start(text: Text, root: Path, name: str, said: str) -> None:
    worker = FakeWorker(lambda events: None, refuse=AdapterUnavailable("no room"))
    server = Server(lambda deliver: worker, Store(root), text, INFO, ServerConfig(port=0, preload=(name,)), print)
    server.run()
    assert server.exit_code == 1
    assert server.failure is not None
    assert server.failure.message.startswith(f"--preload {name}: ")
    assert said in server.failure.message
