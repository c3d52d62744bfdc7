"""A table is a list of columns over records; every medium shows it from that one definition.

A `Column` says where its value lies in a record and how a reader sees it. The terminal (rich),
Markdown, LaTeX and HTML show that text, CSV the value itself.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup, escape
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from jaximm.report import formats


class Column(NamedTuple):
    """A heading, the value in a record, and how a number is shown (None: the value is a word).

    Numbers are set flush right; `left` sets what is shown flush left all the same.
    """

    heading: str
    value: Callable[[Any], Any]
    show: Callable[[Any], str] | None = None
    left: bool = False

    @property
    def numeric(self) -> bool:
        """Whether its cells are set flush right."""
        return self.show is not None and not self.left

    def text(self, record: Any) -> str:
        """The cell of `record` as a reader sees it."""
        value = self.value(record)
        if self.show is not None:
            return self.show(value)
        return formats.MISSING if value is None else str(value)


@dataclasses.dataclass(frozen=True)
class Table:
    """Records of any type under `columns`."""

    title: str
    columns: Sequence[Column]
    records: Sequence[Any]
    note: str = ""

    @functools.cached_property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        """What a reader sees, [record][column]."""
        return tuple(tuple(c.text(record) for c in self.columns) for record in self.records)

    def with_columns(self, columns: Sequence[Column]) -> Table:
        """The same records under other columns."""
        return dataclasses.replace(self, columns=tuple(columns))


def of_lines(title: str, lines: Sequence[Mapping[str, Any]], keys: Iterable[str] = ()) -> Table:
    """Raw lines under the keys that occur in them, those of `keys` first."""
    names = dict.fromkeys([*keys, *(key for line in lines for key in line)])
    return Table(title, [Column(name, lambda line, k=name: line.get(k)) for name in names], lines)


def narrowed(table: Table) -> Table:
    """Without the columns in which no row has anything."""
    places = range(len(table.columns))
    kept = [p for p in places if any(row[p] not in ("", formats.MISSING) for row in table.rows)]
    return table.with_columns([table.columns[place] for place in kept])


# ---------------------------------------------------------------- the terminal


def to_rich(table: Table) -> RichTable:
    """For the terminal. Cells are literal text, no markup."""
    rich_table = RichTable(
        title=Text(table.title, style="bold"),
        caption=Text(table.note, style="dim") if table.note else None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in table.columns:
        rich_table.add_column(
            # Headings of numbers break at their spaces, so that the numbers set the width.
            Text(_broken(column.heading) if column.numeric else column.heading),
            justify="right" if column.numeric else "left",
            no_wrap=column.numeric,
            overflow="fold",
        )
    for row in table.rows:
        rich_table.add_row(*map(Text, row))
    return rich_table


def _broken(heading: str) -> str:
    """A line a word; short quotients as "B / A" stay whole."""
    whole = re.sub(r"(?<!\S)(\S{1,4}) / (\S{1,4})(?!\S)", "\\1\u00a0/\u00a0\\2", heading)
    return whole.replace(" ", "\n")


def blocks(table: Table, *, width: int) -> list[RenderableType]:
    """A table in as many blocks of columns as `width` asks for, the leading ones in each."""
    unbounded, columns = Console(width=10**4), list(table.columns)
    lead = next((i for i, column in enumerate(columns) if column.numeric), 1)

    def build(chosen: Sequence[Column], title: str) -> RichTable:
        part = dataclasses.replace(table, title=title, note="", columns=[*columns[:lead], *chosen])
        rich_table = to_rich(part)
        for column in rich_table.columns[:lead]:
            column.no_wrap = True
        return rich_table

    def fitting(rest: Sequence[Column]) -> int:
        count = len(rest)
        while count > 1 and unbounded.measure(build(rest[:count], "")).maximum > width:
            count -= 1
        return count

    rest = left = columns[lead:]
    number = 0
    while left:
        number, left = number + 1, left[fitting(left) :]
    even = math.ceil(len(rest) / max(number, 1))
    parts: list[RenderableType] = []
    title = table.title
    while rest:
        count = min(fitting(rest), even)
        parts.append(build(rest[:count], title))
        rest, title = rest[count:], f"{table.title}, continued"
    return [*parts, Text(table.note, style="dim"), ""] if table.note else parts


def shown(tables: Iterable[Table], *, width: int) -> list[RenderableType]:
    """Those of `tables` that have rows, without empty columns, in blocks."""
    return [part for table in tables if table.rows for part in blocks(narrowed(table), width=width)]


def pairs(rows: Sequence[tuple[str, str, str]]) -> list[RenderableType]:
    """(heading, text, style) lines, the texts in one column; nothing where there are none."""
    if not rows:
        return []
    grid = RichTable.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for heading, text, style in rows:
        grid.add_row(Text(heading, style=style or "bold"), Text(text))
    return [grid, ""]


# ---------------------------------------------------------------- files


def to_markdown(table: Table) -> str:
    """GitHub Markdown with a bold title line; pipes and angle brackets in cells are escaped."""
    head = [markdown_text(column.heading) for column in table.columns]
    rule = ["---:" if column.numeric else "---" for column in table.columns]
    body = [map(markdown_text, row) for row in table.rows]
    lines = [f"**{markdown_text(table.title)}**", ""]
    lines += ["| " + " | ".join(line) + " |" for line in (head, rule, *body)]
    return "\n".join([*lines, *(["", markdown_text(table.note)] if table.note else [])]) + "\n"


def markdown_text(text: str) -> str:
    """`text` on one line, literally."""
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def to_csv(table: Table) -> str:
    """Values as they are, one header line, empty where there is none; lists and records as JSON.

    A spreadsheet takes a text that begins with = + - or @ for a formula: it gets an apostrophe in
    front. Numbers stay numbers.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_literal(column.heading) for column in table.columns])
    for record in table.records:
        writer.writerow([_csv_cell(column, record) for column in table.columns])
    return buffer.getvalue()


def _csv_cell(column: Column, record: Any) -> Any:
    value = column.value(record)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | dict):
        return json.dumps(value)
    return _literal(value if isinstance(value, str) else column.text(record))


def _literal(text: str) -> str:
    """
    >>> _literal("=1+1"), _literal("-2.5"), _literal("@all"), _literal("a=b")
    ("'=1+1", '-2.5', "'@all", 'a=b')
    """
    try:
        float(text)
    except ValueError:
        # Spreadsheets strip what is blank or not printed before they look for a formula.
        first = re.sub(r"^[\s\x00-\x1f\ufeff\u200b]+", "", text)[:1]
        return f"'{text}" if first and first in "=+-@＝＋－＠" else text
    return text


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"$<$", ">": r"$>$", "×": r"$\times$", "−": "$-$", "→": r"$\to$", "±": r"$\pm$",
    "κ": r"$\kappa$", "σ": r"$\sigma$", "Δ": r"$\Delta$", "–": "--", "\u00a0": "~",
}  # fmt: skip
_RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def to_latex(table: Table) -> str:
    """A ``tabular`` that needs no package, title and note as comments; cells are literal text."""

    def cell(text: str) -> str:
        text = "".join(_LATEX.get(character, character) for character in text)
        raised = f"[{''.join(map(chr, _RAISED))}]+"
        return re.sub(raised, lambda hit: f"$^{{{hit[0].translate(_RAISED)}}}$", text)

    heads = [column.heading for column in table.columns]
    body = [" & ".join(map(cell, row)) + r" \\" for row in (heads, *table.rows)]
    top = [f"% {' '.join(text.split())}" for text in (table.title, table.note) if text]
    top += [f"\\begin{{tabular}}{{{''.join('lr'[c.numeric] for c in table.columns)}}}"]
    rules = [r"\hline", body[0], r"\hline", *body[1:], r"\hline", r"\end{tabular}", ""]
    return "\n".join(top + rules)


def to_html(table: Table, *, caption: bool = True, note: bool = True) -> Markup:
    """A ``<table>`` in a box that scrolls, and the note under it; every text is escaped."""
    head = Markup().join(
        Markup('<th scope="col"{}>{}</th>').format(_class("n" * column.numeric), column.heading)
        for column in table.columns
    )
    body = Markup("\n").join(
        Markup("<tr>{}</tr>").format(Markup().join(map(_html_cell, range(len(row)), row,
                                                       table.columns)))
        for row in table.rows
    )  # fmt: skip
    top = Markup("<caption>{}</caption>\n").format(table.title) if caption else ""
    below = Markup('\n<p class="note">{}</p>').format(table.note) if note and table.note else ""
    return Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="{}">\n<table>\n{}<thead><tr>{}'
        "</tr></thead>\n<tbody>\n{}\n</tbody>\n</table>\n</div>{}\n"
    ).format(table.title, top, head, body, below)


def _class(names: str) -> Markup:
    return Markup(f' class="{names}"' if names else "")


def _html_cell(place: int, text: str, column: Column) -> Markup:
    tag = Markup("td" if place else "th")
    if column.numeric:  # intervals in brackets, and numbers with their unit, stay on one line
        text = re.sub(r"\([^()]*\)|\d \w*FLOP", lambda hit: hit[0].replace(" ", "\u00a0"), text)
    kind = "n" if column.numeric else "s" if len(text) < 26 else ""
    scope = Markup("" if place else ' scope="row"')
    return Markup("<{}{}{}>{}</{}>").format(tag, scope, _class(kind), escape(text), tag)
