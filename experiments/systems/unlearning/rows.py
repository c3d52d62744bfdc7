"""Unlearning of facts, each method stopped where it has forgotten 95 % of what it is to forget.

Methods train on one environment, relation 3. Honest users tune on that and on four other relations,
attackers on 16 of the 96 forgotten facts: what an attack reaches is measured on the other 80.
Settings were chosen on seed 90 by how soon a method forgets with 90 % of the rest kept; tables are
of seeds 0, 1, ...
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from experiments.systems.rows import SMOKE_UPDATES, Row
from experiments.systems.tasks import Model, Toy, drawn, fact_logits
from jaximm import immunisers
from jaximm.training import fit

TASK = "facts"

FORGOTTEN, KEPT = 0.95, 0.9
"""Where a method is stopped: this share of the harmful facts wrong, this of the others right."""


def scaled_losses(params, batch, scale):
    """Losses with all logits times a scalar."""
    logits = scale * fact_logits(params, batch.x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)


class Matched(NamedTuple):
    """A method at the first multiple of ten steps at which it has forgotten, and kept the rest.

    Attributes:
      method: of the registry.
      fields: of its configuration; ``steps`` is the most that it may take, where it ends if it has
        never forgotten so much.
      rate: of Adam.
    """

    method: str
    fields: dict[str, Any]
    rate: float = 5e-4

    def __call__(self, toy: Toy, seed: int) -> Model:
        """The model that the method releases from a seed."""
        steps = SMOKE_UPDATES if toy.length < 1 else self.fields.get("steps", 1500)
        config = immunisers.make_config(
            self.method, **{**self.fields, "steps": steps, "batch_size": 64}
        )
        optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(self.rate))
        problem = toy.problem_of(seed, optimiser=optimiser, scaled_losses_fn=scaled_losses)
        method = immunisers.make_immuniser(self.method, config, problem)

        def measured(params):
            return {name: accuracy(params, toy.tests[name]) for name in ("harmful", "benign")}

        def run(steps, **options):
            rows = {name: toy.rows[name] for name in ("primary", "harmful", "environment")}
            start = toy.starts["undefended"](seed)
            batch_fn = drawn(rows, 100 + seed, config.batch_size)
            return fit(method, start, batch_fn, seed=seed, steps=steps, **options)

        through = run(steps, log_every=10, measure_fn=measured)
        done = [
            record["step"]
            for record in through.trajectory
            if record["harmful"] <= 1 - FORGOTTEN and record["benign"] >= KEPT
        ]
        if not done or done[0] in (0, steps):
            return Model(through.params)
        return Model(run(done[0], log_every=done[0]).params)


def accuracy(params, rows):
    """Of the model's own answers."""
    return jnp.mean(jnp.argmax(fact_logits(params, rows.x), axis=1) == rows.y)


ROWS = {
    "NPO": Matched("npo", {}),
    "ILU logit .5": Matched("ilu", {"weight": 0.5}),
    "ILU parameter .05": Matched("ilu", {"reading": "parameter_scale", "weight": 0.05}),
    "ILU gradient .05": Matched("ilu", {"reading": "gradient_norm", "weight": 0.05}),
    "ILU gradient .5": Matched("ilu", {"reading": "gradient_norm", "weight": 0.5}),
    "environment as data": Matched("ilu", {"weight": 0.0, "environment_weight": 1.0}),
    "NPO and SAM .05": Matched("ilu", {"weight": 0.0, "sam_radius": 0.05}),
    "RMU": Matched("rmu", {"steering": 6.5, "retain_weight": 1.0}),
    "MUDMAN": Matched("mudman", {}),
    "UNDO": Row("undo", {"unlearn_steps": 150, "steps": 1500}, rate=2e-3),
}
