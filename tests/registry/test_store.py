"""The adapters folder: what is found, what a name resolves to, and what happens while files change underneath."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

import files
from adapter_server.core import Spec
from adapter_server.errors import AdapterNotFound, AdapterRefused, AdapterUnavailable, VersionGone
from adapter_server.registry import guard, versions
from adapter_server.registry import store as stores
from adapter_server.registry.store import Changes, Entry, Fault, Held, Store

SETTLE_S = 0.2
T = TypeVar("T")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "adapters"


def aged(root: Path, name: str, seed: int = 0) -> Path:
    return files.age(files.write(root / name, seed))


def opened(root: Path, *names: str) -> Store:
    """A store over adapters that were there before it."""
    for seed, name in enumerate(names):
        aged(root, name, seed)
    return Store(root, settle_s=SETTLE_S)


def soon(get: Callable[[], T], seconds: float = 5.0) -> T:
    """What `get` gives as soon as it does not refuse."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return get()
        except (AdapterRefused, AdapterNotFound):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def reasons(store: Store) -> dict[str, str | None]:
    return {entry.name: entry.reason for entry in store.entries()}


# Versions


def test_a_spec_says_what_is_on_disk(root: Path) -> None:
    spec = opened(root, "a").resolve("a")
    config, weights = ((root / "a" / file).read_bytes() for file in (guard.CONFIG, guard.WEIGHTS))
    lengths = [len(part).to_bytes(8, "little") for part in (config, weights)]
    piece = hashlib.sha256(weights).digest()
    digest = hashlib.sha256(lengths[0] + config + lengths[1] + piece).hexdigest()
    assert (spec.name, spec.version, spec.family, spec.bytes) == ("a", digest[:12], "LORA", len(weights))
    assert (spec.path, spec.config) == (str(root / "a"), files.CONFIG)


def test_a_reference_may_bind_a_version(root: Path) -> None:
    store = opened(root, "a")
    spec = store.resolve("a")
    digest = store._folders["a"].state.digest
    for version in (spec.version, digest[:20], digest, digest.upper()):
        assert store.resolve(f"a@{version}") == spec
    for version in ("", "v1", spec.version[:11], "0" * 12, digest + "0", spec.version[:11] + "g"):
        with pytest.raises(AdapterNotFound, match=f"has no version .*it is at {spec.version}") as refused:
            store.resolve(f"a@{version}")
        assert refused.value.param == "adapter"


def test_the_config_is_part_of_the_version(root: Path) -> None:
    files.age(files.write(root / "a"))
    files.age(files.write(root / "b", config=files.CONFIG | {"lora_alpha": 8}))
    store = Store(root)
    assert store.resolve("a").version != store.resolve("b").version


def test_the_same_files_have_the_same_version(root: Path) -> None:
    store = opened(root, "a")
    before = store.resolve("a")
    os.utime(root / "a" / guard.WEIGHTS)
    time.sleep(SETTLE_S)
    assert soon(lambda: store.resolve("a")) == before


def test_an_unchanged_folder_costs_two_stats(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(root, "a")
    spec = store.resolve("a")
    seen: list[str] = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path: (seen.append(path), stat(path))[1])
    monkeypatch.setattr(os, "open", None)
    monkeypatch.setattr(os, "listdir", None)
    assert store.resolve("a") == spec
    assert [Path(path).name for path in seen] == [guard.CONFIG, guard.WEIGHTS]


def test_a_start_over_2000_folders_opens_no_weights(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = files.write(root / "adapter-0")
    for i in range(1, 2000):
        (root / f"adapter-{i}").mkdir()
        for file in (guard.CONFIG, guard.WEIGHTS):
            os.link(one / file, root / f"adapter-{i}" / file)
    paths: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: (paths.append(str(path)), real(path, *rest))[1])
    store = Store(root, settle_s=0)
    assert paths == []
    assert len(store.names()) == 2000
    assert len(paths) == 2000
    assert all(path.endswith(guard.CONFIG) for path in paths)
    store.entries()
    assert len(paths) == 2000


# Reading


def test_read_gives_the_checked_bytes(root: Path) -> None:
    store = opened(root, "a")
    blob = store.read(store.resolve("a"))
    for name, array in files.tensors().items():
        span = blob.header[name]
        assert np.array_equal(np.frombuffer(blob.data[span.begin : span.end], np.float32).reshape(span.shape), array)


def test_read_gives_this_version_or_none(root: Path) -> None:
    store = opened(root, "a")
    spec = store.resolve("a")
    files.write(root / "a", seed=9)
    with pytest.raises(VersionGone, match=r"a@.* ask again"):
        store.read(spec)
    shutil.rmtree(root / "a")
    with pytest.raises(VersionGone):
        store.read(spec)


def test_an_unhashed_spec_of_the_list_cannot_be_read(root: Path) -> None:
    store = opened(root, "a")
    [entry] = store.entries()
    assert entry.spec
    assert entry.spec.version == ""
    with pytest.raises(VersionGone):
        store.read(entry.spec)
    assert store.resolve("a").version == store.entries()[0].spec.version  # type: ignore[union-attr]


def test_nan_is_refused_and_remembered(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.age(files.write(root / "a", weights=files.safetensors({"x": np.full(4, np.nan, np.float32)})))
    store = opened(root, "good")
    spec = store.resolve("a")
    with pytest.raises(AdapterRefused, match="'x' holds NaN"):
        store.read(spec)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", None)
        with pytest.raises(AdapterRefused, match="'x' holds NaN"):
            store.resolve("a")
    assert store.names() == ["good"]


def rewrite(folder: Path, weights: bytes) -> None:
    """Other bytes in the very same file."""
    with (folder / guard.WEIGHTS).open("r+b") as file:
        file.write(weights)
        file.truncate()


def held(store: Store, spec: Spec) -> contextlib.closing[Held]:
    found = store.hold(spec)
    assert found is not None
    return contextlib.closing(found)


def test_what_is_made_of_other_bytes_counts_for_nothing(root: Path) -> None:
    """They are sound, and compiled before the hash is known."""
    store = opened(root, "a")
    spec = store.resolve("a")
    made = []
    with held(store, spec) as opened_before:
        rewrite(root / "a", files.safetensors(files.tensors(9)))
        with pytest.raises(VersionGone), store.reading(spec, opened_before) as blob:
            made.append(blob)
    assert len(made) == 1


def test_a_wrong_hash_is_told_before_all_that_follows_from_it(root: Path) -> None:
    told: list[Fault] = []
    nan = files.safetensors({"x": np.full(4, np.nan, np.float32)})
    for weights in (nan, b"no safetensors", files.safetensors(files.tensors(9))):
        store = opened(root, "a")
        store.on_fault = told.append
        spec = store.resolve("a")
        with held(store, spec) as opened_before:
            rewrite(root / "a", weights)
            with pytest.raises(VersionGone), store.reading(spec, opened_before):
                raise ZeroDivisionError
        assert told.pop() == Fault("a", spec.version, None)
        assert not told


def test_what_happens_to_the_file_once_it_is_read_changes_nothing(root: Path) -> None:
    store = opened(root, "a")
    whole = (root / "a" / guard.WEIGHTS).read_bytes()
    with store.reading(store.resolve("a")) as blob:
        rewrite(root / "a", b"short")
        assert blob.data == whole
    assert blob.data == whole


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
def test_a_hash_is_of_all_pieces_in_order(root: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """However the bytes come: read at once, looked through, or given whole."""
    monkeypatch.setattr(guard, "PIECE", piece)
    monkeypatch.setattr(stores, "CHUNK", 3 * piece)
    store = opened(root, "a")
    spec = store.resolve("a")
    config, weights = ((root / "a" / file).read_bytes() for file in (guard.CONFIG, guard.WEIGHTS))
    leaves = [hashlib.sha256(weights[at : at + piece]).digest() for at in range(0, len(weights), piece)]
    lengths = [len(part).to_bytes(8, "little") for part in (config, weights)]
    digest = hashlib.sha256(lengths[0] + config + lengths[1] + b"".join(leaves)).hexdigest()
    assert spec.version == digest[:12]
    assert versions.digest(config, weights) == digest
    assert store.read(spec).data == weights
    for swapped in (weights[:-1] + b"?", weights[1:], weights[piece:] + weights[:piece]):
        assert swapped == weights or versions.digest(config, swapped) != digest


# What is found


def test_only_folders_with_a_config_are_adapters(root: Path) -> None:
    aged(root, ".hidden")
    (root / "empty").mkdir()
    (root / "README.md").write_text("no adapter")
    assert [entry.name for entry in opened(root, "b", "a").entries()] == ["a", "b"]


def test_no_root_is_an_empty_registry(root: Path) -> None:
    store = Store(root, settle_s=SETTLE_S)
    assert store.entries() == []
    with pytest.raises(AdapterNotFound, match="no adapter 'a'"):
        store.resolve("a")
    aged(root, "a")
    assert soon(lambda: store.resolve("a")).name == "a"


def test_a_root_that_cannot_be_listed_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(root, "a")

    def broken(path: Path) -> list[str]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "listdir", broken)
    with pytest.raises(AdapterUnavailable, match="Input/output error"):
        store.refresh()
    assert store.resolve("a").name == "a"


def test_an_unknown_name_is_told_the_nearest(root: Path) -> None:
    store = opened(root, "customer-7", "legal")
    with pytest.raises(AdapterNotFound, match="no adapter 'custmer-7'; nearest: customer-7") as refused:
        store.resolve("custmer-7")
    assert refused.value.param == "adapter"


@pytest.mark.parametrize("name", ["", ".", "..", "../adapters/a", "a/../a", "/etc", "a\0", "a\n", "x" * 5000, "@", "é"])
def test_names_outside_the_grammar_never_reach_the_disk(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(root, "a")
    monkeypatch.setattr(os, "stat", None)
    with pytest.raises(AdapterNotFound) as refused:
        store.resolve(name)
    assert refused.value.message.isprintable()
    assert len(refused.value.message) < 300


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "config": (lambda f: (f / guard.CONFIG).write_text("{"), "adapter_config.json: no valid JSON"),
    "large": (lambda f: (f / guard.CONFIG).write_text(" " * 70_000), "adapter_config.json: 70,000 bytes"),
    "weightless": (lambda f: (f / guard.WEIGHTS).unlink(), "adapter_model.safetensors: missing"),
    "pickled": (lambda f: (f / guard.WEIGHTS).rename(f / "adapter_model.bin"), "adapter_model.bin: a pickle"),
    "short": (lambda f: os.truncate(f / guard.WEIGHTS, 200), "bytes are missing|ends inside"),
    "long": (lambda f: os.truncate(f / guard.WEIGHTS, 4000), "bytes too many"),
    "fifo": (lambda f: ((f / guard.WEIGHTS).unlink(), os.mkfifo(f / guard.WEIGHTS)), "not a regular file"),
    "fifo-config": (lambda f: ((f / guard.CONFIG).unlink(), os.mkfifo(f / guard.CONFIG)), "not a regular file"),
    "out": (lambda f: ((f / guard.WEIGHTS).unlink(), (f / guard.WEIGHTS).symlink_to("/etc/passwd")), "leads out"),
    "bad name": (lambda f: None, "adapter name 'bad name' is not allowed"),
    "base": (lambda f: None, "reserved"),
    "Tiny-Base": (lambda f: None, "reserved"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_folder_is_listed_with_its_reason_and_refused(root: Path, name: str) -> None:
    harm, fault = BROKEN[name]
    folder = files.write(root / name)
    harm(folder)
    aged(root, "good", seed=7)
    store = Store(root, reserved=["tiny-base"], settle_s=0)
    with pytest.raises(AdapterRefused, match=fault) as refused:
        store.resolve(name)
    assert refused.value.param == "adapter"
    assert refused.value.message.startswith(f"adapter '{name}': ")
    listed = reasons(store)
    assert listed["good"] is None
    assert listed[name] in refused.value.message  # type: ignore[operator]
    assert store.read(store.resolve("good")).header


def test_a_name_that_is_no_text_is_listed_printably(root: Path) -> None:
    files.write(root / os.fsdecode(b"bad\xff"))
    [entry] = Store(root, settle_s=0).entries()
    assert entry.name.encode()
    assert "not allowed" in (entry.reason or "")


def test_of_two_names_that_differ_by_case_the_first_one_stays(root: Path) -> None:
    store = opened(root, "abc")
    before = store.resolve("abc")
    aged(root, "ABC")
    with pytest.raises(AdapterRefused, match="differs from abc by case only"):
        store.resolve("ABC")
    assert store.resolve("abc") == before
    shutil.rmtree(root / "abc")
    store.refresh()
    assert soon(lambda: store.resolve("ABC")).name == "ABC"


def test_a_transient_failure_is_not_remembered(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(root, "a")

    def full(path: str, flags: int) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        with pytest.raises(AdapterRefused, match="Too many open files"):
            store.resolve("a")
    spec = store.resolve("a")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        with pytest.raises(AdapterRefused, match="Too many open files"):
            store.read(spec)
    assert store.read(spec).header


def test_a_linked_folder_inside_the_root_is_an_alias(root: Path) -> None:
    aged(root, "a")
    (root / "alias").symlink_to(root / "a")
    (root / "loop").symlink_to(root / "loop")
    store = Store(root, settle_s=SETTLE_S)
    assert store.resolve("alias").version == store.resolve("a").version
    assert "Too many levels" in (reasons(store)["loop"] or "")


# Changes


def test_a_new_folder_is_served_once_it_has_settled(root: Path) -> None:
    store = opened(root, "a")
    aged(root, "new")  # preserved times, as cp -p leaves them
    with pytest.raises(AdapterRefused, match="being written, retry"):
        store.resolve("new")
    assert reasons(store)["new"] == "its folder is being written, retry in a moment"
    time.sleep(SETTLE_S)
    assert store.resolve("new").name == "new"


def test_files_just_written_have_not_settled_even_at_the_start(root: Path) -> None:
    files.write(root / "a")
    store = Store(root, settle_s=0.3)
    with pytest.raises(AdapterRefused, match="being written"):
        store.resolve("a")
    assert soon(lambda: store.resolve("a"))


def test_a_time_in_the_future_does_not_hold_a_folder_back(root: Path) -> None:
    files.age(files.write(root / "a"), seconds=-3600)
    assert Store(root).resolve("a")


def test_a_copy_under_way_is_never_served(root: Path) -> None:
    store = opened(root, "a")
    whole = files.safetensors(files.tensors(3))
    files.write(root / "new", weights=b"")
    for end in range(0, len(whole), len(whole) // 12):
        (root / "new" / guard.WEIGHTS).write_bytes(whole[:end])
        files.age(root / "new")
        with pytest.raises(AdapterRefused):
            store.resolve("new")
        time.sleep(SETTLE_S / 3)
    time.sleep(SETTLE_S)
    with pytest.raises(AdapterRefused, match="copy it again"):
        store.resolve("new")
    (root / "new" / guard.WEIGHTS).write_bytes(whole)
    assert store.read(soon(lambda: store.resolve("new"))).data == whole


def test_a_replaced_folder_leaves_no_gap(root: Path) -> None:
    store = opened(root, "a")
    before = store.resolve("a")
    files.write(root / "a", seed=5)
    assert store.resolve("a") == before
    assert store.entries() == [Entry("a", before)]
    time.sleep(SETTLE_S * 1.5)
    after = store.resolve("a")
    assert after.version != before.version
    assert store.read(after).data == (root / "a" / guard.WEIGHTS).read_bytes()
    with pytest.raises(AdapterNotFound):
        store.resolve(f"a@{before.version}")


def test_a_replaced_version_that_cannot_be_read_is_answered_no_more(root: Path) -> None:
    store = opened(root, "a")
    before = store.resolve("a")
    files.write(root / "a", seed=5)
    assert store.resolve("a") == before
    with pytest.raises(VersionGone):
        store.read(before)
    with pytest.raises(AdapterRefused, match="being written"):
        store.resolve("a")


def test_a_stalled_copy_keeps_the_version_before_for_a_while(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(root, "a")
    before = store.resolve("a")
    os.truncate(root / "a" / guard.WEIGHTS, 100)
    assert store.resolve("a") == before
    time.sleep(SETTLE_S * 1.5)
    assert store.resolve("a") == before
    monkeypatch.setattr("adapter_server.registry.store.STALLED", 1)
    with pytest.raises(AdapterRefused, match="ends inside its header"):
        store.resolve("a")


def test_an_unsound_replacement_is_refused_once_settled(root: Path) -> None:
    store = opened(root, "a")
    before = store.resolve("a")
    (root / "a" / guard.CONFIG).write_text("{}")
    assert store.resolve("a") == before
    time.sleep(SETTLE_S * 1.5)
    with pytest.raises(AdapterRefused, match="peft_type"):
        store.resolve("a")


def test_a_folder_swapped_by_renames_becomes_the_new_version(root: Path, tmp_path: Path) -> None:
    store = opened(root, "a")
    before = store.resolve("a")
    aged(tmp_path, "next", seed=5)
    (root / "a").rename(tmp_path / "last")
    (tmp_path / "next").rename(root / "a")
    assert store.resolve("a") == before
    time.sleep(SETTLE_S * 1.5)
    after = store.resolve("a")
    assert (after.name, after.version == before.version) == ("a", False)


def test_a_removed_folder_is_not_found(root: Path) -> None:
    store = opened(root, "a", "b")
    store.resolve("a")
    shutil.rmtree(root / "a")
    with pytest.raises(AdapterNotFound):
        store.resolve("a")
    assert store.names() == ["b"]


def test_refresh_tells_each_change_once(root: Path) -> None:
    store = opened(root, "stays", "changes", "goes")
    assert not store.refresh()
    assert not store.restless
    aged(root, "comes")
    aged(root, "changes", seed=9)
    shutil.rmtree(root / "goes")
    assert store.refresh() == Changes(removed=("goes",))
    assert store.restless
    time.sleep(SETTLE_S)
    assert store.refresh() == Changes(added=("comes",), changed=("changes",))
    assert not store.restless
    assert not store.refresh()


def test_a_change_that_a_request_saw_first_is_still_told(root: Path) -> None:
    store = opened(root, "a", "b")
    aged(root, "new")
    shutil.rmtree(root / "b")
    soon(lambda: store.resolve("new"))
    with pytest.raises(AdapterNotFound):
        store.resolve("b")
    assert store.refresh() == Changes(added=("new",), removed=("b",))


def test_threads_see_whole_versions_while_a_folder_is_rewritten(root: Path) -> None:
    store = opened(root, "a", "b")
    faults: list[str] = []
    done = threading.Event()
    sound = {files.safetensors(files.tensors(seed)) for seed in range(8)}

    def ask(name: str) -> None:
        while not done.is_set():
            try:
                if bytes(store.read(store.resolve(name)).data) not in sound:
                    faults.append("mixture")
            except AdapterRefused as refused:
                if name == "b":
                    faults.append(refused.message)

    threads = [threading.Thread(target=ask, args=(name,)) for name in "aabb"]
    for thread in threads:
        thread.start()
    for seed in range(2, 8):
        files.write(root / "a", seed)
        store.refresh()
        time.sleep(SETTLE_S * 1.2)
    done.set()
    for thread in threads:
        thread.join()
    assert faults == []
    time.sleep(SETTLE_S)
    assert bytes(store.read(soon(lambda: store.resolve("a"))).data) == files.safetensors(files.tensors(7))


def test_the_peft_type_is_read_in_any_case(root: Path) -> None:
    files.age(files.write(root / "a", config={"peft_type": "lora"}))
    assert Store(root).resolve("a").family == "LORA"
    assert json.loads((root / "a" / guard.CONFIG).read_text())["peft_type"] == "lora"
