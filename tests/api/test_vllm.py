"""vLLM's routes to load and unload: names of the caller's for folders of the registry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import files
from adapter_server.core import Resident
from adapter_server.errors import AdapterUnavailable
from adapter_server.text import Text
from serving import Served, serving


@pytest.fixture
def served(text: Text, tmp_path: Path) -> Iterator[Served]:
    for seed, name in enumerate(("shout", "pirate")):
        files.age(files.write(tmp_path / "adapters" / name, seed))
    files.age(files.write(tmp_path / "outside", 3))
    (tmp_path / "adapters" / "link").symlink_to(tmp_path / "outside")
    with serving(text, tmp_path / "adapters") as served:
        yield served


def load(served: Served, name: str = "prod", path: str = "shout", **fields: Any) -> httpx.Response:
    return served.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields})


def unload(served: Served, name: str = "prod", **fields: Any) -> httpx.Response:
    return served.http.post("/v1/unload_lora_adapter", json={"lora_name": name, **fields})


def refused(response: httpx.Response, status: int, kind: str) -> str:
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (status, kind), error
    return str(error["message"])


def test_a_name_is_known_from_its_load_to_its_unload(served: Served) -> None:
    assert served.generate(adapter="prod").status_code == 404
    response = load(served)
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'prod' added successfully.")
    assert response.headers["content-type"].startswith("text/plain")
    assert served.worker.calls == [("load", "shout")]
    assert served.generate(adapter="prod").headers["x-adapter"] == "shout"
    answer = served.http.post("/v1/completions", json={"model": "prod", "prompt": "ab"}).json()
    assert (answer["model"], answer["choices"][0]["text"]) == ("prod", "ab")
    assert served.http.get("/v1/models/prod").json()["parent"] == "tiny-base"
    assert "prod" in [card["id"] for card in served.http.get("/v1/models").json()["data"]]
    assert unload(served).text == "Success: LoRA adapter 'prod' removed successfully."
    assert served.generate(adapter="prod").status_code == 404
    assert "cannot be found" in refused(unload(served), 404, "NotFoundError")


def test_a_name_goes_into_versions_and_compositions(served: Served) -> None:
    version = load(served).headers["x-adapter-version"]
    assert served.generate(adapter=f"prod@{version}").json()["adapter_version"] == version
    asked = [{"name": "prod", "weight": 0.5}, {"name": "pirate"}]
    assert served.generate(adapter=asked).json()["adapter"] == "shout+pirate"
    assert served.generate(adapter=[{"name": "prod"}, {"name": "shout"}]).status_code == 422


def test_a_name_that_is_taken_changes_only_in_place(served: Served) -> None:
    load(served)
    assert "load_inplace" in refused(load(served, path="pirate"), 400, "InvalidUserInput")
    assert load(served, path="pirate", load_inplace=True).status_code == 200
    assert served.generate(adapter="prod").headers["x-adapter"] == "pirate"


def test_an_adapters_own_name_will_do(served: Served) -> None:
    assert load(served, "shout", str(served.adapters / "shout")).status_code == 200
    refused(load(served, "shout"), 400, "InvalidUserInput")
    assert unload(served, "shout").status_code == 200
    assert served.generate(adapter="shout").status_code == 200


def test_memory_is_freed_with_the_last_name(served: Served) -> None:
    version = load(served).headers["x-adapter-version"]
    load(served, "other")
    served.worker.residents = (Resident("shout", version, "ready", "LORA"), Resident("pirate", "1", "ready", "LORA"))
    samples = served.http.get("/metrics").text
    assert 'running_lora_adapters="other,pirate,prod,shout"' in samples
    served.worker.calls.clear()
    unload(served)
    assert served.worker.calls == []
    unload(served, "other")
    assert served.worker.calls == [("unload", "shout")]


@pytest.mark.parametrize(
    "path", ["nobody", "../outside", "/etc", ".", "shout/..", "link", "shout/adapter_config.json", "a\0b"]
)
def test_a_path_is_a_folder_of_the_registry(served: Served, path: str) -> None:
    message = refused(load(served, path=path), 404, "NotFoundError")
    assert message.startswith(f"Loading lora prod failed: No adapter found for {path}")
    assert not served.worker.calls


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lora_name": ""}, "must be provided"),
        ({"lora_path": ""}, "must be provided"),
        ({"lora_name": "tiny-base"}, "conflicts with a served base"),
        ({"lora_name": "pirate"}, "conflicts with a folder"),
        ({"lora_name": "a,b"}, "not allowed"),
        ({"lora_name": "../a"}, "not allowed"),
    ],
)
def test_a_bad_field_is_400(served: Served, fields: dict[str, Any], said: str) -> None:
    body = {"lora_name": "prod", "lora_path": "shout", **fields}
    assert said in refused(served.http.post("/v1/load_lora_adapter", json=body), 400, "InvalidUserInput")
    assert not served.worker.calls


@pytest.mark.parametrize(
    ("route", "raw"),
    [
        ("load", b'{"lora_name": "a"}'),
        ("load", b'{"lora_path": "shout"}'),
        ("load", b'{"lora_name": 5, "lora_path": "shout"}'),
        ("load", b'{"lora_name": "a", "lora_path": "shout", "load_inplace": "yes"}'),
        ("load", b""),
        ("unload", b"{}"),
        ("unload", b"[]"),
    ],
)
def test_a_body_that_is_none_is_400_of_another_type(served: Served, route: str, raw: bytes) -> None:
    refused(served.http.post(f"/v1/{route}_lora_adapter", content=raw), 400, "Bad Request")
    assert not served.worker.calls


def test_what_cannot_be_loaded_gets_no_name(served: Served) -> None:
    served.worker.refuse = AdapterUnavailable("no room")
    assert load(served).status_code == 424
    served.worker.refuse = None
    assert served.generate(adapter="prod").status_code == 404
    assert "provided" in refused(unload(served, ""), 400, "InvalidUserInput")
