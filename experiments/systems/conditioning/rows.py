"""Conditioning and erasure on `halves`: what the library began with, on the systems' own bench.

The penalties see the features alone. The closed forms put a linear map after the features.
"""

from experiments.systems.rows import Row, more_training

TASK = "halves"
ALONE = {"sites_fn": None}
ROWS = {
    "more training": more_training(steps=500),
    "condition_gap": Row(
        "condition_gap",
        {"steps": 500, "primary_weight": 0.01, "harmful_weight": 0.2, "batch_size": 128},
        problem=ALONE,
    ),
    "balanced_gap": Row(
        "balanced_gap", {"steps": 500, "weight": 0.3, "batch_size": 128}, problem=ALONE
    ),
    "limit": Row("limit", {}),
    "erase": Row("erase", {}),
}
