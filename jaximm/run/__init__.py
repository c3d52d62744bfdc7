"""One experiment from its configuration to a folder: prepare, immunise, measure, assess.

A run directory holds ``config.json``, ``metrics.jsonl``, ``checkpoints/`` (training state),
``backbone/`` (the immunised backbone) and ``result.json``; one for each method and seed.
"""

from jaximm.run.cases import (
    CASES,
    DEMO_METHODS,
    EXPERIMENTS,
    SUITE,
    demo,
    load_experiment,
    suite,
)
from jaximm.run.choose import is_selected, select_limit
from jaximm.run.config import Experiment, read_config
from jaximm.run.folders import load_results, run_folder, run_folders
from jaximm.run.immunise import immunise, run_method
from jaximm.run.measure import Immunised, measure
from jaximm.run.prepare import Prepared, prepare

__all__ = [
    "CASES",
    "DEMO_METHODS",
    "EXPERIMENTS",
    "SUITE",
    "Experiment",
    "Immunised",
    "Prepared",
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
