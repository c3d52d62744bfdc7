"""Certificates: numbers that no method, or no attacker of a named class, can beat."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from jaximm import linalg
from jaximm.records.result import TARGETS

THREAT_MODEL = (
    "iterates from w = 0 in the span of gradients: gradient descent with any schedule, momentum, "
    "Nesterov, conjugate gradients; not a preconditioner"
)
ONE_FOR_ALL = "; one optimiser for the weights of all targets together, not one for each"


def floors(
    eigenvalues: Float[np.ndarray, "d"],
    coefficients: Float[np.ndarray, "d"] | Float[np.ndarray, "d k"],
) -> dict[str, int]:
    """The Krylov floor in steps for each of `TARGETS`.

    With k targets an attacker's error after t steps is p(H) times each column of the error, with
    one polynomial p for all columns: the excess loss is sum_i h_i p(h_i)^2 (sum_j c_ij^2) / 2, so
    the floor is that of one target whose squared coefficients are those sums. An attacker that
    tunes each target by itself has k polynomials and may be faster.

    Args:
      eigenvalues: of the Hessian.
      coefficients: the error at the start in its eigenbasis; a column a target.
    """
    if coefficients.ndim == 2:
        coefficients = np.linalg.norm(coefficients.astype(np.longdouble), axis=1)
    least = min(float(target) for target in TARGETS)
    cap = 32
    certificate = linalg.krylov_certificate(
        eigenvalues, coefficients, relative_gap=least, max_steps=cap
    )
    while certificate.steps < 0:  # the cost grows as d steps^2: look no further than needed
        cap *= 2
        certificate = linalg.krylov_certificate(
            eigenvalues, coefficients, relative_gap=least, max_steps=cap
        )
    gaps = certificate.relative_gap
    return {target: int(np.flatnonzero(gaps <= float(target))[0]) for target in TARGETS}
