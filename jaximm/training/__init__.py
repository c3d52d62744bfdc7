"""Training: the one loop that runs every immuniser, on one device or many, on one host or many."""

from jaximm.training.distributed import DistributedConfig, ProcessInfo, barrier, initialise
from jaximm.training.loop import FitResult, MetricsLog, fit, read_metrics
from jaximm.training.parallel import Parallel, make_parallel, step_fn
from jaximm.training.sharding import (
    FSDP,
    FSDP_TENSOR,
    TENSOR,
    Sharded,
    StepMemory,
    dry_run,
    make_mesh,
    make_sharded,
)
from jaximm.training.stops import Stopped

__all__ = [
    "FSDP",
    "FSDP_TENSOR",
    "TENSOR",
    "DistributedConfig",
    "FitResult",
    "MetricsLog",
    "Parallel",
    "ProcessInfo",
    "Sharded",
    "StepMemory",
    "Stopped",
    "barrier",
    "dry_run",
    "fit",
    "initialise",
    "make_mesh",
    "make_parallel",
    "make_sharded",
    "read_metrics",
    "step_fn",
]
