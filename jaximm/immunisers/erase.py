r"""Exact linear erasure of the harmful label: what remains tells a linear probe nothing.

Condition numbers slow an attacker whose steps see them; whitening, ridge or L-BFGS solve a linear
probe whatever they are. Against those only absence of information helps. From streamed moments of
features x and harmful labels z this makes the affine map r(x) = x A + b of least cost after which,
on the fitted rows, no linear probe of z beats the constant one (`jaximm.linalg.linear_eraser`;
Belrose et al. 2023, https://arxiv.org/abs/2306.03819, is ``metric="harmful"``).

What is emitted is y = x P + p, with rank(Cov(x, z)) features literally zero, and r(x) = y A + c is
left to what reads it: rounded to float32, x A itself would still hold the label (`jaximm.linalg`,
module `erasure`). A linear backbone theta becomes theta P, P that of its features, without
centring, since its probes have no intercept. A deep one gets y as a neck after its features,
centred, labels one-hot. What linear erasure does not do: stop a probe that is not linear, or one
that trains the layers below; those attacks belong in the report.

The head. With D = I - A, logits f W + c lose f D W. On r(x) the head that makes up for it best on
the primary rows is W' = W + (A^T Sigma A)^{-1} A^T Sigma D W, Sigma the primary covariance, with an
intercept that keeps the mean logits; on y it is A W'. With ``metric="primary"`` and no damping
A^T Sigma D = 0 and W' = W.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaximm import collectives, linalg
from jaximm.immunisers.about import About
from jaximm.immunisers.conditioning.whole_data import replaced
from jaximm.immunisers.problem import THETA, ProbeParams, Problem, check_run
from jaximm.linalg import erasure
from jaximm.types import Head, Immuniser, PairedBatch

METRICS = ("primary", "harmful")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EraseConfig:
    """Closed form: the affine map of least cost that leaves no linear trace of the harmful label.

    Attributes:
      metric: the task whose rows change least (mean square). "primary" costs the primary task
        least; "harmful" is the published method, and can cost the primary task any amount.
      damping: >= 0; added to that task's covariance in units of its features' mean squares.
        Erasure is exact with any; more of it keeps A nearer to an orthogonal projection where the
        task has few rows or little variance.
      centred: remove the covariance with the label (True: probes with an intercept) or the raw
        second moment (False: probes without); None: False where targets are numbers, else True.
      head_damping: ridge of the refitted head, > 0, in units of the mean eigenvalue of the primary
        features' second moment.
      steps: batches in the one pass over the data that `update` makes.
      batch_size: rows of each task a batch; None: all, so that one step is the whole pass.
    """

    about: ClassVar = About(
        title="linear erasure",
        source="Belrose et al. (2023), https://arxiv.org/abs/2306.03819",
        against="every linear head on the frozen features, whatever its optimiser",
        broken_by="one that is not linear, nor against training the weights",
        traits=frozenset({"closed_form"}),
    )

    metric: Literal["primary", "harmful"] = "primary"
    damping: float = 1e-3
    centred: bool | None = None
    head_damping: float = 1e-3
    steps: int = 1
    batch_size: int | None = None

    def __post_init__(self):
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {METRICS}, got {self.metric!r}.")
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"damping must be finite and >= 0, got {self.damping}.")
        if not 0 < self.head_damping < math.inf:
            raise ValueError(f"head_damping must be finite and > 0, got {self.head_damping}.")
        check_run(self.steps, self.batch_size)


class State(NamedTuple):
    """Running centred moments of both tasks, harmful with labels, and the batches seen."""

    params: ProbeParams
    primary: linalg.LabelMoments
    harmful: linalg.LabelMoments
    step: Int[Array, ""]


class Info(NamedTuple):
    """Primary loss before erasure; of a head of zeros where targets are numbers."""

    task_loss: Float[Array, ""]


class Report(NamedTuple):
    """What an erasure removed and what it cost, on the rows it was fitted to.

    `cost_primary`, `cost_harmful`: E |r(x) - x|^2 over the variance of x, of each task, x the
    features before it.
    """

    rank: Int[Array, ""]
    tolerance: Float[Array, ""]
    cost_primary: Float[Array, ""]
    cost_harmful: Float[Array, ""]


def erase(config: EraseConfig, problem: Problem) -> Immuniser:
    """Accumulates the moments of both tasks in `update`, solves in `finish`.

    `update` costs one all-reduce over devices. Where targets are numbers the moments are those of
    the raw rows and the labels y [n]; where they are classes, of the features, labels one-hot.

    Raises:
      ValueError: numbers as targets and a backbone that is not linear.
    """
    problem.check_rows("erase")
    numbers = problem.classes is None

    def init(params: ProbeParams, rng_key) -> State:
        del rng_key
        if numbers:
            theta = params.backbone[THETA]
            return _empty_state(params, theta.shape[0], theta.dtype, 1, 1)
        dtype = jnp.zeros(()).dtype  # float64 where x64 is on
        return _empty_state(params, problem.width, dtype, None, problem.harmful_classes)

    update = _update_numbers if numbers else _update_classes(problem)
    finish = _finish_numbers if numbers else _finish_classes
    return Immuniser(init, update, finish=functools.partial(finish, config))


def _update_numbers(state: State, batch: PairedBatch, rng_key):
    del rng_key
    primary, harmful = batch
    loss = jnp.mean(primary.y**2) / 2
    return _added(state, primary.x, primary.y[:, None], harmful.x, harmful.y[:, None], loss)


def _update_classes(problem: Problem):
    task = problem.primary

    def update(state: State, batch: PairedBatch, rng_key):
        del rng_key
        backbone, head = state.params
        primary = problem.features_fn(backbone, batch.primary.x)
        harmful = problem.features_fn(backbone, batch.harmful.x)
        loss = task.loss(task.outputs(primary, head), batch.primary.y)
        assert problem.harmful_classes is not None  # labels are classes here
        labels = jax.nn.one_hot(
            batch.harmful.y, problem.harmful_classes, dtype=state.harmful.covariance.dtype
        )
        return _added(state, primary, None, harmful, labels, loss)

    return update


def _empty_state(params, width, dtype, primary_labels, harmful_labels) -> State:
    return State(
        params,
        erasure.empty_moments(width, primary_labels, dtype),
        erasure.empty_moments(width, harmful_labels, dtype),
        jnp.zeros((), jnp.int32),
    )


def _added(state: State, primary_x, primary_y, harmful_x, harmful_y, loss):
    """The state with the rows of all devices added, in one all-reduce."""
    dtype = state.primary.covariance.dtype
    primary = _of_batch(state.primary, primary_x, primary_y)
    harmful = _of_batch(state.harmful, harmful_x, harmful_y)
    total = loss
    if collectives.is_bound():
        # The loss of a float32 backbone travels in the dtype of the sums: the message is one.
        share = (loss / collectives.device_count()).astype(dtype)
        sums = collectives.sum_over_devices((_shares(primary), _shares(harmful), share))
        primary, harmful = _rejoined(primary, sums[0]), _rejoined(harmful, sums[1])
        total = sums[2].astype(loss.dtype)
    state = state._replace(
        primary=linalg.merge_moments(state.primary, primary),
        harmful=linalg.merge_moments(state.harmful, harmful),
        step=state.step + 1,
    )
    return state, Info(total)


def _of_batch(like: linalg.LabelMoments, rows, labels) -> linalg.LabelMoments:
    """Moments of this device's rows, keeping what `like` keeps in its dtype."""
    if not rows.shape[0]:
        return jax.tree.map(jnp.zeros_like, like)
    dtype = like.covariance.dtype
    rows = rows.astype(dtype)
    labels = None if labels is None else labels.astype(dtype)
    if not collectives.is_bound():
        return linalg.label_moments(rows, labels)
    # Units of its own would need a message of their own.
    units = jnp.zeros_like(like.exponents)
    label_units = None
    if labels is not None:
        assert like.label_exponents is not None  # moments with labels have their units
        label_units = jnp.zeros_like(like.label_exponents)
    return erasure.moments_in_units(rows, labels, units, label_units)


def _shares(moments: linalg.LabelMoments) -> dict[str, Array]:
    """What a device sends: a part of the mean products, and its own means in its own slot."""
    devices = collectives.device_count()

    def slot(vector):
        slots = jnp.zeros((devices, *vector.shape), vector.dtype)
        return slots.at[lax.axis_index(collectives.AXIS)].set(vector)

    sent = moments._asdict()
    products = ("covariance", "label_variance", "cross_covariance")
    means = ("origin", "offset", "label_origin", "label_offset")
    sent = {name: sent[name] for name in products + means if sent[name] is not None}
    return {name: slot(array) if name in means else array / devices for name, array in sent.items()}


def _rejoined(mine: linalg.LabelMoments, sums: dict[str, Array]) -> linalg.LabelMoments:
    """Moments of the rows of all devices, which have as many each, from the sums of `_shares`."""
    devices = collectives.device_count()

    def joined(origins, offsets):
        offsets = offsets + (origins - origins[:1])
        offset = jnp.mean(offsets, axis=0)
        return origins[0], offset, offsets - offset[None, :]

    origin, offset, delta = joined(sums["origin"], sums["offset"])
    moments = mine._replace(
        count=mine.count * devices,
        origin=origin,
        offset=offset,
        covariance=sums["covariance"] + _dot(delta.T, delta) / devices,
    )
    if mine.label_origin is None:
        return moments
    origin, offset, label_delta = joined(sums["label_origin"], sums["label_offset"])
    return moments._replace(
        label_origin=origin,
        label_offset=offset,
        label_variance=sums["label_variance"] + jnp.mean(label_delta**2, axis=0),
        cross_covariance=sums["cross_covariance"] + _dot(delta.T, label_delta) / devices,
    )


def state_eraser(config: EraseConfig, state: State) -> linalg.Eraser:
    """The map that the rows seen so far call for, of the features that the backbone gives now."""
    centred = not _has_numbers(state) if config.centred is None else config.centred
    primary, harmful = _features_moments(state)
    # Features are multiplied in the parameters' dtype, which may be less than the moments'.
    emitted = jax.tree.leaves(state.params.head)[0].dtype
    return _eraser(
        primary, harmful, config.damping, metric=config.metric, centred=centred, emitted=emitted
    )


def _has_numbers(state: State) -> bool:
    """Whether the targets are numbers: then the primary moments have labels, for its head."""
    return state.primary.label_origin is not None


def _features_moments(state: State) -> tuple[linalg.LabelMoments, linalg.LabelMoments]:
    """Both tasks' moments of features; where targets are numbers they were taken of the rows."""
    if not _has_numbers(state):
        return state.primary, state.harmful
    theta = state.params.backbone[THETA]
    primary, harmful = (
        erasure.moments_through(moments, theta) for moments in (state.primary, state.harmful)
    )
    return primary, harmful


def erasure_report(config: EraseConfig, state: State) -> Report:
    """Rank and cost of `state_eraser`, for the record of a run."""
    eraser = state_eraser(config, state)
    cost_primary, cost_harmful = (
        linalg.erasure_cost(eraser, moments) for moments in _features_moments(state)
    )
    return Report(eraser.rank, eraser.tolerance, cost_primary, cost_harmful)


@functools.partial(jax.jit, static_argnames=("metric", "centred", "emitted"))
def _eraser(primary, harmful, damping, *, metric: str, centred: bool, emitted) -> linalg.Eraser:
    return linalg.linear_eraser(
        harmful,
        metric=primary if metric == "primary" else None,
        centred=centred,
        damping=damping,
        emitted=emitted,
    )


def _finish_numbers(config: EraseConfig, state: State) -> ProbeParams:
    theta, head = _theta_and_head(
        state.params.backbone[THETA],
        state_eraser(config, state).matrix,
        state.primary,
        config.head_damping,
    )
    return replaced(state.params._replace(head=head), theta)


@jax.jit
def _theta_and_head(theta, matrix, moments, head_damping):
    theta = _dot(theta, matrix)
    gram = moments.gram
    d = gram.shape[0]
    damped = gram + head_damping * jnp.mean(jnp.diagonal(gram)) * jnp.eye(d, dtype=gram.dtype)
    # The same ridge on the raw inputs' weights theta w that `limit` uses; theta has no inverse.
    hessian = theta.T @ _dot(damped, theta)
    values, vectors = jnp.linalg.eigh((hessian + hessian.T) / 2)
    kept = values > d * jnp.finfo(values.dtype).eps * values[-1]
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    head = vectors @ (inverse * (vectors.T @ (theta.T @ moments.cross[:, 0])))
    return theta, head


def _finish_classes(config: EraseConfig, state: State) -> ProbeParams:
    return erase_features(
        state.params,
        state_eraser(config, state),
        state.primary,
        head_damping=config.head_damping,
    )


def erase_features(
    params: ProbeParams,
    eraser: linalg.Eraser,
    primary: linalg.Moments,
    *,
    head_damping: float = 1e-3,
) -> ProbeParams:
    """A deep backbone with an eraser after its features, and the head that makes up for it best.

    Args:
      params: backbone, a flat dict, and `Head`. A neck that is there already is composed with.
      eraser: of the features that backbone gives now.
      primary: moments of the primary features, `jaximm.linalg.LabelMoments` or raw means.
      head_damping: see `EraseConfig`.

    Returns:
      The backbone with ``neck.kernel`` [d_in, d] and ``neck.bias`` [d], zero at the removed
      features, other arrays untouched, and the head, in the head's dtype; products are taken in
      the eraser's. Mean primary logits are unchanged.
    """
    dtype, wide = params.head.kernel.dtype, eraser.matrix.dtype
    kernel, bias = eraser.matrix, eraser.bias
    backbone = dict(params.backbone)
    if "neck.bias" in backbone:
        bias = bias + _dot(backbone["neck.bias"].astype(wide), eraser.matrix)
    if "neck.kernel" in backbone:
        kernel = _dot(backbone["neck.kernel"].astype(wide), eraser.matrix)
    neck = {"neck.kernel": kernel.astype(dtype), "neck.bias": bias.astype(dtype)}
    head = _head(
        Head(*(leaf.astype(wide) for leaf in params.head)),
        eraser,
        primary.gram,
        _covariance(primary),
        primary.feature_mean,
        head_damping,
    )
    return ProbeParams({**backbone, **neck}, Head(*(leaf.astype(dtype) for leaf in head)))


def _covariance(moments: linalg.Moments) -> Float[Array, "d d"]:
    """Of centred moments without the cancellation that raw ones suffer."""
    if isinstance(moments, linalg.LabelMoments):
        zeros = jnp.zeros_like(moments.origin)
        return moments._replace(origin=zeros, offset=zeros).gram
    return moments.gram - jnp.outer(moments.feature_mean, moments.feature_mean)


@jax.jit
def _head(head: Head, eraser: linalg.Eraser, gram, covariance, mean, head_damping) -> Head:
    d = gram.shape[0]
    eye = jnp.eye(d, dtype=gram.dtype)
    kept = _dot(eraser.lift.T, covariance)  # A^T Sigma
    ridge = head_damping * jnp.trace(gram) / d
    lost = _dot(kept, _dot(eye - eraser.lift, head.kernel))
    best = head.kernel + jnp.linalg.solve(_dot(kept, eraser.lift) + ridge * eye, lost)
    kernel = jnp.where(eraser.removed[:, None], 0, _dot(eraser.lift, best))
    new_mean = _dot(mean, eraser.matrix) + eraser.bias
    return Head(kernel, head.bias + _dot(mean, head.kernel) - _dot(new_mean, kernel))


def _dot(a, b):
    return jnp.matmul(a, b, precision="highest")
