r"""The inverse-covariance preconditioner of a linear backbone.

For features X theta, theta [d_in, d], with H = theta^T K theta and a symmetric G = dR/dH, the
gradient of R(H) in theta is ``2 K theta G``. Multiplied from the left by ``K^{-1}`` the step
becomes ``theta <- theta (I - 2 eta G)``, under which every eigenvalue of H moves on its own: what
makes the statements behind `jaximm.regularisers.well_step_bound` and ``ill_step_bound`` exact for a
finite step. A layer that stores ``W = theta^T`` [d, d_in] (out x in) has the gradient
``2 G W K``, and there the inverse stands on the right.

Each task's regulariser takes its own task's covariance, the task loss takes none; so transform the
gradients term by term, before they are added. With damping, K + damping I stands in the place of K
throughout, in H as well.

The factorisation is made once, in ``init``: a Cholesky factor of K + damping I [d_in, d_in], or for
n < d_in rows, by Woodbury's identity, one of an [n, n] matrix:

    (X^T X / n + lam I)^{-1} g = ( g - X^T (X X^T + n lam I)^{-1} X g ) / lam.

The difference cancels: the relative error of the part of the result in the row space is about
``eps * s_1 / lam``.

Source: Zheng et al. (2025), https://arxiv.org/abs/2505.23760, algorithm 1 and theorem 4.3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from jaximm.linalg.arrays import as_float, as_matrix, as_square, exponent_of, times_power_of_two

SIDES = ("left", "right")
"""``"left"``: parameters theta [d_in, d]. ``"right"``: W = theta^T [d, d_in]."""


class InverseCovarianceState(NamedTuple):
    """The factored covariance. Constant: ``update`` returns it as it came.

    ``rows`` is None where the factor is that of the covariance itself. Otherwise they and the
    factor are in a unit of their own, a power of two, which Woodbury's identity does not see.
    """

    factor: Float[Array, "m m"]  # lower Cholesky factor; m = d_in, or n with rows
    rows: Float[Array, "n d_in"] | None
    damping: Float[Array, ""]
    positive_definite: Bool[Array, ""]  # False: the factor is NaN, and so is every update


def _check_damping(damping) -> None:
    if jnp.ndim(damping) != 0:
        raise ValueError(f"damping must be one number, got shape {jnp.shape(damping)}.")
    if not isinstance(damping, Tracer) and not 0 <= damping < math.inf:
        raise ValueError(f"damping must be finite and >= 0, got {damping}.")


def _factor(matrix: Array, damping: Array) -> tuple[Array, Bool[Array, ""]]:
    """Cholesky factor of `matrix` + damping I, about one in size, and whether that went well."""
    damped = matrix + damping * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    factor = jnp.linalg.cholesky(damped)  # symmetrises; NaN where not positive definite
    finite = jnp.all(jnp.isfinite(factor))
    # The squared pivot is a difference with an error of (m + 1) eps / 2 of the diagonal (Higham
    # 2002, theorem 10.3): at that level a singular matrix may have happened to round upwards.
    rounding = float(jnp.finfo(matrix.dtype).eps) * (matrix.shape[0] + 1) / 2
    floor = jnp.sqrt(rounding * jnp.max(jnp.diag(damped)))
    return factor, finite & jnp.all(jnp.diag(factor) > floor)


def factor_covariance(
    covariance: Float[Array, "d_in d_in"], *, damping: float | Float[Array, ""] = 0.0
) -> InverseCovarianceState:
    """Cholesky factor of ``covariance + damping I``, at O(d_in^3).

    Args:
      covariance: symmetric positive semi-definite K [d_in, d_in], any float dtype (half: float32).
      damping: lam >= 0, in the units of ``covariance``. A singular K needs it.

    Returns:
      A state whose ``positive_definite`` is False if a pivot of the factor is NaN or at the level
      of rounding, ``sqrt((d_in + 1) eps / 2 max K_ii)``: what it gives is then NaN or noise, so
      look at it.

    Raises:
      ValueError: not a non-empty square matrix, not of a float dtype, or negative damping.
    """
    covariance = as_square(covariance, name="covariance")
    _check_damping(damping)
    damping = jnp.asarray(damping, covariance.dtype)
    # Of K / 4^h: the factor is then 2^h times too small, and back in its own unit it fits.
    half = exponent_of(jnp.maximum(jnp.max(jnp.abs(covariance)), damping)) // 2
    in_unit = times_power_of_two(covariance, -2 * half)
    factor, positive = _factor(in_unit, times_power_of_two(damping, -2 * half))
    return InverseCovarianceState(times_power_of_two(factor, half), None, damping, positive)


def factor_rows(
    rows: Float[Array, "n d_in"], *, damping: float | Float[Array, ""] = 0.0
) -> InverseCovarianceState:
    """Factor of ``rows^T rows / n + damping I``, from the smaller side.

    With n < d_in it is that of the [n, n] matrix of Woodbury's identity, at O(n^2 d_in), and needs
    damping; otherwise `factor_covariance` of the [d_in, d_in] matrix.

    Args:
      rows: X [n, d_in], any float dtype (half: computed in float32).
      damping: lam, in units of the mean-convention covariance; > 0 with n < d_in.

    Returns:
      As `factor_covariance`.

    Raises:
      ValueError: not a non-empty matrix of a float dtype, negative damping, or none with n < d_in.
    """
    rows = as_matrix(rows, name="rows")
    n, d_in = rows.shape
    _check_damping(damping)
    if n < d_in and not isinstance(damping, Tracer) and damping <= 0:
        raise ValueError(
            f"damping must be > 0 with fewer rows than columns, got {damping} with {n} rows and "
            f"{d_in} columns: the covariance is singular. Give damping, or more rows."
        )
    damping = jnp.asarray(damping, rows.dtype)
    unit = exponent_of(jnp.maximum(jnp.max(jnp.abs(rows)), jnp.sqrt(damping)))
    rows, lam = times_power_of_two(rows, -unit), times_power_of_two(damping, -2 * unit)
    if n < d_in:
        factor, positive = _factor(jnp.matmul(rows, rows.T, precision="highest"), n * lam)
        return InverseCovarianceState(factor, rows, damping, positive)
    factor, positive = _factor(jnp.matmul(rows.T, rows, precision="highest") / n, lam)
    return InverseCovarianceState(times_power_of_two(factor, unit), None, damping, positive)


def apply_inverse(
    state: InverseCovarianceState, gradient: Float[Array, "a b"], *, side: str = "left"
) -> Float[Array, "a b"]:
    """``(K + damping I)^{-1} gradient``, or with ``side="right"`` the inverse from the right.

    Args:
      state: from `factor_covariance` or `factor_rows`.
      gradient: [d_in, d] for ``"left"``, [d, d_in] for ``"right"``. With d = d_in the shape cannot
        tell the two apart: the side must be right.
      side: ``"left"`` or ``"right"``.

    Returns:
      The same shape and dtype as ``gradient``, a half one too; solved in the dtype of the state.

    Raises:
      ValueError: an unknown side, or a gradient whose axis on that side is not d_in long.
    """
    if side not in SIDES:
        raise ValueError(f"side must be one of {SIDES}, got {side!r}.")
    dtype = jnp.asarray(gradient).dtype
    gradient = as_float(gradient, name="gradient")
    d_in = state.factor.shape[0] if state.rows is None else state.rows.shape[1]
    axis = 0 if side == "left" else 1
    if gradient.ndim != 2 or gradient.shape[axis] != d_in:
        wanted = f"[{d_in}, d]" if side == "left" else f"[d, {d_in}]"
        raise ValueError(
            f"with side={side!r} the gradient must have shape {wanted}, got {gradient.shape}; "
            "theta [d_in, d] takes side='left', W = theta^T [d, d_in] takes side='right'."
        )
    right_hand_side = gradient if side == "left" else gradient.T
    solution = _solve(state, right_hand_side.astype(state.factor.dtype))
    return (solution if side == "left" else solution.T).astype(dtype)


def _solve(state: InverseCovarianceState, right_hand_side: Array) -> Array:
    """The inverse from the left, on [d_in, d]."""
    if state.rows is None:
        return jsl.cho_solve((state.factor, True), right_hand_side)
    projected = jnp.matmul(state.rows, right_hand_side, precision="highest")
    inner = jsl.cho_solve((state.factor, True), projected)
    return (right_hand_side - jnp.matmul(state.rows.T, inner, precision="highest")) / state.damping


def _transformation(factorise, side: str) -> optax.GradientTransformation:
    if side not in SIDES:
        raise ValueError(f"side must be one of {SIDES}, got {side!r}.")

    def init(params):
        del params
        return factorise()

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda leaf: apply_inverse(state, leaf, side=side), updates), state

    return optax.GradientTransformation(init, update)


def inverse_covariance(
    covariance: Float[Array, "d_in d_in"],
    *,
    damping: float | Float[Array, ""] = 0.0,
    side: str = "left",
) -> optax.GradientTransformation:
    """Multiplies gradients by ``(covariance + damping I)^{-1}`` on the stated side.

    ``init`` makes one Cholesky factorisation and keeps it in the state; ``update`` makes two
    triangular solves a leaf. Every leaf must be a matrix with d_in on that side: put
    ``optax.masked`` around it for a tree with other leaves. The result is a gradient, not a step:
    chain it with ``optax.scale(-learning_rate)``, or with a momentum method.

    Args:
      covariance: K [d_in, d_in] of one task, over its full data.
      damping: lam >= 0, in the units of ``covariance``.
      side: ``"left"`` for theta [d_in, d], ``"right"`` for W = theta^T [d, d_in].

    Returns:
      The transformation, with `InverseCovarianceState`; a covariance that is not positive definite
      shows as ``positive_definite == False`` in the state.

    Raises:
      ValueError: as `factor_covariance` (when called) and `apply_inverse` (in ``update``).

    References:
      Zheng et al. (2025), https://arxiv.org/abs/2505.23760, algorithm 1.

    >>> transform = inverse_covariance(jnp.diag(jnp.array([2.0, 4.0])))
    >>> theta = jnp.ones((2, 3))
    >>> transform.update(theta, transform.init(theta))[0].round(3).tolist()
    [[0.5, 0.5, 0.5], [0.25, 0.25, 0.25]]
    """
    covariance = as_square(covariance, name="covariance")
    _check_damping(damping)
    return _transformation(lambda: factor_covariance(covariance, damping=damping), side)


def inverse_covariance_of_rows(
    rows: Float[Array, "n d_in"],
    *,
    damping: float | Float[Array, ""] = 0.0,
    side: str = "left",
) -> optax.GradientTransformation:
    """`inverse_covariance` of ``rows^T rows / n``, solving only [n, n] systems when n < d_in.

    Args:
      rows: X [n, d_in] of one task.
      damping: in units of the mean-convention covariance; > 0 with n < d_in.
      side: as `inverse_covariance`.

    Raises:
      ValueError: as `factor_rows` (when called) and `apply_inverse` (in ``update``).
    """
    rows = as_matrix(rows, name="rows")
    _check_damping(damping)
    if rows.shape[0] < rows.shape[1] and not isinstance(damping, Tracer) and damping <= 0:
        factor_rows(rows, damping=damping)  # raises: the message is there
    return _transformation(lambda: factor_rows(rows, damping=damping), side)
