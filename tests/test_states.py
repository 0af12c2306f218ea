"""Any sequence of changes, by upload, by hand and by an operator, against a small model: no answer is wrong."""

from __future__ import annotations

import functools
import io
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.core import Spec
from adapter_server.engine.engine import Engine
from adapter_server.errors import AdapterNotFound, AdapterRefused, VersionConflict
from adapter_server.registry import guard, versions
from adapter_server.registry.publish import Publisher
from adapter_server.registry.store import Store

PROMPT, KEEP = (5, 9, 13), 3
names, seeds = st.sampled_from("ab"), st.integers(0, 5)
KINDS = ("lora", "ia3", "dora", "prefix", "lora", "lora_saved")


@functools.cache
def content(seed: int) -> tuple[bytes, bytes]:
    """A different sound adapter for each seed, of several kinds."""
    folder = Path(tempfile.mkdtemp(prefix="states-"))
    base = functools.partial(zoo.tiny_base, "llama")
    zoo.save_adapter(base, zoo.ADAPTERS[KINDS[seed]](base()), folder, seed)
    return (folder / guard.CONFIG).read_bytes(), (folder / guard.WEIGHTS).read_bytes()


@functools.cache
def engine() -> Engine:
    made = Engine(zoo.tiny_base("llama"), EngineConfig(kv_bytes=8 << 20), Store(Path("nowhere"), settle_s=0))
    made.pool.budget = 200_000  # a few of them: others make room
    made.pool.host.budget = 250_000
    return made


@functools.cache
def alone(seed: int) -> list[int]:
    """What this content says when nothing else is there."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "one", seed)
        engine().pool.store = Store(Path(folder), settle_s=0)
        return say("one", "unmerged")


def write(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    for file, data in zip((guard.CONFIG, guard.WEIGHTS), content(seed), strict=True):
        (folder / file).write_bytes(data)


def say(ref: str, mode: str) -> list[int]:
    [answer] = rig.run(engine(), [rig.ask(engine(), ref, PROMPT, mode, logprobs=0)])
    assert answer.end is not None
    assert answer.end.error is None, answer.end.error
    return answer.ids


def settle(done: Future[None]) -> None:
    while not done.done():
        engine().step() or time.sleep(0.0002)  # the loader needs the lock too
    done.result()


def forget_all() -> None:
    for resident in engine().stats().residents:
        settle(engine().call("unload", Spec(resident.name, resident.version, "", resident.family, {}, 0)))


class Registry(RuleBasedStateMachine):
    """`served`: what each name stands for, and whether by hand; `history`: the versions of each, oldest first."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="states-"))
        self.store = engine().pool.store = Store(self.root, settle_s=0)
        self.store.judge = engine().pool.judge
        self.publisher = Publisher(self.store, keep=KEEP)
        self.served: dict[str, tuple[int, bool]] = {}
        self.history: dict[str, list[int]] = {"a": [], "b": []}
        self.pinned: Spec | None = None

    def teardown(self) -> None:
        forget_all()
        assert (engine().pool.used, engine().pool.host.used) == (0, 0)
        shutil.rmtree(self.root)

    def _becomes(self, name: str, seed: int) -> None:
        """The link points there now; a folder in its place joins the history before what is new, old ones go."""
        old, by_hand = self.served.get(name, (seed, False))
        history = self.history[name] if name in self.served else []
        at = len(history)
        if seed not in history:
            history = [*history, seed]
        if by_hand and old not in history:
            history = [*history[:at], old, *history[at:]]
        self.served[name] = seed, False
        self.history[name] = [s for i, s in enumerate(history) if s == seed or i >= len(history) - KEEP]

    # Changes

    @rule(name=names, seed=seeds)
    def publish(self, name: str, seed: int) -> None:
        config, weights = content(seed)
        self.publisher.publish(name, config, io.BytesIO(weights))
        self._becomes(name, seed)

    @rule(name=names, seed=seeds)
    def copy_in(self, name: str, seed: int) -> None:
        self.remove(name)
        write(self.root / name, seed)
        self.served[name] = seed, True

    @rule(name=names)
    def remove(self, name: str) -> None:
        """By hand: what was published before is swept up later."""
        place = self.root / name
        if place.is_symlink():
            place.unlink()
        elif place.exists():
            shutil.rmtree(place)
        self.served.pop(name, None)

    @rule()
    def restart(self) -> None:
        self.publisher.recover()
        for name in self.history.keys() - self.served.keys():
            self.history[name] = []

    @rule(name=names)
    def rollback(self, name: str) -> None:
        now, by_hand = self.served.get(name, (None, False))
        history = self.history[name]
        before = history if by_hand else history[: history.index(now)] if now in history else []
        if now is None or not before:
            with pytest.raises(AdapterNotFound if now is None else VersionConflict):
                self.publisher.rollback(name)
            return
        self.publisher.rollback(name)
        self._becomes(name, before[-1])

    @rule(name=names)
    def delete(self, name: str) -> None:
        if name in self.served:
            self.publisher.delete(name)
            del self.served[name]
            self.history[name] = []
        else:
            with pytest.raises(AdapterNotFound):
                self.publisher.delete(name)

    @rule(name=names, seed=seeds, cut=st.integers(0, 300))
    def hostile(self, name: str, seed: int, cut: int) -> None:
        config, weights = content(seed)
        with pytest.raises(AdapterRefused):
            self.publisher.publish(name, config, io.BytesIO(weights[:cut]))

    # Use

    @rule(name=names, op=st.sampled_from(["load", "unload", "merge", "unmerge"]))
    def operate(self, name: str, op: Literal["load", "unload", "merge", "unmerge"]) -> None:
        if name in self.served and not (op == "merge" and KINDS[self.served[name][0]] == "prefix"):
            spec = self.store.resolve(name)
            settle(engine().call(op, spec))
            if op == "unload" and spec == self.pinned:
                self.pinned = None

    @rule(name=names)
    def pin(self, name: str) -> None:
        """One at a time: the budget has room for others beside it."""
        self.unpin()
        if name in self.served:
            self.pinned = self.store.resolve(name)
            settle(engine().call("load", self.pinned))
            settle(engine().call("pin", self.pinned))

    @rule()
    def unpin(self) -> None:
        if self.pinned:
            settle(engine().call("unpin", self.pinned))
            self.pinned = None

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        """As if another had needed the room: off the device, and still in the host tier if that has it."""
        idle = [h for h in engine().pool.holdings.values() if h.live and not h.pinned]
        if idle:
            engine().pool.evict(data.draw(st.sampled_from(idle)))

    @rule(name=names, seed=seeds, change=st.sampled_from(["publish", "copy_in", "remove", "delete", "unload"]))
    def change_under_a_request(self, name: str, seed: int, change: str) -> None:
        """It was queued before the change, and gets what was there then."""
        if name not in self.served:
            return
        before = self.alone(self.served[name][0])
        request = rig.ask(engine(), name, PROMPT, "unmerged", logprobs=0)
        engine().submit(request)
        if change == "unload":
            engine().call("unload", request.members[0].spec)
            self.pinned = None if self.pinned == request.members[0].spec else self.pinned
        elif change in ("remove", "delete"):
            getattr(self, change)(name)
        else:
            getattr(self, change)(name, seed)
        answers = {request.id: rig.Answer()}
        while engine().busy:
            rig.collect(engine().step(), answers)
            time.sleep(0.0002)
        assert answers[request.id].ids == before

    @rule(name=names, mode=st.sampled_from(["unmerged", "merged", "auto"]))
    def generate(self, name: str, mode: str) -> None:
        if name in self.served:
            seed = self.served[name][0]
            mode = "unmerged" if KINDS[seed] == "prefix" else mode
            assert say(name, mode) == self.alone(seed)

    @rule(name=names, data=st.data())
    def generate_before(self, name: str, data: st.DataObject) -> None:
        if name in self.served and self.history[name]:
            seed = data.draw(st.sampled_from(self.history[name]))
            assert say(f"{name}@{versions.digest(*content(seed))[:20]}", "unmerged") == self.alone(seed)

    def alone(self, seed: int) -> list[int]:
        said = alone(seed)
        engine().pool.store = self.store
        return said

    # What always holds

    @invariant()
    def every_name_is_what_it_should_be(self) -> None:
        assert self.store.names() == sorted(self.served)
        for name, (seed, by_hand) in self.served.items():
            assert (self.root / name).is_symlink() is not by_hand
            assert bytes(self.store.read(self.store.resolve(name)).data) == content(seed)[1]
            ids = [versions.digest(*content(s))[:12] for s in self.history[name]]
            assert [version.id for version in self.store.versions(name)] == ids

    @invariant()
    def nothing_leaks(self) -> None:
        pool = engine().pool
        assert pool.used == sum(h.bytes for h in pool.holdings.values() if h.live) <= pool.budget
        assert pool.host.used == sum(map(pool.host.bytes_of, pool.host.held())) <= pool.host.budget
        assert not [h for h in pool.holdings.values() if h.files or h.adapter or h.wanted or h.rows]
        assert not engine().busy
        pinned = [h for h in pool.holdings.values() if h.pinned]
        assert [h.spec.key for h in pinned] == ([self.pinned.key] if self.pinned else [])
        assert all(h.live for h in pinned)


@pytest.fixture
def begun() -> Iterator[str]:
    """The base's digest at the beginning, what each content says alone being known."""
    for seed in range(len(KINDS)):
        alone(seed)
    forget_all()
    yield engine().model.digest()
    engine().close()


def test_no_sequence_of_changes_gives_a_wrong_answer(begun: str) -> None:
    run_state_machine_as_test(
        Registry,
        settings=settings(
            max_examples=25,
            stateful_step_count=30,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert engine().model.digest() == begun
