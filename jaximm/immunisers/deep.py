"""What gradient methods share on a deep backbone: one update, to which a method adds its penalty.

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

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jaximm import collectives
from jaximm.immunisers.base import ProbeParams
from jaximm.types import Batch, FeaturesFn, Head, Immuniser, PairedBatch, Params

FEATURES = "features"
"""Name of the last site: what a probe sees."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DeepProblem:
    """What a method works on when the backbone is any differentiable function.

    Keep one object for runs of one shape: compilations are shared by its identity.

    Attributes:
      features_fn: ``features_fn(params, inputs) -> [n, d]``; inputs are images, or the activations
        of a frozen prefix.
      width: d.
      classes: labels of the primary task, 0 .. classes - 1.
      harmful_classes: labels of the harmful task.
      optimiser: of parameters and head, any optax transformation; a schedule in it counts updates.
      label_smoothing: of the primary cross-entropy, in [0, 1).
      accumulate: micro-batches a step; the rows of a device's batch must divide by it.
      sites_fn: ``sites_fn(params, inputs) -> {"features": [n, d], site: [rows, width], ...}`` to
        regularise the inputs of several layers at once, penalties averaged by `site_weights`;
        None: the features alone.
      site_weights: by name of site; a site that is not named weighs 1.
    """

    features_fn: FeaturesFn
    width: int
    classes: int
    harmful_classes: int
    optimiser: optax.GradientTransformation
    label_smoothing: float = 0.1
    accumulate: int = 1
    sites_fn: Callable[[Params, Array], dict[str, Array]] | None = None
    site_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}.")
        for name in ("width", "classes", "harmful_classes", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}.")

    def sites(self, params: Params, inputs: Array) -> dict[str, Array]:
        """Every site's rows; the features are always among them."""
        if self.sites_fn is None:
            return {FEATURES: self.features_fn(params, inputs)}
        return self.sites_fn(params, inputs)


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


def init_head(width: int, classes: int, dtype: Any = jnp.float32) -> Head:
    """A head of zeros."""
    return Head(jnp.zeros((width, classes), dtype), jnp.zeros(classes, dtype))


def deep_immuniser(
    problem: DeepProblem,
    penalty: Penalty | None,
    *,
    init_memory: Callable[[ProbeParams], Any] = lambda params: None,
) -> Immuniser:
    """An immuniser from a penalty; None trains the primary task alone."""

    def init(params: ProbeParams, rng_key) -> State:
        del rng_key
        _check_params(params, problem)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes float32 schedules in
            opt_state = problem.optimiser.init(params)
        return State(params, opt_state, init_memory(params), jnp.zeros((), jnp.int32))

    def update(state: State, batch: PairedBatch, rng_key):
        del rng_key
        gradients, memory, info = _gradients(problem, penalty, state, batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = problem.optimiser.update(gradients, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        params = jax.tree.map(lambda new, old: new.astype(old.dtype), params, state.params)
        return State(params, opt_state, memory, state.step + 1), info

    return Immuniser(init, update, finish=lambda state: state.params)


def _gradients(problem: DeepProblem, penalty: Penalty | None, state: State, batch: PairedBatch):
    """Gradients of the objective over the global batch, the new memory, and what to log."""
    backbone, head = state.params
    harmful_rows = batch.harmful.x.shape[0] if penalty is not None else 0
    inputs = (
        jnp.concatenate([batch.primary.x, batch.harmful.x]) if harmful_rows else batch.primary.x
    )
    found, pull = _features(problem, backbone, inputs)
    n = batch.primary.x.shape[0]
    share = {name: rows.shape[0] // inputs.shape[0] for name, rows in found.items()}

    task, (slope, head_gradient) = jax.value_and_grad(
        lambda features, head: task_loss(features, head, batch.primary.y, problem),
        argnums=(0, 1),
        has_aux=True,
    )(found[FEATURES][:n], head)
    loss, accuracy = task
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


def _features(problem: DeepProblem, backbone: Params, inputs: Array):
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


def task_loss(
    features: Float[Array, "n d"], head: Head, labels: Int[Array, "n"], problem: DeepProblem
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Label-smoothed cross-entropy in nats, and accuracy, of the primary task."""
    logits = features @ head.kernel + head.bias[None, :]
    targets = jax.nn.one_hot(labels, problem.classes, dtype=logits.dtype)
    smooth = problem.label_smoothing
    targets = (1 - smooth) * targets + smooth / problem.classes
    loss = -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=1))
    hits = jnp.argmax(logits, axis=1).astype(labels.dtype) == labels
    return loss, jnp.mean(hits, dtype=logits.dtype)


def normalised(features: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Features over the root of their mean eigenvalue tr(X^T X / n) / min(n, d), held constant.

    Penalties that depend on scale then mean the same on every backbone, and their gradient still
    acts on the scale as the formula says.
    """
    n, d = features.shape
    mean_eigenvalue = lax.stop_gradient(jnp.sum(features**2)) / (n * min(n, d))
    return features / jnp.sqrt(jnp.maximum(mean_eigenvalue, jnp.finfo(features.dtype).tiny))


def _check_params(params: Any, problem: DeepProblem) -> None:
    head = getattr(params, "head", None)
    if not isinstance(params, ProbeParams) or not isinstance(head, Head):
        raise ValueError(
            "a deep problem starts from ProbeParams(backbone, Head(kernel, bias)), got "
            f"{type(params).__name__} with a head of type {type(head).__name__}."
        )
    chex.assert_shape(
        [head.kernel, head.bias],
        [(problem.width, problem.classes), (problem.classes,)],
        custom_message="the head's kernel must be [width, classes], its bias [classes]",
        exception_type=ValueError,
    )
