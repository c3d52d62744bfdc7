r"""Exact linear erasure of the harmful label: what remains tells a linear probe nothing.

Condition numbers slow an attacker whose steps see them; whitening, ridge or L-BFGS solve a linear
probe whatever they are. Against those only absence of information helps. From streamed moments of
features x and harmful labels z this makes the affine map r(x) = x A + b of least cost after which,
on the fitted rows, no linear probe of z beats the constant one (`jaximm.linalg.linear_eraser`;
Belrose et al. 2023, https://arxiv.org/abs/2306.03819, is ``metric="harmful"``).

A linear backbone becomes A theta, without centring, since its probes have no intercept. A deep one
gets r as a neck after its features, centred, labels one-hot. What linear erasure does not do: stop
a probe that is not linear, or one that trains the layers below; those attacks belong in the report.

The head. With D = I - A, logits f W + c lose f D W. The head that makes up for it best on the
primary rows is W + (A^T Sigma A)^{-1} A^T Sigma D W, Sigma the primary covariance, and an intercept
that keeps the mean logits. With ``metric="primary"`` and no damping A^T Sigma D = 0: the head keeps
its kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaximm import collectives, hessians, linalg
from jaximm.immunisers.base import ProbeParams, Problem, check_run, linear_features
from jaximm.immunisers.deep import DeepProblem, Head, task_loss
from jaximm.types import Immuniser, PairedBatch

SOURCE = "Belrose et al. (2023), https://arxiv.org/abs/2306.03819"
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
        second moment (False: probes without); None: False on a linear backbone, else True.
      head_damping: ridge of the refitted head, > 0, in units of the mean eigenvalue of the primary
        features' second moment.
      steps: batches in the one pass over the data that `update` makes.
      batch_size: rows of each task a batch; None: all, so that one step is the whole pass.
    """

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
    """Running moments of both tasks (harmful with labels) and the number of batches seen."""

    params: ProbeParams
    primary: hessians.GramState
    harmful: hessians.GramState
    step: Int[Array, ""]


class Info(NamedTuple):
    """Primary loss of the parameters before erasure; of a head of zeros on a linear backbone."""

    task_loss: Float[Array, ""]


class Report(NamedTuple):
    """What an erasure removed and what it cost, on the rows it was fitted to.

    `cost_primary`, `cost_harmful`: E |r(x) - x|^2 over the variance of x, of each task.
    """

    rank: Int[Array, ""]
    tolerance: Float[Array, ""]
    cost_primary: Float[Array, ""]
    cost_harmful: Float[Array, ""]


def erase(config: EraseConfig, problem: Problem | DeepProblem) -> Immuniser:
    """Accumulates the moments of both tasks in `update`, solves in `finish`.

    `update` costs one all-reduce over devices. On a linear backbone the moments are those of the
    raw inputs and the labels y [n] are numbers; on a deep one, of its features, labels one-hot.

    Raises:
      ValueError: if a linear problem's backbone is not linear.
    """
    if isinstance(problem, DeepProblem):
        return _deep(config, problem)
    if problem.factors is None and problem.features_fn is not linear_features:
        raise ValueError(
            "erase needs a linear backbone, got a problem without factors whose features_fn is "
            "not linear_features; use jaximm.immunisers.linear_problem, or a DeepProblem."
        )

    def init(params: ProbeParams, rng_key) -> State:
        del rng_key
        width, dtype = params.backbone.shape[0], params.backbone.dtype
        return _empty_state(params, width, dtype, primary_targets=(), harmful_targets=())

    return Immuniser(init, _update_linear, finish=functools.partial(_finish_linear, config))


def _update_linear(state: State, batch: PairedBatch, rng_key):
    del rng_key
    return _added(state, *batch.primary, *batch.harmful, jnp.mean(batch.primary.y**2) / 2)


def _deep(config: EraseConfig, problem: DeepProblem) -> Immuniser:
    def init(params: ProbeParams, rng_key) -> State:
        del rng_key
        targets = (problem.harmful_classes,)
        return _empty_state(params, problem.width, None, None, targets)

    return Immuniser(init, _update_deep(problem), finish=functools.partial(_finish_deep, config))


@functools.lru_cache(maxsize=64)
def _update_deep(problem: DeepProblem):
    """One function object a problem, so that runs of several configs share its compilation."""

    def update(state: State, batch: PairedBatch, rng_key):
        del rng_key
        backbone, head = state.params
        primary = problem.features_fn(backbone, batch.primary.x)
        harmful = problem.features_fn(backbone, batch.harmful.x)
        loss, _ = task_loss(primary, head, batch.primary.y, problem)
        labels = jax.nn.one_hot(
            batch.harmful.y, problem.harmful_classes, dtype=state.harmful.gram.dtype
        )
        return _added(state, primary, None, harmful, labels, loss)

    return update


def _empty_state(params, width, dtype, primary_targets, harmful_targets) -> State:
    return State(
        params,
        hessians.gram_init(width, target_shape=primary_targets, dtype=dtype),
        hessians.gram_init(width, target_shape=harmful_targets, dtype=dtype),
        jnp.zeros((), jnp.int32),
    )


def _added(state: State, primary_x, primary_y, harmful_x, harmful_y, loss):
    """The state with the rows of all devices added, in one all-reduce.

    Every device has as many rows, so their number needs no message.
    """
    empty = jax.tree.map(jnp.zeros_like, state)
    primary = hessians.gram_update(empty.primary, primary_x, primary_y)
    harmful = hessians.gram_update(empty.harmful, harmful_x, harmful_y)
    devices = collectives.device_count()
    counts = primary.count * devices, harmful.count * devices
    # The loss of a float32 backbone travels in the dtype of the sums, so that the message is one.
    share = (loss / devices).astype(primary.gram.dtype)
    sums = primary._replace(count=None), harmful._replace(count=None), share
    primary, harmful, total = collectives.sum_over_devices(sums)
    state = state._replace(
        primary=hessians.gram_merge(state.primary, primary._replace(count=counts[0])),
        harmful=hessians.gram_merge(state.harmful, harmful._replace(count=counts[1])),
        step=state.step + 1,
    )
    return state, Info(total.astype(loss.dtype))


def state_eraser(config: EraseConfig, state: State) -> linalg.Eraser:
    """The map that the rows seen so far call for."""
    deep = isinstance(state.params.head, Head)
    centred = deep if config.centred is None else config.centred
    return _eraser(
        hessians.gram_finalise(state.primary),
        hessians.gram_finalise(state.harmful),
        config.damping,
        metric=config.metric,
        centred=centred,
    )


def erasure_report(config: EraseConfig, state: State) -> Report:
    """Rank and cost of `state_eraser`, for the record of a run."""
    eraser = state_eraser(config, state)
    cost_primary, cost_harmful = (
        linalg.erasure_cost(eraser, hessians.gram_finalise(moments))
        for moments in (state.primary, state.harmful)
    )
    return Report(eraser.rank, eraser.tolerance, cost_primary, cost_harmful)


@functools.partial(jax.jit, static_argnames=("metric", "centred"))
def _eraser(primary, harmful, damping, *, metric: str, centred: bool) -> linalg.Eraser:
    return linalg.linear_eraser(
        harmful,
        metric=primary if metric == "primary" else None,
        centred=centred,
        damping=damping,
    )


def _finish_linear(config: EraseConfig, state: State) -> ProbeParams:
    primary = hessians.gram_finalise(state.primary)
    assert primary.cross is not None
    return _linear_params(
        state.params.backbone,
        state_eraser(config, state).matrix,
        primary.gram,
        primary.cross,
        config.head_damping,
    )


@jax.jit
def _linear_params(backbone, matrix, gram, cross, head_damping) -> ProbeParams:
    theta = jnp.matmul(matrix, backbone, precision="highest")
    d = gram.shape[0]
    damped = gram + head_damping * jnp.mean(jnp.diagonal(gram)) * jnp.eye(d, dtype=gram.dtype)
    # The same ridge on the raw inputs' weights theta w that `limit` uses; theta has no inverse.
    hessian = theta.T @ jnp.matmul(damped, theta, precision="highest")
    values, vectors = jnp.linalg.eigh((hessian + hessian.T) / 2)
    kept = values > d * jnp.finfo(values.dtype).eps * values[-1]
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    head = vectors @ (inverse * (vectors.T @ (theta.T @ cross)))
    return ProbeParams(theta, head)


def _finish_deep(config: EraseConfig, state: State) -> ProbeParams:
    return erase_features(
        state.params,
        state_eraser(config, state),
        hessians.gram_finalise(state.primary),
        head_damping=config.head_damping,
    )


def erase_features(
    params: ProbeParams,
    eraser: linalg.Eraser,
    primary: Any,
    *,
    head_damping: float = 1e-3,
) -> ProbeParams:
    """A deep backbone with an eraser after its features, and the head that makes up for it best.

    Args:
      params: backbone, a flat dict, and `Head`. A neck that is there already is composed with.
      eraser: of the features that backbone gives now.
      primary: moments (`jaximm.hessians.GramMoments`, mean convention) of the primary features.
      head_damping: see `EraseConfig`.

    Returns:
      The backbone with ``neck.kernel`` [d_in, d] and ``neck.bias`` [d], other arrays untouched, in
      the head's dtype; products are taken in the eraser's. Mean primary logits are unchanged.
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
        primary.feature_mean,
        head_damping,
    )
    return ProbeParams({**backbone, **neck}, Head(*(leaf.astype(dtype) for leaf in head)))


@jax.jit
def _head(head: Head, eraser: linalg.Eraser, gram, mean, head_damping) -> Head:
    d = gram.shape[0]
    eye = jnp.eye(d, dtype=gram.dtype)
    covariance = gram - jnp.outer(mean, mean)
    kept = _dot(eraser.matrix.T, covariance)  # A^T Sigma
    ridge = head_damping * jnp.trace(gram) / d
    lost = _dot(kept, _dot(eye - eraser.matrix, head.kernel))
    kernel = head.kernel + jnp.linalg.solve(_dot(kept, eraser.matrix) + ridge * eye, lost)
    new_mean = _dot(mean, eraser.matrix) + eraser.bias
    return Head(kernel, head.bias + _dot(mean, head.kernel) - _dot(new_mean, kernel))


def _dot(a, b):
    return jnp.matmul(a, b, precision="highest")
