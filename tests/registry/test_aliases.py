"""Aliases on disk: they outlive the process, change in one step, and share requests out as they say."""

from __future__ import annotations

import errno
import json
from collections import Counter
from pathlib import Path

import pytest

from adapter_server.errors import InvalidRequest, StorageFailed
from adapter_server.registry import aliases
from adapter_server.registry.aliases import Aliases, Target, pick
from adapter_server.registry.disk import Disk

CANARY = (Target("sql@v7", 90), Target("sql@v8", 10))


def test_they_are_there_after_a_restart(tmp_path: Path) -> None:
    first = Aliases(tmp_path)
    assert not first.all()
    first.put("prod-sql", CANARY)
    first.put("other", (Target("shout"),))
    first.put("prod-sql", (Target("sql@v8"),))
    again = Aliases(tmp_path)
    assert dict(again.all()) == {"prod-sql": (Target("sql@v8"),), "other": (Target("shout"),)}
    assert again.drop("other") == (Target("shout"),)
    assert again.drop("other") == ()
    assert list(Aliases(tmp_path).all()) == ["prod-sql"]
    assert (again.pins("sql"), again.pins("shout")) == ({"v8"}, set())


def test_shares_hold_and_the_same_token_goes_the_same_way() -> None:
    chosen = Counter(pick(CANARY, f"request {n}").adapter for n in range(10_000))
    assert 850 < chosen["sql@v8"] < 1150
    assert len({pick(CANARY, "one") for _ in range(100)}) == 1
    assert pick((Target("a", 1e-9),), "x").adapter == "a"


class Failing(Disk):
    """Fails the call of that name."""

    def __init__(self, call: str) -> None:
        self.call = call

    def _fail(self, call: str) -> None:
        if call == self.call:
            raise OSError(errno.ENOSPC, "No space left on device")

    def create(self, path: Path) -> int:
        self._fail("create")
        return super().create(path)

    def write(self, fd: int, data: memoryview) -> int:
        self._fail("write")
        return super().write(fd, data[:7])

    def rename(self, old: Path, new: Path) -> None:
        self._fail("rename")
        super().rename(old, new)


@pytest.mark.parametrize("call", ["create", "write", "rename"])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, call: str) -> None:
    Aliases(tmp_path).put("a", CANARY)
    failing = Aliases(tmp_path, Failing(call))
    with pytest.raises(StorageFailed, match="No space left"):
        failing.put("a", (Target("other"),))
    assert failing.get("a") == CANARY
    assert Aliases(tmp_path).get("a") == CANARY
    recovered = Aliases(tmp_path)
    recovered.put("b", (Target("other"),))  # whatever the failure left behind
    assert sorted(Aliases(tmp_path).all()) == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"a": 5}',
        b'{"a": [["x"]]}',
        b'{"a": [["x", 0]]}',
        b'{"a": [["x", true]]}',
        b'{"a": [["x", 1e999]]}',
        b'{"a": [["../x", 1]]}',
        b'{"../a": [["x", 1]]}',
        b'{"a": [[5, 1]]}',
        b"\xff",
    ],
)
def test_a_file_that_is_none_of_ours_stops_the_start(tmp_path: Path, content: bytes) -> None:
    (tmp_path / aliases.FILE).write_bytes(content)
    with pytest.raises(InvalidRequest, match="mend or remove"):
        Aliases(tmp_path)


def test_there_is_a_most_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliases, "MOST", 1)
    known = Aliases(tmp_path)
    known.put("a", CANARY)
    known.put("a", CANARY[:1])
    with pytest.raises(InvalidRequest, match="limit"):
        known.put("b", CANARY)
    assert json.loads((tmp_path / aliases.FILE).read_text()) == {"a": [["sql@v7", 90.0]]}
