"""Disk, host, device: what is evicted comes back without the disk, what is unloaded leaves all, rows keep theirs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save

import rig
from adapter_server.core import Resident
from adapter_server.engine import pool as pools
from adapter_server.engine.engine import Engine
from adapter_server.engine.placed import GroupPatch
from adapter_server.engine.site import LinearGroup
from adapter_server.engine.snapshot import fold
from adapter_server.errors import VersionGone
from adapter_server.families.base import Patch
from adapter_server.registry import guard
from adapter_server.registry.store import Blob, Store

NAMES = ("lora", "rslora", "dora")
PROMPT = (5, 9, 13)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """Room for all of them; their folder is the test's own."""
    made = rig.engine("llama", NAMES)
    shutil.copytree(rig.registry("llama", NAMES), tmp_path / "adapters")
    made.pool.store = Store(tmp_path / "adapters", settle_s=0)
    yield made
    made.close()


def settle(engine: Engine, done: Future[None]) -> None:
    until = time.monotonic() + 20
    while not done.done():
        assert time.monotonic() < until
        engine.step() or time.sleep(0.0002)
    done.result()


def do(engine: Engine, op: str, name: str) -> None:
    settle(engine, engine.call(op, engine.pool.store.resolve(name)))  # type: ignore[arg-type]


def say(engine: Engine, name: str, mode: str = "unmerged") -> list[int]:
    [answer] = rig.run(engine, [rig.ask(engine, name, PROMPT, mode, logprobs=0)])
    assert answer.end is not None
    assert answer.end.error is None, answer.end.error
    return answer.ids


def resident(engine: Engine, name: str) -> Resident:
    return next(r for r in engine.stats().residents if r.name == name)


def leave_room_for_one(engine: Engine) -> None:
    do(engine, "load", "lora")
    do(engine, "load", "rslora")
    engine.pool.budget = max(h.bytes for h in engine.pool.holdings.values())
    engine.pool.evict(next(h for h in engine.pool.holdings.values() if h.spec.name == "lora"))


def no_disk(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.pool.store, "read", lambda *_: pytest.fail("the disk was read"))


def test_what_is_evicted_comes_back_without_the_disk(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {name: say(engine, name) for name in NAMES[:2]}
    leave_room_for_one(engine)
    no_disk(engine, monkeypatch)
    for name in (*NAMES[:2], *NAMES[:2]):
        assert say(engine, name) == said[name]
        other = next(n for n in NAMES[:2] if n != name)
        assert (resident(engine, other).state, resident(engine, other).bytes) == ("registered", 0)
        assert resident(engine, other).host_bytes > 0
    assert engine.pool.used <= engine.pool.budget


def test_a_fold_needs_no_disk_either_and_keeps_what_it_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    do(engine, "merge", "lora")
    assert (resident(engine, "lora").bytes, resident(engine, "lora").host_bytes > 0) == (0, True)
    do(engine, "unmerge", "lora")
    no_disk(engine, monkeypatch)
    do(engine, "load", "lora")
    do(engine, "merge", "lora")


def test_hits_are_counted_by_tier(engine: Engine) -> None:
    say(engine, "lora")
    say(engine, "lora")
    say(engine, "lora", "merged")
    leave_room_for_one(engine)
    say(engine, "lora")
    assert engine.stats().hits == {"disk": 1, "host": 2, "device": 1}


def test_unloading_gives_the_bytes_of_both_tiers_back(engine: Engine) -> None:
    do(engine, "load", "lora")
    do(engine, "merge", "lora")
    assert engine.pool.used > 0
    assert engine.pool.host.used > 0
    do(engine, "unload", "lora")
    assert (engine.pool.used, engine.pool.host.used, engine.stats().residents) == (0, 0, ())


def test_evicted_from_the_host_is_on_disk_alone(engine: Engine) -> None:
    engine.pool.host.budget = 1
    said = say(engine, "lora")
    leave_room_for_one(engine)
    assert engine.pool.host.used == 0
    assert [r.name for r in engine.stats().residents] == ["rslora"]
    assert say(engine, "lora") == said


def test_what_waits_for_room_takes_none(engine: Engine) -> None:
    said = {name: say(engine, name) for name in NAMES[:2]}
    leave_room_for_one(engine)
    requests = [rig.ask(engine, name, PROMPT, logprobs=0) for name in NAMES[:2] * 3]
    answers = {r.id: rig.Answer() for r in requests}
    for request in requests:
        engine.submit(request)
    until = time.monotonic() + 20
    while engine.busy:
        assert time.monotonic() < until
        rig.collect(engine.step(), answers)
        assert engine.pool.used <= engine.pool.budget
        assert all(h.placed is None for h in engine.pool._parked)
    assert [answers[r.id].ids for r in requests] == [said[name] for name in NAMES[:2] * 3]


def blocked(engine: Engine) -> Future[None]:
    """The loader is busy until this is resolved."""
    gate: Future[None] = Future()
    engine.pool._quick.submit(gate.result)
    return gate


@pytest.mark.parametrize("then", ["delete", "replace", "unload"])
def test_a_waiting_row_finishes_on_its_version_whatever_happens(engine: Engine, then: str) -> None:
    said = say(engine, "lora")
    do(engine, "unload", "lora")
    gate, request = blocked(engine), rig.ask(engine, "lora", PROMPT, logprobs=0)
    spec, answers = request.members[0].spec, {request.id: rig.Answer()}
    engine.submit(request)
    engine.step()
    folder = Path(spec.path)
    shutil.rmtree(folder)
    if then == "replace":
        shutil.copytree(rig.saved("llama", "rslora"), folder)
    unloaded = None if then == "replace" else engine.call("unload", spec)
    gate.set_result(None)
    while engine.busy:
        rig.collect(engine.step(), answers)
    assert answers[request.id].end is not None
    assert answers[request.id].end.error is None
    assert answers[request.id].ids == said
    if unloaded:
        settle(engine, unloaded)
        assert (engine.pool.used, engine.pool.host.used) == (0, 0)


def test_a_row_that_waits_for_a_place_keeps_what_is_unloaded(engine: Engine) -> None:
    said = say(engine, "lora")
    engine.scheduler.max_rows = 1
    first, second = (rig.ask(engine, name, PROMPT, logprobs=0, id=name) for name in ("rslora", "lora"))
    engine.submit(first)
    while not engine.scheduler.running:
        engine.step()
    engine.submit(second)
    spec = second.members[0].spec
    done = engine.call("unload", spec)
    shutil.rmtree(spec.path)
    answers = {"rslora": rig.Answer(), "lora": rig.Answer()}
    while engine.busy:
        assert not done.done()
        rig.collect(engine.step(), answers)
    assert answers["lora"].ids == said
    assert done.done()
    assert resident(engine, "rslora")
    assert not any(r.name == "lora" for r in engine.stats().residents)


def test_files_are_closed_once_read_and_few_are_open(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "MOST_HELD", 1)
    gate = blocked(engine)
    specs = [engine.pool.store.resolve(name) for name in ("lora", "rslora")]
    holdings = [engine.pool.want(spec) for spec in specs]
    assert [h.files is not None for h in holdings] == [True, False]
    shutil.rmtree(engine.pool.store.root)
    gate.set_result(None)
    until = time.monotonic() + 20
    while not (holdings[0].live and holdings[1].error):
        assert time.monotonic() < until
        engine.step() or time.sleep(0.001)
    assert isinstance(holdings[1].error, VersionGone)
    assert [h.files for h in holdings] == [None, None]


def test_a_snapshot_is_laid_out_a_group_at_a_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is waited for between two groups, so that a step finds one group's work before it at most."""
    model, store = engine.model, engine.pool.store
    adapter = pools.compile_adapter(store.resolve("lora"), store, model.base)
    seen: list[str] = []
    place = LinearGroup.place

    def watched(group: LinearGroup, patches: Mapping[str, Patch]) -> GroupPatch:
        seen.append("group")
        return place(group, patches)

    monkeypatch.setattr(LinearGroup, "place", watched)
    monkeypatch.setattr(model, "loading", SimpleNamespace(synchronize=lambda: seen.append("waited")))
    groups = len(model.place(adapter).groups)
    assert seen == ["group"] * groups
    seen.clear()
    model.place(fold(adapter, model.base))
    assert seen == ["group", "waited"] * groups


def test_what_was_compiled_of_other_bytes_is_nowhere(engine: Engine) -> None:
    """They are sound, fit the base, and lie in the very file that was opened: only the hash tells."""
    gate = blocked(engine)
    root = engine.pool.store.root
    holding = engine.pool.want(engine.pool.store.resolve("lora"))
    weights = dict(load_file(root / "lora" / guard.WEIGHTS))
    name, first = next(iter(weights.items()))
    data = save(weights | {name: first + 1})
    with (root / "lora" / guard.WEIGHTS).open("r+b") as file:
        file.write(data)
        file.truncate()
    gate.set_result(None)
    until = time.monotonic() + 20
    while holding.error is None:
        assert time.monotonic() < until
        engine.step() or time.sleep(0.001)
    assert isinstance(holding.error, VersionGone)
    assert (holding.placed, holding.adapter, holding.live) == (None, None, False)
    assert (engine.pool.used, engine.pool.host.held()) == (0, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("more", "apart"), [({}, False), ({"big": 900}, True), ({"half": 3}, True)])
def test_a_files_tensors_are_what_it_says_and_each_time_new(
    dtype: torch.dtype, more: dict[str, int], apart: bool
) -> None:
    """Read as one tensor, or one by one."""
    wants = {f"t{i:02}": torch.randn(3, i and 4 + i % 2).to(dtype) for i in range(14)}
    wants |= {name: torch.randn(size).to(torch.float16 if name == "half" else dtype) for name, size in more.items()}
    data = memoryview(bytearray(save(wants)))
    tensors = pools.Tensors(Blob(data, guard.parse_header(data)))
    found = [tensors[name] for name in wants]
    assert len({t.untyped_storage().data_ptr() for t in found if t.numel()}) == (len(wants) - 1 if apart else 1)
    tensors = pools.Tensors(Blob(data, guard.parse_header(data)))
    for _ in range(2):
        for name, want in wants.items():
            found = tensors[name]
            assert torch.equal(found, want.float()), name
            found.zero_()
            filed = tensors.as_filed(name)
            assert filed.dtype == want.dtype
            assert torch.equal(filed, want), name
            filed.zero_()
