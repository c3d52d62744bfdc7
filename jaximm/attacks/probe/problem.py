r"""Linear-probe attackers: the problem, the protocol and the one loop that runs them all.

An attacker fits a linear probe on frozen features `X` [n, d] with targets `y` [n],

    L(w) = |X w - y|^2 / (2 n) + penalty |w|^2 / 2,      H = X^T X / n + penalty I,   b = X^T y / n,

or with k targets `Y` [n, k] and weights [d, k], the squares summed over all of them; class labels
become k one-hot targets. The Hessian of all k d weights is I_k (x) H: the same eigenvalues, each k
times, so step sizes and grids carry over. An attacker treats the k d weights as one vector, with
one step size, one momentum, one line search for all, as an optimiser in a training loop would.
It is a quadratic, so everything about it is known: its spectrum, its optimum `w*`, and the excess
loss `L(w) - L(w*) = (w - w*)^T H (w - w*) / 2`. That form is used throughout; the difference of
two nearly equal losses is never taken.

Two numbers are followed at *every* step, each relative to its value at the start `w0`:

    relative excess loss       (L(w) - L(w*)) / (L(w0) - L(w*))
    relative parameter error   |P (w - w*)| / |P (w0 - w*)|,  P the projector on the row space of X.

**Execution.** The path of gradient descent, momentum, conjugate gradients, L-BFGS, whitening and
ridge does not depend on the axes: rotating the features rotates the iterates. Those attackers
(`rotation_equivariant=True`) run in the eigenbasis of H, where a step costs O(d) instead of
O(n d). It is the same algorithm with the same step counts; the FLOPs reported are those that the
attacker pays in the original axes, where he does not have the eigenbasis. Attackers that single
out the axes (Adam, diagonal scaling) run in the original ones.

**An attacker of your own** needs two functions and a cost; `jaximm.register` puts it in REGISTRY
beside the others:

>>> import jax.numpy as jnp
>>> from typing import NamedTuple
>>> from jaximm.attacks import Attack, Cost, probe_problem, run_attack
>>> class State(NamedTuple):
...     weights: object
>>> def init(problem, hyper):
...     return State(problem.initial_weights)
>>> def update(state, problem, hyper):  # descends along the sign of the gradient
...     return State(state.weights - hyper["step"] * jnp.sign(problem.gradient(state.weights)))
>>> sign_descent = Attack(init=init, update=update, kind="adaptive",
...                       flops=lambda n, d: Cost(setup=0.0, step=4.0 * n * d))
>>> problem = probe_problem(jnp.eye(3), jnp.array([1.0, 1.0, 1.0]))
>>> trace = run_attack(sign_descent, problem, [{"step": 0.25}, {"step": 0.125}], steps=20)
>>> trace.steps_to_loss_gap[:, 0, 1].tolist()  # cells x seeds x targets: to 1e-2
[4, 8]
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaximm import objectives
from jaximm.attacks.grid import Attacker, Hyper
from jaximm.types import State

Weights = Float[Array, "d"] | Float[Array, "d k"]
"""Weights of a probe, or a vector of that shape: one column a target if there are several."""

TARGETS = (1e-1, 1e-2, 1e-3)
"""Relative levels whose first crossing is counted, for the excess loss and the parameter error."""


class ProbeProblem(NamedTuple):
    """A least-squares probe with its spectrum and its solution; see `probe_problem`.

    Of one target, weights are vectors [d]; of k targets, `targets` is [n, k] and `moment`,
    `optimum`, `initial_weights` and `error_coefficients` are [d, k], like every vector of weights.

    The eigen-decomposition is that of `hessian`, eigenvalues descending. In the *diagonal form*
    (`problem.diagonal()`) every vector is expressed in the eigenbasis, `hessian` is the vector of
    eigenvalues, and `features`, `targets` and `eigenvectors` are None; the methods work in both.
    """

    features: Float[Array, "n d"] | None
    targets: Float[Array, "n"] | Float[Array, "n k"] | None
    hessian: Float[Array, "d d"] | Float[Array, "d"]  # mean convention, penalty included
    moment: Weights  # b = X^T y / n
    eigenvalues: Float[Array, "d"]  # of hessian, descending; 0 outside the row space
    eigenvectors: Float[Array, "d d"] | None  # columns
    in_row_space: Bool[Array, "d"]  # eigen-directions with singular value above tolerance
    rank: Int[Array, ""]
    tolerance: Float[Array, ""]  # on the singular values of X
    penalty: Float[Array, ""]
    target_energy: Float[Array, ""]  # |y|^2 / n
    optimum: Weights  # w*, of minimum norm
    optimal_loss: Float[Array, ""]
    initial_weights: Weights  # w0
    initial_loss: Float[Array, ""]
    initial_excess_loss: Float[Array, ""]
    error_coefficients: Weights  # V^T (w0 - w*)
    n_rows: Int[Any, ""]  # an attacker works through: `features`, or more that these stand for

    @property
    def is_diagonal(self) -> bool:
        """Whether this is the diagonal form."""
        return self.eigenvectors is None

    @property
    def largest(self) -> Float[Array, ""]:
        """The largest eigenvalue of the Hessian (1 if the Hessian is zero, so as to divide by)."""
        return jnp.where(self.eigenvalues[0] > 0, self.eigenvalues[0], 1.0)

    @property
    def smallest(self) -> Float[Array, ""]:
        """The smallest Hessian eigenvalue over the row space of the features."""
        return jnp.min(jnp.where(self.in_row_space, self.eigenvalues, self.largest))

    @property
    def weight_scale(self) -> Float[Array, ""]:
        """sqrt((|y|^2/n) / (k tr H)): weights of this size give outputs as large as the targets.

        1 where it would be zero or infinite. Step sizes and starts in units of it do not depend on
        the units of features or targets.
        """
        return _weight_scale(self.eigenvalues, self.target_energy, self.optimum.shape)

    def hvp(self, vector: Weights) -> Weights:
        """Hessian times `vector`."""
        if self.hessian.ndim == 1:
            return per_row(self.hessian, vector) * vector
        return jnp.matmul(self.hessian, vector, precision="highest")

    def gradient(self, weights: Weights) -> Weights:
        """Gradient of the loss, H w - b."""
        return self.hvp(weights) - self.moment

    def to_eigenbasis(self, vector: Weights) -> Weights:
        """V^T times `vector` (the vector itself in the diagonal form)."""
        if self.eigenvectors is None:
            return vector
        return jnp.matmul(self.eigenvectors.T, vector, precision="highest")

    def from_eigenbasis(self, coefficients: Weights) -> Weights:
        """V times `coefficients` (the vector itself in the diagonal form)."""
        if self.eigenvectors is None:
            return coefficients
        return jnp.matmul(self.eigenvectors, coefficients, precision="highest")

    def solve(self, vector: Weights, *, damping: Float[Array, ""] | float = 0.0) -> Weights:
        """(H + damping I)^+ times `vector`; directions in which H is zero give zero."""
        shifted = self.eigenvalues + damping
        curved = self.eigenvalues > 0  # all of them if there is a penalty
        inverse = jnp.where(curved, 1.0 / jnp.where(curved, shifted, 1.0), 0.0)
        return self.from_eigenbasis(per_row(inverse, vector) * self.to_eigenbasis(vector))

    def excess_loss(self, weights: Weights) -> Float[Array, ""]:
        """L(w) - L(w*), as the sum over the spectrum of h_i e_i^2 / 2."""
        return excess_loss(self.eigenvalues, self.to_eigenbasis(weights - self.optimum))

    def parameter_error(self, weights: Weights) -> Float[Array, ""]:
        """|w - w*| within the row space of the features."""
        return row_space_norm(self.in_row_space, self.to_eigenbasis(weights - self.optimum))

    def starting_from(self, weights: Weights) -> ProbeProblem:
        """The same problem with another start, given in the coordinates of this form."""
        errors = self.to_eigenbasis(weights - self.optimum)
        excess = excess_loss(self.eigenvalues, errors)
        return self._replace(
            initial_weights=weights,
            error_coefficients=errors,
            initial_excess_loss=excess,
            initial_loss=self.optimal_loss + excess,
        )

    def diagonal(self) -> ProbeProblem:
        """The same problem in the eigenbasis of H: a step costs O(d)."""
        if self.eigenvectors is None:
            return self
        return self._replace(
            features=None,
            targets=None,
            hessian=self.eigenvalues,
            moment=self.to_eigenbasis(self.moment),
            eigenvectors=None,
            optimum=self.to_eigenbasis(self.optimum),
            initial_weights=self.to_eigenbasis(self.initial_weights),
        )


def per_row(values: Shaped[Array, "d"], weights: Weights) -> Shaped[Array, "d ..."]:
    """One value a feature, in the rank of `weights`: [d] stays, and becomes [d, 1] for [d, k]."""
    return values if weights.ndim == 1 else values[:, None]


def inner(first: Weights, second: Weights) -> Float[Array, ""]:
    """Inner product of two vectors of weights, over all their entries."""
    return first @ second if first.ndim == 1 else jnp.sum(first * second)


def excess_loss(eigenvalues: Float[Array, "d"], errors: Weights) -> Float[Array, ""]:
    """Sum of h_i e_i^2 / 2 for errors given in the eigenbasis."""
    return 0.5 * jnp.sum(per_row(eigenvalues, errors) * errors**2)


def row_space_norm(in_row_space: Bool[Array, "d"], errors: Weights) -> Float[Array, ""]:
    """Norm of the errors (in the eigenbasis) over the row space of the features."""
    return jnp.sqrt(jnp.sum(jnp.where(per_row(in_row_space, errors), errors, 0.0) ** 2))


def with_constant(features: Float[Array, "n d"], value: float = 1.0) -> Float[Array, "n d+1"]:
    """The features and a constant column, whose weights are the probe's intercepts.

    That is the probe of a linear layer with a bias: the intercept is learned by the attacker's own
    steps and takes part in the conditioning. Give training and held-out rows the same column.

    >>> with_constant(jnp.zeros((2, 1))).tolist()
    [[0.0, 1.0], [0.0, 1.0]]
    """
    features = jnp.asarray(features)
    return jnp.concatenate(
        [features, jnp.full((features.shape[0], 1), value, features.dtype)], axis=1
    )


def probe_problem(
    features: Float[Array | np.ndarray, "n d"],
    targets: Float[Array, "n"] | Float[Array, "n k"] | Int[Array, "n"],
    *,
    classes: int | None = None,
    penalty: float = 0.0,
    rtol: float | None = None,
    n_rows: int | None = None,
) -> ProbeProblem:
    r"""Build the least-squares probe of `targets` on `features`.

    L(w) = |X w - y|^2 / (2 n) + penalty |w|^2 / 2. The spectrum comes from the singular values of
    X, never from a formed X^T X, so it is accurate down to kappa(H) = 1/eps^2; so do the optimum
    and the error coefficients. The start is w0 = 0 (see `starting_from` and `initial_weights`).
    There is no intercept, so that H is the Hessian that conditioning is measured on; for one, give
    `with_constant(features)`.

    Args:
      features: [n, d], float32 or float64 (integers and bools are cast to the default float).
      targets: [n] or [n, k], cast to the dtype of the features; or labels, see `classes`.
      classes: k, if `targets` are integer labels [n] in 0..k-1: the targets are then their one-hot
        rows [n, k]. None: `targets` are numbers as they are, integers too.
      penalty: weight decay, in units of the mean-convention Hessian, >= 0.
      rtol: a singular value of X counts as non-zero above rtol times the largest; max(n, d) eps of
        the dtype by default, as in numpy.linalg.matrix_rank.
      n_rows: how many rows these stand for, with the same mean products of features and targets
        (`jaximm.data.rows.condensed`): the problem is the same, the price that of so many. None:
        themselves.

    Returns:
      A ProbeProblem. With zero targets the optimum is 0, and every relative error reads 0.

    Raises:
      ValueError: no rows or columns, mismatched rows, wrong rank, NaN or inf, negative penalty,
        labels that are no integers or outside of 0..classes-1.

    >>> problem = probe_problem(jnp.diag(jnp.array([2.0, 1.0])), jnp.array([2.0, 3.0]))
    >>> problem.optimum.tolist(), problem.eigenvalues.tolist()
    ([1.0, 3.0], [2.0, 0.5])
    """
    features, targets = jnp.asarray(features), jnp.asarray(targets)
    if features.ndim != 2:
        raise ValueError(f"features must be [n, d], got shape {features.shape}.")
    n, d = features.shape
    if n == 0 or d == 0:
        raise ValueError(f"features need at least one row and one column, got shape {(n, d)}.")
    if classes is not None:
        targets = one_hot(targets, classes, features.dtype)
    if targets.ndim not in (1, 2) or targets.shape[0] != n or targets.size == 0:
        raise ValueError(
            f"targets must be [n] = ({n},) or [n, k], one per row of features, got shape "
            f"{targets.shape}."
        )
    if not jnp.issubdtype(features.dtype, jnp.floating):
        features = features.astype(jnp.result_type(float))
    targets = targets.astype(features.dtype)
    for name, values in (("features", features), ("targets", targets)):
        # A traced array has no values to look at: under jit the NaN comes out in the result.
        if not isinstance(values, Tracer) and not np.isfinite(np.asarray(values)).all():
            raise ValueError(f"{name} hold NaN or inf; drop or impute those rows first.")
    if not isinstance(penalty, Tracer) and not penalty >= 0:
        raise ValueError(f"penalty must be >= 0, got {penalty}.")
    n = n if n_rows is None else n_rows
    if rtol is None:
        rtol = max(n, d) * float(jnp.finfo(features.dtype).eps)
    elif not 0 <= rtol < 1:
        raise ValueError(f"rtol must be in [0, 1), got {rtol}.")
    # A NumPy scalar compiles nothing.
    scalar: Any = penalty if isinstance(penalty, Tracer) else np.asarray(penalty, features.dtype)
    fields = _decompose(features, targets, jnp.asarray(scalar, features.dtype), rtol)
    return ProbeProblem(**fields, n_rows=np.int32(n))


def budgeted(attack: Attack, problem: ProbeProblem) -> ProbeProblem:
    """The problem with the rows alone that the attacker has (`Attacker.rows_of`).

    Its penalty and its starting weights stay.

    Raises:
      ValueError: fewer rows than there are, of a problem whose rows stand for others or are gone.
    """
    n = int(problem.n_rows)
    rows = attack.rows_of(n)
    if rows is None:
        return problem
    if problem.features is None or problem.targets is None or problem.features.shape[0] != n:
        raise ValueError(
            f"{attack.harmful_rows} of {n} rows cannot be told apart in their moments: give "
            "probe_problem those rows."
        )
    few = probe_problem(
        np.asarray(problem.features)[rows],
        jnp.asarray(np.asarray(problem.targets)[rows]),
        penalty=float(problem.penalty),
    )
    return few.starting_from(problem.initial_weights)


def one_hot(labels: Int[Array, "n"], classes: int, dtype: DTypeLike) -> Float[Array, "n k"]:
    """One-hot rows of integer labels.

    Raises:
      ValueError: labels that are not integers [n], or outside of 0..classes-1; classes below 2.
    """
    labels = jnp.asarray(labels)
    if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers [n], got {labels.dtype}{list(labels.shape)}; leave `classes` "
            "out for numeric targets."
        )
    if classes < 2:
        raise ValueError(f"classes must be at least 2, got {classes}.")
    if not isinstance(labels, Tracer) and labels.size:
        low, high = int(np.min(labels)), int(np.max(labels))
        if low < 0 or high >= classes:
            raise ValueError(f"labels must be in 0..{classes - 1}, got {low}..{high}.")
    dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
    if isinstance(labels, Tracer):
        return jax.nn.one_hot(labels, classes, dtype=dtype)
    return jnp.asarray(np.eye(classes, dtype=dtype)[np.asarray(labels)])


@functools.partial(jax.jit, static_argnames="rtol")
def _decompose(features, targets, penalty, rtol: float) -> dict[str, Array]:
    """The numerical part of `probe_problem`: fields of it."""
    n, d = features.shape
    # n < d: all d right vectors are wanted, since the null space is part of the weights' space.
    left, sigma, right = jnp.linalg.svd(features, full_matrices=n < d)
    k = sigma.shape[0]
    tolerance = rtol * sigma[0]
    kept = sigma > tolerance
    sigma = jnp.where(kept, sigma, 0.0)
    projected = left[:, :k].T @ targets / n  # (u_i . y) / n

    def padded(values):
        return jnp.concatenate([values, jnp.zeros((d - k, *values.shape[1:]), values.dtype)])

    in_row_space = padded(kept)
    eigenvalues = padded(sigma**2 / n) + penalty
    coefficients = padded(per_row(sigma, projected) * projected)  # V^T b
    divisors = jnp.where(in_row_space, eigenvalues, 1.0)
    optimum_coefficients = coefficients / per_row(divisors, coefficients)
    optimum = right.T @ optimum_coefficients
    residual = features @ optimum - targets
    optimal_loss = (inner(residual, residual) / n + penalty * inner(optimum, optimum)) / 2
    with jax.default_matmul_precision("highest"):
        hessian = features.T @ features / n + penalty * jnp.eye(d, dtype=features.dtype)
        moment = features.T @ targets / n
    energy = inner(targets, targets) / n
    return dict(
        features=features,
        targets=targets,
        hessian=hessian,
        moment=moment,
        eigenvalues=eigenvalues,
        eigenvectors=right.T,
        in_row_space=in_row_space,
        rank=jnp.sum(kept),
        tolerance=tolerance,
        penalty=penalty,
        target_energy=energy,
        optimum=optimum,
        optimal_loss=optimal_loss,
        initial_weights=jnp.zeros_like(optimum),
        initial_loss=energy / 2,
        initial_excess_loss=excess_loss(eigenvalues, optimum_coefficients),
        error_coefficients=-optimum_coefficients,
    )


def initial_weights(
    problem: ProbeProblem, seeds: Sequence[int], *, scale: float = 0.1
) -> Float[Array, "s d ..."]:
    """Starts for the given seeds: seed 0 is w0 = 0, every other seed a small random head.

    A random start is normal with standard deviation scale * `problem.weight_scale`, so that the
    outputs start with about scale^2 of the energy of the targets whatever the units of the
    features. Drawn in the original axes.
    """
    shape, dtype = problem.optimum.shape, problem.optimum.dtype
    drawn = problem.eigenvalues, problem.target_energy, np.asarray(scale, dtype)
    rows = [
        np.zeros(shape, dtype)
        if seed == 0
        else np.asarray(_random_start(np.uint32(seed), *drawn, shape=shape))
        for seed in seeds
    ]
    return jnp.asarray(np.stack(rows))


@functools.partial(jax.jit, static_argnames="shape")
def _random_start(seed, eigenvalues, target_energy, scale, *, shape):
    deviation = scale * _weight_scale(eigenvalues, target_energy, shape)
    return deviation * jax.random.normal(jax.random.key(seed), shape, deviation.dtype)


def _weight_scale(eigenvalues, target_energy, shape) -> Float[Array, ""]:
    """`ProbeProblem.weight_scale` of weights of a shape."""
    total = jnp.sum(eigenvalues)
    if len(shape) == 2:
        total = shape[1] * total
    scale = jnp.sqrt(target_energy / total)
    return jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1.0)


class Cost(NamedTuple):
    """Floating-point operations that an attacker of one target pays, in the original axes.

    A multiplication and an addition count one each: a gradient X^T (X w - y) / n costs 4 n d.
    Trying a grid of hyper-parameters is not counted: the cost is that of the best cell alone.

    `setup_shared` and `step_shared` are the parts of `setup` and `step` that are paid once however
    many targets there are: the top of the spectrum, a Gram matrix and its factor.
    """

    setup: float
    step: float
    setup_shared: float = 0.0
    step_shared: float = 0.0

    def for_targets(self, k: int) -> Cost:
        """The cost with k targets.

        >>> Cost(setup=5.0, step=3.0, setup_shared=5.0, step_shared=1.0).for_targets(10)[:2]
        (5.0, 21.0)
        """
        return self._replace(
            setup=self.setup_shared + k * (self.setup - self.setup_shared),
            step=self.step_shared + k * (self.step - self.step_shared),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack(Attacker):
    """An attacker of a probe, as two pure functions with a price.

    Attributes:
      init: `init(problem, hyper) -> state`, a NamedTuple of arrays with a field `weights`, [d] or
        [d, k]. It starts at `problem.initial_weights`.
      update: `update(state, problem, hyper) -> state`, one step. It reads the problem through
        `problem.gradient(w)`, `hvp`, `solve` and the arrays, so that it works in both forms.
      flops: `flops(n, d) -> Cost`, for one target.
      rotation_equivariant: rotating the features rotates the iterates, so the runner may work in
        the eigenbasis. False is always right.
      errors_at: optional `errors_at(problem, hyper, step) -> [d]` or [d, k], the error
        V^T (w_step - w*) in closed form, for attackers whose every squared component is a_i^step:
        then nothing is iterated. Used in the eigenbasis only.
      kind, title, source, knows, traits, grid, natural_bounds: see `Attacker`.
    """

    init: Callable[[ProbeProblem, Hyper], State]
    update: Callable[[State, ProbeProblem, Hyper], State]
    flops: Callable[[int, int], Cost]
    rotation_equivariant: bool = False
    errors_at: Callable[[ProbeProblem, Hyper, Int[Array, ""]], Weights] | None = None

    @property
    def threat_model(self) -> str:
        """Whom this attacker stands for."""
        return "; ".join(
            [
                "has the features and labels of the harmful task"
                if self.harmful_rows is None
                else f"has the features and {self.labelled_rows}",
                *([f"knows {self.knows}"] if self.knows else []),
            ]
        )


def check_attacker(attack: object, kind: type) -> None:
    """Refuses what is no attacker of the class `kind`, and says what makes one.

    Raises:
      ValueError: see above.
    """
    if isinstance(attack, kind):
        return
    shown = repr(attack) if isinstance(attack, str) else type(attack).__name__
    name = repr(attack) if isinstance(attack, str) else "name"
    call = f"jaximm.attacks.make_attack({name})"
    raise ValueError(f"expected an attacker ({kind.__name__}), got {shown}; {call} makes one.")


def probe_scores(
    features: Float[Array, "n d"],
    targets: Shaped[Array, "n"],
    weights: Weights,
    spread: Float[Array, ""] | None = None,
) -> Float[Array, "n"]:
    """Scores of a probe's outputs by row: of labels for k targets, of numbers for one.

    `spread` is that of the rows that count, where these are filled up with others.
    """
    kind = ("regression", "classes")[weights.ndim - 1]
    return objectives.objective(kind).scores(features @ weights, targets, spread)
