"""Where published versions lie, and what their manifests say.

    root/NAME                      → .versions/NAME/ID: a relative link, the current version
    root/.versions/NAME/ID/        the two files and manifest.json, never changed once they are there
    root/.versions/NAME/.new       a version being written   .hand-N     a hand-copied folder, soon version N
                       .gone       a name being deleted      .refused-N  one that was unsound, left alone

ID is the first 12 digits of the content hash. A folder without a manifest is no version. The hash is SHA-256 in two
stages, so that a large file is hashed by several threads at once, while it is read:

    SHA-256( len(config) ‖ config ‖ len(weights) ‖ SHA-256(piece 0) ‖ SHA-256(piece 1) ‖ … )   pieces of 4 MiB

The lengths say where everything begins, so two adapters of one hash would be two texts of one SHA-256. To trust a file
that has the inode and times of a verified one would be quicker, and wrong: who may write it can set its times back.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from adapter_server.errors import AdapterRefused
from adapter_server.registry import guard

HOME = ".versions"
MANIFEST = "manifest.json"
VERSION_DIGITS = 12
ID = re.compile(rf"[0-9a-f]{{{VERSION_DIGITS}}}")
DIGITS = re.compile(rf"[0-9a-f]{{{VERSION_DIGITS},64}}")
KINDS = {
    **dict.fromkeys(("number", "size"), int),
    **dict.fromkeys(("digest", "family", "time", "source"), str),
    **dict.fromkeys(("base", "peft_version"), str | None),
    "files": dict,
}
NUMBER = re.compile(r"v[1-9][0-9]{0,8}")
HASHERS = max(1, min(8, (os.cpu_count() or 1) // 2))  # threads: the other processors compute


@dataclass(frozen=True, slots=True)
class Version:
    """A manifest: what was published, from what, when."""

    number: int  # counts up within a name, from 1
    digest: str
    family: str
    base: str | None  # as the config names it
    peft_version: str | None
    time: str  # UTC, ISO 8601
    source: str
    size: int  # bytes of the weights
    files: Mapping[str, str]  # sha256 of each

    @property
    def id(self) -> str:
        return self.digest[:VERSION_DIGITS]

    def dump(self) -> bytes:
        return json.dumps(asdict(self), indent=2).encode()


def shelf(root: Path, name: str) -> Path:
    """The folder of all of a name's versions."""
    return root / HOME / name


def target(name: str, id: str) -> str:
    """What the link root/NAME says."""
    return f"{HOME}/{name}/{id}"


def linked(root: Path | str, name: str) -> str:
    """The version that root/NAME is a link to; '' where it is no such link."""
    try:
        text = os.readlink(f"{root}/{name}")
    except (OSError, ValueError):  # no link, or no name that a file could have
        return ""
    id = text.removeprefix(target(name, ""))
    return id if ID.fullmatch(id) and text == target(name, id) else ""


def listed(root: Path, name: str) -> list[Version]:
    """A name's versions, oldest first."""
    try:
        ids = [id for id in os.listdir(shelf(root, name)) if ID.fullmatch(id)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(filter(None, (manifest(root, name, id) for id in ids)), key=lambda version: version.number)


def manifest(root: Path, name: str, id: str) -> Version | None:
    """None: there is no such version."""
    try:
        data = guard.read_private(shelf(root, name) / id / MANIFEST, root, guard.MAX_CONFIG_BYTES)
        version = Version(**json.loads(bytes(data)))
    except (AdapterRefused, ValueError, TypeError, RecursionError):
        return None
    sound = all(isinstance(getattr(version, field), kind) for field, kind in KINDS.items())
    return version if sound and version.id == id else None


def whole(root: Path, name: str, version: Version) -> bool:
    """Whether this version is on the shelf, with its manifest, and its files are those that were published."""
    folder = shelf(root, name) / version.id
    if manifest(root, name, version.id) is None:
        return False
    try:
        config = guard.read_private(folder / guard.CONFIG, root, guard.MAX_CONFIG_BYTES)
        return digest(config, guard.read_private(folder / guard.WEIGHTS, root, version.size)) == version.digest
    except AdapterRefused:
        return False


def find(root: Path, name: str, word: str) -> Version | None:
    """The version that a reference means by `v3`, or by 12 or more digits of its hash."""
    if NUMBER.fullmatch(word):
        return next((v for v in listed(root, name) if v.number == int(word[1:])), None)
    if not DIGITS.fullmatch(word):
        return None
    found = manifest(root, name, word[:VERSION_DIGITS])
    return found if found and found.digest.startswith(word) else None


class Hasher:
    """The content hash of an adapter, on threads of its own beside whoever reads or compiles the bytes; of less than a
    piece by who asks for it, since to start a thread takes as long.
    """

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._pieces: list[Callable[[], bytes]] = []
        self._size = 0

    def __enter__(self) -> Hasher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def add(self, data: guard.Buffer) -> None:
        """The weights' next bytes, whole pieces of them but at the end. They must not change before `hexdigest`."""
        view = memoryview(data)
        self._pieces += [self._begun(view[at : at + guard.PIECE]) for at in range(0, len(view), guard.PIECE)]
        self._size += len(view)

    def _begun(self, piece: memoryview) -> Callable[[], bytes]:
        """Gives the piece's hash."""
        if self._threads is None and len(piece) < guard.PIECE:
            return functools.cache(functools.partial(_sha256, piece))
        self._threads = self._threads or ThreadPoolExecutor(HASHERS, "adapter-hasher")
        return self._threads.submit(_sha256, piece).result

    def wait(self) -> None:
        """Until what was added is hashed, and may change."""
        for piece in self._pieces:
            piece()

    def hexdigest(self, config: guard.Buffer) -> str:
        """Of this config and the weights that were added. Waits for them."""
        whole = hashlib.sha256(len(config).to_bytes(8, "little") + bytes(config) + self._size.to_bytes(8, "little"))
        for piece in self._pieces:
            whole.update(piece())
        return whole.hexdigest()


def digest(config: guard.Buffer, weights: guard.Buffer) -> str:
    """The content hash of an adapter."""
    with Hasher() as hasher:
        hasher.add(weights)
        return hasher.hexdigest(config)


def _sha256(piece: memoryview) -> bytes:
    return hashlib.sha256(piece).digest()
