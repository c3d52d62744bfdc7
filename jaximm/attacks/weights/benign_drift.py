"""Some steps of ordinary fine-tuning on the benign task, then the harmful one, by AdamW.

    step <  drift_steps:   descend L_benign    by backbone and benign head,
    step >= drift_steps:   descend L_harmful   by backbone and harmful head.

It asks whether a defence outlasts what every honest user does. The optimiser starts anew at the
switch, so that what follows is `fine_tune_adam` from the drifted weights. Both losses are computed
in every step, one of them with weight 0: a branch around convolutions would run them slowly on a
CPU, so a step is priced as one on both tasks. A budget of no more than `drift_steps` measures the
drift alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaximm.attacks.grid import Hyper, Values
from jaximm.attacks.weights.descent import AdamW, adam_of, scaled_head, tuning
from jaximm.attacks.weights.problem import Access, Batches, ModelWeights, WeightAttack

SOURCE = (
    "Qi et al. (2023), Fine-tuning aligned language models compromises safety, even when users do "
    "not intend to!, https://arxiv.org/abs/2310.03693"
)


class State(NamedTuple):
    """The weights, AdamW's state, and how many steps were made."""

    weights: ModelWeights
    opt_state: Any
    step: Int[Array, ""]


def _init(access: Access, hyper: Hyper) -> State:
    weights = scaled_head(access, hyper)
    with jax.numpy_dtype_promotion("standard"):
        return State(weights, adam_of(hyper).init(weights), jnp.zeros((), jnp.int32))


def _update(state: State, batches: Batches, access: Access, hyper: Hyper) -> State:
    benign_batch = batches.benign
    assert benign_batch is not None  # the attacker needs a benign task
    weights, step = state.weights, state.step.astype(hyper["drift_steps"].dtype)
    drifting = (step < hyper["drift_steps"]).astype(step.dtype)

    def objective(weights: ModelWeights) -> jax.Array:
        benign = access.benign_loss_fn(weights, benign_batch)
        return drifting * benign + (1 - drifting) * access.loss_fn(weights, batches.harmful)

    gradients: Any = jax.grad(objective)(weights)
    optimiser: Any = adam_of(hyper)
    with jax.numpy_dtype_promotion("standard"):
        switching = step == hyper["drift_steps"]
        opt_state = jax.tree.map(
            lambda fresh, old: jnp.where(switching, fresh, old),
            optimiser.init(weights),
            state.opt_state,
        )
        moves: Any
        moves, opt_state = optimiser.update(gradients, opt_state, weights)
    moves = moves._replace(  # weight decay would move a head without a gradient
        head=jax.tree.map(lambda leaf: leaf * (1 - drifting), moves.head),
        benign_head=jax.tree.map(lambda leaf: leaf * drifting, moves.benign_head),
    )
    weights = jax.tree.map(optax.apply_updates, weights, moves)
    return State(weights, opt_state, state.step + 1)


def benign_drift(*, drift_steps: Values = (50,), **adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW on the benign task, then on the harmful one.

    Args:
      drift_steps: on the benign task, whole numbers >= 0; they count in the budget.
      **adamw: see `AdamW`.
    """
    return tuning(
        (_init, _update),
        adamw,
        tried={"drift_steps": (drift_steps, "whole [0, inf)")},
        bounds=(("drift_steps", 0.0),),
        title="benign drift, then fine-tuning",
        kind="drift",
        source=SOURCE,
        needs=("benign",),
    )
