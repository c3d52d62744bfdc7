"""Prints the newest Python 3.12 or later that runs and can make a virtual environment.

Looks on PATH and among pyenv's versions; a shim that only prints an error does not count. Exits
with 1, printing nothing, if there is none.
"""

import glob
import os
import shutil
import subprocess
import sys

PROBE = "import sys, venv, ensurepip; print(*sys.version_info[:3], sys.executable)"


def candidates():
    """Paths worth trying."""
    for minor in (13, 12):
        found = shutil.which(f"python3.{minor}")
        if found:
            yield found
    yield from glob.glob(os.path.expanduser("~/.pyenv/versions/3.*/bin/python3"))


def probe(path):
    """((major, minor, micro), executable), or None if it does not run."""
    try:
        done = subprocess.run([path, "-c", PROBE], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    major, minor, micro, executable = done.stdout.strip().split(" ", 3)
    return (int(major), int(minor), int(micro)), executable


if __name__ == "__main__":
    # 3.14 and later are left out: the pinned versions have no wheels for them.
    usable = [
        found for found in map(probe, candidates()) if found and (3, 12) <= found[0] < (3, 14)
    ]
    if not usable:
        sys.exit(1)
    print(max(usable)[1])
