"""Results as words, tables, figures and one self-contained page.

Each function takes a list of results, of one method or of many, as `jaximm.result.read` returns
them. Figures are drawn, and their library imported, only by `write_page`.
"""

from jaximm.report.page import write_page
from jaximm.report.tables import csv, markdown, summary_table, terminal_tables, verdicts

__all__ = ["csv", "markdown", "summary_table", "terminal_tables", "verdicts", "write_page"]
