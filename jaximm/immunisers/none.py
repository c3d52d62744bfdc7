"""No immunisation: the raw backbone, as the control of every table."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaximm import collectives
from jaximm.immunisers.about import About
from jaximm.immunisers.problem import LinearTask, ProbeParams, Problem, check_run
from jaximm.types import FeaturesFn, Immuniser


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoneConfig:
    """Leaves the backbone as it is: the control.

    Attributes:
      steps: updates (each only measures the primary loss).
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="no defence",
        source="control",
        traits=frozenset({"control", "closed_form"}),
    )

    steps: int = 1
    batch_size: int | None = None

    def __post_init__(self):
        check_run(self.steps, self.batch_size)


class State(NamedTuple):
    """The unchanged parameters and the number of updates done."""

    params: ProbeParams
    step: Int[Array, ""]


class Info(NamedTuple):
    """The primary loss of the untrained head."""

    task_loss: Float[Array, ""]


def none(config: NoneConfig, problem: Problem) -> Immuniser:
    """The identity method."""
    del config

    def init(params: ProbeParams, rng_key) -> State:
        del rng_key
        return State(params, jnp.zeros((), jnp.int32))

    # Features of a network hold arrays, which no cache may.
    make = _update if problem.factors is not None else _update.__wrapped__
    update = make(problem.features_fn, problem.primary)
    return Immuniser(init, update, finish=lambda state: state.params)


@functools.lru_cache(maxsize=64)
def _update(features_fn: FeaturesFn, task: LinearTask):
    def update(state: State, batch, rng_key):
        del rng_key
        backbone, head = state.params
        outputs = task.outputs(features_fn(backbone, batch.primary.x), head)
        loss = collectives.mean_over_devices(task.loss(outputs, batch.primary.y))
        return State(state.params, state.step + 1), Info(loss)

    return update
