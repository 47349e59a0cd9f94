"""The folder where clients and workers find each other; only its user can open it."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

_LONGEST = 100
"""largest number of bytes of a socket's path; systems allow at most 103 to 107"""


class Place(NamedTuple):
    """The files of one worker."""

    folder: Path
    name: str

    @property
    def socket(self) -> Path:
        return self.folder / f"{self.name}.sock"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock for starting or ending this worker. The lock of a killed process is released."""
        # The file is never deleted: two processes could hold the lock if one of them waited for a deleted file.
        handle = os.open(self.folder / f"{self.name}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def clear(self) -> None:
        """Delete the socket and the log."""
        for file in (self.socket, self.log):
            with suppress(FileNotFoundError):
                file.unlink()


def place_of(name: str) -> Place | None:
    """Return the place of the worker with this name; None if no folder is private enough or its path is too long."""
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), os.environ.get("TMPDIR"), "/tmp"):
        if not parent:
            continue
        folder = Path(parent) / f"kvt-{os.getuid()}"
        if len(os.fsencode(folder / f"{name}.sock")) <= _LONGEST and _is_private(folder):
            return Place(folder, name)
    return None


def _is_private(folder: Path) -> bool:
    """Return whether the folder (created if needed) belongs to this user and nobody else can open it."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()  # a symbolic link of another user is not accepted
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o077
