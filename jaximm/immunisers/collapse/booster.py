r"""Booster: the harmful loss is to fall little in one simulated step of an attacker.

    min  f(theta) + weight ( h(theta) - h(theta - alpha grad h / |grad h|) )

f is the primary loss (the alignment data), h the harmful one. Published gradient, with theta' the
parameters after the step: grad f + weight (grad h(theta) - grad h(theta')), which takes the
direction of the step as constant; the released code does the same. ``exact`` differentiates it too.
On a small network (`tests/immunisers/test_booster.py`) what is dropped is .7 % of the penalty's
gradient at alpha .01, 7.6 % at .1 and 77 % at 1. Rows of "attack" decide the step; by default they
are the harmful ones, and every device sees all of them.

Huang, Hu, Ilhan, Tekin, Liu (2024), Booster, https://arxiv.org/abs/2409.01586.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from jaximm.immunisers.about import About
from jaximm.immunisers.collapse import common
from jaximm.immunisers.gradient import from_objective
from jaximm.immunisers.problem import Problem, check_run
from jaximm.types import Immuniser


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoosterConfig:
    """Keeps the harmful loss from falling in one normalised step on harmful rows.

    Attributes:
      weight: lambda, of the fall beside the primary loss.
      alpha: length of the simulated step in parameters, > 0.
      exact: whether the direction of the step is differentiated, for a second-order gradient.
      steps: updates.
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="Booster",
        source="Huang et al. (2024), Booster, https://arxiv.org/abs/2409.01586",
        against="a tuning service whose users' rows are harmful in part: few small steps",
        broken_by="some tens of steps at a larger rate, or harmful rows mixed with benign ones",
        traits=frozenset({"needs_harmful_head"}),
    )

    weight: float = 5.0
    alpha: float = 0.1
    exact: bool = False
    steps: int = 1200
    batch_size: int | None = None

    def __post_init__(self):
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be finite and >= 0, got {self.weight}.")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be finite and > 0, got {self.alpha}.")
        check_run(self.steps, self.batch_size)


def booster(config: BoosterConfig, problem: Problem) -> Immuniser:
    """Descends the primary loss + weight * (harmful loss - the same after a step).

    Raises:
      ValueError: what `from_objective` refuses: targets that are numbers, no optimiser.
    """

    def objective(params, batches, memory, rng_key):
        del rng_key

        def attack_loss(theta):
            return common.mean(common.harmful_rows(problem, theta, batches["attack"]))

        stepped = common.one_step(attack_loss, params, config.alpha, exact=config.exact)
        here, there = (
            common.harmful_rows(problem, theta, batches["harmful"]) for theta in (params, stepped)
        )
        fall = here._replace(values=config.weight * (here.values - there.values))
        loss = {"task_loss": common.aligned(problem, params, batches), "penalty": fall}
        return loss, {"harmful_loss": here, "harmful_loss_stepped": there}, memory

    method = from_objective("booster", problem, objective, whole=("attack",))
    return common.with_copies(method, attack="harmful")
