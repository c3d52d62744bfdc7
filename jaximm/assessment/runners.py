"""One prepared problem a model and attacker, run; and the bypass."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaximm import attacks
from jaximm.assessment.bench import Bench, Model
from jaximm.assessment.level import Level
from jaximm.attacks.probe import ridge
from jaximm.attacks.probe.fit import fit_of
from jaximm.attacks.probe.loop import cost_of
from jaximm.attacks.probe.problem import with_constant
from jaximm.attacks.weights import fine_tune
from jaximm.attacks.weights.flops import lowered_flops
from jaximm.attacks.weights.loop import Execution
from jaximm.attacks.weights.problem import (
    Benign,
)
from jaximm.measures import selection
from jaximm.types import Batch

MEASURED_ROWS = 256
"""Training rows on which the loss of attackers of weights is followed."""


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
    return _bypass(bench, model.entry_fn or bench.entry_fn or _as_they_are)


def _as_they_are(x: jax.Array) -> jax.Array:
    return x


@functools.lru_cache(maxsize=8)
def _bypass(bench: Bench, entry_fn: Callable[[jax.Array], jax.Array]) -> Bypass | None:
    rows = bench.harmful
    if not jnp.issubdtype(jax.eval_shape(entry_fn, rows.train.x[:1]).dtype, jnp.floating):
        return None
    parts = {
        name: (_entry(entry_fn, part.x), part.y)
        for name, part in rows._asdict().items()
        if isinstance(part, Batch)
    }
    problem = attacks.probe_problem(*parts.pop("train"), classes=rows.classes)
    attack = ridge.ridge()
    trace = attacks.run_attack(attack, problem, steps=1, record=2, held_out=parts)
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
        "fit": fit_of(attack, trace, cells),
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
        fine_tune.fine_tune_adam(),
        problem,
        trajectories=len(level.report_seeds),
        batch_size=min(level.batch_size, problem.train.x.shape[0]),
        loops=loops,
    )
