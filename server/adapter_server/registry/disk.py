"""The file system as publishing sees it: every call that writes goes through here, so that a test can fail any of them.

`Disk`'s first methods are one system call each; `save`, `sync` and `remove` are made of them.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
AT_FDCWD = -100


class Disk:
    """The system's own calls. All of them raise OSError."""

    def create(self, path: Path) -> int:
        """A new file, open for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, fd: int, data: memoryview) -> int:
        """How many bytes were taken: fewer than given, now and then."""
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def symlink(self, text: str, path: Path) -> None:
        os.symlink(text, path)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def exchange(self, one: Path, other: Path) -> None:
        """Two existing names swap what they stand for, in one step."""
        call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if call is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), EXCHANGE):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def save(self, path: Path, data: bytes | bytearray) -> None:
        """A new file that holds all of this, and would after a power cut."""
        fd = self.create(path)
        try:
            left = memoryview(data)
            while left:
                taken = self.write(fd, left)
                if not taken:
                    raise OSError(errno.EIO, "nothing was written")
                left = left[taken:]
            self.fsync(fd)
        finally:
            os.close(fd)

    def sync(self, folder: Path) -> None:
        """The folder's names are as they are now, after a power cut too."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.fsync(fd)
        finally:
            os.close(fd)

    def remove(self, path: Path) -> None:
        """A file, a link (never what it leads to), or a folder with all that is in it."""
        if path.is_symlink() or not path.is_dir():
            self.unlink(path)
            return
        for name in os.listdir(path):
            self.remove(path / name)
        self.rmdir(path)
