"""Where published versions lie, and what their manifests say.

    root/NAME                      → .versions/NAME/ID: a relative link, the current version
    root/.versions/NAME/ID/        the two files and manifest.json, never changed once they are there
    root/.versions/NAME/.new       a version being written   .hand-N     a hand-copied folder, soon version N
                       .gone       a name being deleted      .refused-N  one that was unsound, left alone

ID is the first 12 digits of the content hash. A folder without a manifest is no version.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

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


def hasher(config: bytes | bytearray, weights: int) -> hashlib._Hash:
    """The hash of both files' lengths and contents, begun with all but the weights' own bytes."""
    digest = hashlib.sha256(len(config).to_bytes(8, "little") + config)
    digest.update(weights.to_bytes(8, "little"))
    return digest


def digest(config: bytes | bytearray, weights: bytes | bytearray) -> str:
    """The content hash of an adapter."""
    whole = hasher(config, len(weights))
    whole.update(weights)
    return whole.hexdigest()
