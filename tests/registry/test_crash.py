"""Whatever call fails, or kills: the old version or the new one, never a mixture, and the next start is clean."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import changes
from adapter_server.errors import AdapterNotFound, AdapterRefused, StorageFailed
from adapter_server.registry import versions
from adapter_server.registry.store import Store

ROOT = Path(__file__).parents[2]


def served(root: Path) -> int | None:
    """The seed of what a request would get; it is whole, or this raises."""
    store = Store(root, settle_s=0)
    try:
        data = store.read(store.resolve("a")).data
    except AdapterNotFound:
        return None
    except AdapterRefused as refused:
        if "is damaged" not in refused.message:
            raise
        return changes.DAMAGED
    return next(seed for seed in range(9) if data == changes.weights(seed))


def check_clean(root: Path, now: int | None, damaged: bool = False) -> None:
    """After the sweep of the next start: the same is served, every version is whole but one that was `damaged` before,
    and nothing else is there."""
    changes.publisher(root).recover()
    assert served(root) == now
    store = Store(root, settle_s=0)
    sound = [v for v in store.versions("a") if versions.whole(root, "a", v)]
    for version in sound:
        assert store.read(store.resolve(f"a@{version.id}"))
    assert len(store.versions("a")) - len(sound) <= damaged
    home = root / versions.HOME
    found = {path.name for path in home.glob("*/*")} if home.exists() else set()
    assert found == {version.id for version in store.versions("a")}
    numbers = [version.number for version in store.versions("a")]
    assert len(set(numbers)) == len(numbers)
    changes.publisher(root).publish("a", changes.CONFIG, io.BytesIO(changes.weights(7)))
    assert served(root) == 7


@pytest.mark.parametrize("change", list(changes.CHANGES))
@pytest.mark.parametrize("stays", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("short", [False, True], ids=["whole", "short"])
def test_any_failing_call_leaves_the_old_or_the_new(tmp_path: Path, change: str, stays: bool, short: bool) -> None:
    _, act, before, after = changes.CHANGES[change]
    early = stays or before == changes.DAMAGED  # what is mended before the failure harms nobody
    start = changes.prepared(tmp_path / "start", change)
    names = changes.calls(start, tmp_path / "whole", change)
    assert served(tmp_path / "whole") == after
    for k in range(1, len(names) + 1):
        if short and names[k - 1] != "write":
            continue
        root = changes.copy(start, tmp_path / str(k))
        try:
            act(changes.publisher(root, changes.Failing(k, changes.ERRORS[k % 2], stays, short)))
            now = after
        except StorageFailed:
            now = served(root) if early else before
        assert served(root) == now, (k, names[k - 1])
        assert now in (before, after)
        check_clean(root, now, before == changes.DAMAGED)


@pytest.fixture(scope="module")
def wrecks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """{change: what is left of it, by the call at which it was killed}."""
    folder = tmp_path_factory.mktemp("wrecks")
    script = Path(changes.__file__)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "server", ROOT / "tests"))),
        "OPENBLAS_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, script, folder], env=env, capture_output=True, text=True, check=True)
    found = {change: names for line in done.stdout.splitlines() for change, names in json.loads(line).items()}
    return {change: [folder / change / str(k + 1) for k in range(len(names))] for change, names in found.items()}


@pytest.mark.parametrize("change", list(changes.CHANGES))
def test_a_kill_at_any_call_leaves_the_old_or_the_new(wrecks: dict[str, list[Path]], change: str) -> None:
    _, _, before, after = changes.CHANGES[change]
    said = [served(root) for root in wrecks[change]]
    turn = said.index(after)
    assert said == [before] * turn + [after] * (len(said) - turn)
    assert 0 < turn < len(said)
    for root, now in zip(wrecks[change], said, strict=True):
        check_clean(root, now, before == changes.DAMAGED)
