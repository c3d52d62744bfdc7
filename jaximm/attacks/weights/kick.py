"""A random kick of all parameters before the first step, then fine-tuning by AdamW.

    w <- w + kick * rms(w) * N(0, 1),      leaf by leaf; rms is the root of the mean square.

It gets away from a point whose neighbourhood a defence has shaped (small gradients, a bad
curvature) at the price of some of what the backbone knows. The source adds uniform noise of the
size of the standard deviation; leaves of zeros stay zeros here too.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaximm.attacks.grid import Hyper
from jaximm.attacks.probe.ridge import check_non_negative
from jaximm.attacks.weights.descent import (
    FineTuneAdamConfig,
    adam_of,
    by_path,
    descent,
    harmful_loss,
    scaled_head,
    tuning,
)
from jaximm.attacks.weights.lora import start_key
from jaximm.attacks.weights.problem import Access, ModelWeights, WeightAttack

SOURCE = (
    "Wu et al. (2022), NoisyTune: A little noise can help you finetune pretrained language models "
    "better, https://arxiv.org/abs/2202.12024"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KickThenTuneConfig(FineTuneAdamConfig):
    """A kick, then AdamW.

    Attributes:
      learning_rates: > 0.
      weight_decays: >= 0, decoupled.
      head_scales: factors on the head before the first step; 0 re-initialises it.
      kicks: >= 0, noise over root mean square of each leaf of the backbone's parameters.
    """

    learning_rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    kicks: tuple[float, ...] = (0.1,)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_non_negative("kicks", self.kicks)


def _kicked(access: Access, hyper: Hyper) -> ModelWeights:
    """The weights with noise on the backbone's parameters."""
    weights = scaled_head(access, hyper)
    leaves, structure = jax.tree.flatten(weights.params)
    moved = []
    for leaf, key in zip(leaves, jax.random.split(start_key(access), len(leaves)), strict=True):
        size = hyper["kick"].astype(leaf.dtype) * jnp.sqrt(jnp.mean(leaf**2))
        moved.append(leaf + size * jax.random.normal(key, leaf.shape, leaf.dtype))
    return weights._replace(params=jax.tree.unflatten(structure, moved))


# Built once: the same function objects each time, so that jit finds the compiled run again.
_KICK = descent(adam_of, _kicked, harmful_loss, by_path(lambda _: True))


def kick_then_tune(config: KickThenTuneConfig) -> WeightAttack:
    """Fine-tuning by AdamW from a randomly displaced backbone."""
    return tuning(
        config,
        _KICK,
        kind="perturbed",
        bounds=(("kick", 0.0),),
        kick=config.kicks,
    )
