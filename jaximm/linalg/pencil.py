r"""The pencil (K_P, K_H) of two tasks, the limit of relative immunisation, and how to meet it.

With M = K_P^{-1/2} K_H K_P^{-1/2}, every invertible theta has

    kappa(theta^T K_H theta) / kappa(theta^T K_P theta) <= kappa(M),

because h_max(H_H) <= m_max h_max(H_P) and h_min(H_H) >= m_min h_min(H_P). Equality holds for
theta = K_P^{-1/2} Q diag(s), Q the eigenvectors of M in descending order and s any positive
descending profile. So RIR <= kappa(M) kappa(K_P) / kappa(K_H): a certificate for every method.

K_P^{-1/2} Q never has to be formed: the generalised eigenvectors V with V^T K_P V = I and
V^T K_H V = diag(m) are the same columns. They are computed here from factors K = A^T A by a QR
decomposition of the stacked factors, [A_P; A_H] = [Q_P; Q_H] R: then Q_P^T Q_P + Q_H^T Q_H = I, the
two share right singular vectors W with c_i^2 + s_i^2 = 1, m_i = (s_i / c_i)^2 and V = R^{-1} W / c
(the generalised singular value decomposition; Golub and Van Loan, Matrix Computations, 4th ed.,
section 8.7.4). Neither K is formed, so no digits are lost to squaring.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaximm.linalg.extremes import check_matrix, check_square


class Pencil(NamedTuple):
    """Generalised eigenvalues m_i of (K_P, K_H), ascending, and their vectors as columns.

    V^T K_P V = I and V^T K_H V = diag(values). Where a direction has no primary energy the value is
    +inf and its column is scaled to v^T K_H v = 1 instead.
    """

    values: Float[Array, "d"]
    vectors: Float[Array, "d d"]


def damped_factor(
    inputs: Float[Array, "n d"], *, damping: float | Float[Array, ""] = 0.0
) -> Float[Array, "n+d d"]:
    r"""The factor A = [X / sqrt(n); sqrt(lam) I] with A^T A = X^T X / n + lam I.

    Args:
      inputs: X, rows are examples, any float dtype.
      damping: lam >= 0 in units of the mean-convention Gram matrix.

    Returns:
      [n + d, d] in the dtype of `inputs` (the last d rows are zero when lam = 0).

    Raises:
      ValueError: if `inputs` is not a non-empty float (n, d) array, or lam is a negative number.

    >>> factor = damped_factor(jnp.array([[3.0, 0.0]]), damping=4.0)
    >>> (factor.T @ factor).tolist()
    [[13.0, 0.0], [0.0, 4.0]]
    """
    check_matrix(inputs)
    if isinstance(damping, int | float) and not damping >= 0:
        raise ValueError(f"damping must be >= 0, got {damping}.")
    n, d = inputs.shape
    root = jnp.sqrt(jnp.asarray(damping, inputs.dtype))
    return jnp.concatenate([inputs / n**0.5, root * jnp.eye(d, dtype=inputs.dtype)])


def pencil_from_factors(
    factor_primary: Float[Array, "p d"], factor_harmful: Float[Array, "q d"]
) -> Pencil:
    r"""The pencil of K_P = A_P^T A_P and K_H = A_H^T A_H from the factors themselves.

    Relative error of the extreme m is about eps * sqrt(m_max) and eps / sqrt(m_min), with the two
    factors scaled to equal norm; of V^T K V it is eps * kappa of the stacked factors.

    Edge cases: a direction with no primary energy gives +inf, one with no harmful energy gives 0
    (c or s below d * eps counts as none). A direction with neither makes the stack singular: the
    results are then not finite, so drop the direction or add damping (`damped_factor`).

    Args:
      factor_primary: A_P [p, d], any float dtype, any number of rows.
      factor_harmful: A_H [q, d], same d and dtype.

    Returns:
      `Pencil` with `values` ascending, in the dtype of the factors.

    Raises:
      ValueError: if a factor is not a non-empty float matrix, or the widths differ.

    References:
      Golub and Van Loan, Matrix Computations (4th ed.), section 8.7.4.
    """
    check_matrix(factor_primary)
    check_matrix(factor_harmful)
    d = factor_primary.shape[1]
    if factor_harmful.shape[1] != d:
        raise ValueError(
            f"factors must have the same width, got {factor_primary.shape} and "
            f"{factor_harmful.shape}."
        )
    primary, primary_norm = _unit_triangle(factor_primary)
    harmful, harmful_norm = _unit_triangle(factor_harmful)
    stacked, triangle = jnp.linalg.qr(jnp.concatenate([primary, harmful]))
    upper, lower = stacked[: primary.shape[0]], stacked[primary.shape[0] :]
    # The singular vectors of Q_P make V^T K_P V = I to machine precision; sines from |Q_H w| and
    # not from 1 - c^2, which cancels.
    _, _, right_t = jnp.linalg.svd(upper, full_matrices=upper.shape[0] < d)
    right = right_t.T
    cosines = jnp.linalg.norm(_dot(upper, right), axis=0)
    sines = jnp.linalg.norm(_dot(lower, right), axis=0)
    floor = d * float(jnp.finfo(cosines.dtype).eps)
    return _assemble(
        cosines=jnp.where(cosines > floor, cosines, 0),
        sines=jnp.where(sines > floor, sines, 0),
        columns=jax.scipy.linalg.solve_triangular(triangle, right),
        primary_norm=primary_norm,
        harmful_norm=harmful_norm,
    )


def pencil(gram_primary: Float[Array, "d d"], gram_harmful: Float[Array, "d d"]) -> Pencil:
    r"""The pencil of two Gram matrices, by one Cholesky factorisation and one eigensolve.

    For Gram matrices that come from elsewhere (accumulated over a stream), and the fastest path.
    With L L^T = K_P + K_H (both scaled to trace 1), L^{-1} K_P L^{-T} has the eigenvalues c_i^2 of
    `pencil_from_factors`. Errors grow like eps * kappa(K_P + K_H) * m_max; with X at hand the
    factors keep twice the digits.

    Edge cases: as `pencil_from_factors`, with c^2 and s^2 below d * eps read as zero energy.

    Args:
      gram_primary: K_P, symmetric positive semi-definite, any float dtype, damping included.
      gram_harmful: K_H, the same shape and dtype.

    Returns:
      `Pencil` with `values` ascending, in the dtype of the Gram matrices.

    Raises:
      ValueError: if a matrix is not square, or the shapes differ.

    >>> found = pencil(jnp.diag(jnp.array([1.0, 4.0])), jnp.diag(jnp.array([9.0, 4.0])))
    >>> [round(float(m), 4) for m in found.values]
    [1.0, 9.0]
    """
    check_square(gram_primary)
    check_square(gram_harmful)
    if gram_primary.shape != gram_harmful.shape:
        raise ValueError(
            f"Gram matrices must have one shape, got {gram_primary.shape} and {gram_harmful.shape}."
        )
    primary, primary_scale = _unit_trace(gram_primary)
    harmful, harmful_scale = _unit_trace(gram_harmful)
    triangle = jnp.linalg.cholesky(primary + harmful)

    def whiten(gram):
        half = jax.scipy.linalg.solve_triangular(triangle, gram, lower=True)
        return jax.scipy.linalg.solve_triangular(triangle, half.T, lower=True)

    squared_cosines, right = jnp.linalg.eigh(whiten(primary))
    # Not 1 - c^2, which cancels where the harmful energy is small.
    squared_sines = jnp.sum(right * _dot(whiten(harmful), right), axis=0)
    floor = gram_primary.shape[0] * float(jnp.finfo(right.dtype).eps)
    return _assemble(
        cosines=jnp.sqrt(jnp.where(squared_cosines > floor, squared_cosines, 0)),
        sines=jnp.sqrt(jnp.where(squared_sines > floor, squared_sines, 0)),
        columns=jax.scipy.linalg.solve_triangular(triangle, right, lower=True, trans=1),
        primary_norm=jnp.sqrt(primary_scale),
        harmful_norm=jnp.sqrt(harmful_scale),
    )


def log_pencil_condition(found: Pencil) -> Float[Array, ""]:
    r"""log kappa(M) = log m_max - log m_min in nats.

    +inf where a harmful direction has no primary energy, or a primary direction no harmful energy
    (m_min = 0): without damping M is then not invertible. kappa of the pencil the other way round
    is the same number.
    """
    return jnp.log(found.values[-1]) - jnp.log(found.values[0])


def rir_limit(
    found: Pencil, *, log_kappa_primary: Float[Array, ""], log_kappa_harmful: Float[Array, ""]
) -> Float[Array, ""]:
    r"""log RIR_max = log kappa(M) + log kappa(K_P) - log kappa(K_H), in nats.

    No invertible linear backbone exceeds it. The same damping must be in all three terms.

    Args:
      found: the pencil of (K_P, K_H).
      log_kappa_primary: log kappa(K_P), e.g. `feature_condition_number(x, damping=lam).log_kappa`.
      log_kappa_harmful: log kappa(K_H).

    Returns:
      Scalar; +inf where `log_pencil_condition` is; 0 when K_H is a multiple of K_P.
    """
    return log_pencil_condition(found) + log_kappa_primary - log_kappa_harmful


def limit_backbone(
    found: Pencil, *, log_kappa_primary: Float[Array, ""], t: float | Float[Array, ""]
) -> Float[Array, "d d"]:
    r"""The backbone theta = K_P^{-1/2} Q diag(s) that attains the limit of RIR.

    kappa(H_P) = kappa(K_P)^t and kappa(H_H) = kappa(M) kappa(K_P)^t. The profile is geometric,
    s_i = kappa(K_P)^{-(t / 2) i / (d - 1)}, i = 0 ... d - 1, in the descending order of the
    eigenvalues of M; H_P = diag(s^2) has largest eigenvalue 1. t = 0 makes H_P = I; t = 1 leaves
    the primary task exactly as hard as it was, (ii) = 1.

    Args:
      found: the pencil of (K_P, K_H), finite (damped if need be).
      log_kappa_primary: log kappa(K_P) in nats.
      t: position on the frontier, in [0, 1]; may be traced.

    Returns:
      theta [d, d]: features are x @ theta.

    Raises:
      ValueError: if `t` is a number outside [0, 1].
    """
    if isinstance(t, int | float) and not 0 <= t <= 1:
        raise ValueError(f"t must be in [0, 1], got {t}.")
    d = found.values.shape[0]
    steps = jnp.arange(d).astype(found.values.dtype) / max(d - 1, 1)
    profile = jnp.exp(-0.5 * t * log_kappa_primary * steps)
    return found.vectors[:, ::-1] * profile[None, :]


def t_for_budget(
    *, log_kappa_primary_budget: Float[Array, ""], log_kappa_primary: Float[Array, ""]
) -> Float[Array, ""]:
    r"""The t of `limit_backbone` that spends a budget on kappa(H_P): kappa(K_P)^t = budget.

    Among all invertible backbones with kappa(H_P) <= budget, that one makes kappa(H_H) largest:
    kappa(H_H) <= kappa(M) kappa(H_P) <= kappa(M) * budget, with equality.

    Args:
      log_kappa_primary_budget: log of the largest kappa(H_P) allowed, in nats.
      log_kappa_primary: log kappa(K_P) in nats.

    Returns:
      t clipped to [0, 1]; 0 where kappa(K_P) = 1.
    """
    whole = jnp.asarray(log_kappa_primary)
    spendable = whole > 0
    return jnp.where(
        spendable,
        jnp.clip(log_kappa_primary_budget / jnp.where(spendable, whole, 1), 0, 1),
        0,
    )


def constant_diagonal_rotation(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    r"""An orthogonal Q such that every diagonal entry of Q^T M Q is tr(M) / d.

    A diagonal preconditioner (Jacobi, and in part Adam) then has nothing to undo, at no cost in
    kappa. In the eigenbasis of M one running vector is rotated against d - 1 eigenvectors in turn,
    each from the other side of the mean; every rotation leaves one vector exactly at the mean and
    carries the rest of the excess on (the constructive half of Schur-Horn): O(d) each.

    Args:
      matrix: M, symmetric, any float dtype. Only its symmetric part is seen.

    Returns:
      Q [d, d]. The diagonal is constant to about d * eps * |M|.

    Raises:
      ValueError: if `matrix` is not a non-empty square float array.

    References:
      Chan and Li (1983), Diagonal elements and eigenvalues of a real symmetric matrix, Journal of
      Mathematical Analysis and Applications 91.
    """
    check_square(matrix)
    d = matrix.shape[0]
    eigenvalues, eigenvectors = jnp.linalg.eigh(matrix)
    rows = eigenvectors.T
    excesses = eigenvalues - jnp.mean(eigenvalues)
    index = jnp.arange(d)

    def rotate(carry, _):
        excess, running, is_open = carry
        partner = jnp.where(
            excess <= 0,
            jnp.argmax(jnp.where(is_open, excesses, -jnp.inf)),
            jnp.argmin(jnp.where(is_open, excesses, jnp.inf)),
        )
        other = excesses[partner]
        # cos^2 excess + sin^2 other = 0 has a solution for opposite signs; without them (all open
        # excesses zero up to rounding) nothing is left to rotate.
        turns = excess * other < 0
        sin_squared = jnp.where(turns, excess / jnp.where(turns, excess - other, 1), 0)
        cos, sin = jnp.sqrt(1 - sin_squared), jnp.sqrt(sin_squared)
        fresh = lax.dynamic_index_in_dim(rows, partner, keepdims=False)
        closed = cos * running + sin * fresh
        running = cos * fresh - sin * running
        return (excess + other, running, is_open & (index != partner)), closed

    start = (excesses[0], rows[0], index != 0)
    (_, running, _), closed = lax.scan(rotate, start, length=d - 1)
    return jnp.concatenate([closed, running[None, :]]).T


def _assemble(*, cosines, sines, columns, primary_norm, harmful_norm) -> Pencil:
    """`Pencil` from (c, s) with zeros for no energy, and R^{-1} W, of the scaled pair."""
    present = cosines > 0
    safe = jnp.where(present, cosines, 1)
    ratio = jnp.where(present, sines / safe, jnp.inf)
    values = (ratio * (harmful_norm / primary_norm)) ** 2
    vectors = columns / jnp.where(present, safe * primary_norm, harmful_norm)[None, :]
    # NaN in, NaN out: a comparison would turn it into "no energy".
    values = jnp.where(jnp.isnan(jnp.sum(columns, axis=0)), jnp.nan, values)
    order = jnp.argsort(values)
    return Pencil(values[order], vectors[:, order])


def _unit_triangle(factor):
    """The factor scaled to norm 1, by its triangle if it is tall; and the norm."""
    if factor.shape[0] > factor.shape[1]:
        factor = jnp.linalg.qr(factor, mode="r")
    norm = jnp.linalg.norm(factor)
    norm = jnp.where(norm > 0, norm, 1)
    return factor / norm, norm


def _unit_trace(gram):
    """A Gram matrix scaled to trace 1, and the scale."""
    scale = jnp.trace(gram)
    scale = jnp.where(scale > 0, scale, 1)
    return gram / scale, scale


def _dot(a, b):
    return jnp.matmul(a, b, precision="highest")
