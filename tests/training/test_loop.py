"""The loop does exactly the updates it says, resumes to the same bits, and stops at bad numbers."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import thinned

from jaximm.checkpoint import CheckpointError, TrainCheckpoints
from jaximm.training import MetricsLog, Stopped, fit, make_parallel, read_metrics
from jaximm.types import Batch, Immuniser, PairedBatch

pytestmark = pytest.mark.heavy

RATE, MOMENTUM, NOISE = 0.05, 0.9, 0.01


class State(NamedTuple):
    params: jax.Array
    velocity: jax.Array
    start: jax.Array  # the same buffer as params at first: donation must cope


class Info(NamedTuple):
    task_loss: jax.Array
    grad_norm: jax.Array
    rows: jax.Array


def momentum(traces=None, *, blow_up_at=None):
    """Momentum SGD on a least-squares loss with keyed noise: a small immuniser with real state."""

    def init(params, rng_key):
        return State(params, 1e-3 * jax.random.normal(rng_key, params.shape), params)

    def loss(params, batch):
        return jnp.mean((batch.x @ params - batch.y) ** 2)

    def update(state, batch, rng_key):
        if traces is not None:
            traces.append(1)
        value, grad = jax.value_and_grad(loss)(state.params, batch.primary)
        grad = grad + NOISE * jax.random.normal(rng_key, grad.shape)
        if blow_up_at is not None:
            hit = jnp.abs(batch.harmful.y[0] - blow_up_at) < 0.5
            grad = jnp.where(hit, jnp.nan, grad)
        velocity = MOMENTUM * state.velocity - RATE * grad
        info = Info(value, jnp.linalg.norm(grad), jnp.asarray(batch.primary.x.shape[0]))
        return State(state.params + velocity, velocity, state.start), info

    return Immuniser(init, update, finish=lambda state: {"theta": state.params})


def batch_fn(step):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(99), step), (6, 3))
    time = jnp.full((2,), step, x.dtype)
    return PairedBatch(Batch(x, x @ jnp.arange(1.0, 4.0)), Batch(jnp.ones((2, 3)), time))


def by_hand(seed, steps):
    """The same updates as a plain Python loop in NumPy; only the random draws come from jax."""
    root = jax.random.key(seed)
    params = np.zeros(3)
    velocity = 1e-3 * np.asarray(jax.random.normal(jax.random.fold_in(root, 2**32 - 1), (3,)))
    losses = []
    for step in range(steps):
        batch = jax.tree.map(np.asarray, batch_fn(step).primary)
        error = batch.x @ params - batch.y
        losses.append(np.mean(error**2))
        noise = np.asarray(jax.random.normal(jax.random.fold_in(root, step), (3,)))
        velocity = MOMENTUM * velocity - RATE * (2 * batch.x.T @ error / 6 + NOISE * noise)
        params = params + velocity
    return params, losses


def measure(params):
    return {"norm": jnp.linalg.norm(params["theta"])}


def run(steps, **kwargs):
    immuniser = kwargs.pop("immuniser", IMMUNISER)
    start = kwargs.pop("params", jnp.zeros(3))
    settings = {"seed": 5, "log_every": 4, "measure_fn": measure, **kwargs}
    return fit(immuniser, start, batch_fn, steps=steps, **settings)


IMMUNISER = momentum()


LOOPS = pytest.mark.parametrize("loop", ["device", "host"])


@LOOPS
def test_the_loop_is_the_plain_loop(loop):
    start = jnp.zeros(3)
    seen = []
    result = run(
        10, params=start, progress=lambda step, record: seen.append((step, record)), loop=loop
    )
    params, losses = by_hand(5, 10)
    np.testing.assert_allclose(result.params["theta"], params, rtol=1e-12)
    assert [record["step"] for record in result.trajectory] == [4, 8, 10]  # 4 does not divide 10
    for record, first in zip(result.trajectory, (0, 4, 8), strict=True):
        chunk = losses[first : record["step"]]
        np.testing.assert_allclose(record["task_loss"], chunk[-1], rtol=1e-11)
        np.testing.assert_allclose(record["task_loss_mean"], np.mean(chunk), rtol=1e-11)
        assert record["rows"] == 6
        assert "rows_mean" not in record
    np.testing.assert_allclose(result.trajectory[-1]["norm"], np.linalg.norm(params), rtol=1e-12)
    assert seen == [(record["step"], record) for record in result.trajectory]
    assert (result.steps_done, result.resumed_from, result.skipped) == (10, 0, ())
    assert result.seconds > 0
    np.testing.assert_array_equal(start, np.zeros(3))  # the caller's array was not donated


@pytest.mark.parametrize(("loop", "left"), [("device", 6), ("host", 8)])
def test_a_steps_time_is_without_compilation_and_foretold_once(loop, left):
    plain = momentum()

    def slow_to_trace(state, batch, rng_key):
        time.sleep(0.4)
        return plain.update(state, batch, rng_key)

    told = []

    def foretell(*row):
        told.append(row)

    slow = plain._replace(update=slow_to_trace)
    result = run(10, immuniser=slow, loop=loop, foretell=foretell)
    assert result.step_seconds < 0.1 < 0.4 < result.seconds
    ((steps, seconds),) = told
    assert steps == left
    assert 0 < seconds < 0.1
    once = run(1, immuniser=slow, loop=loop, foretell=foretell)
    assert math.isnan(once.step_seconds) == (loop == "host")  # whose only step compiled


@LOOPS
def test_seed_and_length_matter_and_chunks_do_not(loop):
    reference = run(9, loop=loop)
    for log_every in (1, 3, 50):
        other = run(9, log_every=log_every, loop=loop)
        np.testing.assert_array_equal(other.params["theta"], reference.params["theta"])
    assert np.any(run(9, seed=6, loop=loop).params["theta"] != reference.params["theta"])
    assert np.any(run(8, loop=loop).params["theta"] != reference.params["theta"])
    empty = run(0)
    np.testing.assert_array_equal(empty.params["theta"], np.zeros(3))
    assert (empty.trajectory, empty.steps_done) == ([], 0)


def test_one_compilation_serves_every_chunk_and_the_next_run(tmp_path):
    traces = []
    immuniser = momentum(traces)
    run(4, immuniser=immuniser)
    first = len(traces)
    shaped = 1  # a run traces the update once more for its shapes alone, without compiling
    run(11, immuniser=immuniser, seed=8)
    assert len(traces) == first + shaped
    with TrainCheckpoints(tmp_path) as checkpoints:
        run(6, immuniser=immuniser, checkpoints=checkpoints)
        run(13, immuniser=immuniser, checkpoints=checkpoints, resume=True)
    assert len(traces) == first + 3 * shaped


def test_data_given_by_partial_is_an_input_not_a_constant():
    traces = []
    immuniser = momentum(traces)

    def batch(x, y, step):
        return PairedBatch(Batch(jnp.roll(x, step, axis=0)[:4], jnp.roll(y, step)[:4]), Batch(x, y))

    results = []
    for key in (1, 2):
        x = jax.random.normal(jax.random.key(key), (9, 3))
        data = jax.tree_util.Partial(batch, x, x.sum(axis=1))
        results.append(fit(immuniser, jnp.zeros(3), data, seed=0, steps=6, log_every=3))
        if key == 1:
            first = len(traces)
    assert len(traces) == first + 1
    assert np.any(results[0].params["theta"] != results[1].params["theta"])


@pytest.mark.parametrize("stop_at", [4, 7, 12])
def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(tmp_path, stop_at):
    whole_log, log = MetricsLog(tmp_path / "whole.jsonl"), MetricsLog(tmp_path / "metrics.jsonl")
    whole = run(14, log=whole_log)
    with TrainCheckpoints(tmp_path / "checkpoints") as checkpoints:
        run(stop_at, checkpoints=checkpoints, checkpoint_every=4, log=log)
    log.append({"step": stop_at + 1, "task_loss": -1.0})  # written after the last checkpoint
    with TrainCheckpoints(tmp_path / "checkpoints") as checkpoints:
        resumed = run(14, checkpoints=checkpoints, resume=True, log=log)
        assert checkpoints.all_steps()[-1] == 14
    np.testing.assert_array_equal(resumed.params["theta"], whole.params["theta"])
    np.testing.assert_array_equal(resumed.state.velocity, whole.state.velocity)
    assert resumed.resumed_from == stop_at
    assert resumed.trajectory[-1] == whole.trajectory[-1]
    assert read_metrics(log.path) == resumed.trajectory
    if stop_at % 4 == 0:
        assert resumed.trajectory == whole.trajectory
        assert log.path.read_text() == whole_log.path.read_text()


KILLED = """
import sys, time
sys.path[:0] = {paths!r}
import conftest
from tests.training import test_loop as case
from jaximm.checkpoint import TrainCheckpoints
from jaximm.training import MetricsLog
from jaximm.training import make_parallel

def progress(step, record):
    if step == 8:
        checkpoints.wait()
        print("ready", flush=True)
        time.sleep(60)

with TrainCheckpoints({directory!r} + "/checkpoints") as checkpoints:
    case.run(14, checkpoints=checkpoints, checkpoint_every=4,
             log=MetricsLog({directory!r} + "/metrics.jsonl"), progress=progress)
"""


def test_a_killed_run_resumes_to_the_same_numbers(tmp_path):
    tests = Path(__file__).parents[1]
    paths = [str(tests.parent), str(tests)]
    script = KILLED.format(paths=paths, directory=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    whole = run(14)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with TrainCheckpoints(tmp_path / "checkpoints") as checkpoints:
        resumed = run(14, checkpoints=checkpoints, resume=True, log=log)
    assert resumed.resumed_from == 8
    assert resumed.trajectory == whole.trajectory == read_metrics(log.path)
    np.testing.assert_array_equal(resumed.params["theta"], whole.params["theta"])


def test_checkpoints_come_at_the_record_after_each_multiple(tmp_path):
    with TrainCheckpoints(tmp_path, keep=9) as checkpoints:
        run(14, checkpoints=checkpoints, checkpoint_every=6)
        checkpoints.wait()
        assert checkpoints.all_steps() == [8, 12, 14]
        again = run(14, checkpoints=checkpoints, resume=True)
    assert again.resumed_from == again.steps_done == 14
    np.testing.assert_array_equal(again.params["theta"], run(14).params["theta"])


def test_checkpoints_come_by_the_clock_as_well(tmp_path):
    with TrainCheckpoints(tmp_path, keep=9) as checkpoints:
        run(14, checkpoints=checkpoints, checkpoint_seconds=1e-9)
        checkpoints.wait()
        assert checkpoints.all_steps() == [4, 8, 12, 14]
    with TrainCheckpoints(tmp_path / "late", keep=9) as checkpoints:
        run(14, checkpoints=checkpoints, checkpoint_seconds=1e9)
        checkpoints.wait()
        assert checkpoints.all_steps() == [14]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_at_a_record_that_is_kept(tmp_path, number):
    def progress(done, record):
        if done == 4:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with TrainCheckpoints(tmp_path) as checkpoints, pytest.raises(Stopped) as stopped:
        run(14, checkpoints=checkpoints, progress=progress)
    assert (stopped.value.kept, stopped.value.signal) == ("step 8 of 14 is kept", number)
    assert signal.getsignal(number) is before
    with TrainCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [8]
        again = run(14, checkpoints=checkpoints, resume=True)
    assert again.resumed_from == 8
    np.testing.assert_array_equal(again.params["theta"], run(14).params["theta"])


def test_the_best_record_is_kept_by_its_number(tmp_path):
    with TrainCheckpoints(tmp_path, keep=1, best_metric="norm", best_mode="min") as checkpoints:
        trajectory = run(12, checkpoints=checkpoints, checkpoint_every=4).trajectory
        best = min(trajectory, key=lambda record: record["norm"])
        assert checkpoints.best_step() == best["step"] != 12
        assert checkpoints.all_steps() == [best["step"], 12]


def test_a_damaged_newest_checkpoint_is_refused_or_passed_over(tmp_path):
    with TrainCheckpoints(tmp_path) as checkpoints:
        run(8, checkpoints=checkpoints, checkpoint_every=4)
    (tmp_path / "8" / "record" / "metadata").write_text("{}")
    with TrainCheckpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="step 8"):
            run(12, checkpoints=checkpoints, resume=True)
        resumed = run(12, checkpoints=checkpoints, resume=True, strict=False, checkpoint_every=4)
    assert (resumed.resumed_from, resumed.skipped) == (4, (8,))
    np.testing.assert_array_equal(resumed.params["theta"], run(12).params["theta"])


@LOOPS
def test_a_bad_number_stops_at_its_step_after_the_last_good_checkpoint(tmp_path, loop):
    broken = momentum(blow_up_at=9)  # the update from step 9 to 10
    with TrainCheckpoints(tmp_path) as checkpoints:
        with pytest.raises(FloatingPointError, match=r"step 10: .*'task_loss': \d"):
            run(14, immuniser=broken, checkpoints=checkpoints, checkpoint_every=4, loop=loop)
        assert checkpoints.all_steps() == [4, 8]
        healed = run(14, checkpoints=checkpoints, resume=True, loop=loop)
    np.testing.assert_array_equal(healed.params["theta"], run(14, loop=loop).params["theta"])


def test_a_loop_from_the_host_compiles_its_step_once():
    traces = []
    counted = momentum(traces)
    run(9, immuniser=counted, loop="host")
    first = len(traces)
    run(11, immuniser=counted, loop="host", seed=1)
    assert len(traces) == first + 1  # the shapes of its info are looked at once a run


@pytest.mark.parametrize("kind", thinned(["shard_map", "jit", "pmap"]))
def test_a_loop_from_the_host_runs_on_several_devices(kind):
    parallel = make_parallel(kind, jax.devices()[:2], rows="whole")
    found = run(6, loop="host", parallel=parallel)
    expected = run(6)
    np.testing.assert_allclose(found.params["theta"], expected.params["theta"], rtol=1e-12)
    assert found.trajectory[-1]["task_loss_mean"] == pytest.approx(
        expected.trajectory[-1]["task_loss_mean"]
    )


def test_finish_must_give_finite_parameters():
    singular = IMMUNISER._replace(finish=lambda state: {"theta": state.params / 0.0})
    with pytest.raises(FloatingPointError, match="finish"):
        run(4, immuniser=singular, measure_fn=None)


def test_finish_is_called_once_when_nothing_is_measured():
    calls = []
    counted = IMMUNISER._replace(finish=lambda state: calls.append(1) or state.params)
    run(12, immuniser=counted, measure_fn=None)
    assert len(calls) == 1


def test_what_does_not_fit_is_refused_at_the_door(tmp_path):
    for bad in ({"steps": -1}, {"log_every": 0}, {"resume": True}, {"checkpoint_every": 3}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            run(**{"steps": 4, **bad})
    with pytest.raises(ValueError, match="rename"):
        run(4, measure_fn=lambda params: {"task_loss": 0.0})

    def update(state, batch, rng_key):
        return state, Info(jnp.zeros(2), jnp.zeros(()), jnp.zeros(()))

    with pytest.raises(ValueError, match="scalars"):
        run(4, immuniser=IMMUNISER._replace(update=update))
    with TrainCheckpoints(tmp_path) as checkpoints:
        run(8, checkpoints=checkpoints)
        checkpoints.wait()
        with pytest.raises(ValueError, match="checkpoint_every"):
            run(8, checkpoints=checkpoints, checkpoint_every=0)
        with pytest.raises(ValueError, match=r"already holds steps \[8\]"):
            run(8, checkpoints=checkpoints)
        with pytest.raises(ValueError, match="seed 5, not 6"):
            run(8, checkpoints=checkpoints, resume=True, seed=6)
        with pytest.raises(ValueError, match="past steps=4"):
            run(4, checkpoints=checkpoints, resume=True)


def test_metrics_keep_what_json_lacks(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    records = [{"step": 1, "kappa": float("inf")}, {"step": 2, "kappa": -float("inf"), "x": 0.1}]
    for record in records:
        log.append(record)
    assert read_metrics(log.path) == records
    log.append({"step": 3, "kappa": float("nan")})
    assert np.isnan(read_metrics(log.path)[2]["kappa"])
    log.rewrite(records[:1])
    assert read_metrics(log.path) == records[:1]
    log.path.write_text('{"step": 1}\n{"ste')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(log.path)
