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
>>> from jaximm.attacks.base import Attack, Cost, probe_problem, run_attack
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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Shaped

Weights = Float[Array, "d"] | Float[Array, "d k"]
"""Weights of a probe, or a vector of that shape: one column a target if there are several."""

KINDS = (
    "first-order",
    "momentum",
    "adaptive",
    "krylov",
    "quasi-newton",
    "closed-form",
    "preconditioned",
)
"""What an attacker needs to know: gradients only, ..., or a solve with the whole Hessian."""

TARGETS = (1e-1, 1e-2, 1e-3)
"""Relative levels whose first crossing is counted, for the excess loss and the parameter error."""

DIVERGED_ABOVE = 1e12
"""A cell whose excess loss exceeds its start by this factor is stopped and called diverged."""

MAX_STEPS = 2**30
"""Largest step budget: step counts are int32, and bisection adds two of them."""


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
        total = jnp.sum(self.eigenvalues)
        if self.optimum.ndim == 2:
            total = self.optimum.shape[1] * total
        scale = jnp.sqrt(self.target_energy / total)
        return jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1.0)

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
    features: Float[Array, "n d"],
    targets: Float[Array, "n"] | Float[Array, "n k"] | Int[Array, "n"],
    *,
    classes: int | None = None,
    penalty: float = 0.0,
    rtol: float | None = None,
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
        if not isinstance(values, Tracer) and not bool(jnp.all(jnp.isfinite(values))):
            raise ValueError(f"{name} hold NaN or inf; drop or impute those rows first.")
    if not isinstance(penalty, Tracer) and not penalty >= 0:
        raise ValueError(f"penalty must be >= 0, got {penalty}.")
    if rtol is None:
        rtol = max(n, d) * float(jnp.finfo(features.dtype).eps)
    elif not 0 <= rtol < 1:
        raise ValueError(f"rtol must be in [0, 1), got {rtol}.")
    return _decompose(features, targets, jnp.asarray(penalty, features.dtype), rtol)


def one_hot(labels: Int[Array, "n"], classes: int, dtype: Any) -> Float[Array, "n k"]:
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
        low, high = int(jnp.min(labels)), int(jnp.max(labels))
        if low < 0 or high >= classes:
            raise ValueError(f"labels must be in 0..{classes - 1}, got {low}..{high}.")
    dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
    return jax.nn.one_hot(labels, classes, dtype=dtype)


@functools.partial(jax.jit, static_argnames="rtol")
def _decompose(features, targets, penalty, rtol: float) -> ProbeProblem:
    """The numerical part of `probe_problem`."""
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
    return ProbeProblem(
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
    deviation = scale * problem.weight_scale
    rows = [
        jnp.zeros(shape, dtype)
        if seed == 0
        else deviation * jax.random.normal(jax.random.key(seed), shape, dtype)
        for seed in seeds
    ]
    return jnp.stack(rows)


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


Hyper = Mapping[str, Any]
"""Hyper-parameters of one cell: names to scalars; inside init and update they are traced."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack:
    """An attacker, as two pure functions with a kind and a price.

    Attributes:
      init: `init(problem, hyper) -> state`, a NamedTuple of arrays with a field `weights`, [d] or
        [d, k]. It starts at `problem.initial_weights`.
      update: `update(state, problem, hyper) -> state`, one step. It reads the problem through
        `problem.gradient(w)`, `hvp`, `solve` and the arrays, so that it works in both forms.
      kind: one of KINDS.
      flops: `flops(n, d) -> Cost`, for one target.
      grid: the default cells of hyper-parameters; one cell without any if empty.
      rotation_equivariant: rotating the features rotates the iterates, so the runner may work in
        the eigenbasis. False is always right.
      natural_bounds: (name, value) pairs at which a hyper-parameter ends by nature (penalty 0):
        choosing one is not an "edge of the grid".
      errors_at: optional `errors_at(problem, hyper, step) -> [d]` or [d, k], the error
        V^T (w_step - w*) in closed form, for attackers whose every squared component is a_i^step:
        then nothing is iterated. Used in the eigenbasis only.
    """

    init: Callable[[ProbeProblem, Hyper], Any]
    update: Callable[[Any, ProbeProblem, Hyper], Any]
    kind: str
    flops: Callable[[int, int], Cost]
    grid: tuple[Hyper, ...] = ()
    rotation_equivariant: bool = False
    natural_bounds: tuple[tuple[str, float], ...] = ()
    errors_at: Callable[[ProbeProblem, Hyper, Int[Array, ""]], Weights] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; choose from {list(KINDS)}.")


class AttackTrace(NamedTuple):
    """One attacker on one problem: g cells of hyper-parameters by s seeds.

    Step counts are the first step at which the quantity is at or below the target (0 if the start
    is already there), -1 if that never happens within the budget. They are counted at every step,
    even where the curve is thinned. FLOPs are set-up plus steps, NaN where the target is missed.
    """

    step: Int[Array, "r"]  # 0, then log-spaced up to the budget
    relative_excess_loss: Float[Array, "g s r"]
    relative_parameter_error: Float[Array, "g s r"]
    steps_to_loss_gap: Int[Array, "g s 3"]  # for TARGETS
    steps_to_parameter_error: Int[Array, "g s 3"]
    flops_to_loss_gap: Float[Array, "g s 3"]
    flops_to_parameter_error: Float[Array, "g s 3"]
    final_relative_excess_loss: Float[Array, "g s"]
    final_relative_parameter_error: Float[Array, "g s"]
    diverged: Bool[Array, "g s"]  # NaN, inf, or above the start and growing at the end
    still_falling: Bool[Array, "g s"]  # above the last target, and fell over the last tenth
    weights: Float[Array, "g s d ..."]  # at the end, in the original axes
    scores: dict[str, Float[Array, "g s r n"]]  # on the held-out rows given


def grid_product(**values: Sequence[float]) -> tuple[dict[str, float], ...]:
    """Every combination of the values of each hyper-parameter, the last name varying fastest.

    >>> grid_product(step=(0.1, 1.0), momentum=(0.9,))
    ({'step': 0.1, 'momentum': 0.9}, {'step': 1.0, 'momentum': 0.9})
    """
    cells: list[dict[str, float]] = [{}]
    for name, choices in values.items():
        cells = [{**cell, name: float(choice)} for cell in cells for choice in choices]
    return tuple(cells)


def recorded_steps(steps: int, *, points: int = 150) -> np.ndarray:
    """The steps at which curves are kept: 0, a log-spaced grid of at most `points`, the budget.

    The step at nine tenths of the budget is among them: "still falling" compares with it.

    >>> recorded_steps(10, points=4)
    array([ 0,  1,  2,  5,  9, 10], dtype=int32)
    """
    grid = np.round(np.geomspace(1, steps, points)).astype(np.int64)
    return np.unique(np.concatenate([[0, _late_step(steps), steps], grid])).astype(np.int32)


def check_attacker(attack: Any, kind: type, maker: str) -> None:
    """Refuses what is no attacker of the class `kind`, and says what makes one.

    Raises:
      ValueError: see above.
    """
    if isinstance(attack, kind):
        return
    shown = repr(attack) if isinstance(attack, str) else type(attack).__name__
    call = f"jaximm.attacks.{maker}({attack!r})" if isinstance(attack, str) else f"{maker}(name)"
    raise ValueError(f"expected an attacker ({kind.__name__}), got {shown}; {call} makes one.")


def check_attackers(attackers: Any) -> None:
    """Refuses what is no mapping of names to attackers, as a suite takes it.

    Raises:
      ValueError: see above.
    """
    if not isinstance(attackers, Mapping):
        raise ValueError(
            "expected a mapping of names to attackers, as jaximm.attacks.suite_attacks makes it, "
            f"got {attackers!r:.80}."
        )


def run_attack(
    attack: Attack,
    problem: ProbeProblem,
    grid: Sequence[Hyper] | None = None,
    *,
    steps: int,
    seeds: Sequence[int] = (0,),
    record: int = 150,
    in_eigenbasis: bool | None = None,
    held_out: Mapping[str, tuple[Any, Any]] | None = None,
    trajectories: int | None = None,
) -> AttackTrace:
    """Run every cell of the grid from every seed for up to `steps` steps, in one compiled loop.

    Hyper-parameters are traced: another grid of the same size, another problem of the same shape
    or another budget with as many recorded points does not compile again. Memory does not grow
    with `steps`. The loop ends early when every cell has diverged or has both relative errors
    below 1e-10 (float32: 1e-6); the last values are then held to the end of the curve.

    Args:
      attack: the attacker.
      problem: from `probe_problem`, in the original axes.
      grid: cells of hyper-parameters, all with the same names; `attack.grid` if None.
      steps: the budget, 1 <= steps <= 2^30.
      seeds: starts, see `initial_weights`; seed 0 is w0 = 0.
      record: at most this many log-spaced points of the curve (three more are always there).
      in_eigenbasis: where to run. None: in the eigenbasis exactly if the attack is
        rotation-equivariant. False forces the original axes, and the iteration, for comparison.
      held_out: other rows of the same task by name, (features [n, d], targets), on which the
        scores of the probe are followed (`probe_scores`): right or wrong for integer labels [n] (a
        problem of k targets), parts of R^2 for real targets [n] (a problem of one).
      trajectories: how many the compiled loop runs, at least cells times seeds (which is the
        default); surplus ones repeat the last. Grids and seeds of other numbers then share it.

    Returns:
      An AttackTrace.

    Raises:
      ValueError: no Attack (a name, say) or no ProbeProblem, an empty or ragged grid, no seeds, a
        bad budget, a problem in diagonal form, or the eigenbasis asked for an attacker that depends
        on the axes.
    """
    check_attacker(attack, Attack, "make_attack")
    if not isinstance(problem, ProbeProblem):
        raise ValueError(
            f"expected a ProbeProblem, as probe_problem returns it, got {type(problem).__name__}."
        )
    if problem.is_diagonal or problem.features is None:
        raise ValueError("expected a problem in the original axes, as probe_problem returns it.")
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be between 1 and {MAX_STEPS}, got {steps}.")
    if record < 2:
        raise ValueError(f"record must be at least 2 points, got {record}.")
    if len(seeds) == 0:
        raise ValueError("seeds is empty; give at least one, for example (0,).")
    cells = _as_cells(attack, grid)
    if in_eigenbasis is None:
        in_eigenbasis = attack.rotation_equivariant
    elif in_eigenbasis and not attack.rotation_equivariant:
        raise ValueError("this attacker depends on the axes: it cannot run in the eigenbasis.")

    cost = cost_of(attack, problem)
    dtype = problem.optimum.dtype
    held = {name: _held_rows(problem, *rows) for name, rows in (held_out or {}).items()}
    starts = initial_weights(problem, seeds)
    form, basis, errors_at = problem, None, None
    if in_eigenbasis:
        form, basis, errors_at = problem.diagonal(), problem.eigenvectors, attack.errors_at
        assert basis is not None
        held = {name: (rows @ basis, targets) for name, (rows, targets) in held.items()}
    recorded = recorded_steps(steps, points=record)
    g, s = len(cells), len(seeds)
    wanted = g * s if trajectories is None else trajectories
    if wanted < g * s:
        raise ValueError(
            f"trajectories must be at least {g} cells times {s} seeds, got {trajectories}."
        )
    cases = np.minimum(np.arange(wanted), g * s - 1)
    raw = _run(
        attack.init,
        attack.update,
        errors_at,
        problem=form,
        basis=basis,
        starts=starts[cases % s],
        hyper={
            name: np.asarray([cell[name] for cell in cells], dtype)[cases // s] for name in cells[0]
        },
        recorded=recorded,
        held=held,
    )
    summary = _summary(
        raw,
        g=g,
        s=s,
        recorded=recorded,
        late=np.searchsorted(recorded, _late_step(steps)).astype(np.int32),
        cost=np.asarray((cost.setup, cost.step), dtype),
    )
    if attack.kind == "closed-form":  # it is there at once: more steps would change nothing
        summary = summary._replace(still_falling=jnp.zeros_like(summary.still_falling))
    return summary


def _held_rows(problem: ProbeProblem, features: Any, targets: Any) -> tuple[jax.Array, jax.Array]:
    """Held-out rows that fit a problem, or ValueError."""
    features, targets = jnp.asarray(features, problem.optimum.dtype), jnp.asarray(targets)
    d = problem.optimum.shape[0]
    if features.ndim != 2 or features.shape[1] != d or not features.shape[0]:
        raise ValueError(f"held-out features must be [n, {d}], got shape {features.shape}.")
    is_labels = jnp.issubdtype(targets.dtype, jnp.integer)
    if targets.shape != features.shape[:1] or is_labels != (problem.optimum.ndim == 2):
        wanted = "integer labels [n]" if problem.optimum.ndim == 2 else "real targets [n]"
        raise ValueError(
            f"held-out targets must be {wanted}, one a row of features, got "
            f"{targets.dtype}{list(targets.shape)} for features {list(features.shape)}."
        )
    return features, targets


def probe_scores(
    features: Float[Array, "n d"], targets: Shaped[Array, "n"], weights: Weights
) -> Float[Array, "n"]:
    """Numbers of mean accuracy, or of mean R^2: 0 or 1, or 1 - (y - p)^2 / spread, by row.

    A row with an output that is not a number counts as wrong; R^2 is then NaN.
    """
    outputs = features @ weights
    if weights.ndim == 2:
        right = jnp.argmax(outputs, axis=1).astype(targets.dtype) == targets
        return (right & jnp.all(jnp.isfinite(outputs), axis=1)).astype(outputs.dtype)
    targets = targets.astype(outputs.dtype)
    spread = jnp.mean((targets - jnp.mean(targets)) ** 2)
    return 1 - (targets - outputs) ** 2 / jnp.where(spread > 0, spread, 1.0)


def cost_of(attack: Attack, problem: ProbeProblem) -> Cost:
    """What the attacker pays on this problem, all its targets together."""
    assert problem.features is not None
    cost = attack.flops(*problem.features.shape)
    return cost if problem.optimum.ndim == 1 else cost.for_targets(problem.optimum.shape[1])


@functools.partial(jax.jit, static_argnames=("init", "update", "errors_at"))
def _run(init, update, errors_at, *, problem, basis, starts, hyper, recorded, held) -> _Raw:
    """`run_attack` after its checks, compiled whole: all trajectories, each with its cell."""
    if basis is not None:
        starts = _times(starts, basis)
    if errors_at is None:
        raw = _iterate(init, update, problem, starts, hyper, recorded, held)
    else:
        raw = _evaluate(errors_at, problem, starts, hyper, recorded, held)
    if basis is not None:
        raw = raw._replace(weights=_times(raw.weights, basis.T))
    return raw


@functools.partial(jax.jit, static_argnames=("g", "s"))
def _summary(raw: _Raw, *, g: int, s: int, recorded, late, cost) -> AttackTrace:
    """What the trajectories of g cells by s seeds say."""
    raw = jax.tree.map(lambda values: values[: g * s].reshape(g, s, *values.shape[1:]), raw)
    final, before = raw.excess[..., -1], raw.excess[..., late]
    growing = (final > 1) & (final >= before)
    diverged = ~jnp.isfinite(final) | (final > DIVERGED_ABOVE) | growing

    def price(hits):
        return jnp.where(hits >= 0, cost[0] + cost[1] * hits.astype(cost.dtype), jnp.nan)

    return AttackTrace(
        step=recorded,
        relative_excess_loss=raw.excess,
        relative_parameter_error=raw.error,
        steps_to_loss_gap=raw.loss_hits,
        steps_to_parameter_error=raw.error_hits,
        flops_to_loss_gap=price(raw.loss_hits),
        flops_to_parameter_error=price(raw.error_hits),
        final_relative_excess_loss=final,
        final_relative_parameter_error=raw.error[..., -1],
        diverged=diverged,
        still_falling=~diverged & (final > TARGETS[-1]) & (final < 0.99 * before),
        weights=raw.weights,
        scores=raw.scores,
    )


def _times(rows: Float[Array, "c d ..."], matrix: Float[Array, "d d"]) -> Float[Array, "c d ..."]:
    """matrix^T times each of c vectors of weights."""
    if rows.ndim == 2:
        return jnp.matmul(rows, matrix, precision="highest")
    return jnp.einsum("cik,ij->cjk", rows, matrix, precision="highest")


def _late_step(steps: int) -> int:
    """Nine tenths of the budget, and before its end."""
    return (9 * steps) // 10


def _as_cells(attack: Attack, grid: Sequence[Hyper] | None) -> list[Hyper]:
    """The cells to run, checked."""
    if grid is None:
        return list(attack.grid) or [{}]
    cells = list(grid)
    if not cells:
        raise ValueError("grid is empty; give at least one cell, for example [{}].")
    for cell in cells:
        if set(cell) != set(cells[0]):
            raise ValueError(
                f"all cells of a grid need the same names, got {sorted(cells[0])} "
                f"and {sorted(cell)}."
            )
    return cells


class _Raw(NamedTuple):
    """What a run gives per cell (c = cells x seeds)."""

    excess: Float[Array, "c r"]
    error: Float[Array, "c r"]
    loss_hits: Int[Array, "c 3"]
    error_hits: Int[Array, "c 3"]
    weights: Float[Array, "c d ..."]
    scores: dict[str, Float[Array, "c r n"]]


class _Carry(NamedTuple):
    """Running quantities of all cells: nothing here grows with the number of steps."""

    step: Int[Array, ""]
    state: Any
    excess: Float[Array, "c"]
    error: Float[Array, "c"]
    loss_hits: Int[Array, "c 3"]
    error_hits: Int[Array, "c 3"]
    finished: Bool[Array, "c"]


def _relative(value, start):
    """value / start, where a start at the optimum stays at 0."""
    return jnp.where(start > 0, value / jnp.where(start > 0, start, 1.0), value)


def _hit(hits, values, step):
    """Write `step` where a target is met for the first time."""
    targets = jnp.asarray(TARGETS, values.dtype)
    return jnp.where((hits < 0) & (values[:, None] <= targets[None, :]), step, hits)


def _iterate(init, update, problem: ProbeProblem, starts, hyper, recorded, held) -> _Raw:
    """The shared loop: a scan over recorded points, a while loop over the steps between them."""
    dtype = starts.dtype
    floor = jnp.asarray(1e-6 if jnp.finfo(dtype).eps > 1e-10 else 1e-10, dtype)
    started = jax.vmap(problem.starting_from)(starts)

    def init_cell(start, hyper_cell):
        return init(problem.starting_from(start), hyper_cell)

    def update_cell(state, start, hyper_cell):
        return update(state, problem.starting_from(start), hyper_cell)

    def measure_cell(weights):
        errors = problem.to_eigenbasis(weights - problem.optimum)
        excess = excess_loss(problem.eigenvalues, errors)
        return excess, row_space_norm(problem.in_row_space, errors)

    start_excess, start_error = jax.vmap(measure_cell)(starts)

    def scores_of(weights):
        return {
            name: jax.vmap(functools.partial(probe_scores, *rows))(weights)
            for name, rows in held.items()
        }

    def finished(excess, error):
        converged = (excess <= floor) & (error <= floor)
        return converged | ~jnp.isfinite(excess) | (excess > DIVERGED_ABOVE)

    def one_step(carry: _Carry) -> _Carry:
        stepped = jax.vmap(update_cell)(carry.state, starts, hyper)

        def hold(old, new):
            mask = carry.finished.reshape((-1,) + (1,) * (new.ndim - 1))
            return jnp.where(mask, old, new)

        state = jax.tree.map(hold, carry.state, stepped)
        excess, error = jax.vmap(measure_cell)(state.weights)
        excess, error = _relative(excess, start_excess), _relative(error, start_error)
        step = carry.step + 1
        return _Carry(
            step=step,
            state=state,
            excess=excess,
            error=error,
            loss_hits=_hit(carry.loss_hits, excess, step),
            error_hits=_hit(carry.error_hits, error, step),
            finished=carry.finished | finished(excess, error),
        )

    def segment(carry: _Carry, end):
        def unfinished(inner: _Carry):
            return (inner.step < end) & ~jnp.all(inner.finished)

        carry = jax.lax.while_loop(unfinished, one_step, carry)
        return carry._replace(step=end), (carry.excess, carry.error, scores_of(carry.state.weights))

    never = jnp.full((starts.shape[0], len(TARGETS)), -1, jnp.int32)
    excess = _relative(started.initial_excess_loss, start_excess)
    error = _relative(start_error, start_error)
    zero = jnp.zeros((), jnp.int32)
    carry = _Carry(
        step=zero,
        state=jax.vmap(init_cell)(starts, hyper),
        excess=excess,
        error=error,
        loss_hits=_hit(never, excess, zero),
        error_hits=_hit(never, error, zero),
        finished=finished(excess, error),
    )
    carry, (excess_curve, error_curve, scores) = jax.lax.scan(segment, carry, recorded)
    return _Raw(
        excess=excess_curve.T,
        error=error_curve.T,
        loss_hits=carry.loss_hits,
        error_hits=carry.error_hits,
        weights=carry.state.weights,
        scores={name: jnp.moveaxis(values, 0, 1) for name, values in scores.items()},
    )


def _evaluate(errors_at, problem: ProbeProblem, starts, hyper, recorded, held) -> _Raw:
    """The same outputs as `_iterate` from a closed-form path: curves directly, hits by bisection.

    Every squared error component is a_i^t with a_i >= 0, so both quantities are convex in t: they
    fall up to one step and rise after it. The first step at or below a target is found by
    bisection before that step, exactly as counting would.
    """
    budget = recorded[-1]

    def one_cell(start, hyper_cell):
        started = problem.starting_from(start)

        def squares(step):
            errors = errors_at(started, hyper_cell, step)
            kept = jnp.where(per_row(problem.in_row_space, errors), errors, 0.0)
            return excess_loss(problem.eigenvalues, errors), jnp.sum(kept**2)

        start_excess, start_square = squares(jnp.zeros((), jnp.int32))

        start_norm = jnp.sqrt(start_square)
        # Where no component grows there is no rise to look for, and a fall that rounding hides (one
        # step of a slow descent in float32) is no end of it.
        ends = (errors_at(started, hyper_cell, jnp.asarray(step, jnp.int32)) for step in (0, 1))
        shrinks = functools.reduce(
            lambda begin, after: jnp.all(jnp.abs(after) <= jnp.abs(begin)), ends
        )

        def both(step):
            excess, square = squares(step)
            excess = _relative(excess, start_excess)
            return jnp.stack([excess, _relative(jnp.sqrt(square), start_norm)])

        def first(quantity, target):
            def falls_no_more(step):
                now, after = jax.vmap(both)(jnp.stack([step, step + 1]))[:, quantity]
                return ~(after < now)  # nor if NaN or inf

            def reached(step):
                return both(step)[quantity] <= target

            zero = jnp.zeros((), jnp.int32)
            lowest = jnp.where(shrinks, budget, _bisect(falls_no_more, zero, budget))
            hit = _bisect(reached, zero, lowest)
            return jnp.where(reached(hit), hit, -1)

        of_targets = jax.vmap(first, in_axes=(None, 0))
        hits = jax.vmap(of_targets, in_axes=(0, None))(
            jnp.arange(2), jnp.asarray(TARGETS, starts.dtype)
        )
        curve = jax.vmap(both)(recorded)

        def weights_at(step):
            return problem.optimum + problem.from_eigenbasis(errors_at(started, hyper_cell, step))

        def scores_at(step):
            weights = weights_at(step)
            return {name: probe_scores(rows, y, weights) for name, (rows, y) in held.items()}

        scores = jax.lax.map(scores_at, recorded)
        return _Raw(curve[:, 0], curve[:, 1], hits[0], hits[1], weights_at(budget), scores)

    return jax.vmap(one_cell)(starts, hyper)


def _bisect(predicate, low, high):
    """First integer in [low, high] where a monotone predicate holds, `high` if none does."""

    def halve(_, bounds):
        lower, upper = bounds
        middle = lower + (upper - lower) // 2
        keep_left = predicate(middle) | (lower >= upper)  # a closed bracket stays as it is
        return jnp.where(keep_left, lower, middle + 1), jnp.where(keep_left, middle, upper)

    return jax.lax.fori_loop(0, 32, halve, (low, high))[0]
