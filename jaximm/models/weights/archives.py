"""Zip archives from anywhere: what they unpack to is bounded before anything is unpacked."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO

from jaximm.models.weights.errors import Refusal, shown, unpacked_bound

_DIRECTORY = 16 << 20
"""Bytes of a directory: some 200,000 members, which take `zipfile` seconds."""


class Archive:
    """The members of a zip file, stored or deflated, each under one name; a context manager.

    Raises:
      Refusal: an encrypted member, another compression, two members of one name, or more bytes
        unpacked than `unpacked_bound` allows.
    """

    def __init__(self, path: Path):
        size = path.stat().st_size
        with path.open("rb") as stream:
            if _directory_size(stream, size) > _DIRECTORY:
                raise Refusal("it has too many members")
        self._zip = zipfile.ZipFile(path)
        members = self._zip.infolist()
        self._members = {member.filename: member for member in members}
        try:
            _check_members(members, size)
        except Refusal:
            self._zip.close()
            raise

    @property
    def names(self) -> list[str]:
        """Of the members, in the archive's order."""
        return list(self._members)

    def read(self, name: str) -> bytes:
        """A member's content.

        Raises:
          Refusal: it is not there, or of another length than the directory says.
        """
        if name not in self._members:
            raise Refusal(f"it lacks the member {shown(name)}")
        size = self._members[name].file_size
        with self._zip.open(self._members[name]) as stream:
            # With a length zipfile unpacks no more than that, whatever the directory says.
            content = stream.read(size)
        if len(content) != size:
            raise Refusal(f"{shown(name)} ends {size - len(content)} bytes too early")
        return content

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    if len({member.filename for member in members}) < len(members):
        raise Refusal("two of its members have one name")
    for member in members:
        name = shown(member.filename)
        # bzip2 and LZMA unpack a block at once, whatever its size.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Refusal(
                f"{name} is packed by method {member.compress_type}; only stored and deflated "
                "members are read",
                "save it without compression",
            )
        if member.flag_bits & 1:
            raise Refusal(f"{name} is encrypted", "save it without a password")
    total, bound = sum(member.file_size for member in members), unpacked_bound(size)
    if total > bound:
        raise Refusal(
            f"its {size} bytes would unpack to {total}, more than {bound}",
            "save it without compression",
        )


def _directory_size(stream: IO[bytes], size: int) -> int:
    """Bytes of the directory, as the record at the end of the file says; 0 without one."""
    stream.seek(max(0, size - (1 << 16) - 200))
    tail = stream.read()
    at = tail.rfind(b"PK\x05\x06")
    wide = tail.rfind(b"PK\x06\x06", 0, max(at, 0))
    if wide >= 0:
        return int.from_bytes(tail[wide + 40 : wide + 48], "little")
    return int.from_bytes(tail[at + 12 : at + 16], "little") if at >= 0 else 0
