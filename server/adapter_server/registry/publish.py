"""Publishing, rolling back and deleting: a name goes from one whole version to another in one step, or stays.

    validate in memory → write aside, fsync → rename to its place → swap the link root/NAME, fsync → sweep up

A kill between any two calls leaves the old version or the new one, and rubbish that the next start, or the next change
of the same name, sweeps up. A call that fails leaves the old one. Who changes a name holds a lock on its shelf; a
second one is refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from adapter_server.config import ServerConfig
from adapter_server.core import Spec
from adapter_server.errors import AdapterNotFound, AdapterRefused, StorageFailed, VersionConflict
from adapter_server.registry import guard, versions
from adapter_server.registry.disk import Disk
from adapter_server.registry.store import Blob, Store
from adapter_server.registry.versions import Version

NEW, HAND, GONE, REFUSED = ".new", ".hand-", ".gone", ".refused-"
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EOPNOTSUPP)
KEEP = ServerConfig().keep_versions
CHUNK = 1 << 20
InUse = Callable[[str], Collection[str]]  # name → the versions that requests still need


class Publisher:
    """Changes what the adapters folder holds. Safe to use from several threads and processes."""

    def __init__(
        self, store: Store, in_use: InUse = lambda name: (), keep: int = KEEP, disk: Disk | None = None
    ) -> None:
        self.store, self.root = store, store.root
        self.in_use, self.keep = in_use, keep
        self.disk = disk or Disk()

    def publish(self, name: str, config: bytes, weights: IO[bytes], source: str = "") -> Spec:
        """A new version, current from now on. Raises AdapterRefused, VersionConflict, StorageFailed."""
        data = whole(weights, self.store.max_bytes)
        spec = self._checked(name, config, data)
        with self._alone(name) as shelf:
            kept = versions.listed(self.root, name)
            last = kept[-1].number if kept else 0
            number = last + 1 + self._by_hand(name)  # a folder to be replaced is the version before
            if not any(version.id == spec.version and versions.whole(self.root, name, version) for version in kept):
                version = _version(number, config, data, spec.config, source)
                self._write(shelf, version, config, data)
            self._point(name, shelf, spec.version, last + 1)
        return spec

    def rollback(self, name: str) -> Spec:
        """The version before the current one becomes current."""
        self._registered(name)
        with self._alone(name) as shelf:
            kept = versions.listed(self.root, name)
            current = versions.linked(self.root, name)
            newest = kept[-1].number if kept else 0
            number = next((v.number for v in kept if v.id == current), newest + self._by_hand(name))
            before = [version for version in kept if version.number < number]
            if not before:
                raise VersionConflict(f"adapter {name} has no version before this one: publish the one you want")
            self._point(name, shelf, before[-1].id, newest + 1)
        return self.store.resolve(f"{name}@{before[-1].id}")

    def delete(self, name: str) -> None:
        """The name and its versions go; the files of a version in use stay until the next sweep."""
        self._registered(name)
        with self._alone(name) as shelf:
            place, gone = self.root / name, shelf / GONE
            self.disk.rename(place, gone)
            self._sync_or(lambda: self.disk.rename(gone, place))

    def recover(self) -> None:
        """Sweeps up what a kill left behind; not what another is changing, nor what the disk refuses to part with."""
        home = self.root / versions.HOME
        for name in sorted(os.listdir(home)) if home.is_dir() else ():
            if guard.NAME.fullmatch(name) and self._untidy(name, home / name):
                with contextlib.suppress(VersionConflict, StorageFailed), self._alone(name):
                    pass

    # Checking

    def _checked(self, name: str, config: bytes, data: bytearray) -> Spec:
        """Everything that can be wrong with it, before a byte is written."""
        self.store.check_name(name)
        parsed = self.store.parse(config)
        header = guard.parse_header(data, max_bytes=self.store.max_bytes)
        guard.check_finite(data, header)
        id = versions.digest(config, data)[: versions.VERSION_DIGITS]
        path = str(versions.shelf(self.root, name) / id)
        spec = Spec(name, id, path, str(parsed["peft_type"]).upper(), parsed, len(data))
        self.store.judge(spec, Blob(data, header))
        return spec

    def _registered(self, name: str) -> None:
        if not guard.NAME.fullmatch(name) or not os.path.lexists(self.root / name):
            raise AdapterNotFound(f"there is no adapter {guard.show(name)}", param="name")

    def _by_hand(self, name: str) -> bool:
        """Whether the name stands for a folder copied by hand, which must have settled."""
        place = self.root / name
        if place.is_symlink() or not os.path.lexists(place):
            return False
        try:
            settled = self.store.settled(name)
        except AdapterNotFound:
            settled = False
        if not settled:
            raise VersionConflict(f"a folder named {name} is being written in the adapters folder: retry in a moment")
        return True

    # One at a time

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[Path]:
        """The name's shelf, locked. What the disk refuses becomes StorageFailed."""
        shelf = versions.shelf(self.root, name)
        try:
            for folder in (self.root, shelf.parent, shelf):
                self._made(folder)
            with _locked(shelf, name), self._swept(name, shelf):
                yield shelf
        except OSError as error:
            raise StorageFailed(
                f"the adapters folder refused a change ({error.strerror or error}): the version before stays; "
                "see to the disk and retry"
            ) from error

    def _made(self, folder: Path) -> None:
        with contextlib.suppress(FileExistsError):
            self.disk.mkdir(folder)
            self.disk.sync(folder.parent)

    @contextlib.contextmanager
    def _swept(self, name: str, shelf: Path) -> Iterator[None]:
        """Sweeps before and after, whether the change was made or not. What the disk refuses is left to the next."""
        self._tidy(name, shelf)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                self._tidy(name, shelf)
                self._prune(name, shelf)
            with contextlib.suppress(OSError):
                self.disk.rmdir(shelf)  # refused while there is a version on it

    # Changing

    def _write(self, shelf: Path, version: Version, config: bytes, data: bytearray) -> None:
        """The version's folder, whole from the moment that it has its name."""
        new = shelf / NEW
        self.disk.mkdir(new)
        self.disk.save(new / guard.CONFIG, config)
        self.disk.save(new / guard.WEIGHTS, data)
        self.disk.save(new / versions.MANIFEST, version.dump())
        self.disk.sync(new)
        self._shelve(new, shelf / version.id)
        self.disk.sync(shelf)

    def _shelve(self, folder: Path, place: Path) -> None:
        """A whole version gets its name. What has it is damaged, or deleted and still in use: it is swept up."""
        if place.exists():
            self._exchange(folder, place)
        else:
            self.disk.rename(folder, place)

    def _point(self, name: str, shelf: Path, id: str, number: int) -> None:
        """root/NAME becomes a link to this version. A folder in its place ends on the shelf, as version `number`."""
        place, link = self.root / name, shelf / f"{HAND}{number}"
        before = os.readlink(place) if place.is_symlink() else None
        self.disk.symlink(versions.target(name, id), link)
        if place.is_dir() and before is None:
            self._exchange(link, place)
            self._sync_or(lambda: self.disk.exchange(link, place))
        else:
            self.disk.rename(link, place)
            self._sync_or(lambda: self._restore(place, link, before))

    def _exchange(self, link: Path, place: Path) -> None:
        try:
            self.disk.exchange(link, place)
        except OSError as error:
            if error.errno not in NO_EXCHANGE:
                raise
            raise VersionConflict(
                f"{place.name} is a folder, and this file system cannot put a version in its place in one step: "
                "publish under another name, or remove the folder first"
            ) from error

    def _restore(self, place: Path, link: Path, before: str | None) -> None:
        if before is None:
            self.disk.unlink(place)
        else:
            self.disk.symlink(before, link)
            self.disk.rename(link, place)

    def _sync_or(self, undo: Callable[[], None]) -> None:
        try:
            self.disk.sync(self.root)
        except OSError:
            undo()
            raise

    # Sweeping up

    def _prune(self, name: str, shelf: Path) -> None:
        """The last `keep` versions stay, and the current one, and those in use."""
        current, used = versions.linked(self.root, name), self.in_use(name)
        for version in versions.listed(self.root, name)[: -self.keep]:
            if version.id != current and version.id not in used:
                self._discard(shelf / version.id, used=False)

    def _tidy(self, name: str, shelf: Path) -> None:
        """Leaves nothing but versions on the shelf; of a name that is gone, nothing but what is in use."""
        used, orphaned = self.in_use(name), self._orphaned(name)
        for path in sorted(shelf / entry for entry in os.listdir(shelf)):
            if path.name.startswith(HAND) and not path.is_symlink() and not orphaned:
                self._adopt(shelf, path)
            elif _rubbish(path) or orphaned:
                self._discard(path, path.name in used)

    def _discard(self, path: Path, used: bool) -> None:
        """Off the list first, then off the disk unless somebody still needs the files."""
        manifest = path / versions.MANIFEST
        if versions.ID.fullmatch(path.name) and manifest.exists():
            self.disk.unlink(manifest)
        if not used:
            self.disk.remove(path)

    def _adopt(self, shelf: Path, path: Path) -> None:
        """A folder copied by hand that was replaced becomes a version; an unsound one is left as it is."""
        number = path.name.removeprefix(HAND)
        try:
            config = guard.read_private(path / guard.CONFIG, self.root, guard.MAX_CONFIG_BYTES)
            data = guard.read_private(path / guard.WEIGHTS, self.root, self.store.max_bytes)
            guard.parse_header(data, max_bytes=self.store.max_bytes)
            version = _version(int(number), config, data, guard.parse_config(config), "copied by hand")
        except AdapterRefused:
            self.disk.rename(path, shelf / f"{REFUSED}{number}-{time.time_ns()}")
            return
        if versions.whole(self.root, shelf.name, version):
            self.disk.remove(path)
            return
        with contextlib.suppress(FileNotFoundError):
            self.disk.unlink(path / versions.MANIFEST)
        self.disk.save(path / versions.MANIFEST, version.dump())
        self.disk.sync(path)
        self._shelve(path, shelf / version.id)
        self.disk.sync(shelf)
        if path.exists():
            self.disk.remove(path)

    def _untidy(self, name: str, shelf: Path) -> bool:
        return shelf.is_dir() and (any(_rubbish(shelf / e) for e in os.listdir(shelf)) or self._orphaned(name))

    def _orphaned(self, name: str) -> bool:
        """Whether nothing in the adapters folder leads to this shelf any more."""
        if os.path.lexists(self.root / name):
            return False
        with os.scandir(self.root) as entries:
            links = [os.readlink(entry.path) for entry in entries if entry.is_symlink()]
        return not any(link.startswith(versions.target(name, "")) for link in links)


def whole(file: IO[bytes], most: int) -> bytearray:
    """All of a file, if it is not too large: one buffer of our own, which is checked, hashed and written."""
    data = bytearray()
    while piece := file.read(CHUNK):
        data += piece
        if len(data) > most:
            raise AdapterRefused(f"{guard.WEIGHTS}: more than {most:,} bytes, the limit: raise --max-adapter-bytes")
    return data


def _version(number: int, config: guard.Buffer, data: guard.Buffer, parsed: Mapping[str, Any], source: str) -> Version:
    """The manifest of a version that is made now."""
    return Version(
        number=number,
        digest=versions.digest(config, data),
        family=str(parsed["peft_type"]).upper(),
        base=_text(parsed.get("base_model_name_or_path")),
        peft_version=_text(parsed.get("peft_version")),
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        source=source,
        size=len(data),
        files={guard.CONFIG: hashlib.sha256(config).hexdigest(), guard.WEIGHTS: hashlib.sha256(data).hexdigest()},
    )


def _text(value: object) -> str | None:
    return value[:256] if isinstance(value, str) else None


def _rubbish(path: Path) -> bool:
    """What is neither a version nor an unsound folder that we do not throw away."""
    if path.name.startswith(REFUSED):
        return False
    return not (versions.ID.fullmatch(path.name) and (path / versions.MANIFEST).exists())


@contextlib.contextmanager
def _locked(shelf: Path, name: str) -> Iterator[None]:
    """Ours until the end. A shelf that was removed meanwhile is not the one that has the name."""
    fd = os.open(shelf, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(fd), os.stat(shelf))
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise VersionConflict(f"adapter {name} is being changed by another: look at what they did, then retry")
        yield
    finally:
        os.close(fd)
