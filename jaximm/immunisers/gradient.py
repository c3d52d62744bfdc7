"""What gradient methods share on any backbone: one update, to which a method adds its penalty.

The objective of a step is

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

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jaximm import collectives
from jaximm.immunisers.problem import FEATURES, ProbeParams, Problem
from jaximm.types import Batch, Head, Immuniser, PairedBatch, Params

Penalty = Callable[[PairedBatch, Any], tuple[Float[Array, ""], Any]]
"""``penalty(features, memory) -> (value, memory)``, with the global batch's features [n, d] in the
place of its inputs, in JAX's default float. ``memory`` is the method's own state, or None."""


class State(NamedTuple):
    """Backbone and head, the optimiser's state, the method's memory, and the updates done."""

    params: ProbeParams
    opt_state: optax.OptState
    memory: Any
    step: Int[Array, ""]


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
    init_memory: Callable[[ProbeParams], Any] = lambda params: None,
) -> Immuniser:
    """An immuniser from a penalty; None trains the primary task alone.

    Raises:
      ValueError: a problem without classes, width or optimiser, with what `method` needs.
    """
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
    optimiser = problem.optimiser

    def init(params: ProbeParams, rng_key) -> State:
        del rng_key
        _check_params(params, problem)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes float32 schedules in
            opt_state = optimiser.init(params)
        return State(params, opt_state, init_memory(params), jnp.zeros((), jnp.int32))

    def update(state: State, batch: PairedBatch, rng_key):
        del rng_key
        gradients, memory, info = _gradients(problem, penalty, state, batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        params = jax.tree.map(lambda new, old: new.astype(old.dtype), params, state.params)
        return State(params, opt_state, memory, state.step + 1), info

    return Immuniser(init, update, finish=lambda state: state.params)


def _gradients(problem: Problem, penalty: Penalty | None, state: State, batch: PairedBatch):
    """Gradients of the objective over the global batch, the new memory, and what to log."""
    backbone, head = state.params
    harmful_rows = batch.harmful.x.shape[0] if penalty is not None else 0
    inputs = (
        jnp.concatenate([batch.primary.x, batch.harmful.x]) if harmful_rows else batch.primary.x
    )
    found, pull = _features(problem, backbone, inputs)
    n = batch.primary.x.shape[0]
    share = {name: rows.shape[0] // inputs.shape[0] for name, rows in found.items()}

    def task(features, head):
        task, labels = problem.primary, batch.primary.y
        outputs = task.outputs(features, head)
        return task.loss(outputs, labels), jnp.mean(task.objective.scores(outputs, labels))

    (loss, accuracy), (slope, head_gradient) = jax.value_and_grad(
        task, argnums=(0, 1), has_aux=True
    )(found[FEATURES][:n], head)
    devices = collectives.device_count()
    slopes = {name: jnp.zeros_like(rows) for name, rows in found.items()}
    slopes[FEATURES] = slopes[FEATURES].at[:n].add(slope / devices)

    value, memory = jnp.zeros((), loss.dtype), state.memory
    if penalty is not None:
        value, added, memory = _penalty_slopes(
            problem, penalty, found, {name: n * share[name] for name in found}, batch, state.memory
        )
        slopes = {name: slopes[name] + added[name] for name in slopes}
    mine = ProbeParams(pull(slopes), jax.tree.map(lambda leaf: leaf / devices, head_gradient))
    gradients, loss, accuracy = collectives.sum_over_devices(
        (mine, loss / devices, accuracy / devices)
    )
    return gradients, memory, Info(loss, accuracy, value.astype(loss.dtype))


def _features(problem: Problem, backbone: Params, inputs: Array):
    """Every site's rows, and the function that pulls slopes of them back to the parameters."""
    if problem.accumulate == 1:
        found, pullback = jax.vjp(lambda params: problem.sites(params, inputs), backbone)
        return found, lambda slopes: pullback(slopes)[0]
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
    found = jax.tree.map(joined, lax.map(lambda piece: problem.sites(backbone, piece), pieces))

    def pull(slopes):
        def add(total, piece_and_slopes):
            piece, slope = piece_and_slopes
            _, pullback = jax.vjp(lambda params: problem.sites(params, piece), backbone)
            return jax.tree.map(jnp.add, total, pullback(slope)[0]), None

        zeros = jax.tree.map(jnp.zeros_like, backbone)
        return lax.scan(add, zeros, (pieces, jax.tree.map(chunks, slopes)))[0]

    return found, pull


def _penalty_slopes(problem, penalty, found, primary_rows, batch, memory):
    """The penalty over all sites, its gradient in this device's rows, and the new memory."""
    names = sorted(found)
    sent = [
        part
        for name in names
        for part in (found[name][: primary_rows[name]], found[name][primary_rows[name] :])
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


def _check_params(params: Any, problem: Problem) -> None:
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
