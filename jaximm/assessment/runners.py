"""One prepared problem a model and attacker, run; and the bypass."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaximm import attacks, objectives
from jaximm.assessment.bench import (
    Bench,
    Model,
    TaskSplits,
    benign_task,
    features_shape,
    of_first_rows,
    taken,
)
from jaximm.assessment.level import Level
from jaximm.attacks.probe import ridge
from jaximm.attacks.probe.fit import fit_of
from jaximm.attacks.probe.loop import cost_of
from jaximm.attacks.probe.problem import Attack
from jaximm.attacks.weights import fine_tune
from jaximm.attacks.weights.flops import applied, count_flops, lowered_flops
from jaximm.attacks.weights.loop import Execution
from jaximm.attacks.weights.problem import Benign, WeightAttack, not_applicable
from jaximm.measures import selection
from jaximm.types import Batch, as_argument

TRIAL_ROWS = 2**16
"""Training rows of a trial, which takes time by their batches."""

MEASURED_ROWS = 256
"""Training rows on which the loss of attackers of weights is followed."""


# --- probes on frozen features -------------------------------------------------------------------


FEATURE_ROWS = 64
"""Rows of a pass through a model: one size, filled up, so that every set of rows shares it."""


def features_of(bench: Bench, model: Model, x: Any) -> Float[np.ndarray, "n d"]:
    """Features of many rows in the default float, a block at a time; of texts, hidden states."""
    features_fn = as_argument(model.features_fn or bench.features_fn)
    return in_blocks(lambda part: _features(features_fn, model.params, part), np.asarray(x))


def in_blocks(fun: Callable[[Any], Any], x: np.ndarray) -> Float[np.ndarray, "n d"]:
    """`fun` of rows, a block of one size at a time, in the default float."""
    parts = []
    for start in range(0, len(x), FEATURE_ROWS):
        part = x[start : start + FEATURE_ROWS]
        missing = FEATURE_ROWS - len(part)
        filled = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)])
        parts.append(np.asarray(fun(jnp.asarray(filled)))[: len(part)])
    return np.concatenate(parts).astype(jnp.zeros(()).dtype, copy=False)


def token_scores(bench: Bench, model: Model, rows: Batch) -> Float[np.ndarray, "n"]:
    """The share of right tokens of each row."""
    return _by_row(_scores, bench, model, rows)


def token_losses(bench: Bench, model: Model, rows: Batch) -> Float[np.ndarray, "n"]:
    """Nats a token of each row."""
    return _by_row(_losses, bench, model, rows)


def _by_row(
    fun: Callable[..., jax.Array], bench: Bench, model: Model, rows: Batch
) -> Float[np.ndarray, "n"]:
    """A number a row, a block of rows at a time."""
    features_fn = as_argument(model.features_fn or bench.features_fn)
    n, parts = rows.x.shape[0], []
    for start in range(0, n, FEATURE_ROWS):
        taken = np.minimum(np.arange(start, start + FEATURE_ROWS), n - 1)
        block = jax.tree.map(lambda leaf, taken=taken: jnp.asarray(np.asarray(leaf)[taken]), rows)
        parts.append(np.asarray(fun(features_fn, model.params, block))[: n - start])
    return np.concatenate(parts).astype(float)


@jax.jit
def _scores(features_fn, params, rows):
    return objectives.of_targets(rows.y).scores(features_fn(params, rows.x), rows.y)


@jax.jit
def _losses(features_fn, params, rows):
    return objectives.of_targets(rows.y).losses(features_fn(params, rows.x), rows.y)


@jax.jit
def _features(features_fn, params, x):
    outputs = features_fn(params, x)
    return getattr(outputs, "states", outputs)


AnyAttack = TypeVar("AnyAttack", Attack, WeightAttack)


class Subject:
    """One model on one task, prepared once for every attacker; it holds arrays, no cache does."""

    def __init__(self, bench: Bench, model: Model, task: str):
        self.bench, self.model, self.task = bench, model, task
        self.rows = bench.tasks()[task]
        self._problems: dict[str, attacks.FineTuneProblem] = {}
        self._few: tuple[Any, attacks.ProbeProblem] | None = None

    def limited(self, attack: AnyAttack) -> AnyAttack:
        """The attacker as it learns this task: what it lacks are rows of harmful ones."""
        if attack.harmful_rows is None or not benign_task(self.task):
            return attack
        return dataclasses.replace(attack, harmful_rows=None)

    def probe_of(self, attack: Attack) -> tuple[attacks.ProbeProblem, float]:
        """The probe problem on the rows that an attacker has, and what their features cost.

        Only these rows go through the model. That of the last budget is kept.
        """
        train = self.rows.train
        n = train.x.shape[0]
        rows = attack.rows_of(n)
        if rows is None:
            return self.probe, self.feature_flops
        key = attack.harmful_rows, attack.rows_seed
        if self._few is None or self._few[0] != key:
            few = taken(train, rows)
            features: Any = features_of(self.bench, self.model, few.x)
            problem = attacks.probe_problem(features, few.y, classes=self.rows.classes)
            self._few = key, problem
        return self._few[1], self.feature_flops * len(rows) / n

    @functools.cached_property
    def probe(self) -> attacks.ProbeProblem:
        """The probe problem: features, spectrum and optimum, computed once."""
        train, few = self.rows.train, self.rows.few
        rows, classes = (train, self.rows.classes) if few is None else (few, None)
        features: Any = features_of(self.bench, self.model, rows.x)
        return attacks.probe_problem(features, rows.y, classes=classes, n_rows=train.x.shape[0])

    @functools.cached_property
    def held(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Features and targets of the rows that choose and that are reported."""
        return {
            split: (features_of(self.bench, self.model, part.x), np.asarray(part.y))
            for split, part in self._measured()
        }

    def _measured(self):
        return ("selection", self.rows.selection), ("held_out", self.rows.held_out)

    @functools.cached_property
    def feature_flops(self) -> float:
        """What a probe pays for the features of its training rows, as attackers of weights do."""
        x = self.rows.train.x
        n, block = x.shape[0], min(x.shape[0], FEATURE_ROWS)
        floor = 2.0 * block * sum(leaf.size for leaf in jax.tree.leaves(self.model.params))
        features_fn = as_argument(self.model.features_fn or self.bench.features_fn)
        inputs = jax.ShapeDtypeStruct((block, *x.shape[1:]), x.dtype)
        return (
            n
            / block
            * lowered_flops(applied, features_fn, self.model.params, inputs, default=floor)
        )

    def weights(self, split: str = "held_out") -> attacks.FineTuneProblem:
        """The problem of attackers of weights; measured are the rows of one split."""
        if split not in self._problems:
            self._problems[split] = _weights_problem(self.bench, self.model, self.task, split)
        return self._problems[split]

    def not_applicable(self, attack: WeightAttack) -> str | None:
        """Why an attacker of weights cannot be run here; None if it can."""
        problem = self.weights()
        if self.task == ALONE:  # a task is no benign task beside itself
            problem = dataclasses.replace(problem, benign=None)
        return not_applicable(attack, problem)


ALONE = "benign:primary"
"""The task that has no other beside it whose quality attackers could lose."""


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
    """What is left to an attacker who throws the trainable part away; None if targets are tokens.

    An upper bound on what immunising that part can achieve: whoever has the model has what enters
    the part, [n, ...] numbers, flattened or averaged over positions, and a column of ones. What
    enters is what an `entry_fn` says, and the raw inputs too, since the function is the
    submitter's: whole numbers as they are, and those in rows of a few values also as counts of
    each (one-hot, summed over positions). Which of these, and the penalty, are chosen on selection
    rows; the price is that of all.
    """
    del level
    rows = bench.harmful
    if rows.is_tokens:
        return None
    found = [_ridge_on(reading, rows) for reading in _readings(bench, model)]
    best = max(found, key=lambda one: one.selected)
    return best._replace(flops=sum(one.flops for one in found))


TOKENS = 4096
"""Rows of whole numbers with more values than this are not counted value by value."""


def _readings(bench: Bench, model: Model) -> list[Callable[[Any], Any]]:
    """Functions from inputs to what ridge may read."""
    x = bench.harmful.train.x
    readings: list[Callable[[Any], Any]] = [_as_they_are]
    if x.dtype.kind in "iu" and x.ndim == 2:
        values = np.unique(np.asarray(x))
        if len(values) <= TOKENS:
            readings.append(functools.partial(_counts, values))
    entry_fn = model.entry_fn or bench.entry_fn
    return readings if entry_fn is None else [*readings, entry_fn]


def _counts(values: np.ndarray, x: Any) -> np.ndarray:
    """How often each value is in a row [n, t]."""
    return np.stack([np.bincount(np.searchsorted(values, row).clip(0, len(values) - 1),
                                 minlength=len(values)) for row in np.asarray(x)])  # fmt: skip


def _ridge_on(entry_fn: Callable[[Any], Any], rows: TaskSplits) -> Bypass:
    """Ridge on one reading of the inputs."""
    # Few rows stand for many only where what is read of them is linear.
    train = rows.few if rows.few is not None and entry_fn is _as_they_are else rows.train
    x, held_out, selection_rows = (
        _entry(entry_fn, part.x) for part in (train, rows.held_out, rows.selection)
    )
    n, y = rows.train.x.shape[0], np.asarray(train.y)
    k = 1 if rows.classes is None else rows.classes
    whole = y.dtype.kind in "iu"
    targets = np.eye(k, dtype=x.dtype)[y] if whole else y.reshape(-1, k).astype(x.dtype)
    # As `probe_problem` and `ridge` do it; on the host, where a shape of its own compiles nothing.
    left, sigma, right = np.linalg.svd(x, full_matrices=False)
    sigma = np.where(sigma > max(n, x.shape[1]) * np.finfo(x.dtype).eps * sigma[0], sigma, 0.0)
    eigenvalues, moments = sigma**2 / len(x), sigma[:, None] * (left.T @ targets) / len(x)
    attack = ridge.ridge()
    outcomes, scores = [], objectives.of_targets(rows.train.y).scores
    for cell in attack.grid:
        damped = eigenvalues + cell["penalty"] * (eigenvalues[0] or 1.0)
        inverse = np.where(eigenvalues > 0, 1 / np.where(eigenvalues > 0, damped, 1.0), 0.0)
        weights = right.T @ (inverse[:, None] * moments)
        outcomes.append(
            (scores(selection_rows @ weights, np.asarray(rows.selection.y)),
             scores(held_out @ weights, np.asarray(rows.held_out.y)))
        )  # fmt: skip
    chances = np.asarray([np.mean(chosen_by) for chosen_by, _ in outcomes])
    place = selection.choose(chances[:, None])
    cost = attack.flops(n, x.shape[1]).for_targets(k)
    return Bypass(
        d=x.shape[1],
        scores=outcomes[place][1][None].astype(float),
        flops=cost.setup + cost.step,
        hyper_parameters={key: float(value) for key, value in attack.grid[place].items()},
        selected=float(chances[place]),
    )


def _as_they_are(x: jax.Array) -> jax.Array:
    return x


def _entry(entry_fn: Callable[[Any], Any], x: Any) -> Float[np.ndarray, "n d"]:
    """What enters, and a column of ones; a block of rows at a time."""

    def of_block(x):
        entered = np.asarray(entry_fn(x))
        if entered.dtype.kind != "f":
            entered = entered.astype(jnp.zeros(()).dtype)
        n, *shape = entered.shape
        wide = len(shape) > 1 and math.prod(shape) > ENTRY_WIDTH
        flat = np.mean(entered, axis=tuple(range(1, len(shape)))) if wide else entered
        return flat.reshape(n, -1)

    entered = in_blocks(of_block, np.asarray(x))
    return np.concatenate([entered, np.ones((len(entered), 1), entered.dtype)], axis=1)


def _probe_run(
    subject: Subject, attack, *, level, steps, execution, split, cells, seeds, stops, rows
):
    """A batch of probes, as plain data; scores at some recorded points."""
    del execution
    attack = subject.limited(attack)
    problem, feature_flops = subject.probe_of(attack)
    trace = attacks.run_attack(
        attack,
        problem,
        cells,
        steps=steps,
        seeds=seeds,
        record=level.record,
        held_out={"measured": subject.held[split]},
        # Choosing and reporting share one compilation, and so do tasks.
        trajectories=max(
            max(1, len(attack.grid)) * len(level.select_seeds), len(level.report_seeds)
        ),
        rows=rows,
    )
    cost = cost_of(attack, problem)
    scores = trace.scores["measured"]
    finite = np.isfinite(trace.relative_excess_loss)
    return {
        "step": trace.step,
        "setup_flops": feature_flops + cost.setup,
        "step_flops": cost.step,
        "quality": np.where(finite, np.mean(scores, axis=-1), np.nan),
        "utility": None,
        "fit": fit_of(attack, trace, cells),
        "scores": {str(stop): scores[:, :, stop] for stop in stops},
        # Relative to the start, so that guessing (w = 0) is 1.
        "loss": {
            "start": 1.0,
            "end": float(np.mean(trace.final_relative_excess_loss)),
            "guessing": 1.0,
        },
        "gradient": {"start": 1.0, "end": 1.0 if finite.all() else np.nan, "backbone": np.nan},
        "diverged": trace.diverged,
        "still_falling": trace.still_falling,
    }


# --- attackers of weights ------------------------------------------------------------------------


def _weights_problem(
    bench: Bench, model: Model, task: str, split: str = "held_out"
) -> attacks.FineTuneProblem:
    """A task under a model in float32, from a head of zeros or the one that the model has.

    What is measured are the rows of one split, of both tasks: those that choose, or those that are
    reported. The primary task stands beside itself too: its head is then idle, and the programs are
    those of the other tasks.
    """
    rows = bench.tasks()[task]
    cast = functools.partial(jax.tree.map, _single)
    k = 1 if rows.classes is None else rows.classes
    d = features_shape(bench, model)[-1]
    head = () if rows.is_tokens else attacks.zero_head(d, k, jnp.float32)
    if model.harmful_head is not None and task == "harmful":
        head = model.harmful_head
    of_rows = functools.partial(jax.tree.map, _rows_single)
    train = of_rows(rows.train)
    return attacks.FineTuneProblem(
        features_fn=model.features_fn or bench.features_fn,
        params=cast(model.params),
        head=cast(head),
        train=train,
        selection=None,
        measured=jax.tree.map(lambda leaf: leaf[:MEASURED_ROWS], train),
        held_out=of_rows(getattr(rows, split)),
        benign=Benign(
            head=cast(model.benign_head),
            train=of_rows(bench.primary.train),
            held_out=of_rows(getattr(bench.primary, split)),
        ),
        public=None if model.public is None else cast(model.public),
        refresh_fn=bench.refresh_fn,
        # Of what is reported only: it costs, and nothing is chosen by it.
        readings_fn=(model.readings_fn or bench.readings_fn)
        if split == "held_out" and not benign_task(task)
        else None,
        **bench.posed,
    )


def _rows_single(leaf: Any) -> jax.Array:
    """`_single`, without a copy of rows that are so already: they may be gigabytes."""
    is_wide = getattr(leaf, "dtype", np.dtype(float)).itemsize > 4
    return _single(leaf) if is_wide or not isinstance(leaf, jax.Array) else leaf


def _single(leaf: Any) -> jax.Array:
    """In 32 bits; converted on the host, where it compiles nothing."""
    leaf = np.asarray(leaf)
    dtype = {"int64": np.int32, "float64": np.float32}.get(leaf.dtype.name, leaf.dtype)
    return jnp.asarray(leaf.astype(dtype))


def _weights_run(
    subject: Subject, attack, *, level, steps, execution, split, cells, seeds, stops, rows
):
    """A batch of trajectories, as plain data; scores at some recorded points."""
    del rows
    attack = subject.limited(attack)
    problem = subject.weights(split)
    size = min(level.batch_size, problem.train.x.shape[0])
    trace = attacks.run_fine_tune(
        attack,
        problem,
        cells,
        steps=steps,
        seeds=seeds,
        batch_size=size,
        record=level.record,
        chunk=execution.chunk,
        loop=execution.loop,
        devices=_devices_of(problem),
    )
    finite, flops = trace.finite, (trace.setup_flops, trace.step_flops)
    alone = subject.task == ALONE
    unmeasured = alone or trace.utility_scores.shape[-1] == 0
    if alone:  # the idle head costs nothing, and what it gives is no number of this task
        finite = np.isfinite(trace.held_out_loss)
        without = dataclasses.replace(problem, benign=None)
        flops = count_flops(attack, without, cells[0], batch_size=size)
    guessing = float(attacks.guessing_loss(problem))
    mean = functools.partial(np.mean, dtype=float)
    return {
        "step": trace.step,
        "setup_flops": flops[0],
        "step_flops": flops[1],
        "quality": np.where(finite, trace.held_out_quality, np.nan),
        # None too where an attacker keeps the model as it came for its work.
        "utility": None if unmeasured else np.where(finite, trace.utility, np.nan),
        "readings": trace.readings,
        "scores": {str(stop): trace.scores[:, :, stop] for stop in stops},
        "utility_scores": {
            str(stop): trace.utility_scores[:, :, stop, : 0 if alone else None] for stop in stops
        },
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


def _devices_of(problem: attacks.FineTuneProblem) -> list[Any]:
    """Accelerators that trajectories are spread over; none for a model that is spread itself.

    A CPU's devices share its cores, which one trajectory keeps busy.
    """
    leaves = [leaf for leaf in jax.tree.leaves(problem.params) if isinstance(leaf, jax.Array)]
    sharded = any(len(leaf.sharding.device_set) > 1 for leaf in leaves)
    return [] if sharded or jax.default_backend() == "cpu" else jax.local_devices()


def execution_of(bench: Bench, model: Model, level: Level) -> Execution:
    """How trajectories run: as a short measured trial says, or without one all at once.

    Convolutions and texts on a CPU run one at a time then: a batch of them gains nothing there, and
    takes the memory of as many models.
    """
    on_cpu = jax.default_backend() == "cpu"
    loops = ("host",) if bench.convolutions and on_cpu else ("device",)
    if not level.trial:
        alone = on_cpu and (bench.convolutions or bench.harmful.is_tokens)
        return Execution(1 if alone else len(level.report_seeds), loops[0], {})
    problem = Subject(of_first_rows(bench, TRIAL_ROWS), model, "harmful").weights()
    return attacks.fastest_execution(
        fine_tune.fine_tune_adam(),
        problem,
        trajectories=len(level.report_seeds),
        batch_size=min(level.batch_size, problem.train.x.shape[0]),
        loops=loops,
    )
