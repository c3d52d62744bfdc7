"""Attackers of weights on every task and backbone, as rows of the same table as the probes'.

A label task has no known optimum, so targets are relative to what the same attacker reaches on the
*undefended* backbone (the one called "before") with the same budget, averaged over the seeds:

    accuracy target        its held-out accuracy at the end, less a margin (1 point)
    relative excess loss   (L_t - L_ref) / (ln k - L_ref), never below 0: L_t is the training loss,
                           L_ref its training loss at the end, ln k that of guessing

so steps and FLOPs to a target say how much longer the attacker takes to do as well as he would have
done. A task without an undefended backbone is compared with itself. Steps are those at which the
curve was recorded, so they are upper bounds to within the spacing of the curve.

The best cell of a grid has the highest accuracy at the end on the *selection* rows, summed over the
seeds, then the lowest loss there; diverged trajectories count as nothing. What is reported is
measured on the held-out rows, which choose nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaximm.attacks.grid import Hyper, at_edge
from jaximm.attacks.probe.problem import TARGETS, check_attackers
from jaximm.attacks.probe.suite import TARGET_NAMES
from jaximm.attacks.weights.loop import FineTuneTrace, run_fine_tune
from jaximm.attacks.weights.problem import FineTuneProblem, WeightAttack

UNDEFENDED = "before"
"""Name of the backbone that sets the targets of its task."""


class Reference(NamedTuple):
    """What the attacker reaches on the undefended backbone; means over seeds of the best cell."""

    train_loss: float
    held_out_accuracy: float


def run_weight_suite(
    problems: Mapping[tuple[str, str], FineTuneProblem],
    attackers: Mapping[str, WeightAttack],
    *,
    steps: int | Mapping[str, int],
    seeds: Sequence[int] = (0,),
    batch_size: int | None = 64,
    record: int = 30,
    chunk: int | None = 1,
    margin: float = 0.01,
    references: Mapping[tuple[str, str], Reference] | None = None,
) -> list[dict[str, Any]]:
    """Run every attacker on every problem; one row per attacker, problem and seed.

    Args:
      problems: keyed (task, backbone), for example ("harmful", "before"). A backbone called
        "before" sets the targets of its task.
      attackers: name to WeightAttack.
      steps: one budget for all, or a budget by name.
      seeds, batch_size, record, chunk: see `run_fine_tune`. More points, finer steps to targets.
      margin: how far below the undefended backbone's accuracy the target lies, in [0, 1).
      references: by task and attacker, from an earlier run on the undefended backbone
        (`references_of` its rows); what is missing comes from this run.

    Returns:
      Rows of the `attacks` section of a result file, with the keys of `run_suite`'s rows (parameter
      errors are not defined here: empty curve, -1 steps) and beside them

        curve.train_loss, curve.held_out_loss, curve.held_out_accuracy
        accuracy_target, steps_to_accuracy (-1 if missed), flops_to_accuracy (None if missed)
        final_held_out_accuracy, final_held_out_loss, final_train_loss, batch_size

    Raises:
      ValueError: an attacker without a budget, a margin out of range, or what `run_fine_tune`
        refuses.
    """
    check_attackers(attackers)
    if isinstance(steps, Mapping):
        missing = sorted(set(attackers) - set(steps))
        if missing:
            raise ValueError(f"no step budget for {missing}; budgets given: {sorted(steps)}.")
        budgets = dict(steps)
    else:
        budgets = dict.fromkeys(attackers, steps)
    if not 0 <= margin < 1:
        raise ValueError(f"margin must be in [0, 1), got {margin}.")
    rows = []
    known = dict(references or {})
    # The undefended backbones first: they set the targets.
    for task, backbone in sorted(problems, key=lambda key: key[1] != UNDEFENDED):
        problem = problems[task, backbone]
        for name, attack in attackers.items():
            cells = tuple(attack.grid) or ({},)
            trace = run_fine_tune(
                attack,
                problem,
                cells,
                steps=budgets[name],
                seeds=seeds,
                batch_size=batch_size,
                record=record,
                chunk=chunk,
            )
            trace = trace._replace(
                **{
                    field: np.asarray(value)
                    for field, value in trace._asdict().items()
                    if field != "weights"
                }
            )
            chosen = best_cell(trace)
            found = Reference(
                float(np.mean(trace.train_loss[chosen, :, -1])),
                float(np.mean(trace.held_out_quality[chosen, :, -1])),
            )
            reference = known.setdefault((task, name), found)
            rows += _rows_of(
                trace,
                name=name,
                attack=attack,
                cells=cells,
                chosen=chosen,
                classes=problem.classes,
                task=task,
                backbone=backbone,
                steps=budgets[name],
                seeds=seeds,
                batch_size=problem.train.x.shape[0] if batch_size is None else batch_size,
                reference=reference,
                margin=margin,
            )
    return rows


def references_of(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Reference]:
    """References from rows of attackers of weights on the undefended backbone."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row["backbone"] == UNDEFENDED and "accuracy_target" in row:
            reached = row["final_train_loss"], row["final_held_out_accuracy"]
            found.setdefault((row["task"], row["attacker"]), []).append(reached)
    return {
        key: Reference(*(float(np.mean(column)) for column in zip(*values, strict=True)))
        for key, values in found.items()
    }


def best_cell(trace: FineTuneTrace) -> int:
    """Index of the cell with the best selection rows at the end, jointly over the seeds.

    A seed that diverged counts as no quality at all, or as the worst R^2 of any.
    """
    diverged, quality = np.asarray(trace.diverged), np.asarray(trace.selection_quality)[..., -1]
    nothing = min(0.0, float(np.min(quality, initial=0.0, where=np.isfinite(quality))))
    accuracy = np.sum(np.where(diverged | ~np.isfinite(quality), nothing, quality), axis=1)
    loss = np.asarray(trace.selection_loss)[..., -1]
    lost = diverged | ~np.isfinite(quality) | ~np.isfinite(loss)
    loss = np.sum(np.where(lost, np.inf, loss), axis=1)
    return min(range(len(loss)), key=lambda c: (-float(accuracy[c]), float(loss[c])))


def _rows_of(
    trace: FineTuneTrace,
    *,
    name: str,
    attack: WeightAttack,
    cells: Sequence[Hyper],
    chosen: int,
    classes: int,
    task: str,
    backbone: str,
    steps: int,
    seeds: Sequence[int],
    batch_size: int,
    reference: Reference,
    margin: float,
) -> list[dict[str, Any]]:
    """One row per seed of a finished run, with the whole grid listed in each."""
    target = reference.held_out_accuracy - margin
    recorded, accuracy = np.asarray(trace.step), np.asarray(trace.held_out_quality)
    relative = relative_excess(np.asarray(trace.train_loss), reference.train_loss, classes)

    def price(hit: int) -> float | None:
        return None if hit < 0 else float(trace.setup_flops + hit * trace.step_flops)

    rows = []
    for index, seed in enumerate(seeds):
        grid, hits, gaps = [], [], []
        for c, cell in enumerate(cells):
            at = (c, index)
            hits.append(first_step(recorded, accuracy[at] >= target))
            gaps.append([first_step(recorded, relative[at] <= gap) for gap in TARGETS])
            grid.append(
                {
                    **{key: float(value) for key, value in cell.items()},
                    "steps_to_accuracy": hits[-1],
                    "steps_to_loss_gap": dict(zip(TARGET_NAMES, gaps[-1], strict=True)),
                    "final_relative_excess_loss": _number(relative[at][-1]),
                    "selection_accuracy": _number(trace.selection_quality[at][-1]),
                    "held_out_accuracy": _number(accuracy[at][-1]),
                    "held_out_loss": _number(trace.held_out_loss[at][-1]),
                    "diverged": bool(trace.diverged[at]),
                }
            )
        at, hit, gap = (chosen, index), hits[chosen], gaps[chosen]
        rows.append(
            {
                "attacker": name,
                "kind": attack.kind,
                "task": task,
                "backbone": backbone,
                "seed": int(seed),
                "hyper_parameters": {k: float(v) for k, v in cells[chosen].items()},
                "grid": grid,
                "edge_of_grid": at_edge(attack, cells, chosen),
                "steps_budget": int(steps),
                "batch_size": int(batch_size),
                "curve": {
                    "step": recorded.tolist(),
                    "relative_excess_loss": _numbers(relative[at]),
                    "relative_parameter_error": [],
                    "train_loss": _numbers(trace.train_loss[at]),
                    "held_out_loss": _numbers(trace.held_out_loss[at]),
                    "held_out_accuracy": _numbers(accuracy[at]),
                },
                "steps_to_parameter_error": dict.fromkeys(TARGET_NAMES, -1),
                "steps_to_loss_gap": dict(zip(TARGET_NAMES, gap, strict=True)),
                "accuracy_target": _number(target),
                "steps_to_accuracy": hit,
                "flops_per_step": float(trace.step_flops),
                "setup_flops": float(trace.setup_flops),
                "flops_to_loss_gap": dict(zip(TARGET_NAMES, map(price, gap), strict=True)),
                "flops_to_accuracy": price(hit),
                "final_relative_excess_loss": _number(relative[at][-1]),
                "final_train_loss": _number(trace.train_loss[at][-1]),
                "final_held_out_loss": _number(trace.held_out_loss[at][-1]),
                "final_held_out_accuracy": _number(accuracy[at][-1]),
                "diverged": bool(trace.diverged[at]),
                "still_falling": bool(trace.still_falling[at]),
            }
        )
    return rows


def relative_excess(train_loss: np.ndarray, reference: float, classes: int) -> np.ndarray:
    """(L - L_ref) / (ln k - L_ref), at least 0; NaN where L_ref is no better than guessing.

    >>> relative_excess(np.array([np.log(2.0), 0.1, 0.05]), 0.1, 2).tolist()
    [1.0, 0.0, 0.0]
    """
    scale = math.log(classes) - reference
    if not scale > 0:  # nor if the reference is not a number
        return np.full(train_loss.shape, np.nan)
    return np.maximum((np.asarray(train_loss, np.float64) - reference) / scale, 0.0)


def first_step(recorded: np.ndarray, met: np.ndarray) -> int:
    """The first recorded step at which a condition is met, -1 if it never is.

    >>> first_step(np.array([0, 1, 10]), np.array([False, False, True]))
    10
    """
    found = np.flatnonzero(met)
    return int(recorded[found[0]]) if found.size else -1


def _number(value) -> float | None:
    """A float, or None where it is not finite: JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


def _numbers(values) -> list[float | None]:
    """`_number` of each."""
    return [_number(value) for value in values]
