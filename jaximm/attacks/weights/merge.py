"""The backbone is averaged with a public model of the same structure, then AdamW.

    params <- (1 - mix) params + mix * public,        leaf by leaf; the head stays.

A public model that was never defended, such as the one that the defence started from, lies in the
same basin as a defended one that was trained from it; between the two the harmful task may be easy
already while the benign one still works. At mix = 1 the defence is not met at all, which is what
the undefended backbone measures.
"""

from __future__ import annotations

import dataclasses

import jax

from jaximm.attacks.grid import Hyper
from jaximm.attacks.weights.descent import FineTuneAdamConfig, adam_of, descent, scaled_head, tuning
from jaximm.attacks.weights.problem import Access, ModelWeights, WeightAttack

SOURCE = (
    "Wortsman et al. (2022), Robust fine-tuning of zero-shot models, "
    "https://arxiv.org/abs/2109.01903"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeWithPublicConfig(FineTuneAdamConfig):
    """AdamW from an average with a public model.

    Attributes:
      learning_rates: > 0.
      weight_decays: >= 0, decoupled.
      head_scales: factors on the head before the first step; 0 re-initialises it.
      mixes: the public model's share, in [0, 1].
    """

    learning_rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    mixes: tuple[float, ...] = (0.25, 0.75)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mixes or not all(0 <= value <= 1 for value in self.mixes):
            raise ValueError(f"mixes must be numbers in [0, 1], at least one, got {self.mixes}.")


def _start(access: Access, hyper: Hyper) -> ModelWeights:
    """The weights with an averaged backbone."""
    weights = scaled_head(access, hyper)

    def mixed(ours, theirs):
        mix = hyper["mix"].astype(ours.dtype)
        return (1 - mix) * ours + mix * theirs.astype(ours.dtype)

    return weights._replace(params=jax.tree.map(mixed, weights.params, access.public))


# Built once: the same function objects each time, so that jit finds the compiled run again.
_MERGE = descent(adam_of, _start)


def merge_with_public(config: MergeWithPublicConfig) -> WeightAttack:
    """Fine-tuning by AdamW from an average with a public model."""
    return tuning(
        config,
        _MERGE,
        kind="merging",
        bounds=(
            ("mix", 0.0),
            ("mix", 1.0),
        ),
        needs=("public",),
        mix=config.mixes,
    )
