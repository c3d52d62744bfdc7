"""A random kick of all parameters before the first step, then fine-tuning by AdamW.

    w <- w + kick * rms(w) * N(0, 1),      leaf by leaf; rms is the root of the mean square.

It gets away from a point whose neighbourhood a defence has shaped (small gradients, a bad
curvature) at the price of some of what the backbone knows. The source adds uniform noise of the
size of the standard deviation; leaves of zeros stay zeros here too.
"""

from __future__ import annotations

from typing import Unpack

import jax
import jax.numpy as jnp

from jaximm.attacks.grid import Hyper, Values
from jaximm.attacks.weights.descent import (
    AdamW,
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


def kick_then_tune(*, kicks: Values = (0.1,), **adamw: Unpack[AdamW]) -> WeightAttack:
    """A kick, then AdamW.

    Args:
      kicks: >= 0, noise over root mean square of each leaf of the backbone's parameters.
      **adamw: see `AdamW`.
    """
    return tuning(
        _KICK,
        adamw,
        tried={"kick": (kicks, "[0, inf)")},
        bounds=(("kick", 0.0),),
        title="random kick, then fine-tuning",
        kind="perturbed",
        source=SOURCE,
    )
