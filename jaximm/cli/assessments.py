"""Documents of assessments: where they are, how they are read and shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaximm.cli.errors import UsageError
from jaximm.cli.output import stdout, write_text

if TYPE_CHECKING:
    from jaximm.types import Json


def check_attackers(names: Sequence[str]) -> None:
    """Refuses a name that no attacker has.

    Raises:
      UsageError: with the names there are.
    """
    from jaximm import attacks

    try:
        for name in names:
            attacks.describe(name)
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_rows(budgets: Sequence[int]) -> None:
    """Refuses a data budget without rows.

    Raises:
      UsageError: see above.
    """
    if budgets and min(budgets) < 1:
        raise UsageError(f"--harmful-rows must be at least 1, got {min(budgets)}.")


def assessment_folder(run_dir: Path) -> Path:
    """Where `assess` writes by default."""
    return run_dir / "assessment"


def assessments_of(path: Path) -> list[Path]:
    """The assessment that a path is, or those in a folder and in its folders."""
    if path.is_file() and path.suffix == ".json":
        return [path]
    return sorted({*path.glob("assessment.json"), *path.glob("*/assessment.json")})


def show_assessment(assessment: Json, folder: Path) -> None:
    """Prints an assessment and writes its page, its tables and its exports beside it."""
    from jaximm import report

    console = stdout()
    for part in report.terminal_assessment(assessment, width=console.width):
        console.print(part)
    report.write_assessment_page(assessment, folder / "assessment.html")
    print(f"report: {folder / 'assessment.html'}")
    write_text(folder / "assessment.md", report.assessment_markdown(assessment), name="markdown")
    write_text(folder / "assessment.csv", report.assessment_csv(assessment), name="csv")
    write_text(folder / "curves.csv", report.curves_csv(assessment), name="csv")
    heat_map = json.dumps(report.tamperbench_heat_map(assessment), indent=1)
    write_text(folder / "heat_map.json", heat_map + "\n", name="heat map")
    labels = [model["label"] for model in assessment["models"]]
    cards = {label: report.robustbench_card(assessment, label) for label in labels}
    write_text(folder / "cards.json", json.dumps(cards, indent=1) + "\n", name="cards")
