r"""Gradient routing: a domain is learned by a part of the model, which is not released.

With theta = (core, part), m ~ Bernoulli(attached) one draw a step, and L the mean losses,

    core   <-  gradient of L_primary(core, m part)
    part   <-  gradient of w L_harmful(core, part),       released: (core, 0)

The domain's loss never moves the core, and the core learns to do without the part. The part is a
share of each layer's units with all that computes them (`partition.of_units`).

What may be claimed: absence of information. With ``attached=0`` and an optimiser that works entry
by entry the released core is the same to the last bit whatever the domain's rows are; with more the
core's gradients pass through a part that has seen them, and a gradient clipped by its norm joins
the two as well. Rows of the domain among the primary ones write it into the core, a start that
knows it voids the claim (route from random weights on), and the core's features serve the domain as
those of a model do that never saw it. That model is the comparison, after fresh and rescaled heads:
a released core is often below it at first for the scale of its logits alone.

Where one head does both tasks and no primary row is of the domain, the core pushes the logits of
labels that it never sees to minus infinity and the part pushes back, without end. `core_classes`
leaves those labels out of the core's softmax.

Cloud et al. (2024), Gradient routing, https://arxiv.org/abs/2410.04332; SGTM,
https://arxiv.org/abs/2512.05648, which masks gradients so on language models. Deviation: units by
their place and one draw of m a step, for any model.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax

from jaximm.immunisers.about import About
from jaximm.immunisers.gradient import Weighted, from_objective
from jaximm.immunisers.locks import partition
from jaximm.immunisers.problem import Problem, check_run
from jaximm.types import Immuniser

PART = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientRoutingConfig:
    """Trains both tasks, the harmful one into a part of the units that is zero in the release.

    Attributes:
      share: of each layer's units that are the part, in (0, 1).
      attached: how often the part is on in a step's primary rows, in [0, 1).
      harmful_weight: of the harmful loss, which moves the part alone.
      core_classes: labels 0 .. core_classes - 1 are those that primary rows have; the others are
        left out of the primary softmax. None: all are in it.
      units: regular expression of dotted paths whose last axis is of units.
      readers: of those whose second to last axis is.
      steps: updates.
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="gradient routing",
        source="Cloud et al. (2024), Gradient routing, https://arxiv.org/abs/2410.04332",
        against="whoever gets the model without its part",
        broken_by="harmful rows among the primary ones, a start that knows the task, or as many "
        "rows as teach it to a model that never saw it",
        traits=frozenset({"needs_harmful_head"}),
    )

    share: float = 0.25
    attached: float = 0.3
    harmful_weight: float = 1.0
    core_classes: int | None = None
    units: str = r"^backbone\.|(gate|up)\.kernel$"
    readers: str = r"^head\.kernel$|down\.kernel$"
    steps: int = 1000
    batch_size: int | None = None

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"share must be in (0, 1), got {self.share}.")
        if not 0 <= self.attached < 1:
            raise ValueError(f"attached must be in [0, 1), got {self.attached}.")
        if not 0 < self.harmful_weight < math.inf:
            raise ValueError(f"harmful_weight must be finite and > 0, got {self.harmful_weight}.")
        if self.core_classes is not None and self.core_classes < 1:
            raise ValueError(f"core_classes must be >= 1, or None, got {self.core_classes}.")
        check_run(self.steps, self.batch_size)


def gradient_routing(config: GradientRoutingConfig, problem: Problem) -> Immuniser:
    """Routes the two tasks' gradients; `finish` sets the part to 0, the state keeps it.

    With a harmful head of its own the harmful task is read off the features by that head, which is
    fixed. The state's parameters are the model with its part attached.

    Raises:
      ValueError: what `from_objective` refuses; `core_classes` beside a `losses_fn`, or more of
        them than the problem has classes; at `init`, units that cannot be shared.
    """
    core_classes = config.core_classes
    if core_classes is not None and problem.losses_fn is not None:
        raise ValueError(
            "gradient_routing: core_classes cuts the softmax of a head of classes, and this "
            "problem has a losses_fn of its own; leave out the harmful tokens there."
        )
    if core_classes is not None and core_classes > (problem.classes or 0):
        raise ValueError(
            f"gradient_routing: core_classes={core_classes} of {problem.classes} classes."
        )

    def owners(params):
        return partition.of_units(params, config.share, units=config.units, readers=config.readers)

    def core_losses(params, rows):
        if core_classes is None:
            return problem.training_losses(params, rows)
        outputs = params.head.outputs(problem.features_fn(params.backbone, rows.x))
        return problem.primary.objective.losses(outputs[:, :core_classes], rows.y)

    def objective(params, batches, memory, rng_key):
        primary, harmful, parts = batches.primary, batches.harmful, owners(params)
        attached = jax.random.bernoulli(rng_key, config.attached)
        core = partition.routed(params, parts, partition.CORE)
        core = partition.ablate(core, parts, PART, attached)
        part = problem.with_harmful_head(partition.routed(params, parts, PART))
        kept, learned = core_losses(core, primary), problem.losses(part, harmful)
        weights, harmful_weights = problem.weights(primary), problem.weights(harmful)
        loss = {
            "core": Weighted(kept, weights),
            "part": Weighted(config.harmful_weight * learned, harmful_weights),
        }
        info = {"harmful_loss": Weighted(learned, harmful_weights)}
        return loss, info, memory

    method = from_objective("gradient_routing", problem, objective)

    def init(params, rng_key):
        owners(params)  # refuses at the door
        return method.init(params, rng_key)

    def finish(state):
        return partition.ablate(state.params, owners(state.params), PART)

    return Immuniser(init, method.update, finish)
