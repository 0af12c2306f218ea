"""Keys, what each opens, and Host headers on a server that has none."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from typer.testing import CliRunner

from adapter_server import cli
from adapter_server.api.access import Keys
from adapter_server.api.callers import Caller
from adapter_server.api.hosts import check_host, guards_host
from adapter_server.config import ServerConfig
from adapter_server.errors import InvalidRequest, RateLimited
from adapter_server.text import Text
from serving import Served, serving

INFERENCE = ("first-key", "second-kéy")
ADMIN = "admin-key"
ASK = ("POST", "/generate", {"prompt": "ab"})
COMPLETE = ("POST", "/v1/completions", {"prompt": "ab"})
LORAX = ("POST", "/", {"inputs": "ab"})
LIST = ("GET", "/adapters", None)
LOAD = ("POST", "/adapters/shout/load", None)
INFERENCE_ROUTES: list[Any] = [
    *(ASK, COMPLETE, LORAX, ("POST", "/generate_stream", {"inputs": "ab"})),
    *(("GET", "/v1/models", None), ("GET", "/v1/models/shout", None)),
    *(("POST", "/tokenize", {"prompt": "a"}), ("POST", "/detokenize", {"token_ids": [1]})),
    *(("GET", "/info", None), ("GET", "/metrics", None)),
]
ADMIN_ROUTES: list[Any] = [LIST, LOAD, ("GET", "/adapters/shout", None), ("DELETE", "/adapters/nobody", None)]
OPEN = ("/livez", "/readyz", "/health", "/version")


@pytest.fixture(scope="module")
def shared(text: Text, adapters: Path) -> Iterator[Served]:
    config = ServerConfig(api_key=INFERENCE, admin_key=(ADMIN,))
    with serving(text, adapters, config) as served:
        yield served


def ask(served: Served, route: Any, key: str | None = None, **headers: str) -> httpx.Response:
    method, path, body = route
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    raw = {name: value.encode() for name, value in headers.items()}
    return served.http.request(method, path, json=body, headers=raw)


def refused(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    return str(error if isinstance(error, str) else error["message"])


@pytest.mark.parametrize("route", [*INFERENCE_ROUTES, *ADMIN_ROUTES], ids=lambda route: f"{route[0]} {route[1]}")
@pytest.mark.parametrize("key", [None, "wrong", "first-ke", "first-key2"])
def test_without_a_known_key_nothing_is_answered(served: Served, route: Any, key: str | None) -> None:
    response = ask(served, route, key)
    refused(response, 401)
    assert response.headers["www-authenticate"] == "Bearer"
    assert not served.worker.requests
    assert not served.worker.calls


def test_every_route_but_the_probes_has_a_door(served: Served) -> None:
    known = {(method, path.replace("shout", "{name}")) for method, path, _ in (*INFERENCE_ROUTES, *ADMIN_ROUTES)}
    paths = served.http.get("/openapi.json").json()["paths"]
    for path, methods in paths.items():
        for method in methods:
            target = path.replace("{model}", "shout").replace("{name}", "shout").replace("{operation}", "load")
            status = served.http.request(method.upper(), target).status_code
            assert (status == 401) == (path not in OPEN), (method, path)
    assert len(paths) >= len({path for _, path in known}) - 1


@pytest.mark.parametrize("header", ["Bearer", "Basic YTpi", "first-key", "Token first-key"])
def test_a_key_comes_as_a_bearers(served: Served, header: str) -> None:
    refused(ask(served, ASK, Authorization=header), 401)


@pytest.mark.parametrize("path", OPEN)
def test_probes_need_no_key(served: Served, path: str) -> None:
    assert served.http.get(path).status_code == 200


@pytest.mark.parametrize("route", INFERENCE_ROUTES, ids=lambda route: f"{route[0]} {route[1]}")
@pytest.mark.parametrize("key", [*INFERENCE, ADMIN])
def test_any_key_opens_inference(served: Served, route: Any, key: str) -> None:
    assert ask(served, route, key).status_code == 200


@pytest.mark.parametrize("key", INFERENCE)
def test_an_inference_key_moves_no_adapter(served: Served, key: str) -> None:
    for route in ADMIN_ROUTES:
        assert "admin key" in refused(ask(served, route, key), 403)
    assert not served.worker.calls


def test_an_admin_key_does(served: Served) -> None:
    assert ask(served, LIST, ADMIN).status_code == 200
    assert ask(served, LOAD, ADMIN).status_code == 200
    assert served.worker.calls == [("load", "shout")]


def test_openais_client_sends_its_key(served: Served) -> None:
    address = f"{served.server.address}/v1"
    with openai.OpenAI(base_url=address, api_key=INFERENCE[0], max_retries=0) as client:
        assert client.completions.create(model="shout", prompt="ab").choices[0].text == "ab"
    with (
        openai.OpenAI(base_url=address, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="not known"),
    ):
        client.models.list()


def test_a_refusal_has_its_dialects_shape(served: Served) -> None:
    assert ask(served, ASK).json()["error"]["type"] == "authentication_error"
    assert set(ask(served, LORAX).json()) == {"error", "error_type"}
    assert ask(served, LIST, INFERENCE[0]).json()["error"]["code"] == "forbidden"


def test_keys_show_nowhere(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    for key in (*INFERENCE, ADMIN, "wrong-key"):
        for route in (ASK, LIST, ("GET", "/nowhere", None)):
            assert key not in ask(served, route, key).text
    printed = "".join(capsys.readouterr()) + repr(served.server._service.config)
    assert "path=/adapters" in printed
    assert not any(key in printed for key in (*INFERENCE, ADMIN, "wrong-key"))


def test_with_keys_the_host_header_does_not_matter(served: Served) -> None:
    assert ask(served, ASK, ADMIN, Host="example.com").status_code == 200


# Some keys, or none


def test_with_inference_keys_alone_nobody_moves_adapters(text: Text, adapters: Path) -> None:
    with serving(text, adapters, ServerConfig(api_key=("one",))) as served:
        assert ask(served, ASK, "one").status_code == 200
        assert "--admin-key" in refused(ask(served, LIST, "one"), 403)
        refused(ask(served, LIST), 401)


def test_with_an_admin_key_alone_everybody_may_ask(text: Text, adapters: Path) -> None:
    with serving(text, adapters, ServerConfig(admin_key=("one",))) as served:
        assert ask(served, ASK).status_code == 200
        assert ask(served, LIST, "one").status_code == 200
        refused(ask(served, LIST), 401)
        refused(ask(served, ASK, Host="example.com"), 403)


@pytest.mark.parametrize(
    ("host", "fine"),
    [
        ("localhost", True),
        ("LOCALHOST:80", True),
        ("127.0.0.1:8000", True),
        ("127.9.9.9", True),
        ("[::1]:8000", True),
        ("[::1]", True),
        ("example.com", False),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com:8000", False),
        ("192.168.0.1", False),
        ("[::2]:8000", False),
        ("[::1", False),
        ("user@example.com", False),
    ],
)
def test_without_keys_a_page_elsewhere_cannot_ask(own: Served, host: str, fine: bool) -> None:
    response = ask(own, ASK, Host=host)
    if fine:
        assert response.status_code == 200
    else:
        assert "--api-key" in refused(response, 403)
        assert response.headers["x-request-id"]
        assert not own.worker.requests


def test_the_host_that_was_set_is_known_too(text: Text, adapters: Path) -> None:
    with serving(text, adapters, ServerConfig(host="127.8.8.8")) as served:
        assert ask(served, ASK).status_code == 200


@pytest.mark.parametrize(
    ("config", "guarded"),
    [
        (ServerConfig(), True),
        (ServerConfig(host="::1"), True),
        (ServerConfig(admin_key=("a",)), True),
        (ServerConfig(api_key=("a",)), False),
        (ServerConfig(api_keys_file="keys.toml"), False),
        (ServerConfig(insecure=True), False),
        (ServerConfig(host="0.0.0.0", insecure=True), False),
    ],
)
def test_hosts_are_looked_at_where_this_machine_is_trusted(config: ServerConfig, guarded: bool) -> None:
    assert guards_host(config) is guarded


def test_with_keys_others_may_reach_the_server() -> None:
    check_host(ServerConfig(host="0.0.0.0", api_key=("a",)))
    check_host(ServerConfig(host="0.0.0.0", api_keys_file="keys.toml"))
    with pytest.raises(InvalidRequest, match="--api-key"):
        check_host(ServerConfig(host="0.0.0.0", admin_key=("a",)))


# A file of keys


FILE = """
[[keys]]
name = "reports"
key = "reports-secret"
adapters = ["sh*", "prefix"]
base = false

[[keys]]
name = "busy"
sha256 = "BUSY"
tokens_per_minute = 600
concurrent = 2

[[keys]]
name = "keeper"
key = "keeper-secret"
admin = true
adapters = ["pirate"]
""".replace("BUSY", hashlib.sha256(b"busy-secret").hexdigest())


@pytest.fixture
def filed(text: Text, adapters: Path, tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "keys.toml").write_text(FILE)
    with serving(text, adapters, ServerConfig(api_keys_file=str(tmp_path / "keys.toml"))) as served:
        yield served


def generate(served: Served, key: str, **fields: Any) -> httpx.Response:
    return ask(served, ("POST", "/generate", {"prompt": "ab", **fields}), key)


def test_a_key_may_use_the_adapters_of_its_patterns(filed: Served) -> None:
    assert generate(filed, "reports-secret", adapter="shout").status_code == 200
    for adapter in ("pirate", "nobody", "pirate@v1", [{"name": "shout"}, {"name": "pirate"}]):
        assert "may not use an adapter" in refused(generate(filed, "reports-secret", adapter=adapter), 403)
    assert "may not use the base" in refused(generate(filed, "reports-secret"), 403)
    assert "may not use the base" in refused(generate(filed, "reports-secret", adapter="tiny-base"), 403)
    lorax = {"inputs": "ab", "parameters": {"adapter_id": "pirate"}}
    assert set(ask(filed, ("POST", "/", lorax), "reports-secret").json()) == {"error", "error_type"}
    model = ("POST", "/v1/completions", {"prompt": "ab", "model": "tiny-base:pirate"})
    refused(ask(filed, model, "reports-secret"), 403)
    assert len(filed.worker.requests) == 1


def test_a_key_sees_what_it_may_use(filed: Served) -> None:
    models = ask(filed, ("GET", "/v1/models", None), "reports-secret").json()["data"]
    assert [card["id"] for card in models] == ["prefix", "shout"]
    everything = ask(filed, ("GET", "/v1/models", None), "busy-secret").json()["data"]
    assert {"tiny-base", "pirate", "shout"} <= {card["id"] for card in everything}
    refused(ask(filed, ("GET", "/v1/models/pirate", None), "reports-secret"), 403)
    refused(ask(filed, ("GET", "/v1/models/tiny-base", None), "reports-secret"), 403)
    refused(ask(filed, ("GET", "/metrics", None), "reports-secret"), 403)
    assert ask(filed, ("GET", "/metrics", None), "busy-secret").status_code == 200
    near = refused(generate(filed, "reports-secret", adapter="shou"), 404)
    assert "shout" not in near
    assert "nearest: shout" in refused(generate(filed, "busy-secret", adapter="shou"), 404)
    card = refused(ask(filed, ("GET", "/v1/models/shirate", None), "reports-secret"), 404)
    assert "pirate" not in card


def test_an_admin_key_of_the_file_manages_its_own(filed: Served) -> None:
    listed = ask(filed, LIST, "keeper-secret").json()["adapters"]
    assert [adapter["name"] for adapter in listed] == ["pirate"]
    assert ask(filed, ("POST", "/adapters/pirate/load", None), "keeper-secret").status_code == 200
    for route in (LOAD, ("GET", "/adapters/shout", None), ("DELETE", "/adapters/shout", None)):
        refused(ask(filed, route, "keeper-secret"), 403)
    for name, path in (("pirate", "shout"), ("shout", "pirate"), ("pirate", "x/../shout")):
        load = ("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        refused(ask(filed, load, "keeper-secret"), 403)
    for key in ("reports-secret", "busy-secret"):
        refused(ask(filed, LIST, key), 403)
    refused(ask(filed, LIST), 401)
    refused(ask(filed, ASK), 401)
    assert filed.worker.calls == [("load", "pirate")]


def test_a_key_has_a_rate_of_tokens(filed: Served) -> None:
    used = generate(filed, "busy-secret", prompt="x" * 90, max_new_tokens=100)
    assert used.status_code == 200  # 190 tokens of 600, of which 9 came back
    for _ in range(2):
        assert generate(filed, "busy-secret", prompt="x" * 90, max_new_tokens=100).status_code == 200
    late = generate(filed, "busy-secret", prompt="x" * 90, max_new_tokens=100)
    assert "600 tokens a minute" in refused(late, 429)
    assert late.json()["error"]["code"] == "rate_limited"
    assert 1 <= int(late.headers["retry-after"]) <= 19
    assert generate(filed, "busy-secret", prompt="x", max_new_tokens=2).status_code == 200


def test_a_key_runs_so_many_at_once(filed: Served) -> None:
    filed.worker.step_s = 0.05
    body = {"model": "shout", "prompt": "ab", "max_tokens": 20, "n": 3}
    assert "runs 2 requests" in refused(ask(filed, ("POST", "/v1/completions", body), "busy-secret"), 429)
    while filed.worker.rows or filed.server._service.bridge.open_requests:
        time.sleep(0.01)
    assert ask(filed, ("POST", "/v1/completions", {**body, "n": 2}), "busy-secret").status_code == 200


def test_the_log_names_keys_and_tells_none(filed: Served, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("reports-secret", "busy-secret", "keeper-secret"):
        generate(filed, key, adapter="shout")
    printed = "".join(capsys.readouterr())
    assert "key=reports" in printed
    assert "secret" not in printed


def test_what_a_request_did_not_need_comes_back() -> None:
    caller = Caller("a", tokens_per_minute=100, concurrent=1)
    caller.admit(1000)  # passes, as nothing was used
    assert caller.left == -900
    caller.release(950)
    assert 49 < caller.left < 52
    with pytest.raises(RateLimited) as late:
        caller.admit(80)
    assert 15 < (late.value.retry_after or 0) <= 18
    caller.admit(10)
    with pytest.raises(RateLimited, match="runs 1"):
        caller.admit(1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "keys is required"),
        ("keys = []", "at least 1"),
        ('[[keys]]\nname = "a"\nkey = "s3cret"\nadapter = ["x"]', "did you mean 'adapters'"),
        ('[[keys]]\nname = "a b"\nkey = "s3cret"', "keys.0.name"),
        ('[[keys]]\nname = "a"', "needs either"),
        ('[[keys]]\nname = "a"\nkey = "s3cret"\nsha256 = "' + "0" * 64 + '"', "needs either"),
        ('[[keys]]\nname = "a"\nkey = ""', "keys.0.key"),
        ('[[keys]]\nname = "a"\nsha256 = "s3cret"', "keys.0.sha256"),
        ('[[keys]]\nname = "a"\nkey = "s3cret"\ntokens_per_minute = 0', "greater than or equal to 1"),
        ('[[keys]]\nname = "a"\nkey = "s3cret"\n[[keys]]\nname = "b"\nkey = "s3cret"', "twice"),
        ('[[keys]]\nname = "a"\nkey = "s3cret"\n[[keys]]\nname = "a"\nkey = "t"', "twice"),
        ('[[keys]]\nname = "a"\nkey = 2026-01-01', "no file of keys"),
        ("[[keys]]\nkey = s3cret", "no file of keys"),
    ],
)
def test_a_faulty_file_is_refused_and_never_quoted(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "keys.toml").write_text(content)
    with pytest.raises(InvalidRequest, match=re.escape(said)) as caught:
        Keys(ServerConfig(api_keys_file=str(tmp_path / "keys.toml")))
    assert "s3cret" not in caught.value.message
    with pytest.raises(InvalidRequest, match="no file of keys"):
        Keys(ServerConfig(api_keys_file=str(tmp_path / "nowhere")))


# The command line


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> list[ServerConfig]:
    """What would be served."""
    found: list[ServerConfig] = []
    monkeypatch.setattr(cli, "_serve", lambda model, engine, server, announce: found.append(server))
    return found


def test_keys_come_from_flags_or_the_environment(caught: list[ServerConfig]) -> None:
    words = ["serve", "m", "--api-key", "a", "--api-key", "b", "--admin-key", "c"]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    env = {"ADAPTER_SERVER_API_KEY": "d e", "ADAPTER_SERVER_ADMIN_KEY": "f"}
    assert CliRunner().invoke(cli.app, ["serve", "m"], env=env).exit_code == 0
    assert [(config.api_key, config.admin_key) for config in caught] == [(("a", "b"), ("c",)), (("d", "e"), ("f",))]


def test_an_empty_key_is_refused_at_the_start(text: Text, adapters: Path) -> None:
    with pytest.raises(InvalidRequest, match="at least one"), serving(text, adapters, ServerConfig(api_key=("",))):
        raise AssertionError("it started")
