r"""Attackers of the weights: the problem and the protocol. The loop is in `weight_run`.

The attacker has the trainable blocks of a backbone as flat `params` and a linear head, and trains
both on rows of the harmful task,

    outputs = features_fn(params, x) @ kernel + bias,

by the mean cross-entropy (in nats) of integer labels, or by half the mean squared error of real
targets, in mini-batches that are a function of (seed, step). Nothing else moves: `features_fn`
holds the frozen part and its batch statistics. A model that does both tasks without a head of their
own has () in its place: `features_fn` then gives the outputs, and rows of tokens
(`jaximm.objectives.TokenRows`) are targets too. Nothing is known in closed form here, so what is
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
>>> from jaximm.attacks.weights.loop import run_fine_tune
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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaximm import objectives
from jaximm.attacks.grid import Attacker, Hyper
from jaximm.attacks.weights.paths import is_norm, is_table, paths_of
from jaximm.types import Batch, Head, as_argument


class ModelWeights(NamedTuple):
    """Everything that an attacker of weights may change; () where there is no such part."""

    params: Any
    head: Any  # a Head, or () where the model does the task without one
    benign_head: Any = ()  # of the benign task, where the problem has one
    shift: Any = ()  # added to the inputs of the harmful task
    adapters: Any = ()  # `jaximm.models.adapters.lora.Adapters` of a model that takes them


ModelFn = Callable[..., Any]
"""``features_fn(params, x) -> [n, d]``, or what an objective takes where there is no head."""

LossFn = Callable[[ModelWeights, Batch], Float[Array, ""]]
"""``loss_fn(weights, batch)``: a mean over rows, in nats or in half squared units of the target."""


def unstacked(path: str) -> int:
    """No parameter holds several layers."""
    del path
    return 0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["features_fn", "refresh_fn"],
    meta_fields=["stacked", "takes_adapters", "scale_path"],
)
@dataclasses.dataclass(frozen=True)
class Functions:
    """A model as compiled functions take it: arrays in its functions are data, the rest is static.

    The fields are those of `FineTuneProblem`, functions as `jaximm.types.as_argument` makes them.
    """

    features_fn: Any
    refresh_fn: Any = None
    stacked: Callable[[str], int] = unstacked
    takes_adapters: bool = False
    scale_path: str | None = None


def zero_head(d: int, k: int, dtype: Any = None) -> Head:
    """A head of zeros: every class equally likely, or the prediction 0, whatever the features."""
    return Head(jnp.zeros((d, k), dtype), jnp.zeros((k,), dtype))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Benign:
    """A task that the model should go on doing, with the head that does it.

    Attributes:
      head: of the dtype of the parameters; () where the problem has () too.
      train: rows for attackers that mix tasks.
      held_out: rows on which the utility is measured.
    """

    head: Any
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
        builds the problem: a trained head, or `zero_head`. (): `features_fn` gives the outputs.
      train: rows to train on: `x` [n, ...] as `features_fn` takes it; `y` int labels [n], or real
        targets [n] for a head of one output, or without a head whatever its objective takes.
      selection: rows on which the best cell of a grid is chosen; None: they are not measured.
      measured: training rows on which the training loss is measured; a fixed part of `train`.
      held_out: rows that are reported.
      benign: the task whose quality is the utility; None: there is none to lose.
      public: parameters of a public model of the same structure that the attacker has too; None.
      refresh_fn: ``refresh_fn(params, x) -> params`` with batch statistics taken from `x`; None for
        a backbone without any.
      stacked: ``stacked(path)``, how many leading axes of a parameter hold layers: what an attacker
        does to a matrix, it does to each of them.
      takes_adapters: whether ``features_fn(params, x, adapters)`` works too.
      scale_path: without a head, the parameter to which outputs are proportional, for attackers
        that rescale a head; None: there is none.
      row_flops: of the forward pass of one row, where the compiler's count misses loops over
        layers; None: the compiler counts.
      canonical_fn: ``canonical_fn(params)``, a sequence of other weights of the same function and
        structure that depend on the function alone, each with fields `params` and `flops`; run
        once, on the host. None: no such weights are known.
      readings_fn: ``readings_fn(params)``, or with adapters ``readings_fn(params, adapters)``, a
        dict of scalars that are followed beside losses and qualities, at the same steps. None:
        there are none.
      opened: whether an attacker has taken its program apart; see `WeightAttack.pose`.
    """

    features_fn: ModelFn
    params: Any
    head: Any
    train: Batch
    selection: Batch | None
    measured: Batch
    held_out: Batch
    benign: Benign | None = None
    public: Any = None
    refresh_fn: Callable[[Any, jax.Array], Any] | None = None
    stacked: Callable[[str], int] = unstacked
    takes_adapters: bool = False
    scale_path: str | None = None
    row_flops: float | None = None
    canonical_fn: Callable[[Any], Sequence[Any]] | None = None
    readings_fn: Callable[..., Mapping[str, jax.Array]] | None = None
    opened: bool = False
    _made: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once; it goes when the problem goes."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def canonical(self) -> tuple[Any, ...]:
        """What `canonical_fn` gives of `params`, computed once.

        Raises:
          ValueError: weights of another structure or other shapes.
        """

        def make() -> tuple[Any, ...]:
            assert self.canonical_fn is not None
            forms = tuple(self.canonical_fn(self.params))
            shapes = jax.tree.map(jnp.shape, self.params)
            if not forms or any(jax.tree.map(jnp.shape, one.params) != shapes for one in forms):
                raise ValueError("canonical_fn must give weights of the shapes of params.")
            return forms

        return self.once("canonical", make)

    def __post_init__(self) -> None:
        if not self.head:
            self._check_headless()
        else:
            self._check_heads()
        if self.public is not None:
            ours, theirs = (jax.tree.map(jnp.shape, tree) for tree in (self.params, self.public))
            if ours != theirs:
                raise ValueError("public must have the structure and shapes of params.")

    def _check_headless(self) -> None:
        sets = {
            name: getattr(self, name) for name in ("train", "selection", "measured", "held_out")
        }
        if self.benign is not None:
            if self.benign.head:
                raise ValueError("without a head for the harmful task the benign one has none too.")
            sets |= {"benign train": self.benign.train, "benign held_out": self.benign.held_out}
        weights = ModelWeights(self.params, ())
        for name, batch in sets.items():
            if batch is None:
                continue
            counts = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
            if len(counts) != 1 or not min(counts):
                raise ValueError(
                    f"{name}: need inputs and targets of as many rows, n >= 1, got "
                    f"{sorted(counts)}."
                )
            shape = _losses.eval_shape(weights, _first(batch), features_fn=self.features_fn).shape
            if shape != (1,):
                raise ValueError(f"{name}: expected one loss for one row, got shape {list(shape)}.")

    def _check_heads(self) -> None:
        d = check_head(self.head, where="head")
        for name in ("train", "selection", "measured", "held_out"):
            if getattr(self, name) is not None:
                check_rows(getattr(self, name), self.head, where=name)
        if self.benign is not None:
            if check_head(self.benign.head, where="benign head") != d:
                raise ValueError(
                    f"both heads need {d} features, got {self.benign.head.kernel.shape}."
                )
            for name in ("train", "held_out"):
                check_rows(getattr(self.benign, name), self.benign.head, where=f"benign {name}")
        shape = jax.eval_shape(self.features_fn, self.params, _first(self.train.x)).shape
        if shape != (1, d):
            raise ValueError(f"features_fn must give [1, {d}] for one row, gave {list(shape)}.")

    def measured_sets(self) -> dict[str, Batch]:
        """The rows that are measured along a trajectory, by name; benign ones are held out."""
        sets = {name: getattr(self, name) for name in ("measured", "held_out", "selection")}
        if self.benign is not None:
            sets["benign"] = self.benign.held_out
        return {name: batch for name, batch in sets.items() if batch is not None}

    @property
    def functions(self) -> Functions:
        """The model without its parameters."""
        return Functions(
            as_argument(self.features_fn),
            as_argument(self.refresh_fn),
            self.stacked,
            self.takes_adapters,
            self.scale_path,
        )

    @property
    def classes(self) -> int:
        """k, or 1 for a real target; of tokens, the size of the vocabulary."""
        if self.head:
            return self.head.kernel.shape[1]
        outputs = jax.eval_shape(self.features_fn, self.params, _first(self.train.x))
        return jax.tree.leaves(outputs)[-1].shape[0]

    @property
    def dtype(self) -> Any:
        """Of hyper-parameters and losses: that of the head, or else of the parameters."""
        return dtype_of(self.head, self.params)

    @property
    def objective(self) -> objectives.Objective:
        """What the targets are; see `jaximm.objectives`."""
        return objectives.of_targets(self.train.y)

    @property
    def is_regression(self) -> bool:
        """Whether the targets are real numbers."""
        return self.objective.metric == "r2"


# Under jit since its traces are kept: a problem is made many times of one function and few shapes.
@functools.partial(jax.jit, static_argnames="features_fn")
def _losses(weights: ModelWeights, batch: Batch, *, features_fn: ModelFn) -> Float[Array, "n"]:
    """The loss of each row of a model without a head."""
    return objectives.of_targets(batch.y).losses(outputs_of(features_fn, weights, batch.x), batch.y)


def _first(rows: Any) -> Any:
    """The shape of a first row."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), rows)


def dtype_of(head: Any, params: Any) -> Any:
    """The dtype of a head, or where there is none of the parameters."""
    return jax.tree.leaves((head, params))[0].dtype


def check_head(head: Head, *, where: str) -> int:
    """The number of features of a head of matching shapes; ValueError otherwise."""
    words = {"custom_message": f"{where} must be kernel [d, k] and bias [k]"}
    chex.assert_rank(list(head), [2, 1], **words, exception_type=ValueError)
    d, k = head.kernel.shape
    chex.assert_shape(head.bias, (k,), **words, exception_type=ValueError)
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
    low, high = int(np.min(y)), int(np.max(y))
    if low < 0 or high >= k:
        raise ValueError(f"{where}: labels must be in 0..{k - 1}, got {low}..{high}.")


def fine_tune_problem(
    *,
    features_fn: ModelFn,
    params: Any,
    head: Any,
    train: Batch,
    held_out: Batch,
    selection: Batch | None = None,
    selection_fraction: float = 0.2,
    measured_rows: int = 512,
    seed: int = 0,
    benign: Benign | None = None,
    public: Any = None,
    refresh_fn: Callable[[Any, jax.Array], Any] | None = None,
    **model: Any,
) -> FineTuneProblem:
    """A problem from training and held-out rows: some training rows are set aside for selection.

    Args:
      features_fn, params, head, held_out, benign, public, refresh_fn: see `FineTuneProblem`.
      train: all rows that the attacker has.
      selection: rows that choose hyper-parameters; None: some of the training rows do.
      selection_fraction: then this share of them, in (0, 1); at least one row stays on either side.
      measured_rows: the training loss is measured on at most this many of the others.
      seed: of the permutation that splits the rows.
      **model: further fields of `FineTuneProblem`.

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
        return jax.tree.map(lambda leaf: jnp.asarray(leaf[rows]), Batch(*train))

    def whole(batch):
        return jax.tree.map(jnp.asarray, Batch(*batch))

    return FineTuneProblem(
        features_fn=features_fn,
        params=params,
        head=Head(*head) if head else (),
        train=take(np.sort(kept)),
        selection=take(chosen) if selection is None else whole(selection),
        measured=take(np.sort(kept[:measured_rows])),
        held_out=whole(held_out),
        benign=benign,
        public=public,
        refresh_fn=refresh_fn,
        **model,
    )


class Batches(NamedTuple):
    """What one step draws: rows of both tasks, and a key.

    `step` is its number. Unlike a count in the attacker's state it is one number for trajectories
    that run as a batch, so that a `lax.cond` on it takes one branch.
    """

    harmful: Batch
    benign: Batch | None
    rng_key: jax.Array
    step: jax.Array | int = 0


class Access(NamedTuple):
    """What an attacker of weights holds, inside the compiled step.

    `loss_fn` and `benign_loss_fn` are means of `losses_fn` and `benign_losses_fn`, which give one
    loss a row. The features are those of the backbone as it came.
    """

    weights: ModelWeights  # at the start
    features: Any  # a Batch: [n, d] of the training rows, and their targets; None without a head
    benign_features: Batch | None
    public: Any
    seed: Int[Array, ""]
    inputs: Batch  # the training rows
    functions: Functions
    canonical: Any = ()  # `FineTuneProblem.canonical`, for an `init` that needs it

    @property
    def features_fn(self) -> ModelFn:
        """See `FineTuneProblem`."""
        return self.functions.features_fn

    @property
    def refresh_fn(self) -> Callable[[Any, jax.Array], Any] | None:
        """See `FineTuneProblem`."""
        return self.functions.refresh_fn

    @property
    def takes_adapters(self) -> bool:
        """See `FineTuneProblem`."""
        return self.functions.takes_adapters

    def stacked(self, path: str) -> int:
        """See `FineTuneProblem`."""
        return self.functions.stacked(path)

    def losses_fn(self, weights: ModelWeights, batch: Batch) -> Float[Array, "n"]:
        """The harmful task's loss, row by row."""
        outputs = outputs_of(self.features_fn, weights, batch.x)
        return objectives.of_targets(batch.y).losses(outputs, batch.y)

    def loss_fn(self, weights: ModelWeights, batch: Batch) -> Float[Array, ""]:
        """The harmful task's mean loss."""
        return objectives.of_targets(batch.y).mean(self.losses_fn(weights, batch), batch.y)

    def benign_losses_fn(self, weights: ModelWeights, batch: Batch) -> Float[Array, "n"]:
        """The benign task's loss, row by row."""
        benign = weights._replace(head=weights.benign_head, shift=())
        outputs = outputs_of(self.features_fn, benign, batch.x)
        return objectives.of_targets(batch.y).losses(outputs, batch.y)

    def benign_loss_fn(self, weights: ModelWeights, batch: Batch) -> Float[Array, ""]:
        """The benign task's mean loss."""
        return objectives.of_targets(batch.y).mean(self.benign_losses_fn(weights, batch), batch.y)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightAttack(Attacker):
    """An attacker of weights, as two pure functions.

    Attributes:
      init: ``init(access, hyper) -> state``, a NamedTuple of arrays with a field `weights`, which
        is the model that is measured. Whatever is done once, before step 0, is done here. A
        hyper-parameter named `head_scale` is the factor on the head that the model comes with, and
        nothing else.
      update: ``update(state, batches, access, hyper) -> state``, one step.
      update_reads: names of the hyper-parameters that `update` gets; None: all. Attackers of one
        `update` that differ in their start then share its compiled program.
      needs: what the problem must have: "benign", "public", "refresh_fn", "head" (one that is not
        zero), "own_head" (one of the harmful task's own), "real_inputs" (no tokens), "answers"
        (labels or tokens as targets), "blocks" (layers that are not stacked), "norms" (parameters
        of normalisation layers), "matrices" (parameters of two or more axes), "unembedding"
        (of a language model) or "canonical" (weights of the same function; `init` alone gets them).
      passes: forward passes over all training rows that `init` looks at, for its price.
      step_passes: forward passes over the batch that a step makes beyond the three of a training
        step, where a problem's `row_flops` price it.
      solve_flops: ``solve_flops(problem) -> (set-up, step)``, for factorisations and loops, which
        the compiler does not count.
      follows_loss: whether it descends the loss that is measured. One that follows a reward may
        raise it and do better; a risen loss is then no divergence.
      pose: ``pose(problem)``, the problem as this attacker makes it of the one that is posed, with
        `opened` set, before anything is run; or a text that says why it cannot. None: as it is.
      kind, title, source, knows, traits, grid, natural_bounds: see `Attacker`.
    """

    init: Callable[[Access, Hyper], Any]
    update: Callable[[Any, Batches, Access, Hyper], Any]
    kind: str = "fine-tuning"
    update_reads: tuple[str, ...] | None = None
    needs: tuple[str, ...] = ()
    passes: float = 0.0
    step_passes: float = 0.0
    solve_flops: Callable[[FineTuneProblem], tuple[float, float]] | None = None
    follows_loss: bool = True
    pose: Callable[[FineTuneProblem], FineTuneProblem | str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = set(self.needs) - set(NEEDS)
        if unknown:
            raise ValueError(f"unknown need {sorted(unknown)[0]!r}; choose from {sorted(NEEDS)}.")

    @property
    def threat_model(self) -> str:
        """Whom this attacker stands for."""
        has = ["the weights", self.labelled_rows]
        has += [_HAS[need] for need in self.needs if need in _HAS]
        return "; ".join(
            [
                f"has {', '.join(has[:-1])} and {has[-1]}",
                *([f"knows {self.knows}"] if self.knows else []),
            ]
        )


_HAS = {"benign": "rows of the primary task", "public": "a public model of the same structure"}

NEEDS: dict[str, str] = {
    "benign": "the problem has no benign task",
    "public": "there is no public model of the same structure",
    "refresh_fn": "the backbone has no batch statistics that can be refreshed",
    "head": "the head starts at zero: there is nothing to rescale",
    "own_head": "the harmful task has no head of its own",
    "answers": "its targets are real numbers, of which no answer is right",
    "canonical": "no other weights of its function are known: it is no language model",
    "real_inputs": "the inputs are not real numbers, so that they cannot be shifted",
    "blocks": "its layers are stacked in one array; pose the last ones alone as parameters",
    "norms": "none of the trained parameters belongs to a normalisation layer",
    "matrices": "none of the trained parameters is a matrix or a kernel",
    "unembedding": "nothing maps its hidden states to tokens: probes train its head alone",
}
"""What an attacker may need, and what is said where it is missing."""


def not_applicable(attack: WeightAttack, problem: FineTuneProblem) -> str | None:
    """Why an attacker cannot be run on a problem; None if it can."""
    for need in attack.needs:
        if need == "own_head":
            there = bool(problem.head)
        elif need == "head":
            leaves = jax.tree.leaves(problem.head)[:1]
            there = any(np.any(np.asarray(kernel) != 0) for kernel in leaves)
            there |= problem.scale_path is not None
        elif need == "real_inputs":
            there = jnp.issubdtype(problem.train.x.dtype, jnp.floating)
        elif need == "answers":
            there = not problem.is_regression
        elif need == "canonical":
            there = problem.canonical_fn is not None
        elif need == "blocks":
            there = not any(map(problem.stacked, paths_of(problem.params)))
        elif need == "norms":
            there = any(map(is_norm, paths_of(problem.params)))
        elif need == "unembedding":  # an encoder's tables are of what enters it
            there = not problem.head and any(map(is_table, paths_of(problem.params)))
        elif need == "matrices":
            there = any(leaf.ndim >= 2 for leaf in jax.tree.leaves(problem.params))
        else:
            there = getattr(problem, need) is not None
        if not there:
            return NEEDS[need]
    reason = posed(attack, problem)
    return reason if isinstance(reason, str) else None


def budgeted(attack: Attacker, problem: FineTuneProblem) -> FineTuneProblem:
    """The problem with the rows alone that the attacker has (`Attacker.rows_of`), made once.

    What is followed of the training loss is followed on these.
    """
    rows = attack.rows_of(problem.train.x.shape[0])
    if rows is None:
        return problem

    def make() -> FineTuneProblem:
        train = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[rows]), problem.train)
        most = problem.measured.x.shape[0]
        measured = jax.tree.map(lambda leaf: leaf[:most], train)
        return dataclasses.replace(problem, train=train, measured=measured)

    return problem.once(("budgeted", attack.harmful_rows, attack.rows_seed), make)


def posed(attack: WeightAttack, problem: FineTuneProblem) -> FineTuneProblem | str:
    """The problem as the attacker makes it of the rows that it has, once; or why it cannot."""
    problem = budgeted(attack, problem)
    if attack.pose is None or problem.opened:
        return problem
    pose = attack.pose
    return problem.once(("posed", pose), lambda: pose(problem))


def outputs_of(features_fn: ModelFn, weights: ModelWeights, x: Float[Array, "n ..."]) -> Any:
    """Outputs of the harmful task's head on inputs, shifted if the weights say so.

    Without a head, what `features_fn` gives.
    """
    if not isinstance(weights.shift, tuple):
        x = x + weights.shift[None]
    beside = (weights.adapters,) if weights.adapters else ()
    features = features_fn(weights.params, x, *beside)
    return weights.head.outputs(features) if weights.head else features


def guessing_loss(problem: FineTuneProblem) -> np.ndarray:
    """The loss of knowing nothing: ln k, or half the spread of the targets."""
    y = jax.tree.map(np.asarray, problem.measured.y)
    blind = problem.objective.blind_loss(y, problem.classes)
    return np.asarray(blind, problem.dtype)
