r"""Vaccine: the primary loss under the worst small offsets of the activations.

    min_theta f(theta; a_l + e_l),   e_l = rho g_l / |(g_1 .. g_L)|

g_l is the gradient of the primary loss in the rows a_l of site l, with one norm over all sites and
all rows of the batch; the offsets are constant in the second pass. The paper and its code put them
on the outputs of attention blocks; here on the inputs of the layers that a problem names as sites
(`Problem.perturbed_losses`), and on the features. Rows of "whole" decide the norm: by default the
primary ones, which every device then passes once more.

Huang, Hu, Liu (2024), Vaccine, https://arxiv.org/abs/2402.01109.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaximm.immunisers.about import About
from jaximm.immunisers.collapse import common
from jaximm.immunisers.gradient import from_objective
from jaximm.immunisers.problem import Problem, check_run
from jaximm.types import AnyBatch, Immuniser, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaccineConfig:
    """Trains the primary task under the worst offsets of activations of a given norm.

    Attributes:
      rho: norm of the offsets over all sites and rows of a batch, > 0.
      steps: updates.
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="Vaccine",
        source="Huang et al. (2024), Vaccine, https://arxiv.org/abs/2402.01109",
        against="a tuning service whose users' rows are harmful in part: embeddings that drift",
        broken_by="ten steps on harmful rows",
        traits=frozenset({"needs_harmful_head"}),
    )

    rho: float = 2.0
    steps: int = 1200
    batch_size: int | None = None

    def __post_init__(self):
        if not 0 < self.rho < math.inf:
            raise ValueError(f"rho must be finite and > 0, got {self.rho}.")
        check_run(self.steps, self.batch_size)


def vaccine(config: VaccineConfig, problem: Problem) -> Immuniser:
    """Descends the primary loss at perturbed activations.

    Raises:
      ValueError: what `from_objective` refuses; when it is traced, a `losses_fn` without a
        `perturbed_losses_fn`.
    """

    def objective(params, batches, memory, rng_key):
        del rng_key
        rows, fixed = batches["primary"], lax.stop_gradient(params)
        size = config.rho / common.norm(pulls(problem, fixed, batches["whole"]))
        offsets = common.scaled(size, pulls(problem, fixed, rows))
        perturbed = problem.perturbed_losses(params, rows, offsets)
        kept = common.aligned(problem, fixed, batches)
        return {"perturbed_loss": kept._replace(values=perturbed)}, {"task_loss": kept}, memory

    method = from_objective("vaccine", problem, objective, whole=("whole",))
    return common.with_copies(method, whole="primary")


def pulls(problem: Problem, params: Params, rows: AnyBatch) -> Params:
    """Gradients of the sum of the primary losses, by their weights, in the rows of every site.

    A row's offsets move its own loss alone, so that a part of a batch has its part of them.
    """
    weights = problem.weights(rows)

    def total(offsets):
        losses = problem.perturbed_losses(params, rows, offsets)
        return jnp.sum(jnp.where(weights > 0, losses, 0) * weights.astype(losses.dtype))

    return jax.grad(total)(problem.offsets(params, rows))
