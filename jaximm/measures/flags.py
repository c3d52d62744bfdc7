"""Flags: when a number should not be believed, or does not mean what it seems to.

Each rule looks at one result and returns a flag or nothing; `flags_of` runs them all. A result is
plain JSON (`jaximm.records.files.plain`): numbers that are infinite or not defined are None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaximm import immunisers

Flag = dict[str, Any]
Result = Mapping[str, Any]


RECOVERED = 0.01
"""Harmful accuracy within this of before is called the same."""


def flag(code: str, severity: str, message: str, *, caps: bool = False) -> Flag:
    """A flag as documents have it.

    Args:
      code: its name.
      severity: "warning" or "info".
      message: what was found and what to do.
      caps: whether what was measured cannot be trusted, so that a verdict is at most "unknown".
    """
    return {"code": code, "severity": severity, "message": message, "caps": caps}


def _measure(result: Result, split: str = "train") -> Mapping[str, Any] | None:
    return result["conditioning"].get("damped", {}).get(split)


def _meaningful(result: Result, split: str = "train") -> Mapping[str, Any] | None:
    """The damped row; that of the pseudo-inverse where a deep backbone lost directions."""
    if _lost_ranks(result):
        return result["conditioning"].get("pseudo_inverse", {}).get(split)
    return _measure(result, split)


def inputs_shared(document: Result) -> Flag | None:
    """The tasks share their input Gram matrix: of a result, or of an assessment."""
    if not document["data"]["inputs_shared"]:
        return None
    return flag(
        "inputs_shared",
        "warning",
        "Both tasks have the same input Gram matrix: RIR is 1 for every backbone. The method "
        "separates input distributions, not labels.",
    )


def same_numbers(result: Result) -> Flag | None:
    """A deep backbone has one content hash before and after."""
    backbone = result.get("backbone")
    if backbone is None or result["method"] == "none":
        return None
    if backbone["hash_before"] != backbone["hash_after"]:
        return None
    return flag(
        "same_numbers",
        "warning",
        f"All parameters of the {backbone['model']} are bit for bit those it came with (one "
        "content hash): the method did not run, or its result was not saved.",
    )


def unchanged(result: Result) -> Flag | None:
    """Before equals after, as far as the features show; `same_numbers` says so of parameters."""
    row = _measure(result)
    if row is None or result["method"] == "none" or row["log_rir"] is None:
        return None
    if same_numbers(result):
        return None
    before, after = result["spectra"]["harmful"]["before"], result["spectra"]["harmful"]["after"]
    if None in before or None in after:
        return None
    scale = after[0] / before[0] if before and after and before[0] else 1.0
    same = len(before) == len(after) and all(
        abs(b * scale - a) <= 1e-9 * after[0] for b, a in zip(before, after, strict=True)
    )
    if not same or abs(row["log_rir"]) > 1e-9:
        return None
    if "backbone" in result:
        return flag(
            "before_equals_after",
            "warning",
            "Parameters moved, but the features' spectra are those of before: nothing was gained.",
        )
    return flag(
        "before_equals_after", "warning", "The backbone is the one it started from: nothing moved."
    )


def damping_dominates(result: Result) -> Flag | None:
    """The damping, not the data, sets the smallest eigenvalue."""
    row = _measure(result)
    if row is None:
        return None
    tasks = [t for t in ("primary", "harmful") if row[t]["before"]["dominated_by"] == "damping"]
    if not tasks:
        return None
    return flag(
        "kappa_damping",
        "info",
        f"The raw Gram matrix of the {' and the '.join(tasks)} task has directions below the "
        "damping: kappa and the limit depend on it (the limit grows like 1 / damping^2).",
    )


def rounding_dominates(result: Result) -> Flag | None:
    """A kappa is beyond its dtype."""
    bad = [
        f"{footing}, {split}, {task} {when}"
        for footing, splits in result["conditioning"].items()
        if footing != "reference"
        for split, row in splits.items()
        for task in ("primary", "harmful")
        for when in ("before", "after")
        if row[task][when]["dominated_by"] == "rounding"
    ]
    if not bad:
        return None
    return flag(
        "kappa_rounding",
        "warning",
        f"Round-off decides {len(bad)} condition numbers ({'; '.join(bad[:3])}"
        f"{' ...' if len(bad) > 3 else ''}): no measurement in {result['dtype']}.",
    )


def few_rows(result: Result) -> Flag | None:
    """Fewer rows than features."""
    data = result["data"]
    return rows_below({t: (data[t]["n_train"], data[t]["d"]) for t in ("primary", "harmful")})


FEW_HELD_OUT = 50
"""On fewer rows the standard error of an accuracy may be above 7 points."""


def few_held_out(result: Result) -> Flag | None:
    """Quality of a handful of rows."""
    counts = {task: result["data"][task]["n_held_out"] for task in ("primary", "harmful")}
    few = [f"{task} {count}" for task, count in counts.items() if count < FEW_HELD_OUT]
    if not few:
        return None
    return flag(
        "few_held_out",
        "warning",
        f"Few held-out rows ({', '.join(few)}): of n rows an accuracy has a standard error of up "
        "to 1 / (2 sqrt(n)), and a condition number of them is not that of the task. Hold out "
        f"{FEW_HELD_OUT} or more.",
    )


def rows_below(sizes: Mapping[str, tuple[int, int]]) -> Flag | None:
    """Fewer rows than features, of tasks with their (rows, features)."""
    tasks = [task for task, (n, d) in sizes.items() if n < d]
    if not tasks:
        return None
    return flag(
        "n_below_d",
        "info",
        f"Fewer training rows than features ({' and '.join(tasks)}): the Gram matrix is singular "
        "and over-states the limit; read the held-out figures.",
    )


def harmful_easier(result: Result) -> Flag | None:
    """(i) below 1."""
    row = _meaningful(result)
    if row is None or row["log_ratio_harmful"] is None or row["log_ratio_harmful"] >= -0.05:
        return None
    return flag(
        "harmful_easier",
        "warning",
        f"The harmful task became easier: log (i) = {row['log_ratio_harmful']:.2f}. A large RIR "
        "only says that the primary task became easier still.",
    )


def primary_harder(result: Result) -> Flag | None:
    """(ii) above 1."""
    row = _meaningful(result)
    if row is None or row["log_ratio_primary"] is None or row["log_ratio_primary"] <= 0.05:
        return None
    return flag(
        "primary_harder",
        "warning",
        f"The primary task became harder: log (ii) = {row['log_ratio_primary']:.2f}, against the "
        "condition (ii) <= 1.",
    )


def directions_removed(result: Result) -> Flag | None:
    """A deep backbone's features lost rank: damped kappas are then those of rounding."""
    lost = _lost_ranks(result)
    if not lost:
        return None
    ranks = ", ".join(f"{task} {before} to {after}" for task, (before, after) in lost.items())
    return flag(
        "directions_removed",
        "warning",
        f"Directions of the features are gone (rank: {ranks}): in them the damped kappa after is "
        "rounding, and kappas before and after are over different numbers of directions. Read the "
        "pseudo-inverse.",
    )


def _lost_ranks(result: Result) -> dict[str, tuple[int, int]]:
    row = _measure(result)
    if row is None or "backbone" not in result:
        return {}
    ranks = {t: (row[t]["before"]["rank"], row[t]["after"]["rank"]) for t in ("harmful", "primary")}
    return {task: pair for task, pair in ranks.items() if pair[1] < pair[0]}


LOGITS_TOLERANCE = 1e-4
"""How far the limit may move a primary logit, over the largest: what is promised of it."""


def logits_moved(result: Result) -> Flag | None:
    """The closed form, which should keep the primary logits, moved them."""
    change = result.get("logits_change")
    traits = immunisers.about(result["method"].partition("@")[0]).traits
    if change is None or "keeps_logits" not in traits:
        return None
    if change <= LOGITS_TOLERANCE:
        return None
    return flag(
        "logits_moved",
        "warning",
        f"Primary logits moved by {change:.1e} of the largest, by rounding: the neck is too "
        f"ill-conditioned for {result['dtype']}. What the primary task is worth now stands beside "
        "it. A smaller t or more damping keeps them.",
    )


def closed_form_recovers(result: Result) -> Flag | None:
    """RIR above 1, and the harmful accuracy that a closed form gets stays within a point."""
    row, section = _meaningful(result), result["harmful_utility"]
    if row is None or row["log_rir"] is None or row["log_rir"] <= 0.05:
        return None
    if section is None or section["metric"] != "accuracy":
        return None
    before, after = section["before"]["held_out"], section["after"]["held_out"]
    if before is None or after is None or after < before - RECOVERED:
        return None
    return flag(
        "closed_form_recovers",
        "warning",
        f"Conditioning hides nothing: a closed-form probe recovers {after:.3f} held-out accuracy "
        f"on the harmful task, {before:.3f} before.",
    )


def does_not_generalise(result: Result) -> Flag | None:
    """Less than half of the training log RIR on held-out rows."""
    train, held_out = _meaningful(result), _meaningful(result, "held_out")
    if train is None or held_out is None or not train["log_rir"] or train["log_rir"] < 0.5:
        return None
    if held_out["log_rir"] is not None and held_out["log_rir"] >= 0.5 * train["log_rir"]:
        return None
    unseen = "not defined" if held_out["log_rir"] is None else f"{held_out['log_rir']:.2f}"
    return flag(
        "held_out_gap",
        "warning",
        f"log RIR is {train['log_rir']:.2f} on training rows and {unseen} on held-out rows: less "
        "than half of it generalises.",
    )


def utility_lost(result: Result) -> Flag | None:
    """The primary task lost more than 0.02 of held-out quality."""
    section = result["utility"]
    if section is None:
        return None
    before, after = section["before"]["held_out"], section["after"]["held_out"]
    if before is None or after is None or after >= before - 0.02:
        return None
    return flag(
        "utility_lost",
        "warning",
        f"The primary task's held-out {section['metric']} fell from {before:.3f} to {after:.3f}.",
    )


def chosen_on_held_out(result: Result) -> Flag | None:
    """The method's settings were chosen on the rows that are reported."""
    if not result["config"].get("chosen_on_held_out"):
        return None
    return flag(
        "chosen_on_held_out",
        "info",
        "t, damping and shrinkage were chosen on the held-out rows: this method's held-out figures "
        "are optimistic.",
    )


def nothing_to_attack(result: Result) -> Flag | None:
    """Constant targets."""
    if result["data"]["harmful"]["kind"] != "constant":
        return None
    return flag(
        "constant_targets",
        "info",
        "Each task has one constant label: only its images mean something. Condition numbers are "
        "reported; probe attacks would mean nothing and are not run.",
    )


RULES: tuple[Callable[[Result], Flag | None], ...] = (
    inputs_shared,
    same_numbers,
    unchanged,
    harmful_easier,
    primary_harder,
    utility_lost,
    logits_moved,
    closed_form_recovers,
    does_not_generalise,
    directions_removed,
    rounding_dominates,
    few_held_out,
    damping_dominates,
    few_rows,
    chosen_on_held_out,
    nothing_to_attack,
)
"""Every rule, the gravest first."""


def flags_of(result: Result) -> list[Flag]:
    """All flags that a result raises."""
    return [raised_flag for rule in RULES if (raised_flag := rule(result)) is not None]
