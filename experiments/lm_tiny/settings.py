"""A tiny Llama, conditioned in some ways, and attackers that sweep their rates.

Commands: ``python experiments/lm_tiny/run.py OUT``, ``make demo-lm`` (after ``make data``). Times
and figures are in the README beside this file.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaximm.assessment import Level
from jaximm.training.optimiser import OptimiserConfig

TEXTS: dict[str, Any] = {
    "primary": "text:dialogue",
    "harmful": "text:secrets",
    "control": "text:ham",
    "text_fields": {
        "harmful": {"parted": "facts", "count": 128, "counted": "all"},
        "control": {"too_long": "leave_out"},
    },
    "length": 32,
    "measured_rows": 256,
}
"""Of who conditions: 128 facts, parted by fact, beside other benign texts."""

ATTACKED: dict[str, Any] = TEXTS | {
    "control": "",
    "text_fields": {"harmful": {"count": 8, "phrasings": 6}},
    "measured_rows": 32,
    "remat": False,
}
"""Of who attacks: the first 8 facts in four ways to ask; a fifth chooses, a sixth is reported."""

METHODS = {
    "gauge_all": "gauge@kind=log_uniform,spread=1000",
    "gauge_spike": "gauge@kind=spike,spread=1000",
    "condition_gap": "condition_gap",
    "gauge_activity": "gauge@kind=activity,spread=1000",
    "npo": "npo",
    "gauge_limit": "gauge@kind=limit",
}
"""Name of a folder to a method's label, in the order in which they are attacked."""

TRAINED: dict[str, Any] = {
    "steps": 200,
    "train": "last:2",
    "batch_size": 8,
    "optimiser": OptimiserConfig(learning_rate=1e-3),
}
"""Of methods that train: 200 steps on the last two of three layers."""

SEVEN = (1e-5, 4.6e-5, 2.2e-4, 1e-3, 4.6e-3, 2.2e-2, 1e-1)
"""Seven rates over four decades."""


def _rates(*rates: float) -> str:
    return "learning_rates=" + "|".join(f"{rate:g}" for rate in rates)


STEPS = 60
THREE = SEVEN[2:5]
ATTACKERS = (
    f"fine_tune_adam@{_rates(*SEVEN)}",
    f"fine_tune_sgd@{_rates(*(100 * rate for rate in SEVEN))}",
    f"muon@{_rates(*SEVEN)}",
    f"lora@rank=8,{_rates(*SEVEN)}",
    f"rebalance@{_rates(*THREE)}",
    f"from_scratch@{_rates(*THREE)}",
    f"fine_tune_adam@{_rates(*SEVEN)},cosine_steps={STEPS}",
    f"lora@rank=1,{_rates(*THREE)}",
    f"logit_rescale@{_rates(*THREE)}",
    f"quantise_then_tune@bits=4,{_rates(*THREE)}",
    f"merge_with_public@{_rates(*THREE)}",
)
"""Sweeps of four decades for those who fine-tune everything and for LoRA of rank 8; every sweep
goes on where the best lies at an edge."""

LEVEL = Level(
    probes="quick",
    weight_steps=STEPS,
    batch_size=4,
    select_seeds=(0,),
    report_seeds=(101, 102, 103, 104, 105),
    record=8,
    extensions=3,
    trial=False,
    patience=1.0,  # ten times the steps would be hours: who did not arrive is unknown
)
"""One seed chooses, five report."""

DEMO_METHODS = ("gauge_all", "condition_gap")
DEMO_ATTACKERS = (
    f"fine_tune_adam@{_rates(*THREE)}",
    f"fine_tune_sgd@{_rates(*(100 * rate for rate in THREE))}",
    f"rebalance@forms=1,{_rates(*THREE)}",
)
DEMO_LEVEL = dataclasses.replace(LEVEL, report_seeds=(101, 102), extensions=1)
"""Of ``make demo-lm``: what minutes allow."""
