r"""A ridge head in closed form on the features as they came, then AdamW on everything.

    kernel = (C + penalty * tr(C) / d * I)^(-1) cov(f, Y),      bias = mean(Y) - mean(f) kernel,

with C the covariance of the features of all training rows, and Y one-hot rows or real targets. For
classes, which are trained by cross-entropy, kernel and bias are then multiplied by `logit_scale`:
a least-squares fit predicts probabilities, and as logits those would hardly tell classes apart. The
solve does not care how ill-conditioned C is; what fine-tuning starts from is the best that the
features can do. The head that was there is forgotten.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaximm.attacks.grid import Hyper, check_positive, grid_product
from jaximm.attacks.probe import ridge
from jaximm.attacks.probe.ridge import check_non_negative
from jaximm.attacks.weights.descent import adam_of, descent
from jaximm.attacks.weights.factor_insert import feature_spectrum, spectrum_flops
from jaximm.attacks.weights.problem import Access, ModelWeights, WeightAttack
from jaximm.types import Batch, Head

SOURCE = (
    f"{ridge.SOURCE}; Kumar et al. (2022), Fine-tuning can distort pretrained features and "
    "underperform out-of-distribution, https://arxiv.org/abs/2202.10054"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolvedHeadConfig:
    """AdamW from a ridge head in closed form.

    Attributes:
      learning_rates: > 0.
      weight_decays: >= 0, decoupled.
      penalties: > 0, over the mean variance of a feature.
      logit_scales: > 0, from fitted one-hot rows to logits; real targets stay as they are.
    """

    learning_rates: tuple[float, ...] = (1e-4, 1e-3)
    weight_decays: tuple[float, ...] = (0.0,)
    penalties: tuple[float, ...] = (1e-3, 1e-1, 1.0)
    logit_scales: tuple[float, ...] = (10.0,)

    def __post_init__(self) -> None:
        for name in ("learning_rates", "penalties", "logit_scales"):
            check_positive(name, getattr(self, name))
        check_non_negative("weight_decays", self.weight_decays)


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
    found = ridge_head(access.features, kernel.shape[1], hyper["penalty"])
    is_class = jnp.issubdtype(access.features.y.dtype, jnp.integer)
    scale = hyper["logit_scale"] if is_class else jnp.ones(())
    parts = (part.astype(bias.dtype) * scale.astype(bias.dtype) for part in found)
    return weights._replace(head=Head(*parts))


# Built once: the same function objects each time, so that jit finds the compiled run again.
_SOLVED = descent(adam_of, _start)


def solved_head(config: SolvedHeadConfig) -> WeightAttack:
    """Fine-tuning by AdamW from a ridge head."""
    init, update = _SOLVED
    return WeightAttack(
        init=init,
        update=update,
        update_reads=("learning_rate", "weight_decay"),
        grid=grid_product(
            learning_rate=config.learning_rates,
            weight_decay=config.weight_decays,
            penalty=config.penalties,
            logit_scale=config.logit_scales,
        ),
        kind="closed form",
        natural_bounds=(("weight_decay", 0.0),),
        passes=1.0,
        solve_flops=spectrum_flops,
    )
