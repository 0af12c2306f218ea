from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `--quick` writes and says."""
    folder = tmp_path_factory.mktemp("rivals")
    command = [sys.executable, ROOT / "benchmarks" / "rivals.py", "--size", "tiny", "--quick", "--out", folder]
    env = {"PYTHONPATH": str(ROOT / "server"), "PATH": "/usr/bin:/bin", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env, check=False)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    (written,) = folder.glob("*-rivals-tiny.json")
    assert last == json.loads(written.read_text())
    return last


def test_every_rival_ran(rivals, found):
    names = [line["rival"] for line in found["results"]]
    assert names == [*rivals.LAWS, rivals.BASE, rivals.MIXED, rivals.ONE_BY_ONE, rivals.GENERATE, rivals.MERGED]
    for line in found["results"]:
        assert line["tokens_per_s"] > 0
        assert len(line["rounds"]["tokens_per_s"]) == found["workload"]["rounds"]
        assert (line["step_ms"] is not None) == line["rival"].startswith("ours")


def test_ours_gives_pefts_tokens(rivals, found):
    answers, work = found["answers"], found["workload"]
    rows, asked = work["rows"], answers["of"]
    assert asked[f"{rivals.MANY} = {rivals.MIXED}"]["checked"] == rows
    assert asked[f"{rivals.MANY} = {rivals.ONE_BY_ONE}"]["checked"] == work["sample"]
    assert answers["checked"] == 8 * rows + work["sample"]
    assert (answers["wrong"], answers["near_ties"]) == (0, 0)


def test_what_is_scaled_or_missing_is_said(rivals, found):
    assert found["notes"][rivals.ONE_BY_ONE] == "1 of 4 requests a round, time scaled to all"
    assert found["notes"]["llama-server"].startswith("not measured")


def test_ratios_are_medians_of_the_rounds_own(rivals):
    ours = [rivals.Outcome(s, {}) for s in (1.0, 2.0, 3.0)]
    theirs = [rivals.Outcome(s, {}) for s in (4.0, 4.0, 30.0)]
    assert rivals._ratio(ours, theirs, "seconds") == 4


def test_a_wrong_answer_of_ours_is_counted(rivals):
    asks = {"ours": [rivals.Ask((2,)), rivals.Ask((1,))]}
    rounds = {
        "ours": [rivals.Outcome(1, {0: (1, 2), 1: (3,)})],
        "theirs": [rivals.Outcome(1, {0: (1, 2), 1: (3, 4)}), rivals.Outcome(1, {0: (1, 2)})],
    }
    compared = rivals._compare(SimpleNamespace(engine=None, asks=asks), rounds, "ours", "theirs")
    assert (compared["checked"], compared["wrong"]) == (3, 1)
