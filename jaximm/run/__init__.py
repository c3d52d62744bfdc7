"""One experiment from its configuration to a folder: prepare, immunise, measure, assess.

A run directory holds ``config.json``, ``metrics.jsonl``, ``checkpoints/`` (training state),
``backbone/`` (the immunised backbone) and ``result.json``; one for each method and seed.
"""

from jaximm.run.config import (
    EXPERIMENTS,
    DeepConfig,
    ExperimentConfig,
    load_experiment,
    read_config,
)
from jaximm.run.immunise import (
    DEMO_METHODS,
    Immunised,
    Prepared,
    attack,
    demo,
    immunise,
    load_results,
    measure,
    prepare,
    run_folder,
    run_folders,
    run_method,
    select_limit,
)

__all__ = [
    "DEMO_METHODS",
    "EXPERIMENTS",
    "DeepConfig",
    "ExperimentConfig",
    "Immunised",
    "Prepared",
    "attack",
    "demo",
    "immunise",
    "load_experiment",
    "load_results",
    "measure",
    "prepare",
    "read_config",
    "run_folder",
    "run_folders",
    "run_method",
    "select_limit",
]
