"""A user's own texts: a folder of ``.txt`` and ``.jsonl`` files, or one such file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from jaximm.data.files import DataFileError, check_regular, reading, shown
from jaximm.data.text.documents import Document, Parts, split_documents
from jaximm.data.text.tokens import RowsConfig

_REMEDY = "give .txt files, a document each, or .jsonl files, a document a line"
_ANSWERS = ("answer", "completion", "response")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderConfig(RowsConfig):
    """Texts of a user.

    Attributes:
      length: as `RowsConfig`; so are the others.
      path: a folder, or one file.
    """

    path: str = ""

    def __post_init__(self):
        super().__post_init__()
        if not self.path:
            raise ValueError("path is empty; give the folder of the texts.")


def folder_parts(config: FolderConfig) -> Parts:
    """The documents of `read_folder`, split.

    Raises:
      ValueError: as `read_folder` and `split_documents`.
    """
    return split_documents(
        read_folder(config.path),
        selection=config.selection,
        held_out=config.held_out,
        seed=config.seed,
        where=shown(Path(config.path).name),
    )


def read_folder(path: str | Path) -> tuple[Document, ...]:
    """The documents of a folder's files, in the order of their paths; hidden ones are passed over.

    A ``.txt`` file is a document. A line of a ``.jsonl`` file is one: an object with "text", or
    with "prompt" and "answer" (or "completion", "response"); its other keys are passed over.

    Raises:
      DataFileError: (a ValueError) naming file and line: nothing there; not UTF-8; a line that is
        no such object; a blank text.
    """
    path = Path(path)
    if path.is_dir():
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix in (".txt", ".jsonl")
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not files:
            raise DataFileError(f"{shown(path)}: holds no .txt or .jsonl file; {_REMEDY}.")
    else:
        files = [path]
        if path.suffix not in (".txt", ".jsonl"):
            raise DataFileError(f"{shown(path)}: no folder, no .txt and no .jsonl file; {_REMEDY}.")
    return tuple(document for file in files for document in _documents(file))


def _documents(file: Path) -> Iterator[Document]:
    with reading(file, "UTF-8 text", "save it as UTF-8"):
        content = check_regular(file).read_text("utf-8-sig")
    if file.suffix == ".txt":
        yield _checked(Document(content), shown(file))
        return
    # Not splitlines, which also cuts at separators that JSON texts may hold.
    lines = [(i, line) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataFileError(f"{shown(file)}: is empty; {_REMEDY}.")
    for number, line in lines:
        where = f"{shown(file)}, line {number}"
        with reading(where, "JSON", "write one object a line"):
            entry = json.loads(line)
        yield _checked(_document(entry, where), where)


def _document(entry: object, where: str) -> Document:
    if isinstance(entry, dict):
        if isinstance(entry.get("text"), str):
            return Document(entry["text"])
        answer = next((entry[key] for key in _ANSWERS if key in entry), None)
        prompt = entry.get("prompt")
        if isinstance(prompt, str) and prompt.strip() and isinstance(answer, str):
            return Document(answer, prompt)
    raise DataFileError(
        f'{where}: expected an object with "text", or with "prompt" and "answer", all text.'
    )


def _checked(document: Document, where: str) -> Document:
    if not document.text.strip():
        raise DataFileError(f"{where}: has no text; fill it or leave it out.")
    return document
