"""One-step and collapse methods on `refusal`, in the set-up of the toy study.

1,200 steps of Adam at 5e-4, gradients clipped. A step draws 96 benign rows and 48 prompts with the
safe answer, whose two means are the alignment loss f, and 48 prompts with the harmful answer. The
study minimises the sum of the two means; the primary rows here hold every safe one twice, so that
their mean is half of that, and so are the clip and the weights beside f.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.systems.rows import SMOKE_UPDATES, Row
from experiments.systems.tasks import REFUSE, Attempt, Model, Toy
from jaximm import immunisers
from jaximm.training import fit
from jaximm.types import Batch

BENIGN, PROMPTS, STEPS = 96, 48, 1200


class Batches(NamedTuple):
    """Of a step."""

    primary: Batch
    harmful: Batch
    benign: Batch  # SEAM's second gradient
    general: Batch  # CTRAP's collapse


def draw(rows: Mapping[str, Batch], seed: jax.Array, step: jax.Array) -> Batches:
    """Rows with replacement, as in the study."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 4)

    def take(key: jax.Array, count: int, name: str) -> Batch:
        places = jax.random.randint(key, (count,), 0, rows[name].y.shape[0])
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[places], rows[name])

    benign, safe = take(keys[0], BENIGN, "benign"), take(keys[1], PROMPTS, "safe")
    primary = Batch(*(jnp.concatenate(parts) for parts in zip(benign, safe, safe, strict=True)))
    others = take(keys[3], BENIGN, "benign")
    return Batches(primary, take(keys[2], PROMPTS, "harmful"), others, others)


def perturbed(params: Any, batch: Batch, offsets: Mapping[str, jax.Array]) -> jax.Array:
    """Losses with offsets of what enters the two rectifiers: outputs of blocks."""
    x = batch.x
    for layer, site in enumerate(("layers.0", "features")):
        x = x @ params[f"layers.{layer}.kernel"] + params[f"layers.{layer}.bias"][None]
        x = jax.nn.relu(x + offsets[site])
    logits = x @ params["layers.2.kernel"] + params["layers.2.bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)


@dataclasses.dataclass(frozen=True)
class Aligned(Row):
    """A method on the study's batches."""

    def __call__(self, toy: Toy, seed: int) -> Model:
        """The model that the method releases from a seed."""
        steps = SMOKE_UPDATES if toy.length < 1 else STEPS
        config = immunisers.make_config(self.method, **{"steps": steps, **self.fields})
        optimiser = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(self.rate))
        problem = _problem(toy, optimiser)
        rows = {name: toy.rows[name] for name in ("benign", "safe", "harmful")}
        done = fit(
            immunisers.make_immuniser(self.method, config, problem),
            toy.starts[self.start](seed),
            jax.tree_util.Partial(draw, rows, jnp.uint32(100 + seed)),
            seed=seed,
            steps=steps,
            log_every=steps,
        )
        return Model(done.params)


@functools.lru_cache(maxsize=2)
def _problem(toy: Toy, optimiser: optax.GradientTransformation) -> immunisers.Problem:
    return dataclasses.replace(toy.problem, optimiser=optimiser, perturbed_losses_fn=perturbed)


TASK = "refusal"
ROWS = {
    "more alignment": Aligned("booster", {"weight": 0.0}),
    "Booster 5, 0.1": Aligned("booster", {"weight": 2.5, "alpha": 0.1}),
    "Booster 5, 0.1, exact": Aligned("booster", {"weight": 2.5, "alpha": 0.1, "exact": True}),
    "Booster 5, 1": Aligned("booster", {"weight": 2.5, "alpha": 1.0}),
    "Vaccine 2": Aligned("vaccine", {"rho": 2.0}),
    "T-Vaccine 2": Aligned("t_vaccine", {"rho": 2.0, "share": 0.34}),
    "SEAM 1, 0.01": Aligned("seam", {"align_weight": 2.0, "cosine_weight": 0.01}),
    "SEAM 1, 1": Aligned("seam", {"align_weight": 2.0, "cosine_weight": 1.0}),
    "CTRAP 1, 1": Aligned("ctrap", {"weight": 0.5, "alpha": 1.0, "token": REFUSE}),
    "RepNoise 1, 0.001": Aligned("repnoise", {"ascent_weight": 0.5, "noise_weight": 0.0005}),
    "RepNoise 1, 4": Aligned("repnoise", {"ascent_weight": 0.5, "noise_weight": 2.0}),
}
ATTEMPTS = {  # the study's rates: without 0.03, which undoes inflated logits by itself
    "full, rates to 0.01": Attempt("fine_tune_adam@learning_rates=3e-4|1e-3|3e-3|1e-2", 30),
}
