r"""Passport layers: a layer's scale and shift are computed from a secret input and its own weights.

Of z = x W with W [d_in, d_out] and passports P_g, P_b [rows, d_in],

    gamma = mean over rows of P_g W,    beta = mean over rows of P_b W,    y = gamma n(z) + beta

with n a normalisation. Training with the passports makes W useful under them alone; the signs of
gamma carry the owner's bits b in {-1, 1} through

    sign loss = sum_i relu(margin - b_i gamma_i) + decay |gamma|^2

What may be claimed: whoever has the weights without the passports does not have gamma and beta. But
those are d_out numbers each, and an attacker who trains them as free parameters (the ambiguity
attack), or flips signs and tunes, has them back from a few rows: a mark of ownership at best, no
obstacle to tuning.

Fan, Ng, Chan (2019), DeepIPR, https://arxiv.org/abs/1909.07830; this is the linear analogue of its
convolutions, margin .1 and decay 1e-5 as its code has them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Affine(NamedTuple):
    """Scale and shift of each output."""

    gamma: Float[Array, "d_out"]
    beta: Float[Array, "d_out"]


def passport_affine(
    weights: Float[Array, "d_in d_out"],
    scale_passport: Float[Array, "rows d_in"],
    shift_passport: Float[Array, "rows d_in"],
) -> Affine:
    """gamma and beta of a layer from its weights and the two passports.

    >>> import jax.numpy as jnp
    >>> one = jnp.array([[1.0, 1.0]])
    >>> found = passport_affine(jnp.array([[1.0, 2.0], [3.0, -4.0]]), one, 0 * one)
    >>> found.gamma.tolist(), found.beta.tolist()
    ([4.0, -2.0], [0.0, 0.0])
    """
    return Affine(jnp.mean(scale_passport @ weights, axis=0), jnp.mean(shift_passport @ weights, 0))


def sign_loss(
    gamma: Float[Array, "d_out"],
    bits: Float[Array, "d_out"],
    *,
    margin: float = 0.1,
    decay: float = 1e-5,
) -> Float[Array, ""]:
    """What pulls the signs of gamma to the owner's bits, 1 or -1."""
    return jnp.sum(jax.nn.relu(margin - bits * gamma)) + decay * jnp.sum(gamma**2)


def read_bits(gamma: Float[Array, "d_out"]) -> Float[Array, "d_out"]:
    """The bits that a scale carries, 1 or -1; 0 counts as 1."""
    return jnp.where(gamma >= 0, 1.0, -1.0).astype(gamma.dtype)
