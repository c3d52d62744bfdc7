"""One definition of a table, and every medium says the same; what is text stays text."""

import ast
import csv
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import jaximm.report
from jaximm.report import formats, table
from jaximm.report.table import Column, Table
from tests.report.test_report import Reader

RECORDS = [
    {"name": "a|b", "kappa": math.log(2.5e6), "steps": 49, "flag": True},
    {"name": "<i>", "kappa": None, "steps": -1, "flag": False},
    {"name": "=HYPERLINK(1)", "kappa": -0.5, "steps": 7322, "flag": None},
]
COLUMNS = (
    Column("method", lambda r: r["name"]),
    Column("κ / largest", lambda r: r["kappa"], formats.from_log),
    Column("steps", lambda r: r["steps"], "{:,}".format),
    Column("note", lambda r: r["flag"], str, left=True),
)


@pytest.fixture
def made():
    return Table("A_title & more", COLUMNS, RECORDS, "a note")


def test_what_a_reader_sees_is_one_text_a_cell(made):
    assert made.rows == (
        ("a|b", "2.50 × 10⁶", "49", "True"),
        ("<i>", "–", "-1", "False"),
        ("=HYPERLINK(1)", "0.607", "7,322", "None"),
    )
    assert [column.numeric for column in COLUMNS] == [False, True, True, False]
    assert Column("x", lambda r: None).text(1) == formats.MISSING


def test_markdown_terminal_and_html_show_those_cells(made):
    lines = table.to_markdown(made).splitlines()
    assert lines[3] == "| --- | ---: | ---: | --- |"
    assert lines[4] == "| a\\|b | 2.50 × 10⁶ | 49 | True |"
    assert lines[5].startswith("| &lt;i&gt; |")
    file = io.StringIO()
    Console(file=file, width=100).print(table.to_rich(made))
    for row in made.rows:
        assert all(cell in file.getvalue() for cell in row)
    reader = Reader(str(table.to_html(made)))
    assert [text for text in reader.text if text.strip()] == [
        made.title, *(column.heading for column in COLUMNS),
        *(cell for row in made.rows for cell in row), "a note",
    ]  # fmt: skip
    assert reader.tags.count("tr") == 4
    assert "a note" not in table.to_html(made, note=False)
    assert "<caption>" not in table.to_html(made, caption=False)


def test_latex_is_rectangular_and_literal(made):
    text = table.to_latex(made)
    assert text.splitlines()[:2] == ["% A_title & more", "% a note"]
    assert "\\begin{tabular}{lrrl}" in text
    assert r"a|b & 2.50 $\times$ 10$^{6}$ & 49 & True \\" in text
    assert r"$\kappa$ / largest" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + len(RECORDS)
    assert {line.count("&") for line in rows} == {3}
    odd = Table("t", [Column("50 % of #1_x", str)], ["{a}~b^c\\d & $5"])
    assert r"50 \% of \#1\_x" in table.to_latex(odd)
    assert r"\{a\}\textasciitilde{}b\textasciicircum{}c\textbackslash{}d \& \$5" in table.to_latex(
        odd
    )


def test_csv_has_the_values_themselves(made):
    head, *rows = csv.reader(io.StringIO(table.to_csv(made)))
    assert head == [column.heading for column in COLUMNS]
    np.testing.assert_array_equal(float(rows[0][1]), RECORDS[0]["kappa"])
    assert [row[2] for row in rows] == ["49", "-1", "7322"]  # numbers are no formulas
    assert rows[1][1] == ""
    assert rows[2][0] == "'=HYPERLINK(1)"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", " @", "\r\n-", "＝", "\ufeff="])
def test_a_text_that_a_spreadsheet_takes_for_a_formula_is_escaped_in_cells_and_headings(start):
    evil = f"{start}cmd|' /C calc'!A0"
    lines = [{evil: evil, "list": [evil]}]
    (first, _), (cell, listed) = csv.reader(
        io.StringIO(table.to_csv(table.of_lines("t", lines)), newline="")
    )
    assert first == cell == f"'{evil}"
    assert listed.startswith("[")
    for harmless in ("-2.5", "+1e9", "a=b", "", "mean - sd", "—"):
        text = table.to_csv(table.of_lines("t", [{"x": harmless, "y": 1}]))
        assert list(csv.reader(io.StringIO(text)))[1][0] == harmless


def test_csv_of_results_and_assessments_escape_what_comes_from_outside():
    import assessment_fixture
    import result_fixture

    result = result_fixture.make_result("limit")
    result["experiment"], result["method"] = "@SUM(1)", "=1+1"
    rows = list(csv.DictReader(io.StringIO(jaximm.report.csv([result]))))
    assert {row["experiment"] for row in rows} == {"'@SUM(1)"}
    assert rows[0]["method"] == "'=1+1"
    found = assessment_fixture.make_assessment(models=("none",))
    found["name"], found["rows"][0]["reason"] = "+x", "-y"
    row = next(csv.DictReader(io.StringIO(jaximm.report.assessment_csv(found))))
    assert (row["experiment"], row["reason"]) == ("'+x", "'-y")
    assert row["change"].startswith(("-", "0"))
    curves = csv.DictReader(io.StringIO(jaximm.report.curves_csv(found)))
    assert next(curves)["experiment"] == "'+x"


def test_blocks_repeat_the_first_columns_and_empty_columns_go(made):
    narrow = made.with_columns([*COLUMNS, Column("nothing", lambda r: None)])
    assert [c.heading for c in table.narrowed(narrow).columns] == [c.heading for c in COLUMNS]
    parts = table.blocks(made, width=24)
    tables = [part for part in parts if hasattr(part, "columns")]
    assert len(tables) > 1
    assert all(str(part.columns[0].header) == "method" for part in tables)


def test_reports_are_made_of_documents_alone():
    """Of the package, only the modules of the two documents are imported: nothing is computed."""
    allowed = re.compile(r"jaximm\.report(\..*)?$|jaximm\.records(\..*)?$")
    for path in Path(jaximm.report.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
                if node.module == "jaximm":
                    names = [f"jaximm.{alias.name}" for alias in node.names]
            for name in names:
                assert not name.startswith("jaximm") or allowed.match(name), f"{path.name}: {name}"
                assert name.split(".")[0] != "jax", path.name


def test_all_pages_extend_one_template():
    folder = Path(jaximm.report.__file__).parent / "templates"
    pages = [path for path in folder.glob("*.jinja") if path.name != "base.html.jinja"]
    assert len(pages) >= 3
    for path in pages:
        text = path.read_text()
        assert text.startswith('{% extends "base.html.jinja" %}')
        assert "<style" not in text
    assert not list(folder.parent.glob("*.jinja"))
