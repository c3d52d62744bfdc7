"""Training: the one loop that runs every immuniser, on one device or many, on one host or many."""

from jaximm.training.distributed import DistributedConfig, ProcessInfo, barrier, initialise
from jaximm.training.loop import FitResult, MetricsLog, fit, read_metrics
from jaximm.training.parallel import Parallel, make_parallel, step_fn

__all__ = [
    "DistributedConfig",
    "FitResult",
    "MetricsLog",
    "Parallel",
    "ProcessInfo",
    "barrier",
    "fit",
    "initialise",
    "make_parallel",
    "read_metrics",
    "step_fn",
]
