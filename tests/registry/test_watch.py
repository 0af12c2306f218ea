"""The watcher, over a real file system."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import files
from adapter_server.registry import watch as watching
from adapter_server.registry.store import Changes, Store

LATEST_S = 2.0


@asynccontextmanager
async def watched(store: Store) -> AsyncIterator[list[Changes]]:
    """The changes told so far, while the watcher runs."""
    told: list[Changes] = []
    stop = asyncio.Event()
    task = asyncio.create_task(watching.watch(store, told.append, stop))
    await asyncio.sleep(0.2)
    try:
        yield told
    finally:
        stop.set()
        await asyncio.wait_for(task, 1)


async def told(changes: list[Changes], is_it: Callable[[Changes], object]) -> float:
    """How long it took until such a change was told."""
    started = time.monotonic()
    while not any(is_it(change) for change in changes):
        assert time.monotonic() - started < 10, changes
        await asyncio.sleep(0.005)
    return time.monotonic() - started


def old(root: Path, *names: str, brisk: bool = False) -> Store:
    for name in names:
        files.age(files.write(root / name))
    return Store(root, settle_s=0.2 if brisk else 0.5)


def test_new_changed_and_removed_folders_are_told_within_two_seconds(tmp_path: Path) -> None:
    store = old(tmp_path, "a")

    async def live() -> None:
        async with watched(store) as changes:
            files.write(tmp_path / "new")
            assert await told(changes, lambda c: c.added == ("new",)) < LATEST_S
            assert store.resolve("new")
            files.write(tmp_path / "a", seed=4)
            assert await told(changes, lambda c: c.changed == ("a",)) < LATEST_S
            shutil.rmtree(tmp_path / "a")
            assert await told(changes, lambda c: c.removed == ("a",)) < LATEST_S

    asyncio.run(live())


def test_without_notices_the_scans_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spent(*_: object, **__: object) -> AsyncIterator[object]:
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr(watching, "awatch", spent)
    store = old(tmp_path, "a")

    async def live() -> None:
        async with watched(store) as changes:
            files.age(files.write(tmp_path / "new"))
            assert await told(changes, lambda c: c.added == ("new",)) < LATEST_S

    asyncio.run(live())


def test_a_root_that_appears_later_is_watched(tmp_path: Path) -> None:
    root = tmp_path / "later"
    store = Store(root)

    async def live() -> None:
        async with watched(store) as changes:
            files.write(root / "a")
            assert await told(changes, lambda c: c.added == ("a",)) < LATEST_S

    asyncio.run(live())


def test_a_failing_disk_is_told_once_and_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = old(tmp_path, "a", brisk=True)
    monkeypatch.setattr(watching, "POLL_S", 0.05)

    async def live() -> None:
        async with watched(store) as changes:
            with monkeypatch.context() as patch:
                patch.setattr(os, "listdir", broken)
                await asyncio.sleep(0.4)
            assert [bool(c.error) for c in changes] == [True]
            files.write(tmp_path / "new")
            await told(changes, lambda c: c.added == ("new",))

    def broken(path: Path) -> list[str]:
        raise OSError(5, "Input/output error")

    asyncio.run(live())


def test_cancelling_ends_the_watch_and_leaves_the_stop_alone(tmp_path: Path) -> None:
    store = old(tmp_path, "a")

    async def live() -> None:
        stop = asyncio.Event()
        task = asyncio.create_task(watching.watch(store, lambda _: None, stop))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 1)
        assert not stop.is_set()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(live())


def test_a_slow_scan_is_followed_by_a_longer_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, looks = old(tmp_path, "a"), list[float]()

    def slow() -> Changes:
        looks.append(time.monotonic())
        time.sleep(0.1)
        return Changes()

    async def live() -> None:
        async with watched(store):
            await asyncio.sleep(1.0)

    monkeypatch.setattr(watching, "POLL_S", 0.01)
    monkeypatch.setattr(store, "refresh", slow)
    asyncio.run(live())
    pauses = [b - a for a, b in itertools.pairwise(looks)]
    assert pauses
    assert min(pauses) > 0.1 * watching.REST
