r"""The pencil (K_P, K_H) of two tasks, the limit of relative immunisation, and how to meet it.

With M = K_P^{-1/2} K_H K_P^{-1/2}, every invertible theta has

    kappa(theta^T K_H theta) / kappa(theta^T K_P theta) <= kappa(M),

because h_max(H_H) <= m_max h_max(H_P) and h_min(H_H) >= m_min h_min(H_P). Equality holds for
theta = K_P^{-1/2} Q diag(s), Q the eigenvectors of M in descending order and s any positive
descending profile. So RIR <= kappa(M) kappa(K_P) / kappa(K_H): a certificate for every method.

K_P^{-1/2} Q never has to be formed: the generalised eigenvectors V with V^T K_P V = I and
V^T K_H V = diag(m) are the same columns. They are computed here from factors K = A^T A, by a full
CS decomposition (Golub and Van Loan, Matrix Computations, 4th ed., sections 6.1.6 and 8.7.4):

1. the stack [A_P; A_H], its columns scaled to one size, has the singular value decomposition
   [Q_P; Q_H] Sigma Y^T. Directions whose sigma is rounding belong to neither task and are left out;
2. the singular values of Q_P are the cosines c_i: those below 1 / sqrt(2) are good to eps of one;
3. the others say nothing of their sines, since 1 - c^2 cancels and c_i near one leave their vectors
   open. So a second decomposition, of Q_H on those vectors alone, gives the sines s_i.

Then c_i^2 + s_i^2 = 1 and m_i = (s_i / c_i)^2. Neither K is formed, so no digits are lost to
squaring.

The limit is a certificate, so it must not be too small. A computed decomposition is the exact one
of factors whose column j is off by at most gamma D_j, D_j the norm of the stacked column. With
V^T K_P V = I that changes |A_P v| of any v = V a by at most

    gamma |D V|_F |a| = rho_P |A_P v|,

and |A_H v| by at most rho_H |A_H v| with the columns of V scaled to v^T K_H v = 1. Hence

    log kappa(M) <= log(m_max / m_min) + 2 log[(1 + rho_P)(1 + rho_H) / ((1 - rho_P)(1 - rho_H))],

which is what `log_pencil_condition` returns; it is +inf where a rho is one or more.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaximm.linalg.arrays import (
    EMPTY,
    as_matrix,
    as_square,
    check_kind,
    column_exponents,
    exponent_of,
    one_program,
    times_power_of_two,
)
from jaximm.linalg.batched import after


class Pencil(NamedTuple):
    """Generalised eigenvalues m_i of (K_P, K_H), ascending, and their vectors as columns.

    V^T K_P V = I and V^T K_H V = diag(values) on the common range of K_P + K_H, of dimension
    `rank`. Where a direction has no primary energy the value is +inf and its column is scaled to
    v^T K_H v = 1 instead. Directions that neither task has come last, with value NaN and a column
    of zeros. `log_condition`: upper end of log(m_max / m_min) on the common range, in nats.
    """

    values: Float[Array, "d"]
    vectors: Float[Array, "d d"]
    rank: Int[Array, ""]
    log_condition: Float[Array, ""]


def damped_factor(
    inputs: Float[Array, "n d"], *, damping: float | Float[Array, ""] = 0.0
) -> Float[Array, "n+d d"]:
    r"""The factor A = [X / sqrt(n); sqrt(lam) I] with A^T A = X^T X / n + lam I.

    Args:
      inputs: X, rows are examples, any float dtype.
      damping: lam >= 0 in units of the mean-convention Gram matrix.

    Returns:
      [n + d, d] in the dtype of `inputs`, float32 for half precision (the last d rows are zero when
      lam = 0).

    Raises:
      ValueError: if `inputs` is not a non-empty float (n, d) array, or lam is a negative number.

    >>> factor = damped_factor(jnp.array([[3.0, 0.0]]), damping=4.0)
    >>> (factor.T @ factor).tolist()
    [[13.0, 0.0], [0.0, 4.0]]
    """
    inputs = as_matrix(inputs, name="inputs")
    if isinstance(damping, int | float) and not damping >= 0:
        raise ValueError(f"damping must be >= 0, got {damping}.")
    n, d = inputs.shape
    root = jnp.sqrt(jnp.asarray(damping, inputs.dtype))
    return jnp.concatenate([inputs / n**0.5, root * jnp.eye(d, dtype=inputs.dtype)])


@one_program
def pencil_from_factors(
    factor_primary: Float[Array, "p d"], factor_harmful: Float[Array, "q d"]
) -> Pencil:
    r"""The pencil of K_P = A_P^T A_P and K_H = A_H^T A_H from the factors themselves.

    See the module for the method. The relative error of m_i is about eps / (c_i s_i) with the two
    factors scaled to equal size, times the condition number of the stack; `log_condition` bounds
    what it does to the limit.

    Edge cases: a direction with no primary energy gives +inf, one with no harmful energy gives 0
    (c or s below d * eps counts as none). Directions that neither factor has (a constant next to
    one-hot columns, n_P + n_H < d) are left out: see `Pencil`, and `rank`. NaN or inf gives NaN.
    Scaling a factor by a power of two changes nothing but the units.

    Args:
      factor_primary: A_P [p, d], any float dtype, any number of rows.
      factor_harmful: A_H [q, d], same d and dtype.

    Returns:
      `Pencil` with `values` ascending, in the dtype of the factors, float32 for half precision.

    Raises:
      ValueError: if a factor is not a non-empty float matrix, or the widths or dtypes differ.

    References:
      Golub and Van Loan, Matrix Computations (4th ed.), sections 6.1.6 and 8.7.4.
    """
    factor_primary = as_matrix(factor_primary, name="factor_primary")
    factor_harmful = as_matrix(factor_harmful, name="factor_harmful")
    d = factor_primary.shape[1]
    if factor_harmful.shape[1] != d or factor_harmful.dtype != factor_primary.dtype:
        raise ValueError(
            "factors must have the same width and dtype, got "
            f"{factor_primary.dtype}{list(factor_primary.shape)} and "
            f"{factor_harmful.dtype}{list(factor_harmful.shape)}."
        )
    rows = max(factor_primary.shape[0], factor_harmful.shape[0], d)
    gamma = _column_error(rows, factor_primary.dtype)
    primary_exponent, harmful_exponent, feature_exponents = _common_exponents(
        column_exponents(factor_primary), column_exponents(factor_harmful)
    )
    primary, more = _unit_square(factor_primary, primary_exponent + feature_exponents)
    primary_exponent = primary_exponent + more
    harmful, more = _unit_square(
        after(factor_harmful, primary), harmful_exponent + feature_exponents
    )
    harmful_exponent = harmful_exponent + more
    stack = jnp.concatenate([primary, harmful])
    units = jnp.linalg.norm(stack, axis=0)
    units = jnp.where(units == 0, 1, units)
    basis, sigma, axes_t = jnp.linalg.svd(stack / units[None, :], full_matrices=False)
    kept = sigma > 3 * gamma * sigma[0]  # Not >=: a stack of zeros has no rank.
    upper, lower = (part * kept.astype(part.dtype)[None, :] for part in (basis[:d], basis[d:]))

    absent = d - jnp.sum(kept)
    first, right = _svd_beside(upper, ~kept)
    # Now the absent ones stand first, then the cosines, descending.
    small = (jnp.arange(d) >= absent) & (first < 0.5**0.5)
    aside = small | (jnp.arange(d) < absent)
    second, turn = _svd_beside(_dot(lower, right), aside)
    right = _dot(right, turn)
    # Set aside from the last to the first: small cosines ascending, the absent, sines descending.
    is_small = jnp.arange(d) < jnp.sum(small)
    is_absent = ~is_small & (jnp.arange(d) < jnp.sum(aside))
    cosines = jnp.where(is_small, first[::-1], _other_leg(jnp.where(is_small, 0, second)))
    sines = jnp.where(is_small, _other_leg(jnp.where(is_small, cosines, 0)), second)

    inverse = jnp.where(kept, 1 / jnp.where(kept, sigma, 1), 0)
    columns = _dot(axes_t.T, inverse[:, None] * right) / units[:, None]
    # NaN in, NaN out: a comparison would turn it into "no energy".
    bad = jnp.isnan(jnp.sum(sigma))
    return _assemble(
        cosines=jnp.where(cosines > d * float(jnp.finfo(cosines.dtype).eps), cosines, 0),
        sines=jnp.where(sines > d * float(jnp.finfo(sines.dtype).eps), sines, 0),
        absent=is_absent | bad,
        columns=columns,
        noise=gamma * jnp.linalg.norm(columns * units[:, None], axis=0),
        primary_exponent=primary_exponent,
        harmful_exponent=harmful_exponent,
        feature_exponents=feature_exponents,
    )


@one_program
def pencil(gram_primary: Float[Array, "d d"], gram_harmful: Float[Array, "d d"]) -> Pencil:
    r"""The pencil of two Gram matrices, by one Cholesky factorisation and one eigensolve.

    For Gram matrices that come from elsewhere (accumulated over a stream), and the fastest path.
    With L L^T = K_P + K_H (both scaled to size 1), L^{-1} K_P L^{-T} has the eigenvalues c_i^2 of
    `pencil_from_factors`. Errors grow like eps * kappa(K_P + K_H) * m_max; with X at hand the
    factors keep twice the digits.

    Edge cases: as `pencil_from_factors`, with c^2 and s^2 below d * eps read as zero energy. Where
    K_P + K_H is singular to rounding all is NaN and `rank` is 0: a Gram matrix cannot tell its own
    null space from its rounding, so drop the direction, add damping or use the factors.

    Args:
      gram_primary: K_P, symmetric positive semi-definite, any float dtype, damping included.
      gram_harmful: K_H, the same shape and dtype.

    Returns:
      `Pencil` with `values` ascending, in the dtype of the Gram matrices.

    Raises:
      ValueError: if a matrix is not square, or the shapes or dtypes differ.

    >>> ratios = pencil(jnp.diag(jnp.array([1.0, 4.0])), jnp.diag(jnp.array([9.0, 4.0])))
    >>> [round(float(m), 4) for m in ratios.values]
    [1.0, 9.0]
    """
    gram_primary = as_square(gram_primary, name="gram_primary")
    gram_harmful = as_square(gram_harmful, name="gram_harmful")
    if gram_primary.shape != gram_harmful.shape or gram_primary.dtype != gram_harmful.dtype:
        raise ValueError(
            "Gram matrices must have one shape and dtype, got "
            f"{gram_primary.dtype}{list(gram_primary.shape)} and "
            f"{gram_harmful.dtype}{list(gram_harmful.shape)}."
        )
    d = gram_primary.shape[0]
    eps = float(jnp.finfo(gram_primary.dtype).eps)
    primary_exponent, harmful_exponent, feature_exponents = _common_exponents(
        _half_exponents(gram_primary), _half_exponents(gram_harmful)
    )
    primary = _unit_gram(gram_primary, primary_exponent + feature_exponents)
    harmful = _unit_gram(gram_harmful, harmful_exponent + feature_exponents)
    total = primary + harmful
    units = jnp.sqrt(jnp.maximum(jnp.diagonal(total), 0))
    units = jnp.where(units == 0, 1, units)
    triangle = jnp.linalg.cholesky(total / units[:, None] / units[None, :])

    def whiten(gram):
        scaled = gram / units[:, None] / units[None, :]
        half = jax.scipy.linalg.solve_triangular(triangle, scaled, lower=True)
        return jax.scipy.linalg.solve_triangular(triangle, half.T, lower=True)

    squared_cosines, right = jnp.linalg.eigh(whiten(primary))
    # Not 1 - c^2, which cancels where the harmful energy is small.
    squared_sines = jnp.sum(right * _dot(whiten(harmful), right), axis=0)
    columns = jax.scipy.linalg.solve_triangular(triangle, right, lower=True, trans=1)
    gamma = _column_error(d, gram_primary.dtype)
    noise = gamma * jnp.sum(columns**2, axis=0)
    # Only a singular sum has directions in which rounding is as large as both tasks together.
    singular = ~(jnp.max(noise) < 0.5)
    return _assemble(
        cosines=jnp.sqrt(jnp.where(squared_cosines > d * eps, squared_cosines, 0)),
        sines=jnp.sqrt(jnp.where(squared_sines > d * eps, squared_sines, 0)),
        absent=jnp.broadcast_to(singular, (d,)),
        columns=columns / units[:, None],
        # Of the squares: half of it is that of the root, up to its own square.
        noise=jnp.sqrt(noise),
        primary_exponent=primary_exponent,
        harmful_exponent=harmful_exponent,
        feature_exponents=feature_exponents,
        squared=True,
    )


def log_pencil_condition(task_pencil: Pencil) -> Float[Array, ""]:
    r"""log kappa(M) = log m_max - log m_min in nats, rounded outward: never below the truth.

    It is above log(m_max / m_min) of the computed `values` by what rounding can have hidden (see
    the module), 1e-13 for factors of moderate condition in float64.

    +inf where a harmful direction has no primary energy, or a primary direction no harmful energy
    (m_min = 0): without damping M is then not invertible. +inf also where an extreme value is not
    resolved in the dtype. kappa of the pencil the other way round is the same number. Directions
    that neither task has do not count (`Pencil.rank` says how many do); NaN where there are none.

    Raises:
      ValueError: `task_pencil` is no `Pencil`.
    """
    check_kind(task_pencil, Pencil, "task_pencil", "`pencil`")
    return task_pencil.log_condition


def rir_limit(
    task_pencil: Pencil, *, log_kappa_primary: Float[Array, ""], log_kappa_harmful: Float[Array, ""]
) -> Float[Array, ""]:
    r"""log RIR_max = log kappa(M) + log kappa(K_P) - log kappa(K_H), in nats.

    No invertible linear backbone exceeds it. The same damping must be in all three terms.

    Args:
      task_pencil: the pencil of (K_P, K_H).
      log_kappa_primary: log kappa(K_P), e.g. `feature_condition_number(x, damping=lam).log_kappa`.
      log_kappa_harmful: log kappa(K_H).

    Returns:
      Scalar; +inf where `log_pencil_condition` is; 0 when K_H is a multiple of K_P.

    Raises:
      ValueError: `task_pencil` is no `Pencil`.
    """
    return log_pencil_condition(task_pencil) + log_kappa_primary - log_kappa_harmful


@one_program
def limit_backbone(
    task_pencil: Pencil, *, log_kappa_primary: Float[Array, ""], t: float | Float[Array, ""]
) -> Float[Array, "d d"]:
    r"""The backbone theta = K_P^{-1/2} Q diag(s) that attains the limit of RIR.

    kappa(H_P) = kappa(K_P)^t and kappa(H_H) = kappa(M) kappa(K_P)^t. The profile is geometric,
    s_i = kappa(K_P)^{-(t / 2) i / (d - 1)}, i = 0 ... d - 1, in the descending order of the
    eigenvalues of M; H_P = diag(s^2) has largest eigenvalue 1. t = 0 makes H_P = I; t = 1 leaves
    the primary task exactly as hard as it was, (ii) = 1.

    Args:
      task_pencil: the pencil of (K_P, K_H), finite (damped if need be).
      log_kappa_primary: log kappa(K_P) in nats.
      t: position on the frontier, in [0, 1]; may be traced.

    Returns:
      theta [d, d]: features are x @ theta. Columns of zeros for directions that neither task has.

    Raises:
      ValueError: `task_pencil` is no `Pencil`, or `t` is a number outside [0, 1].
    """
    check_kind(task_pencil, Pencil, "task_pencil", "`pencil`")
    if isinstance(t, int | float) and not 0 <= t <= 1:
        raise ValueError(f"t must be in [0, 1], got {t}.")
    d, dtype = task_pencil.values.shape[0], task_pencil.values.dtype
    # Columns without a task come first once reversed, and are zero.
    place = jnp.maximum(
        jnp.arange(d, dtype=task_pencil.rank.dtype) - (d - task_pencil.rank), 0
    ).astype(dtype)
    steps = place / jnp.maximum(task_pencil.rank - 1, 1).astype(dtype)
    profile = jnp.exp(-0.5 * t * log_kappa_primary * steps)
    return task_pencil.vectors[:, ::-1] * profile[None, :]


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


@one_program
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
    matrix = as_square(matrix)
    d = matrix.shape[0]
    eigenvalues, eigenvectors = jnp.linalg.eigh(times_power_of_two(matrix, -exponent_of(matrix)))
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

    # Of the excesses, and not `index != 0`: inside shard_map a carry varies as what is added to it.
    is_open = jnp.ones_like(excesses, bool) & (index != 0)
    start = (excesses[0], rows[0], is_open)
    (_, running, _), closed = lax.scan(rotate, start, length=d - 1)
    return jnp.concatenate([closed, running[None, :]]).T


def _svd_beside(
    matrix: Float[Array, "n d"], aside: Bool[Array, "d"]
) -> tuple[Float[Array, "d"], Float[Array, "d d"]]:
    """Singular values and right vectors of some columns, n >= d, with the others set aside first.

    `matrix` has singular values of at most one. Column i of those aside gets the value 4 + i, far
    from all others, so that its right vector is +-e_i and comes first, from the last i to the
    first; the rest follow in descending order.
    """
    d = matrix.shape[1]
    beside = jnp.where(aside, 4 + jnp.arange(d).astype(matrix.dtype), 0)
    masked = jnp.where(aside[None, :], 0, matrix)
    _, values, right_t = jnp.linalg.svd(
        jnp.concatenate([masked, jnp.diag(beside)]), full_matrices=False
    )
    return values, right_t.T


def _column_error(rows: int, dtype) -> float:
    """gamma: backward error of the decompositions, relative to the norm of a column.

    The c(n, d) eps of `jaximm.linalg.condition`. On factors whose columns and rows are graded by
    tens of orders, each in its own way, a third of it has been too little.
    """
    return (4 + 1.5 * rows**0.5) * float(jnp.finfo(dtype).eps)


def _other_leg(leg: Float[Array, "d"]) -> Float[Array, "d"]:
    """sqrt(1 - leg^2), for a leg of at most 1 / sqrt(2) or one that is set aside."""
    return jnp.sqrt(jnp.maximum((1 - leg) * (1 + leg), 0))


def _assemble(
    *,
    cosines,
    sines,
    absent,
    columns,
    noise,
    primary_exponent,
    harmful_exponent,
    feature_exponents,
    squared: bool = False,
) -> Pencil:
    """`Pencil` from (c, s) with zeros for no energy, and R^{-1} W, of the scaled pair.

    `noise`: what rounding can have done to c and s (to their squares where `squared`).
    """
    present = cosines > 0
    safe = jnp.where(present, cosines, 1)
    ratio = jnp.where(present, sines / safe, jnp.inf)
    scaled = times_power_of_two(ratio, harmful_exponent - primary_exponent)
    values = jnp.where(absent, jnp.nan, scaled**2)
    columns = jnp.where(
        present[None, :],
        times_power_of_two(columns, -(primary_exponent + feature_exponents)[:, None])
        / safe[None, :],
        times_power_of_two(columns, -(harmful_exponent + feature_exponents)[:, None]),
    )
    vectors = jnp.where(absent[None, :], 0, columns)
    rank = jnp.sum(~absent)

    # Of the unscaled ratios: units do not matter, and squares of large ones overflow.
    largest = jnp.max(jnp.where(absent, -jnp.inf, ratio))
    smallest = jnp.min(jnp.where(absent, jnp.inf, ratio))
    finite = (smallest > 0) & (largest < jnp.inf)
    log_ratio = jnp.log(jnp.where(finite, largest, 1)) - jnp.log(jnp.where(finite, smallest, 1))

    def rho(legs):
        relative = jnp.where(absent | (legs == 0), 0, noise / jnp.where(legs == 0, 1, legs))
        total = jnp.sum(relative**2)
        return total if squared else jnp.sqrt(total)

    rho_primary, rho_harmful = lax.stop_gradient((rho(cosines), rho(sines)))
    resolved = finite & (rho_primary < 1) & (rho_harmful < 1)
    slack = sum(
        jnp.log1p(part) - jnp.log1p(-part)
        for part in (jnp.where(resolved, rho, 0) for rho in (rho_primary, rho_harmful))
    )
    log_condition = jnp.where(resolved, 2 * log_ratio + (1 if squared else 2) * slack, jnp.inf)
    log_condition = jnp.where(rank > 0, log_condition, jnp.nan)
    order = jnp.argsort(jnp.where(absent, jnp.nan, ratio))
    return Pencil(values[order], vectors[:, order], rank.astype(jnp.int32), log_condition)


def _half_exponents(gram: Float[Array, "d d"]) -> Int[Array, "d"]:
    """Half the exponents of the diagonal, rounded upwards, `EMPTY` of zeros."""
    diagonal = column_exponents(jnp.diagonal(gram)[None, :])
    return jnp.where(diagonal == EMPTY, EMPTY, (diagonal + 1) // 2)


def _common_exponents(primary: Int[Array, "d"], harmful: Int[Array, "d"]):
    """Powers of two a, b and c_j such that A_P / 2^(a + c) and A_H / 2^(b + c) are of size one.

    M does not see the units of the features, and what a column would lose in those of a larger one
    is a direction less.
    """

    def largest(exponents):
        return jnp.where(jnp.max(exponents) == EMPTY, 0, jnp.max(exponents))

    a, b = largest(primary), largest(harmful)
    columns = jnp.maximum(
        jnp.where(primary == EMPTY, EMPTY, primary - a),
        jnp.where(harmful == EMPTY, EMPTY, harmful - b),
    )
    return a, b, jnp.where(columns == EMPTY, 0, columns)


def _unit_square(factor, exponents: Int[Array, "d"]):
    """A factor over 2^exponents as [d, d], by its triangle if it is tall; and one more exponent."""
    n, d = factor.shape
    factor = times_power_of_two(factor, -exponents[None, :])
    if n > d:
        factor = jnp.linalg.qr(factor, mode="r")
    elif n < d:
        factor = jnp.concatenate([factor, jnp.zeros((d - n, d), factor.dtype)])
    # Many rows make a triangle larger than any of its entries was.
    more = exponent_of(factor)
    return times_power_of_two(factor, -more), more


def _unit_gram(gram, exponents: Int[Array, "d"]):
    """A Gram matrix of factors over 2^exponents."""
    return times_power_of_two(gram, -(exponents[:, None] + exponents[None, :]))


def _dot(a, b):
    return jnp.matmul(a, b, precision="highest")
