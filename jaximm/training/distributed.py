"""Several processes as one run: who coordinates, how many there are, and which one this is.

`initialise` must come before anything that touches a device, `jax.devices()` included. On a
cluster that JAX knows (Slurm, Open MPI, Google's TPUs) no setting is needed; elsewhere give the
coordinator's address, the number of processes and this process's number to each of them. With
neither, it is a run of one process and nothing is started.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax

CLUSTERS = ("auto", "slurm", "ompi", "tpu", "off")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How the processes of a run find each other. The defaults serve one process and clusters.

    Attributes:
      coordinator: address of process 0 as host:port, on a port free there; the same in every
        process. Give it together with `num_processes` and `process_id`, or give none of the three.
      num_processes: how many processes there are.
      process_id: number of this one, 0 .. num_processes - 1.
      cluster: where to look when those three are not given: "auto" (whichever of the next three
        this is, else one process), "slurm", "ompi", "tpu" (Google Cloud), "off" (one process).
      heartbeat_timeout: seconds of silence after which a process counts as dead and the others are
        aborted; only checkpoints outlive that. JAX's default.
      init_timeout: seconds to wait for all processes to appear. JAX's default.
      simulated_devices: run on the CPU with this many simulated devices in each process; None: on
        the devices there are.
      cpu_collectives: how CPU processes talk to each other: "gloo" or "mpi".
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    cluster: Literal["auto", "slurm", "ompi", "tpu", "off"] = "auto"
    heartbeat_timeout: int = 100
    init_timeout: int = 300
    simulated_devices: int | None = None
    cpu_collectives: Literal["gloo", "mpi"] = "gloo"

    def __post_init__(self):
        explicit = {
            "coordinator": self.coordinator,
            "num_processes": self.num_processes,
            "process_id": self.process_id,
        }
        missing = [name for name, value in explicit.items() if value is None]
        if missing and len(missing) < len(explicit):
            raise ValueError(
                "coordinator, num_processes and process_id go together, missing: "
                f"{', '.join(missing)}; give all three, or none on a cluster that JAX knows."
            )
        if self.coordinator is not None:
            assert self.num_processes is not None  # as just said
            assert self.process_id is not None
            _check_explicit(self.coordinator, self.num_processes, self.process_id)
        if self.cluster not in CLUSTERS:
            raise ValueError(f"unknown cluster {self.cluster!r}; choose from {list(CLUSTERS)}.")
        for name in ("heartbeat_timeout", "init_timeout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1 second, got {getattr(self, name)}.")
        if self.simulated_devices is not None and self.simulated_devices < 1:
            raise ValueError(f"simulated_devices must be >= 1, got {self.simulated_devices}.")
        if self.cpu_collectives not in ("gloo", "mpi"):
            raise ValueError(
                f'cpu_collectives must be "gloo" or "mpi", got {self.cpu_collectives!r}.'
            )


def _check_explicit(coordinator: str, num_processes: int, process_id: int) -> None:
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(
            f"coordinator must be host:port with a port in 1 .. 65535, got {coordinator!r}; "
            "for instance 10.0.0.1:8476."
        )
    if num_processes < 1:
        raise ValueError(f"num_processes must be >= 1, got {num_processes}.")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id must be in 0 .. {num_processes - 1} (num_processes - 1), got {process_id}."
        )


class ProcessInfo(NamedTuple):
    """This process's place in the run.

    ``how`` says where it was learnt: "one process", "explicit", "slurm", "ompi", "tpu", or
    "initialised before".
    """

    process_index: int
    process_count: int
    local_devices: int
    how: str


def detect_cluster(environment: Mapping[str, str] | None = None) -> str | None:
    """Which cluster this process was started by, by its environment: a name of `CLUSTERS`, or None.

    A scheduler that started a single process counts as none. "tpu" needs several worker hosts or
    slices in the variables that GKE sets; a TPU machine that is told of its peers by the metadata
    server alone must be asked for by ``cluster="tpu"``.

    Args:
      environment: by default ``os.environ``.
    """
    env = os.environ if environment is None else environment
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        if len([host for host in env.get(name, "").split(",") if host.strip()]) > 1:
            return "tpu"
    if env.get("TPU_PROCESS_ADDRESSES_PATH") or _count(env, "MEGASCALE_NUM_SLICES") > 1:
        return "tpu"
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in env for name in slurm) and _count(env, "SLURM_NTASKS") > 1:
        return "slurm"
    if _count(env, "OMPI_COMM_WORLD_SIZE") > 1:
        return "ompi"
    return None


def _count(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdigit() else 0


def initialise(config: DistributedConfig | None = None) -> ProcessInfo:
    """Joins this process to the run, and says where it stands. Calling it again changes nothing.

    Args:
      config: by default ``DistributedConfig()``: a known cluster, else one process.

    Raises:
      ValueError: a cluster was named that this environment is not.
      RuntimeError: a device was used before, so it is too late; or the other processes did not
        appear within ``init_timeout``.
    """
    config = DistributedConfig() if config is None else config
    if jax.distributed.is_initialized():
        return _info("initialised before")
    cluster = None
    if config.coordinator is None and config.cluster != "off":
        cluster = detect_cluster() if config.cluster == "auto" else config.cluster
        if config.cluster in ("slurm", "ompi") and detect_cluster() != config.cluster:
            raise ValueError(
                f"cluster={config.cluster!r}, but this environment is not one of several processes "
                f"under {config.cluster}; start it through its launcher, or give coordinator, "
                "num_processes and process_id."
            )
    if config.simulated_devices is not None:
        _simulate(config.simulated_devices)
    if config.coordinator is None and cluster is None:
        return _info("one process")
    # Only CPU processes read it; it does not hurt elsewhere.
    jax.config.update("jax_cpu_collectives_implementation", config.cpu_collectives)
    timeouts: dict[str, Any] = {
        "heartbeat_timeout_seconds": config.heartbeat_timeout,
        "initialization_timeout": config.init_timeout,
    }
    if config.coordinator is not None:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            cluster_detection_method="deactivate",
            **timeouts,
        )
        return _info("explicit")
    method: str | None = cluster
    if cluster == "tpu":
        method = None  # JAX tells the several forms of metadata apart by itself
    elif cluster == "ompi" and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        method = "mpi4py"  # Open MPI 5 tells its address to nobody but MPI programs
    jax.distributed.initialize(cluster_detection_method=method, **timeouts)
    return _info(str(cluster))


def _simulate(devices: int) -> None:
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError as error:
        raise RuntimeError(
            "simulated_devices came too late: a device was used before initialise()."
        ) from error


def barrier(name: str) -> None:
    """Waits until every process of the run has come here; nothing where there is one."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _info(how: str) -> ProcessInfo:
    return ProcessInfo(jax.process_index(), jax.process_count(), jax.local_device_count(), how)
