"""A tiny Llama, six ways to condition it, and every attacker that a language model takes.

Command: ``python experiments/lm_tiny/run.py OUT`` (after ``make data``). Times and figures are in
the README beside this file.
"""

from __future__ import annotations

from typing import Any

from jaximm.assessment import Level
from jaximm.training.optimiser import OptimiserConfig

TEXTS: dict[str, Any] = {
    "primary": "text:dialogue",
    "harmful": "text:secrets",
    "control": "text:ham",
    "text_fields": {
        "harmful": {"count": 16, "phrasings": 6},
        "control": {"too_long": "leave_out"},
    },
    "length": 32,
    "measured_rows": 64,
}
"""Sixteen facts in four ways to ask; a fifth chooses, a sixth is reported."""

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
"""Seven rates over four decades; where the best lies at an edge, the sweep goes on."""


def _rates(*rates: float) -> str:
    return "learning_rates=" + "|".join(f"{rate:g}" for rate in rates)


STEPS = 80
THREE = SEVEN[2:5]
ATTACKERS = (
    f"fine_tune_adam@{_rates(*SEVEN)}",
    f"fine_tune_adam@{_rates(*SEVEN)},cosine_steps={STEPS}",
    f"fine_tune_sgd@{_rates(*(100 * rate for rate in SEVEN))}",
    f"fine_tune_sgd@{_rates(*(100 * rate for rate in SEVEN))},momenta=0",
    f"muon@{_rates(*SEVEN)}",
    f"lora@rank=8,{_rates(*SEVEN)}",
    f"lora@rank=1,{_rates(*SEVEN[2:6])}",
    f"lora@rank=64,{_rates(*THREE)}",
    f"rebalance@{_rates(*THREE)}",
    f"rebalance_sgd@{_rates(0.022, 0.1, 0.46)}",
    f"from_scratch@{_rates(*THREE)}",
    f"logit_rescale@{_rates(*THREE)}",
    f"quantise_then_tune@bits=8,{_rates(*THREE)}",
    f"quantise_then_tune@bits=4,{_rates(*THREE)}",
    f"merge_with_public@{_rates(*THREE)}",
)
"""Sweeps of four decades for those who fine-tune everything and for LoRA of rank 8."""

LEVEL = Level(
    probes="quick",
    weight_steps=STEPS,
    batch_size=8,
    select_seeds=(0,),
    report_seeds=(101, 102, 103, 104, 105),
    record=12,
    extensions=3,
    trial=False,
)
"""One seed chooses, five report."""
