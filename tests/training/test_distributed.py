"""Two real processes train as one run, are killed, and one process goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import multiprocess_worker as worker
import numpy as np
import pytest

from jaximm.checkpoint import TrainCheckpoints
from jaximm.training import DistributedConfig, MetricsLog, initialise, make_parallel, read_metrics
from jaximm.training.distributed import detect_cluster

pytestmark = pytest.mark.heavy

PROCESSES, DEVICES = 2, 4


def start(folder, *, kind, case, stop_at=None, resume=False):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    root = Path(worker.__file__).parent.parent
    environment |= {"PYTHONPATH": str(root), "OPENBLAS_NUM_THREADS": "1"}
    children = []
    for process in range(PROCESSES):
        distributed = {
            "coordinator": f"127.0.0.1:{port}",
            "num_processes": PROCESSES,
            "process_id": process,
            "simulated_devices": DEVICES,
            "heartbeat_timeout": 60,
            "init_timeout": 120,
        }
        settings = {
            "distributed": distributed,
            "folder": str(folder),
            "kind": kind,
            "case": case,
            "stop_at": stop_at,
            "resume": resume,
        }
        children.append(
            subprocess.Popen(
                [sys.executable, worker.__file__, json.dumps(settings)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
    return children


def reports(children):
    """What each child printed; all are ended whatever happens."""
    found = []
    try:
        for child in children:
            out, err = child.communicate(timeout=240)
            assert child.returncode == 0, err[-3000:]
            found.append(json.loads(out.splitlines()[-1]))  # gloo writes there too
    finally:
        kill(children)
    return found


def kill(children):
    for child in children:
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
        child.wait()


def wait_for(path, children):
    deadline = time.monotonic() + 240
    while not path.exists():
        for child in children:
            if child.poll() is not None:
                pytest.fail(f"a process ended early: {child.communicate()[1][-3000:]}")
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def check_same(params, expected, rtol=1e-6):
    for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        other = np.asarray(other)
        np.testing.assert_allclose(leaf, other, rtol=0, atol=rtol * np.abs(other).max())


CASES = [
    pytest.param("linear", "shard_map"),
    pytest.param("deep", "pmap", marks=pytest.mark.slow),
    pytest.param("deep", "shard_map", marks=pytest.mark.slow),
    pytest.param("linear", "pmap", marks=pytest.mark.slow),
    pytest.param("linear", "jit", marks=pytest.mark.slow),
    pytest.param("deep", "jit", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("case", "kind"), CASES)
@pytest.mark.slow
def test_two_killed_processes_and_one_that_goes_on(tmp_path, case, kind):
    """2 processes x 4 devices to step 8, kill -9, then 1 process x 2 devices to the end."""
    stop_at = worker.CHECKPOINT_EVERY
    children = start(tmp_path, kind=kind, case=case, stop_at=stop_at)
    try:
        wait_for(tmp_path / "checkpoints" / str(stop_at), children)
    finally:
        kill(children)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    before = read_metrics(log.path)
    assert [record["step"] for record in before] == [4, 8]  # one process alone wrote
    whole = worker.run(case, None)
    with TrainCheckpoints(tmp_path / "checkpoints") as checkpoints:
        resumed = worker.run(
            case,
            make_parallel(kind, jax.devices()[:2]),
            checkpoints=checkpoints,
            resume=True,
            log=log,
        )
    assert resumed.resumed_from == stop_at
    check_same(resumed.params, whole.params)
    losses = [record["task_loss"] for record in resumed.trajectory]
    np.testing.assert_allclose(losses, [r["task_loss"] for r in whole.trajectory], rtol=1e-6)
    assert [record["step"] for record in read_metrics(log.path)] == [4, 8, 12, 16, 20, 24]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shard_map", "pmap", "jit"])
def test_two_processes_finish_what_one_began(tmp_path, kind):
    """The other way round, to the end, so that both processes' results can be read."""
    half = make_parallel("shard_map", jax.devices()[:1])
    with TrainCheckpoints(tmp_path / "checkpoints") as checkpoints:
        method_steps, worker.STEPS = worker.STEPS, 8
        try:
            worker.run("deep", half, checkpoints=checkpoints)
        finally:
            worker.STEPS = method_steps
    found = reports(start(tmp_path, kind=kind, case="deep", resume=True))
    whole = worker.run("deep", None)
    for process, report in enumerate(found):
        assert report["info"] == [process, PROCESSES, DEVICES, "explicit"]
        assert report["devices"] == PROCESSES * DEVICES
        assert report["resumed_from"] == 8
        assert report["shown"] == ([] if process else [12, 16, 20, 24])
        with np.load(tmp_path / f"params-{process}.npz") as stored:
            check_same([stored[key] for key in stored], whole.params)
    assert found[0]["trajectory"] == found[1]["trajectory"]
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")][-1] == 24


def test_one_process_needs_no_settings(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_")):
            monkeypatch.delenv(name)
    for config in (None, DistributedConfig(cluster="off")):
        assert initialise(config) == (0, 1, jax.local_device_count(), "one process")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coordinator": "10.0.0.1:1234"}, "missing: num_processes, process_id"),
        ({"num_processes": 2, "process_id": 0}, "missing: coordinator"),
        ({"coordinator": "10.0.0.1", "num_processes": 2, "process_id": 0}, "host:port"),
        ({"coordinator": "host:0", "num_processes": 2, "process_id": 0}, "host:port"),
        ({"coordinator": ":1234", "num_processes": 2, "process_id": 0}, "host:port"),
        ({"coordinator": "h:1", "num_processes": 0, "process_id": 0}, "num_processes"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, r"process_id .* 0 \.\. 1"),
        ({"cluster": "cloud"}, "unknown cluster 'cloud'"),
        ({"heartbeat_timeout": 0}, "heartbeat_timeout"),
        ({"init_timeout": 0}, "init_timeout"),
        ({"simulated_devices": 0}, "simulated_devices"),
        ({"cpu_collectives": "tcp"}, "cpu_collectives"),
    ],
)
def test_settings_are_checked_at_the_door(fields, message):
    with pytest.raises(ValueError, match=message):
        DistributedConfig(**fields)


SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (SLURM, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2"}, None),  # an allocation, not a step of it
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "ompi"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "t0", "MEGASCALE_NUM_SLICES": "2"}, "tpu"),
    ],
)
def test_a_cluster_is_known_by_its_environment(environment, found):
    assert detect_cluster(environment) == found


def test_what_is_passed_to_jax(monkeypatch):
    """Each way of learning the peers, up to the call that would wait for them."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    timeouts = {"heartbeat_timeout_seconds": 100, "initialization_timeout": 300}
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert initialise().how == "slurm"
    assert calls.pop() == ((), {"cluster_detection_method": "slurm", **timeouts})
    assert initialise(DistributedConfig(cluster="off")).how == "one process"
    explicit = {"coordinator": "h:1", "num_processes": 2, "process_id": 1}
    found = initialise(DistributedConfig(**explicit, heartbeat_timeout=7, init_timeout=8))
    assert found.how == "explicit"
    args, kwargs = calls.pop()
    assert args == ("h:1", 2, 1)
    assert kwargs["cluster_detection_method"] == "deactivate"
    assert kwargs["heartbeat_timeout_seconds"] == 7
    assert kwargs["initialization_timeout"] == 8
    for name in SLURM:
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match="not one of several processes under slurm"):
        initialise(DistributedConfig(cluster="slurm"))
    assert initialise(DistributedConfig(cluster="tpu")).how == "tpu"
    assert calls.pop()[1]["cluster_detection_method"] is None
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert initialise().how == "ompi"
    assert calls.pop()[1]["cluster_detection_method"] == "mpi4py"
    assert not calls


def test_simulated_devices_come_before_everything_else():
    jax.devices()
    with pytest.raises(RuntimeError, match="too late"):
        initialise(DistributedConfig(simulated_devices=3))
