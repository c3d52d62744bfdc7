"""CSV files as spreadsheets and pandas write them: rows of text under named columns, checked."""

from __future__ import annotations

import csv
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from jaximm.data.files import DataFileError, check_regular, listed, reading, shown

_LONGEST_LINE = 2**26  # characters; a file without line ends is not read into memory as one

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 60
_shortened.maxlist = 12

brief = _shortened.repr
"""The `repr` of a value, shortened where it is long."""


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The header of a CSV file, then its rows: (number of the line, fields).

    UTF-8, with or without a byte-order mark; fields separated by commas, quoted with ``"``. Empty
    lines are nothing, and so are rows of empty fields at the end; a row of empty fields amid others
    is a row. Names lose the spaces around them.

    Raises:
      DataFileError: not readable as such; no header line, or one with a column without a name or
        two of one name; a row of another length. Names the file and the line.
    """
    name = shown(path)
    with (
        reading(path, "CSV", "save it as comma-separated UTF-8 text"),
        open(check_regular(path), newline="", encoding="utf-8-sig") as stream,
    ):
        # strict: a quote that is never closed would swallow the rest of the file as one field.
        reader = csv.reader(_lines(stream, name), strict=True)
        rows = (
            (reader.line_num, row) for row in reader if len(row) > 1 or any(map(str.strip, row))
        )
        first = next(rows, None)
        if first is None:
            raise DataFileError(f"{name}: expected a header line and at least one row.")
        line, header = first
        header = [field.strip() for field in header]
        _check_header(header, name)
        yield line, header
        empty: list[tuple[int, list[str]]] = []
        for number, (line, row) in enumerate(rows):
            if not any(map(str.strip, row)):
                empty.append((line, row))
                continue
            if len(row) != len(header):
                raise DataFileError(_ragged(name, number, line, row, header))
            yield from empty  # in the midst of others: rows after all, with all entries missing
            empty.clear()
            yield line, row


def _lines(stream: TextIO, name: str) -> Iterator[str]:
    """The lines of a text file, none of them endless."""
    while line := stream.readline(_LONGEST_LINE + 1):
        if len(line) > _LONGEST_LINE:
            raise DataFileError(f"{name}: a line of over {_LONGEST_LINE} characters; is it CSV?")
        if "\0" in line:
            raise DataFileError(
                f"{name}: holds null characters; save it as comma-separated UTF-8 text."
            )
        yield line


def _check_header(header: Sequence[str], name: str) -> None:
    """Refuses column names that no table of features has."""
    # pandas reads its own nameless index back as "Unnamed: 0", and may have written it again.
    nameless = [
        index
        for index, field in enumerate(header)
        if not field or re.fullmatch(r"Unnamed: \d+(_level_\d+)?(\.\d+)?", field)
    ]
    if nameless == [0]:
        raise DataFileError(
            f"{name}: the first column has no name ({header[0]!r}): it is an index that pandas or "
            "R wrote, not a feature; write the file without it (index=False, row.names=FALSE)."
        )
    if nameless:
        raise DataFileError(
            f"{name}: column {nameless[0]} of the header has no name ({len(nameless)} such "
            "columns, counted from 0); name it or leave it out."
        )
    twice = (
        sorted({field for field in header if header.count(field) > 1})
        if (len(set(header)) < len(header))
        else []
    )
    if twice:
        raise DataFileError(
            f"{name}: two columns have the same name, {brief(twice[0])} "
            f"({len(twice)} such names); rename one."
        )
    separator = next((one for one in ";\t|" if one in header[0]), None)
    if len(header) == 1 and separator is not None:
        raise DataFileError(
            f"{name}: the fields are separated by {separator!r}, expected commas; save it again "
            "with commas, and points in the numbers."
        )
    # pandas names the columns of an array 0, 1, 2, ...: any other numbers are a row of data.
    if all(map(_is_number, header)) and list(header) != [str(i) for i in range(len(header))]:
        raise DataFileError(
            f"{name}: the first line holds numbers ({listed(header)}), expected the names of the "
            "columns; add a header line."
        )


def _ragged(name: str, number: int, line: int, row: Sequence[str], header: Sequence[str]) -> str:
    """What to say of a row of another length than the header."""
    advice = "quote fields that hold commas" if len(row) > len(header) else "fill in the others"
    if len(row) == len(header) + 1 and number == 0:
        advice = "write the file without row names (R: row.names=FALSE), or quote the commas"
    return (
        f"{name}: row {number} has {len(row)} fields, the header has {len(header)} (line {line}); "
        f"{advice}."
    )


def _is_number(text: str) -> bool:
    """Whether `text` is a number; see `number`."""
    try:
        number(text)
    except ValueError:
        return False
    return True


def number(text: str) -> float:
    """`text` as a float, read as other programs read it.

    Python alone takes 1_000 for 1000, and digits of any script.

    Raises:
      ValueError: it is none.
    """
    if "_" in text or not text.isascii():
        raise ValueError(f"{brief(text)} is not a number.")
    return float(text)
