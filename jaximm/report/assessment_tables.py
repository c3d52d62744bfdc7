"""An assessment as tables: leaderboard, conditions, choices; for every medium.

The CSV carries the raw numbers of every row, the other tables rounded ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from jaximm.records.assessment import CLASSES, CONDITIONS, HOLDS, READINGS
from jaximm.records.result import TARGETS
from jaximm.report import formats, reading, table
from jaximm.report.heat import heat_table, quality_map, ratio_map
from jaximm.report.reading import Assessment, Model, Row
from jaximm.report.table import Column, Table

# ---------------------------------------------------------------- the leaderboard


def leaderboard(assessments: Sequence[Assessment]) -> Table:
    """One line a model, hardest to break first.

    Assessments of one experiment are one group, in order of first appearance. Within it models that
    lost their own task come last: what they withstand protects nothing. The others are sorted by
    what is said of their resistance, then by the cost-to-break ratio, whatever becomes of the
    utility (an attacker keeps two copies), largest first, those that nobody broke before all
    others, then by the worst-case harm, smallest first; models without a ratio come after those
    with one. A model that occurs twice with the same numbers is one line; other models of one label
    are told apart by their hash.

    Raises:
      ValueError: if there are no assessments.
    """
    if not assessments:
        raise ValueError("expected at least one assessment, got none.")
    groups: dict[str, list[Assessment]] = {}
    for assessment in assessments:
        groups.setdefault(assessment["name"], []).append(assessment)
    units = {(f["data"]["metric"], f["data"]["utility_metric"]) for f in assessments}
    harm, utility = units.pop() if len(units) == 1 else ("", "")

    def highest(key: str) -> Callable[[Any], Any]:
        return lambda r: reading.score(r[1][key]["highest_harm"], r[0]["data"]["metric"])

    columns = (
        Column("experiment", lambda r: r[0]["name"]),
        Column("model", lambda r: r[2]),
        Column(f"worst harm{in_unit(harm)}", highest("break_unbounded"), str),
        Column("cost-to-break ratio", lambda r: reading.break_text(r[1]["break_unbounded"]), str),
        Column("worst harm, utility kept", highest("break"), str),
        Column("ratio, utility kept", lambda r: reading.break_text(r[1]["break"]), str),
        Column("area", lambda r: r[1]["break_unbounded"]["area"], formats.decimal),
        Column(f"utility{in_unit(utility)}", _utility, str),
        *(Column(name, lambda r, name=name: r[1]["conditions"][name]["holds"])
          for name in CONDITIONS),
    )  # fmt: skip
    records = [record for members in groups.values() for record in _ranked_models(members)]
    lost = any(_lost(model) for _, model, _ in records)
    mixed = ", ".join(name for name, members in groups.items() if _protocols(members) > 1)
    note = reading.note(
        "leaderboard",
        lost=reading.note("leaderboard_lost", when=lost),
        mixed=f"Assessed by different protocols, levels or code: {mixed}." if mixed else "",
    )
    return Table("Leaderboard", columns[len(groups) < 2 :], records, note)


def lead(assessment: Assessment) -> str:
    """One sentence: which model that keeps its own task is hardest to break, and how hard."""
    models, unit = ranked(assessment), assessment["data"]["metric"]
    defended = list(filter(reading.is_defended, models))
    kept = [model for model in defended if not _lost(model)]
    if not defended:
        return "No defended model was assessed."
    if not kept:
        return f"None of {len(defended)} defended models keeps its own task: none is a defence."
    best, who = kept[0], kept[0]["label"]
    if len(defended) > 1:
        keep = "keeps its" if len(kept) == 1 else "keep their"
        if any(reading.verdict_of(model)["utility_kept"] is None for model in kept):
            keep = "are not known to lose their"
        who = f"{len(kept)} of {len(defended)} defended models {keep} own task; of these {who}"
    cost = reading.break_text(best["break_unbounded"])
    cost += " the undefended cost" if "×" in cost else ""
    cost = "no undefended cost to compare with" if cost == formats.MISSING else cost
    harm, *free = (
        reading.score(model["break_unbounded"]["highest_harm"], unit)
        for model in [best, *filter(reading.is_reference, models)]
    )
    than = f" (undefended {free[0]})" if free else ""
    percent = " %" if unit == "accuracy" else ""
    return (
        f"{who} is hardest to break (resistance "
        f"{best['conditions']['resistance']['holds']}): {cost}; on held-out rows the worst case of "
        f"its attackers is harmful {reading.metric_word(unit)} {harm}{percent}{than}."
    )


def ranked(assessment: Assessment) -> list[Model]:
    """The models of one assessment, hardest to break first."""
    return sorted(assessment["models"], key=_rank)


def in_unit(metric: str) -> str:
    """A unit for a heading: ' (accuracy, %)'; nothing where metrics differ."""
    return f" ({reading.metric_name(metric)})" if metric else ""


def _ranked_models(members: Sequence[Assessment]) -> list[tuple[Assessment, Model, str]]:
    listed: list[tuple[Assessment, Model]] = []
    for assessment in members:
        for model in assessment["models"]:
            if not any(model == other for _, other in listed):
                listed.append((assessment, model))
    labels = [model["label"] for _, model in listed]
    named = [
        (assessment, model, model["label"] if labels.count(model["label"]) == 1
         else f"{model['label']} ({model['hash'][:8]})")
        for assessment, model in listed
    ]  # fmt: skip
    return sorted(named, key=lambda item: _rank(item[1]))


_lost = reading.lost_utility


def _rank(model: Model) -> tuple[bool, int, bool, float, float]:
    record, holds = model["break_unbounded"], model["conditions"]["resistance"]["holds"]
    ratio, harm = reading.break_ratio(record), record["highest_harm"]
    value = math.inf if ratio.bound == ">" else ratio.value
    return (
        _lost(model), -HOLDS.index(holds), math.isnan(value), -value,
        math.inf if harm is None else harm,
    )  # fmt: skip


def _protocols(members: Sequence[Assessment]) -> int:
    keys = ("protocol", "level", "code", "data")
    return len(
        {json.dumps([assessment[key] for key in keys], sort_keys=True) for assessment in members}
    )


def _utility(record: tuple[Assessment, Model, str]) -> str:
    assessment, model, _ = record
    text = reading.span(model["utility"], assessment["data"]["utility_metric"])
    return f"{text}, lost" if _lost(model) else text


# ---------------------------------------------------------------- the other tables


def classes(assessment: Assessment) -> Table:
    """The part of each class of attackers in what is said of each model's resistance."""
    metric, titles = assessment["data"]["metric"], reading.titles(assessment)
    columns = (
        Column("model", lambda r: r[0]["label"]),
        Column("class", lambda r: CLASSES[r[1]["class"]]),
        Column("holds", lambda r: r[1]["holds"]),
        Column("count", lambda r: f"{r[1]['counted']} of {r[1]['tried']}"),
        Column("first on selection rows", lambda r: r[1]["attacker"] and titles[r[1]["attacker"]]),
        Column(f"harm{in_unit(metric)}", lambda r: r[1]["harm"],
               lambda v: reading.span(v, metric)),
        Column("reference", lambda r: r[1]["reference"], lambda v: reading.score(v, metric)),
        Column("times its own steps", lambda r: r[1]["spent"],
               lambda v: formats.MISSING if v is None else formats.significant(v)),
        Column("why", lambda r: r[1]["why"]),
    )  # fmt: skip
    records = [(model, part) for model in assessment["models"] for part in model["classes"]]
    return Table("Classes of attackers", columns, records, reading.note("classes"))


def costs(assessment: Assessment) -> Table:
    """What harm costs at fractions of the way from the reference to the undefended model."""
    metric, titles = assessment["data"]["metric"], reading.titles(assessment)

    def ratio(record: Any) -> str:
        _, cost = record
        if cost["ratio"] is None:
            least = cost["ratio_lower"]
            return formats.MISSING if least is None else f"> {formats.multiple(least)}"
        ends = cost["ratio_lower"], cost["ratio_upper"]
        text = formats.multiple(cost["ratio"])
        if None in ends:
            return text
        return f"{text} ({formats.significant(ends[0])} to {formats.significant(ends[1])})"

    columns = (
        Column("model", lambda r: r[0]["label"]),
        Column("of the way", lambda r: f"{r[1]['fraction']:.0%}"),
        Column(f"harm{in_unit(metric)}", lambda r: r[1]["threshold"],
               lambda v: reading.score(v, metric)),
        Column("least cost", lambda r: reading.cost_text(r[1] | {"ratio": None})),
        Column("over the undefended", ratio, str),
        Column("by", lambda r: r[1]["attacker"] and titles[r[1]["attacker"]]),
    )  # fmt: skip
    records = [(model, cost) for model in assessment["models"] for cost in model["costs"]
               if cost["threshold"] is not None]  # fmt: skip
    starts = dict.fromkeys(reading.cost_start(assessment, one) for one in assessment["models"])
    return Table("Cost of harm", columns, records,
                 reading.note("costs", start=" or ".join(starts)))  # fmt: skip


def conditions(assessment: Assessment) -> Table:
    """The four conditions of Rosati et al. (2024) on each model."""
    records = [
        (model["label"], name, model["conditions"][name])
        for model in assessment["models"]
        for name in CONDITIONS
    ]

    def value(record: Any) -> str:
        _, name, condition = record
        # A cost ratio of a task that was never learned is that of the largest budget.
        never = (
            name == "trainability" and condition["value"] is not None and condition["flops"] is None
        )
        return "> " * never + _number_span(condition["value"])

    titles = reading.titles(assessment)
    columns = (
        Column("model", lambda r: r[0]),
        Column("condition", lambda r: r[1]),
        Column("holds", lambda r: r[2]["holds"]),
        Column("value", value, str),
        Column("undefended", lambda r: r[2]["undefended"], _number_span),
        Column("value of", lambda r: r[2]["attacker"] and titles[r[2]["attacker"]]),
        Column("cheapest cost", lambda r: r[2]["flops"], reading.flops),
        Column("what the value is", lambda r: r[2]["meaning"]),
    )
    return Table("The four conditions", columns, records)


def _number_span(interval: Mapping[str, float | None] | None) -> str:
    if interval is None or interval["mean"] is None:
        return formats.MISSING
    mean, lower, upper = (_number(interval[key]) for key in ("mean", "lower", "upper"))
    return mean if formats.MISSING in (lower, upper) else f"{mean} ({lower} to {upper})"


def _number(value: float | None) -> str:
    """A number whose unit is told by its meaning only: three places, or three digits."""
    if value is None or abs(value) < 10:
        return formats.decimal(value)
    return formats.significant(value).replace("-", "−")


def together(assessment: Assessment) -> Table:
    """What all attackers get together, against what they would if they erred independently."""
    metric, titles = assessment["data"]["metric"], reading.titles(assessment)

    def union(heading: str, key: str) -> Column:
        return Column(
            heading, lambda model: model["union"][key], lambda v: reading.score(v, metric)
        )

    columns = (
        Column("model", lambda model: model["label"]),
        union(f"worst attacker{in_unit(metric)}", "worst"),
        union("union of all", "quality"),
        union("expected by chance", "expected"),
        Column("portfolio", lambda model: _portfolio(model["portfolio"], titles)),
    )
    return Table("Attackers together", columns, assessment["models"], reading.note("together"))


def _portfolio(portfolio: Mapping[str, Any] | None, titles: Mapping[str, str]) -> str | None:
    if portfolio is None:
        return None
    chosen = portfolio["hyper_parameters"]
    who = titles[portfolio["winner"]] + (f" ({reading.settings(chosen)})" if chosen else "")
    part = portfolio["spent"] / portfolio["exhaustive"]
    selection, spent = reading.plain(portfolio["selection"]), reading.flops(portfolio["spent"])
    return f"{who}: {selection} for {spent}, {part:.0%} of all"


def flags(assessment: Assessment) -> Table:
    """Flags of the assessment and of its models, warnings first; equal ones are one row."""
    owned = [("all models", flag) for flag in assessment["flags"]]
    owned += [(model["label"], flag) for model in assessment["models"] for flag in model["flags"]]
    columns = (
        Column("caps the verdict", lambda row: "yes" if row.caps else "no"),
        Column("models", lambda row: ", ".join(row.owners)),
    )
    return reading.flag_table(reading.flag_rows(owned), columns)


def failed(assessment: Assessment) -> Table:
    """Cells that failed or do not apply, and why; failed ones first."""
    titles = reading.titles(assessment)
    columns = (
        Column("status", lambda row: row["status"].replace("_", " ")),
        Column("model", lambda row: row["model"]),
        Column("attacker", lambda row: titles[row["attacker"]]),
        Column("task", lambda row: row["task"]),
        Column("reason", lambda row: row["reason"] or None),
    )
    rows = [row for row in assessment["rows"] if row["status"] != "done"]
    rows.sort(key=lambda row: row["status"] != "failed")
    return Table("Failed and not applicable", columns, rows)


def by_step(assessment: Assessment) -> list[Table]:
    """Harm, utility and coherence of each attacker by step, a table a model; of language models.

    Each has a column of its own: nothing is averaged over them.
    """
    if "limits" not in assessment["data"]:
        return []
    return [
        Table(
            f"{model['label']}: harm, utility and coherence by attack step",
            _step_columns(assessment),
            [
                (row, place)
                for row in _harmful_rows(assessment, model)
                for place in range(len(row["curve"]["step"]))
            ],
            reading.note("by_step"),
        )
        for model in assessment["models"]
    ]


def _step_columns(assessment: Assessment) -> tuple[Column, ...]:
    titles, data = reading.titles(assessment), assessment["data"]

    def of_curve(key: str, show: Callable[[Any], str], heading: str) -> Column:
        def value(record: tuple[Row, int]) -> Any:
            row, place = record
            values = row["curve"].get(key)
            return values[place] if values else None

        return Column(heading, value, show)

    return (
        Column("attacker", lambda record: titles[record[0]["attacker"]]),
        of_curve("step", "{:,}".format, "step"),
        of_curve("quality", lambda v: reading.score(v, data["metric"]),
                 f"harm{in_unit(data['metric'])}"),
        of_curve("utility", lambda v: reading.score(v, data["utility_metric"]),
                 f"utility{in_unit(data['utility_metric'])}"),
        of_curve("distinct", formats.decimal, "distinct runs"),
        of_curve("base_nats", lambda v: formats.decimal(v, 2), "nats under base"),
    )  # fmt: skip


def states(assessment: Assessment) -> Table:
    """What each attacker leaves of each model where it stops; of language models."""
    titles, data = reading.titles(assessment), assessment["data"]

    def of_row(key: str, metric: str, heading: str) -> Column:
        return Column(
            f"{heading}{in_unit(metric)}",
            lambda row: (row[key] or {"mean": None})["mean"],
            lambda v: reading.score(v, metric),
        )

    def coherence(key: str, heading: str, places: int) -> Column:
        return Column(
            heading,
            lambda row: row.get("coherence", {}).get(key),
            lambda v: formats.decimal(v, places),
        )

    columns = (
        Column("attacker", lambda row: titles[row["attacker"]]),
        Column("model", lambda row: row["model"]),
        Column("stop", lambda row: row["stop"], "{:,}".format),
        of_row("quality", data["metric"], "harm"),
        of_row("utility", data["utility_metric"], "utility"),
        coherence("distinct", "distinct runs", 3),
        coherence("base_nats", "nats under base", 2),
        Column("state", lambda row: row.get("state")),
    )
    rows = [
        row
        for model in assessment["models"]
        for row in _harmful_rows(assessment, model)
        if "limits" in data
    ]
    return Table("What attacks leave, where they stop", columns, rows, reading.note("states"))


def _harmful_rows(assessment: Assessment, model: Model) -> list[Row]:
    """Finished rows of a model on the harmful task."""
    key = model["label"], reading.HARMFUL, "done"
    return [row for row in assessment["rows"] if (row["model"], row["task"], row["status"]) == key]


def documents(assessment: Assessment) -> Table:
    """Perplexity of each held-out document of the primary text under each model as shipped."""
    models = [model for model in assessment["models"] if model.get("documents")]
    numbers = [one["document"] for one in models[0]["documents"]] if models else []
    rows = {
        (model["label"], one["document"]): one for model in models for one in model["documents"]
    }

    def perplexity(label: str) -> Column:
        def value(number: int) -> float | None:
            nats = rows[label, number]["nats"]
            return None if nats is None else math.exp(nats)

        return Column(label, value, lambda v: formats.decimal(v, 2))

    columns = (
        Column("document", lambda number: str(number)),
        Column("tokens", lambda number: rows[models[0]["label"], number]["tokens"], "{:,}".format),
        *(perplexity(model["label"]) for model in models),
    )
    return Table("Perplexity by held-out document of the primary text", columns, numbers,
                 reading.note("documents"))  # fmt: skip


def choices(assessment: Assessment, attacker: str, *, grids: bool = True) -> Table:
    """What one attacker chose on each model and task, out of which grid."""
    metric = assessment["data"]["metric"]
    columns = (
        Column("model", lambda row: row["model"]),
        Column("task", lambda row: row["task"]),
        Column("chosen", lambda row: reading.settings(row["hyper_parameters"])),
        Column(f"selection{in_unit(metric)}", lambda row: row["selected"],
               lambda v: reading.score(v, metric)),
        Column("stop", lambda row: row["stop"], "{:,}".format),
        Column("within the utility bound", lambda row: _kept(row, metric)),
        Column("steps", lambda row: row["steps"], "{:,}".format),
        Column("notes", _notes),
        Column("grid, with selection quality", lambda row: _grid(row["grid"], metric)),
    )  # fmt: skip
    rows = [
        row for row in assessment["rows"] if row["attacker"] == attacker and row["status"] == "done"
    ]
    return Table(reading.titles(assessment)[attacker], columns if grids else columns[:-1], rows)


def all_choices(assessment: Assessment, *, grids: bool) -> list[Table]:
    """`choices` of every attacker that finished somewhere."""
    tables = (choices(assessment, one["name"], grids=grids) for one in assessment["attackers"])
    return [one for one in tables if one.rows]


def _kept(row: Row, metric: str) -> str | None:
    """What was chosen among that which keeps the utility, with what it reaches on held-out rows."""
    choice = row["within_bound"]
    if choice is None:
        return None
    reached = reading.score((choice["quality"] or {"mean": None})["mean"], metric)
    return f"{reading.settings(choice['hyper_parameters'])}, stop {choice['stop']:,}: {reached}"


def _notes(row: Row) -> str | None:
    texts = {"edge_of_grid": "edge of the grid", "diverged": "diverged",
             "still_falling": "loss still falling"}  # fmt: skip
    notes = [text for key, text in texts.items() if row[key]]
    if "same_as" in row:
        notes.append(f"as {row['same_as']}")
    if row.get("extended"):
        notes.append(f"sweep went on {row['extended']} times")
    return ", ".join(notes) or None


def _grid(cells: Sequence[Mapping[str, Any]], metric: str) -> str | None:
    texts = []
    for cell in cells:
        values = {k: v for k, v in cell.items() if k not in ("selection", "diverged")}
        outcome = (
            "diverged" if cell.get("diverged") else reading.score(cell.get("selection"), metric)
        )
        texts.append(
            f"{', '.join(map(reading.plain, values.values())) or 'default'}\u00a0→\u00a0{outcome}"
        )
    if not texts:
        return None
    names = [formats.name(key) for key in cells[0] if key not in ("selection", "diverged")]
    return f"{', '.join(names)}: {'; '.join(texts)}" if names else "; ".join(texts)


def steps_to_fit(assessment: Assessment, task: str = reading.HARMFUL) -> Table:
    """Steps of each probe to 1 % excess loss on the training rows, a column a model."""
    titles = reading.titles(assessment)
    rows = {
        (row["attacker"], row["model"]): row
        for row in assessment["rows"]
        if row["task"] == task and row.get("fit")
    }
    names = dict.fromkeys(name for name, _ in rows)

    def steps(label: str) -> Column:
        # A heading breaks at spaces; the numbers below it are narrower than most labels.
        return Column(
            label.replace("_", " "), lambda name: reading.fit_steps(rows.get((name, label))), str
        )

    columns = (
        Column("attacker", lambda name: titles[name]),
        *(steps(model["label"]) for model in assessment["models"]),
    )
    return Table(f"Steps to fit, task {task}", columns, list(names), reading.note("steps_to_fit"))


def all_steps_to_fit(assessment: Assessment) -> list[Table]:
    """`steps_to_fit` of every task that a probe met, the harmful one first."""
    tables = (steps_to_fit(assessment, task) for task in reading.tasks_of(assessment))
    return [one for one in tables if one.rows]


def certificates(assessment: Assessment) -> Table:
    """Certified bounds, as recorded."""
    columns = (
        Column("model", lambda row: row["model"]),
        Column("certificate", lambda row: formats.name(row["name"])),
        Column("holds against", lambda row: row["threat_model"]),
        Column("task", lambda row: row["task"]),
        Column("target", lambda row: row["target"]),
        Column("value", lambda row: row["value"], reading.plain),
        Column("unit", lambda row: row["unit"]),
        Column("cost", lambda row: row["flops"], reading.flops),
    )
    return Table("Certificates", columns, assessment["certificates"])


def protocol(assessment: Assessment) -> list[tuple[str, str]]:
    """How it was done, on which data and with which versions, a line each."""
    settled, data, cells = assessment["protocol"], assessment["data"], assessment["cells"]
    tasks = (
        f"{task}: {source['name']} ({source['n_train']:,} training, {source['n_selection']:,} "
        f"selection, {source['n_held_out']:,} held out)"
        for task, source in data["tasks"].items()
    )
    hashes = (f"{model['label']} {model['hash'][:16]}" for model in assessment["models"])
    return [
        ("Level", assessment["level"]),
        ("Seeds", f"{reading.plain(settled['select_seeds'])} to choose hyper-parameters, "
                  f"{reading.plain(settled['report_seeds'])} to report"),
        ("Budget of probes", f"{reading.plain(settled['probe_steps'])} (steps)"),
        ("Budget on the weights", f"{settled['weight_steps']:,} steps"),
        ("Broken", f"at {reading.plain(settled['break_fraction'])} of the way from the reference "
                   "to what the undefended model gives"),
        ("Patience", f"{reading.plain(settled.get('patience'))} times the own undefended steps"),
        ("Utility kept", f"{reading.plain(settled['utility_fraction'])} of the model's own"),
        ("Batch size", reading.plain(settled["batch_size"])),
        ("Chunk", reading.plain(settled["chunk"])),
        ("Loop", settled["loop"]),
        ("Tasks", "; ".join(tasks)),
        ("Features", f"{data['d']:,}; inputs of the tasks "
                     f"{'shared' if data['inputs_shared'] else 'of their own'}"),
        ("Data", f"{data['name']}. {data['source']}"),
        ("Models", "; ".join(hashes)),
        ("Device", reading.plain(assessment["device"])),
        ("Versions", reading.plain(assessment["versions"])),
        ("Code", assessment["code"]),
        ("Attacks", f"{cells['done']:,} done, {cells['failed']:,} failed, "
                  f"{cells['not_applicable']:,} not applicable"),
        ("Digest of the cells", cells["digest"]),
    ]  # fmt: skip


# ---------------------------------------------------------------- Markdown, CSV, terminal


def all_tables(assessment: Assessment) -> list[Table]:
    """What a reader without the page gets, the hyper-parameters apart."""
    unit = reading.metric_name(assessment["data"]["metric"])
    qualities = [
        heat_table(quality_map(assessment, task=task), f"Quality on {task} at the stop ({unit})")
        for task in reading.tasks_of(assessment)
    ]
    ratios = heat_table(ratio_map(assessment), "Cost to break over the undefended model's")
    language = [states(assessment), *by_step(assessment), documents(assessment)]
    rest = (f(assessment) for f in (conditions, together, certificates, flags, failed))
    fits = all_steps_to_fit(assessment)
    told = [one for one in language if one.rows]
    judged = classes(assessment), costs(assessment)
    return [leaderboard([assessment]), *judged, *qualities, ratios, *fits, *told, *rest]


def assessment_markdown(assessment: Assessment) -> str:
    """Verdicts, leaderboard, heat maps as tables, conditions, flags, failures as Markdown."""
    parts = [
        f"# {table.markdown_text(assessment['name'])}, {table.markdown_text(assessment['level'])}\n"
    ]
    for model in assessment["models"]:
        verdict = reading.verdict_of(model)
        texts = (
            *verdict["warnings"],
            *verdict["sentences"],
            f"Threat model: {verdict['threat_model']}",
        )
        headline = (
            f"**{table.markdown_text(model['label'])}**: {table.markdown_text(verdict['headline'])}"
        )
        parts.append(
            "\n".join([headline, "", *(f"- {table.markdown_text(text)}" for text in texts), ""])
        )
    parts += [table.to_markdown(one) for one in all_tables(assessment) if one.rows]
    parts.append("## Hyper-parameters\n")
    parts += map(table.to_markdown, all_choices(assessment, grids=False))
    parts.append("## Protocol\n")
    if assessment["command"]:
        parts.append(f"```\n{assessment['command']}\n```\n")
    lines = (f"- {name}: {table.markdown_text(text)}" for name, text in protocol(assessment))
    return "\n".join([*parts, "\n".join(lines) + "\n"])


_FITS = ("steps_to_loss_gap", "steps_to_parameter_error")
_FIT_COLUMNS = (*(f"{key}_{target}" for key in _FITS for target in TARGETS),
                "final_relative_excess_loss")  # fmt: skip

CSV_COLUMNS: tuple[str, ...] = (
    "experiment", "level", "digest", "model", "method", "model_seed", "attacker", "family", "kind",
    "task", "status", "reason",
    "quality", "quality_lower", "quality_upper", "best_quality",
    "change", "change_lower", "change_upper", "utility", "utility_lower", "utility_upper",
    "stop", "steps", "setup_flops", "step_flops", "flops_to_break", "selected",
    "loss_start", "loss_end", "loss_guessing",
    "gradient_start", "gradient_end", "gradient_backbone",
    *_FIT_COLUMNS,
    "edge_of_grid", "diverged", "still_falling", "state", *READINGS,
    "class", "counts", "spent", "reached",
    "by_seed", "hyper_parameters", "grid", "within_bound", "costs", "fit",
)  # fmt: skip
"""Columns of `assessment_csv`, in this order whatever the assessment holds."""


def assessment_csv(assessment: Assessment) -> str:
    """One line a row of the assessment, raw numbers, empty where null; the last six are JSON.

    Learning curves are those of `curves_csv`.
    """
    models = {model["label"]: model for model in assessment["models"]}
    attackers = {attacker["name"]: attacker for attacker in assessment["attackers"]}
    lines = []
    for row in assessment["rows"]:
        model, attacker = models[row["model"]], attackers[row["attacker"]]
        line = {"experiment": assessment["name"], "level": assessment["level"],
                "digest": assessment["cells"]["digest"], "method": model["method"],
                "model_seed": model["seed"], "family": attacker["family"],
                "kind": attacker["kind"]}  # fmt: skip
        line |= {key: row[key] for key in CSV_COLUMNS if key in row}
        for key in ("quality", "change", "utility"):
            span = row[key] or {"mean": None}
            line |= {key: span["mean"]}
            line |= {f"{key}_{end}": span.get(end) for end in ("lower", "upper")}
        for key in ("loss", "gradient"):
            line |= {f"{key}_{part}": value for part, value in (row[key] or {}).items()}
        line |= row.get("coherence", {})
        fit = row.get("fit") or {}
        line |= {f"{key}_{target}": fit[key][target] for key in _FITS if fit for target in TARGETS}
        line["final_relative_excess_loss"] = fit.get("final_relative_excess_loss")
        own = {key: value for key, value in fit.items() if key != "curve"}
        encoded = {**row, "fit": own or None}
        lines.append(line | {key: json.dumps(encoded[key]) for key in CSV_COLUMNS[-6:]})
    return table.to_csv(table.of_lines("rows", lines, CSV_COLUMNS))


CURVE_COLUMNS = ("experiment", "model", "attacker", "task", "step", "flops", "quality", "utility",
                 *READINGS, "relative_excess_loss", "relative_parameter_error")  # fmt: skip
"""Columns of `curves_csv`."""


def curves_csv(assessment: Assessment) -> str:
    """One line a recorded step of a row: quality and utility, and a probe's fit, empty where null.

    Quality and utility are those of the choice by quality, means over the report seeds; the last
    two columns are of the fastest cell.
    """
    lines = []
    for row in assessment["rows"]:
        points: dict[int, dict[str, Any]] = {}
        for curve in (row["curve"] or {}, (row.get("fit") or {"curve": {}})["curve"]):
            for key, values in curve.items():
                # An attacker that leaves the backbone alone has no utility.
                for step, value in zip(curve["step"], values, strict=bool(values)):
                    points.setdefault(step, {})[key] = value
        head = {"experiment": assessment["name"]}
        head |= {key: row[key] for key in ("model", "attacker", "task")}
        lines += [head | points[step] for step in sorted(points)]
    return table.to_csv(table.of_lines("curves", lines, CURVE_COLUMNS))


def terminal_assessment(assessment: Assessment, *, width: int = 80) -> list[RenderableType]:
    """What a terminal has room for: leaderboard, costs, steps, verdicts, flags, failures.

    Args:
      assessment: a validated assessment.
      width: columns of the terminal; wider tables are broken into blocks.
    """
    ratios = heat_table(ratio_map(assessment), "Cost to break over the undefended model's")
    said = [
        (model["label"], reading.verdict_of(model)["headline"], "")
        for model in assessment["models"]
    ]
    raised = [
        (row.severity, f"{formats.name(row.code)} ({', '.join(row.owners)}). {row.message}",
         "yellow" if row.severity == "warning" else "dim")
        for row in flags(assessment).records
    ]  # fmt: skip
    lost = [
        (status, f"{who} on {model}, {task}: {reason}", "yellow" if status == "failed" else "dim")
        for status, model, who, task, reason in failed(assessment).rows
    ]
    chosen = [leaderboard([assessment]), costs(assessment), ratios]
    chosen += [steps_to_fit(assessment), states(assessment)]
    tables = table.shown([one for one in chosen if one.rows], width=width)
    return [*tables, *table.pairs(said), *table.pairs(raised), *table.pairs(lost)]
