"""The one loop that runs every attacker of a probe, and the trace that it returns."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaximm import objectives
from jaximm.attacks.grid import MAX_STEPS, Hyper, _late_step, recorded_steps
from jaximm.attacks.probe.problem import (
    TARGETS,
    Attack,
    Cost,
    ProbeProblem,
    budgeted,
    check_attacker,
    excess_loss,
    initial_weights,
    per_row,
    probe_scores,
    row_space_norm,
)

DIVERGED_ABOVE = 1e12
"""A cell whose excess loss exceeds its start by this factor is stopped and called diverged."""


class AttackTrace(NamedTuple):
    """One attacker on one problem: g cells of hyper-parameters by s seeds; all on the host.

    Step counts are the first step at which the quantity is at or below the target (0 if the start
    is already there), -1 if that never happens within the budget. They are counted at every step,
    even where the curve is thinned. FLOPs are set-up plus steps, NaN where the target is missed.
    """

    step: Int[np.ndarray, "r"]  # 0, then log-spaced up to the budget
    relative_excess_loss: Float[np.ndarray, "g s r"]
    relative_parameter_error: Float[np.ndarray, "g s r"]
    steps_to_loss_gap: Int[np.ndarray, "g s 3"]  # for TARGETS
    steps_to_parameter_error: Int[np.ndarray, "g s 3"]
    flops_to_loss_gap: Float[np.ndarray, "g s 3"]
    flops_to_parameter_error: Float[np.ndarray, "g s 3"]
    final_relative_excess_loss: Float[np.ndarray, "g s"]
    final_relative_parameter_error: Float[np.ndarray, "g s"]
    diverged: Bool[np.ndarray, "g s"]  # NaN, inf, or above the start and growing at the end
    still_falling: Bool[np.ndarray, "g s"]  # above the last target, and fell over the last tenth
    weights: Float[np.ndarray, "g s d ..."]  # at the end, in the original axes
    scores: dict[str, Float[np.ndarray, "g s r n"]]  # on the held-out rows given


Rows = jax.Array | np.ndarray


def run_attack(
    attack: Attack,
    problem: ProbeProblem,
    grid: Sequence[Hyper] | None = None,
    *,
    steps: int,
    seeds: Sequence[int] = (0,),
    record: int = 150,
    in_eigenbasis: bool | None = None,
    held_out: Mapping[str, tuple[Rows, Rows]] | None = None,
    trajectories: int | None = None,
    rows: int | None = None,
) -> AttackTrace:
    """Run every cell of the grid from every seed for up to `steps` steps, in one compiled loop.

    Hyper-parameters are traced: another grid of the same size, another problem of the same shape
    or another budget with as many recorded points does not compile again. Memory does not grow
    with `steps`. The loop ends early when every cell has diverged or has both relative errors
    below 1e-10 (float32: 1e-6); the last values are then held to the end of the curve.

    Args:
      attack: the attacker.
      problem: from `probe_problem`, in the original axes.
      grid: cells of hyper-parameters, all with the same names; `attack.grid` if None.
      steps: the budget, 1 <= steps <= 2^30.
      seeds: starts, see `initial_weights`; seed 0 is w0 = 0.
      record: at most this many log-spaced points of the curve (three more are always there).
      in_eigenbasis: where to run. None: in the eigenbasis exactly if the attack is
        rotation-equivariant. False forces the original axes, and the iteration, for comparison.
      held_out: other rows of the same task by name, (features [n, d], targets), on which the
        scores of the probe are followed (`probe_scores`): right or wrong for integer labels [n] (a
        problem of k targets), parts of R^2 for real targets [n] (a problem of one).
      trajectories: how many the compiled loop runs, at least cells times seeds (which is the
        default); surplus ones repeat the last. Grids and seeds of other numbers then share it.
      rows: to how many held-out rows each set is filled up inside; other numbers then share it too.

    Returns:
      An AttackTrace.

    Raises:
      ValueError: no Attack (a name, say) or no ProbeProblem, an empty or ragged grid, no seeds, a
        bad budget, a problem in diagonal form, or the eigenbasis asked for an attacker that depends
        on the axes.
    """
    check_attacker(attack, Attack)
    if not isinstance(problem, ProbeProblem):
        raise ValueError(
            f"expected a ProbeProblem, as probe_problem returns it, got {type(problem).__name__}."
        )
    if problem.is_diagonal or problem.features is None:
        raise ValueError("expected a problem in the original axes, as probe_problem returns it.")
    problem = budgeted(attack, problem)
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be between 1 and {MAX_STEPS}, got {steps}.")
    if record < 2:
        raise ValueError(f"record must be at least 2 points, got {record}.")
    if len(seeds) == 0:
        raise ValueError("seeds is empty; give at least one, for example (0,).")
    cells = _as_cells(attack, grid)
    if in_eigenbasis is None:
        in_eigenbasis = attack.rotation_equivariant
    elif in_eigenbasis and not attack.rotation_equivariant:
        raise ValueError("this attacker depends on the axes: it cannot run in the eigenbasis.")

    cost = cost_of(attack, problem)
    dtype = problem.optimum.dtype
    counts = {name: len(part[1]) for name, part in (held_out or {}).items()}
    held = {name: _held_rows(problem, *part, rows) for name, part in (held_out or {}).items()}
    starts = np.asarray(initial_weights(problem, seeds))
    errors_at = attack.errors_at if in_eigenbasis else None
    recorded = recorded_steps(steps, points=record)
    g, s = len(cells), len(seeds)
    wanted = g * s if trajectories is None else trajectories
    if wanted < g * s:
        raise ValueError(
            f"trajectories must be at least {g} cells times {s} seeds, got {trajectories}."
        )
    cases = np.minimum(np.arange(wanted), g * s - 1)
    raw = _run(
        attack.init,
        attack.update,
        errors_at,
        in_eigenbasis,
        # The eigenbasis knows no rows: problems of other numbers of them share the program.
        problem=problem._replace(features=None, targets=None) if in_eigenbasis else problem,
        starts=starts[cases % s],
        hyper={
            name: np.asarray([cell[name] for cell in cells], dtype)[cases // s] for name in cells[0]
        },
        recorded=recorded,
        held=held,
    )
    scores = {name: np.asarray(values)[..., : counts[name]] for name, values in raw.scores.items()}
    summary = _summary(
        raw._replace(scores=scores),
        g=g,
        s=s,
        recorded=recorded,
        late=int(np.searchsorted(recorded, _late_step(steps))),
        cost=cost,
    )
    if "solves" in attack.traits:  # it is there at once: more steps would change nothing
        summary = summary._replace(still_falling=np.zeros_like(summary.still_falling))
    return summary


class _Held(NamedTuple):
    """Held-out rows, perhaps filled up, and the spread of the targets of those that count."""

    features: Any  # NumPy arrays, which the compiled loop gets
    targets: Any
    spread: Any

    def scores(self, weights):
        return probe_scores(self.features, self.targets, weights, self.spread)


def _held_rows(problem: ProbeProblem, features: Rows, targets: Rows, rows: int | None) -> _Held:
    """Held-out rows that fit a problem, or ValueError."""
    features, targets = np.asarray(features, problem.optimum.dtype), np.asarray(targets)
    d = problem.optimum.shape[0]
    if features.ndim != 2 or features.shape[1] != d or not features.shape[0]:
        raise ValueError(f"held-out features must be [n, {d}], got shape {features.shape}.")
    is_labels = jnp.issubdtype(targets.dtype, jnp.integer)
    if targets.shape != features.shape[:1] or is_labels != (problem.optimum.ndim == 2):
        wanted = "integer labels [n]" if problem.optimum.ndim == 2 else "real targets [n]"
        raise ValueError(
            f"held-out targets must be {wanted}, one a row of features, got "
            f"{targets.dtype}{list(targets.shape)} for features {list(features.shape)}."
        )
    missing = max(0, (rows or 0) - len(targets))
    return _Held(
        np.pad(features, ((0, missing), (0, 0))),
        np.pad(targets, (0, missing)),
        np.asarray(objectives.of_targets(targets).spread(targets), features.dtype),
    )


def cost_of(attack: Attack, problem: ProbeProblem) -> Cost:
    """What the attacker pays on this problem, all its targets together."""
    cost = attack.flops(int(problem.n_rows), problem.optimum.shape[0])
    return cost if problem.optimum.ndim == 1 else cost.for_targets(problem.optimum.shape[1])


@functools.partial(jax.jit, static_argnames=("init", "update", "errors_at", "in_eigenbasis"))
def _run(init, update, errors_at, in_eigenbasis, *, problem, starts, hyper, recorded, held) -> _Raw:
    """`run_attack` after its checks, compiled whole: all trajectories, each with its cell."""
    basis = None
    if in_eigenbasis:
        basis, problem = problem.eigenvectors, problem.diagonal()
        starts = _times(starts, basis)
        held = {name: part._replace(features=part.features @ basis) for name, part in held.items()}
    if errors_at is None:
        raw = _iterate(init, update, problem, starts, hyper, recorded, held)
    else:
        raw = _evaluate(errors_at, problem, starts, hyper, recorded, held)
    if basis is not None:
        raw = raw._replace(weights=_times(raw.weights, basis.T))
    return raw


def _summary(ran: _Raw, *, g: int, s: int, recorded, late: int, cost: Cost) -> AttackTrace:
    """What the trajectories of g cells by s seeds say; on the host, where nothing compiles."""

    def shaped(values):
        values = np.asarray(values)
        return values[: g * s].reshape(g, s, *values.shape[1:])

    raw: Any = jax.tree.map(shaped, ran)
    final, before = raw.excess[..., -1], raw.excess[..., late]
    growing = (final > 1) & (final >= before)
    diverged = ~np.isfinite(final) | (final > DIVERGED_ABOVE) | growing

    def price(hits):
        paid = np.asarray(cost.setup + cost.step * hits, final.dtype)
        return np.where(hits >= 0, paid, np.asarray(np.nan, final.dtype))

    return AttackTrace(
        step=recorded,
        relative_excess_loss=raw.excess,
        relative_parameter_error=raw.error,
        steps_to_loss_gap=raw.loss_hits,
        steps_to_parameter_error=raw.error_hits,
        flops_to_loss_gap=price(raw.loss_hits),
        flops_to_parameter_error=price(raw.error_hits),
        final_relative_excess_loss=final,
        final_relative_parameter_error=raw.error[..., -1],
        diverged=diverged,
        still_falling=~diverged & (final > TARGETS[-1]) & (final < 0.99 * before),
        weights=raw.weights,
        scores=raw.scores,
    )


def _times(rows: Float[Array, "c d ..."], matrix: Float[Array, "d d"]) -> Float[Array, "c d ..."]:
    """matrix^T times each of c vectors of weights."""
    if rows.ndim == 2:
        return jnp.matmul(rows, matrix, precision="highest")
    return jnp.einsum("cik,ij->cjk", rows, matrix, precision="highest")


def _as_cells(attack: Attack, grid: Sequence[Hyper] | None) -> list[Hyper]:
    """The cells to run, checked."""
    if grid is None:
        return list(attack.grid) or [{}]
    cells = list(grid)
    if not cells:
        raise ValueError("grid is empty; give at least one cell, for example [{}].")
    for cell in cells:
        if set(cell) != set(cells[0]):
            raise ValueError(
                f"all cells of a grid need the same names, got {sorted(cells[0])} "
                f"and {sorted(cell)}."
            )
    return cells


class _Raw(NamedTuple):
    """What a run gives per cell (c = cells x seeds)."""

    excess: Float[Array, "c r"]
    error: Float[Array, "c r"]
    loss_hits: Int[Array, "c 3"]
    error_hits: Int[Array, "c 3"]
    weights: Float[Array, "c d ..."]
    scores: dict[str, Float[Array, "c r n"]]


class _Carry(NamedTuple):
    """Running quantities of all cells: nothing here grows with the number of steps."""

    step: Int[Array, ""]
    state: Any
    excess: Float[Array, "c"]
    error: Float[Array, "c"]
    loss_hits: Int[Array, "c 3"]
    error_hits: Int[Array, "c 3"]
    finished: Bool[Array, "c"]


def _relative(value, start):
    """value / start, where a start at the optimum stays at 0."""
    return jnp.where(start > 0, value / jnp.where(start > 0, start, 1.0), value)


def _hit(hits, values, step):
    """Write `step` where a target is met for the first time."""
    targets = jnp.asarray(TARGETS, values.dtype)
    return jnp.where((hits < 0) & (values[:, None] <= targets[None, :]), step, hits)


def _iterate(init, update, problem: ProbeProblem, starts, hyper, recorded, held) -> _Raw:
    """The shared loop: a scan over recorded points, a while loop over the steps between them."""
    dtype = starts.dtype
    floor = jnp.asarray(1e-6 if jnp.finfo(dtype).eps > 1e-10 else 1e-10, dtype)
    started = jax.vmap(problem.starting_from)(starts)

    def init_cell(start, hyper_cell):
        return init(problem.starting_from(start), hyper_cell)

    def update_cell(state, start, hyper_cell):
        return update(state, problem.starting_from(start), hyper_cell)

    def measure_cell(weights):
        errors = problem.to_eigenbasis(weights - problem.optimum)
        excess = excess_loss(problem.eigenvalues, errors)
        return excess, row_space_norm(problem.in_row_space, errors)

    start_excess, start_error = jax.vmap(measure_cell)(starts)

    def scores_of(weights):
        return {name: jax.vmap(part.scores)(weights) for name, part in held.items()}

    def finished(excess, error):
        converged = (excess <= floor) & (error <= floor)
        return converged | ~jnp.isfinite(excess) | (excess > DIVERGED_ABOVE)

    def one_step(carry: _Carry) -> _Carry:
        stepped = jax.vmap(update_cell)(carry.state, starts, hyper)

        def hold(old, new):
            mask = carry.finished.reshape((-1,) + (1,) * (new.ndim - 1))
            return jnp.where(mask, old, new)

        state = jax.tree.map(hold, carry.state, stepped)
        excess, error = jax.vmap(measure_cell)(state.weights)
        excess, error = _relative(excess, start_excess), _relative(error, start_error)
        step = carry.step + 1
        return _Carry(
            step=step,
            state=state,
            excess=excess,
            error=error,
            loss_hits=_hit(carry.loss_hits, excess, step),
            error_hits=_hit(carry.error_hits, error, step),
            finished=carry.finished | finished(excess, error),
        )

    def segment(carry: _Carry, end):
        def unfinished(inner: _Carry):
            return (inner.step < end) & ~jnp.all(inner.finished)

        carry = jax.lax.while_loop(unfinished, one_step, carry)
        return carry._replace(step=end), (carry.excess, carry.error, scores_of(carry.state.weights))

    never = jnp.full((starts.shape[0], len(TARGETS)), -1, jnp.int32)
    excess = _relative(started.initial_excess_loss, start_excess)
    error = _relative(start_error, start_error)
    zero = jnp.zeros((), jnp.int32)
    carry = _Carry(
        step=zero,
        state=jax.vmap(init_cell)(starts, hyper),
        excess=excess,
        error=error,
        loss_hits=_hit(never, excess, zero),
        error_hits=_hit(never, error, zero),
        finished=finished(excess, error),
    )
    carry, (excess_curve, error_curve, scores) = jax.lax.scan(segment, carry, recorded)
    return _Raw(
        excess=excess_curve.T,
        error=error_curve.T,
        loss_hits=carry.loss_hits,
        error_hits=carry.error_hits,
        weights=carry.state.weights,
        scores={name: jnp.moveaxis(values, 0, 1) for name, values in scores.items()},
    )


def _evaluate(errors_at, problem: ProbeProblem, starts, hyper, recorded, held) -> _Raw:
    """The same outputs as `_iterate` from a closed-form path: curves directly, hits by bisection.

    Every squared error component is a_i^t with a_i >= 0, so both quantities are convex in t: they
    fall up to one step and rise after it. The first step at or below a target is found by
    bisection before that step, exactly as counting would.
    """
    budget = recorded[-1]

    def one_cell(start, hyper_cell):
        started = problem.starting_from(start)

        def squares(step):
            errors = errors_at(started, hyper_cell, step)
            kept = jnp.where(per_row(problem.in_row_space, errors), errors, 0.0)
            return excess_loss(problem.eigenvalues, errors), jnp.sum(kept**2)

        start_excess, start_square = squares(jnp.zeros((), jnp.int32))

        start_norm = jnp.sqrt(start_square)
        # Where no component grows there is no rise to look for, and a fall that rounding hides (one
        # step of a slow descent in float32) is no end of it.
        ends = (errors_at(started, hyper_cell, jnp.asarray(step, jnp.int32)) for step in (0, 1))
        shrinks = functools.reduce(
            lambda begin, after: jnp.all(jnp.abs(after) <= jnp.abs(begin)), ends
        )

        def both(step):
            excess, square = squares(step)
            excess = _relative(excess, start_excess)
            return jnp.stack([excess, _relative(jnp.sqrt(square), start_norm)])

        def first(quantity, target):
            def falls_no_more(step):
                now, after = jax.vmap(both)(jnp.stack([step, step + 1]))[:, quantity]
                return ~(after < now)  # nor if NaN or inf

            def reached(step):
                return both(step)[quantity] <= target

            zero = jnp.zeros((), jnp.int32)
            lowest = jnp.where(shrinks, budget, _bisect(falls_no_more, zero, budget))
            hit = _bisect(reached, zero, lowest)
            return jnp.where(reached(hit), hit, -1)

        of_targets = jax.vmap(first, in_axes=(None, 0))
        hits = jax.vmap(of_targets, in_axes=(0, None))(
            jnp.arange(2), jnp.asarray(TARGETS, starts.dtype)
        )
        curve = jax.vmap(both)(recorded)

        def weights_at(step):
            return problem.optimum + problem.from_eigenbasis(errors_at(started, hyper_cell, step))

        def scores_at(step):
            weights = weights_at(step)
            return {name: part.scores(weights) for name, part in held.items()}

        scores = jax.lax.map(scores_at, recorded)
        return _Raw(curve[:, 0], curve[:, 1], hits[0], hits[1], weights_at(budget), scores)

    return jax.vmap(one_cell)(starts, hyper)


def _bisect(predicate, low, high):
    """First integer in [low, high] where a monotone predicate holds, `high` if none does."""

    def halve(_, bounds):
        lower, upper = bounds
        middle = lower + (upper - lower) // 2
        keep_left = predicate(middle) | (lower >= upper)  # a closed bracket stays as it is
        return jnp.where(keep_left, lower, middle + 1), jnp.where(keep_left, middle, upper)

    return jax.lax.fori_loop(0, 32, halve, (low, high))[0]
