r"""T-Vaccine: Vaccine on a few layers at a time, drawn by how steep the harmful loss is in them.

Every `refresh` steps a share of the layers is drawn without replacement with

    p_l = |grad_l h| / sum_k |grad_k h|,   h the harmful loss of a whole batch,

and until the next draw the others are frozen and get no offsets; the one norm of the offsets is
that of the drawn layers'. A layer is what the parameters of one path up to its last dot make up.
Sites that are named after a layer follow it; the features are always perturbed, and a head of its
own always trains. The released code takes the gradient in a layer's outputs for grad_l, draws
layers and renews p_l at two intervals, and gives frozen layers to no optimiser; here their moments
decay while their numbers stay.

Liu et al. (2024), Targeted Vaccine, https://arxiv.org/abs/2410.09760.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaximm.immunisers.about import About
from jaximm.immunisers.collapse import common
from jaximm.immunisers.collapse.vaccine import pulls
from jaximm.immunisers.gradient import from_objective
from jaximm.immunisers.problem import Problem, check_run
from jaximm.types import Immuniser, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class TVaccineConfig:
    """Trains drawn layers under the worst offsets of their activations, and freezes the others.

    Attributes:
      rho: norm of the offsets over the drawn sites and all rows of a batch, > 0.
      share: of the layers that are drawn, in (0, 1]; at least one is. Paper: 8 of 32.
      refresh: steps between draws.
      steps: updates.
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="T-Vaccine",
        source="Liu et al. (2024), Targeted Vaccine, https://arxiv.org/abs/2410.09760",
        against="a tuning service whose users' rows are harmful in part: embeddings that drift",
        broken_by="some tens of steps on harmful rows",
        traits=frozenset({"needs_harmful_head"}),
    )

    rho: float = 2.0
    share: float = 0.25
    refresh: int = 20
    steps: int = 1200
    batch_size: int | None = None

    def __post_init__(self):
        if not 0 < self.rho < math.inf:
            raise ValueError(f"rho must be finite and > 0, got {self.rho}.")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}.")
        if self.refresh < 1:
            raise ValueError(f"refresh must be >= 1, got {self.refresh}.")
        check_run(self.steps, self.batch_size)


class Drawn(NamedTuple):
    """Which layers train, in the order of their names, and the updates done."""

    layers: Bool[Array, "layers"]
    count: Int[Array, ""]


def t_vaccine(config: TVaccineConfig, problem: Problem) -> Immuniser:
    """Descends the primary loss at perturbed activations, in drawn layers.

    Raises:
      ValueError: what `from_objective` refuses; at the start, parameters that are no dict by path,
        as those of a decoder, which holds all its layers in one array.
    """
    own = problem.losses_fn is not None

    def backbone_of(params: Params) -> Params:
        return params if own else params.backbone

    def with_backbone(params: Params, backbone: Params) -> Params:
        return backbone if own else params._replace(backbone=backbone)

    def memory(params: Params) -> Drawn:
        backbone = backbone_of(params)
        if not isinstance(backbone, Mapping):
            raise ValueError(
                "t_vaccine draws layers by the paths of parameters, got "
                f"{type(backbone).__name__} and not a dict by path; use vaccine."
            )
        names = layers_of(backbone)
        return Drawn(jnp.zeros(len(names), bool), jnp.zeros((), jnp.int32))

    def objective(params, batches, memory, rng_key):
        rows, fixed = batches["primary"], lax.stop_gradient(params)
        names = layers_of(backbone_of(params))

        def drawn():
            def harmful_loss(theta):
                return common.mean(common.harmful_rows(problem, theta, batches["harmful"]))

            slopes = slopes_of(backbone_of(jax.grad(harmful_loss)(fixed)))
            return draw(rng_key, slopes, max(1, round(config.share * len(names))))

        layers = lax.cond(memory.count % config.refresh == 0, drawn, lambda: memory.layers)

        def chosen(rows):
            found = pulls(problem, fixed, rows)
            return {site: pull * open_at(site, names, layers, pull) for site, pull in found.items()}

        size = config.rho / common.norm(chosen(batches["whole"]))
        offsets = common.scaled(size, chosen(rows))
        free = with_backbone(params, where(layers, backbone_of(params), backbone_of(fixed)))
        perturbed = problem.perturbed_losses(free, rows, offsets)
        kept = common.aligned(problem, fixed, batches)
        loss = {"perturbed_loss": kept._replace(values=perturbed)}
        return loss, {"task_loss": kept}, Drawn(layers, memory.count + 1)

    method = from_objective(
        "t_vaccine", problem, objective, init_memory=memory, whole=("whole", "harmful")
    )

    def update(state, batches, rng_key):
        after, info = method.update(state, batches, rng_key)
        moved, stayed = backbone_of(after.params), backbone_of(state.params)
        backbone = where(after.memory.layers, moved, stayed)
        return after._replace(params=with_backbone(after.params, backbone)), info

    return common.with_copies(method._replace(update=update), whole="primary")


def layer_of(path: str) -> str:
    """The layer of a parameter."""
    return path.rpartition(".")[0] or path


def layers_of(paths: Iterable[str]) -> list[str]:
    """Names of the layers, in order."""
    return sorted({layer_of(path) for path in paths})


def slopes_of(gradient: Params) -> Float[Array, "layers"]:
    """Norm of the gradient of each layer."""
    names = layers_of(gradient)
    return jnp.stack(
        [
            common.norm({path: leaf for path, leaf in gradient.items() if layer_of(path) == name})
            for name in names
        ]
    )


def draw(rng_key: jax.Array, slopes: Float[Array, "layers"], count: int) -> Bool[Array, "layers"]:
    """Some layers, one after the other without replacement, each by its share of what is left.

    The largest of log p_l + Gumbel noise are that (Gumbel top-k).
    """
    noisy = jnp.log(slopes) + jax.random.gumbel(rng_key, slopes.shape, slopes.dtype)
    _, places = lax.top_k(noisy, count)
    return jnp.zeros(slopes.shape, bool).at[places].set(True)


def open_at(site: str, names: list[str], layers: Bool[Array, "layers"], like: Array) -> Array:
    """1 where a site's layer is drawn, or where it is no layer's; else 0."""
    return (
        layers[names.index(site)].astype(like.dtype) if site in names else jnp.ones((), like.dtype)
    )


def where(layers: Bool[Array, "layers"], one: Params, other: Params) -> Params:
    """Drawn layers of one backbone, and those that are not of another."""
    names = layers_of(one)
    return {
        path: jnp.where(layers[names.index(layer_of(path))], leaf, other[path])
        for path, leaf in one.items()
    }
