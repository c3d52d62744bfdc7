r"""The Krylov certificate: the least number of gradient steps that reaches a loss gap.

On a quadratic with Hessian eigenvalues h_i and initial error coefficients c_i, every method whose
iterates stay in w_0 + span{g_0, ..., g_{t-1}} (gradient descent with any schedule, momentum,
Nesterov, conjugate gradients, L-BFGS from a multiple of the identity) has after t steps the error
p(H) (w_0 - w*), p a polynomial of degree at most t with p(0) = 1. So its loss gap is at least that
of t exact conjugate-gradient steps,

    gap_t = 1/2 min over p of sum_i h_i p(h_i)^2 c_i^2.

It says nothing about methods that leave that span: Adam, preconditioning, whitening, closed forms.
A step is one new gradient: a line search that evaluates several counts each of them.

Nemirovski and Yudin (1983), Problem Complexity and Method Efficiency in Optimization;
Saad (2003), Iterative Methods for Sparse Linear Systems (2nd ed.), section 6.11.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class KrylovCertificate(NamedTuple):
    """A floor on the gradient steps of every Krylov-span method.

    `steps`: the least t with gap_t / gap_0 <= the gap asked for, -1 if that is not reached within
    `max_steps`. `relative_gap` [t_max + 1]: gap_t / gap_0 for t = 0, 1, ..., rounded down, ending
    at zero if the spectrum is exhausted before max_steps. `slack`: the relative allowance for
    rounding, already taken off `relative_gap`.
    """

    steps: int
    relative_gap: Float[np.ndarray, "t+1"]
    slack: float


def krylov_certificate(
    eigenvalues: Float[np.ndarray, "d"],
    error_coefficients: Float[np.ndarray, "d"],
    *,
    relative_gap: float,
    max_steps: int | None = None,
) -> KrylovCertificate:
    r"""Least t for which some p in P_t, p(0) = 1, has sum h p(h)^2 c^2 <= relative_gap * sum h c^2.

    The minimum is the distance, in R^d, of f = (sqrt(h_i) c_i) from span{h f, ..., h^t f}: an
    orthonormal basis of that space by Lanczos with full (double) reorthogonalisation, in NumPy's
    long double, on the host. Equal eigenvalues are merged first, zero ones carry no loss and are
    dropped. The basis spans the Krylov space of a spectrum perturbed by about eps * h_max (1e-19
    where long double has 64 bits), and the distance itself is right to about 16 eps d |f|. Both are
    taken off: sqrt(gap_t) by the second, then gap_t by a factor 1 - slack,
    slack = 1e-9 + 64 eps d kappa, capped at 1/2, so that rounding never makes `steps` too large.
    Beyond kappa = 1 / (128 eps d), 2e14 at d = 200, the cap makes that a practice and not a claim.

    Edge cases: zero error everywhere, or relative_gap >= 1, gives steps = 0. relative_gap = 0 gives
    the number of distinct eigenvalues with error, or fewer where the gap rounds to zero.

    Args:
      eigenvalues: h [d] >= 0, of the Hessian in any convention; tiny negative ones (above -d * eps
        of the largest) count as zero.
      error_coefficients: c [d], w_0 - w* in the eigenbasis.
      relative_gap: target for (loss - minimum) / (initial loss - minimum), at least 0.
      max_steps: cap; None for the number of distinct eigenvalues. Cost is O(d max_steps^2).

    Returns:
      `KrylovCertificate`.

    Raises:
      ValueError: on shapes that differ, non-finite input, a negative eigenvalue or target.

    >>> found = krylov_certificate(np.array([1.0, 2.0, 4.0]), np.ones(3), relative_gap=1e-12)
    >>> found.steps
    3
    """
    h = np.asarray(eigenvalues, np.longdouble)
    c = np.asarray(error_coefficients, np.longdouble)
    if h.ndim != 1 or h.shape != c.shape or h.size == 0:
        raise ValueError(
            "eigenvalues and error_coefficients must be non-empty vectors of one length, got "
            f"shapes {h.shape} and {c.shape}."
        )
    if not (np.all(np.isfinite(h)) and np.all(np.isfinite(c))):
        raise ValueError("eigenvalues and error_coefficients must be finite.")
    if not relative_gap >= 0:
        raise ValueError(f"relative_gap must be >= 0, got {relative_gap}.")
    if max_steps is not None and max_steps < 0:
        raise ValueError(f"max_steps must be >= 0, got {max_steps}.")
    if np.min(h) < -h.size * np.finfo(np.asarray(eigenvalues).dtype).eps * np.max(np.abs(h)):
        raise ValueError(
            f"eigenvalues must be >= 0, got {float(np.min(h)):.3g}; "
            "the certificate is about convex quadratics."
        )
    nodes, weights = _distinct(h, c)
    if nodes.size == 0:
        return KrylovCertificate(0, np.zeros(1), 0.0)
    eps = float(np.finfo(np.longdouble).eps)
    slack = min(1e-9 + 64 * eps * nodes.size * float(nodes[-1] / nodes[0]), 0.5)
    cap = nodes.size if max_steps is None else min(max_steps, nodes.size)
    distances = np.sqrt(_minimal_gaps(nodes, weights, cap))
    gaps = np.maximum(distances - 16 * eps * nodes.size, 0.0) ** 2 * (1 - slack)
    gaps[0] = 1.0
    if cap == nodes.size:
        gaps[cap] = 0.0  # a polynomial of this degree vanishes on the whole spectrum
    reached = np.flatnonzero(gaps <= relative_gap)
    steps = int(reached[0]) if reached.size else -1
    return KrylovCertificate(steps, gaps, slack)


def _distinct(h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct positive eigenvalues that carry loss, ascending, and their loss h c^2."""
    nodes, where = np.unique(h, return_inverse=True)
    weights = np.zeros(nodes.shape, np.longdouble)
    np.add.at(weights, where, h * c**2)
    carries = (nodes > 0) & (weights > 0)
    return nodes[carries], weights[carries]


def _minimal_gaps(nodes: np.ndarray, weights: np.ndarray, cap: int) -> np.ndarray:
    """gap_t / gap_0 for t = 0 ... cap, before the allowance for rounding."""
    nodes = nodes / nodes[-1]
    rest = np.sqrt(weights / np.sum(weights))  # f, then what the space so far cannot reach
    basis = np.zeros((cap, nodes.size), np.longdouble)
    gaps = np.zeros(cap + 1)
    gaps[0] = 1.0
    floor = nodes.size * np.finfo(np.longdouble).eps
    candidate = nodes * rest
    for t in range(cap):
        size = np.sqrt(candidate @ candidate)
        for _ in range(2):
            candidate = candidate - (basis[:t] @ candidate) @ basis[:t]
        length = np.sqrt(candidate @ candidate)
        if length <= floor * size:  # the space is exhausted: an exact solution lies in it
            break
        basis[t] = candidate / length
        rest = rest - (basis[t] @ rest) * basis[t]
        gaps[t + 1] = rest @ rest
        candidate = nodes * basis[t]
    return gaps
