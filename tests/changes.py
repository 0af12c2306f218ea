"""Every change that publishing makes, on disks that fail or kill at a chosen call. Run as a script, it is what dies.

python changes.py FOLDER    →   FOLDER/<change>/<k>: what is left where the k-th call killed; one JSON line of them
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import files
from adapter_server.registry.disk import Disk
from adapter_server.registry.publish import Publisher
from adapter_server.registry.store import Store

CONFIG = json.dumps(files.CONFIG).encode()
DAMAGED = -1
CALLS = ("create", "write", "fsync", "mkdir", "symlink", "rename", "exchange", "unlink", "rmdir")


def weights(seed: int) -> bytes:
    return files.safetensors(files.tensors(seed))


class Watched(Disk):
    """Counts the calls, and comes between before the k-th. Flushes nothing: no power is cut here."""

    def __init__(self, k: int = 0) -> None:
        self.k, self.names = k, list[str]()

    def between(self, name: str, *args: Any) -> int | None:
        """Called before the k-th call; what it returns, if anything, is that call's answer."""
        return None

    def _call(self, name: str, *args: Any) -> Any:
        self.names.append(name)
        if len(self.names) == self.k and (answer := self.between(name, *args)) is not None:
            return answer
        return None if name == "fsync" else getattr(Disk, name)(self, *args)


for _name in CALLS:
    setattr(Watched, _name, lambda self, *args, _name=_name: self._call(_name, *args))


class Failing(Watched):
    """The k-th call fails; with `stays`, so do all after it. `short`: a write takes half, and only then it fails."""

    def __init__(self, k: int, number: int, stays: bool = False, short: bool = False) -> None:
        super().__init__(k)
        self.number, self.stays, self.short = number, stays, short

    def between(self, name: str, *args: Any) -> int | None:
        if name == "write" and self.short:
            self.short, self.k = False, self.k + 1
            return Disk.write(self, args[0], args[1][: len(args[1]) // 2])
        self.k += self.stays
        raise OSError(self.number, os.strerror(self.number))


class Killing(Watched):
    """The k-th call never returns: `kill -9`, in the middle of a write."""

    def between(self, name: str, *args: Any) -> int | None:
        if name == "write":
            Disk.write(self, args[0], args[1][: len(args[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
        return None


def publisher(root: Path, disk: Disk | None = None, keep: int = 2) -> Publisher:
    return Publisher(Store(root, settle_s=0), keep=keep, disk=disk or Watched())


def _publish(seed: int) -> Callable[[Publisher], object]:
    return lambda p: p.publish("a", CONFIG, io.BytesIO(weights(seed)), "test")


def _published(*seeds: int) -> Callable[[Path], None]:
    def prepare(root: Path) -> None:
        for seed in seeds:
            _publish(seed)(publisher(root))

    return prepare


def _by_hand(root: Path) -> None:
    files.write(root / "a", 1)


def _over(root: Path) -> None:
    """A folder copied over what was published."""
    _published(5, 6)(root)
    (root / "a").unlink()
    _by_hand(root)


def damage(root: Path) -> None:
    """A byte of the current version's weights is another."""
    path = root / "a" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _damaged(root: Path) -> None:
    _published(1, 2)(root)
    damage(root)


# name: what is there, the change, what is served before and after (seeds; None: nothing; DAMAGED: refused)
CHANGES: dict[str, tuple[Callable[[Path], object], Callable[[Publisher], object], int | None, int | None]] = {
    "first": (lambda root: None, _publish(2), None, 2),
    "next": (_published(1), _publish(2), 1, 2),
    "prunes": (_published(3, 4, 1), _publish(2), 1, 2),
    "over-hand": (_by_hand, _publish(2), 1, 2),
    "again": (_published(2, 1), _publish(2), 1, 2),
    "heals": (_damaged, _publish(2), DAMAGED, 2),
    "heals-back": (_damaged, lambda p: p.rollback("a"), DAMAGED, 1),
    "rollback": (_published(2, 1), lambda p: p.rollback("a"), 1, 2),
    "rollback-hand": (_over, lambda p: p.rollback("a"), 1, 6),
    "delete": (_published(2, 1), lambda p: p.delete("a"), 1, None),
    "delete-hand": (_by_hand, lambda p: p.delete("a"), 1, None),
}


def prepared(folder: Path, change: str) -> Path:
    folder.mkdir(parents=True)
    CHANGES[change][0](folder)
    return folder


def copy(start: Path, folder: Path) -> Path:
    return Path(shutil.copytree(start, folder, symlinks=True))


def calls(start: Path, folder: Path, change: str) -> list[str]:
    """The calls that a change makes."""
    disk = Watched()
    CHANGES[change][1](publisher(copy(start, folder), disk))
    return disk.names


def killed(start: Path, folder: Path, change: str, k: int) -> None:
    """A child that dies at the k-th call."""
    copy(start, folder)
    child = os.fork()
    if not child:
        CHANGES[change][1](publisher(folder, Killing(k)))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        raise RuntimeError(f"{change} came to an end before call {k}")


def main(folder: Path) -> None:
    for change in CHANGES:
        start = prepared(folder / change / "start", change)
        names = calls(start, folder / change / "whole", change)
        for k in range(1, len(names) + 1):
            killed(start, folder / change / str(k), change, k)
        print(json.dumps({change: names}))


ERRORS = (errno.ENOSPC, errno.EIO)

if __name__ == "__main__":
    main(Path(sys.argv[1]))
