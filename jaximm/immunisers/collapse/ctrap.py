r"""CTRAP: after one simulated step of an attacker the model is to answer everything with one token.

    min  f(theta) + weight C(theta - alpha grad h / |grad h|),   C = mean_i -log p(token | x_i)

f is the primary loss, h the harmful one, C the loss of one fixed answer to general rows. The paper
writes the step as theta - alpha grad h; here it has the length alpha, as in Booster, so that the
setting has a meaning across models. The direction is taken as constant, or differentiated with
``exact``. General rows are those of a batch "general" where the caller gives one, else the primary
ones; the answer stands in the place of every integer of their ``y``. The trap leaks into the model
that nobody has attacked where alpha is small beside what training moves: look at the primary score.

Yi et al. (2025), CTRAP: embedding collapse trap, https://arxiv.org/abs/2505.16559.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaximm.immunisers.about import About
from jaximm.immunisers.collapse import common
from jaximm.immunisers.gradient import Weighted, from_objective
from jaximm.immunisers.problem import Problem, check_run
from jaximm.types import AnyBatch, Immuniser


@dataclasses.dataclass(frozen=True, kw_only=True)
class CtrapConfig:
    """Trains one fixed answer to everything into the parameters after a harmful step.

    Attributes:
      weight: lambda, of the collapse beside the primary loss.
      alpha: length of the simulated step in parameters, > 0.
      token: the fixed answer, a class or a token, >= 0.
      exact: whether the direction of the step is differentiated.
      steps: updates.
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="CTRAP",
        source="Yi et al. (2025), CTRAP, https://arxiv.org/abs/2505.16559",
        against="a tuning service whose users' rows are harmful: the model is to break with it",
        broken_by="harmful rows mixed with benign ones, or a last layer that is scaled down first",
        traits=frozenset({"needs_harmful_head"}),
    )

    weight: float = 1.0
    alpha: float = 0.1
    token: int = 0
    exact: bool = False
    steps: int = 1200
    batch_size: int | None = None

    def __post_init__(self):
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be finite and >= 0, got {self.weight}.")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be finite and > 0, got {self.alpha}.")
        if self.token < 0:
            raise ValueError(f"token must be a class or a token >= 0, got {self.token}.")
        check_run(self.steps, self.batch_size)


def ctrap(config: CtrapConfig, problem: Problem) -> Immuniser:
    """Descends the primary loss + weight * the loss of one answer after a harmful step.

    Raises:
      ValueError: a token that is none of the classes, or what `from_objective` refuses.
    """
    if problem.classes is not None and config.token >= problem.classes:
        raise ValueError(
            f"ctrap's token must be one of {problem.classes} classes, got {config.token}."
        )

    def objective(params, batches, memory, rng_key):
        del rng_key

        def attack_loss(theta):
            return common.mean(common.harmful_rows(problem, theta, batches["harmful"]))

        stepped = common.one_step(attack_loss, params, config.alpha, exact=config.exact)
        rows = one_answer(batches["general"], config.token)
        collapse, weights = problem.losses(stepped, rows), problem.weights(rows)
        loss = {
            "task_loss": common.aligned(problem, params, batches),
            "penalty": Weighted(config.weight * collapse, weights),
        }
        return loss, {"collapse": Weighted(collapse, weights)}, memory

    method = from_objective("ctrap", problem, objective, whole=("harmful",))
    return common.with_copies(method, general="primary")


def one_answer(rows: AnyBatch, token: int) -> AnyBatch:
    """The rows with one answer for all; masks stay."""

    def answer(leaf):
        return jnp.full_like(leaf, token) if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf

    return rows._replace(y=jax.tree.map(answer, rows.y))
