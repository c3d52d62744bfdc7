"""One method many times over: means and deviations of RIR on every footing, as Markdown.

The experiments reduce each run to a flat `Record` and print the tables of this module into their
README.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaximm.assessment.verdict import reference_of

Record = dict[str, Any]
"""One run: ``method``, ``case`` (seed or pair) and numbers by name; None where undefined."""

RATIOS = ("log_ratio_harmful", "log_ratio_primary", "log_rir", "log_fraction")


def flatten(conditioning: Mapping[str, Any]) -> Record:
    """The conditioning section of a result as ``<footing>.<split>.<quantity>`` numbers."""
    record: Record = {}
    for footing, splits in conditioning.items():
        for split, row in splits.items():
            for name in RATIOS:
                record[f"{footing}.{split}.{name}"] = row[name]
            for task in ("primary", "harmful"):
                record[f"{footing}.{split}.rank_{task}"] = row[task]["after"]["rank"]
    limit = conditioning["damped"]["train"]["log_rir_limit"]
    record["log_rir_limit"] = limit
    return record


TASKS = {"harmful": "harmful", "primary": "benign:primary"}
"""Tasks of an assessment by what tables call them."""


def fits(found: Mapping[str, Any], label: str, attacker: str, task: str) -> dict[str, Any]:
    """What fitting a task takes a probe before and after: on the undefended model and on `label`.

    A side that the probe did not meet is left out.
    """
    (model,) = (one for one in found["models"] if one["label"] == label)
    reference = reference_of(found, model)
    sides = {"before": reference and reference["label"], "after": label}
    rows = {row["model"]: row.get("fit") for row in found["rows"]
            if (row["attacker"], row["task"]) == (attacker, TASKS[task])}  # fmt: skip
    return {side: fit for side, name in sides.items() if (fit := rows.get(name)) is not None}


def attack_steps(found: Mapping[str, Any], label: str, attacker: str) -> Record:
    """Steps of one probe to 1 % excess loss and 1 % parameter error, by task and side."""
    record: Record = {}
    for task in TASKS:
        for side, fit in fits(found, label, attacker, task).items():
            record |= fit_steps(fit, f"{attacker}.{task}.{side}")
    return record


def fit_steps(fit: Mapping[str, Any], place: str) -> Record:
    """The steps of a fit (`jaximm.attacks.fit_of`) to 1 % in loss and in parameters."""
    return {
        f"{place}.loss": fit["steps_to_loss_gap"]["1e-2"],
        f"{place}.parameters": fit["steps_to_parameter_error"]["1e-2"],
    }


def _values(records: Sequence[Record], key: str) -> list[float]:
    found = [record.get(key) for record in records]
    return [float(value) for value in found if value is not None and math.isfinite(value)]


def mean_sd(records: Sequence[Record], key: str, digits: int = 2) -> str:
    """``mean (sd)`` of a quantity, or a dash.

    >>> mean_sd([{"a": 1.0}, {"a": 3.0}], "a")
    '2.00 (1.41)'
    """
    values = _values(records, key)
    if not values:
        return "-"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ({spread:.{digits}f})"


def mean_sd_of_exp(records: Sequence[Record], key: str) -> str:
    """``mean (sd)`` of exp of a quantity: a ratio itself, as papers print it."""
    values = [math.exp(value) for value in _values(records, key)]
    if not values:
        return "-"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.4g} ({spread:.3g})"


def median_steps(records: Sequence[Record], key: str) -> str:
    """Median of a number of steps; "> budget" where the median run never got there.

    Of an even number of runs it is the larger of the two in the middle.

    >>> median_steps([{"a": 7}, {"a": -1}, {"a": 9}], "a")
    '9'
    """
    found = [record[key] for record in records if record.get(key) is not None]
    if not found:
        return "-"
    ordered = sorted(math.inf if steps < 0 else steps for steps in found)
    middle = ordered[len(ordered) // 2]
    return "> budget" if math.isinf(middle) else f"{middle:,}"


def by_method(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records grouped by method, in order of appearance."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["method"], []).append(record)
    return groups


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column to the left, others to the right."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def short_table(records: Sequence[Record]) -> str:
    """What a README shows: the measure on both splits, the reference footing, descent's cost.

    log (i), log (ii), log RIR and the fraction of the limit are damped; steps are those of plain
    gradient descent to 1 % excess loss, medians.
    """
    damped, held_out = "damped.train.", "damped.held_out."
    header = ["method", "log (i)", "log (ii)", "log RIR", "of limit", "held-out log RIR"]
    header += ["RIR, reference footing", "descent steps, harmful", "primary"]
    rows = []
    for method, group in by_method(records).items():
        cells = [mean_sd(group, damped + name) for name in RATIOS[:3]]
        cells.append(mean_sd(group, damped + "log_fraction", 3))
        cells.append(mean_sd(group, held_out + "log_rir"))
        cells.append(mean_sd_of_exp(group, "reference.train.log_rir"))
        for task in ("harmful", "primary"):
            before, after = (
                median_steps(group, f"gd.{task}.{side}.loss") for side in ("before", "after")
            )
            cells.append(f"{before} -> {after}")
        rows.append([method, *cells])
    return markdown_table(header, rows)


def footing_tables(records: Sequence[Record]) -> str:
    """Every footing and split: log (i), log (ii), log RIR, fraction of the limit, RIR itself."""
    parts = []
    for footing in ("damped", "pseudo_inverse", "reference"):
        for split in ("train", "held_out"):
            prefix = f"{footing}.{split}."
            columns: list[tuple[str, Callable[[Sequence[Record]], str]]] = [
                (title, lambda group, key=prefix + name: mean_sd(group, key))
                for title, name in (
                    ("log (i)", "log_ratio_harmful"),
                    ("log (ii)", "log_ratio_primary"),
                    ("log RIR", "log_rir"),
                )
            ]
            if footing == "damped":
                columns.append(
                    ("of limit", lambda g, key=prefix + "log_fraction": mean_sd(g, key, 3))
                )
            for title, name in (
                ("(i)", "log_ratio_harmful"),
                ("(ii)", "log_ratio_primary"),
                ("RIR", "log_rir"),
            ):
                columns.append((title, lambda g, key=prefix + name: mean_sd_of_exp(g, key)))
            rows = [
                [method, *(column(group) for _, column in columns)]
                for method, group in by_method(records).items()
            ]
            title = f"**{footing.replace('_', '-')}, {split.replace('_', '-')} rows**: mean (sd)"
            parts.append(
                title + "\n\n" + markdown_table(["method", *(t for t, _ in columns)], rows)
            )
    return "\n\n".join(parts)


def steps_table(records: Sequence[Record], attacker: str = "gd") -> str:
    """Median steps of an attacker before and after, to 1 % in loss and in parameters."""
    header = ["method"]
    keys = []
    for task in ("harmful", "primary"):
        for target in ("loss", "parameters"):
            for backbone in ("before", "after"):
                header.append(f"{task}, 1 % {target}, {backbone}")
                keys.append(f"{attacker}.{task}.{backbone}.{target}")
    rows = [
        [method, *(median_steps(group, key) for key in keys)]
        for method, group in by_method(records).items()
    ]
    return markdown_table(header, rows)
