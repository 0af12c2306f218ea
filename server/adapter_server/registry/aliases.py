"""Other names that adapters are asked for by, each for one adapter or shared out among several.

    root/.aliases.json   {"prod-sql": [["sql@v7", 90.0], ["sql@v8", 10.0]]}

The file is replaced whole, by rename: a kill leaves the aliases before or those after.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

from adapter_server.errors import AdapterRefused, InvalidRequest, StorageFailed
from adapter_server.registry import guard
from adapter_server.registry.disk import Disk

FILE, NEW = ".aliases.json", ".aliases.new"
MAX_BYTES = 16 << 20
MOST = 10_000


@dataclass(frozen=True, slots=True)
class Target:
    """A name or `name@version`, and its share of the requests, in proportion to the other targets'."""

    adapter: str
    share: float = 1.0

    @property
    def name(self) -> str:
        return self.adapter.partition("@")[0]

    @property
    def version(self) -> str:
        return self.adapter.partition("@")[2]


Targets = tuple[Target, ...]


class Aliases:
    """What is in the file. One change at a time; who reads meanwhile sees all of a change or nothing."""

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        self._root, self._disk = root, disk or Disk()
        self._known: Mapping[str, Targets] = self._read()

    def all(self) -> Mapping[str, Targets]:
        return self._known

    def get(self, name: str) -> Targets:
        """Nothing for a name that is no alias."""
        return self._known.get(name, ())

    def put(self, name: str, targets: Targets) -> None:
        """From now on requests for the alias go there. Raises StorageFailed, and then they go where they went."""
        if name not in self._known and len(self._known) >= MOST:
            raise InvalidRequest(f"there are {MOST:,} aliases, the limit: delete one first", param="name")
        self._save({**self._known, name: targets})

    def drop(self, name: str) -> Targets:
        """Where it led; nothing if it was no alias."""
        if dropped := self.get(name):
            self._save({known: targets for known, targets in self._known.items() if known != name})
        return dropped

    def pins(self, name: str) -> set[str]:
        """The versions of an adapter that aliases ask for, as they word them."""
        targets = (target for targets in self._known.values() for target in targets)
        return {target.version for target in targets if target.name == name and target.version}

    def _read(self) -> dict[str, Targets]:
        if not (self._root / FILE).exists():
            return {}
        try:
            content = json.loads(bytes(guard.read_private(self._root / FILE, self._root, MAX_BYTES)))
            return {_alias(name): tuple(_target(*each) for each in targets) for name, targets in content.items()}
        except (AdapterRefused, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidRequest(f"{FILE} in the adapters folder cannot be read: mend or remove it ({error})") from None

    def _save(self, known: Mapping[str, Targets]) -> None:
        new, file = self._root / NEW, self._root / FILE
        content = {name: [astuple(target) for target in targets] for name, targets in sorted(known.items())}
        try:
            with contextlib.suppress(FileNotFoundError):
                self._disk.unlink(new)
            self._disk.save(new, json.dumps(content, indent=1).encode())
            self._disk.rename(new, file)
            self._known = known
            self._disk.sync(self._root)
        except OSError as error:
            fault = error.strerror or error
            raise StorageFailed(
                f"the adapters folder refused a change of aliases ({fault}): look, then retry"
            ) from error


def pick(targets: Targets, token: str) -> Target:
    """The target for a request: always the same for the same token, and by shares over many tokens."""
    digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64 * sum(target.share for target in targets)
    for target in targets:
        point -= target.share
        if point < 0:
            return target
    return targets[-1]


def _alias(name: str) -> str:
    if not guard.NAME.fullmatch(name):
        raise ValueError(f"{guard.show(name)} is no name")
    return name


def _target(adapter: object, share: object) -> Target:
    if not isinstance(adapter, str) or not guard.NAME.fullmatch(adapter.partition("@")[0]):
        raise ValueError("a target is no adapter's name")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < math.inf:
        raise ValueError("a share is no number above 0")
    return Target(adapter, float(share))
