r"""UNDO: unlearn, noise the result, distil it back into itself from its outputs.

1. `unlearn_steps` steps of NPO give the teacher phi.
2. theta = (1 - alpha) phi + alpha beta N,  N Glorot-uniform for kernels, 0 for biases and scales.
3. The rest of the steps descend KL(phi || theta), the mean over primary rows plus that over
   harmful rows, on the outputs that the model is released with.

What noise has destroyed comes back only as far as the teacher's outputs show it. alpha is the
share of the way to a random start, and what is paid for: 1 is distillation from scratch. The
optimiser starts anew with the student; steps need not fall in the two phases as published.

Deviations: the released code unlearns by gradient difference, maximum entropy or RMU before it, and
stops when the student has reached a share of the teacher's accuracy; here steps end it. On a
problem with an own head the harmful head is fixed, and no output that the student learns from
passes through it.

Lee et al. (2025), Distillation robustifies unlearning, https://arxiv.org/abs/2506.06278.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaximm.immunisers.about import About
from jaximm.immunisers.gradient import State, Weighted, from_objective
from jaximm.immunisers.kernels import over_kernels, refuse_adapters
from jaximm.immunisers.problem import Problem, check_run
from jaximm.immunisers.unlearning.npo import forget_rows
from jaximm.training.optimiser import optimiser_state
from jaximm.types import Immuniser, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class UndoConfig:
    """Unlearns, adds noise to the weights and distils the unlearned outputs into them.

    Attributes:
      unlearn_steps: first steps, by NPO; fewer than `steps`.
      noise_share: alpha, in [0, 1].
      noise_scale: beta, >= 0.
      npo_beta: inverse temperature of NPO, > 0.
      retain_weight: of the primary loss in the first phase.
      steps: updates, of both phases.
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="UNDO",
        source="Lee et al. (2025), Distillation robustifies unlearning, https://arxiv.org/abs/2506.06278",
        against="relearning by fine-tuning, where the model is all that the attacker has",
        broken_by="longer relearning where alpha is small; rows that teach the task to anyone",
        traits=frozenset({"needs_harmful_head"}),
    )

    unlearn_steps: int = 100
    noise_share: float = 0.6
    noise_scale: float = 0.1
    npo_beta: float = 0.1
    retain_weight: float = 1.0
    steps: int = 600
    batch_size: int | None = None

    def __post_init__(self):
        check_run(self.steps, self.batch_size)
        if not 1 <= self.unlearn_steps < self.steps:
            raise ValueError(
                f"unlearn_steps must be at least 1 and below steps={self.steps}, got "
                f"{self.unlearn_steps}."
            )
        if not 0 <= self.noise_share <= 1:
            raise ValueError(f"noise_share must be in [0, 1], got {self.noise_share}.")
        if not 0 < self.npo_beta < math.inf:
            raise ValueError(f"npo_beta must be finite and > 0, got {self.npo_beta}.")
        for name in ("noise_scale", "retain_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}.")


def undo(config: UndoConfig, problem: Problem) -> Immuniser:
    """Two phases in one run; see the module.

    Raises:
      ValueError: what `from_objective` refuses; adapters of a language model, when a run starts.
    """

    def objective(params, batches, memory, rng_key):
        del rng_key
        model, step = memory  # theta_0, and then the teacher
        primary, harmful = batches.primary, batches.harmful

        def unlearn(params):
            forget = forget_rows(problem, params, model, harmful, config.npo_beta).values
            return forget, config.retain_weight * problem.training_losses(params, primary)

        def distil(params):
            return tuple(problem.divergences(params, model, rows) for rows in (harmful, primary))

        unlearning = step < config.unlearn_steps
        forget, keep = jax.lax.cond(unlearning, unlearn, distil, params)
        loss = {"forget": forget, "keep": Weighted(keep, problem.weights(primary))}
        return loss, {}, (model, step + 1)

    def memory(params):
        refuse_adapters("undo", params)
        return problem.reference_of(params), jnp.zeros((), jnp.int32)

    method = from_objective("undo", problem, objective, init_memory=memory)

    def student(state: State, rng_key: jax.Array) -> State:
        params = noised(state.params, config.noise_share, config.noise_scale, rng_key)
        assert problem.optimiser is not None
        opt_state = optimiser_state(problem.optimiser, params)
        return State(params, opt_state, (state.params, state.memory[1]), state.step)

    def update(state, batches, rng_key):
        state = jax.lax.cond(
            state.step == config.unlearn_steps,
            lambda: student(state, rng_key),
            lambda: state,
        )
        return method.update(state, batches, rng_key)

    return method._replace(update=update)


def noised(params: Params, share: float, scale: float, rng_key: jax.Array) -> Params:
    """(1 - share) theta + share scale N, N Glorot-uniform for kernels and 0 for vectors."""
    keys = iter(jax.random.split(rng_key, len(jax.tree.leaves(params))))

    def mixed(kernel):
        glorot = jax.nn.initializers.glorot_uniform(batch_axis=tuple(range(kernel.ndim - 2)))
        noise = glorot(next(keys), kernel.shape, kernel.dtype)
        return (1 - share) * kernel + share * scale * noise

    return over_kernels(mixed, params, vectors=lambda leaf: (1 - share) * leaf)
