r"""RMU: harmful activations are steered to a random direction, the others stay as they were.

    forget = mean_i (1/d) |h(x_i) - c u|^2               over harmful rows
    retain = alpha mean_i (1/d) |h(x_i) - h_0(x_i)|^2    over retain rows

h are the rows of one site of the model ("features": what a head reads), h_0 those of the start, u a
fixed random direction: uniform entries in [0, 1), over their norm. Retain rows are the batch
``retain`` where the caller gives one, else the primary rows. Heads get no gradient.

The released code steers the output of one block, averages over all d numbers of a position (so is
it here; the paper sums them), and trains one matrix of three layers: name what may move in
`targets`. A language model's sites are inputs of linear maps (`Language.sites`).

Li et al. (2024), The WMDP benchmark, https://arxiv.org/abs/2403.03218, section 4.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaximm.immunisers.about import About
from jaximm.immunisers.gradient import Weighted, from_objective
from jaximm.immunisers.kernels import dotted
from jaximm.immunisers.problem import FEATURES, Problem, check_run
from jaximm.models.adapters import lora
from jaximm.types import AnyBatch, Immuniser, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class RmuConfig:
    """Steers the activations of harmful inputs to a random direction.

    Attributes:
      steering: c, the length that harmful activations are pulled to, > 0; in the order of those
        that the model has (6.5 for the seventh layer of Zephyr-7B).
      retain_weight: alpha.
      site: whose activations, a name of `Problem.sites`.
      targets: what may move: dotted prefixes of parameters, separated by commas
        ("backbone.layers.1", "trained.layers.down"); "*": all.
      direction: number from which u is drawn.
      steps: updates.
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="RMU",
        source="Li et al. (2024), The WMDP benchmark, https://arxiv.org/abs/2403.03218",
        against="users of the model as it is, who do not train it",
        broken_by="fine-tuning, relearning from a few harmful rows, or a fresh head",
        traits=frozenset({"needs_harmful_head"}),
    )

    steering: float = 6.5
    retain_weight: float = 1200.0
    site: str = FEATURES
    targets: str = "*"
    direction: int = 0
    steps: int = 300
    batch_size: int | None = None

    def __post_init__(self):
        if not 0 < self.steering < math.inf:
            raise ValueError(f"steering must be finite and > 0, got {self.steering}.")
        if not 0 <= self.retain_weight < math.inf:
            raise ValueError(f"retain_weight must be finite and >= 0, got {self.retain_weight}.")
        lora.named_by(self.targets)
        check_run(self.steps, self.batch_size)


class Steered(NamedTuple):
    """Both terms by rows of the site."""

    forget: Weighted
    retain: Weighted


def steered_rows(
    problem: Problem,
    params: Params,
    reference: Params,
    batches: AnyBatch,
    config: RmuConfig,
) -> Steered:
    """The two distances of each row that counts, without alpha."""
    retained = getattr(batches, "retain", batches.primary)
    harm, kept, before = (
        _site(problem, config.site, model, batch)
        for model, batch in (
            (params, batches.harmful),
            (params, retained),
            (jax.lax.stop_gradient(reference), retained),
        )
    )
    goal = config.steering * direction(harm.shape[1], config.direction).astype(harm.dtype)
    return Steered(
        _counted(problem, batches.harmful, jnp.mean((harm - goal[None, :]) ** 2, axis=1)),
        _counted(problem, retained, jnp.mean((kept - before) ** 2, axis=1)),
    )


def direction(width: int, number: int) -> Float[Array, "d"]:
    """u: non-negative entries, of norm 1."""
    drawn = jax.random.uniform(jax.random.key(number), (width,))
    return drawn / jnp.linalg.norm(drawn)


def restricted(problem: Problem, targets: str) -> Problem:
    """The same problem, in which nothing moves but what a pattern names: no weight decay either."""
    if targets == "*" or problem.optimiser is None:
        return problem
    named = lora.named_by(targets)

    def others(tree):
        return jax.tree_util.tree_map_with_path(lambda path, _: not named(dotted(path)), tree)

    still = optax.masked(optax.set_to_zero(), others)
    # Before the optimiser as well: a norm that is clipped is that of what moves.
    return dataclasses.replace(problem, optimiser=optax.chain(still, problem.optimiser, still))


def rmu(config: RmuConfig, problem: Problem) -> Immuniser:
    """Descends forget + retain_weight * retain.

    Raises:
      ValueError: what `from_objective` refuses; an unknown site, at trace time; targets that name
        no parameter, when a run starts.
    """

    def objective(params, batches, reference, rng_key):
        del rng_key
        forget, (moved, weights) = steered_rows(problem, params, reference, batches, config)
        loss = {"forget": forget, "retain": Weighted(config.retain_weight * moved, weights)}
        return loss, {}, reference

    def memory(params):
        check_targets(config.targets, params)
        return problem.reference_of(params)

    return from_objective("rmu", restricted(problem, config.targets), objective, init_memory=memory)


def check_targets(targets: str, params: Params) -> None:
    """Refuses a pattern that names nothing.

    Raises:
      ValueError: as said.
    """
    paths = [dotted(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if not any(map(lora.named_by(targets), paths)):
        raise ValueError(f"targets {targets!r} names no parameter; there are {sorted(paths)}.")


def _site(problem: Problem, site: str, params: Params, batch: AnyBatch) -> Float[Array, "rows d"]:
    backbone = params if problem.losses_fn is not None else params.backbone
    sites = problem.sites(backbone, batch.x)
    if site not in sites:
        raise ValueError(f"site {site!r} is none of the problem's sites {sorted(sites)}.")
    return sites[site]


def _counted(problem: Problem, batch: AnyBatch, values: Float[Array, "rows"]) -> Weighted:
    counted = problem.counted(batch)
    return Weighted(values, jnp.ones_like(values) if counted is None else counted)
