"""What one attacker reaches: chosen on some seeds and rows, reported on others.

Hyper-parameters, and the step at which to stop, are chosen by the quality on selection rows over
`Level.select_seeds`; the chosen cell is then run from the fresh `Level.report_seeds` and measured
at that step on held-out rows, which have chosen nothing. An attacker who must keep the utility of
the model he attacks chooses otherwise: among cells and steps that keep it, on selection rows of the
primary task. One who wants it cheap takes the cell and the stops that are first above a level
(`Aims`), by a margin for what selection rows cannot tell. Each is a choice and a report of its own,
from fresh seeds on held-out rows. A best rate at an end of its sweep may be no
best rate, and a defence that shifts rates would look like one that holds: the sweep goes on there,
as often as `Level.extensions` allows. All runs are batches of cells in a `Store`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaximm import objectives
from jaximm.assessment.bench import Bench, Model, TaskSplits, benign_task
from jaximm.assessment.cells import Store, digest, fingerprint, source_digest
from jaximm.assessment.level import Level
from jaximm.assessment.runners import (
    Subject,
    features_of,
    token_scores,
)
from jaximm.assessment.workers import Work, perform
from jaximm.attacks.grid import End, Hyper, at_edge, beyond, is_at
from jaximm.attacks.probe.problem import Attack
from jaximm.attacks.weights.loop import Execution
from jaximm.attacks.weights.problem import WeightAttack
from jaximm.data.rows import blocks
from jaximm.measures import selection
from jaximm.measures.evidence import Way
from jaximm.types import Batch


class Reported(NamedTuple):
    """A choice of cell and stop, and what it does from the report seeds on held-out rows."""

    hyper_parameters: dict[str, float]
    selected: float  # mean quality at the stop on selection rows, which chose it
    stop: int  # place in `Outcome.step` at which the attacker stops
    quality: Float[np.ndarray, "s r"]
    utility: Float[np.ndarray, "s r"] | None  # None: the attacker leaves the backbone alone
    readings: dict[str, Float[np.ndarray, "s r"]]  # of `Bench.readings_fn`
    scores: Float[np.ndarray, "s n"]  # at the stop; NaN for a seed of which an output is not finite
    utility_scores: Float[np.ndarray, "s m"] | None  # likewise, of the primary task
    loss: dict[str, float]
    gradient: dict[str, float]
    diverged: bool  # at the stop: not finite, or a run that ends there did
    still_falling: bool
    edge_of_grid: bool
    looks: Mapping[int, Float[np.ndarray, "s n"]] = MappingProxyType({})
    """Scores at places other than `stop`, where the attacker might have stopped, too."""


class Outcome(NamedTuple):
    """One attacker on one model and task; see `AttackTrace`.

    `best` is the choice by quality alone, None unless the status is "done". `kept` is the choice
    among what keeps the utility: None where nothing does, and where no bound binds (a probe, a
    benign task). `cheap` is the choice by cost, see `Aims`: None where no cell reaches any level on
    selection rows, or nothing was aimed at. `same_as`: see `repeated`.
    """

    model: str
    attacker: str
    task: str
    status: str
    reason: str | None
    cells: tuple[str, ...]
    grid: list[dict[str, Any]]
    step: Float[np.ndarray, "r"]
    flops: Float[np.ndarray, "r"]
    setup_flops: float
    step_flops: float
    selection: Float[np.ndarray, "g a r"]  # of the choice: cells by select seeds
    extended: int  # how often a sweep went on beyond the grid
    best: Reported | None
    kept: Reported | None
    fit: dict[str, Any] | None  # of a probe, see `jaximm.attacks.probe.fit`
    cheap: Reported | None = None
    same_as: str | None = None  # the attacker that this one is here, which was run


class Aims(NamedTuple):
    """The levels of a task whose cost is asked for, in falling order.

    A cell is at a level on selection rows if its mean is above that level there by the half-width
    that `Way.beyond` has on held-out rows, scaled to as many selection rows.

    Attributes:
      way: on held-out rows.
      fractions: of the way.
      levels: quality on selection rows at each.
      shrink: sqrt(held-out rows / selection rows).
    """

    way: Way
    fractions: tuple[float, ...]
    levels: tuple[float, ...]
    shrink: float


def repeated(chosen: Mapping[str, tuple[Attack | WeightAttack, int]]) -> dict[str, str]:
    """Attackers that are another one wherever the head starts at zero, by that other's name.

    They have its functions, budget and grid, but for `head_scale`, the factor on a head of zeros
    (`WeightAttack`), which `update` does not get: it may do with it what it likes.
    """
    first: list[tuple[Any, str]] = []
    twins = {}
    for name, (attack, steps) in chosen.items():
        if isinstance(attack, Attack):
            continue
        if attack.update_reads is None or "head_scale" in attack.update_reads:
            continue
        bare = [{key: value for key, value in cell.items() if key != "head_scale"}
                for cell in attack.grid]  # fmt: skip
        own = (steps, attack.init, attack.update, attack.update_reads, attack.pose,
               attack.solve_flops, attack.passes, attack.step_passes, attack.follows_loss,
               attack.swept, attack.natural_bounds, attack.harmful_rows, attack.rows_seed,
               {*attack.needs} - {"own_head"}, bare)  # fmt: skip
        earlier = next((label for other, label in first if other == own), None)
        if earlier is None:
            first.append((own, name))
        else:
            twins[name] = earlier
    return twins


def utility_bound(utility: float, fraction: float) -> float | None:
    """The utility that an attacked model must keep: u - (1 - fraction) |u|; None if not finite.

    Below a negative R^2, not above it.

    >>> utility_bound(0.5, 0.9), round(utility_bound(-1.0, 0.9), 9)
    (0.45, -1.1)
    """
    return utility - (1 - fraction) * abs(utility) if math.isfinite(utility) else None


def shipped_scores(bench: Bench, model: Model, split: str) -> Float[np.ndarray, "n"]:
    """What the model as it is shipped does on rows of the primary task: scores by row."""
    rows = getattr(bench.primary, split)
    if bench.primary.is_tokens:
        return token_scores(bench, model, rows)
    features = features_of(bench, model, rows.x)
    kernel, bias = (np.asarray(leaf, features.dtype) for leaf in model.benign_head)
    scores = objectives.of_targets(rows.y).scores(features @ kernel + bias, np.asarray(rows.y))
    return np.asarray(scores, float)


def selection_bound(bench: Bench, model: Model, fraction: float) -> float | None:
    """`utility_bound` on the rows that choose."""
    return utility_bound(float(np.mean(shipped_scores(bench, model, "selection"))), fraction)


def run_outcome(
    subject: Subject,
    name: str,
    attack: Attack | WeightAttack,
    *,
    level: Level,
    steps: int,
    execution: Execution,
    store: Store,
    identity: Mapping[str, Any],
    bound: float | None,
    aims: Aims | None = None,
) -> Outcome:
    """Chooses and reports; a failure is an outcome too.

    Args:
      subject: what is attacked.
      name, attack: the attacker.
      level: seeds and sizes.
      steps: the budget.
      execution: how many trajectories of attackers of weights run at once.
      store: of cells.
      identity: hashes of the model (`model_identity`), the task's rows (`data_identities`) and the
        code.
      bound: `selection_bound` of the model.
      aims: whose least cost is looked for; None: of nothing.
    """
    bench, model, task = subject.bench, subject.model, subject.task
    blank = functools.partial(_blank, model.label, name, task)
    rows = max(
        part.x.shape[0]
        for splits in bench.tasks().values()
        for part in (splits.selection, splits.held_out)
    )
    address = dict(identity) | {"attacker": name, "task": task, "steps": steps}
    address |= {"classes": bench.tasks()[task].classes, "float": jnp.zeros(()).dtype.name}
    address["platform"] = jax.default_backend()
    address |= {"batch_size": level.batch_size, "record": level.record, "probes": level.probes}
    if isinstance(attack, Attack) and bench.harmful.is_tokens:
        return blank("not_applicable", "its rows are texts, not one vector of features each", ())
    if isinstance(attack, WeightAttack):
        reason = subject.not_applicable(attack)
        if reason is not None:
            return blank("not_applicable", reason, ())
        address |= {"chunk": execution.chunk, "loop": execution.loop}
    grid = tuple(attack.grid) or ({},)

    def batch(split: str, cells: Sequence[Mapping[str, float]], seeds: Sequence[int], stops=()):
        work = Work(
            model=model.label,
            task=task,
            attacker=name,
            level=level,
            execution=execution,
            steps=steps,
            rows=rows,
            split=split,
            cells=tuple(cells),
            seeds=tuple(seeds),
            stops=tuple(stops),
        )
        return store.get(
            {**address, "split": split, "stops": list(stops)},
            [(cell, seed) for cell in cells for seed in seeds],
            functools.partial(perform, subject, attack, work),
            work,
        )

    tried, cells, extended = [], [], 0
    new = grid
    left: dict[tuple[str, End], int] = {
        (name, end): level.extensions for name in attack.swept for end in _ENDS
    }
    if benign_task(task):
        bound = None
    while True:
        first = batch("selection", new, level.select_seeds)
        cells += first["cells"]
        if first["status"] == "failed":
            return blank("failed", first["error"], tuple(cells))
        tried.append(first["found"])
        chances = np.concatenate([_array(trace["quality"]) for trace in tried])
        best, kept = _choices(chances, tried, bound)
        ends = [end for end, times in left.items() if times and _goes_on(grid, end, best, kept)]
        new = tuple(cell for end in ends for cell in beyond(grid, *end))
        if not new:
            break
        grid, extended = (*grid, *new), extended + len(ends)
        left |= {end: left[end] - 1 for end in ends}
    batches = {}
    choices = [choice for choice in (best, kept) if choice is not None]
    for cell in dict.fromkeys(choice.cell for choice in choices):
        stops = sorted({choice.stop for choice in choices if choice.cell == cell})
        held_out = batch("held_out", [grid[cell]], level.report_seeds, stops)
        cells += held_out["cells"]
        if held_out["status"] == "failed":
            return blank("failed", held_out["error"], tuple(cells))
        batches[cell] = held_out["found"]

    def reported(choice: _Choice, trace: Mapping[str, Any], looks: Sequence[int] = ()) -> Reported:
        quality, at = _array(trace["quality"])[0], str(choice.stop)
        lost, last = ~np.isfinite(quality[:, choice.stop]), choice.stop == quality.shape[1] - 1
        return Reported(
            hyper_parameters={key: float(value) for key, value in grid[choice.cell].items()},
            selected=float(np.mean(chances[choice.cell, :, choice.stop])),
            stop=choice.stop,
            quality=quality,
            utility=None if trace["utility"] is None else _array(trace["utility"])[0],
            readings={
                name: _array(values)[0] for name, values in trace.get("readings", {}).items()
            },
            scores=np.where(lost[:, None], np.nan, _array(trace["scores"][at])[0]),
            utility_scores=None
            if trace["utility"] is None
            else np.where(lost[:, None], np.nan, _array(trace["utility_scores"][at])[0]),
            loss=trace["loss"],
            gradient=trace["gradient"],
            diverged=bool(np.any(lost)) or (last and bool(np.any(trace["diverged"]))),
            still_falling=last and bool(np.any(trace["still_falling"])),
            edge_of_grid=at_edge(attack, grid, choice.cell),
            looks={stop: _array(trace["scores"][str(stop)])[0] for stop in looks
                   if np.isfinite(quality[:, stop]).all()},
        )  # fmt: skip

    held_out = batches[best.cell]
    steps_at = _array(held_out["step"])
    flops = held_out["setup_flops"] + steps_at * held_out["step_flops"]
    first = reported(best, held_out)
    cheap = None if aims is None else _cheap(np.mean(chances, axis=1), flops, first, aims)
    if cheap is not None:
        choice, looks = cheap
        known = [other.stop for other in choices if other.cell == choice.cell]
        if set(looks) <= set(known):  # what is reported holds it
            again = batches[choice.cell]
        else:
            more = batch("held_out", [grid[choice.cell]], level.report_seeds, looks)
            cells += more["cells"]
            if more["status"] == "failed":
                return blank("failed", more["error"], tuple(cells))
            again = more["found"]
        cheap = reported(choice, again, looks)
    return Outcome(
        model=model.label,
        attacker=name,
        task=task,
        status="done",
        reason=None,
        cells=tuple(cells),
        grid=[
            {key: float(value) for key, value in cell.items()}
            | {
                "selection": float(_best(chances[number])),
                "diverged": bool(np.any(diverged)),
            }
            for number, (cell, diverged) in enumerate(
                zip(grid, (seeds for trace in tried for seeds in trace["diverged"]), strict=True)
            )
        ],
        step=steps_at,
        flops=flops,
        setup_flops=held_out["setup_flops"],
        step_flops=held_out["step_flops"],
        selection=chances,
        extended=extended,
        best=first,
        kept=None if kept is None else reported(kept, batches[kept.cell]),
        fit=tried[0].get("fit"),
        cheap=cheap,
    )


class _Choice(NamedTuple):
    cell: int
    stop: int


_ENDS: tuple[End, ...] = ("least", "greatest")


def _choices(
    chances: Float[np.ndarray, "g a r"], tried: Sequence[Mapping[str, Any]], bound: float | None
) -> tuple[_Choice, _Choice | None]:
    """The best by quality alone, and the best among what keeps the utility; see `Outcome`."""
    best = _choose(chances)
    if bound is None or tried[0]["utility"] is None:
        return best, None
    utility = np.concatenate([_array(trace["utility"]) for trace in tried])
    keeps = np.mean(utility, axis=1) >= bound
    if not keeps.any():
        return best, None
    return best, _choose(np.where(keeps[:, None], chances, np.nan), prefer=best.cell)


def _goes_on(
    grid: Sequence[Hyper], where: tuple[str, End], best: _Choice, kept: _Choice | None
) -> bool:
    """Whether a choice lies at an end of a sweep, or nothing tried is better than no step."""
    if best.stop == 0:
        return True
    moved = [choice.cell for choice in (best, kept) if choice is not None and choice.stop]
    return any(is_at(grid, cell, *where) for cell in moved)


def _choose(chances: Float[np.ndarray, "g a r"], *, prefer: int | None = None) -> _Choice:
    """The cell and stop of highest mean quality; of equal ones, that of a cell to prefer.

    A diverged cell is no choice at its end, but may be stopped before.
    """

    def best_of(chances):
        g, _, r = chances.shape
        return _Choice(*divmod(selection.choose(np.moveaxis(chances, 1, 2).reshape(g * r, -1)), r))

    best = best_of(chances)
    if prefer is not None:  # before the first step all cells are equal, and one run will do
        own = best_of(chances[prefer][None])._replace(cell=prefer)
        values = [np.mean(chances[choice.cell, :, choice.stop]) for choice in (own, best)]
        return own if values[0] >= values[1] else best
    return best


def _cheap(
    selected: Float[np.ndarray, "g r"], flops: Float[np.ndarray, "r"], best: Reported, aims: Aims
) -> tuple[_Choice, list[int]] | None:
    """The cell that is cheapest to the highest level that any reaches, and its stops at each."""
    halves = [beyond.mean - beyond.lower
              for beyond in (aims.way.beyond(best.scores, f) for f in aims.fractions)]  # fmt: skip
    levels = [level + aims.shrink * half for level, half in zip(aims.levels, halves, strict=True)]
    places = [selection.least_cost(selected, flops, level) for level in levels]
    cheapest = next((place for place in places if place is not None), None)
    if cheapest is None:
        return None
    own = selected[cheapest.cell][None]
    stops = [selection.least_cost(own, flops, level) for level in levels]
    return _Choice(*cheapest), sorted({stop.stop for stop in stops if stop is not None})


def _array(values: Any) -> np.ndarray:
    """Numbers of a stored batch: null is NaN."""
    return np.asarray(values, dtype=float)


def _best(curves: np.ndarray) -> float:
    """The highest seed-mean quality of curves [a, r]; NaN without any."""
    mean = np.mean(curves, axis=0)
    return float(np.max(mean, initial=-np.inf, where=np.isfinite(mean)))


def _blank(model, attacker, task, status, reason, cells) -> Outcome:
    none = np.zeros(0)
    return Outcome(
        model, attacker, task, status, reason, tuple(cells), [], none, none, np.nan, np.nan, none,
        0, None, None, None,
    )  # fmt: skip


def model_identity(bench: Bench, model: Model) -> dict[str, Any]:
    """What addresses a model's cells: its arrays, its code, and what it makes of some rows.

    Its name too: no two models of an assessment share a cell, whatever the rest cannot see.
    """
    from jaximm.checkpoint import content_hash

    arrays = {
        "params": model.params,
        "benign_head": model.benign_head._asdict() if model.benign_head else {},
        "harmful_head": {} if model.harmful_head is None else model.harmful_head._asdict(),
        "public": {} if model.public is None else model.public,
        "frozen": model.frozen,
    }
    functions = (
        model.features_fn or bench.features_fn,
        bench.refresh_fn,
        bench.posed.get("canonical_fn"),
        model.readings_fn or bench.readings_fn,
    )
    fixed = np.asarray(bench.harmful.train.x[:FIXED_ROWS])
    outputs = [
        _shape_of(features_of(bench, dataclasses.replace(model, params=params), fixed))
        for params in (model.params, *(moved(model.params, by) for by in MOVES))
    ]
    return {
        "label": [model.label, model.method, model.seed],
        "own": [source_digest(*functions), *map(fingerprint, functions)],
        "model": content_hash(arrays),
        "outputs": digest(outputs),
    }


MOVES = (1e-3, 0.3)
"""Of parameters, in root mean squares of each leaf: models that are alike as they are shipped need
not be alike where an attacker takes them."""


def moved(params: Any, by: float) -> Any:
    """Parameters that are moved a little, the same way each time."""

    def one(leaf):
        leaf = jnp.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.size:
            return leaf
        values = np.asarray(leaf, np.float32)
        size = float(np.sqrt(np.mean(np.square(values)))) or 1.0
        wave = np.cos(np.arange(1, values.size + 1, dtype=np.float32)).reshape(values.shape)
        return jnp.asarray(values + np.float32(by * size) * wave, leaf.dtype)

    return jax.tree.map(one, params)


def _plain(y: Any) -> Any:
    return y._asdict() if isinstance(y, objectives.TokenRows) else y


FIXED_ROWS = 8
"""Rows whose features stand for the code of a model in the address of its cells."""


def _shape_of(features: Any) -> list[str]:
    """Some numbers that tell other features apart, but not another order of summation."""
    values = np.asarray(features, float).ravel()
    size = float(np.linalg.norm(values))
    waves = np.cos(np.outer(np.arange(1, 4), np.arange(values.size))) @ values
    return [f"{size:.3e}", *(f"{wave / (size or 1.0):.3f}" for wave in waves)]


def _by_blocks(rows: Batch) -> Batch:
    """Many rows, each block by its hash alone."""
    hashes = [hashlib.sha256(block.tobytes()).digest() for block in blocks(rows.x)]
    return rows._replace(x=jnp.asarray(np.frombuffer(b"".join(hashes), np.uint8)))


def data_identities(bench: Bench) -> dict[str, str]:
    """Hashes by task of all rows that an attack on it meets: its own and those of the primary task.

    So a task that is added, or another one's rows, leaves its cells what they are.
    """
    from jaximm.checkpoint import content_hash

    def rows_hash(rows: TaskSplits) -> list[str]:
        train = rows.train if rows.few is None else _by_blocks(rows.train)
        parts = (train, rows.selection, rows.held_out)
        return [content_hash({"x": part.x, "y": _plain(part.y)}) for part in parts]

    primary = rows_hash(bench.primary)
    return {task: digest([rows_hash(rows), primary]) for task, rows in bench.tasks().items()}
