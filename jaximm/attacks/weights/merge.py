"""The backbone is averaged with a public model of the same structure, then AdamW.

    params <- (1 - mix) params + mix * public,        leaf by leaf; the head stays.

A public model that was never defended, such as the one that the defence started from, lies in the
same basin as a defended one that was trained from it; between the two the harmful task may be easy
already while the benign one still works. At mix = 1 the defence is not met at all, which is what
the undefended backbone measures.
"""

from __future__ import annotations

from typing import Unpack

import jax

from jaximm.attacks.grid import Hyper, Values
from jaximm.attacks.weights.descent import EDIT_RATES, AdamW, adam_of, descent, scaled_head, tuning
from jaximm.attacks.weights.problem import Access, ModelWeights, WeightAttack

SOURCE = (
    "Wortsman et al. (2022), Robust fine-tuning of zero-shot models, "
    "https://arxiv.org/abs/2109.01903"
)


def _start(access: Access, hyper: Hyper) -> ModelWeights:
    """The weights with an averaged backbone."""
    weights = scaled_head(access, hyper)

    def mixed(ours, theirs):
        mix = hyper["mix"].astype(ours.dtype)
        return (1 - mix) * ours + mix * theirs.astype(ours.dtype)

    return weights._replace(params=jax.tree.map(mixed, weights.params, access.public))


# Built once: the same function objects each time, so that jit finds the compiled run again.
_MERGE = descent(adam_of, _start)


def merge_with_public(*, mixes: Values = (0.25, 0.75), **adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW from an average with a public model.

    Args:
      mixes: the public model's share, in [0, 1].
      **adamw: see `AdamW`.
    """
    return tuning(
        _MERGE,
        adamw,
        rates=EDIT_RATES,
        tried={"mix": (mixes, "[0, 1]")},
        bounds=(("mix", 0.0), ("mix", 1.0)),
        title="merged with a public model",
        kind="merging",
        source=SOURCE,
        needs=("public",),
    )
