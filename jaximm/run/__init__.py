"""One experiment from its configuration to a folder: prepare, immunise, measure, assess.

A run directory holds ``config.json``, ``metrics.jsonl``, ``checkpoints/`` (training state),
``backbone/`` (the immunised backbone) and ``result.json``; one for each method and seed.
"""

from jaximm.run.cases import DEMO_METHODS, EXPERIMENTS, SUITE, demo, load_experiment, suite
from jaximm.run.choose import is_selected, select_limit
from jaximm.run.config import DeepConfig, ExperimentConfig, read_config
from jaximm.run.folders import load_results, run_folder, run_folders
from jaximm.run.immunise import (
    Immunised,
    Prepared,
    attack,
    immunise,
    measure,
    prepare,
    run_method,
)

__all__ = [
    "DEMO_METHODS",
    "EXPERIMENTS",
    "SUITE",
    "DeepConfig",
    "ExperimentConfig",
    "Immunised",
    "Prepared",
    "attack",
    "demo",
    "immunise",
    "is_selected",
    "load_experiment",
    "load_results",
    "measure",
    "prepare",
    "read_config",
    "run_folder",
    "run_folders",
    "run_method",
    "select_limit",
    "suite",
]
