"""Results as words, tables, figures and one self-contained page.

Functions for results take a list of them, of one method or of many, as `jaximm.records.files.read`
returns them; those for an assessment take one, as `jaximm.records.assessment.read` does. Figures
are drawn, and their library imported, only by the functions that write pages.
"""

from jaximm.report.assessment_leaderboard import leaderboard
from jaximm.report.assessment_page import write_assessment_page
from jaximm.report.assessment_tables import assessment_csv, assessment_markdown, terminal_assessment
from jaximm.report.exports import robustbench_card, tamperbench_heat_map
from jaximm.report.page import write_page
from jaximm.report.tables import (
    csv,
    markdown,
    summary_table,
    terminal_tables,
    to_markdown,
    verdicts,
)

__all__ = [
    "assessment_csv",
    "assessment_markdown",
    "csv",
    "leaderboard",
    "markdown",
    "robustbench_card",
    "summary_table",
    "tamperbench_heat_map",
    "terminal_assessment",
    "terminal_tables",
    "to_markdown",
    "verdicts",
    "write_assessment_page",
    "write_page",
]
