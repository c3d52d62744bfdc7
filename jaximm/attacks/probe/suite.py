"""A suite: every attacker with its budget and grid, on every task and backbone, as result rows.

The best cell of a grid is chosen for the attacker's goal and jointly over the seeds: fewest seeds
that miss a relative excess loss of 1e-2, then fewest steps to it in total, then the smallest final
excess loss. Rows measure what fitting the attacked rows costs; where held-out rows are given, the
grid lists each cell's held-out loss beside it, and `best_held_out_cell` picks by that. Held-out
rows with class labels give held-out accuracies as well, of every cell and of the row itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaximm import objectives
from jaximm.attacks.grid import Hyper, at_edge
from jaximm.attacks.probe.loop import AttackTrace, cost_of, run_attack
from jaximm.attacks.probe.problem import TARGETS, Attack, ProbeProblem, check_attackers

TARGET_NAMES = ("1e-1", "1e-2", "1e-3")
"""Keys of TARGETS in result rows."""

_GOAL = 1  # index in TARGETS of the target that chooses the best cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """Budgets and grids by registry name.

    Attributes:
      steps: budget in steps for each attacker.
      default_steps: budget of attackers that `steps` does not name (those registered by users).
      options: arguments of the attacker's factory that differ from its defaults.
    """

    steps: Mapping[str, int]
    default_steps: int
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def budget(self, name: str) -> int:
        """Steps for the attacker `name`."""
        return self.steps.get(name, self.default_steps)


# Fixed-step descent is evaluated in closed form, so its budget is free; conjugate gradients,
# L-BFGS and the solves stop by themselves long before theirs.
SUITES: dict[str, Suite] = {
    # For a thousand features and more, where a step outside the eigenbasis takes milliseconds.
    "short": Suite(
        steps={
            "gd": 10**6,
            "gd_best_step": 10**6,
            "gd_line_search": 2_000,
            "heavy_ball": 2_000,
            "nesterov": 2_000,
            "adam": 500,
            "conjugate_gradients": 500,
            "lbfgs": 100,
            "ridge": 1,
            "whitened_gd": 100,
            "jacobi_gd": 500,
        },
        default_steps=500,
        options={
            "gd_best_step": {"step_scales": (0.5, 0.9, 1.0, 1.03)},
            "heavy_ball": {"curvatures": (0.0, 0.25, 0.5, 0.75, 1.0)},
            "nesterov": {"curvatures": (0.0, 0.25, 0.5, 0.75, 1.0)},
            "adam": {"learning_rates": (1e-3, 1e-2, 1e-1, 1.0)},
            "jacobi_gd": {"step_scales": (0.5, 1.0, 1.95, 2.05)},
        },
    ),
    "quick": Suite(
        steps={
            "gd": 10**6,
            "gd_best_step": 10**6,
            "gd_line_search": 20_000,
            "heavy_ball": 10_000,
            "nesterov": 10_000,
            "adam": 3_000,
            "conjugate_gradients": 3_000,
            "lbfgs": 500,
            "ridge": 1,
            "whitened_gd": 100,
            "jacobi_gd": 10_000,
        },
        default_steps=3_000,
        options={
            "gd_best_step": {"step_scales": (0.5, 0.9, 1.0, 1.03)},
            "heavy_ball": {"curvatures": (0.0, 0.25, 0.5, 0.75, 1.0)},
            "nesterov": {"curvatures": (0.0, 0.25, 0.5, 0.75, 1.0)},
            "adam": {"learning_rates": (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)},
            "jacobi_gd": {"step_scales": (0.5, 1.0, 1.95, 2.05)},
        },
    ),
    "standard": Suite(
        steps={
            "gd": 10**7,
            "gd_best_step": 10**7,
            "gd_line_search": 200_000,
            "heavy_ball": 50_000,
            "nesterov": 50_000,
            "adam": 20_000,
            "conjugate_gradients": 20_000,
            "lbfgs": 2_000,
            "ridge": 1,
            "whitened_gd": 1_000,
            "jacobi_gd": 50_000,
        },
        default_steps=20_000,
        options={"lbfgs": {"memories": (500, 100)}},
    ),
    "full": Suite(
        steps={
            "gd": 10**9,
            "gd_best_step": 10**9,
            "gd_line_search": 10**6,
            "heavy_ball": 300_000,
            "nesterov": 300_000,
            "adam": 100_000,
            "conjugate_gradients": 100_000,
            "lbfgs": 5_000,
            "ridge": 1,
            "whitened_gd": 10_000,
            "jacobi_gd": 500_000,
        },
        default_steps=100_000,
        options={
            "gd_best_step": {
                "step_scales": (0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99, 0.999, 1.0, 1.001, 1.03)
            },
            "heavy_ball": {"curvatures": tuple(i / 16 for i in range(17))},
            "nesterov": {"curvatures": tuple(i / 16 for i in range(17))},
            "adam": {
                "learning_rates": tuple(float(v) for v in np.geomspace(1e-3, 1e2, 16)),
                "first_decays": (0.0, 0.9, 0.99),
            },
            "lbfgs": {"memories": (1000, 100)},
        },
    ),
}


def run_suite(
    problems: Mapping[tuple[str, str], ProbeProblem],
    attackers: Mapping[str, Attack],
    *,
    steps: int | Mapping[str, int],
    seeds: Sequence[int] = (0,),
    held_out: Mapping[tuple[str, str], tuple[Any, Any]] | None = None,
    record: int = 150,
) -> list[dict[str, Any]]:
    """Run every attacker on every problem; one row per attacker, problem and seed.

    Args:
      problems: keyed (task, backbone), for example ("harmful", "after").
      attackers: name to Attack, for example `jaximm.attacks.suite_attacks("quick")`.
      steps: one budget for all, or a budget by name.
      seeds: starts; seed 0 is w0 = 0, others are small random heads (`initial_weights`).
      held_out: optional (features [n, d], targets [n] or [n, k]) by the same keys; adds each cell's
        held-out loss |X w - y|^2 / (2 n) to the listed grid. For a problem of k targets, integer
        targets [n] are class labels: they count as their one-hot rows, and add each cell's
        "held_out_accuracy" and the row's "final_held_out_accuracy".
      record: at most this many log-spaced points in a curve.

    Returns:
      Rows of the `attacks` section of a result file, plain Python values ready for JSON: numbers
      that are infinite or NaN are None.

    Raises:
      ValueError: an attacker without a budget, held-out keys without a problem, mismatched widths.
    """
    check_attackers(attackers)
    if isinstance(steps, Mapping):
        missing = sorted(set(attackers) - set(steps))
        if missing:
            raise ValueError(f"no step budget for {missing}; budgets given: {sorted(steps)}.")
        budgets = dict(steps)
    else:
        budgets = dict.fromkeys(attackers, steps)
    held_out = held_out or {}
    unknown = sorted(set(held_out) - set(problems))
    if unknown:
        raise ValueError(f"held-out rows for {unknown}, which is not among {sorted(problems)}.")
    rows = []
    for (task, backbone), problem in problems.items():
        held = held_out.get((task, backbone))
        for name, attack in attackers.items():
            cells = tuple(attack.grid) or ({},)
            trace = run_attack(
                attack, problem, cells, steps=budgets[name], seeds=seeds, record=record
            )
            held_loss = None if held is None else held_out_loss(trace, *held)
            accuracy = None
            if held is not None and _is_labels(trace, held[1]):
                accuracy = held_out_accuracy(trace, *held)
            rows += rows_of(
                trace,
                name=name,
                attack=attack,
                cells=cells,
                problem=problem,
                task=task,
                backbone=backbone,
                steps=budgets[name],
                seeds=seeds,
                held_loss=held_loss,
                accuracy=accuracy,
            )
    return rows


def held_out_loss(trace: AttackTrace, features: Any, targets: Any) -> np.ndarray:
    """|X w - y|^2 / (2 n) of the final weights on other rows, [cells, seeds].

    Args:
      trace: a finished run.
      features: [n, d], of the width attacked.
      targets: [n] of one target; [n, k] of k, or class labels: integers [n] in 0..k-1.

    Raises:
      ValueError: another shape, or labels outside of 0..k-1.
    """
    features, targets = _held_out(trace, features, targets)
    if _is_labels(trace, targets):
        targets = np.eye(trace.weights.shape[-1], dtype=trace.weights.dtype)[targets]
    with np.errstate(all="ignore"):  # diverged weights give inf or NaN, which is their loss
        residual = _outputs(trace, features) - targets
        squares = residual**2
        if trace.weights.ndim == 4:
            squares = np.sum(squares, axis=-1)
        return np.mean(squares, axis=-1) / 2


def held_out_accuracy(trace: AttackTrace, features: Any, labels: Any) -> np.ndarray:
    """Share of other rows whose largest output is that of their label, [cells, seeds].

    A row with an output that is not a number counts as wrong.

    Args:
      trace: a finished run on k targets.
      features: [n, d], of the width attacked.
      labels: integers [n] in 0..k-1.

    Raises:
      ValueError: a run on one target, another shape, or labels outside of 0..k-1.
    """
    features, labels = _held_out(trace, features, labels)
    if not _is_labels(trace, labels):
        raise ValueError(
            "held-out accuracy needs a problem of k targets and integer labels [n], got weights "
            f"{trace.weights.shape[2:]} and {labels.dtype}{list(labels.shape)}."
        )
    with np.errstate(all="ignore"):
        outputs = _outputs(trace, features)
    return np.mean(objectives.objective("classes").scores(outputs, labels), axis=-1)


def _is_labels(trace: AttackTrace, targets: Any) -> bool:
    """Whether held-out targets are class labels for a probe of k targets."""
    targets = np.asarray(targets)
    return trace.weights.ndim == 4 and targets.ndim == 1 and targets.dtype.kind in "iu"


def _outputs(trace: AttackTrace, features: np.ndarray) -> np.ndarray:
    """X w of every cell and seed, [cells, seeds, n] or [cells, seeds, n, k]."""
    weights = np.asarray(trace.weights)
    return weights @ features.T if weights.ndim == 3 else features @ weights


def _held_out(trace: AttackTrace, features: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    """Held-out rows as arrays, checked against the weights."""
    features, targets = np.asarray(features), np.asarray(targets)
    d, several = trace.weights.shape[2], trace.weights.ndim == 4
    if features.ndim != 2 or features.shape[1] != d or len(features) == 0:
        raise ValueError(f"held-out features must be [n, {d}], got shape {features.shape}.")
    n = len(features)
    if _is_labels(trace, targets) and targets.shape == (n,):
        k = trace.weights.shape[3]
        if targets.min() < 0 or targets.max() >= k:
            raise ValueError(
                f"held-out labels must be in 0..{k - 1}, got {targets.min()}..{targets.max()}."
            )
        return features, targets
    expected = (n, *trace.weights.shape[3:])
    if targets.shape != expected:
        form = "[n, k]" if several else "[n]"
        labels = " or integer labels [n]" if several else ""
        raise ValueError(
            f"held-out targets must be {form} = {expected}{labels}, got shape {targets.shape}."
        )
    return features, targets


def best_cell(trace: AttackTrace) -> int:
    """Index of the cell that fits fastest, jointly over seeds.

    Order: seeds that miss a relative excess loss of 1e-2, total steps to it, total final excess
    (differences below 1e-10 are rounding and do not count), and the earlier cell.
    """
    hits = np.asarray(trace.steps_to_loss_gap)[..., _GOAL]
    final = np.asarray(trace.final_relative_excess_loss, np.float64)
    final = np.where(np.isfinite(final), np.maximum(final, 1e-10), np.inf)
    keys = [
        (int(np.sum(cell < 0)), int(np.sum(cell[cell >= 0], dtype=np.int64)), float(np.sum(value)))
        for cell, value in zip(hits, final, strict=True)
    ]
    return min(range(len(keys)), key=keys.__getitem__)


def best_held_out_cell(held_out: np.ndarray) -> int:
    """Index of the cell with the smallest held-out loss [cells, seeds], summed over seeds."""
    total = np.sum(np.where(np.isfinite(held_out), held_out, np.inf), axis=1)
    return int(np.argmin(total))


def rows_of(
    trace: AttackTrace,
    *,
    name: str,
    attack: Attack,
    cells: Sequence[Hyper],
    problem: ProbeProblem,
    task: str,
    backbone: str,
    steps: int,
    seeds: Sequence[int],
    held_loss: np.ndarray | None = None,
    accuracy: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """One row per seed of a finished run, with the whole grid listed in each."""
    chosen = best_cell(trace)
    cost = cost_of(attack, problem)
    numbers = trace._replace(**{k: np.asarray(v) for k, v in trace._asdict().items()})
    rows = []
    for index, seed in enumerate(seeds):
        grid = []
        for c, cell in enumerate(cells):
            entry: dict[str, Any] = {key: float(value) for key, value in cell.items()}
            entry["steps_to_loss_gap"] = _named(numbers.steps_to_loss_gap[c, index], int)
            # The cell that is best for the loss may be poor for the weights: list both.
            entry["steps_to_parameter_error"] = _named(
                numbers.steps_to_parameter_error[c, index], int
            )
            entry["final_relative_excess_loss"] = _number(
                numbers.final_relative_excess_loss[c, index]
            )
            entry["diverged"] = bool(numbers.diverged[c, index])
            if held_loss is not None:
                entry["held_out_loss"] = _number(held_loss[c, index])
            if accuracy is not None:
                entry["held_out_accuracy"] = _number(accuracy[c, index])
            grid.append(entry)
        at = (chosen, index)
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
                "curve": {
                    "step": numbers.step.tolist(),
                    "relative_excess_loss": _numbers(numbers.relative_excess_loss[at]),
                    "relative_parameter_error": _numbers(numbers.relative_parameter_error[at]),
                },
                "steps_to_parameter_error": _named(numbers.steps_to_parameter_error[at], int),
                "steps_to_loss_gap": _named(numbers.steps_to_loss_gap[at], int),
                "flops_per_step": float(cost.step),
                "setup_flops": float(cost.setup),
                "flops_to_loss_gap": _named(numbers.flops_to_loss_gap[at], _number),
                "final_relative_excess_loss": _number(numbers.final_relative_excess_loss[at]),
                "diverged": bool(numbers.diverged[at]),
                "still_falling": bool(numbers.still_falling[at]),
            }
        )
        if accuracy is not None:
            rows[-1]["final_held_out_accuracy"] = _number(accuracy[at])
    return rows


def _named(values, convert) -> dict[str, Any]:
    """Values for TARGETS under their names."""
    assert len(values) == len(TARGETS)
    return {name: convert(value) for name, value in zip(TARGET_NAMES, values, strict=True)}


def _number(value) -> float | None:
    """A float, or None where it is not finite: JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


def _numbers(values) -> list[float | None]:
    """`_number` of each."""
    return [_number(value) for value in values]
