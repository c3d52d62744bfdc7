"""A language model as the `Problem` of any method."""

from __future__ import annotations

from typing import Any

import optax

from jaximm.immunisers.problem import Problem
from jaximm.models.llama import Language, Weights


def language_problem(
    language: Language, optimiser: optax.GradientTransformation, **fields: Any
) -> Problem:
    """What methods ask of a language model, whose parameters are `Weights`.

    One head does both tasks. Batches are as `Language` takes them; the frozen part gets neither a
    gradient nor a step, and no state of the optimiser.

    Args:
      language: the model.
      optimiser: of what trains.
      fields: others of `Problem`: `accumulate`, `reference`, `site_weights`.
    """
    return Problem(
        features_fn=language.features,
        sites_fn=language.activations,
        losses_fn=language.losses,
        scaled_losses_fn=language.scaled_losses,
        scores_fn=language.scores,
        weights_fn=language.weights,
        divergences_fn=language.divergences,
        entropies_fn=language.entropies,
        lens_fn=language.lens_losses,
        perturbed_losses_fn=language.perturbed_losses,
        width=language.config.width,
        optimiser=optax.multi_transform(
            {"trained": optimiser, "frozen": optax.set_to_zero()},
            Weights("trained", "frozen", "trained"),  # pyrefly: ignore[bad-argument-type]: a prefix
        ),
        **fields,
    )
