r"""A whitening factor is inserted between features and head, and AdamW trains behind it.

With mu and C the mean and covariance of the features of all training rows, as the backbone came,

    C_l = C + damping * tr(C) / d * I,
    outputs = (f - mu) C_l^(-1/2) K' + b',       K' and b' trained, mu and C_l^(-1/2) fixed,

which is the plain head with kernel = C_l^(-1/2) K' and bias = b' - mu kernel: nothing is added to
the model, only its coordinates are others. It starts at the head that was there,
K' = C_l^(1/2) kernel, so step 0 has the same outputs. The gradient by K' sees features of unit
covariance, whatever the condition number of C (down to the damping): an ill-conditioned feature
matrix no longer slows a gradient attacker. The backbone trains along, by the same AdamW.

The root comes from singular values of the centred features (through a QR factorisation), not from
their covariance, which would lose half the digits.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaximm.attacks.grid import Hyper, Values
from jaximm.attacks.weights.descent import AdamW, adam_of, scaled_head, tuning
from jaximm.attacks.weights.lora import adam_step
from jaximm.attacks.weights.problem import (
    Access,
    Batches,
    FineTuneProblem,
    ModelWeights,
    WeightAttack,
)
from jaximm.types import Head

SOURCE = (
    "Desjardins et al. (2015), Natural neural networks, https://arxiv.org/abs/1507.00210 "
    "(whitened reparametrisation)"
)


class Spectrum(NamedTuple):
    """Mean, and eigenvalues and eigenvectors (columns) of the covariance of features."""

    mean: Float[Array, "d"]
    variances: Float[Array, "d"]
    directions: Float[Array, "d d"]

    def damped(self, damping: Float[Array, ""]) -> Float[Array, "d"]:
        """Variances plus `damping` times their mean; constant features count as of variance 1."""
        mean = jnp.mean(self.variances)
        return self.variances + damping.astype(mean.dtype) * jnp.where(mean > 0, mean, 1.0)

    def function(self, values: Float[Array, "d"]) -> Float[Array, "d d"]:
        """V diag(values) V^T."""
        return jnp.matmul(self.directions * values[None, :], self.directions.T, precision="highest")


def feature_spectrum(features: Float[Array, "n d"]) -> Spectrum:
    """The spectrum of the covariance (over n) of features; n < d leaves variances of 0."""
    n, d = features.shape
    mean = jnp.mean(features, axis=0)
    triangle = jnp.linalg.qr(features - mean[None, :], mode="r")
    # Filled up to a square: all d directions are wanted, those without variance too.
    square = jnp.pad(triangle, ((0, d - triangle.shape[0]), (0, 0)))
    _, values, right = jnp.linalg.svd(square)
    return Spectrum(mean, values**2 / n, right.T)


def spectrum_flops(problem: FineTuneProblem) -> tuple[float, float]:
    """Of `feature_spectrum`, once: 2 n d min(n, d) for QR, 12 d^3 for values and one side."""
    n, d = problem.train.x.shape[0], problem.head.kernel.shape[0]
    return 2.0 * n * d * min(n, d) + 12.0 * d**3, 0.0


class State(NamedTuple):
    """Merged weights, the head behind the factor, the factor, and AdamW's state."""

    weights: ModelWeights
    whitened: Head  # K' and b'
    mean: Float[Array, "d"]
    root: Float[Array, "d d"]  # C_l^(-1/2)
    opt_state: Any


def merged_head(whitened: Head, mean: Float[Array, "d"], root: Float[Array, "d d"]) -> Head:
    """The plain head that does the same."""
    kernel = jnp.matmul(root, whitened.kernel, precision="highest")
    return Head(kernel, whitened.bias - jnp.matmul(mean, kernel, precision="highest"))


def _init(access: Access, hyper: Hyper) -> State:
    weights = scaled_head(access, hyper)
    kernel, bias = weights.head
    spectrum = feature_spectrum(access.features.x)
    variances = spectrum.damped(hyper["damping"])
    forward, root = (
        spectrum.function(values).astype(kernel.dtype)
        for values in (jnp.sqrt(variances), 1 / jnp.sqrt(variances))
    )
    mean = spectrum.mean.astype(kernel.dtype)
    whitened = Head(
        jnp.matmul(forward, kernel, precision="highest"),
        bias + jnp.matmul(mean, kernel, precision="highest"),
    )
    with jax.numpy_dtype_promotion("standard"):
        opt_state = adam_of(hyper).init((weights.params, whitened))
    return State(weights, whitened, mean, root, opt_state)


def _update(state: State, batches: Batches, access: Access, hyper: Hyper) -> State:
    def weights_of(params: Any, whitened: Head) -> ModelWeights:
        head = merged_head(whitened, state.mean, state.root)
        return state.weights._replace(params=params, head=head)

    def objective(trained):
        return access.loss_fn(weights_of(*trained), batches.harmful)

    trained, opt_state = adam_step(
        (state.weights.params, state.whitened), objective, state.opt_state, hyper
    )
    return state._replace(weights=weights_of(*trained), whitened=trained[1], opt_state=opt_state)


def factor_insert(*, dampings: Values = (1e-6,), **adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW behind a whitening factor between features and head.

    Args:
      dampings: > 0, over the mean variance of a feature.
      **adamw: see `AdamW`.
    """
    return tuning(
        (_init, _update),
        adamw,
        rates=(1e-5, 1e-4, 1e-3, 1e-2),
        tried={"damping": (dampings, "(0, inf)")},
        title="inserted whitening factor",
        kind="undo",
        source=SOURCE,
        knows="that the defence is one of conditioning",
        traits=frozenset({"preconditions", "undoes_defence"}),
        needs=("own_head",),
        passes=1.0,
        solve_flops=spectrum_flops,
    )
