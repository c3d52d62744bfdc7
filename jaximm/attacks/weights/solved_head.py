r"""A ridge head in closed form on the features as they came, then AdamW on everything.

    kernel = (C + penalty * tr(C) / d * I)^(-1) cov(f, Y),      bias = mean(Y) - mean(f) kernel,

with C the covariance of the features of all training rows, and Y one-hot rows or real targets. For
classes, which are trained by cross-entropy, kernel and bias are then multiplied by `logit_scale`:
a least-squares fit predicts probabilities, and as logits those would hardly tell classes apart. The
solve does not care how ill-conditioned C is; what fine-tuning starts from is the best that the
features can do. The head that was there is forgotten.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaximm.attacks.grid import Hyper, Values, grid
from jaximm.attacks.probe import ridge
from jaximm.attacks.weights.descent import adam_of, descent
from jaximm.attacks.weights.factor_insert import feature_spectrum, spectrum_flops
from jaximm.attacks.weights.problem import Access, ModelWeights, WeightAttack
from jaximm.types import Batch, Head

SOURCE = (
    f"{ridge.SOURCE}; Kumar et al. (2022), Fine-tuning can distort pretrained features and "
    "underperform out-of-distribution, https://arxiv.org/abs/2202.10054"
)


def ridge_head(features: Batch, classes: int, penalty: Float[Array, ""]) -> Head:
    """The ridge solution on features [n, d] for one-hot rows of labels, or real targets.

    Args:
      features: and their labels.
      classes: outputs of the head; 1 for real targets.
      penalty: over the mean variance of a feature.
    """
    x, y = features
    if jnp.issubdtype(y.dtype, jnp.integer):
        targets = jax.nn.one_hot(y, classes, dtype=x.dtype)
    else:
        targets = y.astype(x.dtype)[:, None]
    spectrum = feature_spectrum(x)
    centre = jnp.mean(targets, axis=0)
    # Features along the directions first: small ones keep their digits.
    along = jnp.matmul(x - spectrum.mean[None, :], spectrum.directions, precision="highest")
    cross = jnp.matmul(along.T, targets - centre[None, :], precision="highest") / x.shape[0]
    kernel = jnp.matmul(
        spectrum.directions, cross / spectrum.damped(penalty)[:, None], precision="highest"
    )
    return Head(kernel, centre - jnp.matmul(spectrum.mean, kernel, precision="highest"))


def _start(access: Access, hyper: Hyper) -> ModelWeights:
    """The weights with a solved head."""
    weights = access.weights
    kernel, bias = weights.head
    head = ridge_head(access.features, kernel.shape[1], hyper["penalty"])
    is_class = jnp.issubdtype(access.features.y.dtype, jnp.integer)
    scale = hyper["logit_scale"] if is_class else jnp.ones(())
    parts = (part.astype(bias.dtype) * scale.astype(bias.dtype) for part in head)
    return weights._replace(head=Head(*parts))


# Built once: the same function objects each time, so that jit finds the compiled run again.
_SOLVED = descent(adam_of, _start)


def solved_head(
    *,
    learning_rates: Values = (1e-4, 1e-3),
    weight_decays: Values = (0.0,),
    penalties: Values = (1e-8, 1e-5, 1e-3, 1e-1, 1.0),
    logit_scales: Values = (10.0,),
) -> WeightAttack:
    """AdamW from a ridge head in closed form.

    Args:
      learning_rates: > 0.
      weight_decays: >= 0, decoupled.
      penalties: > 0, over the mean variance of a feature.
      logit_scales: > 0, from fitted one-hot rows to logits; real targets stay as they are.
    """
    init, update = _SOLVED
    return WeightAttack(
        init=init,
        update=update,
        update_reads=("learning_rate", "weight_decay"),
        grid=grid(
            learning_rate=(learning_rates, "(0, inf)"),
            weight_decay=(weight_decays, "[0, inf)"),
            penalty=(penalties, "(0, inf)"),
            logit_scale=(logit_scales, "(0, inf)"),
        ),
        kind="closed-form",
        title="solved head, then fine-tuning",
        source=SOURCE,
        traits=frozenset({"solves", "new_head", "undoes_defence"}),
        needs=("own_head",),
        natural_bounds=(("weight_decay", 0.0),),
        passes=1.0,
        solve_flops=spectrum_flops,
    )
