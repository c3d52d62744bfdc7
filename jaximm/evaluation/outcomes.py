"""What one attacker reaches: chosen on some seeds and rows, reported on others.

Hyper-parameters, and the step at which to stop, are chosen by the quality on selection rows over
`Level.select_seeds`; the chosen cell is then run from the fresh `Level.report_seeds` and measured
at that step on held-out rows, which have chosen nothing. An attacker who must keep the utility of
the model he attacks chooses otherwise: among cells and steps that keep it, on selection rows of the
primary task. Each is a choice and a report of its own. All runs are batches of cells in a `Store`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaximm import attacks
from jaximm.attacks.base import Attack, cost_of, with_constant
from jaximm.attacks.suite import at_edge
from jaximm.attacks.weight_run import Execution, lowered_flops
from jaximm.attacks.weights import (
    Benign,
    WeightAttack,
    logits_of,
    not_applicable,
    scores_of,
    spread_of,
)
from jaximm.evaluation import selection
from jaximm.evaluation.bench import Bench, Level, Model
from jaximm.evaluation.cells import Store, digest, fingerprint, source_digest
from jaximm.types import Batch

MEASURED_ROWS = 256
"""Training rows on which the loss of attackers of weights is followed."""


class Reported(NamedTuple):
    """A choice of cell and stop, and what it does from the report seeds on held-out rows."""

    hyper_parameters: dict[str, float]
    selected: float  # mean quality at the stop on selection rows, which chose it
    stop: int  # place in `Outcome.step` at which the attacker stops
    quality: Float[np.ndarray, "s r"]
    utility: Float[np.ndarray, "s r"] | None  # None: the attacker leaves the backbone alone
    scores: Float[np.ndarray, "s n"]  # at the stop; NaN for a seed of which an output is not finite
    utility_scores: Float[np.ndarray, "s m"] | None  # likewise, of the primary task
    loss: dict[str, float]
    gradient: dict[str, float]
    diverged: bool  # at the stop: not finite, or a run that ends there did
    still_falling: bool
    edge_of_grid: bool


class Outcome(NamedTuple):
    """One attacker on one model and task; see `AttackTrace`.

    `best` is the choice by quality alone, None unless the status is "done". `kept` is the choice
    among what keeps the utility: None where nothing does, and where no bound binds (a probe, a
    benign task).
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
    best: Reported | None
    kept: Reported | None


def utility_bound(utility: float, fraction: float) -> float | None:
    """The utility that an attacked model must keep: u - (1 - fraction) |u|; None if not finite.

    Below a negative R^2, not above it.

    >>> utility_bound(0.5, 0.9), round(utility_bound(-1.0, 0.9), 9)
    (0.45, -1.1)
    """
    return utility - (1 - fraction) * abs(utility) if math.isfinite(utility) else None


def shipped_scores(bench: Bench, model: Model, split: str) -> Float[np.ndarray, "n"]:
    """What the shipped head does on rows of the primary task: scores by row."""
    rows = getattr(bench.primary, split)
    features = features_of(bench, model, rows.x)
    head = jax.tree.map(lambda leaf: jnp.asarray(leaf, features.dtype), model.benign_head)
    return np.asarray(scores_of(logits_of(head, features), rows.y, spread_of(rows.y)), float)


@functools.lru_cache(maxsize=64)
def _selection_bound(bench: Bench, model: Model, fraction: float) -> float | None:
    """`utility_bound` on the rows that choose."""
    return utility_bound(float(np.mean(shipped_scores(bench, model, "selection"))), fraction)


def run_outcome(
    bench: Bench,
    model: Model,
    task: str,
    name: str,
    attack: Attack | WeightAttack,
    *,
    level: Level,
    steps: int,
    execution: Execution,
    store: Store,
    identity: Mapping[str, str],
) -> Outcome:
    """Chooses and reports; a failure is an outcome too.

    Args:
      bench, model, task: what is attacked; `task` is a key of ``bench.tasks()``.
      name, attack: the attacker.
      level: seeds and sizes.
      steps: the budget.
      execution: how many trajectories of attackers of weights run at once.
      store: of cells.
      identity: hashes of the model, the data and the code.
    """
    blank = functools.partial(_blank, model.label, name, task)
    run = functools.partial(
        _probe_run if isinstance(attack, Attack) else _weights_run,
        bench,
        model,
        task,
        attack,
        level=level,
        steps=steps,
        execution=execution,
    )
    address = dict(identity) | {"attacker": name, "task": task, "steps": steps}
    functions = (attack.init, attack.update, model.features_fn or bench.features_fn)
    address["own"] = [source_digest(*functions), *map(fingerprint, functions)]
    address |= {"classes": bench.tasks()[task].classes, "float": jnp.zeros(()).dtype.name}
    address["platform"] = jax.default_backend()
    address |= {"batch_size": level.batch_size, "record": level.record, "probes": level.probes}
    if isinstance(attack, WeightAttack):
        reason = not_applicable(attack, _weights_problem(bench, model, task))
        if reason is not None:
            return blank("not_applicable", reason, ())
        address |= {"chunk": execution.chunk, "loop": execution.loop}
    grid = tuple(attack.grid) or ({},)

    def batch(split: str, cells: Sequence[Mapping[str, float]], seeds: Sequence[int], stops=()):
        pairs = [(cell, seed) for cell in cells for seed in seeds]
        return store.get(
            {**address, "split": split, "stops": list(stops)},
            pairs,
            lambda: run(split=split, cells=cells, seeds=seeds, stops=stops),
        )

    first = batch("selection", grid, level.select_seeds)
    if first["status"] == "failed":
        return blank("failed", first["error"], first["cells"])
    chances = _array(first["found"]["quality"])
    best = _choose(chances)
    kept = None
    bound = _selection_bound(bench, model, level.utility_fraction)
    if first["found"]["utility"] is not None and bound is not None and not benign_task(task):
        keeps = np.mean(_array(first["found"]["utility"]), axis=1) >= bound
        if keeps.any():
            kept = _choose(np.where(keeps[:, None], chances, np.nan), prefer=best.cell)
    batches, cells = {}, [*first["cells"]]
    choices = [choice for choice in (best, kept) if choice is not None]
    for cell in dict.fromkeys(choice.cell for choice in choices):
        stops = sorted({choice.stop for choice in choices if choice.cell == cell})
        found = batch("held_out", [grid[cell]], level.report_seeds, stops)
        cells += found["cells"]
        if found["status"] == "failed":
            return blank("failed", found["error"], tuple(cells))
        batches[cell] = found["found"]

    def reported(choice: _Choice) -> Reported:
        found = batches[choice.cell]
        quality, at = _array(found["quality"])[0], str(choice.stop)
        lost, last = ~np.isfinite(quality[:, choice.stop]), choice.stop == quality.shape[1] - 1
        return Reported(
            hyper_parameters={key: float(value) for key, value in grid[choice.cell].items()},
            selected=float(np.mean(chances[choice.cell, :, choice.stop])),
            stop=choice.stop,
            quality=quality,
            utility=None if found["utility"] is None else _array(found["utility"])[0],
            scores=np.where(lost[:, None], np.nan, _array(found["scores"][at])[0]),
            utility_scores=None
            if found["utility"] is None
            else np.where(lost[:, None], np.nan, _array(found["utility_scores"][at])[0]),
            loss=found["loss"],
            gradient=found["gradient"],
            diverged=bool(np.any(lost)) or (last and bool(np.any(found["diverged"]))),
            still_falling=last and bool(np.any(found["still_falling"])),
            edge_of_grid=at_edge(attack, grid, choice.cell),
        )

    found = batches[best.cell]
    steps_at = _array(found["step"])
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
                "diverged": bool(np.any(first["found"]["diverged"][number])),
            }
            for number, cell in enumerate(grid)
        ],
        step=steps_at,
        flops=found["setup_flops"] + steps_at * found["step_flops"],
        setup_flops=found["setup_flops"],
        step_flops=found["step_flops"],
        selection=chances,
        best=reported(best),
        kept=None if kept is None else reported(kept),
    )


def benign_task(task: str) -> bool:
    """Whether learning a task is no harm, so that there is no utility to keep meanwhile."""
    return task.startswith("benign")


class _Choice(NamedTuple):
    cell: int
    stop: int


def _choose(chances: Float[np.ndarray, "g a r"], *, prefer: int | None = None) -> _Choice:
    """The cell and stop of highest mean quality; of equal ones, that of a cell to prefer.

    A diverged cell is no choice at its end, but may be stopped before.
    """

    def best_of(chances):
        g, _, r = chances.shape
        return _Choice(*divmod(selection.choose(np.moveaxis(chances, 1, 2).reshape(g * r, -1)), r))

    found = best_of(chances)
    if prefer is not None:  # before the first step all cells are equal, and one run will do
        own = best_of(chances[prefer][None])._replace(cell=prefer)
        values = [np.mean(chances[choice.cell, :, choice.stop]) for choice in (own, found)]
        return own if values[0] >= values[1] else found
    return found


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
        None, None,
    )  # fmt: skip


# --- probes on frozen features -------------------------------------------------------------------


def features_of(bench: Bench, model: Model, x: jax.Array, *, block: int = 500) -> jax.Array:
    """Features of many rows in the default float, a block at a time."""
    run = _compiled(model.features_fn or bench.features_fn)
    parts = [run(model.params, x[start : start + block]) for start in range(0, len(x), block)]
    return jnp.concatenate(parts).astype(jnp.zeros(()).dtype)


@functools.lru_cache(maxsize=64)
def _compiled(features_fn):
    return jax.jit(features_fn)


@functools.lru_cache(maxsize=2)
def probe_task(
    bench: Bench, model: Model, task: str
) -> tuple[attacks.ProbeProblem, dict[str, tuple[jax.Array, jax.Array]]]:
    """The probe problem of a task under a model, and its selection and held-out rows.

    Every probe meets the same one: features, spectrum and optimum are computed once.
    """
    rows = bench.tasks()[task]
    problem = attacks.probe_problem(
        features_of(bench, model, rows.train.x), rows.train.y, classes=rows.classes
    )
    held = {
        split: (features_of(bench, model, part.x), part.y)
        for split, part in (("selection", rows.selection), ("held_out", rows.held_out))
    }
    return problem, held


class Bypass(NamedTuple):
    """Ridge on what enters the trainable part of a model, as if that part were not there."""

    d: int
    scores: Float[np.ndarray, "1 n"]  # held-out
    flops: float
    hyper_parameters: dict[str, float]
    selected: float


ENTRY_WIDTH = 1024
"""Entries with more numbers than this are averaged over their positions."""


def bypass(bench: Bench, model: Model, level: Level) -> Bypass | None:
    """What is left to an attacker who throws the trainable part away; None if nothing numeric.

    An upper bound on what immunising that part can achieve: whoever has the model has what enters
    the part, [n, ...] numbers, flattened or averaged over positions, and a column of ones. The
    penalty is chosen on selection rows.
    """
    return _bypass(bench, model.entry_fn or bench.entry_fn or _as_they_are, level.probes)


def _as_they_are(x: jax.Array) -> jax.Array:
    return x


@functools.lru_cache(maxsize=8)
def _bypass(bench: Bench, entry_fn: Callable[[jax.Array], jax.Array], suite: str) -> Bypass | None:
    rows = bench.harmful
    if not jnp.issubdtype(jax.eval_shape(entry_fn, rows.train.x[:1]).dtype, jnp.floating):
        return None
    parts = {
        name: (_entry(entry_fn, part.x), part.y)
        for name, part in rows._asdict().items()
        if isinstance(part, Batch)
    }
    problem = attacks.probe_problem(*parts.pop("train"), classes=rows.classes)
    attack = attacks.suite_attacks(suite, ["ridge"])["ridge"]
    steps = attacks.suite_steps(suite, ["ridge"])["ridge"]
    trace = attacks.run_attack(attack, problem, steps=steps, record=2, held_out=parts)
    chances = np.mean(np.asarray(trace.scores["selection"][:, 0, -1]), axis=-1)
    place = selection.choose(chances[:, None])
    cost = cost_of(attack, problem)
    return Bypass(
        d=problem.eigenvalues.shape[0],
        scores=np.asarray(trace.scores["held_out"][place, :, -1], float),
        flops=cost.setup + int(trace.step[-1]) * cost.step,
        hyper_parameters={key: float(value) for key, value in attack.grid[place].items()},
        selected=float(chances[place]),
    )


def _entry(entry_fn: Callable[[jax.Array], jax.Array], x: jax.Array, block: int = 500) -> jax.Array:
    """[n, d + 1], a block of rows at a time."""

    def of_block(x):
        entered = entry_fn(x)
        n, *shape = entered.shape
        wide = len(shape) > 1 and math.prod(shape) > ENTRY_WIDTH
        flat = jnp.mean(entered, axis=tuple(range(1, len(shape)))) if wide else entered
        return flat.reshape(n, -1).astype(jnp.zeros(()).dtype)

    parts = [of_block(x[start : start + block]) for start in range(0, len(x), block)]
    return with_constant(jnp.concatenate(parts))


@functools.lru_cache(maxsize=64)
def _feature_flops(bench: Bench, model: Model, task: str) -> float:
    """What a probe pays for the features of its training rows, as attackers of weights do."""
    x = bench.tasks()[task].train.x
    n, block = x.shape[0], min(x.shape[0], 64)
    floor = 2.0 * block * sum(leaf.size for leaf in jax.tree.leaves(model.params))
    features_fn = model.features_fn or bench.features_fn
    return n / block * lowered_flops(features_fn, model.params, x[:block], default=floor)


def _probe_run(bench, model, task, attack, *, level, steps, execution, split, cells, seeds, stops):
    """A batch of probes, as plain data; scores at some recorded points."""
    del execution
    problem, held = probe_task(bench, model, task)
    trace = attacks.run_attack(
        attack,
        problem,
        cells,
        steps=steps,
        seeds=seeds,
        record=level.record,
        held_out=held,
        # Choosing and reporting share one compilation.
        trajectories=max(
            max(1, len(attack.grid)) * len(level.select_seeds), len(level.report_seeds)
        ),
    )
    cost = cost_of(attack, problem)
    forward = _feature_flops(bench, model, task)
    finite = np.isfinite(np.asarray(trace.relative_excess_loss)).all()
    return {
        "step": trace.step,
        "setup_flops": forward + cost.setup,
        "step_flops": cost.step,
        "quality": jnp.where(
            jnp.isfinite(trace.relative_excess_loss),
            jnp.mean(trace.scores[split], axis=-1),
            jnp.nan,
        ),
        "utility": None,
        "scores": {str(stop): trace.scores[split][:, :, stop] for stop in stops},
        # Relative to the start, so that guessing (w = 0) is 1.
        "loss": {
            "start": 1.0,
            "end": float(np.mean(np.asarray(trace.final_relative_excess_loss))),
            "guessing": 1.0,
        },
        "gradient": {"start": 1.0, "end": 1.0 if finite else np.nan, "backbone": np.nan},
        "diverged": trace.diverged,
        "still_falling": trace.still_falling,
    }


# --- attackers of weights ------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _weights_problem(
    bench: Bench, model: Model, task: str, split: str = "held_out"
) -> attacks.FineTuneProblem:
    """A task under a model in float32, from a head of zeros or the one that the model has.

    What is measured are the rows of one split, of both tasks: those that choose, or those that are
    reported.
    """
    rows = bench.tasks()[task]
    cast = functools.partial(jax.tree.map, _single)
    k = 1 if rows.classes is None else rows.classes
    d = model.benign_head.kernel.shape[0]
    head = attacks.zero_head(d, k, jnp.float32)
    if model.harmful_head is not None and task == "harmful":
        head = model.harmful_head
    train = cast(rows.train)
    return attacks.FineTuneProblem(
        features_fn=model.features_fn or bench.features_fn,
        params=cast(model.params),
        head=cast(head),
        train=train,
        selection=None,
        measured=Batch(train.x[:MEASURED_ROWS], train.y[:MEASURED_ROWS]),
        held_out=cast(getattr(rows, split)),
        benign=None
        if task == "benign:primary"
        else Benign(
            head=cast(model.benign_head),
            train=cast(bench.primary.train),
            held_out=cast(getattr(bench.primary, split)),
        ),
        public=None if model.public is None else cast(model.public),
        refresh_fn=bench.refresh_fn,
    )


def _single(leaf: jax.Array) -> jax.Array:
    leaf = jnp.asarray(leaf)
    if leaf.dtype == jnp.int64:
        return leaf.astype(jnp.int32)
    return leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf


def _weights_run(
    bench, model, task, attack, *, level, steps, execution, split, cells, seeds, stops
):
    """A batch of trajectories, as plain data; scores at some recorded points."""
    problem = _weights_problem(bench, model, task, split)
    trace = attacks.run_fine_tune(
        attack,
        problem,
        cells,
        steps=steps,
        seeds=seeds,
        batch_size=min(level.batch_size, problem.train.x.shape[0]),
        record=level.record,
        chunk=execution.chunk,
        loop=execution.loop,
    )
    guessing = float(attacks.guessing_loss(problem))
    mean = functools.partial(np.mean, dtype=float)
    return {
        "step": trace.step,
        "setup_flops": trace.setup_flops,
        "step_flops": trace.step_flops,
        "quality": np.where(trace.finite, trace.held_out_quality, np.nan),
        "utility": None
        if problem.benign is None
        else np.where(trace.finite, trace.utility, np.nan),
        "scores": {str(stop): trace.scores[:, :, stop] for stop in stops},
        "utility_scores": {str(stop): trace.utility_scores[:, :, stop] for stop in stops},
        "loss": {
            "start": float(mean(trace.train_loss[..., 0])),
            "end": float(mean(trace.train_loss[..., -1])),
            "guessing": guessing,
        },
        "gradient": {
            "start": float(mean(trace.gradient[..., 0])),
            "end": float(mean(trace.gradient[..., 1])),
            "backbone": float(mean(trace.backbone_gradient)),
        },
        "diverged": trace.diverged,
        "still_falling": trace.still_falling,
    }


def execution_of(bench: Bench, model: Model, level: Level) -> Execution:
    """How trajectories run: as a short measured trial says, or without one all at once.

    Convolutions on a CPU run one at a time then: a batch of them gains nothing there.
    """
    slow = bench.convolutions and jax.default_backend() == "cpu"
    loops = ("host",) if slow else ("device",)
    if not level.trial:
        return Execution(1 if slow else len(level.report_seeds), loops[0], {})
    problem = _weights_problem(bench, model, "harmful")
    return attacks.fastest_execution(
        attacks.make_weight_attack("fine_tune_adam"),
        problem,
        trajectories=len(level.report_seeds),
        batch_size=min(level.batch_size, problem.train.x.shape[0]),
        loops=loops,
    )


def model_identity(model: Model, *, data: str, code: str) -> dict[str, str]:
    """Hashes that address a model's cells."""
    from jaximm.checkpoint import content_hash

    arrays = {
        "params": model.params,
        "benign_head": model.benign_head._asdict(),
        "harmful_head": {} if model.harmful_head is None else model.harmful_head._asdict(),
        "public": {} if model.public is None else model.public,
        "frozen": model.frozen,
    }
    return {"model": content_hash(arrays), "data": data, "code": code}


def data_identity(bench: Bench) -> str:
    """Hash of every row of every task."""
    from jaximm.checkpoint import content_hash

    return digest(
        {
            name: [
                content_hash({"x": part.x, "y": part.y})
                for part in (rows.train, rows.selection, rows.held_out)
            ]
            for name, rows in (bench.tasks() | {"primary": bench.primary}).items()
        }
    )
