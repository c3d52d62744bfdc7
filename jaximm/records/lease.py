"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
from collections.abc import Generator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: folders are not held there
    fcntl = None

LOCK = ".lock"
"""The file of a folder that is locked while a process works in it. It stays behind, empty."""


@contextlib.contextmanager
def held(folder: Path) -> Generator[None]:
    """Makes a folder where it is absent, and holds it: for this process, until the block ends.

    The system lets go of it when the process ends, however it does. Where the file system has no
    locks, nobody is kept out.

    Raises:
      ValueError: another process holds it; says which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        if not _lock(file.fileno()):
            file.seek(0)
            who = file.read().strip() or "another process"
            raise ValueError(
                f"{folder} is in use by {who}; wait until it has ended, or give another --out."
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} ({_command()})")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _lock(handle: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        return True
    return True


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
