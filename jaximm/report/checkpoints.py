"""Two checkpoints of immunised backbones side by side: identity, what moved, kappas, attacks.

Nothing is taken from what the files say about themselves but their identity: features, condition
numbers and attacks are computed anew from the stored parameters on the inputs that are given. Those
can be images of the run that a checkpoint lies in (`recorded_images`, `rows_of_pair`).
A is the reference and B what is measured against it: (i), (ii) and RIR are B over A.

`compare_checkpoints` returns plain JSON values; `all_tables`, `terminal_tables`, `markdown` and
`html` show them.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.table import Table as RichTable

from jaximm.checkpoint import Immunised, load_immunised
from jaximm.measures.conditioning import log_rir_limit
from jaximm.measures.features import Tasks, conditioning_rows, feature_kappas, task_rows
from jaximm.measures.movement import movement
from jaximm.models.backbone import NECK, Backbone, FlatParams, under
from jaximm.records.files import plain
from jaximm.report import compare, formats, page, tables
from jaximm.report.tables import Column, Table

if TYPE_CHECKING:
    from jaximm.data.images import ImagePair

SCHEMA = "jaximm.comparison/1"
"""The value of the key ``schema`` of a comparison."""

TASKS = ("harmful", "primary")
SIDES = ("a", "b")

FOOTINGS = ("damped", "pseudo_inverse", "reference")
"""In the order shown, see `jaximm.measures.features`; the first is the measure."""

ATTACKERS = ("gd", "adam", "conjugate_gradients", "ridge")
"""Probe attackers of a comparison: one of each kind that matters."""

LAYER_ROWS = 20
"""Rows of the table of parameters: those that moved most."""

FOOTING_NAMES = {
    "damped": "damped (the measure)",
    "pseudo_inverse": "pseudo-inverse",
    "reference": "reference code",
}

_SIDES = {"a": "before", "b": "after"}  # the names that conditioning and attack rows use


class TaskInputs(NamedTuple):
    """Rows of one task on which two checkpoints are compared.

    Attributes:
      inputs: preprocessed for the model, [n, ...]; or uint8 RGB images [n, h, w, 3], which each
        checkpoint's own preprocessing turns into its inputs.
      targets: what a probe fits, [n]: real numbers, or integer labels, whose one-hot rows it then
        fits. None: this task is not attacked.
    """

    inputs: Any
    targets: Any = None


def compare_checkpoints(
    a: str | os.PathLike[str] | Immunised,
    b: str | os.PathLike[str] | Immunised,
    *,
    primary: TaskInputs,
    harmful: TaskInputs,
    batch_size: int = 64,
    suite: str = "quick",
    attackers: Sequence[str] | None = ATTACKERS,
    seeds: Sequence[int] = (0,),
    template: Backbone | None = None,
    data: str = "",
) -> dict[str, Any]:
    """Everything about two checkpoints that can be computed from them and rows of both tasks.

    Args:
      a: the reference: a directory that `save_immunised` wrote, or what `load_immunised` gave.
      b: what is measured against it.
      primary: rows of the primary task; integer targets also give the stored heads' accuracy.
      harmful: rows of the harmful task.
      batch_size: rows a pass through the backbone.
      suite: budgets and grids of the attackers, a key of `jaximm.attacks.SUITES`.
      attackers: names; None: all of them; (): none.
      seeds: starts of each attack.
      template: as for `load_immunised`, for models outside the registry.
      data: what the rows are, in words, for the reader.

    Returns:
      See `compare_features`, whose numbers come from the features computed here.

    Raises:
      ValueError: rows that do not fit, an unknown suite or attacker, or see `load_immunised`.
      CheckpointError: a directory that is damaged or no such checkpoint.
    """
    sides = {"a": _loaded(a, template), "b": _loaded(b, template)}
    rows = {"primary": primary, "harmful": harmful}
    runs = {"a": _feature_runner(sides["a"].backbone)}
    same_structure = all(
        getattr(sides["a"].backbone, key) == getattr(sides["b"].backbone, key)
        for key in ("graphdef", "preprocess")
    )
    runs["b"] = runs["a"] if same_structure else _feature_runner(sides["b"].backbone)
    arrays = {
        side: {
            task: _features(runs[side], found.backbone, rows[task].inputs, batch_size)
            for task in TASKS
        }
        for side, found in sides.items()
    }
    targets = {task: rows[task].targets for task in TASKS if rows[task].targets is not None}
    compared = compare_features(
        sides["a"],
        sides["b"],
        features=arrays,
        targets=targets,
        suite=suite,
        attackers=attackers,
        seeds=seeds,
    )
    for side, source in (("a", a), ("b", b)):
        if not isinstance(source, Immunised):
            compared[side]["path"] = os.fspath(source)
    return compared | {"data": data}


def recorded_images(
    *paths: str | os.PathLike[str],
) -> tuple[str, dict[str, Any]]:
    """Name and fields of the image pair that the runs of the checkpoints at `paths` used.

    A run keeps its ``config.json`` beside its checkpoint. A checkpoint without one has no say.

    Raises:
      ValueError: no checkpoint has one, one is not of a deep experiment, or they differ.
    """
    from jaximm.run.config import DeepConfig, read_config

    found: dict[Path, tuple[str, dict[str, Any]]] = {}
    for path in paths:
        file = Path(path).absolute().parent / "config.json"
        if not file.exists():
            continue
        config = read_config(file)
        if not isinstance(config, DeepConfig):
            raise ValueError(f"{file} is of an experiment without images; name an image pair.")
        found[file] = config.images, dict(config.image_fields)
    if not found:
        raise ValueError(
            "no checkpoint has its run's config.json beside it, which names the images; name an "
            "image pair."
        )
    first, *others = found.values()
    if any(other != first for other in others):
        files = " and ".join(map(str, found))
        raise ValueError(f"{files} name different images; name the image pair to compare on.")
    return first


def rows_of_pair(pair: ImagePair, *, rows: int) -> dict[str, TaskInputs]:
    """At most `rows` training images of each task with their labels, evenly spaced over all.

    Raises:
      ValueError: `rows` below 1.
    """
    if rows < 1:
        raise ValueError(f"rows must be >= 1, got {rows}.")
    chosen = {}
    for task in TASKS:
        images, labels = getattr(pair, task).train
        place = np.linspace(0, len(images) - 1, min(rows, len(images))).round().astype(int)
        chosen[task] = TaskInputs(np.asarray(images)[place], np.asarray(labels)[place])
    return chosen


def compare_features(
    a: Immunised,
    b: Immunised,
    *,
    features: Mapping[str, Mapping[str, Any]],
    targets: Mapping[str, Any] | None = None,
    suite: str = "quick",
    attackers: Sequence[str] | None = ATTACKERS,
    seeds: Sequence[int] = (0,),
) -> dict[str, Any]:
    """`compare_checkpoints` on features that are there already.

    Args:
      a: the reference.
      b: what is measured against it.
      features: ``{"a": {"primary": [n, d], "harmful": [n, d]}, "b": ...}`` of the same rows, before
        the neck where there is one: the damped footing needs them so. Necks are the checkpoints'.
      targets: by task, as `TaskInputs.targets`.
      suite: see `compare_checkpoints`.
      attackers: see `compare_checkpoints`.
      seeds: see `compare_checkpoints`.

    Returns:
      Plain JSON values: ``a`` and ``b`` (path, model, method, config, content_hash, width, stored
      conditioning, primary_accuracy of the stored head or None); ``same_numbers``: whether the two
      hold bitwise the same arrays; ``movement`` (`Movement.to_json`) or None with the reason in
      ``movement_note``; ``conditioning`` by footing, with a kappa row a task and side and the log
      ratios (i), (ii) and RIR with their bounds (`conditioning_rows`); ``attacks``, rows of
      `jaximm.attacks.run_suite`; in both "before" is A and "after" is B; ``rows``, the number
      of rows by task.

    Raises:
      ValueError: features that are not [n, d], of other rows in A and B, or targets of other rows.
    """
    targets = dict(targets or {})
    arrays = {side: {task: np.asarray(features[side][task]) for task in TASKS} for side in SIDES}
    _check_rows(arrays, targets)
    sides = {"a": a, "b": b}
    necks = {side: _neck(found.backbone) for side, found in sides.items()}
    moved_arrays = {
        side: {task: _through(array, *necks[side]) for task, array in arrays[side].items()}
        for side in SIDES
    }
    moved, note = _movement(a.backbone, b.backbone)
    return plain(
        {
            "schema": SCHEMA,
            **{
                side: _identity(found, moved_arrays[side]["primary"], targets.get("primary"))
                for side, found in sides.items()
            },
            "same_numbers": a.metadata["content_hash"] == b.metadata["content_hash"],
            "movement": moved,
            "movement_note": note,
            "conditioning": _conditioning(arrays, necks),
            "attacks": _attacks(moved_arrays, targets, suite, attackers, seeds),
            "rows": {task: len(arrays["a"][task]) for task in TASKS},
        }
    )


def all_tables(compared: Mapping[str, Any]) -> list[Table]:
    """Identity, condition numbers, layers, attacks; those that have rows."""
    found = [identity(compared), conditioning(compared), stages(compared), layers(compared)]
    return [table for table in (*found, costs(compared)) if table.rows]


def terminal_tables(compared: Mapping[str, Any]) -> list[RichTable]:
    """The tables for the terminal."""
    return [tables.to_rich(table) for table in all_tables(compared)]


def markdown(compared: Mapping[str, Any]) -> str:
    """The answer in words and the tables as Markdown."""
    lines = "\n".join(f"- {_escape(line)}" for line in sentences(compared))
    return "\n".join([lines + "\n", *(tables.to_markdown(t) for t in all_tables(compared))])


def write_page(compared: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes `html` to `path`, whole or not at all.

    Raises:
      OSError: if the file cannot be written; an older page is then untouched.
    """
    page.write_text(html(compared), path)


def html(compared: Mapping[str, Any], *, title: str = "Two checkpoints compared") -> str:
    """One self-contained page with the answer in words and the tables; every text is escaped."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_PAGE).render(
        title=title, sentences=sentences(compared), tables=all_tables(compared)
    )


def sentences(compared: Mapping[str, Any]) -> list[str]:
    """What the comparison says, most important first."""
    lines = []
    if compared["same_numbers"]:
        lines.append(
            "A and B hold the same numbers bit for bit (one content hash): nothing was immunised "
            "between them, and every difference below is rounding."
        )
    elif compared["movement"] is None:
        lines.append(f"Layers are not compared: {compared['movement_note']}.")
    else:
        total, rows = compared["movement"]["total"], compared["movement"]["parameters"]
        moved = sum(row["changed"] > 0 for row in rows)
        lines.append(
            f"{moved} of {len(rows)} parameters moved, {_percent(total['relative_norm'])} of the "
            "norm of all."
        )
        for key, words in (("added", "B adds"), ("removed", "B lacks")):
            names = compared["movement"][key]
            if names:
                lines.append(f"{words} {', '.join(names)}.")
    measure, row = next(iter(compared["conditioning"].items()))
    lines.append(
        f"Condition numbers B / A, {FOOTING_NAMES[measure]}: harmful "
        f"{formats.factor(row['log_ratio_harmful'])}, primary "
        f"{formats.factor(row['log_ratio_primary'])}, RIR {formats.factor(row['log_rir'])}."
    )
    unsound = [
        f"{task} {side.upper()}"
        for task in TASKS
        for side, name in _SIDES.items()
        if row[task][name]["dominated_by"] == "rounding"
    ]
    if unsound:
        lines.append(f"Rounding decides kappa of {', '.join(unsound)}: no measurement.")
    ranks = {side: {t: row[t][name]["rank"] for t in TASKS} for side, name in _SIDES.items()}
    if ranks["a"] != ranks["b"]:
        lines.append(
            "A and B differ in rank, so their kappas are over different numbers of directions: "
            + ", ".join(f"{t} {ranks['a'][t]} → {ranks['b'][t]}" for t in TASKS)
            + "."
        )
    accuracies = [compared[side]["primary_accuracy"] for side in SIDES]
    if None not in accuracies:
        lines.append(
            "Primary accuracy of the stored heads on these rows: "
            f"{formats.decimal(accuracies[0])} → {formats.decimal(accuracies[1])}."
        )
    return lines


def identity(compared: Mapping[str, Any]) -> Table:
    """What the two are: model, method, content hash."""
    rows = [("A", compared["a"]), ("B", compared["b"])]
    return Table(
        "Checkpoints",
        (
            Column("", numeric=False),
            Column("path", numeric=False),
            Column("model", numeric=False),
            Column("method", numeric=False),
            Column("d"),
            Column("primary accuracy"),
            Column("content hash", numeric=False),
        ),
        tuple(
            (
                name,
                side["path"] or formats.MISSING,
                side["model"],
                side["method"],
                str(side["width"]),
                formats.decimal(side["primary_accuracy"]),
                side["content_hash"][:16],
            )
            for name, side in rows
        ),
        "The two hold the same numbers."
        if compared["same_numbers"]
        else "Hashes are of all parameters, statistics and heads, bit for bit.",
    )


def conditioning(compared: Mapping[str, Any]) -> Table:
    """Condition numbers of the features of both, on every footing."""
    rows = []
    for footing, row in compared["conditioning"].items():
        for task in TASKS:
            found = [row[task][name] for name in _SIDES.values()]
            rows.append(
                (
                    FOOTING_NAMES[footing],
                    task,
                    *(formats.from_log(kappa["log_kappa"]) for kappa in found),
                    formats.factor(row[f"log_ratio_{task}"]),
                    formats.factor(row["log_rir"]) if task == TASKS[0] else "",
                    " → ".join(
                        f"{kappa['rank']} of {compared[side]['width']}"
                        for side, kappa in zip(SIDES, found, strict=True)
                    ),
                    _dominated(found),
                )
            )
    count = compared["rows"]
    source = f" of {compared['data']}" if compared.get("data") else ""
    definitions = (
        f"{FOOTING_NAMES[name]}: {row['definition']}."
        for name, row in compared["conditioning"].items()
    )
    return Table(
        "Condition numbers of the features",
        (
            Column("footing", numeric=False),
            Column("task", numeric=False),
            Column("κ A"),
            Column("κ B"),
            Column("B / A"),
            Column("RIR"),
            Column("rank"),
            Column("dominated by", numeric=False),
        ),
        tuple(rows),
        f"Features recomputed on {count['harmful']:,} harmful and {count['primary']:,} primary "
        f"rows{source}. RIR = harmful B / A over primary B / A. {' '.join(definitions)}",
    )


def stages(compared: Mapping[str, Any]) -> Table:
    """How far each stage moved, in the order in which they run."""
    moved = compared["movement"]
    rows = [] if moved is None else [*moved["stages"], moved["total"]]
    return Table(
        "Stages moved",
        (
            Column("stage", numeric=False),
            Column("numbers"),
            Column("changed"),
            Column("|ΔW| / |W|"),
            Column("cosine"),
        ),
        tuple(
            (
                row["path"],
                f"{row['size']:,}",
                f"{row['changed']:,}",
                _percent(row["relative_norm"]),
                formats.decimal(row["cosine"], 4),
            )
            for row in rows
        ),
    )


def layers(compared: Mapping[str, Any], *, limit: int = LAYER_ROWS) -> Table:
    """The parameters that moved, most first."""
    moved = compared["movement"]
    rows = [row for row in (moved or {"parameters": ()})["parameters"] if row["changed"]]
    # A parameter that was zero moved by infinitely many of its norms (None in JSON).
    rows.sort(key=lambda row: math.inf if row["relative_norm"] is None else row["relative_norm"])
    shown = rows[::-1][:limit]
    note = (
        "'directions': effective rank of the change, exp of the entropy of its squared singular "
        "values. κ of the kernel as a matrix, with its rank."
    )
    if len(rows) > len(shown):
        note = f"The {len(shown)} of {len(rows)} moved parameters that moved most. {note}"
    return Table(
        "Layers moved",
        (
            Column("parameter", numeric=False),
            Column("shape", numeric=False),
            Column("|ΔW| / |W|"),
            Column("cosine"),
            Column("largest σ of ΔW"),
            Column("directions"),
            Column("κ A"),
            Column("κ B"),
            Column("rank"),
        ),
        tuple(_layer_row(row) for row in shown),
        note,
    )


def costs(compared: Mapping[str, Any]) -> Table:
    """What each probe attacker pays on A and on B."""
    group = compare.Group("B against A", "", "", "", ({"attacks": compared["attacks"], "seed": 0},))
    table = tables.costs(group)
    words = {"steps before": "steps A", "steps after": "steps B", "after / before": "B / A"}
    words |= {"FLOPs before": "FLOPs A", "FLOPs after": "FLOPs B"}
    columns = tuple(
        column._replace(heading=words.get(column.heading, column.heading))
        for column in table.columns
    )
    return table._replace(columns=columns)


# --- numbers --------------------------------------------------------------------------------------


def _loaded(source: str | os.PathLike[str] | Immunised, template: Backbone | None) -> Immunised:
    return source if isinstance(source, Immunised) else load_immunised(source, template=template)


def _feature_runner(backbone: Backbone) -> Callable[[FlatParams, FlatParams, Array], Array]:
    """A compiled features function; numbers are its arguments, not constants in it.

    uint8 inputs are images, still to be preprocessed.
    """
    structure = dataclasses.replace(backbone, params={}, stats={})

    @jax.jit
    def run(params: FlatParams, stats: FlatParams, inputs: Array) -> Array:
        if inputs.dtype == jnp.uint8:
            inputs = structure.preprocess(inputs)
        backbone = dataclasses.replace(structure, params=params, stats=stats)
        return backbone.features(params, inputs)

    return run


def _features(
    run: Callable[[FlatParams, FlatParams, Array], Array],
    backbone: Backbone,
    inputs: Any,
    batch_size: int,
) -> Float[np.ndarray, "n d"]:
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}.")
    inputs = np.asarray(inputs)
    n = len(inputs)
    if n == 0:
        raise ValueError("a task has no rows; kappas need at least one, better more than d.")
    size = min(batch_size, n)
    params = {path: value for path, value in backbone.params.items() if not under(path, NECK)}
    parts = []
    for start in range(0, n, size):
        batch = inputs[start : start + size]
        missing = size - len(batch)
        if missing:  # the last batch is filled up: another shape would compile again
            batch = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])
        found = run(params, backbone.stats, jnp.asarray(batch))
        parts.append(np.asarray(found)[: size - missing])
    return np.concatenate(parts)


def _check_rows(arrays: Mapping[str, Mapping[str, np.ndarray]], targets: Mapping[str, Any]) -> None:
    unknown = sorted(set(targets) - set(TASKS))
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r} of targets; tasks are {TASKS}.")
    for task in TASKS:
        shapes = [arrays[side][task].shape for side in SIDES]
        if any(len(shape) != 2 or 0 in shape for shape in shapes) or shapes[0][0] != shapes[1][0]:
            raise ValueError(
                f"features of the {task} task must be [n, d] of the same rows, got {shapes[0]} for "
                f"A and {shapes[1]} for B."
            )
        if task in targets and np.shape(targets[task]) != shapes[0][:1]:
            raise ValueError(
                f"targets of the {task} task must be [n] = {shapes[0][:1]}, got "
                f"{np.shape(targets[task])}."
            )


def _identity(found: Immunised, array: np.ndarray, targets: Any) -> dict[str, Any]:
    metadata = found.metadata
    return {
        "path": None,
        "model": metadata["model"],
        "model_config": metadata["model_config"],
        "method": metadata["method"],
        "config": metadata["config"],
        "content_hash": metadata["content_hash"],
        "conditioning": metadata["conditioning"],
        "width": array.shape[1],
        "primary_accuracy": _head_accuracy(found.head, array, targets),
    }


def _head_accuracy(head: Any, array: np.ndarray, targets: Any) -> float | None:
    if head is None or targets is None or np.asarray(targets).dtype.kind not in "iu":
        return None
    logits = array.astype(np.float64) @ np.asarray(head["kernel"], np.float64)
    logits += np.asarray(head.get("bias", 0.0), np.float64)
    return float(np.mean(np.argmax(logits, axis=1) == np.asarray(targets)))


def _movement(a: Backbone, b: Backbone) -> tuple[dict[str, Any] | None, str]:
    if a.name != b.name:
        return None, f"A is a {a.name}, B a {b.name}"
    if a.config != b.config:
        return None, f"A and B are {a.name} of two configurations"
    names = (*a.stage_names, *(["neck"] if "neck" not in a.stage_names else []), "classifier")
    return movement(a.params, b.params, stage_names=names).to_json(), ""


def _neck(backbone: Backbone) -> tuple[Any, Any]:
    """Kernel and bias of the neck, None where there is none."""
    return backbone.params.get(f"{NECK}.kernel"), backbone.params.get(f"{NECK}.bias")


def _through(array: np.ndarray, kernel: Any, bias: Any) -> np.ndarray:
    """Features after the neck."""
    moved = array if kernel is None else array @ np.asarray(kernel)
    return moved if bias is None else moved + np.asarray(bias)


def _conditioning(
    arrays: Mapping[str, Mapping[str, np.ndarray]], necks: Mapping[str, tuple[Any, Any]]
) -> dict[str, dict[str, Any]]:
    rows = {
        side: {task: task_rows(jnp.asarray(arrays[side][task])) for task in TASKS} for side in SIDES
    }
    kappas = {
        side: Tasks(**{task: feature_kappas(rows[side][task], *necks[side]) for task in TASKS})
        for side in SIDES
    }
    limit = math.nan  # that of linear maps after A is known where A has none yet
    if necks["a"][0] is None:
        limit = float(log_rir_limit(rows["a"]["primary"], rows["a"]["harmful"]))
    found = conditioning_rows(
        kappas["a"], kappas["b"], limit=limit, dtype=arrays["a"]["primary"].dtype.name
    )
    return {footing: found[footing] for footing in FOOTINGS}


def _attacks(
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    targets: Mapping[str, Any],
    suite: str,
    attackers: Sequence[str] | None,
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    from jaximm import attacks

    chosen = attacks.suite_attacks(suite, attackers)
    problems = {
        (task, _SIDES[side]): _problem(arrays[side][task], targets[task])
        for task in TASKS
        if task in targets
        for side in SIDES
    }
    if not problems or not chosen:
        return []
    return attacks.run_suite(
        problems, chosen, steps=attacks.suite_steps(suite, attackers), seeds=seeds
    )


def _problem(array: np.ndarray, targets: Any) -> Any:
    from jaximm import attacks

    wide = jnp.asarray(array, jax.dtypes.canonicalize_dtype(np.float64))
    fitted = np.asarray(targets)
    if fitted.dtype.kind not in "iub":
        return attacks.probe_problem(wide, jnp.asarray(fitted, wide.dtype))
    # Labels as they occur, so that those of a subset of the classes need no renumbering.
    names, labels = np.unique(fitted, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"labels of an attacked task need two classes, got only {names[0]}.")
    return attacks.probe_problem(wide, jnp.asarray(labels, jnp.int32), classes=len(names))


# --- text -----------------------------------------------------------------------------------------


def _layer_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    spectra = [row["before"], row["after"]]
    known = None not in spectra
    return (
        row["path"],
        " × ".join(map(str, row["shape"])),
        _percent(row["relative_norm"]),
        formats.decimal(row["cosine"], 4),
        f"{row['top_singular_values'][0]:.3g}" if row["top_singular_values"] else formats.MISSING,
        formats.decimal(row["effective_rank"], 1),
        *(formats.from_log(s["log_kappa"]) if known else formats.MISSING for s in spectra),
        " → ".join(str(s["rank"]) for s in spectra) if known else formats.MISSING,
    )


def _percent(fraction: float | None) -> str:
    if fraction is None:
        return "from zero"
    return f"{formats.significant(100 * fraction)} %"


def _dominated(kappas: Sequence[Mapping[str, Any]]) -> str:
    found = [
        f"{side.upper()}: {kappa['dominated_by']}"
        for side, kappa in zip(SIDES, kappas, strict=True)
        if kappa["dominated_by"] != "none"
    ]
    return ", ".join(found) or "none"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|")


_PAGE = """<!DOCTYPE html>
<html lang="en-GB">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 0 auto; padding: 24px; }
h1 { font-size: 1.7rem; } caption { text-align: left; font-weight: 600; padding: 8px 0; }
.scroll { overflow-x: auto; margin: 24px 0 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px 4px 0; text-align: left; vertical-align: top; }
tr { border-bottom: 1px solid #8884; }
.n { text-align: right; white-space: nowrap; }
.note { font-size: .875rem; opacity: .75; max-width: 78ch; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<ul>
{% for line in sentences %}
<li>{{ line }}</li>
{% endfor %}
</ul>
{% for t in tables %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ t.title }}">
<table>
<caption>{{ t.title }}</caption>
<thead><tr>
{% for c in t.columns %}
<th scope="col"{% if c.numeric %} class="n"{% endif %}>{{ c.heading }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in t.rows %}
<tr>
{% for cell in row %}
<td{% if t.columns[loop.index0].numeric %} class="n"{% endif %}>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% if t.note %}<p class="note">{{ t.note }}</p>{% endif %}
{% endfor %}
</body>
</html>
"""
