r"""Attackers of the weights: the problem, the protocol and the loop for full fine-tuning.

The attacker has the trainable blocks of a backbone as flat `params` and a linear head, and trains
both on rows of the harmful task,

    outputs = features_fn(params, x) @ kernel + bias,

by the mean cross-entropy (in nats) of integer labels, or by half the mean squared error of real
targets, in mini-batches that are a function of (seed, step). Nothing else moves: `features_fn`
holds the frozen part and its batch statistics. Nothing is known in closed form here, so what is
followed is measured, at log-spaced steps of one trajectory: the loss on some training rows, loss
and quality (accuracy, or R^2) on held-out rows, and the utility that is left: the quality of the
model's own benign task. The cell of a grid is chosen on a third set of rows, `selection`, that are
neither trained on nor reported.

An attacker may do more than descend: what `init` gets (`Access`) holds the features of all training
rows, the benign task with its rows and head, and a public model of the same structure where there
is one, so that it can solve for a head, edit weights, or take batches of either task.

**An attacker of your own** needs two functions and a grid:

>>> import jax, jax.numpy as jnp
>>> from typing import NamedTuple
>>> from jaximm.types import Batch
>>> class State(NamedTuple):
...     weights: object
>>> def update(state, batches, access, hyper):  # descends along the sign of the gradient
...     slopes = jax.grad(access.loss_fn)(state.weights, batches.harmful)
...     move = lambda w, slope: w - hyper["step"] * jnp.sign(slope)
...     return State(jax.tree.map(move, state.weights, slopes))
>>> sign_descent = WeightAttack(
...     init=lambda access, hyper: State(access.weights), update=update, grid=({"step": 0.125},))
>>> rows = Batch(jnp.array([[-1.0], [1.0]]), jnp.array([0, 1]))
>>> problem = FineTuneProblem(
...     features_fn=lambda params, x: x * params["scale"], params={"scale": jnp.ones(())},
...     head=zero_head(1, 2), train=rows, selection=rows, measured=rows, held_out=rows)
>>> trace = run_fine_tune(sign_descent, problem, steps=8, batch_size=None)
>>> trace.held_out_quality[0, 0].tolist()[-1]  # cells x seeds x recorded steps
1.0
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaximm.attacks.base import MAX_STEPS, Hyper, recorded_steps
from jaximm.data.batches import batch_indices
from jaximm.types import Batch, FeaturesFn, Head

Loop = Literal["host", "device"]


class ModelWeights(NamedTuple):
    """Everything that an attacker of weights may change; () where there is no such part."""

    params: Any
    head: Head
    benign_head: Any = ()  # of the benign task, where the problem has one
    shift: Any = ()  # added to the inputs of the harmful task


LossFn = Callable[[ModelWeights, Batch], Float[Array, ""]]
"""``loss_fn(weights, batch)``: a mean over rows, in nats or in half squared units of the target."""


def zero_head(d: int, k: int, dtype: Any = None) -> Head:
    """A head of zeros: every class equally likely, or the prediction 0, whatever the features."""
    return Head(jnp.zeros((d, k), dtype), jnp.zeros((k,), dtype))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Benign:
    """A task that the model should go on doing, with the head that does it.

    Attributes:
      head: of the dtype of the parameters.
      train: rows for attackers that mix tasks.
      held_out: rows on which the utility is measured.
    """

    head: Head
    train: Batch
    held_out: Batch


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FineTuneProblem:
    """A task and a backbone to fine-tune on it; see `fine_tune_problem`.

    Attributes:
      features_fn: ``features_fn(params, x) -> [n, d]``. Pass the same object again and nothing
        compiles again (a bound method of one `Trainable` is the same object).
      params: what the attacker may train, at its start; a pytree of arrays.
      head: where the head starts, of the dtype of the parameters. What "warm" means is up to who
        builds the problem: a trained head, or `zero_head`.
      train: rows to train on: `x` [n, ...] as `features_fn` takes it; `y` int labels [n], or real
        targets [n] for a head of one output.
      selection: rows on which the best cell of a grid is chosen.
      measured: training rows on which the training loss is measured; a fixed part of `train`.
      held_out: rows that are reported.
      benign: the task whose quality is the utility; None: there is none to lose.
      public: parameters of a public model of the same structure that the attacker has too; None.
      refresh_fn: ``refresh_fn(params, x) -> params`` with batch statistics taken from `x`; None for
        a backbone without any.
    """

    features_fn: FeaturesFn
    params: Any
    head: Head
    train: Batch
    selection: Batch
    measured: Batch
    held_out: Batch
    benign: Benign | None = None
    public: Any = None
    refresh_fn: Callable[[Any, jax.Array], Any] | None = None

    def __post_init__(self) -> None:
        d = check_head(self.head, where="head")
        for name in ("train", "selection", "measured", "held_out"):
            check_rows(getattr(self, name), self.head, where=name)
        if self.benign is not None:
            if check_head(self.benign.head, where="benign head") != d:
                raise ValueError(
                    f"both heads need {d} features, got {self.benign.head.kernel.shape}."
                )
            for name in ("train", "held_out"):
                check_rows(getattr(self.benign, name), self.benign.head, where=f"benign {name}")
        shape = jax.eval_shape(self.features_fn, self.params, self.train.x[:1]).shape
        if shape != (1, d):
            raise ValueError(f"features_fn must give [1, {d}] for one row, gave {list(shape)}.")
        if self.public is not None:
            ours, theirs = (jax.tree.map(jnp.shape, tree) for tree in (self.params, self.public))
            if ours != theirs:
                raise ValueError("public must have the structure and shapes of params.")

    @property
    def classes(self) -> int:
        """k, or 1 for a real target."""
        return self.head.kernel.shape[1]

    @property
    def is_regression(self) -> bool:
        """Whether the targets are real numbers."""
        return jnp.issubdtype(self.train.y.dtype, jnp.floating)


def check_head(head: Head, *, where: str) -> int:
    """The number of features of a head of matching shapes; ValueError otherwise."""
    d, k = head.kernel.shape
    if head.bias.shape != (k,):
        raise ValueError(
            f"{where} must be kernel [d, k] and bias [k], got {(d, k)} and {head.bias.shape}."
        )
    return d


def check_rows(batch: Batch, head: Head, *, where: str) -> None:
    """Refuses rows that do not fit a head."""
    k = head.kernel.shape[1]
    x, y = batch
    if x.ndim < 2 or y.shape != x.shape[:1] or not x.shape[0]:
        raise ValueError(
            f"{where}: need inputs [n, ...] and labels [n], n >= 1, got shapes {x.shape} and "
            f"{y.shape}."
        )
    if jnp.issubdtype(y.dtype, jnp.floating):
        if k != 1:
            raise ValueError(
                f"{where}: labels must be integers for a head of {k} classes, got {y.dtype}; real "
                "targets need a head of one output."
            )
        return
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(f"{where}: labels must be integers, or real targets, got {y.dtype}.")
    low, high = int(jnp.min(y)), int(jnp.max(y))
    if low < 0 or high >= k:
        raise ValueError(f"{where}: labels must be in 0..{k - 1}, got {low}..{high}.")


def fine_tune_problem(
    *,
    features_fn: FeaturesFn,
    params: Any,
    head: Head,
    train: Batch,
    held_out: Batch,
    selection: Batch | None = None,
    selection_fraction: float = 0.2,
    measured_rows: int = 512,
    seed: int = 0,
    benign: Benign | None = None,
    public: Any = None,
    refresh_fn: Callable[[Any, jax.Array], Any] | None = None,
) -> FineTuneProblem:
    """A problem from training and held-out rows: some training rows are set aside for selection.

    Args:
      features_fn, params, head, held_out, benign, public, refresh_fn: see `FineTuneProblem`.
      train: all rows that the attacker has.
      selection: rows that choose hyper-parameters; None: some of the training rows do.
      selection_fraction: then this share of them, in (0, 1); at least one row stays on either side.
      measured_rows: the training loss is measured on at most this many of the others.
      seed: of the permutation that splits the rows.

    Raises:
      ValueError: fewer than 2 training rows, a fraction or a count out of range, or what
        `FineTuneProblem` refuses.
    """
    n = train.x.shape[0]
    if n < 2:
        raise ValueError(f"need at least 2 training rows, got {n}.")
    if not 0 < selection_fraction < 1:
        raise ValueError(f"selection_fraction must be in (0, 1), got {selection_fraction}.")
    if measured_rows < 1:
        raise ValueError(f"measured_rows must be at least 1, got {measured_rows}.")
    order = np.random.default_rng(seed).permutation(n)
    aside = 0 if selection is not None else min(max(round(selection_fraction * n), 1), n - 1)
    chosen, kept = np.sort(order[:aside]), order[aside:]

    def take(rows):
        return Batch(jnp.asarray(train.x[rows]), jnp.asarray(train.y[rows]))

    return FineTuneProblem(
        features_fn=features_fn,
        params=params,
        head=Head(*head),
        train=take(np.sort(kept)),
        selection=take(chosen) if selection is None else Batch(*map(jnp.asarray, selection)),
        measured=take(np.sort(kept[:measured_rows])),
        held_out=Batch(jnp.asarray(held_out.x), jnp.asarray(held_out.y)),
        benign=benign,
        public=public,
        refresh_fn=refresh_fn,
    )


class Batches(NamedTuple):
    """What one step draws: rows of both tasks, and a key."""

    harmful: Batch
    benign: Batch | None
    rng_key: jax.Array


class Access(NamedTuple):
    """What an attacker of weights holds, inside the compiled step.

    `loss_fn` and `benign_loss_fn` are means of `losses_fn` and `benign_losses_fn`, which give one
    loss a row. The features are those of the backbone as it came.
    """

    weights: ModelWeights  # at the start
    features: Batch  # [n, d] of the training rows, and their targets
    benign_features: Batch | None
    public: Any
    seed: Int[Array, ""]
    features_fn: FeaturesFn
    refresh_fn: Callable[[Any, jax.Array], Any] | None
    inputs: Batch  # the training rows

    def losses_fn(self, weights: ModelWeights, batch: Batch) -> Float[Array, "n"]:
        """The harmful task's loss, row by row."""
        return losses(outputs_of(self.features_fn, weights, batch.x), batch.y)

    def loss_fn(self, weights: ModelWeights, batch: Batch) -> Float[Array, ""]:
        """The harmful task's mean loss."""
        return jnp.mean(self.losses_fn(weights, batch))

    def benign_losses_fn(self, weights: ModelWeights, batch: Batch) -> Float[Array, "n"]:
        """The benign task's loss, row by row."""
        features = self.features_fn(weights.params, batch.x)
        return losses(logits_of(weights.benign_head, features), batch.y)

    def benign_loss_fn(self, weights: ModelWeights, batch: Batch) -> Float[Array, ""]:
        """The benign task's mean loss."""
        return jnp.mean(self.benign_losses_fn(weights, batch))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightAttack:
    """An attacker of weights, as two pure functions.

    Attributes:
      init: ``init(access, hyper) -> state``, a NamedTuple of arrays with a field `weights`, which
        is the model that is measured. Whatever is done once, before step 0, is done here.
      update: ``update(state, batches, access, hyper) -> state``, one step.
      grid: the default cells of hyper-parameters; one cell without any if empty.
      kind: what the attacker does, one word or two.
      natural_bounds: (name, value) pairs at which a hyper-parameter ends by nature.
      needs: what the problem must have: "benign", "public", "refresh_fn", "head" (one that is not
        zero), or "norms" (parameters of normalisation layers).
      passes: forward passes over all training rows that `init` looks at, for its price.
      solve_flops: ``solve_flops(problem) -> (set-up, step)``, for factorisations and loops, which
        the compiler does not count.
      follows_loss: whether it descends the loss that is measured. One that follows a reward may
        raise it and do better; a risen loss is then no divergence.
    """

    init: Callable[[Access, Hyper], Any]
    update: Callable[[Any, Batches, Access, Hyper], Any]
    grid: tuple[Hyper, ...] = ()
    kind: str = "fine-tuning"
    natural_bounds: tuple[tuple[str, float], ...] = ()
    needs: tuple[str, ...] = ()
    passes: float = 0.0
    solve_flops: Callable[[FineTuneProblem], tuple[float, float]] | None = None
    follows_loss: bool = True

    def __post_init__(self) -> None:
        unknown = set(self.needs) - set(NEEDS)
        if unknown:
            raise ValueError(f"unknown need {sorted(unknown)[0]!r}; choose from {sorted(NEEDS)}.")


NEEDS: dict[str, str] = {
    "benign": "the problem has no benign task",
    "public": "there is no public model of the same structure",
    "refresh_fn": "the backbone has no batch statistics that can be refreshed",
    "head": "the head starts at zero: there is nothing to rescale",
    "norms": "none of the trained parameters belongs to a normalisation layer",
}
"""What an attacker may need, and what is said where it is missing."""


def not_applicable(attack: WeightAttack, problem: FineTuneProblem) -> str | None:
    """Why an attacker cannot be run on a problem; None if it can."""
    for need in attack.needs:
        if need == "head":
            there = bool(jnp.any(problem.head.kernel != 0))
        elif need == "norms":
            there = any(map(is_norm, paths_of(problem.params)))
        else:
            there = getattr(problem, need) is not None
        if not there:
            return NEEDS[need]
    return None


def paths_of(params: Any) -> list[str]:
    """Dotted paths of the leaves of a pytree, in its order.

    >>> paths_of({"blocks.1": {"kernel": 0.0}, "head": [1.0]})
    ['blocks.1.kernel', 'head.0']
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]


def is_norm(path: str) -> bool:
    """Whether a parameter belongs to a normalisation layer, by its name.

    >>> is_norm("blocks.3.norm1.scale"), is_norm("head.bn.bias"), is_norm("fc.kernel")
    (True, True, False)
    """
    parts = path.lower().split(".")
    return any("norm" in part or part.rstrip("0123456789") in ("bn", "ln") for part in parts)


class FineTuneTrace(NamedTuple):
    """One attacker on one problem: g cells of hyper-parameters by s seeds, at r recorded steps.

    Losses are mean cross-entropies in nats, or half mean squared errors. Quality is accuracy, or
    R^2 for real targets; a row whose outputs are not all numbers counts as wrong (R^2: the quality
    is NaN).
    """

    step: Int[Array, "r"]  # 0, then log-spaced up to the budget
    train_loss: Float[Array, "g s r"]  # on `problem.measured`
    held_out_loss: Float[Array, "g s r"]
    held_out_quality: Float[Array, "g s r"]
    utility: Float[Array, "g s r"]  # of the benign task; NaN without one
    selection_loss: Float[Array, "g s r"]
    selection_quality: Float[Array, "g s r"]
    scores: Float[Array, "g s r n"]  # by held-out row, of mean `held_out_quality`
    gradient: Float[Array, "g s 2"]  # norm at the start and the end of that of all weights
    backbone_gradient: Float[Array, "g s"]  # norm at the end of that of `params` alone
    diverged: Bool[Array, "g s"]  # not finite, or above both its start and guessing at the end
    still_falling: Bool[Array, "g s"]  # the training loss fell by 1 % over the last tenth
    setup_flops: float
    step_flops: float  # of one update on one mini-batch
    weights: ModelWeights | None  # at the end, leaves [g, s, ...]; only if asked for


def run_fine_tune(
    attack: WeightAttack,
    problem: FineTuneProblem,
    grid: Sequence[Hyper] | None = None,
    *,
    steps: int,
    seeds: Sequence[int] = (0,),
    batch_size: int | None = 64,
    record: int = 20,
    chunk: int | None = 1,
    loop: Loop = "host",
    keep_weights: bool = False,
) -> FineTuneTrace:
    """Run every cell of the grid from every seed for `steps` steps, by one compiled step.

    Hyper-parameters, seeds and data are traced: another grid of the same size, another problem of
    the same `features_fn` and shapes, or another budget does not compile again. A seed fixes the
    mini-batches, the same for every cell and every backbone.

    Args:
      attack: the attacker.
      problem: the task and the backbone.
      grid: cells of hyper-parameters, all with the same names; `attack.grid` if None.
      steps: the budget, 1 <= steps <= 2^30.
      seeds: of the mini-batches; >= 0.
      batch_size: rows of a task a step, at most those of `problem.train`; None for all of them.
        Rows are measured in blocks of this size too.
      record: at most this many log-spaced points of the curves (three more are always there).
      chunk: how many trajectories run at once, as one batched computation: 1, one after the other,
        suits large models and CPUs; None, all at once, suits small models and accelerators.
        `fastest_execution` measures which.
      loop: where the loop over steps runs. On a CPU, XLA runs a convolution inside a compiled loop
        some fifty times slower than outside of it (measured with jax 0.10.2): "host" for those,
        "device" for small models without any.
      keep_weights: also return the final weights of every trajectory.

    Raises:
      ValueError: an attacker that needs what the problem does not have, an empty or ragged grid, no
        seeds, a budget, a batch size, a number of points or a chunk out of range.
    """
    reason = not_applicable(attack, problem)
    if reason is not None:
        raise ValueError(f"this attacker cannot be run here: {reason}.")
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be between 1 and {MAX_STEPS}, got {steps}.")
    if record < 2:
        raise ValueError(f"record must be at least 2 points, got {record}.")
    if len(seeds) == 0 or min(seeds) < 0:
        raise ValueError(f"seeds must be numbers >= 0, at least one, got {tuple(seeds)}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, or None for all at once, got {chunk}.")
    if loop not in ("host", "device"):
        raise ValueError(f'loop must be "host" or "device", got {loop!r}.')
    n = problem.train.x.shape[0]
    if batch_size is not None and not 1 <= batch_size <= n:
        raise ValueError(
            f"batch_size must be in [1, {n}] for {n} training rows, got {batch_size}; use None "
            "for all rows."
        )
    cells = checked_cells(attack.grid if grid is None else grid, default=grid is None)
    dtype = problem.head.kernel.dtype
    recorded = recorded_steps(steps, points=record)
    cases = [(cell, seed) for cell in cells for seed in seeds]
    at_once = len(cases) if chunk is None else chunk
    held = _held(problem, n if batch_size is None else batch_size)
    found = []
    for start in range(0, len(cases), at_once):
        part = cases[start : start + at_once]
        # A chunk is filled up: another size would compile again.
        filled = part + part[-1:] * (at_once - len(part))
        hyper = {key: np.asarray([cell[key] for cell, _ in filled], dtype) for key in cells[0]}
        numbers = np.asarray([seed for _, seed in filled], np.int32)
        if at_once == 1:  # without a batch axis, which turns convolutions into grouped ones
            hyper, numbers = {key: values[0] for key, values in hyper.items()}, numbers[0]
        curves, state_weights = _run_chunk(
            attack,
            problem,
            held,
            hyper,
            numbers,
            recorded=recorded,
            batch_size=batch_size,
            batched=at_once > 1,
            loop=loop,
        )
        if not keep_weights:
            state_weights = None
        if at_once == 1:
            curves, state_weights = jax.tree.map(lambda v: v[None], (curves, state_weights))
        kept = slice(len(part))
        found.append(jax.tree.map(lambda v, kept=kept: v[kept], (curves, state_weights)))
    shape = (len(cells), len(seeds))

    def gather(*parts):
        whole = jnp.concatenate(parts)
        return whole.reshape(*shape, *whole.shape[1:])

    curves, final_weights = jax.tree.map(gather, *found)
    train_loss = curves["measured"].loss
    final, before = (
        train_loss[..., -1],
        train_loss[..., np.searchsorted(recorded, (9 * steps) // 10)],
    )
    diverged = ~jnp.isfinite(final)
    if attack.follows_loss:
        diverged |= final > jnp.maximum(train_loss[..., 0], guessing_loss(problem))
    setup_flops, step_flops = count_flops(attack, problem, cells[0], batch_size=batch_size)
    return FineTuneTrace(
        step=jnp.asarray(recorded),
        train_loss=train_loss,
        held_out_loss=curves["held_out"].loss,
        held_out_quality=curves["held_out"].quality,
        utility=curves["utility"],
        selection_loss=curves["selection"].loss,
        selection_quality=curves["selection"].quality,
        scores=curves["scores"],
        gradient=curves["gradient"],
        backbone_gradient=curves["backbone_gradient"],
        diverged=diverged,
        still_falling=~diverged & (final < 0.99 * before),
        setup_flops=setup_flops,
        step_flops=step_flops,
        weights=final_weights,
    )


def checked_cells(grid: Sequence[Hyper], *, default: bool) -> list[Hyper]:
    """The cells to run; an empty default grid is one cell without hyper-parameters."""
    cells = list(grid)
    if not cells and default:
        return [{}]
    if not cells:
        raise ValueError("grid is empty; give at least one cell, for example [{}].")
    for cell in cells:
        if set(cell) != set(cells[0]):
            raise ValueError(
                f"all cells of a grid need the same names, got {sorted(cells[0])} "
                f"and {sorted(cell)}."
            )
    return cells


class Execution(NamedTuple):
    """How trajectories run: see `run_fine_tune`. `seconds` a trajectory and step, as measured."""

    chunk: int | None
    loop: Loop
    seconds: dict[str, float]


def fastest_execution(
    attack: WeightAttack,
    problem: FineTuneProblem,
    *,
    trajectories: int,
    batch_size: int | None = 64,
    steps: int = 20,
    loops: Sequence[Loop] = ("host", "device"),
) -> Execution:
    """The fastest of one trajectory at a time, four at a time and all at once, by a short trial.

    Vmapping everything is not always fastest: on two CPU cores large probes run faster in sequence.
    Each way is run once to compile and once for the clock.

    Args:
      attack, problem, batch_size: what will be run.
      trajectories: how many (cells times seeds).
      steps: of the trial.
      loops: those to try; leave "device" out for convolutions on a CPU.
    """
    cell = (tuple(attack.grid) or ({},))[0]
    found: dict[str, tuple[float, int | None, Loop]] = {}
    sizes = sorted({1, min(4, trajectories), trajectories})
    for loop in loops:
        for size in sizes:
            options: dict[str, Any] = {
                "steps": steps,
                "seeds": tuple(range(size)),
                "batch_size": batch_size,
                "record": 2,
                "chunk": size,
                "loop": loop,
            }
            run_fine_tune(attack, problem, [cell], **options)
            started = time.perf_counter()
            jax.block_until_ready(run_fine_tune(attack, problem, [cell], **options).train_loss)
            seconds = (time.perf_counter() - started) / (size * steps)
            found[f"{loop} {size}"] = (seconds, size, loop)
    _, chunk, loop = min(found.values(), key=lambda item: item[0])
    return Execution(chunk, loop, {key: value[0] for key, value in found.items()})


def outputs_of(
    features_fn: FeaturesFn, weights: ModelWeights, x: Float[Array, "n ..."]
) -> Float[Array, "n k"]:
    """Outputs of the harmful task's head on inputs, shifted if the weights say so."""
    if not isinstance(weights.shift, tuple):
        x = x + weights.shift[None]
    return logits_of(weights.head, features_fn(weights.params, x))


def logits_of(head: Head, features: Float[Array, "n d"]) -> Float[Array, "n k"]:
    """features @ kernel + bias."""
    return features @ head.kernel + head.bias[None, :]


def losses(outputs: Float[Array, "n k"], y: jax.Array) -> Float[Array, "n"]:
    """Cross-entropy of integer labels, or half the squared error of real targets, row by row."""
    if jnp.issubdtype(y.dtype, jnp.integer):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y)
    return (outputs[:, 0] - y.astype(outputs.dtype)) ** 2 / 2


def scores_of(outputs: Float[Array, "n k"], y: jax.Array, spread: jax.Array) -> Float[Array, "n"]:
    """Numbers of mean accuracy, or of mean R^2 = 1 - (y - p)^2 / spread, row by row."""
    if jnp.issubdtype(y.dtype, jnp.integer):
        right = jnp.argmax(outputs, axis=-1).astype(y.dtype) == y
        return (right & jnp.all(jnp.isfinite(outputs), axis=-1)).astype(outputs.dtype)
    return 1 - (outputs[:, 0] - y.astype(outputs.dtype)) ** 2 / spread.astype(outputs.dtype)


def spread_of(y: jax.Array) -> jax.Array:
    """Mean square of real targets around their mean (1 if they are one constant)."""
    if jnp.issubdtype(y.dtype, jnp.integer):
        return jnp.ones(())
    spread = jnp.mean((y - jnp.mean(y)) ** 2)
    return jnp.where(spread > 0, spread, 1.0)


def guessing_loss(problem: FineTuneProblem) -> jax.Array:
    """The loss of knowing nothing: ln k, or half the spread of the targets."""
    if problem.is_regression:
        return spread_of(problem.measured.y) / 2
    return jnp.log(jnp.asarray(problem.classes, problem.head.kernel.dtype))


class _Held(NamedTuple):
    """Arrays of a problem that the compiled functions take."""

    params: Any
    head: Head
    train: Batch
    features: Batch
    benign_head: Any
    benign_train: Batch | None
    benign_features: Batch | None
    public: Any


def _held(problem: FineTuneProblem, block: int) -> _Held:
    """The features of all training rows, a block at a time, and the rest."""

    def features(batch):
        parts = [
            _features_of(problem.features_fn, problem.params, batch.x, rows)[counted]
            for rows, counted in _blocks(batch.x.shape[0], block)
        ]
        return Batch(jnp.concatenate(parts), batch.y)

    benign = problem.benign
    return _Held(
        problem.params,
        problem.head,
        problem.train,
        features(problem.train),
        () if benign is None else benign.head,
        None if benign is None else benign.train,
        None if benign is None else features(benign.train),
        problem.public,
    )


def _access(held: _Held, seed, features_fn, refresh_fn) -> Access:
    return Access(
        weights=ModelWeights(held.params, held.head, held.benign_head),
        features=held.features,
        benign_features=held.benign_features,
        public=held.public,
        seed=seed,
        features_fn=features_fn,
        refresh_fn=refresh_fn,
        inputs=held.train,
    )


class _Measured(NamedTuple):
    loss: jax.Array
    quality: jax.Array
    scores: jax.Array | None  # by row


def _run_chunk(
    attack: WeightAttack,
    problem: FineTuneProblem,
    held: _Held,
    hyper: Hyper,
    seeds: Int[np.ndarray, "c"] | Int[np.ndarray, ""],
    *,
    recorded: Int[np.ndarray, "r"],
    batch_size: int | None,
    batched: bool,
    loop: Loop,
) -> tuple[dict[str, Any], Any]:
    """Some trajectories to the end: what is measured of them, and final weights."""
    features_fn = problem.features_fn
    n = problem.train.x.shape[0]
    block = n if batch_size is None else batch_size
    functions = {"features_fn": features_fn, "refresh_fn": problem.refresh_fn, "batched": batched}
    state = _begin(attack.init, held, seeds, hyper, **functions)
    sample = jax.tree.map(lambda values: values[:block], problem.measured)
    sets = _sets_of(problem)
    points, norms, draws = [], [], None
    begin = 0
    for end in recorded.tolist():
        while begin < end:
            if begin % DRAWN == 0:
                draws = _draw(held, seeds, np.int32(begin), batch_size=batch_size, batched=batched)
            until = min(end, begin - begin % DRAWN + DRAWN)
            arguments = (seeds, np.int32(begin), np.int32(until), draws, held, hyper)
            advance = _advance if loop == "host" else _advance_many
            for t in range(begin, until if loop == "host" else begin + 1):
                at = (seeds, np.int32(t), *arguments[2:]) if loop == "host" else arguments
                state = advance(attack.update, state, *at, **functions)
            begin = until
        if loop == "device":
            points.append(_measure_whole(features_fn, state.weights, sets, batched=batched))
        else:
            points.append(_measure(features_fn, state.weights, sets, block=block, batched=batched))
        if end in (0, recorded[-1]):
            norms.append(_gradient_norms(features_fn, state.weights, sample, batched=batched))
    return _curves(points, norms), state.weights


@jax.jit
def _curves(points: list[dict[str, _Measured]], norms: list[tuple[jax.Array, jax.Array]]):
    """What was measured at recorded points, as curves."""

    def curve(parts):
        return jax.tree.map(lambda *values: jnp.stack(values, axis=-1), *parts)

    curves: dict[str, Any] = {
        name: _Measured(
            loss=curve([point[name].loss for point in points]),
            quality=curve([point[name].quality for point in points]),
            scores=None,
        )
        for name in points[0]
    }
    nothing = jnp.full_like(curves["held_out"].quality, jnp.nan)
    return curves | {
        "utility": curves["benign"].quality if "benign" in curves else nothing,
        "scores": jnp.stack([_scores(point["held_out"]) for point in points], axis=-2),
        "gradient": curve([norm for norm, _ in norms]),
        "backbone_gradient": norms[-1][1],
    }


def _scores(measured: _Measured) -> jax.Array:
    assert measured.scores is not None
    return measured.scores


def _sets_of(problem: FineTuneProblem) -> dict[str, Batch]:
    """Rows that are measured at every recorded point."""
    sets = {name: getattr(problem, name) for name in ("measured", "held_out", "selection")}
    return sets if problem.benign is None else sets | {"benign": problem.benign.held_out}


@functools.partial(jax.jit, static_argnames=("init", "features_fn", "refresh_fn", "batched"))
def _begin(init, held, seeds, hyper, *, features_fn, refresh_fn, batched):
    """The state at step 0, in buffers of its own: those of the problem are never donated."""

    def one(seed, cell):
        return jax.tree.map(jnp.copy, init(_access(held, seed, features_fn, refresh_fn), cell))

    return jax.vmap(one)(seeds, hyper) if batched else one(seeds, hyper)


class _Drawn(NamedTuple):
    """Row numbers of `DRAWN` consecutive steps, of each task."""

    harmful: Int[Array, "*c steps m"]
    benign: Int[Array, "*c steps b"] | None


DRAWN = 256
"""Steps whose batches are drawn at once: the drawing is then no part of an attacker's program."""


@functools.partial(jax.jit, static_argnames=("batch_size", "batched"))
def _draw(held: _Held, seeds, begin, *, batch_size, batched) -> _Drawn:
    """The rows of steps begin .. begin + DRAWN - 1."""
    n, benign = held.train.x.shape[0], held.benign_train

    def one(seed):
        def rows(n, size):
            return jax.lax.map(
                lambda t: batch_indices(seed, t, n=n, batch_size=size),
                begin + jnp.arange(DRAWN, dtype=jnp.int32),
            )

        if benign is None:
            return _Drawn(rows(n, batch_size), None)
        m = benign.x.shape[0]
        size = None if batch_size is None else min(batch_size, m)
        return _Drawn(rows(n, batch_size), rows(m, size))

    return jax.vmap(one)(seeds) if batched else one(seeds)


_STATIC = ("update", "features_fn", "refresh_fn", "batched")


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="state")
def _advance(update, state, seeds, t, end, draws, held, hyper, *, features_fn, refresh_fn, batched):
    """One step of some trajectories."""
    del end

    def one(state, seed, drawn, cell):
        access = _access(held, seed, features_fn, refresh_fn)
        return update(state, _batches(held, drawn, seed, t), access, cell)

    if batched:
        return jax.vmap(one)(state, seeds, draws, hyper)
    return one(state, seeds, draws, hyper)


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="state")
def _advance_many(update, state, seeds, begin, end, draws, held, hyper, **options):
    """Steps begin .. end - 1 in one compiled loop."""

    def body(t, state):
        return _advance(update, state, seeds, t, end, draws, held, hyper, **options)

    return jax.lax.fori_loop(begin, end, body, state)


def _batches(held: _Held, drawn: _Drawn, seed, t) -> Batches:
    """The rows of step t, whose numbers were drawn."""
    place = t % DRAWN
    rows = drawn.harmful[place]
    harmful, benign = Batch(held.train.x[rows], held.train.y[rows]), None
    if drawn.benign is not None:
        assert held.benign_train is not None
        rows = drawn.benign[place]
        benign = Batch(held.benign_train.x[rows], held.benign_train.y[rows])
    # Not the keys that `batch_indices` draws from, nor that of `start_key`.
    steps_key = jax.random.fold_in(jax.random.key(seed), MAX_STEPS + 1)
    return Batches(harmful, benign, jax.random.fold_in(steps_key, t))


@functools.partial(jax.jit, static_argnames="features_fn")
def _features_of(features_fn, params, x, rows):
    return features_fn(params, x[rows])


def _blocks(n: int, block: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Row numbers 0..n-1 in blocks of one size, the last filled up, and which of them count."""
    rows = np.arange(-(-n // block) * block, dtype=np.int32).reshape(-1, block)
    return list(zip(np.minimum(rows, n - 1), rows < n, strict=True))


def _measure(
    features_fn, weights, sets: dict[str, Batch], *, block: int, batched: bool
) -> dict[str, _Measured]:
    """Mean loss and quality of each set of rows, and the scores, a block of one size at a time."""
    found = {}
    for name, batch in sets.items():
        n = batch.x.shape[0]
        spread = spread_of(batch.y)
        parts = [
            _measure_block(
                features_fn,
                weights,
                batch.x[rows],
                batch.y[rows],
                spread,
                batched=batched,
                benign=name == "benign",
            )
            for rows, _ in _blocks(n, block)
        ]
        loss, scores = (
            jnp.concatenate(column, axis=-1)[..., :n] for column in zip(*parts, strict=True)
        )
        found[name] = _Measured(jnp.mean(loss, axis=-1), jnp.mean(scores, axis=-1), scores)
    return found


@functools.partial(jax.jit, static_argnames=("features_fn", "batched"))
def _measure_whole(
    features_fn, weights, sets: dict[str, Batch], *, batched: bool
) -> dict[str, _Measured]:
    """The same in one program, all rows at once: for small models."""
    found = {}
    for name, (x, y) in sets.items():
        loss, scores = _measure_block(
            features_fn, weights, x, y, spread_of(y), batched=batched, benign=name == "benign"
        )
        found[name] = _Measured(jnp.mean(loss, axis=-1), jnp.mean(scores, axis=-1), scores)
    return found


@functools.partial(jax.jit, static_argnames=("features_fn", "batched", "benign"))
def _measure_block(features_fn, weights, x, y, spread, *, batched, benign):
    """Losses and scores of some rows."""

    def one(weights):
        if benign:
            outputs = logits_of(weights.benign_head, features_fn(weights.params, x))
        else:
            outputs = outputs_of(features_fn, weights, x)
        return losses(outputs, y), scores_of(outputs, y, spread)

    return jax.vmap(one)(weights) if batched else one(weights)


@functools.partial(jax.jit, static_argnames=("features_fn", "batched"))
def _gradient_norms(features_fn, weights, batch, *, batched):
    """Norms of the loss's gradient: of all weights, and of the backbone's alone."""

    def loss_fn(weights):
        return jnp.mean(losses(outputs_of(features_fn, weights, batch.x), batch.y))

    def one(weights):
        slopes = jax.grad(loss_fn)(weights)
        dtype = weights.head.kernel.dtype
        norms = [jnp.asarray(optax.tree.norm(tree), dtype) for tree in (slopes, slopes.params)]
        return tuple(norms)

    return jax.vmap(one)(weights) if batched else one(weights)


def count_flops(
    attack: WeightAttack, problem: FineTuneProblem, hyper: Hyper, *, batch_size: int | None
) -> tuple[float, float]:
    """Floating-point operations of the set-up and of one update, as the compiler counts them.

    The count is that of the lowered program, before fusion, so it does not depend on the back end
    (a multiplication and an addition count one each; nothing is run or compiled). The set-up is
    `init`, with `attack.passes` forward passes over the training rows. Factorisations and compiled
    loops, which the compiler does not count, come from `attack.solve_flops`. Where the compiler
    gives no count, a training step counts 6 and a pass 2 operations a parameter and row, a floor
    for layers that share weights over positions.
    """
    n = problem.train.x.shape[0]
    dtype = problem.head.kernel.dtype
    benign = problem.benign
    d = problem.head.kernel.shape[0]

    def abstract(batch: Batch) -> Batch:
        features: Any = jax.ShapeDtypeStruct((batch.x.shape[0], d), dtype)
        return Batch(features, batch.y)

    held = _Held(
        problem.params,
        problem.head,
        problem.train,
        abstract(problem.train),
        () if benign is None else benign.head,
        None if benign is None else benign.train,
        None if benign is None else abstract(benign.train),
        problem.public,
    )
    leaves, structure = jax.tree.flatten(held)
    counted = _count(
        attack.init,
        attack.update,
        problem.features_fn,
        problem.refresh_fn,
        structure,
        tuple((leaf.shape, jnp.dtype(leaf.dtype).name) for leaf in leaves),
        tuple(hyper),
        batch_size,
    )
    setup_flops = counted.setup + attack.passes * n / counted.rows * counted.forward
    solves = (0.0, 0.0) if attack.solve_flops is None else attack.solve_flops(problem)
    return setup_flops + solves[0], counted.step + solves[1]


class _Counted(NamedTuple):
    setup: float
    step: float
    forward: float  # of one batch
    rows: int  # of a batch


@functools.lru_cache(maxsize=1024)
def _count(init, update, features_fn, refresh_fn, structure, shapes, hyper, batch_size) -> _Counted:
    """The counts; they depend on shapes alone, and lowering takes longer than a small run."""
    held = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    dtype = held.head.kernel.dtype
    cell = {name: jax.ShapeDtypeStruct((), dtype) for name in hyper}
    number = jax.ShapeDtypeStruct((), jnp.int32)

    def start(held, seed, cell):
        return init(_access(held, seed, features_fn, refresh_fn), cell)

    def step(state, batches, held, seed, cell):
        return update(state, batches, _access(held, seed, features_fn, refresh_fn), cell)

    state = jax.eval_shape(start, held, number, cell)

    def drawn(held, seed):
        return _batches(
            held, _draw(held, seed, seed, batch_size=batch_size, batched=False), seed, seed
        )

    batches = jax.eval_shape(drawn, held, number)
    m = batches.harmful.x.shape[0]
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((held.params, held.head)))
    return _Counted(
        setup=_lowered_flops(start, held, number, cell, default=0.0),
        step=_lowered_flops(step, state, batches, held, number, cell, default=6.0 * m * size),
        forward=_lowered_flops(features_fn, held.params, batches.harmful.x, default=2.0 * m * size),
        rows=m,
    )


def _lowered_flops(fun: Callable[..., Any], *args: Any, default: float) -> float:
    """The compiler's count for one call, or `default` where there is none."""
    try:
        analysis = jax.jit(fun).lower(*args).cost_analysis()
    except NotImplementedError:  # some back ends have no cost model
        return default
    if isinstance(analysis, Sequence):  # older releases: one entry a program
        analysis = analysis[0] if analysis else None
    found = analysis.get("flops", 0.0) if isinstance(analysis, Mapping) else 0.0
    return float(found) if found > 0 else default
