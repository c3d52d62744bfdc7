"""A method from what it minimises, on any model: `from_objective` and `from_penalty`.

**A mean over rows: `from_objective`.** ``objective(params, batches, memory, rng_key) -> (loss,
info, memory)``, where the loss is a mapping of terms by name, each one number a row. What is
minimised is the sum over the terms of

    mean of the term over the rows of the global batch,   sum_i w_i v_i / sum_i w_i

with the weights of `Weighted`, or 1. The function sees a part of the rows at a time: one device's,
one micro-batch's. Sums of values and of weights are added over all parts, so that one device and
many, one batch and micro-batches give the same numbers, also where the parts hold unequal numbers
of valid tokens. ``info`` is likewise numbers by row that are averaged and logged. A whole method:

>>> import optax, jax.numpy as jnp
>>> from jaximm.immunisers.problem import ProbeParams, Problem
>>> from jaximm.types import Batch, Head, PairedBatch
>>> problem = Problem(
...     features_fn=lambda backbone, x: x @ backbone["kernel"], classes=2, optimiser=optax.sgd(0.5),
...     width=2, harmful_head=Head(jnp.array([[1.0, -1.0], [1.0, -1.0]]), jnp.zeros(2)))
>>> def objective(params, batches, memory, rng_key):  # up with the harmful loss, at most to 2 nats
...     harm = problem.losses(problem.with_harmful_head(params), batches.harmful)
...     keep = problem.training_losses(params, batches.primary)
...     return {"harm": -jnp.minimum(harm, 2.0), "keep": keep}, {}, memory
>>> method = from_objective("mine", problem, objective)
>>> rows = Batch(jnp.eye(2), jnp.array([0, 1]))
>>> start = ProbeParams({"kernel": jnp.eye(2)}, Head(jnp.zeros((2, 2)), jnp.zeros(2)))
>>> state, key = method.init(start, None), None
>>> for _ in range(3):
...     state, info = method.update(state, PairedBatch(rows, rows), key)
>>> info._fields, bool(info.harm < -1.1)
(('loss', 'harm', 'keep'), True)

Batches are a NamedTuple (or a dict) of batches by name: primary and harmful, which an experiment
draws, and whatever else a method asks of the `batch_fn` of `jaximm.training.fit` (benign, retain,
inner); each a pytree of arrays with rows first. What published methods need is said so:

==========================  ======================================================================
a reference model           the start in `memory` (``init_memory=problem.reference_of``)
activations, perturbed too  `Problem.activations` (RMU, RepNoise), `Problem.perturbed_losses`
                            (Vaccine)
inner loops                 `jaximm.immunisers.meta.inner` on a batch named in `whole` (IMMA, TAR,
                            MLAC, SOPHON), one step of a given length in `collapse.common`
                            (Booster, CTRAP); adversaries that stay live in `memory` (AntiDote)
no mean over rows           a term that is a scalar of batches named in `whole` (the cosine of two
                            gradients in SEAM, log(1 + mean) and MMD in RepNoise, the squared mean
                            of ILU)
rows that may move only     `route`: gradient routing, and masks of parameters (RMU's layers, PMP)
some parameters
locks                       `init` and `finish` of what is returned, replaced
==========================  ======================================================================

**A function of all rows at once: `from_penalty`.** A condition number is no mean over rows and its
features should be computed once. The objective of a step is

    label-smoothed cross-entropy of the primary task + penalty(primary features, harmful features)

The penalty is that of the *global* batch: each device computes the features of its own rows, all
features are gathered, every device takes the penalty's gradient in the features (the same one),
pulls back its own rows of it, and parameter gradients are summed: one all-gather and one all-reduce
a step. Taking the gradient in the features first also makes accumulation exact: features of many
micro-batches are computed without keeping activations, then pulled back one micro-batch at a time,
so the rows of a Hessian may exceed what memory holds in one pass (gradient caching, Gao et al.
2021, https://arxiv.org/abs/2101.06983).
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jaximm import collectives
from jaximm.immunisers.problem import FEATURES, ProbeParams, Problem
from jaximm.training.optimiser import optimiser_state, optimiser_step
from jaximm.types import AnyBatch, Batch, Head, Immuniser, PairedBatch, Params

Memory = Any
"""A method's own state beside the parameters: a pytree of arrays, or None."""

Penalty = Callable[[PairedBatch, Memory], tuple[Float[Array, ""], Memory]]
"""``penalty(features, memory) -> (value, memory)``, with the global batch's features [n, d] in the
place of its inputs, in JAX's default float."""


class State(NamedTuple):
    """Backbone and head, the optimiser's state, the method's memory, and the updates done."""

    params: ProbeParams
    opt_state: optax.OptState
    memory: Memory
    step: Int[Array, ""]


class Weighted(NamedTuple):
    """One number a row, and how much each row counts, >= 0: its valid tokens, or whether it is one
    of some group. A row of weight 0 is left out, also where its value is not finite (its slope must
    be); without any weight a mean is 0. No gradient goes through the weights."""

    values: Float[Array, "rows"]
    weights: Float[Array, "rows"]


Rows = Float[Array, "rows"] | Weighted

Objective = Callable[
    [Params, AnyBatch, Memory, jax.Array], tuple[Mapping[str, Rows], Mapping[str, Rows], Memory]
]
"""``objective(params, batches, memory, rng_key) -> (loss, info, memory)``; see `from_objective`."""

Route = Callable[[str, str], bool | Array]
"""``route(term, path)``: True where the gradient of a term may move the parameter at a dotted path
("backbone.layers.0.kernel"), False where not, or an array of both of the parameter's shape."""


class Info(NamedTuple):
    """Before the update, over the global batch: primary loss (nats), accuracy, penalty."""

    task_loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    penalty: Float[Array, ""]


def from_penalty(
    method: str,
    problem: Problem,
    penalty: Penalty | None,
    *,
    init_memory: Callable[[Params], Memory] = lambda params: None,
) -> Immuniser:
    """An immuniser from a penalty; None trains the primary task alone.

    On a problem with a `losses_fn` of its own, the objective of a step is the mean primary loss
    over rows by their weights, plus `keep` times the mean distance of the primary predictions from
    the reference's, plus the penalty of the sites' rows; rows that do not count (`counted_fn`) are
    zeros there.

    Raises:
      ValueError: a problem without classes, width or optimiser, with what `method` needs.
    """
    if problem.losses_fn is not None:
        return _of_losses_and_penalty(method, problem, penalty, init_memory)
    if problem.classes is None:
        raise ValueError(
            f"{method} on targets that are numbers needs a linear backbone with whole-data "
            "factors, got a problem without; make it with jaximm.immunisers.linear_problem."
        )
    if problem.width is None or problem.optimiser is None or problem.harmful_classes is None:
        raise ValueError(
            f"{method} trains by gradients: give the problem's width, harmful_classes and "
            "optimiser."
        )

    def init(params: ProbeParams, rng_key) -> State:
        del rng_key
        _check_params(params, problem)
        return _start(problem, params, init_memory(params))

    def update(state: State, batch: PairedBatch, rng_key):
        del rng_key
        gradients, memory, info = _gradients(problem, penalty, state, batch)
        return _stepped(problem, state, gradients, memory), info

    return Immuniser(init, update, finish=lambda state: state.params)


def _of_losses_and_penalty(
    method: str, problem: Problem, penalty: Penalty | None, init_memory: Callable[[Params], Memory]
) -> Immuniser:
    """`from_penalty` where rows have losses without a head of ours."""
    if problem.optimiser is None:
        raise ValueError(f"{method} trains by gradients: give the problem's optimiser.")

    def init(params: Params, rng_key) -> State:
        del rng_key
        reference = problem.reference_of(params) if problem.keep else ()
        return _start(problem, params, (reference, init_memory(params)))

    def objective(params, batches, memory, rng_key):
        del rng_key
        rows = batches.primary
        weights = problem.weights(rows)
        terms = {"task_loss": Weighted(problem.losses(params, rows), weights)}
        if problem.keep:
            moved = problem.divergences(params, memory[0], rows)
            terms["divergence"] = Weighted(problem.keep * moved, weights)
        return terms, {}, memory  # scores would be a second pass over the vocabulary

    def update(state: State, batch: PairedBatch, rng_key):
        means = _mean_gradient(problem, objective, state, batch, rng_key)
        gradient, (reference, memory) = means.gradient, state.memory
        value = jnp.zeros((), means.loss["task_loss"].dtype)
        if penalty is not None:
            added, value, memory = _penalty_gradient(problem, penalty, state, batch, memory)
            gradient = jax.tree.map(jnp.add, gradient, added)
        # Sums of several terms are logged apart, as the others are.
        info = _info_type((*means.loss, *means.info, "penalty"))(
            *means.loss.values(), *means.info.values(), value.astype(jnp.zeros(()).dtype)
        )
        return _stepped(problem, state, gradient, (reference, memory)), info

    return Immuniser(init, update, finish=lambda state: state.params)


def _penalty_gradient(
    problem: Problem, penalty: Penalty, state: State, batch: PairedBatch, memory: Memory
):
    """The penalty's gradient in all parameters, its value, and the new memory."""
    inputs = jnp.concatenate([batch.primary.x, batch.harmful.x])
    sites, pull = _sites(problem, state.params, inputs)
    counted = [rows for rows in map(problem.counted, batch) if rows is not None]
    mask = jnp.concatenate(counted)[:, None] if counted else None
    if mask is not None:
        sites = {name: jnp.where(mask, rows, 0) for name, rows in sites.items()}
    unlabelled = PairedBatch(*(part._replace(y=jnp.zeros(len(part.x))) for part in batch))
    value, slopes, memory = _penalty_slopes(
        problem, penalty, sites, _primary_rows(sites, batch), unlabelled, memory
    )
    if mask is not None:
        slopes = {name: jnp.where(mask, slope, 0) for name, slope in slopes.items()}
    return collectives.sum_over_devices(pull(slopes)), value, memory


def from_objective(
    method: str,
    problem: Problem,
    objective: Objective,
    *,
    init_memory: Callable[[Params], Memory] = lambda params: None,
    whole: Sequence[str] = (),
    route: Route | None = None,
) -> Immuniser:
    """An immuniser from a mean over rows; see the module for what an objective is.

    Args:
      method: its name, for messages.
      problem: with an optimiser; and classes and a width, or a `losses_fn` of its own.
      objective: traceable. `params` are those of the step; `batches` hold this part's rows, all
        rows where named in `whole`; `memory` is what the last step gave. `rng_key` is the step's
        and the same in every part: draw nothing of the shape of a part's rows from it. The new
        memory must be the same in every part: a function of whole batches, memory and key.
      init_memory: the first memory, of the parameters that the run starts from. It is part of the
        state: saved with it, and copied to every device.
      whole: names of batches that every part sees whole, gathered over devices.
      route: restricts terms to some parameters; each term is then differentiated by itself.

    Returns:
      An `Immuniser` whose state is a `State` and whose info has the fields loss (the sum of the
      terms), every term and every entry of info, as they were before the update.

    Raises:
      ValueError: a problem without what is asked for; at trace time, a batch whose rows do not
        divide by the problem's `accumulate`, an unknown name in `whole`, values that are not one a
        row, or one name for two things.
    """
    if problem.losses_fn is None and (problem.classes is None or problem.width is None):
        raise ValueError(
            f"{method} descends losses of rows: give the problem's classes and width, or a "
            "losses_fn."
        )
    if problem.optimiser is None:
        raise ValueError(f"{method} trains by gradients: give the problem's optimiser.")

    def init(params: Params, rng_key) -> State:
        del rng_key
        if problem.losses_fn is None:
            _check_params(params, problem)
        return _start(problem, params, init_memory(params))

    def update(state: State, batches: AnyBatch, rng_key):
        gradient, loss, info, memory = _mean_gradient(
            problem, objective, state, batches, rng_key, whole, route
        )
        names = ("loss", *loss, *info)
        if len(set(names)) < len(names):
            raise ValueError(f"{method}: loss and info must have names of their own, got {names}.")
        info = _info_type(names)(sum(loss.values()), *loss.values(), *info.values())
        return _stepped(problem, state, gradient, memory), info

    return Immuniser(init, update, finish=lambda state: state.params)


class _Means(NamedTuple):
    """Of an objective over the global batch."""

    gradient: Params
    loss: dict[str, Array]  # by term
    info: dict[str, Array]
    memory: Memory


def _mean_gradient(
    problem: Problem,
    objective: Objective,
    state: State,
    batches: AnyBatch,
    rng_key: jax.Array,
    whole: Sequence[str] = (),
    route: Route | None = None,
) -> _Means:
    """The gradient of the sum of the terms' means, the means, and the new memory."""
    parts, part = _parts(batches, problem.accumulate, whole)

    def sums(params, number):
        """Sums of this part's rows, and the memory."""
        seen = part(number)
        loss, info, memory = objective(params, seen, state.memory, rng_key)
        if route is not None:
            loss = {
                term: objective(_routed(params, term, route), seen, state.memory, rng_key)[0][term]
                for term in loss
            }
        return [{key: _sum(key, rows[key]) for key in rows} for rows in (loss, info)], memory

    def weights(number):
        summed, _ = sums(state.params, number)  # of which the compiler keeps the weights alone
        return [{key: term.weights for key, term in terms.items()} for terms in summed], None

    totals = collectives.sum_over_devices(_over_parts(weights, parts, None)[0])
    totals = jax.tree.map(lambda total: jnp.where(total > 0, total, 1), totals)

    def slopes(number):
        def share(params):
            summed, memory = sums(params, number)
            means = [
                {key: term.values / all_of[key] for key, term in terms.items()}
                for terms, all_of in zip(summed, totals, strict=True)
            ]
            return sum(means[0].values()), (means, memory)

        gradient, (means, memory) = jax.grad(share, has_aux=True)(state.params)
        return (gradient, means), memory

    slopes_and_means, memory = _over_parts(slopes, parts, state.memory)
    gradient, (loss, info) = collectives.sum_over_devices(slopes_and_means)
    return _Means(gradient, loss, info, memory)


def _start(problem: Problem, params: Params, memory: Memory) -> State:
    assert problem.optimiser is not None
    opt_state = optimiser_state(problem.optimiser, params)
    return State(params, opt_state, memory, jnp.zeros((), jnp.int32))


def _stepped(problem: Problem, state: State, gradients: Params, memory: Memory) -> State:
    """The state after the optimiser's step."""
    assert problem.optimiser is not None
    stepped = optimiser_step(problem.optimiser, gradients, state.opt_state, state.params)
    return State(*stepped, memory, state.step + 1)


def _parts(batches: AnyBatch, parts: int, whole: Sequence[str]):
    """The number of micro-batches, and the function that takes one of them out."""

    def name_of(path) -> str:
        return jax.tree_util.keystr(path[:1], simple=True)

    rows: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batches):
        rows.setdefault(name_of(path), leaf.shape[0])
        if leaf.shape[0] != rows[name_of(path)]:
            raise ValueError(f"the arrays of batch {name_of(path)!r} differ in their rows.")
    unknown = sorted(set(whole) - set(rows))
    if unknown:
        raise ValueError(f"whole names {unknown[0]!r}, which is none of the batches {list(rows)}.")
    odd = [name for name, n in rows.items() if name not in whole and n % parts]
    if odd:
        raise ValueError(
            f"the {rows[odd[0]]} {odd[0]} rows of a step do not divide by accumulate={parts}; "
            "choose another batch size."
        )
    batches = jax.tree_util.tree_map_with_path(
        lambda path, leaf: collectives.gather_tree(leaf) if name_of(path) in whole else leaf,
        batches,
    )

    def part(number):
        def take(path, leaf):
            if parts == 1 or name_of(path) in whole:
                return leaf
            size = leaf.shape[0] // parts
            return lax.dynamic_slice_in_dim(leaf, number * size, size)

        return jax.tree_util.tree_map_with_path(take, batches)

    return parts, part


def _over_parts(
    fun: Callable[[Array | int], tuple[Params, Memory]], parts: int, last: Memory
) -> tuple[Params, Memory]:
    """Sums of what ``fun(number) -> (summed, last)`` gives, and the last of the rest."""
    if parts == 1:
        return fun(0)  # no loop: XLA runs convolutions in one some 50 times slower on CPU

    def add(carry, number):
        summed, last = fun(number)
        return (jax.tree.map(jnp.add, carry[0], summed), last), None

    numbers = jnp.arange(parts, dtype=jnp.int32)
    shapes, _ = jax.eval_shape(fun, numbers[0])
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return lax.scan(add, (zeros, last), numbers)[0]


def _routed(params: Params, term: str, route: Route) -> Params:
    """The same numbers; the gradient of a term stops at parameters that it may not move."""

    def leaf_of(path, leaf):
        free = route(term, jax.tree_util.keystr(path, simple=True, separator="."))
        return jnp.where(free, leaf, lax.stop_gradient(leaf))

    return jax.tree_util.tree_map_with_path(leaf_of, params)


def _sum(name: str, rows: Rows) -> Weighted:
    """Weighted sum of a term, and the sum of its weights."""
    values, weights = rows if isinstance(rows, Weighted) else (rows, jnp.ones_like(rows))
    if values.ndim > 1 or values.shape != weights.shape:
        raise ValueError(
            f"{name!r} must be one number a row (or a scalar of whole batches), with as many "
            f"weights, got shapes {values.shape} and {weights.shape}."
        )
    weights = lax.stop_gradient(weights).astype(values.dtype)
    return Weighted(jnp.sum(jnp.where(weights > 0, values, 0) * weights), jnp.sum(weights))


@functools.lru_cache(maxsize=64)
def _info_type(names: tuple[str, ...]) -> Callable[..., tuple]:
    """One NamedTuple class a set of names."""
    return collections.namedtuple("Info", names)  # pyrefly: ignore[bad-class-definition]


def _gradients(problem: Problem, penalty: Penalty | None, state: State, batch: PairedBatch):
    """Gradients of the objective over the global batch, the new memory, and what to log."""
    backbone, head = state.params
    harmful_rows = batch.harmful.x.shape[0] if penalty is not None else 0
    inputs = (
        jnp.concatenate([batch.primary.x, batch.harmful.x]) if harmful_rows else batch.primary.x
    )
    sites, pull = _sites(problem, backbone, inputs)
    n = batch.primary.x.shape[0]

    def task(features, head):
        task, labels = problem.primary, batch.primary.y
        outputs = task.outputs(features, head)
        return task.loss(outputs, labels), jnp.mean(task.objective.scores(outputs, labels))

    (loss, accuracy), (slope, head_gradient) = jax.value_and_grad(
        task, argnums=(0, 1), has_aux=True
    )(sites[FEATURES][:n], head)
    devices = collectives.device_count()
    slopes = {name: jnp.zeros_like(rows) for name, rows in sites.items()}
    slopes[FEATURES] = slopes[FEATURES].at[:n].add(slope / devices)

    value, memory = jnp.zeros((), loss.dtype), state.memory
    if penalty is not None:
        value, added, memory = _penalty_slopes(
            problem, penalty, sites, _primary_rows(sites, batch), batch, state.memory
        )
        slopes = {name: slopes[name] + added[name] for name in slopes}
    mine = ProbeParams(pull(slopes), jax.tree.map(lambda leaf: leaf / devices, head_gradient))
    gradients, loss, accuracy = collectives.sum_over_devices(
        (mine, loss / devices, accuracy / devices)
    )
    return gradients, memory, Info(loss, accuracy, value.astype(loss.dtype))


def _primary_rows(sites: Mapping[str, Array], batch: PairedBatch) -> dict[str, int]:
    """How many of each site's rows, a fixed number an input, are those of the primary task."""
    primary, harmful = (task.x.shape[0] for task in batch)
    return {name: primary * (rows.shape[0] // (primary + harmful)) for name, rows in sites.items()}


def _sites(problem: Problem, backbone: Params, inputs: Array):
    """Every site's rows, and the function that pulls slopes of them back to the parameters."""
    if problem.accumulate == 1:
        sites, pullback = jax.vjp(lambda params: problem.sites(params, inputs), backbone)
        return sites, lambda slopes: pullback(slopes)[0]
    parts = problem.accumulate
    if inputs.shape[0] % parts:
        raise ValueError(
            f"{inputs.shape[0]} rows of a step (both tasks) do not divide by "
            f"accumulate={parts}; choose another batch size."
        )

    def chunks(rows):
        return rows.reshape(parts, -1, *rows.shape[1:])

    def joined(rows):
        return rows.reshape(-1, *rows.shape[2:])

    pieces = chunks(inputs)
    sites = jax.tree.map(joined, lax.map(lambda piece: problem.sites(backbone, piece), pieces))

    def pull(slopes):
        def add(total, piece_and_slopes):
            piece, slope = piece_and_slopes
            _, pullback = jax.vjp(lambda params: problem.sites(params, piece), backbone)
            return jax.tree.map(jnp.add, total, pullback(slope)[0]), None

        zeros = jax.tree.map(jnp.zeros_like, backbone)
        return lax.scan(add, zeros, (pieces, jax.tree.map(chunks, slopes)))[0]

    return sites, pull


def _penalty_slopes(
    problem: Problem,
    penalty: Penalty,
    sites: Mapping[str, Array],
    primary_rows: Mapping[str, int],
    batch: PairedBatch,
    memory: Memory,
):
    """The penalty over all sites, its gradient in this device's rows, and the new memory."""
    names = sorted(sites)
    sent = [
        part
        for name in names
        for part in (sites[name][: primary_rows[name]], sites[name][primary_rows[name] :])
    ]
    labels = [batch.primary.y, batch.harmful.y]
    if collectives.is_bound():
        # Class numbers are exact in float32: one gather carries them too.
        *sent, primary_y, harmful_y = collectives.gather_rows(
            *sent, *(label.astype(sent[0].dtype) for label in labels)
        )
        labels = [primary_y.astype(labels[0].dtype), harmful_y.astype(labels[1].dtype)]
    gathered = {name: (sent[2 * i], sent[2 * i + 1]) for i, name in enumerate(names)}
    weights = {name: problem.site_weights.get(name, 1.0) for name in names}
    total = sum(weights.values())
    dtype = jnp.zeros(()).dtype  # float64 where x64 is on: eigenvalues gain digits there

    def objective(gathered):
        value, new_memory = jnp.zeros((), dtype), memory
        for name in names:
            primary, harmful = (rows.astype(dtype) for rows in gathered[name])
            pair = PairedBatch(Batch(primary, labels[0]), Batch(harmful, labels[1]))
            site_memory = memory if name == FEATURES else None
            part, kept = penalty(pair, site_memory)
            value += weights[name] / total * part
            if name == FEATURES:
                new_memory = kept
        return value, new_memory

    (value, new_memory), slopes = jax.value_and_grad(objective, has_aux=True)(gathered)
    mine = {
        name: jnp.concatenate([collectives.own_rows(part) for part in slopes[name]])
        for name in names
    }
    return value, mine, new_memory


def normalised(features: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Features over the root of their mean eigenvalue tr(X^T X / n) / min(n, d), held constant.

    Penalties that depend on scale then mean the same on every backbone, and their gradient still
    acts on the scale as the formula says.
    """
    n, d = features.shape
    mean_eigenvalue = lax.stop_gradient(jnp.sum(features**2)) / (n * min(n, d))
    return features / jnp.sqrt(jnp.maximum(mean_eigenvalue, jnp.finfo(features.dtype).tiny))


def _check_params(params: Params, problem: Problem) -> None:
    head = getattr(params, "head", None)
    if not isinstance(params, ProbeParams) or not isinstance(head, Head):
        raise ValueError(
            "a problem of classes starts from ProbeParams(backbone, Head(kernel, bias)), got "
            f"{type(params).__name__} with a head of type {type(head).__name__}."
        )
    chex.assert_shape(
        [head.kernel, head.bias],
        [(problem.width, problem.classes), (problem.classes,)],
        custom_message="the head's kernel must be [width, classes], its bias [classes]",
        exception_type=ValueError,
    )
