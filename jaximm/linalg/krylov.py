r"""The Krylov certificate: the least number of gradient steps that reaches a loss gap.

On a quadratic with Hessian eigenvalues h_i and initial error coefficients c_i, every method whose
iterates stay in w_0 + span{g_0, ..., g_{t-1}} (gradient descent with any schedule, momentum,
Nesterov, conjugate gradients, L-BFGS from a multiple of the identity) has after t steps the error
p(H) (w_0 - w*), p a polynomial of degree at most t with p(0) = 1. So its loss gap is at least that
of t exact conjugate-gradient steps,

    gap_t = 1/2 min over p of sum_i h_i p(h_i)^2 c_i^2.

It says nothing about methods that leave that span: Adam, preconditioning, whitening, closed forms.
A step is one new gradient: a line search that evaluates several counts each of them.

**How the floor is made to hold.** Lanczos or conjugate gradients in any fixed precision answer for
a nearby spectrum, and where eigenvalues cluster the gap of a nearby spectrum is another one. Here
nothing is iterated on. Choose t of the eigenvalues as nodes, S; then p is given by its values
u_i = p(h_i) sqrt(w_i) there, w_i = h_i c_i^2, and its weighted values elsewhere are r + M u with

    r_j  = sqrt(w_j) prod_{m in S} (1 - h_j / h_m)
    M_ji = A_j / ((h_j - h_i) B_i),   A_j = sqrt(w_j) h_j prod_{m in S} (h_j - h_m),
                                      B_i the same product without its zero factor,

all of them products of differences of the input, so right to a few t eps *relative*, however close
the eigenvalues lie. Hence 2 gap_t = min_u |u|^2 + |r + M u|^2, a least-squares problem, and by
weak duality *every* vector v bounds it from below:

    2 gap_t >= (v . r)^2 / (|v|^2 + |M^T v|^2),

with equality at the residual v = r + M u of the optimum. How v was found is nobody's business
(Gram-Schmidt in float64); its error costs tightness to second order and never truth. The few
products left are bounded with their rounding.

Nemirovski and Yudin (1983), Problem Complexity and Method Efficiency in Optimization;
Saad (2003), Iterative Methods for Sparse Linear Systems (2nd ed.), section 6.11; the choice of
nodes is Gaussian elimination with pivoting of the Vandermonde matrix in Newton's basis: Golub and
Van Loan, Matrix Computations (4th ed.), section 4.6; the rounding of products and sums: Higham
(2002), Accuracy and Stability of Numerical Algorithms (2nd ed.), section 3.1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num

_EPS = float(np.finfo(np.float64).eps)

_LEAST = -900
"""Exponent of two of the least eigenvalue that is seen, beside the largest one."""


class KrylovCertificate(NamedTuple):
    """A floor on the gradient steps of every Krylov-span method.

    `steps`: the least t with gap_t / gap_0 <= the gap asked for, -1 if that is not reached within
    `max_steps`. `relative_gap` [t_max + 1]: gap_t / gap_0 for t = 0, 1, ..., rounded down, ending
    at zero if the spectrum is exhausted before max_steps. `slack`: the largest relative allowance
    for rounding among them, already taken off `relative_gap`.
    """

    steps: int
    relative_gap: Float[np.ndarray, "t+1"]
    slack: float


def krylov_certificate(
    eigenvalues: Num[np.ndarray, "d"],
    error_coefficients: Num[np.ndarray, "d"],
    *,
    relative_gap: float,
    max_steps: int | None = None,
) -> KrylovCertificate:
    r"""Least t for which some p in P_t, p(0) = 1, has sum h p(h)^2 c^2 <= relative_gap * sum h c^2.

    Runs on the host in NumPy. Equal eigenvalues are merged first, zero ones carry no loss and are
    dropped. `steps` is never above what conjugate gradients need in exact arithmetic, for the
    eigenvalues and coefficients as given, whatever their condition number and clusters; what
    rounding may have done is taken off each gap (`slack`, about 1e-12 d).

    Edge cases: zero error everywhere, or relative_gap >= 1, gives steps = 0. relative_gap = 0 gives
    the number of distinct eigenvalues with error, or fewer where the gap is below the smallest
    normal float64. Eigenvalues below 2^-900 of the largest are left out, which lowers the floor.

    Args:
      eigenvalues: h [d] >= 0, of the Hessian in any convention, of any float or integer dtype; tiny
        negative ones (above -d * eps of the largest) count as zero.
      error_coefficients: c [d], w_0 - w* in the eigenbasis; float or integer.
      relative_gap: target for (loss - minimum) / (initial loss - minimum), at least 0.
      max_steps: cap; None for the number of distinct eigenvalues. Cost is O(d max_steps^2).

    Returns:
      `KrylovCertificate`.

    Raises:
      ValueError: on shapes that differ, input that is not real numbers, is not finite, a negative
        eigenvalue or target.

    >>> certificate = krylov_certificate(np.array([1.0, 2.0, 4.0]), np.ones(3), relative_gap=1e-12)
    >>> certificate.steps
    3
    """
    h, h_eps = _real(eigenvalues, "eigenvalues")
    c, _ = _real(error_coefficients, "error_coefficients")
    if h.ndim != 1 or h.shape != c.shape or h.size == 0:
        raise ValueError(
            "eigenvalues and error_coefficients must be non-empty vectors of one length, got "
            f"shapes {h.shape} and {c.shape}."
        )
    if not relative_gap >= 0:
        raise ValueError(f"relative_gap must be >= 0, got {relative_gap}.")
    if max_steps is not None and max_steps < 0:
        raise ValueError(f"max_steps must be >= 0, got {max_steps}.")
    if np.min(h) < -h.size * h_eps * np.max(np.abs(h)):
        raise ValueError(
            f"eigenvalues must be >= 0, got {float(np.min(h)):.3g}; "
            "the certificate is about convex quadratics."
        )
    nodes, sizes, total = _distinct(h, c)
    if nodes.size == 0:
        return KrylovCertificate(0, np.zeros(1), 0.0)
    cap = nodes.size if max_steps is None else min(max_steps, nodes.size)
    gaps, slack = _floors(nodes, sizes, total, cap)
    # gap_t is at least every later one, so at least every later floor.
    gaps = np.maximum.accumulate(gaps[::-1])[::-1]
    reached = np.flatnonzero(gaps <= relative_gap)
    steps = int(reached[0]) if reached.size else -1
    return KrylovCertificate(steps, gaps, slack)


def _real(values, name: str) -> tuple[np.ndarray, float]:
    """Values as long double, and the eps of the dtype they came in (float64's for integers)."""
    values = np.asarray(values)
    floating = jnp.issubdtype(values.dtype, jnp.floating)  # bfloat16 is none to NumPy
    if not (floating or np.issubdtype(values.dtype, np.integer)):
        raise ValueError(f"{name} must be real numbers, got dtype {values.dtype}; convert them.")
    wide = values.astype(np.longdouble)
    if not np.all(np.isfinite(wide)):
        raise ValueError(f"{name} must be finite.")
    return wide, float(jnp.finfo(values.dtype).eps) if floating else _EPS


def _distinct(h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Distinct positive eigenvalues that carry loss, their sqrt(h c^2), and the sum of all h c^2.

    In units of the largest of each, so that nothing overflows. An eigenvalue below `_LEAST` of the
    largest is left out of the nodes and kept in the sum: the floor is lower without it.
    """
    top = np.max(np.abs(c))
    sizes = np.sqrt(np.maximum(h, 0)) * np.abs(c / top if top > 0 else c)
    carries = sizes > 0
    h, sizes = h[carries], sizes[carries]
    if h.size == 0:
        return h, sizes, 0.0
    nodes, where = np.unique(h, return_inverse=True)
    squares = np.zeros(nodes.shape, np.longdouble)
    np.add.at(squares, where, (sizes / np.max(sizes)) ** 2)
    total = float(np.sum(squares))
    _, exponents = np.frexp(nodes)
    seen = (exponents > exponents[-1] + _LEAST) & (squares > 0)
    nodes, squares = nodes[seen], squares[seen]
    return np.ldexp(nodes, -exponents[-1]), np.sqrt(squares), total


class _Scaled(NamedTuple):
    """mantissa * 2^exponent: products of hundreds of factors leave the range of any float."""

    mantissa: np.ndarray
    exponent: np.ndarray

    def times(self, factors: np.ndarray) -> _Scaled:
        mantissa, shift = np.frexp(self.mantissa * factors)
        return _Scaled(mantissa, self.exponent + shift)

    def over(self, factors: np.ndarray) -> _Scaled:
        mantissa, shift = np.frexp(self.mantissa / factors)
        return _Scaled(mantissa, self.exponent + shift)

    def at(self, where) -> _Scaled:
        return _Scaled(self.mantissa[where], self.exponent[where])

    def largest(self) -> int:
        """Index of the largest size; mantissas lie in [1/2, 1)."""
        exponent = np.where(self.mantissa == 0, np.iinfo(np.int64).min, self.exponent)
        top = np.flatnonzero(exponent == np.max(exponent))
        return int(top[np.argmax(np.abs(self.mantissa[top]))])

    def relative_to(self, exponent) -> np.ndarray:
        """Values divided by 2^exponent, in float64; tiny ones may become zero."""
        shift = np.clip(self.exponent - exponent, -2000, 2000)
        return np.ldexp(self.mantissa.astype(np.float64), shift)


def _floors(
    nodes: np.ndarray, sizes: np.ndarray, total: float, cap: int
) -> tuple[np.ndarray, float]:
    """Lower bounds of gap_t / gap_0 for t = 0 ... cap, and the largest relative slack."""
    count = nodes.size
    # Relative rounding: 3 a factor of a product, 1 a term of a sum, and some for the rest.
    gamma = (8 * cap + 2 * count + 64) * _EPS
    zero = np.zeros(count, np.int64)
    start = _Scaled(np.ones_like(sizes), zero).times(sizes)
    rest = start  # r: the weighted values of the polynomial that vanishes on the chosen nodes
    products = start.times(nodes)  # A
    without = _Scaled(np.ones_like(sizes), zero)  # B, of chosen nodes
    chosen: list[int] = []
    basis = np.zeros((cap, count))
    inverse_gaps = np.zeros((cap, count))  # 1 / (h_j - h_i) of the chosen i
    gaps, slack = np.zeros(cap + 1), 0.0
    gaps[0] = 1.0
    for t in range(1, cap + 1):
        if t == count:
            break  # a polynomial of this degree vanishes on the whole spectrum
        pivot = products.largest()
        differences = nodes - nodes[pivot]
        differences[pivot] = 1
        # The column of L, whose entries are at most 1 in size: products over their largest.
        column = products.over(products.mantissa[pivot]).relative_to(products.exponent[pivot])
        column[chosen] = 0
        for _ in range(2):
            column = column - (basis[: t - 1] @ column) @ basis[: t - 1]
        basis[t - 1] = column / np.sqrt(column @ column)

        own = products.at(pivot)
        without = _Scaled(without.mantissa.copy(), without.exponent.copy())
        updated = without.at(chosen).times(nodes[chosen] - nodes[pivot])
        without.mantissa[chosen], without.exponent[chosen] = updated
        without.mantissa[pivot], without.exponent[pivot] = own
        inverse_gaps[t - 1] = (1 / differences).astype(np.float64)
        chosen.append(pivot)
        products = products.times(differences)
        rest = rest.times(-differences / nodes[pivot])
        products.mantissa[chosen] = rest.mantissa[chosen] = 0

        unit = int(rest.exponent[rest.largest()])
        r = rest.relative_to(unit)
        v = r - (basis[:t] @ r) @ basis[:t]
        v = v - (basis[:t] @ v) @ basis[:t]
        v[chosen] = 0
        floor, tight = _dual_bound(v, r, products, without.at(chosen), inverse_gaps[:t], gamma)
        if not floor > 0:
            continue  # rounding decides: no floor
        slack = max(slack, 1 - (floor / tight) ** 2)
        gap = np.ldexp(floor / np.sqrt(total), max(unit, -3000)) ** 2 * (1 - gamma)
        gaps[t] = gap if gap >= np.finfo(np.float64).tiny else 0.0  # subnormals are rounded up, too
    return gaps, slack + gamma


def _dual_bound(v, r, products, without, inverse_gaps, gamma) -> tuple[float, float]:
    """(v . r) / sqrt(|v|^2 + |M^T v|^2), rounded down, and as computed."""
    # M^T v = sum_j A_j v_j / (h_j - h_i) / B_i, A in units of its largest.
    peak = int(products.exponent[products.largest()])
    scaled = products.relative_to(peak) * v
    lost = gamma * np.abs(scaled) + np.finfo(np.float64).tiny * np.abs(v)

    def in_units(sums):  # sums may be as large as what they are divided by
        ones = _Scaled(np.ones(len(sums)), np.full(len(sums), peak, np.int64))
        ratio = ones.times(sums).over(without.mantissa)
        return _Scaled(ratio.mantissa, ratio.exponent - without.exponent).relative_to(0)

    image = np.abs(in_units(inverse_gaps @ scaled))
    noise = np.abs(in_units(np.abs(inverse_gaps) @ lost))
    dot, dot_noise = float(v @ r), gamma * float(np.abs(v) @ np.abs(r))
    square = float(v @ v)
    floor = (dot - dot_noise) / np.sqrt((square + np.sum((image + noise) ** 2)) * (1 + gamma))
    return float(floor), float(dot / np.sqrt(square + np.sum(image**2)))
