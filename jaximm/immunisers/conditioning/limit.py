"""The closed-form limit: the linear backbone with the largest RIR there is.

theta = K_P^{-1/2} Q diag(s), Q the eigenvectors of M = K_P^{-1/2} K_H K_P^{-1/2} in descending
order, s a geometric profile with kappa(H_P) = kappa(K_P)^t; then kappa(H_H) = kappa(M)
kappa(K_P)^t and log RIR = log kappa(M) + log kappa(K_P) - log kappa(K_H) for every t in [0, 1].

Derivation: h_max(H_H) <= m_max h_max(H_P) and h_min(H_H) >= m_min h_min(H_P) for every invertible
theta; this theta meets both with equality.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaximm import collectives, hessians, linalg
from jaximm.immunisers.about import GRADIENT_STEPS, WHITENING, About
from jaximm.immunisers.conditioning.whole_data import replaced
from jaximm.immunisers.problem import THETA, ProbeParams, Problem, check_run
from jaximm.linalg.arrays import as_square, exponent_of, times_power_of_two
from jaximm.types import Head, Immuniser


@dataclasses.dataclass(frozen=True, kw_only=True)
class LimitConfig:
    """Closed form: the backbone that attains the largest RIR any linear backbone can have.

    Attributes:
      t: where on the frontier, in [0, 1]: 0 makes the primary task perfectly conditioned, 1 leaves
        it as hard as it was and the harmful task as hard as that permits.
      damping: added to each K before the solve, in units of its mean eigenvalue tr(K) / d. The
        limit is attained on the footing with this damping; more of it generalises better.
      shrinkage: K <- (1 - shrinkage) K + shrinkage diag(K), in [0, 1), before the damping.
      rotate: follow theta by a rotation that makes H_H's diagonal constant, which costs nothing in
        kappa and leaves a diagonal preconditioner nothing to do.
      steps: batches in the one pass over the data that `update` makes.
      batch_size: rows of each task a batch; None: all, so that one step is the whole pass.
    """

    about: ClassVar = About(
        title="closed-form limit",
        source="jaximm: the generalised eigenproblem of (K_P, K_H), which bounds RIR",
        against=GRADIENT_STEPS,
        broken_by=WHITENING,
        traits=frozenset({"closed_form", "keeps_logits"}),
    )

    t: float = 0.0
    damping: float = 1e-3
    shrinkage: float = 0.0
    rotate: bool = True
    steps: int = 1
    batch_size: int | None = None

    def __post_init__(self):
        if not 0 <= self.t <= 1:
            raise ValueError(f"t must be in [0, 1], got {self.t}.")
        if not 0 < self.damping < math.inf:
            raise ValueError(
                f"damping must be finite and > 0, got {self.damping}; 1e-3 is the measure's."
            )
        if not 0 <= self.shrinkage < 1:
            raise ValueError(f"shrinkage must be in [0, 1), got {self.shrinkage}.")
        check_run(self.steps, self.batch_size)


class State(NamedTuple):
    """Running Gram matrices of both tasks and the number of batches seen."""

    params: ProbeParams
    primary: hessians.GramState
    harmful: hessians.GramState
    step: Int[Array, ""]


class Info(NamedTuple):
    """The primary loss before; of a head of zeros where targets are numbers."""

    task_loss: Float[Array, ""]


def limit(config: LimitConfig, problem: Problem) -> Immuniser:
    """Accumulates both Gram matrices in `update`, solves one eigenproblem in `finish`.

    Where targets are numbers, the Gram matrices are those of the rows, theta takes the place of the
    one there is, and the head is fitted to it. Where they are classes, they are those of the
    features: theta becomes a neck after the last stage (folded into a last linear map where there
    is one, `jaximm.models.fold_neck`), or is composed with the one there is, and its inverse goes
    into the head, so the primary logits stay what they were, but for rounding: with fewer rows
    than features and little damping that is much, and the flag `logits_moved` says how much.

    Raises:
      ValueError: numbers as targets and a backbone that is not linear.
    """
    problem.check_rows("limit")
    numbers = problem.classes is None

    def init(params: ProbeParams, rng_key) -> State:
        del rng_key
        width, dtype = problem.width, None
        if numbers:
            width, dtype = params.backbone[THETA].shape[0], params.backbone[THETA].dtype
        assert isinstance(width, int)  # of classes: the problem's, which its door asks for
        return State(
            params,
            hessians.gram_init(width, target_shape=() if numbers else None, dtype=dtype),
            hessians.gram_init(width, dtype=dtype),
            jnp.zeros((), jnp.int32),
        )

    finish = _finish_numbers if numbers else _finish_classes
    update = _update_numbers if numbers else _update_classes(problem)
    return Immuniser(init, update, finish=functools.partial(finish, config))


def _update_numbers(state: State, batch, rng_key):
    del rng_key
    primary = hessians.gram_update(_empty(state.primary), batch.primary.x, batch.primary.y)
    harmful = hessians.gram_update(_empty(state.harmful), batch.harmful.x)
    return _added(state, primary, harmful, jnp.mean(batch.primary.y**2) / 2)


def _update_classes(problem: Problem):
    task = problem.primary

    def update(state: State, batch, rng_key):
        del rng_key
        backbone, head = state.params
        features = problem.features_fn(backbone, batch.primary.x)
        primary = hessians.gram_update(_empty(state.primary), features)
        harmful = hessians.gram_update(
            _empty(state.harmful), problem.features_fn(backbone, batch.harmful.x)
        )
        loss = task.loss(task.outputs(features, head), batch.primary.y)
        return _added(state, primary, harmful, loss)

    return update


def _empty(gram: hessians.GramState) -> hessians.GramState:
    return jax.tree.map(jnp.zeros_like, gram)


def _added(state: State, primary, harmful, loss):
    """The state with one batch's sums over all devices, in one all-reduce.

    Every device has as many rows, so their number needs no message.
    """
    devices = collectives.device_count()
    counts = primary.count * devices, harmful.count * devices
    sums = primary._replace(count=None), harmful._replace(count=None), loss / devices
    primary, harmful, loss = collectives.sum_over_devices(sums)
    primary, harmful = primary._replace(count=counts[0]), harmful._replace(count=counts[1])
    state = state._replace(
        primary=hessians.gram_merge(state.primary, primary),
        harmful=hessians.gram_merge(state.harmful, harmful),
        step=state.step + 1,
    )
    return state, Info(loss)


def _grams(config: LimitConfig, state: State) -> tuple[Array, Array, Array | None]:
    """Theta of the Gram matrices that were accumulated, and the primary one with its cross term."""
    primary = hessians.gram_finalise(state.primary)
    harmful = hessians.gram_finalise(state.harmful)
    theta = _theta(
        primary.gram,
        harmful.gram,
        float(config.t),  # 0 and 0.0 are two programs
        config.damping,
        config.shrinkage,
        rotate=config.rotate,
    )
    return theta, primary.gram, primary.cross


def _finish_classes(config: LimitConfig, state: State) -> ProbeParams:
    return with_neck(state.params, _grams(config, state)[0])


def _finish_numbers(config: LimitConfig, state: State) -> ProbeParams:
    theta, gram, cross = _grams(config, state)
    head = _ridge_head(theta, gram, cross, config.damping, config.shrinkage)
    return replaced(state.params._replace(head=head), theta)


@jax.jit
def _ridge_head(theta, gram, cross, damping, shrinkage):
    """The head that theta's own features call for, under the same damping."""
    regularised = _regularised(gram, damping, shrinkage)
    return jnp.linalg.solve(theta, jnp.linalg.solve(regularised, cross))


@functools.partial(jax.jit, static_argnames="rotate")
def _theta(gram_primary, gram_harmful, t, damping, shrinkage, *, rotate):
    return limit_theta(
        gram_primary, gram_harmful, t=t, damping=damping, shrinkage=shrinkage, rotate=rotate
    )


def with_neck(params: ProbeParams, theta: Float[Array, "d d"]) -> ProbeParams:
    """A backbone with theta after its features, and theta's inverse in the head.

    ``(f theta) (theta^{-1} W) = f W``: logits stay what they were. An earlier neck is composed with
    theta. The products are taken in theta's dtype and cast to the parameters'.
    """
    kernel = jnp.linalg.solve(theta, params.head.kernel.astype(theta.dtype))
    head = Head(kernel.astype(params.head.kernel.dtype), params.head.bias)
    neck, dtype = theta, params.head.kernel.dtype
    backbone = dict(params.backbone)
    if "neck.kernel" in backbone:
        neck = jnp.matmul(backbone["neck.kernel"].astype(theta.dtype), theta, precision="highest")
    if "neck.bias" in backbone:
        bias = backbone["neck.bias"].astype(theta.dtype)
        backbone["neck.bias"] = jnp.matmul(bias, theta, precision="highest").astype(dtype)
    return ProbeParams({**backbone, "neck.kernel": neck.astype(dtype)}, head)


def limit_theta(
    gram_primary: Float[Array, "d d"],
    gram_harmful: Float[Array, "d d"],
    *,
    t: float | Float[Array, ""] = 0.0,
    damping: float | Float[Array, ""] = 1e-3,
    shrinkage: float | Float[Array, ""] = 0.0,
    rotate: bool = True,
) -> Float[Array, "d d"]:
    r"""The limit backbone of two Gram matrices, scaled so that tr H_P = tr K_P.

    Args:
      gram_primary: K_P = X_P^T X_P / n, without damping, any float dtype.
      gram_harmful: K_H. The scale of neither matters.
      t: frontier position in [0, 1]; may be traced.
      damping: relative, > 0; lam = damping * tr(K) / d for each K.
      shrinkage: of the off-diagonal entries, in [0, 1).
      rotate: see `LimitConfig`.

    Returns:
      theta [d, d]: features are x @ theta; float32 for half precision. One Cholesky, one eigh, and
      with `rotate` d - 1 Givens rotations.

    Raises:
      ValueError: if a matrix is not square, or the shapes or dtypes differ.
    """
    gram_primary, gram_harmful = (
        times_power_of_two(gram, -exponent_of(gram))
        for gram in (as_square(gram_primary), as_square(gram_harmful))
    )
    damped_primary = _regularised(gram_primary, damping, shrinkage)
    damped_harmful = _regularised(gram_harmful, damping, shrinkage)
    values = jnp.linalg.eigvalsh(damped_primary)
    pencil = linalg.pencil(damped_primary, damped_harmful)
    log_kappa = jnp.log(values[-1]) - jnp.log(values[0])
    theta = linalg.limit_backbone(pencil, log_kappa_primary=log_kappa, t=t)
    if rotate:
        theta = theta @ linalg.constant_diagonal_rotation(theta.T @ (damped_harmful @ theta))
    energy = jnp.sum(theta * (damped_primary @ theta))  # tr(theta^T K theta)
    return theta * jnp.sqrt(jnp.trace(damped_primary) / energy)


def _regularised(gram, damping, shrinkage):
    d = gram.shape[0]
    diagonal = jnp.diagonal(gram)
    shrunk = gram * (1 - shrinkage) + jnp.diag(shrinkage * diagonal)
    return shrunk + damping * jnp.mean(diagonal) * jnp.eye(d, dtype=gram.dtype)


class LimitChoice(NamedTuple):
    """One cell of the grid that `choose_limit` looked at, with what its measure returned."""

    config: LimitConfig
    log_rir: float
    quality: float
    log_ratio_primary: float


def choose_limit(
    measure: Callable[[LimitConfig], tuple[float, float, float]],
    *,
    quality_before: float,
    tolerance: float = 0.02,
    dampings: Sequence[float] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 0.3, 1.0, 3.0, 10.0),
    ts: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    shrinkages: Sequence[float] = (0.0, 0.1),
) -> tuple[LimitConfig, list[LimitChoice]]:
    """The cell with the largest log RIR on unseen rows that keeps the primary task's quality.

    Args:
      measure: gives (log RIR, primary quality, log (ii)) of a config on rows that it was not
        fitted to; those rows are then no longer fit to report on.
      quality_before: the primary quality of raw features on the same rows.
      tolerance: how much of it may be lost.
      dampings: relative dampings to try.
      ts: frontier positions to try.
      shrinkages: off-diagonal shrinkages to try.

    Returns:
      The chosen config, and every cell. If no cell keeps the quality, the one that keeps most;
      a cell whose log RIR or quality is NaN is never chosen.

    Raises:
      ValueError: an empty grid, or NaN in every cell.
    """
    cells = []
    for damping, shrinkage, t in itertools.product(dampings, shrinkages, ts):
        config = LimitConfig(t=t, damping=damping, shrinkage=shrinkage)
        cells.append(LimitChoice(config, *measure(config)))
    measured = [
        cell for cell in cells if not (math.isnan(cell.log_rir) or math.isnan(cell.quality))
    ]
    if not measured:
        raise ValueError(
            f"choose_limit needs a cell with a log RIR and a quality, got none in {len(cells)} "
            "cells; give dampings, ts and shrinkages, and a measure that is not NaN."
        )
    kept = [cell for cell in measured if cell.quality >= quality_before - tolerance]
    if kept:
        best = max(kept, key=lambda cell: cell.log_rir)
    else:
        best = max(measured, key=lambda cell: cell.quality)
    return best.config, cells
