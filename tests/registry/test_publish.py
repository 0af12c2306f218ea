"""Publishing: whole versions, one step from one to the next, history, conflicts, and what a sweep leaves."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

import files
from adapter_server.errors import AdapterNotFound, AdapterRefused, StorageFailed, VersionConflict, VersionGone
from adapter_server.registry import guard, versions
from adapter_server.registry.disk import Disk
from adapter_server.registry.publish import Publisher
from adapter_server.registry.store import Store


def content(seed: int) -> tuple[bytes, io.BytesIO]:
    return json.dumps(files.CONFIG).encode(), io.BytesIO(files.safetensors(files.tensors(seed)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


@pytest.fixture
def store(root: Path) -> Store:
    return Store(root, reserved=["tiny-base"], settle_s=30)


@pytest.fixture
def publisher(store: Store) -> Publisher:
    return Publisher(store, keep=3)


def served(store: Store, ref: str) -> int:
    """The seed of the weights that a reference gives."""
    data = store.read(store.resolve(ref)).data
    return next(seed for seed in range(20) if data == files.safetensors(files.tensors(seed)))


def numbers(store: Store, name: str) -> list[int]:
    return [version.number for version in store.versions(name)]


def hidden(root: Path) -> list[str]:
    return [path.name for path in root.glob(".versions/*/.*")]


def test_a_published_version_is_served_at_once(publisher: Publisher, store: Store, root: Path) -> None:
    spec = publisher.publish("a", *content(1), source="upload")
    assert store.resolve("a") == spec
    assert served(store, "a") == 1
    assert os.readlink(root / "a") == f".versions/a/{spec.version}"
    assert store.names() == ["a"]
    assert store.refresh().added == ("a",)
    assert not store.restless


def test_the_manifest_says_what_it_is(publisher: Publisher, store: Store, root: Path) -> None:
    config = files.CONFIG | {"base_model_name_or_path": "tiny", "peft_version": "0.21.2"}
    raw, weights = json.dumps(config).encode(), files.safetensors(files.tensors(1))
    spec = publisher.publish("a", raw, io.BytesIO(weights), source="upload")
    [version] = store.versions("a")
    assert (version.number, version.id, version.family, version.size) == (1, spec.version, "LORA", len(weights))
    assert (version.base, version.peft_version, version.source) == ("tiny", "0.21.2", "upload")
    assert version.time.endswith("Z")
    sums = {file: hashlib.sha256((root / "a" / file).read_bytes()).hexdigest() for file in version.files}
    assert version.files == sums
    assert set(sums) == {guard.CONFIG, guard.WEIGHTS}


def test_the_first_version_makes_the_folder(tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    Publisher(store).publish("a", *content(1))
    assert served(store, "a") == 1


def test_every_version_has_an_address(publisher: Publisher, store: Store) -> None:
    specs = [publisher.publish("a", *content(seed)) for seed in (1, 2, 3)]
    for number, spec in enumerate(specs, 1):
        digest = store.versions("a")[number - 1].digest
        for word in (f"v{number}", f"V{number}", spec.version, digest, digest[:20].upper()):
            assert store.resolve(f"a@{word}") == spec
        assert served(store, f"a@v{number}") == number
    for word in ("v0", "v4", "v01", "0" * 12, specs[0].version[:11], ""):
        with pytest.raises(AdapterNotFound, match="has no version"):
            store.resolve(f"a@{word}")


def test_a_version_outlives_the_next_one(publisher: Publisher, store: Store) -> None:
    before = publisher.publish("a", *content(1))
    publisher.publish("a", *content(2))
    assert served(store, "a") == 2
    assert store.read(before).data == files.safetensors(files.tensors(1))


def test_rollback_goes_back_a_version_at_a_time(publisher: Publisher, store: Store) -> None:
    for seed in (1, 2, 3):
        publisher.publish("a", *content(seed))
    for seed in (2, 1):
        assert publisher.rollback("a") == store.resolve("a")
        assert served(store, "a") == seed
    with pytest.raises(VersionConflict, match="no version before"):
        publisher.rollback("a")
    publisher.publish("a", *content(4))
    assert (served(store, "a"), numbers(store, "a")) == (4, [2, 3, 4])


def test_the_same_content_again_is_the_same_version(publisher: Publisher, store: Store) -> None:
    for seed in (1, 2, 1):
        publisher.publish("a", *content(seed))
    assert (served(store, "a"), numbers(store, "a")) == (1, [1, 2])


def test_the_last_versions_stay_and_those_in_use(root: Path, store: Store) -> None:
    used: set[str] = set()
    publisher = Publisher(store, in_use=lambda name: used, keep=2)
    first = publisher.publish("a", *content(1))
    used.add(first.version)
    for seed in (2, 3, 4):
        publisher.publish("a", *content(seed))
    assert numbers(store, "a") == [1, 3, 4]
    assert store.read(first)
    used.clear()
    publisher.publish("a", *content(5))
    assert numbers(store, "a") == [4, 5]
    with pytest.raises(VersionGone):
        store.read(first)
    assert hidden(root) == []


def test_deleting_takes_the_name_and_its_versions(publisher: Publisher, store: Store, root: Path) -> None:
    publisher.publish("a", *content(1))
    publisher.publish("a", *content(2))
    publisher.publish("b", *content(3))
    publisher.delete("a")
    for ref in ("a", "a@v1"):
        with pytest.raises(AdapterNotFound):
            store.resolve(ref)
    assert store.names() == ["b"]
    assert os.listdir(root / ".versions") == ["b"]
    publisher.publish("a", *content(4))
    assert numbers(store, "a") == [1]


def test_a_deleted_version_in_use_can_still_be_read(root: Path, store: Store) -> None:
    used: set[str] = set()
    publisher = Publisher(store, in_use=lambda name: used)
    spec = publisher.publish("a", *content(1))
    used.add(spec.version)
    publisher.delete("a")
    with pytest.raises(AdapterNotFound):
        store.resolve("a")
    assert store.read(spec)
    assert store.versions("a") == []
    used.clear()
    publisher.recover()
    assert os.listdir(root / ".versions") == []


@pytest.mark.parametrize("name", ["nobody", "../a", "", ".versions", "a/b", "\0"])
def test_what_is_not_there_is_not_found(publisher: Publisher, root: Path, name: str) -> None:
    for change in (publisher.delete, publisher.rollback):
        with pytest.raises(AdapterNotFound):
            change(name)
    assert os.listdir(root) == []


# Damage


def spoil(root: Path, id: str, file: str = guard.WEIGHTS) -> None:
    path = root / ".versions" / "a" / id / file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_version_is_never_served_and_says_so(publisher: Publisher, store: Store, root: Path) -> None:
    old, now = (publisher.publish("a", *content(seed)) for seed in (1, 2))
    spoil(root, now.version)
    for ref in ("a", "a@v2", f"a@{now.version}"):
        with pytest.raises(AdapterRefused, match=r"is damaged, .*publish it again, or go back"):
            store.read(store.resolve(ref))
    with pytest.raises(AdapterRefused, match="is damaged"):
        store.read(now)
    assert served(store, "a@v1") == 1
    assert publisher.rollback("a").version == old.version
    assert served(store, "a") == 1
    spoil(root, old.version)
    with pytest.raises(AdapterRefused, match="is damaged"):
        Store(root).resolve("a")


def test_a_version_without_its_file_is_damaged_too(publisher: Publisher, store: Store, root: Path) -> None:
    spec = publisher.publish("a", *content(1))
    (root / "a" / guard.WEIGHTS).unlink()
    with pytest.raises(AdapterRefused, match="damaged"):
        store.read(spec)
    with pytest.raises(AdapterRefused, match="missing"):
        store.resolve("a")


def test_publishing_it_again_mends_a_damaged_version(publisher: Publisher, store: Store, root: Path) -> None:
    for seed in (1, 2):
        publisher.publish("a", *content(seed))
    for file in (guard.WEIGHTS, guard.CONFIG):
        spoil(root, store.versions("a")[-1].id, file)
        with pytest.raises(AdapterRefused):
            store.resolve("a")
        publisher.publish("a", *content(2))
        assert served(store, "a") == 2
    assert hidden(root) == []
    assert [versions.whole(root, "a", version) for version in store.versions("a")] == [True, True]


def test_what_was_deleted_in_use_can_be_published_again(root: Path, store: Store) -> None:
    used: set[str] = set()
    publisher = Publisher(store, in_use=lambda name: used)
    before = publisher.publish("a", *content(1))
    used.add(before.version)
    publisher.delete("a")
    assert publisher.publish("a", *content(1)).version == before.version
    assert (served(store, "a"), numbers(store, "a")) == (1, [1])
    assert store.read(before)
    assert hidden(root) == []


def strict(root: Path) -> Store:
    store = Store(root)
    store.base, store.strict_base = guard.Base(("org/Tiny",)), True
    return store


def test_another_base_is_refused_where_that_is_strict(publisher: Publisher, store: Store, root: Path) -> None:
    config = json.dumps(files.CONFIG | {"base_model_name_or_path": "org/Other"}).encode()
    weights = files.safetensors(files.tensors(1))
    store.base = guard.Base(("org/Tiny",))
    spec = publisher.publish("a", config, io.BytesIO(weights))
    assert store.warning(spec) == "adapter_config.json: it was trained on 'org/Other', and 'org/Tiny' is served"
    for ref in ("a", "a@v1"):
        with pytest.raises(AdapterRefused, match="trained on"):
            strict(root).resolve(ref)
    with pytest.raises(AdapterRefused, match="trained on"):
        Publisher(strict(root)).publish("b", config, io.BytesIO(weights))


# A folder copied by hand


def by_hand(root: Path, seed: int) -> Path:
    return files.age(files.write(root / "a", seed))


def test_a_settled_folder_becomes_the_version_before(root: Path) -> None:
    by_hand(root, 1)
    (root / "a" / "notes.txt").write_text("kept")
    store = Store(root, settle_s=30)
    before, publisher = store.resolve("a"), Publisher(store)
    publisher.publish("a", *content(2))
    assert (served(store, "a"), numbers(store, "a")) == (2, [1, 2])
    publisher.rollback("a")
    assert store.resolve("a").version == before.version
    assert served(store, "a") == 1
    assert (root / "a" / "notes.txt").read_text() == "kept"
    assert store.versions("a")[0].source == "copied by hand"
    assert hidden(root) == []


def test_a_folder_of_the_same_content_is_taken_over(root: Path) -> None:
    by_hand(root, 1)
    store = Store(root, settle_s=30)
    Publisher(store).publish("a", *content(1))
    assert served(store, "a") == 1
    assert (root / "a").is_symlink()
    assert len(store.versions("a")) == 1


def test_a_folder_that_is_being_written_is_left_alone(publisher: Publisher, root: Path) -> None:
    files.write(root / "a", 1)
    with pytest.raises(VersionConflict, match="being written"):
        publisher.publish("a", *content(2))
    assert not (root / "a").is_symlink()
    (root / "b").mkdir()
    with pytest.raises(VersionConflict):
        publisher.publish("b", *content(2))


def test_an_unsound_folder_is_replaced_and_not_thrown_away(root: Path) -> None:
    files.age(files.write(root / "a", weights=b"broken"))
    store = Store(root, settle_s=30)
    publisher = Publisher(store)
    publisher.publish("a", *content(2))
    assert served(store, "a") == 2
    [kept] = hidden(root)
    assert (root / ".versions" / "a" / kept / guard.WEIGHTS).read_bytes() == b"broken"
    publisher.recover()
    assert hidden(root) == [kept]


def test_rollback_over_a_folder_copied_since(root: Path, publisher: Publisher) -> None:
    publisher.publish("a", *content(1))
    (root / "a").unlink()
    by_hand(root, 2)
    store = Store(root, settle_s=30)
    Publisher(store).rollback("a")
    assert (served(store, "a"), numbers(store, "a")) == (1, [1, 2])


def test_a_folder_is_deleted_too(root: Path) -> None:
    by_hand(root, 1)
    Publisher(Store(root, settle_s=30)).delete("a")
    assert os.listdir(root) == [".versions"]
    assert os.listdir(root / ".versions") == []


def test_a_file_system_without_exchange_says_so(root: Path) -> None:
    class Plain(Disk):
        def exchange(self, one: Path, other: Path) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    by_hand(root, 1)
    store = Store(root, settle_s=30)
    with pytest.raises(VersionConflict, match="remove the folder first"):
        Publisher(store, disk=Plain()).publish("a", *content(2))
    assert served(store, "a") == 1
    assert hidden(root) == []


# Refusals and conflicts


@pytest.mark.parametrize(
    "name", ["../x", "/etc", "a/b", ".", "..", "\0", "x" * 300, "base", "tiny-base", ".hidden", ""]
)
def test_bad_names_are_refused_before_anything_is_written(publisher: Publisher, root: Path, name: str) -> None:
    with pytest.raises(AdapterRefused, match=r"not allowed|reserved"):
        publisher.publish(name, *content(1))
    assert os.listdir(root) == []


def test_a_name_that_differs_by_case_is_refused(publisher: Publisher) -> None:
    publisher.publish("abc", *content(1))
    with pytest.raises(AdapterRefused, match="differs from abc by case only"):
        publisher.publish("ABC", *content(2))


@pytest.mark.parametrize(
    ("config", "weights", "fault"),
    [
        (b"{", None, "no valid JSON"),
        (None, b"", "no safetensors"),
        (None, files.safetensors({"x": np.full(2, np.inf, np.float32)}), "NaN or infinity"),
        (None, b"x" * 5000, "more than 4,000 bytes"),
    ],
)
def test_unsound_content_leaves_no_trace(root: Path, config: bytes | None, weights: bytes | None, fault: str) -> None:
    good = content(1)
    store = Store(root, max_bytes=4000)
    with pytest.raises(AdapterRefused, match=fault):
        Publisher(store).publish(
            "a", good[0] if config is None else config, good[1] if weights is None else io.BytesIO(weights)
        )
    assert os.listdir(root) == []


def test_what_the_base_refuses_is_not_published(publisher: Publisher, store: Store, root: Path) -> None:
    def refuse(spec: object, blob: object) -> None:
        raise AdapterRefused("does not fit")

    store.judge = refuse
    with pytest.raises(AdapterRefused, match="does not fit"):
        publisher.publish("a", *content(1))
    assert os.listdir(root) == []


class Gate(Disk):
    """Holds a publisher at its first file until the other has tried."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def create(self, path: Path) -> int:
        self.reached.set()
        assert self.go.wait(10)
        return super().create(path)


def test_of_two_publishers_at_once_one_wins(root: Path, store: Store) -> None:
    gate = Gate()
    first = threading.Thread(target=Publisher(store, disk=gate).publish, args=("a", *content(1)))
    first.start()
    assert gate.reached.wait(10)
    second = Publisher(Store(root))
    with pytest.raises(VersionConflict, match="being changed by another") as refused:
        second.publish("a", *content(2))
    second.recover()
    second.publish("b", *content(3))
    gate.go.set()
    first.join()
    assert (refused.value.status, served(store, "a"), served(store, "b")) == (409, 1, 3)


def test_many_publishers_leave_one_whole_version(root: Path) -> None:
    outcomes: list[str] = []

    def publish(seed: int) -> None:
        try:
            publisher.publish("a", *content(seed))
            outcomes.append("won")
        except VersionConflict:
            outcomes.append("conflict")

    publisher = Publisher(Store(root), keep=20)
    threads = [threading.Thread(target=publish, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = Store(root)
    assert len(outcomes) == 12
    assert numbers(store, "a") == list(range(1, outcomes.count("won") + 1))
    assert served(store, "a") in range(12)
    assert hidden(root) == []


def test_a_failing_disk_is_said_and_changes_nothing(root: Path, publisher: Publisher, store: Store) -> None:
    publisher.publish("a", *content(1))

    class Full(Disk):
        def write(self, fd: int, data: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageFailed, match="No space left") as refused:
        Publisher(store, disk=Full()).publish("a", *content(2))
    assert refused.value.status == 500
    assert (served(store, "a"), numbers(store, "a"), hidden(root)) == (1, [1], [])


def test_a_manifest_that_is_none_makes_no_version(publisher: Publisher, store: Store, root: Path) -> None:
    spec = publisher.publish("a", *content(1))
    path = root / "a" / versions.MANIFEST
    whole = path.read_text()
    for text in ("", "{", "[]", '{"number": 1}', whole.replace('"number": 1', '"number": "x"'), "[" * 20_000):
        path.write_text(text)
        assert store.versions("a") == []
        assert store.resolve("a") == spec


def test_a_link_that_was_moved_keeps_its_version(publisher: Publisher, root: Path) -> None:
    publisher.publish("a", *content(1))
    (root / "a").rename(root / "b")
    publisher.recover()
    assert served(Store(root, settle_s=0), "b") == 1
