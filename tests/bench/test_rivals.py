from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adapter_server.bench.command import Bench
from adapter_server.bench.drive import Setting
from scripts import documented, flags

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


def test_its_flags_are_documented(rivals):
    assert flags(rivals) == documented("rivals")


def test_every_rival_ran(rivals, found):
    names = [line["rival"] for line in found["results"]]
    theirs = [rivals.MIXED, rivals.ONE_BY_ONE, rivals.GENERATE, rivals.MERGED, rivals.CONTINUOUS]
    assert names == [*rivals.LAWS, rivals.BASE, *theirs]
    for line in found["results"]:
        assert line["tokens_per_s"] > 0
        assert len(line["rounds"]["tokens_per_s"]) == found["workload"]["rounds"]
        assert (line["step_ms"] is None) == (line["rival"] in (rivals.ONE_BY_ONE, rivals.CONTINUOUS))


def test_ours_gives_pefts_tokens(rivals, found):
    answers, work = found["answers"], found["workload"]
    rows, asked = work["rows"], answers["of"]
    assert asked[f"{rivals.MANY} = {rivals.MIXED}"]["checked"] == rows
    assert asked[f"{rivals.MANY} = {rivals.ONE_BY_ONE}"]["checked"] == work["sample"]
    assert answers["checked"] == 9 * rows + work["sample"]
    assert (answers["wrong"], answers["near_ties"]) == (0, 0)


def test_what_is_scaled_or_missing_is_said(rivals, found):
    assert found["notes"][rivals.ONE_BY_ONE] == "1 of 4 requests a round, time scaled to all"
    assert found["notes"]["llama-server"] == "not measured"
    assert found["left_out"] == {}


def test_where_it_comes_from_is_said(found):
    assert {"workload", "model", "machine", "versions", "commit", "date", "measured", "floor"} <= found.keys()
    assert found["model"]["device"] == "cpu"


def test_tokens_that_did_not_run_count_at_the_pace_of_those_that_did(rivals):
    ran = rivals.Generated([(1, 2, 3)], seconds=1.0, step_s=0.25)
    assert ran.whole_s(3) == 1.0
    assert ran.whole_s(11) == 3.0


def test_a_rival_that_cannot_run_is_left_out_and_ours_is_an_error(rivals):
    def broken(turn, new):
        raise ValueError("no such kernel")

    assert rivals._warm(broken, rivals.QUICK, ours=False) == "ValueError: no such kernel"
    with pytest.raises(ValueError, match="no such kernel"):
        rivals._warm(broken, rivals.QUICK, ours=True)


def test_llama_server_runs_on_the_cpu_from_a_file_or_not_at_all(rivals, monkeypatch):
    monkeypatch.setenv("LLAMA_SERVER", "/nowhere/llama-server")
    for size, device in (("8b", "cpu"), ("35m", "cuda")):
        with rivals._llama(SimpleNamespace(size=size), rivals.QUICK, Bench(Setting(device))) as running:
            assert running is None


def test_peft_shares_the_memory_of_the_plain_base(rivals):
    base = torch.nn.Sequential(torch.nn.Linear(2, 2))
    twin = rivals._twin(base)
    assert twin[0] is not base[0]
    assert twin[0].weight is base[0].weight


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
    scene = SimpleNamespace(engine=None, asks=asks, plan=rivals.Plan(new=2), bench=Bench(Setting()))
    compared = rivals._compare(scene, rounds, "ours", "theirs")
    assert (compared["checked"], compared["wrong"]) == (3, 1)


def test_an_answer_that_peft_gave_in_part_is_held_to_that_part(rivals):
    asks = {"ours": [rivals.Ask((2,))]}
    rounds = {"ours": [rivals.Outcome(1, {0: (1, 2, 3)})], rivals.MIXED: [rivals.Outcome(1, {0: (1, 2)})]}
    scene = SimpleNamespace(engine=None, asks=asks, plan=None, bench=Bench(Setting()), short=lambda new: 2)
    scene.plan = rivals.Plan(new=3, theirs=2)
    assert rivals._compare(scene, rounds, "ours", rivals.MIXED)["wrong"] == 0
