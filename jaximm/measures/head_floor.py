r"""The floor under every linear head: the optimum of a convex loss, with a certificate.

On frozen features X [n, d] the best head is the minimum of a convex function, so what an optimiser
has reached can be compared with what no optimiser can pass:

    squared         P(W)    = |X W - Y|^2 / (2 n)                       + penalty |W|^2 / 2
    cross-entropy   P(W, b) = mean_i [lse(x_i W + b) - (x_i W + b)_y_i] + penalty |W|^2 / 2

(lse: log-sum-exp over the classes). For any residuals A [n, .] in the domain of the conjugate loss
f*, weak duality (Fenchel) says

    P >= D(A) = -(1/n) sum_i f_i*(a_i) - |X^T A / n|^2 / (2 penalty)

with no appeal to how A was found, and the residuals of the optimum make it an equality. So D is the
certificate: for *every* head the loss alone is at least D - penalty |W|^2 / 2, and a head of norm
at most B has a loss of at least D - penalty B^2 / 2 (`floor_for_norm`).

The bias b of the cross-entropy is free: not penalised, and not part of a head's norm. Its price is
the constraint sum_i a_i = 0, which approximate residuals softmax(scores) - onehot do not meet; they
are mixed with one constant distribution, by as little as meets it. Everything runs in float64
NumPy on the host, whatever the precision of the features and of JAX.

Boyd and Vandenberghe (2004), Convex Optimization, sections 3.3 and 5.1; Yu, Huang and Lin (2011),
Dual coordinate descent methods for logistic regression and maximum entropy models,
https://doi.org/10.1007/s10994-010-5221-8, for the dual; Nocedal and Wright (2006), Numerical
Optimization, algorithm 7.1, for the solver.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Num

Loss = Literal["squared", "cross_entropy"]

_EPS = float(np.finfo(np.float64).eps)


class HeadFloor(NamedTuple):
    """The optimum of a head, and the certificate that no head passes.

    For every head of kernel W (and any bias, for the cross-entropy):

        loss(W) >= dual - penalty |W|^2 / 2 - leak |W|,

    the loss without its penalty, on the rows of the floor. `leak` is 0 but for the squared loss
    without penalty, where it is what rounding leaves of the gradient at the optimum.
    """

    primal: float  # loss and penalty of `weights`
    dual: float  # the certificate, rounding already taken off
    gap: float  # primal - dual, >= 0
    weights: Float[np.ndarray, "d *k"]  # the optimum, as far as it was found
    penalty: float  # on |W|^2 / 2, in units of loss / weight^2
    converged: bool  # the gap is within tolerance; without it the dual holds, but is not tight
    bias: Float[np.ndarray, "*k"]  # zeros for the squared loss; -inf for a class without rows
    loss: Loss
    leak: float = 0.0


def squared_floor(
    features: Num[np.ndarray | Array, "n d"],
    targets: Num[np.ndarray | Array, "n"] | Num[np.ndarray | Array, "n k"],
    *,
    penalty: float = 0.0,
    tolerance: float = 1e-8,
) -> HeadFloor:
    r"""The least |X W - Y|^2 / (2 n) + penalty |W|^2 / 2, in closed form.

    From the SVD of X, W = V diag(s / (s^2 + n penalty)) U^T Y. There is no intercept, as in
    `jaximm.attacks.probe_problem`; give `with_constant(features)` for one. One-hot rows are
    targets like any other. The dual is evaluated at the residuals A = X W - Y,

        D(A) = -(1/n) sum_i [ |a_i|^2 / 2 + a_i . y_i ] - |X^T A / n|^2 / (2 penalty),

    so an inexact SVD costs tightness and not truth; the gap is rounding.

    Edge cases: n < d and rank-deficient features are fine. Without penalty singular values below
    max(n, d) eps of the largest count as zero and the last term is `leak` |W|: a head that gains
    from such a direction needs a norm of about 1 / leak. A floor below zero is reported as 0.

    Args:
      features: X, real numbers of any dtype; cast up to float64.
      targets: Y [n] or [n, k].
      penalty: >= 0, mean convention: n times smaller than the one that goes with |X W - Y|^2 / 2.
      tolerance: `converged` says whether gap <= tolerance * primal. A perfect fit has a primal that
        is rounding itself and does not meet it; its dual is 0, which is right.

    Returns:
      A `HeadFloor`.

    Raises:
      ValueError: no rows or columns, mismatched rows, NaN or inf, a negative penalty.

    >>> floor = squared_floor(np.array([[1.0], [1.0]]), np.array([1.0, 3.0]))
    >>> round(floor.dual, 6), floor.weights.round(6).tolist()
    (0.5, [2.0])
    """
    features = _checked_features(features)
    targets = np.asarray(targets)
    n, d = features.shape
    if targets.ndim not in (1, 2) or targets.shape[0] != n or targets.size == 0:
        raise ValueError(
            f"targets must be [n] = ({n},) or [n, k], one per row of features, got shape "
            f"{targets.shape}."
        )
    targets = _finite(targets, "targets")
    if not 0 <= penalty < math.inf:
        raise ValueError(f"penalty must be finite and >= 0, got {penalty}.")

    columns = targets.reshape(n, -1)
    left, sigma, right_t = np.linalg.svd(features, full_matrices=False)
    kept = sigma > max(n, d) * _EPS * sigma[0]
    if penalty > 0:
        kept = sigma > 0
    safe = np.where(kept, sigma, 1.0)
    gains = np.where(kept, safe / (safe**2 + n * penalty), 0.0)
    weights = right_t.T @ (gains[:, None] * (left.T @ columns))
    residuals = features @ weights - columns

    fit = float(np.sum(residuals**2)) / (2 * n)
    primal = fit + penalty * float(np.sum(weights**2)) / 2
    slope = _gradient_norm(features, residuals)  # of the loss in W: an upper bound on its norm
    value = -fit - float(np.sum(residuals * columns)) / n
    value -= _sum_slack(n) * float(np.sum(residuals**2 + np.abs(residuals * columns))) / n
    if penalty > 0:
        value -= slope**2 / (2 * penalty)
    dual = max(value, 0.0)
    gap = max(primal - dual, 0.0)
    return HeadFloor(
        primal=primal,
        dual=dual,
        gap=gap,
        weights=weights.reshape(d, *targets.shape[1:]),
        penalty=float(penalty),
        converged=gap <= tolerance * primal,
        bias=np.zeros(targets.shape[1:]),
        loss="squared",
        leak=slope if penalty == 0 else 0.0,
    )


def cross_entropy_floor(
    features: Num[np.ndarray | Array, "n d"],
    labels: Int[np.ndarray | Array, "n"],
    *,
    classes: int,
    penalty: float,
    tolerance: float = 1e-8,
    max_steps: int = 200,
) -> HeadFloor:
    r"""The least mean cross-entropy + penalty |W|^2 / 2 of a linear layer with a free bias.

    Newton's method, each step by conjugate gradients on the exact Hessian, preconditioned with its
    diagonal in the basis of the centred features' singular vectors: the features' condition number
    then plays next to no part. With Q = softmax(scores) and A = Q - onehot the dual is

        D(A) = (1/n) sum_i H(q_i) - |X^T A / n|^2 / (2 penalty),   H the entropy in nats.

    For sum_i a_i = 0, Q is replaced by (1 - e) Q + e 1 z^T with z = (ybar - (1 - e) qbar) / e, ybar
    and qbar the column means: one more distribution for every row, with the least e in [0, 1] for
    which z >= 0. At the optimum e = 0.

    Edge cases: separable rows are fine, since the penalty keeps the optimum finite; n < d is. A
    class without rows has a kernel of 0 and a bias of -inf at the optimum, which costs nothing; the
    dual holds for the heads of all classes.

    Args:
      features: X, real numbers of any dtype; cast up to float64.
      labels: integers in 0..classes-1.
      classes: k >= 2.
      penalty: > 0, on the kernel only.
      tolerance: stop at gap <= tolerance * primal + 1e-13 nats, what rounding leaves.
      max_steps: Newton steps at most.

    Returns:
      A `HeadFloor`; `converged` is False if the gap stays above the tolerance, because the steps
      ran out or because the penalty is so small that rounding decides. The dual holds either way.

    Raises:
      ValueError: no rows or columns, mismatched rows, NaN or inf, labels that are not integers or
        outside of 0..classes-1, a penalty that is not > 0.

    >>> features, labels = np.zeros((4, 1)), np.array([0, 0, 1, 1])  # features that say nothing
    >>> floor = cross_entropy_floor(features, labels, classes=2, penalty=1.0)
    >>> round(floor.dual, 6), floor.converged  # log 2
    (0.693147, True)
    """
    features = _checked_features(features)
    labels = np.asarray(labels)
    n, d = features.shape
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels must be integers [n] = ({n},), one per row of features, got "
            f"{labels.dtype}{list(labels.shape)}."
        )
    if classes < 2:
        raise ValueError(f"classes must be at least 2, got {classes}.")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must be in 0..{classes - 1}, got {labels.min()}..{labels.max()}.")
    if not 0 < penalty < math.inf:
        raise ValueError(
            f"penalty must be finite and > 0, got {penalty}: on separable rows the cross-entropy "
            "alone has no minimum, and without penalty there is no certificate."
        )

    present, where = np.unique(labels, return_inverse=True)
    onehot = np.eye(len(present))[where]
    mean = np.mean(features, axis=0)
    centred = features - mean  # the bias takes the difference, so the floor is the same
    basis = _row_basis(centred)
    rotated = centred @ basis
    point = _Point(np.zeros((basis.shape[1], len(present))), np.log(np.mean(onehot, axis=0)))

    best_dual, best_primal = 0.0, math.inf
    for step in range(max_steps + 1):
        probabilities, losses = _softmax(rotated @ point.kernel + point.bias, where)
        primal = float(np.mean(losses)) + penalty * float(np.sum(point.kernel**2)) / 2
        dual = _cross_entropy_dual(centred, probabilities, onehot, penalty)
        stuck = primal >= best_primal and dual <= best_dual  # rounding decides from here
        best_dual, best_primal = max(dual, best_dual), min(primal, best_primal)
        if primal - best_dual <= _allowed(primal, tolerance) or stuck or step == max_steps:
            break
        moved = _newton_step(rotated, onehot, where, penalty, point, probabilities, primal)
        if moved is None:
            break
        point = moved

    kernel = basis @ point.kernel
    weights = np.zeros((d, classes))
    bias = np.full(classes, -math.inf)
    weights[:, present] = kernel
    bias[present] = point.bias - mean @ kernel
    gap = max(primal - best_dual, 0.0)  # pyrefly: ignore[unbound-name]
    return HeadFloor(
        primal=primal,
        dual=best_dual,
        gap=gap,
        weights=weights,
        penalty=float(penalty),
        converged=gap <= _allowed(primal, tolerance),
        bias=bias,
        loss="cross_entropy",
    )


def floor_for_norm(floor: HeadFloor, norm: float | np.floating[Any]) -> float:
    """The loss that no head of kernel norm at most `norm` gets below, without its penalty.

    max(0, dual - penalty norm^2 / 2 - leak norm). It is tight at the norm of the floor's own
    optimum and loose far from it: for another norm take the greatest over floors of several
    penalties.

    Args:
      floor: from `squared_floor` or `cross_entropy_floor`.
      norm: Frobenius norm of the kernel, >= 0; the bias of the cross-entropy does not count.

    Raises:
      ValueError: a norm that is negative or NaN.
    """
    if not norm >= 0:
        raise ValueError(f"norm must be >= 0, got {norm}.")
    norm = float(norm)
    terms = ((floor.penalty / 2, norm * norm), (floor.leak, norm))
    taken = sum(factor * size for factor, size in terms if factor > 0)  # not 0 * inf
    return max(floor.dual - taken, 0.0)


def head_floor_row(floor: HeadFloor, *, norm: float | None = None) -> dict[str, Any]:
    """A floor as a certificate: what an assessment's row says of it.

    Args:
      floor: from `squared_floor` or `cross_entropy_floor`.
      norm: state the floor of heads of at most this kernel norm, on the loss alone; without it the
        row is about the loss and the penalty together, for heads of every norm.

    Raises:
      ValueError: a norm that is negative or NaN.
    """
    squared = floor.loss == "squared"
    name = "squared loss" if squared else "cross-entropy"
    value = floor.dual if norm is None else floor_for_norm(floor, norm)
    head = "linear head, no intercept" if squared else "linear head with any bias"
    if norm is None and floor.penalty > 0:
        measured = f"mean {name} + {floor.penalty:g}/2 |W|^2"
    elif norm is None:
        measured = f"mean {name}"
    else:
        measured, head = f"mean {name}", f"{head} and |W| <= {norm:g}"
    return {
        "name": f"head_floor_{floor.loss}",
        "threat_model": (
            f"{head}, any optimiser, preconditioned or closed form too, on these frozen features "
            f"and training rows: {measured}; not a change of the features"
        ),
        "value": value,
        "unit": "squared target" if squared else "nats",
        "target": "",
    }


class _Point(NamedTuple):
    """A head in the basis of the singular vectors."""

    kernel: np.ndarray  # [r, k]
    bias: np.ndarray  # [k]


def _checked_features(features) -> np.ndarray:
    """Features as finite float64 [n, d], or ValueError."""
    features = np.asarray(features)
    if features.ndim != 2 or features.size == 0:
        raise ValueError(
            f"features must be [n, d] with rows and columns, got shape {features.shape}."
        )
    return _finite(features, "features")


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    """Values as float64, or ValueError."""
    values = values.astype(np.float64)
    if not np.all(np.isfinite(values)):
        raise ValueError(f"{name} hold NaN or inf; drop or impute those rows first.")
    return values


def _allowed(primal: float, tolerance: float) -> float:
    """The gap of a converged floor: relative, or what rounding leaves of a loss near zero."""
    return tolerance * primal + 1e-13


def _row_basis(centred: np.ndarray) -> np.ndarray:
    """Right singular vectors [d, r] of the rows; the optimum has no part outside their span."""
    n, d = centred.shape
    small = np.linalg.qr(centred, mode="r") if n > d else centred
    return np.linalg.svd(small, full_matrices=False)[2].T


def _softmax(scores: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n, k] and the cross-entropy of each row [n]."""
    rows = np.arange(len(where))
    # Relative to the label's score, so that a small loss is a log1p of small terms and not the
    # difference of two scores.
    margins = scores - scores[rows, where][:, None]
    peak = np.argmax(margins, axis=1)
    top = margins[rows, peak]
    weights = np.exp(margins - top[:, None])
    rest = weights.copy()
    rest[rows, peak] = 0.0
    losses = top + np.log1p(np.sum(rest, axis=1))
    return weights / np.sum(weights, axis=1, keepdims=True), losses


def _cross_entropy_dual(
    centred: np.ndarray, probabilities: np.ndarray, onehot: np.ndarray, penalty: float
) -> float:
    """D at the given distributions, made feasible, with rounding taken off."""
    have, want = np.mean(probabilities, axis=0), np.mean(onehot, axis=0)
    excess = np.where(have > want, 1 - want / np.where(have > 0, have, 1.0), 0.0)
    share = float(np.max(excess))
    feasible = probabilities
    if share > 0:
        mixed_in = np.maximum((want - (1 - share) * have) / share, 0.0)
        feasible = (1 - share) * probabilities + share * mixed_in
    n, k = feasible.shape
    safe = np.where(feasible > 0, feasible, 1.0)
    entropy = float(np.sum(-feasible * np.log(safe))) / n
    entropy -= _sum_slack(n * k) * entropy + 8 * _EPS * k
    return entropy - _gradient_norm(centred, feasible - onehot) ** 2 / (2 * penalty)


def _gradient_norm(features: np.ndarray, residuals: np.ndarray) -> float:
    """|X^T A / n|, plus what rounding may have done to each entry of the product."""
    n = len(features)
    product = features.T @ residuals / n
    rounding = _sum_slack(n) * (np.abs(features).T @ np.abs(residuals)) / n
    return float(np.linalg.norm(product) + np.linalg.norm(rounding))


def _sum_slack(n: int) -> float:
    """Rounding of a sum of n terms, relative to the sum of their sizes.

    lambda sqrt(n) eps / 2 with lambda = 8, which holds but for a chance of about exp(-lambda^2 / 2)
    (Higham and Mary, 2019, https://doi.org/10.1137/18M1226312).
    """
    return 4 * math.sqrt(n) * _EPS


def _newton_step(
    rotated: np.ndarray,
    onehot: np.ndarray,
    where: np.ndarray,
    penalty: float,
    point: _Point,
    probabilities: np.ndarray,
    primal: float,
) -> _Point | None:
    """One Newton step with backtracking, or None if nothing along it lowers the objective."""
    n = len(rotated)
    residuals = probabilities - onehot
    gradient = _Point(
        rotated.T @ residuals / n + penalty * point.kernel, np.mean(residuals, axis=0)
    )
    diagonal = _Point(
        (rotated**2).T @ probabilities / n + penalty,
        np.maximum(np.mean(probabilities, axis=0), np.finfo(np.float64).tiny),
    )

    def product(vector: _Point) -> _Point:
        change = rotated @ vector.kernel + vector.bias
        pulled = probabilities * change
        pulled -= probabilities * np.sum(pulled, axis=1, keepdims=True)
        return _Point(rotated.T @ pulled / n + penalty * vector.kernel, np.mean(pulled, axis=0))

    direction = _conjugate_gradients(product, gradient, diagonal)
    slope = _inner(gradient, direction)
    size = 1.0
    while slope < 0 and size > 1e-10:
        moved = _added(point, direction, size)
        _, losses = _softmax(rotated @ moved.kernel + moved.bias, where)
        value = float(np.mean(losses)) + penalty * float(np.sum(moved.kernel**2)) / 2
        if value <= primal + 1e-4 * size * slope + 16 * _EPS * primal:
            return moved
        size /= 2
    return None


def _conjugate_gradients(
    product, gradient: _Point, diagonal: _Point, *, max_steps: int = 300
) -> _Point:
    """Minus the inverse Hessian times the gradient, `diagonal` to precondition."""

    def scaled(vector: _Point) -> _Point:
        # diag(p) - p p^T has the pseudo-inverse C diag(1 / p) C, C centring over classes. Without C
        # a common shift of all classes, in which the loss is flat, would be stirred up.
        return _Point(
            _class_centred(vector.kernel / diagonal.kernel),
            _class_centred(vector.bias / diagonal.bias),
        )

    step = _Point(np.zeros_like(gradient.kernel), np.zeros_like(gradient.bias))
    residual = _Point(-gradient.kernel, -gradient.bias)
    direction = scaled(residual)
    square = _inner(residual, direction)
    # The smaller the gradient, the more exactly its step is solved for: superlinear in the end.
    target = square * min(1e-2, square)
    for _ in range(max_steps):
        if square <= target:
            break
        curved = product(direction)
        curvature = _inner(direction, curved)
        if curvature <= 0:  # the shift of all biases, along which nothing changes
            break
        size = square / curvature
        step, residual = _added(step, direction, size), _added(residual, curved, -size)
        conditioned = scaled(residual)
        before, square = square, _inner(residual, conditioned)
        direction = _added(conditioned, direction, square / before)
    return step


def _class_centred(values: np.ndarray) -> np.ndarray:
    """Values less their mean over the classes."""
    return values - np.mean(values, axis=-1, keepdims=True)


def _inner(first: _Point, second: _Point) -> float:
    """Inner product."""
    return float(np.sum(first.kernel * second.kernel) + np.sum(first.bias * second.bias))


def _added(first: _Point, second: _Point, size: float) -> _Point:
    """first + size second."""
    return _Point(first.kernel + size * second.kernel, first.bias + size * second.bias)
