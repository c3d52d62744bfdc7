"""Extreme singular values, condition numbers with bounds, the limit, the Krylov certificate.

Arrays in, arrays out; only jax and NumPy are imported. Everything but `krylov_certificate` (host,
NumPy long double) can be jitted and vmapped.

Which path when
---------------

**log kappa of features** (the l2-probe Hessian X^T X / n): `feature_condition_number(x)`, from the
singular values of X. Never form the Gram matrix first: in float32 and at kappa(X) = 1e4 that reads
4.7e8 where the truth is 1e8.

**log kappa of a Hessian or any dense matrix**: `condition_number(s)`. A kappa above 1 / eps of the
dtype comes back unbounded (`upper` = inf); take float64, or the features.

**log kappa of a matvec**: `operator_condition_number(...)`, which proves a lower bound, and an
upper one only where an inverse, damping, or good conditioning supplies it.

**Extreme triples**, as the regularisers need them: `singular_extremes(x)` follows
`choose_method(shape)`. Or call one path: `svd_extremes` (accurate), `eigh_extremes` (symmetric,
half the cost), `gram_extremes` (n x n or d x d side; half the digits), `inverse_krylov_extremes`
(positive definite, d of some hundreds or more), `damped_operator_extremes` (both of A + lam I where
no d x d matrix fits; residuals checked), `krylov_extremes` (only a matvec exists, or the
largest value is all that matters).

**The limit**: `pencil_from_factors(damped_factor(x_p, damping=...), damped_factor(x_h, ...))` for
accuracy, `pencil(k_p, k_h)` for speed or streamed Gram matrices; then `rir_limit`,
`limit_backbone`, `t_for_budget`, `constant_diagonal_rotation`.

**No linear predictor of a label at all**: `linear_eraser(label_moments(x, z))`, the affine map of
least cost after which every linear probe is as good as a constant; `merge_moments` for a stream.

**Several vmapped decompositions in one program on CPUs**: `batched.eigh`, `batched.svd`; those of
`jnp.linalg` can hang there (see the module).

**The rank of a float matrix as it is stored**, exactly: `modular_rank(x)`.

**A floor on attack steps**: `krylov_certificate(eigenvalues, error_coefficients, ...)`.

Two condition numbers compare only on one footing: the same tolerance, damping and dtype.
"""

from jaximm.linalg.condition import (
    DOMINANCE,
    Condition,
    Ratio,
    RelativeImmunisation,
    condition_number,
    feature_condition_number,
    log_ratio,
    operator_condition_number,
    relative_immunisation,
    rounding_radius,
)
from jaximm.linalg.erasure import (
    Eraser,
    LabelMoments,
    Moments,
    apply_eraser,
    erasure_cost,
    label_moments,
    linear_eraser,
    merge_moments,
)
from jaximm.linalg.extremes import (
    EXACT_SIDE,
    METHODS,
    Extremes,
    OperatorExtremes,
    choose_method,
    damped_operator_extremes,
    dominant_vector,
    eigh_extremes,
    gram_extremes,
    inverse_krylov_extremes,
    krylov_extremes,
    log_kappa_shift_bound,
    rank_rtol,
    singular_extremes,
    svd_extremes,
)
from jaximm.linalg.krylov import KrylovCertificate, krylov_certificate
from jaximm.linalg.lanczos import KrylovSpace, conjugate_gradient_inverse, lanczos
from jaximm.linalg.modular import modular_rank
from jaximm.linalg.pencil import (
    Pencil,
    constant_diagonal_rotation,
    damped_factor,
    limit_backbone,
    log_pencil_condition,
    pencil,
    pencil_from_factors,
    rir_limit,
    t_for_budget,
)

__all__ = [
    "DOMINANCE",
    "EXACT_SIDE",
    "METHODS",
    "Condition",
    "Eraser",
    "Extremes",
    "KrylovCertificate",
    "KrylovSpace",
    "LabelMoments",
    "Moments",
    "OperatorExtremes",
    "Pencil",
    "Ratio",
    "RelativeImmunisation",
    "apply_eraser",
    "choose_method",
    "condition_number",
    "conjugate_gradient_inverse",
    "constant_diagonal_rotation",
    "damped_factor",
    "damped_operator_extremes",
    "dominant_vector",
    "eigh_extremes",
    "erasure_cost",
    "feature_condition_number",
    "gram_extremes",
    "inverse_krylov_extremes",
    "krylov_certificate",
    "krylov_extremes",
    "label_moments",
    "lanczos",
    "limit_backbone",
    "linear_eraser",
    "log_kappa_shift_bound",
    "log_pencil_condition",
    "log_ratio",
    "merge_moments",
    "modular_rank",
    "operator_condition_number",
    "pencil",
    "pencil_from_factors",
    "rank_rtol",
    "relative_immunisation",
    "rir_limit",
    "rounding_radius",
    "singular_extremes",
    "svd_extremes",
    "t_for_budget",
]
