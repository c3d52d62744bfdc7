r"""Shampoo: full fine-tuning with a preconditioner on each side of every matrix.

For a gradient G [m, n] of a parameter (a convolution kernel is the matrix [all axes but the last,
out]), with L and R zero at the start,

    L <- beta L + (1 - beta) G G^T,      R <- beta R + (1 - beta) G^T G,
    D  = (L + eps tr(L) I)^(-1/4)  M  (R + eps tr(R) I)^(-1/4),
    W <- W - rate * D |U| / |D|,

with Adam's first moment M (0.9) as momentum, and the norm |U| of Adam's own step leaf by leaf
("grafting"), so that learning rates compare with Adam's. A side longer than `max_dim` keeps only
the diagonal of its matrix. The roots are taken afresh every `every` steps. Vectors go by Adam.

The source has a sum in place of the moving average; with grafting, only how fast old gradients are
forgotten differs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaximm.attacks.grid import Hyper, Values, check_whole
from jaximm.attacks.weights.descent import AdamW, State, scaled_head, tuning
from jaximm.attacks.weights.problem import Access, Batches, FineTuneProblem, WeightAttack
from jaximm.linalg import batched
from jaximm.models.adapters.lora import matrix_shape

SOURCE = (
    "Gupta, Koren and Singer (2018), Shampoo: Preconditioned stochastic tensor optimization, "
    "https://arxiv.org/abs/1802.09568; Anil et al. (2021), Scalable second order optimization for "
    "deep learning, https://arxiv.org/abs/2002.09018 (grafting)"
)

_B1, _B2, _ADAM_EPSILON = 0.9, 0.999, 1e-8


Side = Float[Array, "m m"] | Float[Array, "m"]
"""A matrix, or the diagonal of one."""


class LeafState(NamedTuple):
    """Of one parameter; a vector has no sides."""

    mean: jax.Array  # Adam's moments
    square: jax.Array
    statistics: tuple[Side, ...]  # (L, R)
    roots: tuple[Side, ...]  # their inverse fourth roots, up to `every` steps old


class ShampooState(NamedTuple):
    """Parameters in the order of their tree."""

    count: Int[Array, ""]
    leaves: tuple[LeafState, ...]


def statistic(gradient: Float[Array, "m n"], max_dim: int) -> Side:
    """G G^T, or its diagonal where it is larger than `max_dim`."""
    if gradient.shape[0] > max_dim:
        return jnp.sum(gradient**2, axis=1)
    return jnp.matmul(gradient, gradient.T, precision="highest")


def inverse_fourth_root(matrix: Side, epsilon: Float[Array, ""]) -> Side:
    """(S + epsilon tr(S) I)^(-1/4) of a positive semi-definite matrix; S = 0 counts as trace 1."""
    diagonal = matrix.ndim == 1
    trace = jnp.sum(matrix) if diagonal else jnp.trace(matrix)
    scale = jnp.where(trace > 0, trace, 1.0)
    epsilon = epsilon.astype(matrix.dtype)
    if diagonal:
        return (matrix + epsilon * scale) ** -0.25
    # The eigensolver gets a finite matrix of trace 1, whatever the scale of the gradients.
    sound = jnp.isfinite(trace) & jnp.all(jnp.isfinite(matrix / scale))
    unit = jnp.where(sound, matrix / scale, jnp.eye(matrix.shape[0], dtype=matrix.dtype))
    values, vectors = batched.eigh(unit)
    # Rounding makes zeros negative.
    roots = (jnp.maximum(values, 0.0) + epsilon) ** -0.25
    root = jnp.matmul(vectors * roots[None, :], vectors.T, precision="highest") * scale**-0.25
    return jnp.where(sound, root, jnp.nan)


def _times(side: Side, matrix: Float[Array, "m n"]) -> Float[Array, "m n"]:
    if side.ndim == 1:
        return side[:, None] * matrix
    return jnp.matmul(side, matrix, precision="highest")


def scale_by_shampoo(
    *, beta: Any, epsilon: Any, max_dim: int, every: int
) -> optax.GradientTransformationExtraArgs:
    """Shampoo's direction with the norm of Adam's, leaf by leaf; Adam's for vectors.

    Args:
      beta: of the moving averages.
      epsilon: damping over the trace.
      max_dim: sides longer than this keep a diagonal.
      every: steps from one root to the next.

    The update takes `step`, its number, by keyword; without it the count in the state decides when
    roots are taken, and under `jax.vmap` they are then taken at every step and used one in `every`.
    """

    def init_leaf(leaf: jax.Array) -> LeafState:
        zeros = jnp.zeros_like(leaf)
        sides = ()
        if leaf.ndim >= 2:
            sizes = matrix_shape(leaf.shape)
            sides = tuple(jnp.zeros((m,) * (1 if m > max_dim else 2), leaf.dtype) for m in sizes)
        return LeafState(zeros, zeros, sides, sides)

    def init(params: Any) -> ShampooState:
        leaves = jax.tree.leaves(params)
        return ShampooState(jnp.zeros((), jnp.int32), tuple(map(init_leaf, leaves)))

    def update_leaf(
        gradient: jax.Array, state: LeafState, count: Int[Array, ""], step: Any
    ) -> tuple[jax.Array, LeafState]:
        dtype = gradient.dtype
        mean = _B1 * state.mean + (1 - _B1) * gradient
        square = _B2 * state.square + (1 - _B2) * gradient**2
        number = (count + 1).astype(dtype)
        momentum = mean / (1 - _B1**number)
        adam = momentum / (jnp.sqrt(square / (1 - _B2**number)) + _ADAM_EPSILON)
        if gradient.ndim < 2:
            return adam, LeafState(mean, square, (), ())
        shape = matrix_shape(gradient.shape)
        slope, kept = gradient.reshape(shape), jnp.asarray(beta, dtype)
        statistics = tuple(
            kept * old + (1 - kept) * statistic(side, max_dim)
            for old, side in zip(state.statistics, (slope, slope.T), strict=True)
        )
        roots = jax.lax.cond(
            step % every == 0,
            lambda: tuple(inverse_fourth_root(s, jnp.asarray(epsilon, dtype)) for s in statistics),
            lambda: state.roots,
        )
        left, right = roots
        direction = _times(right, _times(left, momentum.reshape(shape)).T).T.reshape(gradient.shape)
        norm = jnp.linalg.norm(direction)
        direction = direction * (jnp.linalg.norm(adam) / jnp.where(norm > 0, norm, 1.0))
        return direction, LeafState(mean, square, statistics, roots)

    def update(
        updates: Any, state: ShampooState, params: Any = None, *, step: Any = None, **_: Any
    ) -> tuple[Any, ShampooState]:
        del params
        step = state.count if step is None else step
        gradients, structure = jax.tree.flatten(updates)
        pairs = [
            update_leaf(gradient, leaf, state.count, step)
            for gradient, leaf in zip(gradients, state.leaves, strict=True)
        ]
        directions, leaves = zip(*pairs, strict=True)
        return jax.tree.unflatten(structure, directions), ShampooState(state.count + 1, leaves)

    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


@functools.lru_cache(maxsize=16)
def _shampoo(max_dim: int, every: int) -> tuple[Callable[..., State], Callable[..., State]]:
    """`init` and `update` of a largest side and a rhythm."""

    def optimiser_of(hyper: Hyper) -> optax.GradientTransformationExtraArgs:
        return optax.chain(
            scale_by_shampoo(
                beta=hyper["beta"], epsilon=hyper["epsilon"], max_dim=max_dim, every=every
            ),
            optax.add_decayed_weights(hyper["weight_decay"]),
            optax.scale_by_learning_rate(hyper["learning_rate"]),
        )

    def init(access: Access, hyper: Hyper) -> State:
        weights = scaled_head(access, hyper)
        return State(weights, optimiser_of(hyper).init((weights.params, weights.head)))

    # Not `descent`, which would take roots for the benign task's head too.
    def update(state: State, batches: Batches, access: Access, hyper: Hyper) -> State:
        def objective(trained):
            params, head = trained
            return access.loss_fn(state.weights._replace(params=params, head=head), batches.harmful)

        trained = state.weights.params, state.weights.head
        updates, opt_state = optimiser_of(hyper).update(
            jax.grad(objective)(trained), state.opt_state, trained, step=batches.step
        )
        params, head = jax.tree.map(optax.apply_updates, trained, updates)
        return State(state.weights._replace(params=params, head=head), opt_state)

    return init, update


def shampoo(
    *,
    betas: Values = (0.95,),
    epsilons: Values = (1e-6,),
    max_dim: int = 512,
    every: int = 5,
    **adamw: Unpack[AdamW],
) -> WeightAttack:
    """Shampoo, grafted to Adam.

    Args:
      betas: in [0, 1), of the moving averages L and R.
      epsilons: > 0, damping over the trace of L or R.
      max_dim: sides longer than this keep a diagonal, >= 1; compiled in.
      every: steps from one root to the next, >= 1; compiled in.
      **adamw: see `AdamW`.
    """
    check_whole("max_dim", max_dim)
    check_whole("every", every)

    def root_flops(problem: FineTuneProblem) -> tuple[float, float]:
        sides = [
            m
            for leaf in jax.tree.leaves((problem.params, problem.head))
            if leaf.ndim >= 2
            for m in matrix_shape(leaf.shape)
            if m <= max_dim
        ]
        # 9 m^3 for eigenvalues and eigenvectors: Golub and Van Loan, Matrix computations, 8.3.
        return 0.0, sum(9.0 * m**3 for m in sides) / every

    return tuning(
        _shampoo(max_dim, every),
        adamw,
        tried={"beta": (betas, "[0, 1)"), "epsilon": (epsilons, "(0, inf)")},
        bounds=(("beta", 0.0),),
        title="Shampoo",
        kind="preconditioned",
        source=SOURCE,
        traits=frozenset({"preconditions"}),
        solve_flops=root_flops,
    )
