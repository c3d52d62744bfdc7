"""Every method against every attacker: two linear cases and EfficientNet-Lite0.

Command: ``python experiments/attack_matrix/run.py --out DIR`` (``--deep`` for the backbone, after
``make data``). The linear cases are those of ``make suite``. Times and figures are in the README
beside this file.
"""

import dataclasses

from jaximm.assessment import suites
from jaximm.run import SUITE
from jaximm.run.cases import VISION

LINEAR = SUITE
LEVEL = "standard"

CONFIG = VISION["lite0_animals"]
"""A case of ``vision-1.0``. What trains, and what attackers of weights may train, is the last
convolution with its norm."""

SECOND = dataclasses.replace(CONFIG, methods=("condition_gap",), seeds=(1,))
"""The other seed: the other methods draw nothing, so that theirs would be the same model."""

DEEP_LEVEL = dataclasses.replace(suites.load("vision-1.0").level, patience=1.0)
"""120 steps; not ten times its own undefended steps for whoever does not break a model, which
takes nine minutes an attacker, model and seed: their part of a verdict is then unknown."""

DEEP_ATTACKERS = (
    "ridge",
    "solved_head",
    "fine_tune_adam",
    "spectral_rebalance",
    "merge_with_public",
    "delta_strip",
    "direction_ablation",
    "from_scratch",
)
"""One of each idea: the closed form and one that may also train, plain fine-tuning, the spectrum
put right again, half of the way and all of it back to the public weights, without the direction
that the defence left, and new weights for what trains."""

SMOKE = dataclasses.replace(
    CONFIG,
    model="mlp",
    weights="random",
    image_size=None,
    train="*",
    methods=("none", "limit@t=1,damping=1e-6"),
    data_fields={"train_rows": 200, "held_out_rows": 200, "seed": 1},
    steps=3,
)
