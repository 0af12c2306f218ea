"""The adapters folder: one sub-folder per adapter, found, named, versioned and read.

    root/my-adapter/adapter_config.json + adapter_model.safetensors   →   Spec my-adapter@1f2e3d4c5b6a

A folder is believed once it has settled: both files untouched for `settle_s`, and seen the same on two looks that far
apart, so that a copy under way is never served, whatever times it preserves. Until a replaced folder has settled,
requests get the version before, which the engine may still hold. A version is hashed when first asked for. A published
version (`versions.py`) is whole from the first moment: it needs no time to settle.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import heapq
import io
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from adapter_server.core import Spec
from adapter_server.errors import AdapterNotFound, AdapterRefused, AdapterUnavailable, VersionGone
from adapter_server.registry import guard, versions
from adapter_server.registry.versions import VERSION_DIGITS, Hasher, Version

STALLED = 20  # an incomplete folder is a stalled copy for this many `settle_s`, then it is broken
WRITING = "its folder is being written, retry in a moment"
CHUNK = versions.HASHERS * guard.PIECE  # bytes, as many as are hashed at once
COMPARED = 256  # names that an unknown one is compared with: each costs time


class _File(NamedTuple):
    """What `stat` says of a file, enough to notice that it is another. `error` is set when it says nothing."""

    size: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    inode: int = 0
    error: int = 0


class _Signature(NamedTuple):
    """An adapter's two files, and the published version that they are; '' for a folder copied by hand."""

    config: _File = _File()
    weights: _File | None = None
    version: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the list: a spec, or the reason why there is none. A version not yet hashed is ''."""

    name: str
    spec: Spec | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """What a scan found since the scan before, by adapter name. `error`: the scan failed, and why."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    error: str | None = None

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed or self.error)


@dataclass(frozen=True, slots=True)
class Blob:
    """An adapter's weights, checked, in a buffer of our own; the header's spans index `data`."""

    data: guard.Buffer
    header: guard.Header


@dataclass(frozen=True, slots=True)
class Held:
    """An adapter's two files, open: they can be read although the folder be deleted or replaced."""

    config: io.FileIO
    weights: io.FileIO

    def close(self) -> None:
        self.config.close()
        self.weights.close()


Judge = Callable[[Spec, Blob], None]  # refuses what does not fit the base; set by whoever has one


class Fault(NamedTuple):
    """What a reader found of a version: why its files are refused, or None where they are gone."""

    name: str
    version: str
    reason: str | None


@dataclass(slots=True, eq=False)
class _State:
    """A folder as one signature showed it. Everything but the signature is found out when it is needed."""

    signature: _Signature
    first_look: float  # time.monotonic()
    preview: Mapping[str, Any] | None = None  # the config as the list read it
    config: Mapping[str, Any] | None = None  # the config that the digest is of
    reason: str | None = None  # why it is refused
    incomplete: bool = False  # refused for what a copy under way would explain
    digest: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True, eq=False)
class _Folder:
    """The newest state of a folder, and the one that requests are answered from."""

    state: _State = field(default_factory=lambda: _State(_Signature(), 0.0))
    served: _State | None = None


class Store:
    """The adapters below `root`. Safe to use from several threads."""

    def __init__(
        self, root: Path, reserved: Iterable[str] = (), settle_s: float = 0.5, max_bytes: int = guard.MAX_BYTES
    ) -> None:
        self.root = Path(root).absolute()
        self._path = str(self.root)
        self.settle_s = settle_s
        self.max_bytes = max_bytes
        self.judge: Judge = lambda spec, blob: None
        self.on_fault: Callable[[Fault], None] = self.take  # where a reader tells what it found
        self.base = guard.Base()  # what adapters should name as theirs; set by whoever has one
        self.strict_base = False  # whether one that names another is refused, or served with a warning
        self._reserved = tuple(reserved)
        self._scanning = threading.Lock()  # the disk is looked through outside _lock: requests wait for no scan
        self._lock = threading.Lock()
        self._folders: dict[str, _Folder] = {}
        self._owners: dict[str, str] = {}  # case-folded name: the one folder that may bear it
        self._scan(first_look=-math.inf)
        self._reported = {name: folder.state.signature for name, folder in self._folders.items()}

    # The list

    def entries(self) -> list[Entry]:
        """Every adapter, sound or broken, by name. Reads configs that are new; hashes nothing."""
        self._scan()
        with self._lock:
            folders = sorted(self._folders.items())
        return [self._entry(name, folder) for name, folder in folders]

    def names(self) -> list[str]:
        """The adapters that nothing is known against."""
        return [entry.name for entry in self.entries() if entry.spec]

    def refresh(self) -> Changes:
        """One scan: what appeared, changed or went since the scan before. New and changed ones count once settled."""
        self._scan()
        with self._lock:
            old = {n: s for n, s in self._reported.items() if n in self._folders}
            now = {n: f.state.signature for n, f in self._folders.items() if self._settled(f.state)}
            removed = sorted(self._reported.keys() - old.keys())
            self._reported = old | now
        changed = sorted(n for n in now.keys() & old.keys() if now[n] != old[n])
        return Changes(tuple(sorted(now.keys() - old.keys())), tuple(changed), tuple(removed))

    @property
    def restless(self) -> bool:
        """Whether a folder has still to settle, so that another scan is due soon."""
        with self._lock:
            return any(self._reported.get(n) != f.state.signature for n, f in self._folders.items())

    # One adapter

    def resolve(self, ref: str) -> Spec:
        """The spec of `name` or `name@version`, version being `v` and a number, or 12 or more digits of the hash."""
        name, at, version = ref.partition("@")
        version = version.lower()
        if at and (published := self._published(name, version)):
            return published
        state = self._answer(name)
        if at and not (versions.DIGITS.fullmatch(version) and state.digest.startswith(version)):
            raise AdapterNotFound(
                f"adapter {name} has no version {guard.show(version)}: it is at {state.digest[:VERSION_DIGITS]}",
                param="adapter",
            )
        return self._spec(name, state)

    def _published(self, name: str, word: str) -> Spec | None:
        """A published version of a name that is registered, the current one or one before."""
        self._find(name)
        version = None if self._name_fault(name) else versions.find(self.root, name, word)
        if version is None:
            return None
        folder = self._folder(name, version.id)
        try:
            config = self.parse(guard.read_private(folder / guard.CONFIG, self.root, guard.MAX_CONFIG_BYTES))
        except AdapterRefused as refused:
            raise _refusal(name, refused.message) from refused
        return Spec(name, version.id, str(folder), version.family, config, version.size)

    def has(self, name: str) -> bool:
        """Whether there is a folder of this name, sound or not."""
        return bool(guard.NAME.fullmatch(name)) and os.path.lexists(self.root / name)

    def versions(self, name: str) -> list[Version]:
        """What was published under this name and is still there, oldest first."""
        return versions.listed(self.root, name) if guard.NAME.fullmatch(name) else []

    def settled(self, name: str) -> bool:
        """Whether a folder copied by hand has stopped changing."""
        return self._settled(self._find(name).state)

    def parse(self, config: guard.Buffer) -> dict[str, Any]:
        """A config, by the rules that hold here. Raises AdapterRefused."""
        parsed = guard.parse_config(config)
        if self.strict_base:
            guard.check_base(parsed, self.base)
        return parsed

    def warning(self, spec: Spec) -> str | None:
        """What is odd about an adapter that is served all the same."""
        try:
            guard.check_base(spec.config, self.base)
        except AdapterRefused as refused:
            return refused.message
        return None

    def check_name(self, name: str) -> None:
        """Raises AdapterRefused where this name cannot be served."""
        self._look(name)
        if fault := self._name_fault(name):
            raise AdapterRefused(fault, param="name")

    def hold(self, spec: Spec) -> Held | None:
        """Opens a version's files for a later `read`. None where they cannot be opened: `read` says why."""
        try:
            return self._opened(spec)
        except AdapterRefused:
            return None

    def read(self, spec: Spec, held: Held | None = None) -> Blob:
        """The bytes of exactly this version, checked. Raises VersionGone when the files are no longer these."""
        with self.reading(spec, held) as blob:
            return blob

    @contextlib.contextmanager
    def reading(self, spec: Spec, held: Held | None = None) -> Iterator[Blob]:
        """The same for who compiles them, while they are still being hashed: what is made of them here counts for
        nothing before this ends. Where the hash is wrong that is what it raises, whatever else went wrong before.
        """
        with Hasher() as hasher:
            config, weights = self._both(spec, held, hasher)
            prove = functools.partial(self._prove, spec, hasher, config)
            blob = self._checked(spec, weights, prove)
            try:
                yield blob
            finally:
                prove()

    def _both(self, spec: Spec, held: Held | None, hasher: Hasher) -> tuple[memoryview, memoryview]:
        """Config and weights, each in one buffer of our own, which is what is hashed and what is compiled."""
        try:
            with contextlib.ExitStack() as opened:
                files = held or opened.enter_context(contextlib.closing(self._opened(spec)))
                config = guard.read_open(files.config, guard.CONFIG, guard.MAX_CONFIG_BYTES)
                return config, guard.read_open(files.weights, guard.WEIGHTS, self.max_bytes, hasher.add)
        except guard.Unreadable as refused:
            raise _refusal(spec.name, refused.message) from refused
        except AdapterRefused as refused:
            raise self._lost(spec) from refused

    def _opened(self, spec: Spec) -> Held:
        """Raises AdapterRefused: why they cannot be opened."""
        folder = Path(spec.path)
        config = guard.open_regular(folder / guard.CONFIG, self.root)
        try:
            return Held(config, guard.open_regular(folder / guard.WEIGHTS, self.root))
        except AdapterRefused:
            config.close()
            raise

    def _prove(self, spec: Spec, hasher: Hasher, config: memoryview) -> None:
        if hasher.hexdigest(config)[:VERSION_DIGITS] != spec.version:
            raise self._lost(spec)

    def _lost(self, spec: Spec) -> AdapterRefused:
        """Files that are no longer a version's: replaced or removed, which is no fault, or damaged where they lie."""
        if versions.manifest(self.root, spec.name, spec.version):
            return _refusal(spec.name, _damaged(spec.version))
        return self._gone(spec)

    def _gone(self, spec: Spec) -> VersionGone:
        self.on_fault(Fault(*spec.key, None))
        message = f"adapter {spec.name}@{spec.version} is no longer on disk, it was replaced or removed: ask again"
        return VersionGone(message, param="adapter")

    def _checked(self, spec: Spec, weights: memoryview, prove: Callable[[], None]) -> Blob:
        """Raises AdapterRefused, once the bytes are proved to be the version's: then the fault is too."""
        try:
            header = guard.parse_header(weights, max_bytes=self.max_bytes)
            guard.check_finite(weights, header)
        except AdapterRefused as refused:
            prove()
            self.on_fault(Fault(*spec.key, refused.message))
            raise _refusal(spec.name, refused.message) from refused
        return Blob(weights, header)

    def take(self, fault: Fault) -> None:
        """The next request for these same files is refused without reading them again.

        Whoever reads a version does not hold it: one that is gone from the disk is answered no more.
        """
        with self._lock:
            folder = self._folders.get(fault.name)
            if folder is None:
                return
            state = folder.served if fault.reason is None else folder.state
            if state is None or not state.digest.startswith(fault.version):
                return
            if fault.reason is None:
                folder.served = None
            else:
                state.reason = fault.reason

    # Looking at the disk

    def _scan(self, first_look: float | None = None) -> None:
        """Takes in what is there now. `first_look` dates the look at folders that are new."""
        with self._scanning:
            seen = {name: signature for name in self._listed() if (signature := self._signature(name))}
            self._merge(seen, first_look)

    def _look(self, name: str) -> None:
        """Takes in the folders of this name in any case: no more of a scan than one name needs."""
        key = name.casefold()
        with self._scanning:
            alike = (n for n in self._listed() if n.casefold() == key)
            seen = {n: signature for n in alike if (signature := self._signature(n))}
            with self._lock:
                if self._owners.get(key, name) not in seen:
                    self._owners.pop(key, None)
                self._take_all(seen, None)

    def _merge(self, seen: Mapping[str, _Signature], first_look: float | None) -> None:
        with self._lock:
            self._folders = {name: folder for name, folder in self._folders.items() if name in seen}
            self._owners = {key: name for key, name in self._owners.items() if name in seen}
            self._take_all(seen, first_look)

    def _take_all(self, seen: Mapping[str, _Signature], first_look: float | None) -> None:
        """Those known longest first: of names that differ by case only the first one counts."""
        for name in sorted(seen, key=lambda n: (n not in self._folders, seen[n].config.ctime_ns, n)):
            self._take(name, seen[name], first_look)

    def _listed(self) -> list[str]:
        try:
            return [name for name in os.listdir(self.root) if not name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise AdapterUnavailable(f"the adapters folder cannot be listed ({error.strerror}): retry") from error

    def _folder(self, name: str, version: str) -> Path:
        """Where the files are: a published version's own folder, which the name's link may leave at any moment."""
        return versions.shelf(self.root, name) / version if version else self.root / name

    def _signature(self, name: str) -> _Signature | None:
        """None: no adapter's folder."""
        version = versions.linked(self._path, name)
        folder = f"{self._path}/{versions.target(name, version) if version else name}"  # a Path costs more than `stat`
        config = _stat(f"{folder}/{guard.CONFIG}")
        return _Signature(config, _stat(f"{folder}/{guard.WEIGHTS}"), version) if config else None

    def _take(self, name: str, signature: _Signature, first_look: float | None = None) -> _Folder:
        """Keeps a folder's state while its signature is the same, and starts a new one when it is not."""
        folder = self._folders.setdefault(name, _Folder())
        if folder.state.signature != signature:
            folder.state = _State(signature, time.monotonic() if first_look is None else first_look)
        if guard.NAME.fullmatch(name):
            self._owners.setdefault(name.casefold(), name)
        return folder

    def _settled(self, state: _State) -> bool:
        config, weights, version = state.signature
        if version:
            return True
        changed = max(file.mtime_ns for file in (config, weights) if file) / 1e9
        return not 0 <= time.time() - changed < self.settle_s and self._stood(state, 1)

    def _stood(self, state: _State, times: int) -> bool:
        """Whether the first look at this state was so many settle times ago."""
        return time.monotonic() - state.first_look >= times * self.settle_s

    # What a folder answers

    def _find(self, name: str) -> _Folder:
        """The folder as it is now, for two calls of `stat` when nothing changed."""
        if name not in self._folders and guard.NAME.fullmatch(name) and self._signature(name):
            self._look(name)
        with self._lock:
            if name in self._folders:
                signature = self._signature(name)
                if signature:
                    return self._take(name, signature)
                del self._folders[name]
        raise AdapterNotFound(self._unknown(name), param="adapter")

    def _unknown(self, name: str) -> str:
        alike = heapq.nsmallest(COMPARED, tuple(self._owners.values()), key=lambda n: abs(len(n) - len(name)))
        near = difflib.get_close_matches(name[:128], alike, n=3)
        hint = f"nearest: {', '.join(near)}" if near else "no name in the adapters folder comes near"
        return f"there is no adapter {guard.show(name)}; {hint}"

    def _answer(self, name: str) -> _State:
        """What requests get: the files on disk once settled; until then the version before, if there was one."""
        folder = self._find(name)
        state, before, reason = folder.state, folder.served, WRITING
        if fault := self._name_fault(name):
            raise _refusal(name, fault)
        if self._settled(state):
            reason = self._weigh(name, state) or WRITING
            if state.digest and not state.reason:
                folder.served = state
                return state
            if not state.incomplete or self._stood(state, STALLED):
                before = None
        if before and not before.reason:
            return before
        raise _refusal(name, reason)

    def _name_fault(self, name: str) -> str | None:
        try:
            guard.check_name(name, self._reserved)
        except AdapterRefused as refused:
            return refused.message
        owner = self._owners.get(name.casefold(), name)
        return None if owner == name else f"its name differs from {owner} by case only: rename one of them"

    def _weigh(self, name: str, state: _State) -> str | None:
        """Hashes a settled folder, once. Returns why it is refused, and remembers it if these files stay refused."""
        with state.lock:
            if not state.digest and not state.reason:
                return self._judge(state, lambda: self._hash(name, state))
            return state.reason

    def _judge(self, state: _State, check: Callable[[], object]) -> str | None:
        try:
            check()
        except guard.Unreadable as refused:
            return refused.message
        except AdapterRefused as refused:
            state.reason, state.incomplete = refused.message, isinstance(refused, guard.Incomplete)
        return state.reason

    def _hash(self, name: str, state: _State) -> None:
        """Sets the digest, unless the folder changed meanwhile: then the next look starts a new state."""
        raw, config = self._configured(name, state)
        with guard.open_regular(self._folder(name, state.signature.version) / guard.WEIGHTS, self.root) as file:
            digest = _stream(file, raw, self.max_bytes)
        version = state.signature.version
        if version and not digest.startswith(version):
            raise AdapterRefused(_damaged(version))
        if self._signature(name) == state.signature:
            state.config, state.digest = config, digest

    def _preview(self, name: str, state: _State) -> None:
        state.preview = self._configured(name, state)[1]

    def _configured(self, name: str, state: _State) -> tuple[memoryview, dict[str, Any]]:
        folder = self._folder(name, state.signature.version)
        guard.check_files(folder)
        raw = guard.read_private(folder / guard.CONFIG, self.root, guard.MAX_CONFIG_BYTES)
        return raw, self.parse(raw)

    def _entry(self, name: str, folder: _Folder) -> Entry:
        """A line of the list, from the config alone."""
        state, shown = folder.state, name.encode("utf-8", "backslashreplace").decode()
        reason = self._name_fault(name)
        if not reason and not self._settled(state):
            if folder.served and not folder.served.reason:
                return Entry(shown, self._spec(name, folder.served))
            reason = WRITING
        if not reason and not (state.config or state.preview or state.reason):
            reason = self._judge(state, lambda: self._preview(name, state))
        reason = reason or state.reason
        return Entry(shown, reason=reason) if reason else Entry(shown, self._spec(name, state))

    def _spec(self, name: str, state: _State) -> Spec:
        config = state.config or state.preview or {}
        family = str(config["peft_type"]).upper()
        _, weights, version = state.signature
        size = weights.size if weights else 0
        return Spec(name, state.digest[:VERSION_DIGITS], str(self._folder(name, version)), family, config, size)


def _stat(path: str) -> _File | None:
    """None: no such file."""
    try:
        s = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return _File(error=error.errno or -1)
    return _File(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino)


def _stream(file: io.FileIO, config: memoryview, max_bytes: int) -> str:
    """The content hash. The header is checked first, so that a file that is too short or too large costs little."""
    size = os.fstat(file.fileno()).st_size
    _check_header(file, size, max_bytes)
    file.seek(0)
    piece = guard.memory(min(CHUNK, size))
    with Hasher() as hasher:
        for at in range(0, size, CHUNK):
            part = piece[: size - at]
            guard.fill(file, part, guard.WEIGHTS)
            hasher.add(part)
            hasher.wait()
        return hasher.hexdigest(config)


def _check_header(file: io.FileIO, size: int, max_bytes: int) -> None:
    first = bytearray(min(8, size))
    guard.fill(file, memoryview(first), guard.WEIGHTS)
    head = first + bytearray(guard.header_bytes(first, size, max_bytes) - 8)
    guard.fill(file, memoryview(head)[8:], guard.WEIGHTS)
    guard.parse_header(head, size, max_bytes)


def _damaged(version: str) -> str:
    return (
        f"version {version} is damaged, its files are not those that were published: "
        "publish it again, or go back with adapters rollback"
    )


def _refusal(name: str, reason: str) -> AdapterRefused:
    return AdapterRefused(f"adapter {guard.show(name)}: {reason}", param="adapter")
