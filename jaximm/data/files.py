"""Files from outside, read within bounds: what can be printed of them, NumPy arrays, IDX, gzip.

A header is believed only as far as the bytes behind it go: sizes are compared before anything is
allocated, and what unpacks to far more than it takes on disk is refused.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import zipfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from jaxtyping import UInt8

_MOST_TIMES_LARGER = 100
_ALWAYS_UNPACKED = 2**26
_PIECE = 2**20


class DataFileError(ValueError):
    """A file that cannot be used: names the file, what is wrong with it, and what to do."""


def shown(name: str | os.PathLike[str]) -> str:
    r"""A path or text for messages and records: printable characters only.

    Bytes of a file name that are not UTF-8, and control characters, are written as escapes.

    >>> shown("caf\udce9/a.png")
    'caf\\xe9/a.png'
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def listed(names: Sequence[str | os.PathLike[str]], most: int = 5) -> str:
    """The first few names, and how many more there are.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    rest = len(names) - most
    head = ", ".join(map(shown, names[:most]))
    return f"{head} and {rest} more" if rest > 0 else head


@contextlib.contextmanager
def reading(
    path: str | os.PathLike[str],
    what: str,
    remedy: str = "",
    *,
    unless: tuple[type[Exception], ...] = (),
) -> Generator[None]:
    """Whatever a parser raises on a damaged file leaves as one `DataFileError` that names it.

    Everything, since neither Pillow, NumPy nor zipfile says what they may raise on hostile bytes:
    KeyError, TypeError, MemoryError and RecursionError have all been seen.

    Args:
      path: names the file in the message.
      what: what it was taken for.
      remedy: what to do, unless the system refused to open it.
      unless: exceptions that pass as they are.
    """
    try:
        yield
    except (DataFileError, *unless):
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = shown(reason.splitlines()[0][:200]).rstrip(".")
        # What the system says (no such file, no permission) has remedies of its own.
        advice = f"; {remedy}" if remedy and getattr(error, "errno", None) is None else ""
        text = f"{shown(path)}: cannot be read as {what} ({reason}){advice}."
        raise DataFileError(text) from error


def check_regular(path: str | os.PathLike[str]) -> Path:
    """`path`, unless there is something else than a file; see `reading` for what is not there.

    Raises:
      DataFileError: a folder, or a pipe or device, which could be read for ever.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe or a device"
        raise DataFileError(f"{shown(path)}: {what}, expected a file.")
    return path


def check_unpacked(where: str, *, packed: int, unpacked: int, remedy: str) -> None:
    """Refuses what unpacks to over 64 MiB and over a hundred times its size.

    Deflate packs zeros 1,000 to 1, so a file of megabytes may hold gigabytes.
    """
    if unpacked > max(_ALWAYS_UNPACKED, _MOST_TIMES_LARGER * packed):
        raise DataFileError(
            f"{where}: {packed} bytes would unpack to {unpacked}, over {_MOST_TIMES_LARGER} times "
            f"as many; {remedy}."
        )


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file by name: numbers of any width, byte order and memory order.

    Raises:
      DataFileError: not such a file, damaged, or one that unpacks to far more than its size;
        objects, structured entries; two arrays of one name.
    """
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    with reading(path, ".npz"), zipfile.ZipFile(check_regular(path)) as archive:
        members = archive.infolist()
        check_unpacked(
            shown(path),
            packed=path.stat().st_size,
            unpacked=sum(member.file_size for member in members),
            remedy="write it with np.savez rather than np.savez_compressed",
        )
        for member in members:
            name = member.filename.removesuffix(".npy")
            where = f"{shown(path)}: {shown(name)[:80]}"
            if name in arrays:
                raise DataFileError(f"{where}: two arrays of this name.")
            # LZMA and bzip2 would allocate what the file asks for; NumPy writes neither.
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataFileError(f"{where}: packed in another way than np.savez does.")
            with reading(where, "an array"), archive.open(member) as stream:
                arrays[name] = read_npy(stream, member.file_size, where=where)
    return arrays


class NpyHeader(NamedTuple):
    """What an array in NumPy's own format says of itself."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype


def npy_header(stream: IO[bytes], size: int, *, where: str) -> NpyHeader:
    """The header of an array in NumPy's own format, from a stream of `size` bytes, read up to it.

    Raises:
      DataFileError, ValueError: see `read_npy`.
    """
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):  # (3, 0) has field names beyond Latin-1
        raise DataFileError(f"{where}: an array of format {version}, which only tables have.")
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, fortran_order, dtype = read_header(stream)
    if dtype.hasobject or dtype.names or dtype.subdtype or not dtype.itemsize:
        raise DataFileError(
            f"{where}: expected a table of numbers, got entries of dtype {str(dtype)[:80]}; "
            "convert it with .astype(float) before saving."
        )
    if any(length < 0 for length in shape):
        raise DataFileError(f"{where}: a shape with negative lengths, {shape}.")
    count = math.prod(shape)
    if stream.tell() + count * dtype.itemsize != size:
        raise DataFileError(
            f"{where}: its header says {count} entries of {dtype.itemsize} bytes, but "
            f"{size - stream.tell()} bytes follow; save it again."
        )
    return NpyHeader(shape, fortran_order, dtype)


def read_npy(stream: IO[bytes], size: int, *, where: str) -> np.ndarray:
    """An array in NumPy's own format from a stream of `size` bytes.

    Args:
      stream: open for reading bytes, at its beginning.
      size: bytes of the whole, header included.
      where: what to call it in a message.

    Raises:
      DataFileError: no array of plain numbers or text, or another size than its header says.
      ValueError: (and others of NumPy's) a header that cannot be read; see `reading`.
    """
    shape, fortran_order, dtype = npy_header(stream, size, where=where)
    count = math.prod(shape)
    flat = np.empty(count, dtype)
    _fill(flat.view(np.uint8), stream, where)
    return flat.reshape(shape, order="F" if fortran_order else "C")


def read_idx(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "..."]:
    """One IDX file of bytes, gzipped or not.

    Two zero bytes, type 8, the number of axes (1 to 32), their sizes (big-endian), the data.

    Raises:
      DataFileError: not such a file, or one that is cut short, too long, damaged, or unpacks to far
        more than its size.
    """
    path = Path(path)
    name, again = shown(path), "fetch it again with `make data`"
    with reading(path, "an IDX file", again), _opened(path) as stream:
        head = stream.read(4)
        if len(head) < 4 or head[:3] != b"\x00\x00\x08" or not 1 <= head[3] <= 32:
            raise DataFileError(f"{name}: not an IDX file of unsigned bytes.")
        sizes = stream.read(4 * head[3])
        if len(sizes) < 4 * head[3]:
            raise DataFileError(f"{name}: cut short; {again}.")
        shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
        count, on_disk = math.prod(shape), path.stat().st_size
        size = on_disk - 4 - len(sizes)
        if not isinstance(stream, gzip.GzipFile) and size != count:
            raise DataFileError(f"{name}: {size} bytes of data, expected {count}; {again}.")
        check_unpacked(name, packed=on_disk, unpacked=count, remedy="unpack it with gunzip first")
        content = np.empty(count, np.uint8)
        _fill(content, stream, f"{name}: cut short")
        if stream.read(1):
            raise DataFileError(f"{name}: more than the {count} bytes that it says; {again}.")
        return content.reshape(shape)  # NumPy takes no empty one whose other axes are too long


def _opened(path: Path) -> gzip.GzipFile | IO[bytes]:
    """A file open for reading, unpacked if it is gzipped."""
    with open(check_regular(path), "rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else open(path, "rb")


def read_gzip(path: str | os.PathLike[str], *, most: int) -> bytes:
    """The content of a gzipped file of at most `most` bytes.

    Raises:
      DataFileError: not such a file, damaged, or longer.
    """
    with reading(path, "a gzipped file"), gzip.open(check_regular(path)) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise DataFileError(f"{shown(path)}: unpacks to more than {most} bytes.")
    return content


def _fill(flat: np.ndarray, stream: gzip.GzipFile | IO[bytes], where: str) -> None:
    """Reads the bytes of `flat` piece by piece."""
    for start in range(0, len(flat), _PIECE):
        piece = flat[start : start + _PIECE]
        content = stream.read(len(piece))
        if len(content) != len(piece):
            raise DataFileError(f"{where}: the data ends too early.")
        piece[:] = np.frombuffer(content, np.uint8)
