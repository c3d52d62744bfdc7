"""One page and one Markdown table of all families that were run: every defence, hardest first.

python experiments/systems/leaderboard.py [DIR]     (runs/systems; writes DIR/leaderboard.html, .md)

By task: what attackers reach at worst, free and with the utility kept, what that is more than from
the model that never learned (only this gap is a failure of a safeguard), what of the desired task
is left, whether an honest user can still train, and after how many steps each group of attackers
had more than the oracle gives. Untouched models bracket the rows of a task.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))  # what the experiments share

from experiments.systems import tables
from jaximm.report.page import write_tables_page
from jaximm.report.table import Column, Table, to_markdown

NOTE = (
    "Means over seeds of defence and attacker, ± half of the 95 % intervals over either. Gap: "
    "worst harm less that from the model that never learned, within the first and within all "
    "numbers of steps of the family. Other domain: the same gap where "
    "harmful rows come from a domain that no defence has seen. Trainable: accuracy on an honest "
    "user's task, less that of the undefended model. Steps: the fewest after which that group of "
    f"attackers has more than {tables.NOISE} above what it has from the model that never learned; "
    "-: never within the last number. A collapsed model guesses on benign rows: neither safe nor "
    "broken."
)


class Line(NamedTuple):
    """A defence, and the family that it was run with."""

    stored: Mapping[str, Any]
    row: Mapping[str, Any]


def lines_of(families: Sequence[Mapping[str, Any]]) -> list[Line]:
    """All defences: untouched models first, once, then the smallest gap; collapsed ones last."""
    found = [Line(stored, row) for stored in families for row in stored["rows"]]
    seen: set[str] = set()
    kept = []
    for line in found:
        label = line.row["label"]
        if label in tables.REFERENCES and label in seen:
            continue  # the same models in every family
        seen.add(label)
        kept.append(line)

    def rank(line: Line) -> tuple[Any, ...]:
        label = line.row["label"]
        if label in tables.REFERENCES:
            return False, tables.REFERENCES.index(label), 0.0
        gap = tables.gap(line.stored, line.row, _last(line)).mean
        return True, tables.collapsed(line.stored, line.row), gap

    return sorted(kept, key=rank)


def _last(line: Line) -> int:
    return len(line.stored["steps"]) - 1


def board(task: str, families: Sequence[Mapping[str, Any]]) -> Table:
    """The table of a task."""
    steps = sorted({count for stored in families for count in stored["steps"]})
    attempts = [one for stored in families for one in stored["attempts"].values()]
    groups = dict.fromkeys(tables.group_of(one) for one in attempts if one["kind"] == "weights")

    def within(count: int, line: Line) -> tables.Estimate:
        seen = [one for one in line.stored["steps"] if one <= count]
        if not seen or line.stored["steps"][-1] < count:
            return tables.NOTHING  # attackers of this family were not run for so long
        return tables.worst_harm(line.stored, line.row, len(seen) - 1)

    def other_domain(line: Line) -> tables.Estimate:
        oracle = tables.reference(line.stored, tables.REFERENCES[1])
        name = "other domain"
        return tables.difference(
            tables.harm(line.row, name, -1),
            None if oracle is None else tables.harm(oracle, name, -1),
        )

    columns = [
        Column("defence", lambda line: line.row["label"]),
        Column("family", lambda line: "" if line.row["label"] in tables.REFERENCES
               else line.stored["family"]),
        Column("seeds", lambda line: f"{len(line.row['models'])} x {line.stored['attack_seeds']}"),
        Column("state", lambda line: tables.state(line.stored, line.row)),
        Column("benign", lambda line: tables.benign(line.row), str),
    ]  # fmt: skip
    for count in steps:
        columns.append(Column(f"worst harm, {count} steps", functools.partial(within, count), str))
    columns += [
        Column("by", lambda line: (tables.worst(line.stored, line.row, _last(line)) or ("-",))[0]),
        Column("utility kept",
               lambda line: tables.worst_harm(line.stored, line.row, _last(line), "careful"), str),
        Column("gap, first steps", lambda line: tables.gap(line.stored, line.row, 0), str),
        Column("gap, all steps",
               lambda line: tables.gap(line.stored, line.row, _last(line)), str),
        Column("other domain", other_domain, str),
        Column("trainable", lambda line: tables.trainability(line.stored, line.row), str),
    ]  # fmt: skip
    for group in groups:
        columns.append(Column(f"steps, {group}", functools.partial(_steps, group), str))
    return Table(f"Task {task}", columns, lines_of(families), NOTE)


def _steps(group: str, line: Line) -> str:
    found = tables.broken_after(line.stored, line.row, group)
    return "-" if found is None else str(found)


def boards(folder: Path) -> list[Table]:
    """A table for each task of what a folder holds.

    Raises:
      ValueError: it holds no family.
    """
    families: dict[str, list[Mapping[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        stored = tables.read(path)
        families.setdefault(stored["task"], []).append(stored)
    if not families:
        raise ValueError(f"{folder} holds no family; run experiments/systems/run.py first.")
    return [board(task, families[task]) for task in sorted(families)]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/systems"))
    folder = parser.parse_args(argv).folder
    found = boards(folder)
    count = sum(len(one.records) for one in found)
    write_tables_page(
        found,
        folder / "leaderboard.html",
        title="Published systems on toy tasks",
        lead=f"{count} models on {len(found)} tasks, each under every attacker of its task.",
    )
    text = "\n".join(map(to_markdown, found))
    (folder / "leaderboard.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
