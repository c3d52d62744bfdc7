"""Cells that other processes compute: the same files as without them, whatever becomes of one."""

import functools
import multiprocessing
import os
import signal
import threading
import time
from concurrent import futures

import assessment_worker as worker
import pytest

from jaximm import assessment
from jaximm.assessment import workers

pytestmark = pytest.mark.heavy

ATTACKERS = ("gd", "ridge", "fine_tune_adam")


def assess(out, start, **more):
    crew = None if start is None else assessment.Workers(start, worker.rebuilt)
    more |= {"level": worker.LEVEL, "attackers": ATTACKERS, "out": out, "workers": crew}
    return assessment.assess(worker.bench(), worker.models(), **more)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return assess(folder, None), files_of(folder)


def files_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "cells").glob("*.json")}


def test_any_executor_gives_the_document_and_the_files_of_none(alone, tmp_path):
    said = []
    document = assess(
        tmp_path,
        functools.partial(futures.ThreadPoolExecutor, 2),
        progress=lambda label, done, total, record: said.append((done, total)),
    )
    assert document == alone[0]
    assert files_of(tmp_path) == alone[1]
    assert said[0][0] == 0
    assert said[-1][0] == said[-1][1]
    assert [done for done, _ in said] == sorted(done for done, _ in said)


def test_a_batch_that_raises_is_failed_and_tried_again_once(alone, tmp_path, monkeypatch):
    asked = []

    def broken(subject, attack, work):
        asked.append(work.attacker)
        if work.attacker == "gd":
            raise ArithmeticError("no numbers")
        return perform(subject, attack, work)

    perform = workers.perform
    monkeypatch.setattr(workers, "perform", broken)
    threads = functools.partial(futures.ThreadPoolExecutor, 2)
    document = assess(tmp_path, threads)
    rows = [row for row in document["rows"] if row["attacker"] == "gd"]
    assert {row["status"] for row in rows} == {"failed"}
    assert "ArithmeticError: no numbers" in rows[0]["reason"]
    before = len(asked)
    assess(tmp_path, threads, retry_failed=True)
    assert asked[before:] == ["gd"] * len(rows)
    monkeypatch.undo()
    assert assess(tmp_path, threads, retry_failed=True) == alone[0]


class Dying(futures.Executor):
    """Its processes end at once; counts how many there were."""

    started = 0

    def __init__(self):
        Dying.started += 1

    def submit(self, fn, /, *args, **kwargs):
        future = futures.Future()
        future.set_exception(futures.BrokenExecutor("ended"))
        return future


def test_workers_that_always_end_end_the_assessment_with_what_to_do(tmp_path):
    with pytest.raises(RuntimeError, match=r"4 times in a row without a batch.*fewer workers"):
        assess(tmp_path, Dying)
    assert Dying.started == workers.PATIENCE + 1


def test_what_cannot_be_a_worker_is_refused(tmp_path):
    crew = assessment.Workers(futures.ThreadPoolExecutor, lambda: (worker.bench(), worker.models()))
    with pytest.raises(ValueError, match="a function that can be pickled"):
        assessment.assess(
            worker.bench(), worker.models(), level=worker.LEVEL, attackers=ATTACKERS, workers=crew
        )
    with pytest.raises(ValueError, match="at least 1 worker, got 0"):
        workers.processes(0)


@pytest.mark.slow
def test_a_killed_process_loses_its_batch_alone(alone, tmp_path):
    killed = []

    def kill_one():
        while not killed:
            time.sleep(0.05)
            children = multiprocessing.active_children()
            if children and len(list((tmp_path / "cells").glob("*.json"))) > 8:
                children[0].kill()
                killed.append(children[0].pid)

    watcher = threading.Thread(target=kill_one, daemon=True)
    watcher.start()
    document = assess(tmp_path, functools.partial(workers.processes, 2))
    assert killed
    assert document["rows"] == alone[0]["rows"]
    assert files_of(tmp_path) == alone[1]


@pytest.mark.slow
def test_a_cluster_of_which_a_worker_is_killed_gives_the_same_files(alone, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(worker.__file__), prepend=os.pathsep)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:

        def kill_one():
            while len(list((tmp_path / "cells").glob("*.json"))) <= 8:
                time.sleep(0.05)
            nanny = next(iter(cluster.workers.values()))
            os.kill(nanny.pid, signal.SIGKILL)

        watcher = threading.Thread(target=kill_one)
        watcher.start()
        document = assess(tmp_path, functools.partial(workers.cluster, cluster.scheduler_address))
        watcher.join()
    assert document["rows"] == alone[0]["rows"]
    assert files_of(tmp_path) == alone[1]


def test_a_scheduler_that_is_not_there_is_named(monkeypatch):
    pytest.importorskip("distributed")
    with pytest.raises(ValueError, match=r"no scheduler answers at 'tcp://127\.0\.0\.1:9'"):
        workers.cluster("tcp://127.0.0.1:9")


@pytest.mark.slow
def test_a_scheduler_without_workers_is_named(monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(workers, "WAITING", 2)
    with (
        distributed.LocalCluster(n_workers=0, dashboard_address=None) as cluster,
        pytest.raises(ValueError, match="has no workers: start some with `dask worker tcp:"),
    ):
        workers.cluster(cluster.scheduler_address)
