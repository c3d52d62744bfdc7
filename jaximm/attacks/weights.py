r"""Attackers of the weights: the problem, the protocol and the loop for full fine-tuning.

The attacker has the trainable blocks of a backbone as flat `params` and a linear head, and trains
both on the mean cross-entropy (in nats) of integer labels,

    logits = features_fn(params, x) @ kernel + bias,

in mini-batches that are a function of (seed, step). Nothing else moves: `features_fn` holds the
frozen part and its batch statistics. Nothing is known in closed form here, so what is followed is
measured, at log-spaced steps of one trajectory: the loss on some training rows, and loss and
accuracy on held-out rows. The cell of a grid is chosen on a third set of rows, `selection`, that
are neither trained on nor reported.

**An attacker of your own** needs two functions and a grid:

>>> import jax, jax.numpy as jnp
>>> from typing import NamedTuple
>>> from jaximm.types import Batch
>>> class State(NamedTuple):
...     weights: object
>>> def update(state, batch, loss_fn, hyper):  # descends along the sign of the gradient
...     slopes = jax.grad(loss_fn)(state.weights, batch)
...     move = lambda w, slope: w - hyper["step"] * jnp.sign(slope)
...     return State(jax.tree.map(move, state.weights, slopes))
>>> sign_descent = WeightAttack(
...     init=lambda weights, hyper: State(weights), update=update, grid=({"step": 0.125},))
>>> rows = Batch(jnp.array([[-1.0], [1.0]]), jnp.array([0, 1]))
>>> problem = FineTuneProblem(
...     features_fn=lambda params, x: x * params["scale"], params={"scale": jnp.ones(())},
...     head=zero_head(1, 2), train=rows, selection=rows, measured=rows, held_out=rows)
>>> trace = run_fine_tune(sign_descent, problem, steps=8, batch_size=None)
>>> trace.held_out_accuracy[0, 0].tolist()[-1]  # cells x seeds x recorded steps
1.0
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaximm.attacks.base import MAX_STEPS, Hyper, recorded_steps
from jaximm.data.batches import batch_indices
from jaximm.types import Batch, FeaturesFn, Head


class ModelWeights(NamedTuple):
    """Everything that a fine-tuning attacker trains."""

    params: Any
    head: Head


LossFn = Callable[[ModelWeights, Batch], Float[Array, ""]]
"""``loss_fn(weights, batch)``: mean cross-entropy in nats."""


def zero_head(d: int, k: int, dtype: Any = None) -> Head:
    """A head of zeros: every class equally likely, whatever the features."""
    return Head(jnp.zeros((d, k), dtype), jnp.zeros((k,), dtype))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FineTuneProblem:
    """A labelled task and a backbone to fine-tune on it; see `fine_tune_problem`.

    Attributes:
      features_fn: ``features_fn(params, x) -> [n, d]``. Pass the same object again and nothing
        compiles again (a bound method of one `Trainable` is the same object).
      params: what the attacker may train, at its start; a pytree of arrays.
      head: where the head starts, of the dtype of the parameters. What "warm" means is up to who
        builds the problem: a trained head, or `zero_head`.
      train: rows to train on: `x` [n, ...] as `features_fn` takes it, `y` int labels [n].
      selection: rows on which the best cell of a grid is chosen.
      measured: training rows on which the training loss is measured; a fixed part of `train`.
      held_out: rows that are reported.
    """

    features_fn: FeaturesFn
    params: Any
    head: Head
    train: Batch
    selection: Batch
    measured: Batch
    held_out: Batch

    def __post_init__(self) -> None:
        d, k = self.head.kernel.shape
        if self.head.bias.shape != (k,):
            raise ValueError(
                f"head must be kernel [d, k] and bias [k], got {(d, k)} and {self.head.bias.shape}."
            )
        for name in ("train", "selection", "measured", "held_out"):
            _check_rows(getattr(self, name), k, where=name)
        shape = jax.eval_shape(self.features_fn, self.params, self.train.x[:1]).shape
        if shape != (1, d):
            raise ValueError(f"features_fn must give [1, {d}] for one row, gave {list(shape)}.")

    @property
    def classes(self) -> int:
        """k."""
        return self.head.kernel.shape[1]


def _check_rows(batch: Batch, k: int, *, where: str) -> None:
    x, y = batch
    if x.ndim < 2 or y.shape != x.shape[:1] or not x.shape[0]:
        raise ValueError(
            f"{where}: need inputs [n, ...] and labels [n], n >= 1, got shapes {x.shape} and "
            f"{y.shape}."
        )
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(f"{where}: labels must be integers, got {y.dtype}.")
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
    selection_fraction: float = 0.2,
    measured_rows: int = 512,
    seed: int = 0,
) -> FineTuneProblem:
    """A problem from training and held-out rows: some training rows are set aside for selection.

    Args:
      features_fn, params, head, held_out: see `FineTuneProblem`.
      train: all rows that the attacker has.
      selection_fraction: share of them that chooses hyper-parameters instead, in (0, 1); at least
        one row stays on either side.
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
    aside = min(max(round(selection_fraction * n), 1), n - 1)
    selection, kept = np.sort(order[:aside]), order[aside:]

    def take(rows):
        return Batch(jnp.asarray(train.x[rows]), jnp.asarray(train.y[rows]))

    return FineTuneProblem(
        features_fn=features_fn,
        params=params,
        head=Head(*head),
        train=take(np.sort(kept)),
        selection=take(selection),
        measured=take(np.sort(kept[:measured_rows])),
        held_out=Batch(jnp.asarray(held_out.x), jnp.asarray(held_out.y)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightAttack:
    """An attacker of weights, as two pure functions.

    Attributes:
      init: ``init(weights, hyper) -> state``, a NamedTuple of arrays with a field `weights`.
      update: ``update(state, batch, loss_fn, hyper) -> state``, one step on one mini-batch.
      grid: the default cells of hyper-parameters; one cell without any if empty.
      kind: what the attacker does, one word.
      natural_bounds: (name, value) pairs at which a hyper-parameter ends by nature.
      probe: a pair (init, update) as above that trains the head alone before step 0: its weights
        are ``ModelWeights({}, head)``, its batches hold features of the untouched backbone, which
        are computed once. The price is part of the set-up, not of the steps.
      probe_steps: mini-batches of that, > 0 exactly if there is a `probe`.
    """

    init: Callable[[ModelWeights, Hyper], Any]
    update: Callable[[Any, Batch, LossFn, Hyper], Any]
    grid: tuple[Hyper, ...] = ()
    kind: str = "fine-tuning"
    natural_bounds: tuple[tuple[str, float], ...] = ()
    probe_steps: int = 0
    probe: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    def __post_init__(self) -> None:
        if self.probe_steps < 0 or (self.probe_steps > 0) != (self.probe is not None):
            raise ValueError(
                f"probe and probe_steps > 0 go together, got probe_steps {self.probe_steps} and "
                f"{'no ' if self.probe is None else 'a '}probe."
            )


class FineTuneTrace(NamedTuple):
    """One attacker on one problem: g cells of hyper-parameters by s seeds, at r recorded steps.

    Losses are mean cross-entropies in nats, accuracies fractions; a row whose logits are not all
    numbers counts as wrong. `selection_*` are those at the end of the budget.
    """

    step: Int[Array, "r"]  # 0, then log-spaced up to the budget
    train_loss: Float[Array, "g s r"]  # on `problem.measured`
    held_out_loss: Float[Array, "g s r"]
    held_out_accuracy: Float[Array, "g s r"]
    selection_loss: Float[Array, "g s"]
    selection_accuracy: Float[Array, "g s"]
    diverged: Bool[Array, "g s"]  # not finite, or above both its start and ln k at the end
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
    keep_weights: bool = False,
) -> FineTuneTrace:
    """Run every cell of the grid from every seed for `steps` steps, by one compiled step.

    Hyper-parameters, seeds and data are traced: another grid of the same size, another problem of
    the same `features_fn` and shapes, or another budget does not compile again. The loop over steps
    is Python's: on a CPU, XLA runs a convolution inside a compiled loop some fifty times slower
    than outside of it (measured with jax 0.10.2). A seed fixes the mini-batches, the same for every
    cell and every backbone.

    Args:
      attack: the attacker.
      problem: the task and the backbone.
      grid: cells of hyper-parameters, all with the same names; `attack.grid` if None.
      steps: the budget, 1 <= steps <= 2^30.
      seeds: of the mini-batches; >= 0.
      batch_size: rows a step, at most those of `problem.train`; None for all of them. Rows are
        measured in blocks of this size too.
      record: at most this many log-spaced points of the curves (three more are always there).
      chunk: how many trajectories run at once, as one batched computation: 1, one after the other,
        suits large models and CPUs; None, all at once, suits small models and accelerators.
      keep_weights: also return the final weights of every trajectory.

    Raises:
      ValueError: an empty or ragged grid, no seeds, a budget, a batch size, a number of points or
        a chunk out of range.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be between 1 and {MAX_STEPS}, got {steps}.")
    if record < 2:
        raise ValueError(f"record must be at least 2 points, got {record}.")
    if len(seeds) == 0 or min(seeds) < 0:
        raise ValueError(f"seeds must be numbers >= 0, at least one, got {tuple(seeds)}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, or None for all at once, got {chunk}.")
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
    at_once = len(cases) if chunk is None else min(chunk, len(cases))
    found = []
    for start in range(0, len(cases), at_once):
        part = cases[start : start + at_once]
        # The last chunk is filled up: another size would compile again.
        filled = part + part[-1:] * (at_once - len(part))
        hyper = {key: np.asarray([cell[key] for cell, _ in filled], dtype) for key in cells[0]}
        numbers = np.asarray([seed for _, seed in filled], np.int32)
        if at_once == 1:  # without a batch axis, which turns convolutions into grouped ones
            hyper, numbers = {key: values[0] for key, values in hyper.items()}, numbers[0]
        curves, state_weights = _run_chunk(
            attack,
            problem,
            hyper,
            numbers,
            recorded=recorded,
            batch_size=batch_size,
            batched=at_once > 1,
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
    train_loss = curves["measured"][0]
    final, before = (
        train_loss[..., -1],
        train_loss[..., np.searchsorted(recorded, (9 * steps) // 10)],
    )
    guessing = jnp.log(jnp.asarray(problem.classes, train_loss.dtype))
    diverged = ~jnp.isfinite(final) | (final > jnp.maximum(train_loss[..., 0], guessing))
    setup_flops, step_flops = count_flops(attack, problem, cells[0], batch_size=batch_size)
    return FineTuneTrace(
        step=jnp.asarray(recorded),
        train_loss=train_loss,
        held_out_loss=curves["held_out"][0],
        held_out_accuracy=curves["held_out"][1],
        selection_loss=curves["selection"][0][..., -1],
        selection_accuracy=curves["selection"][1][..., -1],
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


def make_loss_fn(features_fn: FeaturesFn) -> LossFn:
    """The mean cross-entropy of a backbone and a head, as a function of both."""

    def loss_fn(weights: ModelWeights, batch: Batch) -> Float[Array, ""]:
        logits = logits_of(weights.head, features_fn(weights.params, batch.x))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch.y))

    return loss_fn


def logits_of(head: Head, features: Float[Array, "n d"]) -> Float[Array, "n k"]:
    """features @ kernel + bias."""
    return features @ head.kernel + head.bias[None, :]


def _run_chunk(
    attack: WeightAttack,
    problem: FineTuneProblem,
    hyper: Hyper,
    seeds: Int[np.ndarray, "c"] | Int[np.ndarray, ""],
    *,
    recorded: Int[np.ndarray, "r"],
    batch_size: int | None,
    batched: bool,
) -> tuple[dict[str, tuple[jax.Array, jax.Array]], Any]:
    """Some trajectories to the end: (loss, accuracy) [c, r] by set of rows, and final weights."""
    features_fn, train = problem.features_fn, problem.train
    block = train.x.shape[0] if batch_size is None else batch_size
    options = {"batch_size": batch_size, "batched": batched}
    heads = problem.head
    if batched:
        heads = jax.tree.map(lambda v: jnp.stack([v] * len(seeds)), heads)
    if attack.probe is not None:
        init, update = attack.probe
        features = [
            _features_of(features_fn, problem.params, train.x, rows)[counted]
            for rows, counted in _blocks(train.x.shape[0], block)
        ]
        rows_of_features = Batch(jnp.concatenate(features), train.y)
        state = _begin(init, {}, heads, hyper, batched=batched)
        for t in range(attack.probe_steps):
            state = _advance(
                _as_they_are, update, state, seeds, np.int32(t), rows_of_features, hyper, **options
            )
        heads = state.weights.head
    state = _begin(attack.init, problem.params, heads, hyper, batched=batched)
    measured = {"measured": [], "held_out": [], "selection": []}
    begin = 0
    for end in recorded.tolist():
        for t in range(begin, end):
            state = _advance(
                features_fn, attack.update, state, seeds, np.int32(t), train, hyper, **options
            )
        begin = end
        for name, results in measured.items():
            # Selection rows choose by the end only.
            if name != "selection" or end == recorded[-1]:
                rows = getattr(problem, name)
                results.append(_measure(features_fn, state.weights, rows, block, batched=batched))
    curves = {
        name: (
            jnp.stack([loss for loss, _ in results], axis=-1),
            jnp.stack([accuracy for _, accuracy in results], axis=-1),
        )
        for name, results in measured.items()
    }
    return curves, state.weights


@functools.partial(jax.jit, static_argnames=("init", "batched"))
def _begin(init, params, heads, hyper, *, batched):
    """The state at step 0, in buffers of its own: those of the problem are never donated."""

    def one(head, cell):
        return jax.tree.map(jnp.copy, init(ModelWeights(params, head), cell))

    return jax.vmap(one)(heads, hyper) if batched else one(heads, hyper)


@functools.partial(
    jax.jit,
    static_argnames=("features_fn", "update", "batch_size", "batched"),
    donate_argnames="state",
)
def _advance(features_fn, update, state, seeds, t, train, hyper, *, batch_size, batched):
    """One step of some trajectories."""
    loss_fn = make_loss_fn(features_fn)

    def one(state, seed, cell):
        rows = batch_indices(seed, t, n=train.x.shape[0], batch_size=batch_size)
        return update(state, Batch(train.x[rows], train.y[rows]), loss_fn, cell)

    return jax.vmap(one)(state, seeds, hyper) if batched else one(state, seeds, hyper)


def _as_they_are(params, x):
    """The features function of a probe, whose inputs are features."""
    del params
    return x


@functools.partial(jax.jit, static_argnames="features_fn")
def _features_of(features_fn, params, x, rows):
    return features_fn(params, x[rows])


def _blocks(n: int, block: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Row numbers 0..n-1 in blocks of one size, the last filled up, and which of them count."""
    rows = np.arange(-(-n // block) * block, dtype=np.int32).reshape(-1, block)
    return list(zip(np.minimum(rows, n - 1), rows < n, strict=True))


def _measure(features_fn, weights, batch: Batch, block: int, *, batched: bool):
    """Mean cross-entropy and accuracy on all rows, a block of one size at a time."""
    n = batch.x.shape[0]
    sums = [
        _measure_block(features_fn, weights, batch.x[rows], batch.y[rows], counted, batched=batched)
        for rows, counted in _blocks(n, block)
    ]
    loss, right = (functools.reduce(jnp.add, parts) for parts in zip(*sums, strict=True))
    return loss / n, right / n


@functools.partial(jax.jit, static_argnames=("features_fn", "batched"))
def _measure_block(features_fn, weights, x, labels, counted, *, batched):
    """Sums of the cross-entropies and of the right answers over the rows that count."""

    def one(weights):
        logits = logits_of(weights.head, features_fn(weights.params, x))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        right = jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels
        right = right & jnp.all(jnp.isfinite(logits), axis=-1) & counted
        return jnp.sum(jnp.where(counted, loss, 0.0)), jnp.sum(right.astype(loss.dtype))

    return jax.vmap(one)(weights) if batched else one(weights)


def count_flops(
    attack: WeightAttack, problem: FineTuneProblem, hyper: Hyper, *, batch_size: int | None
) -> tuple[float, float]:
    """Floating-point operations of the set-up and of one update, as the compiler counts them.

    The count is that of the lowered program, before fusion, so it does not depend on the back end
    (a multiplication and an addition count one each; nothing is run or compiled). The set-up is
    what `probe_steps` cost: one pass over the training rows and the head's own steps. Where the
    compiler gives no count, a training step counts 6 and a pass 2 operations a parameter and row,
    a floor for layers that share weights over positions.
    """
    n = problem.train.x.shape[0]
    m = n if batch_size is None else batch_size
    dtype = problem.head.kernel.dtype
    weights = ModelWeights(problem.params, problem.head)
    batch = jax.eval_shape(lambda rows: Batch(rows.x[:m], rows.y[:m]), problem.train)
    cell = {name: jax.ShapeDtypeStruct((), dtype) for name in hyper}
    loss_fn = make_loss_fn(problem.features_fn)

    def step(weights, batch, cell):
        state = attack.init(weights, cell)
        return attack.update(state, batch, loss_fn, cell)

    size = sum(leaf.size for leaf in jax.tree.leaves(weights))
    step_flops = _lowered_flops(step, weights, batch, cell, default=6.0 * m * size)
    if attack.probe is None:
        return 0.0, step_flops
    forward = _lowered_flops(problem.features_fn, problem.params, batch.x, default=2.0 * m * size)
    d, k = problem.head.kernel.shape
    return n / m * forward + attack.probe_steps * 4.0 * m * d * k, step_flops


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
