"""MNIST digit pairs (Zheng et al. 2025, section 5.1): all 90 ordered pairs, d = 784.

Command: ``python experiments/mnist_pairs/run.py --out DIR``; ten minutes or so a method on two
idle cores. The released code makes 210 updates too, as 30 epochs of batches of 64; ours each see
all rows.
"""

import dataclasses

from jaximm.run import EXPERIMENTS

CONFIG = dataclasses.replace(
    EXPERIMENTS["mnist_pair"],
    methods=(
        "limit@t=0",
        "limit@t=1",
        "condition_gap",
        "balanced_gap",
        "ill_only",
        "imma",
        "direct_kappa",
    ),
)
SMOKE = dataclasses.replace(CONFIG, methods=("limit@t=0",))
