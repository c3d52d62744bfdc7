r"""SOPHON: keeps fine-tuning from helping, by bounded losses of a model that was fine-tuned.

    min_theta  suppression_weight L_sup(theta^(K)) + source_weight CE(x_s),

theta^(K) after K steps of an attacker whose rate is drawn anew, to first order. L_sup of held-out
harmful rows is the inverse cross-entropy -log(1 - p_y), whose gradient vanishes as p_y -> 0, or the
divergence KL(uniform || p) = -(1/C) sum_c log(C p_c). Neither can be lowered for ever by confident
wrong answers, as a negated cross-entropy can. Of tokens, p_y is a row's exp(-mean loss).

The released code descends both terms in turn (3 suppression and 5 source batches a loop) and rolls
back where the source accuracy falls; here they are one sum, and what is reported judges the source.

Deng et al. (2024), SOPHON: Non-fine-tunable learning to restrain task transferability for
pre-trained models, https://arxiv.org/abs/2404.12699.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaximm.immunisers.about import About
from jaximm.immunisers.gradient import Weighted
from jaximm.immunisers.meta import adversary
from jaximm.immunisers.meta.inner import inner_steps
from jaximm.immunisers.problem import Problem, check_run
from jaximm.types import AnyBatch, Immuniser


@dataclasses.dataclass(frozen=True, kw_only=True)
class SophonConfig:
    """Bounded suppression of the harmful task after simulated fine-tuning.

    Attributes:
      suppression: "inverse" (cross-entropy) or "uniform" (divergence).
      suppression_weight: of that.
      source_weight: of the primary loss.
      inner_steps: K; 0: plain suppression.
      inner_optimiser: the attacker's, "adam", "adamw" or "sgd".
      inner_rates: learning rates, of which an attacker has one.
      inner_rows: rows of an inner step, drawn with replacement; None: all rows of the attack.
      fresh_head: whether an attacker of classes draws a head; else has the one fitted to theta_0.
      steps: updates.
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="SOPHON",
        source="Deng et al. (2024), SOPHON, https://arxiv.org/abs/2404.12699",
        against="fine-tuning by plain steps, as many as it simulates",
        broken_by="Adam, or some tens of epochs",
        traits=frozenset({"needs_harmful_head"}),
    )

    suppression: Literal["inverse", "uniform"] = "inverse"
    suppression_weight: float = 1.0
    source_weight: float = 1.0
    inner_steps: int = 50
    inner_optimiser: adversary.InnerOptimiser = "sgd"
    inner_rates: tuple[float, ...] = (1e-4,)
    inner_rows: int | None = None
    fresh_head: bool = True
    steps: int = 1000
    batch_size: int | None = None

    def __post_init__(self):
        if self.suppression not in ("inverse", "uniform"):
            raise ValueError(
                f'suppression must be "inverse" or "uniform", got {self.suppression!r}.'
            )
        adversary.check_least(self, suppression_weight=0, source_weight=0, inner_steps=0)
        adversary.check_attack(self)
        check_run(self.steps, self.batch_size)


def sophon(config: SophonConfig, problem: Problem) -> Immuniser:
    """Descends suppression + primary loss.

    Raises:
      ValueError: what `from_objective` refuses; a problem without `harmful_classes`; the divergence
        on losses of the problem's own without a `divergences_fn`.
    """
    if config.suppression == "uniform" and problem.losses_fn and problem.divergences_fn is None:
        raise ValueError(
            'suppression="uniform" needs the problem\'s divergences_fn beside its losses_fn; '
            'give it, or take suppression="inverse".'
        )

    def objective(params, batches, memory, rng_key):
        head_key, rate_key, rows_key = jax.random.split(rng_key, 3)
        target = adversary.taken_over(problem, params, head_key, fresh_head=config.fresh_head)
        rows, held = adversary.rows_of(batches), target.start
        if config.inner_steps:
            numbers = jnp.arange(config.inner_steps, dtype=jnp.int32)
            rate = adversary.one_of(config.inner_rates, rate_key)
            held = inner_steps(
                adversary.attack_loss(target, rows, rows_key, config.inner_rows),
                held,
                adversary.Step(numbers, numbers < 0),
                adversary.optimiser_of(config.inner_optimiser, rate),
                order=1,
            ).params
        suppressed = _suppressed(config, target, held, rows.held_out)
        primary, weights = batches["primary"], problem.weights(batches["primary"])
        kept = problem.training_losses(params, primary)
        terms = {
            "suppression": config.suppression_weight * suppressed,
            "source": Weighted(config.source_weight * kept, weights),
        }
        return terms, {"task_loss": Weighted(kept, weights)}, memory

    return adversary.meta_method("sophon", problem, objective)


def _suppressed(
    config: SophonConfig, target: adversary.Target, held: adversary.Held, batch: AnyBatch
) -> Float[Array, ""]:
    model = target.harmful(held)
    if config.suppression == "uniform":
        if held.head:
            equal = model._replace(head=jax.tree.map(jnp.zeros_like, held.head))
        else:
            equal = jax.tree.map(jnp.zeros_like, model)  # whose predictions are all equal
        return target.mean(target.problem.divergences(model, equal, batch), batch)
    return target.mean(inverse_cross_entropy(target.problem.losses(model, batch)), batch)


def inverse_cross_entropy(losses: Float[Array, "rows"]) -> Float[Array, "rows"]:
    """-log(1 - exp(-loss)); a loss of 0 counts as the least that is told from it."""
    least = jnp.finfo(losses.dtype).eps
    return -jnp.log(-jnp.expm1(-jnp.maximum(losses, least)))
