"""Meta-learned defences on `halves`.

The attacker that is simulated trains backbone and a fresh head by Adam, as the one who is met.
TAR's settings are those of the systems' toy study; MLAC's and SOPHON's were tuned nowhere.
"""

from typing import Any

from experiments.systems.rows import Row, more_training

TASK = "halves"

STEPS = 1500
OUTER: dict[str, Any] = {"rate": 1e-3, "clip": 5.0}
ATTACK = {
    "inner_steps": 32,
    "inner_optimiser": "adam",
    "inner_rates": (1e-3, 3e-3, 1e-2),
    "inner_rows": 64,
}
# 4 / (points of an attack that count); .1 a squared activation, of which the features have 64.
MEAN_OF_EVERY_FOURTH = {"every": 4, "decay": 0.0, "tamper_weight": 0.5}
TAR = {
    **ATTACK,
    **MEAN_OF_EVERY_FOURTH,
    "retain_first": 0.0,
    "distance": "squared",
    "distance_weight": 0.1 / 64,
    "steps": STEPS,
    "batch_size": 256,
}

ROWS = {
    "more training": more_training(steps=STEPS, rate=1e-3),
    "TAR, clamped CE": Row("tar", {**TAR, "tamper_loss": "cross_entropy"}, **OUTER),
    "TAR, entropy": Row("tar", TAR, **OUTER),
    "TAR, no inner steps": Row(
        "tar",
        {**TAR, "tamper_loss": "cross_entropy", "inner_steps": 0, "tamper_weight": 4.0,
         "fresh_head": False},
        **OUTER,
    ),
    "MLAC": Row(
        "mlac",
        {"inner_steps": 8, "inner_rate": 0.1, "adversary_rate": 1e-3, "inner_rows": 64,
         "calibration": "flip", "steps": STEPS, "batch_size": 256},
        **OUTER,
    ),
    "SOPHON": Row(
        "sophon",
        {**ATTACK, "suppression": "inverse", "steps": STEPS, "batch_size": 256},
        **OUTER,
    ),
}  # fmt: skip
