"""Conditioning and erasure on `halves`: what the library began with, on the systems' own bench.

The penalties see the features alone, after a linear map that begins as the identity: features of a
rectifier have dead units, and a condition number that is infinite whatever is done. The closed
forms put such a map there themselves.
"""

import jax.numpy as jnp

from experiments.systems.rows import Row, more_training
from experiments.systems.tasks import WIDTHS, Model, Toy


def with_neck(toy: Toy, seed: int) -> Model:
    """The undefended model with a linear map after its features, the identity."""
    params = toy.starts["undefended"](seed)
    neck = jnp.eye(WIDTHS[-1], dtype=jnp.float32)
    return Model(params._replace(backbone={**params.backbone, "neck.kernel": neck}))


TASK = "halves"
ON_FEATURES = {"problem": {"sites_fn": None}, "after": with_neck}
GAP = {"primary_weight": 0.01, "harmful_weight": 0.2}
ROWS = {
    "more training": more_training(steps=500),
    "condition_gap": Row("condition_gap", {"steps": 500, "batch_size": 128, **GAP}, **ON_FEATURES),
    "balanced_gap": Row(
        "balanced_gap", {"steps": 500, "batch_size": 128, "weight": 0.3}, **ON_FEATURES
    ),
    "limit": Row("limit", {}),
    "erase": Row("erase", {}),
}
