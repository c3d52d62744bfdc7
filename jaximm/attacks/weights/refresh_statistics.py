"""Batch-norm statistics are taken from the harmful rows before the first step, then AdamW.

    params <- refresh_fn(params, x of the harmful training rows)          (AdaBN)

The problem's `refresh_fn` (`jaximm.models.statistics.refresh_fn_of`) runs the trained stages once
on the statistics of that batch and adds them to the parameters; `features_fn` has to read them
there (`features_with_statistics`). A defence that was made on the benign task's statistics meets
others. What was added is no weight: AdamW moves what was there before, and the head. The statistics
stay as they were taken while the weights move.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import numpy as np

from jaximm.attacks.grid import Hyper, check_whole
from jaximm.attacks.weights.descent import AdamW, adam_of, scaled_head, tuning
from jaximm.attacks.weights.lora import adam_step
from jaximm.attacks.weights.problem import Access, Batches, ModelWeights, WeightAttack

SOURCE = (
    "Li et al. (2016), Revisiting batch normalization for practical domain adaptation, "
    "https://arxiv.org/abs/1603.04779"
)


class State(NamedTuple):
    """The weights, statistics among their parameters, and AdamW's state of the others."""

    weights: ModelWeights
    opt_state: Any


@functools.lru_cache(maxsize=16)
def _refreshed(rows: int) -> tuple[Callable[..., State], Callable[..., State]]:
    """`init` and `update` for a number of rows."""

    def init(access: Access, hyper: Hyper) -> State:
        assert access.refresh_fn is not None  # the attacker needs one
        weights = scaled_head(access, hyper)
        x = access.inputs.x
        spread = np.arange(min(rows, x.shape[0])) * x.shape[0] // min(rows, x.shape[0])
        params = access.refresh_fn(weights.params, x[spread])
        with jax.numpy_dtype_promotion("standard"):
            opt_state = adam_of(hyper).init((weights.params, weights.head))
        return State(weights._replace(params=params), opt_state)

    def update(state: State, batches: Batches, access: Access, hyper: Hyper) -> State:
        params = state.weights.params

        def weights_of(trained, head):
            return state.weights._replace(params={**params, **trained}, head=head)

        def objective(trained):
            return access.loss_fn(weights_of(*trained), batches.harmful)

        # What the start does not have are statistics.
        own = {path: params[path] for path in access.weights.params}
        trained, opt_state = adam_step((own, state.weights.head), objective, state.opt_state, hyper)
        return State(weights_of(*trained), opt_state)

    return init, update


def refresh_statistics(*, rows: int = 1024, **adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW after batch-norm statistics are taken from the harmful rows.

    Args:
      rows: statistics are those of at most this many training rows, evenly spread; >= 2. They pass
        through the network as one batch, which has to fit into memory. Compiled in.
      **adamw: see `AdamW`.
    """
    check_whole("rows", rows, least=2)
    return tuning(
        _refreshed(rows),
        adamw,
        title="refreshed statistics",
        kind="statistics",
        source=SOURCE,
        needs=("refresh_fn",),
    )
