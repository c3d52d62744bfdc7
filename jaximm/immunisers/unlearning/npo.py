r"""NPO: preference optimisation with the harmful answers as the rejected ones, and no preferred.

    forget = 2/beta mean_i softplus(beta (log p_theta(y_i | x_i) - log p_ref(y_i | x_i)))

over harmful rows, log p of a whole row (the sum over its tokens), one ratio a row, plus
``retain_weight`` times the primary loss. The slope of a row is its gradient ascent's times
2 sigmoid(beta ratio), so rows that are forgotten pull no more. The reference is the model that the
run starts from; the harmful head is fixed. Deviation: the released code of NPO in ILU's repository
takes one ratio of batch-mean losses in place of one a row.

Zhang, Lin, Bai, Mei (2024), Negative preference optimization, https://arxiv.org/abs/2404.05868.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
from jaxtyping import Array, Float

from jaximm.immunisers.about import About
from jaximm.immunisers.gradient import Weighted, from_objective
from jaximm.immunisers.problem import Problem, check_run
from jaximm.types import AnyBatch, Immuniser, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpoConfig:
    """Unlearns the harmful task down from a reference, and keeps training the primary one.

    Attributes:
      beta: inverse temperature, > 0; towards 0 it is gradient ascent.
      retain_weight: of the primary loss.
      steps: updates.
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="NPO",
        source="Zhang et al. (2024), Negative preference optimization, https://arxiv.org/abs/2404.05868",
        against="users of the model as it is, who do not train it",
        broken_by="relearning from a few harmful rows, or a fresh or rescaled head",
        traits=frozenset({"needs_harmful_head"}),
    )

    beta: float = 0.1
    retain_weight: float = 1.0
    steps: int = 300
    batch_size: int | None = None

    def __post_init__(self):
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be finite and > 0, got {self.beta}.")
        if not 0 <= self.retain_weight < math.inf:
            raise ValueError(f"retain_weight must be finite and >= 0, got {self.retain_weight}.")
        check_run(self.steps, self.batch_size)


class Forgotten(NamedTuple):
    """Of harmful rows: the term, and the loss that it unlearns, in nats."""

    values: Float[Array, "rows"]
    losses: Float[Array, "rows"]


def forget_rows(
    problem: Problem, params: Params, reference: Params, harmful: AnyBatch, beta: float
) -> Forgotten:
    """2/beta softplus(beta log p_theta / p_ref) of each harmful row, read by the harmful head."""
    losses, before = (
        problem.losses(problem.with_harmful_head(model), harmful) for model in (params, reference)
    )
    log_ratio = problem.weights(harmful).astype(losses.dtype) * (before - losses)
    return Forgotten(2 / beta * jax.nn.softplus(beta * log_ratio), losses)


def npo(config: NpoConfig, problem: Problem) -> Immuniser:
    """Descends forget + retain_weight * primary loss.

    Raises:
      ValueError: what `from_objective` refuses: targets that are numbers, no optimiser.
    """

    def objective(params, batches, reference, rng_key):
        del rng_key
        harmful, primary = batches.harmful, batches.primary
        forget, losses = forget_rows(problem, params, reference, harmful, config.beta)
        length = problem.weights(harmful)
        kept, weights = problem.training_losses(params, primary), problem.weights(primary)
        loss = {"forget": forget, "retain": Weighted(config.retain_weight * kept, weights)}
        info = {"task_loss": Weighted(kept, weights), "harmful_loss": Weighted(losses, length)}
        return loss, info, reference

    return from_objective("npo", problem, objective, init_memory=problem.reference_of)
