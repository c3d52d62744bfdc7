"""House prices (Zheng et al. 2025, section 5.1): lot area against sale price, d = 79.

Command: ``python experiments/house_price/run.py``; about a minute on two cores.
Expect: 0.62 of the limit for condition_gap and 0.99 for balanced_gap and direct_kappa (identity
start, damped footing, training rows), and next to nothing of either on held-out rows.
"""

import dataclasses

from jaximm.run import EXPERIMENTS

CONFIG = dataclasses.replace(
    EXPERIMENTS["house_price"],
    methods=(
        "none",
        "ill_only",
        "imma",
        "condition_gap",
        "condition_gap@rows=batch,batch_size=64",
        "balanced_gap",
        "balanced_gap@both_ends=false,final_rate=0.1,steps=3000",
        "direct_kappa",
        "limit@t=0",
        "limit@t=0.5",
        "limit@t=1",
        "limit",
    ),
)
RANDOM = dataclasses.replace(
    CONFIG,
    init="random",
    seeds=(0, 1, 2, 3, 4),
    methods=("ill_only", "imma", "condition_gap", "balanced_gap", "direct_kappa"),
)
SMOKE = dataclasses.replace(
    CONFIG,
    methods=("condition_gap", "limit@t=1"),
    method_fields={"condition_gap": {"steps": 20}},
)
