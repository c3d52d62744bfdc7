"""A language model as the problem of attackers of weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax

from jaximm.attacks.weights.problem import Benign, FineTuneProblem, fine_tune_problem
from jaximm.models.llama import Language, stacked_axes
from jaximm.models.llama.gauge import canonical_forms
from jaximm.types import Batch


def language_problem(
    language: Language,
    params: Mapping[str, jax.Array],
    *,
    train: Batch,
    held_out: Batch,
    benign_train: Batch | None = None,
    benign_held_out: Batch | None = None,
    **fields: Any,
) -> FineTuneProblem:
    """All parameters of a decoder, to be tuned on rows of tokens.

    One model does both tasks, so that there is no head. Quality is the share of tokens that are
    predicted; losses are nats a token. "Rescaling the head" scales the final norm, and with it the
    logits. Adapters go through the loop over layers. What "rebalancing" gives is
    `jaximm.models.llama.gauge.canonical_forms`.

    Args:
      language: the model; its `scale` of adapters is not used.
      params: of the model that is attacked.
      train: rows of the harmful task; all texts as long as each other.
      held_out: rows that are reported.
      benign_train: rows of the benign task, with `benign_held_out`; None: there is none.
      benign_held_out: rows on which the utility is measured.
      **fields: others of `fine_tune_problem`: `selection`, `public`, `seed`.

    Raises:
      ValueError: one of the two benign sets alone, or what `fine_tune_problem` refuses.
    """
    if (benign_train is None) != (benign_held_out is None):
        raise ValueError("give both benign_train and benign_held_out, or neither.")
    benign = None
    if benign_train is not None and benign_held_out is not None:
        benign = Benign(head=(), train=benign_train, held_out=benign_held_out)
    return fine_tune_problem(
        features_fn=language.outputs_of_params,
        params=dict(params),
        head=(),
        train=train,
        held_out=held_out,
        benign=benign,
        stacked=stacked_axes,
        takes_adapters=True,
        scale_path="norm.scale",
        row_flops=language.row_flops(params, train.x.shape[1]),
        canonical_fn=functools.partial(canonical_forms, config=language.config),
        **fields,
    )
