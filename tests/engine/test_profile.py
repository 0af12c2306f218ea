"""A trace of some steps: their parts by name, one file, and nothing left switched on."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

import rig
from adapter_server.core import Request, Sampling
from adapter_server.engine import profile
from adapter_server.engine.engine import Engine
from adapter_server.engine.worker import Worker

PARTS = {"plan", "route", "forward", "sampling", "events"}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "SKIP", 1)
    monkeypatch.setattr(profile, "STEPS", 3)


def run(engine: Engine, new: int) -> None:
    engine.submit(Request("r", (5, 9, 13), Sampling(max_new_tokens=new, ignore_eos=True)))
    while engine.busy:
        engine.step()


def named(path: Path) -> dict[str, int]:
    """How often each part stands in the trace."""
    events = [e["name"] for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") == "user_annotation"]
    return {name: events.count(name) for name in PARTS}


def test_the_trace_holds_so_many_steps_by_part(tmp_path: Path, few: None) -> None:
    engine = rig.engine("llama", (), profile=str(tmp_path / "new" / "trace.json"))
    run(engine, 8)
    assert engine.profile is None
    assert named(tmp_path / "new" / "trace.json") == {**dict.fromkeys(PARTS, 3), "plan": 2}  # the first's came before
    engine.close()


def test_an_engine_that_ends_early_writes_what_it_has(tmp_path: Path, few: None) -> None:
    engine = rig.engine("llama", (), profile=str(tmp_path / "trace.json"))
    done = threading.Event()
    worker = Worker(engine, lambda events: done.set())
    worker.start()
    worker.submit(Request("r", (5, 9, 13), Sampling(max_new_tokens=2, ignore_eos=True)))
    assert done.wait(60)
    worker.stop(drain_s=60)
    assert named(tmp_path / "trace.json")["forward"] == 1


def test_a_part_costs_nothing_without_a_trace(tmp_path: Path) -> None:
    assert profile.part("plan") is profile.part("forward")
    engine = rig.engine("llama", ())
    run(engine, 3)
    assert engine.profile is None
    engine.close()


def test_a_file_that_cannot_be_written_is_said_and_ends_nothing(
    tmp_path: Path, few: None, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    engine = rig.engine("llama", (), profile=str(tmp_path / "file" / "trace.json"))
    run(engine, 8)
    assert "could not be written" in caplog.text
    engine.close()
