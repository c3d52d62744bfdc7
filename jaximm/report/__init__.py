"""Documents as words, tables, figures and self-contained pages.

Functions for results take a list of them, of one method or of many, as `jaximm.records.files.read`
returns them; those for an assessment take one, as `jaximm.records.assessment.read` does. Nothing
is measured here: of the package, only those two modules are imported. Figures are drawn, and their
library imported, only by the functions that write pages.
"""

from jaximm.report.assessment_tables import (
    assessment_csv,
    assessment_markdown,
    curves_csv,
    leaderboard,
    terminal_assessment,
)
from jaximm.report.exports import robustbench_card, tamperbench_heat_map
from jaximm.report.page import (
    write_assessment_page,
    write_comparison_page,
    write_leaderboard_page,
    write_page,
    write_standings_page,
)
from jaximm.report.run_tables import csv, markdown
from jaximm.report.standings import suite_table
from jaximm.report.table import Column, Table, to_csv, to_html, to_latex, to_markdown, to_rich

__all__ = [
    "Column",
    "Table",
    "assessment_csv",
    "assessment_markdown",
    "csv",
    "curves_csv",
    "leaderboard",
    "markdown",
    "robustbench_card",
    "suite_table",
    "tamperbench_heat_map",
    "terminal_assessment",
    "to_csv",
    "to_html",
    "to_latex",
    "to_markdown",
    "to_rich",
    "write_assessment_page",
    "write_comparison_page",
    "write_leaderboard_page",
    "write_page",
    "write_standings_page",
]
