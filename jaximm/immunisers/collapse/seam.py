r"""SEAM: harmful and benign gradients are made opposite, so that harmful tuning destroys the model.

    L = -log(1 + mean_l h_l) + align_weight f + cosine_weight cos(g_a, g_b)

h_l is the harmful loss as the head reads it off layer l (`Problem.lens_losses`), f the primary
loss, g_a the gradient of the harmful loss over a whole batch, g_b of the benign one. With u_a, u_b
the unit gradients and c their cosine, the gradient of c is two Hessian-vector products,

    H_b (u_a - c u_b) / |g_b| + H_a (u_b - c u_a) / |g_a|,

which are taken exactly (reverse over forward). The paper and its code take the difference of
gradients at theta + eps of these directions: as many gradients, with a relative error of about
eps. Benign rows are those of a batch "benign" where the caller gives one (the paper: Alpaca), else
the primary ones; harmful and benign rows are seen whole by every device.

Wang, Zhu, Wang (2025), Self-destructive language model, https://arxiv.org/abs/2505.12186.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaximm.immunisers.about import About
from jaximm.immunisers.collapse import common
from jaximm.immunisers.gradient import Weighted, from_objective
from jaximm.immunisers.problem import Problem, check_run
from jaximm.types import Immuniser, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeamConfig:
    """Makes the harmful gradient the opposite of the benign one, and the harmful loss large.

    Attributes:
      align_weight: of the primary loss.
      cosine_weight: of the cosine.
      steps: updates.
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="SEAM",
        source="Wang et al. (2025), Self-destructive language model, https://arxiv.org/abs/2505.12186",
        against="tuning on harmful rows alone, which is to take the benign task with it",
        broken_by="harmful rows mixed with benign ones, or a last layer that is scaled down first",
        traits=frozenset({"needs_harmful_head"}),
    )

    align_weight: float = 1.0
    cosine_weight: float = 0.01
    steps: int = 1200
    batch_size: int | None = None

    def __post_init__(self):
        for name in ("align_weight", "cosine_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}.")
        check_run(self.steps, self.batch_size)


def seam(config: SeamConfig, problem: Problem) -> Immuniser:
    """Descends -log(1 + harmful loss) + align_weight * primary loss + cosine_weight * cosine.

    Raises:
      ValueError: what `from_objective` refuses: targets that are numbers, no optimiser.
    """

    def objective(params, batches, memory, rng_key):
        del rng_key
        harmful, benign = batches["harmful"], batches["benign"]

        def harmful_loss(theta):
            return common.mean(common.harmful_rows(problem, theta, harmful))

        def benign_loss(theta):
            weights = problem.weights(benign)
            return common.mean(Weighted(problem.losses(theta, benign), weights))

        cosine = gradient_cosine(harmful_loss, benign_loss, params)
        harm = lens_loss(problem, params, harmful)
        kept = common.aligned(problem, params, batches)
        loss = {
            "harm": -jnp.log1p(harm),
            "align": kept._replace(values=config.align_weight * kept.values),
            "penalty": config.cosine_weight * cosine.astype(harm.dtype),
        }
        info = {"task_loss": kept, "harmful_loss": harm, "cosine": cosine.astype(harm.dtype)}
        return loss, info, memory

    method = from_objective("seam", problem, objective, whole=("harmful", "benign"))
    return common.with_copies(method, benign="primary")


def lens_loss(problem: Problem, params: Params, rows) -> Float[Array, ""]:
    """The harmful loss of a whole batch, mean over layers: mean_l h_l."""
    losses = problem.lens_losses(problem.with_harmful_head(params), rows)
    return common.mean(Weighted(jnp.mean(losses, axis=0), problem.weights(rows)))


def gradient_cosine(
    one: Callable[[Params], Float[Array, ""]],
    other: Callable[[Params], Float[Array, ""]],
    params: Params,
) -> Float[Array, ""]:
    """cos(grad one, grad other), whose own gradient is two Hessian-vector products.

    It may be differentiated once. A gradient that is zero makes it zero.
    """
    fixed = lax.stop_gradient(params)
    gradients = [jax.grad(loss)(fixed) for loss in (one, other)]
    sizes = [common.norm(gradient) for gradient in gradients]
    units = [common.scaled(1 / size, g) for size, g in zip(sizes, gradients, strict=True)]
    cosine = common.inner_product(*units)

    def slope(loss, size, unit, mate):
        """Along (mate - cosine unit) / size: d/dtheta of it is the Hessian times that."""
        across = jax.tree.map(jnp.subtract, mate, common.scaled(cosine, unit))
        return jax.jvp(loss, (params,), (common.scaled(1 / size, across),))[1].astype(cosine.dtype)

    along = slope(one, sizes[0], *units) + slope(other, sizes[1], *units[::-1])
    return cosine + (along - lax.stop_gradient(along))
