"""The command line: a flag and a variable for each setting, friendly refusals, commands that do what they say."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import urllib.request
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import files
import live
import tiny
from adapter_server import __version__, cli, config
from adapter_server.config import EngineConfig, ServerConfig
from adapter_server.registry import guard

FIELDS = [field for kind in (EngineConfig, ServerConfig) for field in fields(kind)]


def run(*words: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words], env=env)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    tiny.save_base(folder / "tiny")
    files.age(tiny.save_lora(folder / "adapters" / "shout", 1))
    return folder


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What `serve` and `demo` would serve."""
    found: dict[str, object] = {}

    def serve(model: str, engine: EngineConfig, server: ServerConfig, announce: object) -> None:
        found.update(model=model, engine=engine, server=server)

    monkeypatch.setattr(cli, "_serve", serve)
    return found


def test_the_version_is_the_packages() -> None:
    assert run("--version").output.strip() == __version__


def test_every_setting_has_a_flag_and_a_word_of_help() -> None:
    assert set(cli.HELP) == {field.name for field in FIELDS}
    text = run("serve", "--help", env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"}).output
    for field in FIELDS:
        assert f"--{field.name.replace('_', '-')}" in text
        assert f"{cli.ENV}{field.name.upper()}" in text


def test_the_defaults_are_those_of_the_settings(caught: dict[str, object]) -> None:
    assert run("serve", "some/model").exit_code == 0
    assert caught == {"model": "some/model", "engine": EngineConfig(), "server": ServerConfig()}


def test_flags_and_variables_reach_the_settings(caught: dict[str, object]) -> None:
    words = ("--kv-bytes", "512M", "--no-pack-weights", "--port", 9000, "--dtype", "float32")
    assert run("serve", "m", *words, env={"ADAPTER_SERVER_MAX_ROWS": "3"}).exit_code == 0
    assert caught["engine"] == EngineConfig(kv_bytes=512 << 20, pack_weights=False, dtype="float32", max_rows=3)
    assert caught["server"] == ServerConfig(port=9000)


def test_the_demo_serves_what_comes_with_the_package(caught: dict[str, object]) -> None:
    assert run("demo", "--port", 0).exit_code == 0
    server = caught["server"]
    assert isinstance(server, ServerConfig)
    assert caught["model"] == str(config.DEMO_BASE)
    assert Path(server.adapters) in config.DEMO_ADAPTERS


@pytest.mark.parametrize(
    ("text", "size"), [("7", 7), ("2k", 2048), ("1.5M", 3 << 19), ("2GiB", 2 << 30), ("1tb", 1 << 40), (5, 5)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert cli.parse_bytes(text) == size


@pytest.mark.parametrize(
    "words",
    [
        ("serve", "--kv-bytes", "much"),
        ("serve", "--kv-bytes", "-1"),
        ("serve", "--max-rows", "0"),
        ("serve", "--dtype", "int3"),
        ("serve", "--max-rowz", "3"),
    ],
)
def test_what_a_flag_cannot_be_is_a_usage_error(words: tuple[str, ...]) -> None:
    assert run(*words).exit_code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("serve", "--host", "0.0.0.0"), "--insecure"),
        (("serve", "./nowhere"), "no such folder"),
        (("adapters", "ls", "--adapters", "/nowhere"), "no such folder"),
        (("generate", "a", "--temperature", "-1"), "temperature"),
        (("merge", "a", "--out", "b", "--model", "/nowhere/at/all"), "no such folder"),
    ],
)
def test_a_refusal_is_one_line(words: tuple[str, ...], said: str) -> None:
    result = run(*words)
    assert result.exit_code == 1
    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert "Traceback" not in result.output


def test_adapters_are_listed_shown_and_checked(root: Path) -> None:
    where = ("--adapters", root / "adapters")
    assert "shout" in run("adapters", "ls", *where).output
    shown = json.loads(run("adapters", "show", "shout", *where).output)
    assert (shown["family"], shown["config"]["r"]) == ("LORA", tiny.RANK)
    assert run("adapters", "check", *where).exit_code == 0
    assert run("adapters", "check", "shout", "--model", root / "tiny", *where).exit_code == 0


def test_a_bad_adapter_fails_the_check(tmp_path: Path) -> None:
    files.age(files.write(tmp_path / "bad", weights=b"[red]no"))
    assert "refused" in run("adapters", "check", "--adapters", tmp_path).output
    assert run("adapters", "check", "--adapters", tmp_path).exit_code == 1


def test_the_check_reads_every_version(root: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        run("adapters", "add", files.write(tmp_path / f"new{seed}", seed), "--name", "a", "--adapters", tmp_path)
    where = ("--adapters", tmp_path)
    for folder in (tmp_path / "new1", tmp_path / "new2"):
        shutil.rmtree(folder)
    assert run("adapters", "check", *where).exit_code == 0
    [old] = {path.name for path in (tmp_path / ".versions" / "a").iterdir()} - {os.readlink(tmp_path / "a")[-12:]}
    weights = tmp_path / ".versions" / "a" / old / guard.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    checked = run("adapters", "check", *where)
    assert checked.exit_code == 1
    assert [line.split()[:2] for line in checked.output.splitlines()] == [["ok", "a"], ["refused", "a@v1:"]]
    assert f"version {old} is damaged" in checked.output


def test_the_check_warns_of_another_base(root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(root / "adapters" / "shout", tmp_path / "shout")
    config = json.loads((folder / guard.CONFIG).read_text()) | {"base_model_name_or_path": "org/other"}
    (folder / guard.CONFIG).write_text(json.dumps(config))
    files.age(folder)
    checked = run("adapters", "check", "--adapters", tmp_path, "--model", root / "tiny")
    assert checked.exit_code == 0, checked.output
    assert "(warning: adapter_config.json: it was trained on 'org/other', and" in checked.output


def test_an_adapter_of_another_base_fails_the_check_against_this_one(root: Path, tmp_path: Path) -> None:
    files.age(files.write(tmp_path / "other"))
    assert run("adapters", "check", "--adapters", tmp_path).exit_code == 0
    result = run("adapters", "check", "--adapters", tmp_path, "--model", root / "tiny")
    assert result.exit_code == 1, result.output


def test_generate_answers_and_merge_writes_what_says_the_same(root: Path, tmp_path: Path) -> None:
    words = ("generate", "red cat>", "--max-new-tokens", 8)
    where = ("--model", root / "tiny", "--adapters", root / "adapters")
    adapted = run(*words, "--adapter", "shout", *where)
    base = run(*words, *where)
    assert (adapted.exit_code, base.exit_code) == (0, 0)
    assert adapted.output != base.output
    result = run("merge", "shout", "--out", tmp_path / "merged", *where)
    assert result.exit_code == 0, result.output
    merged = run(*words, "--model", tmp_path / "merged", "--adapters", root / "adapters")
    assert merged.output == adapted.output


def test_generate_refuses_in_one_line(root: Path) -> None:
    where = ("--model", root / "tiny", "--adapters", root / "adapters")
    result = run("generate", "a", "--adapter", "nobody", *where)
    assert (result.exit_code, "nobody" in result.output) == (1, True)


def post(url: str, body: str) -> dict[str, Any]:
    with urllib.request.urlopen(urllib.request.Request(url, body.encode()), timeout=20) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def test_serve_answers_logs_no_prompt_and_leaves_cleanly(root: Path) -> None:
    with live.process("serve", root / "tiny", "--adapters", root / "adapters") as process:
        assert process.stderr
        address = next(found[0] for line in process.stderr if (found := re.search(r"http://\S+", line)))
        body = json.dumps({"prompt": "SECRET>", "adapter": "shout", "max_new_tokens": 4})
        assert post(f"{address}/generate", body)["adapter"] == "shout"
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    assert process.returncode == 0
    lines = {line["event"]: line for line in map(json.loads, log.splitlines())}
    assert lines.keys() == {"request", "draining"}
    assert lines["request"]["request_id"]
    assert "SECRET" not in log


def test_versions_are_published_rolled_back_and_deleted_by_command(root: Path, tmp_path: Path) -> None:
    where = ("--adapters", tmp_path / "adapters")
    (tmp_path / "adapters").mkdir()
    folders = [tiny.save_lora(tmp_path / f"out{seed}", seed) for seed in (1, 2)]
    versions = []
    for folder in folders:
        added = run("adapters", "add", folder, "--name", "shout", "--model", root / "tiny", *where)
        assert added.exit_code == 0, added.output
        versions.append(re.search(r"shout@(\w+) is current", added.output)[1])  # type: ignore[index]
    assert run("adapters", "rollback", "shout", *where).output == f"shout@{versions[0]} is current\n"
    assert f'"version": "{versions[0]}"' in run("adapters", "show", "shout", *where).output
    again = run("adapters", "rollback", "shout", *where)
    assert (again.exit_code, "no version before" in again.output) == (1, True)
    assert run("adapters", "rm", "shout", *where).exit_code == 0
    assert run("adapters", "show", "shout", *where).exit_code == 1


@pytest.mark.parametrize("words", [("--name", "base"), ("--model", "tiny")])
def test_an_unsound_folder_is_not_published(root: Path, tmp_path: Path, words: tuple[str, str]) -> None:
    (tmp_path / "adapters").mkdir()
    given = [root / "tiny" if word == "tiny" else word for word in words]
    added = run("adapters", "add", files.write(tmp_path / "misfit"), *given, "--adapters", tmp_path / "adapters")
    assert (added.exit_code, "error:" in added.output) == (1, True)
    assert list((tmp_path / "adapters").iterdir()) == []
