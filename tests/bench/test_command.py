"""Every benchmark runs to its end, checks its answers, and files what its last line says."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from adapter_server.bench import command, fairness, hotload, peft_kinds, popularity, skew
from adapter_server.cli import BENCHES
from adapter_server.errors import BaseNotSupported

SOAK = pytest.mark.soak
SOME = ["BITFIT", "FROD", "IA3", "LORA", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING"]


def run(name: str, folder: Path, *flags: str) -> dict[str, Any]:
    """The result, read from the last line."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), pytest.raises(SystemExit) as left:
        command.main(name, ["--size", "tiny", "--quick", *flags, "--out", str(folder)])
    assert left.value.code == 0
    (written,) = folder.glob(f"????-??-??-{name}-tiny.json")
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    result: dict[str, Any] = json.loads(stdout.getvalue().splitlines()[-1])
    assert json.loads(written.read_text()) == result
    return result


@pytest.mark.parametrize(
    "words",
    [*((name,) for name in BENCHES if name != "latency"), pytest.param(("hotload", "--http"), marks=SOAK)],
    ids=" ".join,
)
def test_it_says_what_and_where_and_that_answers_were_right(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_kinds, "known", lambda: SOME)
    found = run(words[0], tmp_path, *words[1:])
    assert found["answers"]["checked"] > 0
    assert found["answers"]["wrong"] == 0
    assert found["measured"]["bytes_per_s"] > 0
    assert {"workload", "model", "machine", "versions", "commit", "date"} <= found.keys()
    assert all(each["weight_bytes"] and each["flops"] for each in found.get("floor", []))
    assert "/tmp" not in json.dumps(found)
    assert ("http" in found) == ("--http" in words)
    CHECKS[words[0]](found)


def check_popularity(found: dict[str, Any]) -> None:
    lines = {line["popularity"]: line for line in found["results"]}
    assert list(lines) == [*popularity.LAWS, popularity.BASE]
    assert lines["base"]["tokens_per_s_over_base"] == lines["base"]["decode_over_base"] == 1
    assert {name: line["adapters"] for name, line in lines.items()} == {
        "identical": 1, "distinct": 4, "uniform": 2, "skewed": 2, "base": 0
    }  # fmt: skip
    assert lines["distinct"]["added_aim_ms"] > lines["identical"]["added_aim_ms"] > popularity.LAUNCHES_MS
    assert [each["adapters"] for each in found["floor"]] == [0, 1, 2, 4]


def check_prefill(found: dict[str, Any]) -> None:
    assert [line["rows_on"] for line in found["results"]] == ["base", "1 adapter", "2 adapters"]
    assert found["results"][0]["over_base"] == 1
    assert all(line["tokens_per_s"] > 0 for line in found["results"])


def check_fairness(found: dict[str, Any]) -> None:
    lines = {line["way"]: line for line in found["results"]}
    assert list(lines) == [fairness.ALONE, fairness.BESIDE, fairness.WITHIN]
    assert lines[fairness.ALONE]["latency_over_alone"] == 1
    assert all(line["ttft_ms"] > 0 for line in lines.values())
    assert found["answers"]["checked"] == 3 * found["workload"]["trickle"] + 2 * found["workload"]["flood"]


def check_trace(found: dict[str, Any]) -> None:
    assert [line["adapters"] for line in found["results"]] == [1, 5, 20]
    assert found["ratios"].keys() == {"1 / 5", "20 / 5"}
    assert found["results"][0]["distinct"] == 1
    assert found["workload"]["requests"] == int(found["workload"]["rate"] * 0.5)


def check_skew(found: dict[str, Any]) -> None:
    assert {(line["share"], line["way"]) for line in found["results"]} == {
        (s, w) for s in skew.SHARES for w in skew.WAYS
    }
    assert skew.auto_over_best(found).keys() == {"0", "0.25", "0.5", "0.75", "0.9", "1"}


def check_hotload(found: dict[str, Any]) -> None:
    for way in (found, found.get("http", found)):
        assert [line["way"] for line in way["results"]] == [hotload.CALM, hotload.BUSY]
        assert way["itl_p99_ratio"] > 0
        assert way["cold"]["file_bytes"] > 0
        assert way["thrash"]["by_places"].keys() == {"4", "2"}
    assert found["deeds"]["load"] > 0


def check_kinds(found: dict[str, Any]) -> None:
    assert list(found["kinds"]) == SOME[1:]
    assert list(found["left_out"]) == SOME[:1]
    assert all({"overhead", "bytes", "file_bytes"} <= line.keys() for line in found["kinds"].values())
    assert found["all"]["rows"] == len(found["kinds"])


@pytest.mark.soak
def test_every_kind_that_peft_has_is_measured(tmp_path: Path) -> None:
    found = run("kinds", tmp_path)
    assert found["answers"]["wrong"] == 0
    assert found["kinds"].keys() >= {*peft_kinds.WRAPPING, "IA3", "CPT", "CARTRIDGE", "P_TUNING", "LN_TUNING"}
    assert all(found["left_out"].values())


def check_memory(found: dict[str, Any]) -> None:
    for line in found["results"]:
        assert line["held_in_places"] == line["places"]
        assert line["fit"] == line["budget"] // line["device_bytes"]
        assert 0.9 < line["device_bytes"] / line["file_bytes"] < 1.1


CHECKS = {
    "popularity": check_popularity,
    "prefill": check_prefill,
    "fairness": check_fairness,
    "trace": check_trace,
    "skew": check_skew,
    "hotload": check_hotload,
    "kinds": check_kinds,
    "memory": check_memory,
}


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BaseNotSupported, match="no CUDA device"):
        command.main("memory", ["--size", "tiny", "--device", "cuda", "--out", str(tmp_path)])


def test_the_dominant_adapter_has_its_share() -> None:
    assert skew.chosen(0.5, 8, 3) == [0, 0, 0, 0, 1, 2, 1, 2]
    assert skew.chosen(1, 4, 3) == [0] * 4
    assert 0 not in skew.chosen(0, 4, 3)


def test_auto_is_held_to_the_better_of_the_fixed_modes() -> None:
    line = {"share": 0.5, "way": "auto", "over_unmerged": 1.3, "over_merged": 0.9, "over_dominant": 0.5}
    assert skew.auto_over_best({"results": [line]}) == {"0.5": 0.9}
