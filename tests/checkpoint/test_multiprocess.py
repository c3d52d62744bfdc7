"""Two processes of two devices each save together; one process of one device restores."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

WORKER = Path(__file__).parents[1].joinpath("checkpoint_worker.py")


def start(action, directory, *, processes, devices):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(WORKER.parent.parent), "OPENBLAS_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), action, str(directory)]
            + [str(number) for number in (port, processes, process, devices)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for process in range(processes)
    ]


def reports(children):
    """The JSON that each child printed; all are ended whatever happens."""
    found = []
    try:
        for child in children:
            out, err = child.communicate(timeout=120)
            assert child.returncode == 0, err[-3000:]
            found.append(json.loads(out.splitlines()[-1]))  # gloo speaks before it
    finally:
        for child in children:
            child.kill()
            child.wait()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("together")
    return directory, reports(start("save", directory, processes=2, devices=2))


def test_two_processes_save_and_restore_on_another_sharding(saved):
    for report in saved[1]:
        assert report["steps"] == [1, 2, 3]  # keep=2, and step 1 is the best
        assert report["best"] == 1
        assert report["restored"]
        assert report["spec"] == ["data"]


def test_what_one_process_finds_damaged_both_refuse_and_pass_over(saved):
    first, second = saved[1]
    assert first["refused"] == second["refused"]
    assert f"file {first['flipped']} does not match its SHA-256" in first["refused"]
    assert first["fell back"] == second["fell back"] == [2, [3], True]
    assert (saved[0] / "run" / "3.damaged").is_dir()


def test_a_state_that_differs_between_processes_is_refused_by_both(saved):
    for report in saved[1]:
        assert "differs between processes" in report["differing"]


@pytest.mark.slow
def test_one_process_with_one_device_restores_what_two_saved(saved):
    directory, (first, second) = saved
    (report,) = reports(start("read", directory, processes=1, devices=1))
    assert report["devices"] == 1
    assert report["restored"] == [3, True]
    assert report["refused"].startswith("step 3 in ")
    assert "does not match its SHA-256" in report["refused"]
    assert report["backbone"]
    for word in ("hash", "content"):  # of the parts that were written, and of the numbers
        found = [part[key] for part in (report, first, second) for key in part if word in key]
        assert len(set(found)) == 1
    assert first["part"] == second["part"] == [16, 2]  # rows were written, columns are read
