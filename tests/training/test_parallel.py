"""Loops and placement on many devices: what one device gives, few messages, compiled once.

That each method agrees with itself on any devices is in `contracts/test_immunisers.py`.
"""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaximm import data
from jaximm.checkpoint import TrainCheckpoints
from jaximm.training import MetricsLog, loop, make_parallel, read_metrics, step_fn
from jaximm.types import as_argument
from tests import helpers
from tests.immuniser_cases import (
    COLLECTIVES,
    batches,
    check_same,
    collectives_of,
    make,
    on_one_device,
    paired,
    run,
    run_steps,
)

pytestmark = pytest.mark.heavy

SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("deep", "shard_map"),
        *(pytest.param(*way, marks=SLOW) for way in (("linear", "pmap"), ("deep", "jit"))),
    ],
)
def test_float32(family, kind):
    parallel = make_parallel(kind, jax.devices()[:8])
    params, _, _ = run_steps(family, "condition_gap", parallel, jnp.float32)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    check_same(params, on_one_device(family, "condition_gap", jnp.float32)[0], 1e-4)


@pytest.mark.parametrize("kind", helpers.thinned(["shard_map", "jit", "pmap"]))
def test_a_step_donates_compiles_once_and_leaves_the_host_alone(kind, caplog):
    immuniser, start, _ = make("deep", "condition_gap")
    parallel = make_parallel(kind, jax.devices()[:4])
    key = parallel.put(jax.random.key(0))
    placed = [parallel.put_rows(batch) for batch in batches("deep")[:4]]
    step = step_fn(immuniser, parallel)
    first = parallel.put(immuniser.init(start, jax.random.key(0)))
    state, _ = step(first, placed[0], key)
    jax.block_until_ready(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((start, placed[0], key)))
    buffers = [leaf.sharding for leaf in jax.tree.leaves(state)]
    with (
        jax.log_compiles(),
        caplog.at_level(logging.WARNING),
        jax.transfer_guard("disallow"),
        jax.no_tracing(),
    ):
        for batch in placed[1:]:
            state, _ = jax.block_until_ready(step(state, batch, key))
    assert not [r for r in caplog.records if "ompil" in r.getMessage()], caplog.text
    assert [leaf.sharding for leaf in jax.tree.leaves(state)] == buffers
    assert step_fn(immuniser, parallel).func is step.func  # shared, not compiled again


# --- the chunk loop ---------------------------------------------------------------------------


def whole(arrays, seed, step, part=None):
    return data.paired_batch(arrays, seed, step, batch_size=None, part=part)


def check_runs(found, expected, rtol=1e-6):
    check_same(found.params, expected.params, rtol)
    assert [row.keys() for row in found.trajectory] == [row.keys() for row in expected.trajectory]
    for row, other in zip(found.trajectory, expected.trajectory, strict=True):
        for key, value in row.items():
            np.testing.assert_allclose(value, other[key], rtol=rtol, atol=1e-12)


@functools.cache
def fitted(family, name, rows=paired):
    return run(family, name, None, rows=rows)


@pytest.mark.parametrize(
    ("family", "name", "kind", "count"),
    [
        ("deep", "condition_gap", "shard_map", 8),
        pytest.param("linear", "condition_gap rows=batch", "pmap", 8, marks=SLOW),
        pytest.param("deep", "condition_gap", "jit", 2, marks=SLOW),
        pytest.param("linear", "condition_gap rows=batch", "shard_map", 2, marks=SLOW),
        pytest.param("linear", "condition_gap rows=batch", "jit", 8, marks=SLOW),
        pytest.param("deep", "condition_gap", "pmap", 2, marks=SLOW),
        pytest.param("deep", "condition_gap", "jit", 1, marks=SLOW),
    ],
)
def test_a_fit_on_devices_is_the_fit_on_one(family, name, kind, count):
    parallel = make_parallel(kind, jax.devices()[:count])
    measure = lambda params: {"sum": sum(float(jnp.sum(x)) for x in jax.tree.leaves(params))}  # noqa: E731
    found = run(family, name, parallel, measure_fn=measure)
    expected = fitted(family, name)
    for row in found.trajectory:
        assert np.isfinite(row.pop("sum"))
    check_runs(found, expected)
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves((found.params, found.state)))


@pytest.mark.slow
def test_closed_forms_fit_on_devices_too():
    found = run("deep", "limit", make_parallel("shard_map"))
    check_runs(found, fitted("deep", "limit"))


@pytest.mark.parametrize("kind", helpers.thinned(["shard_map", "jit", "pmap"]))
def test_rows_that_devices_do_not_divide_may_stay_whole(kind):
    parallel = make_parallel(kind, jax.devices()[:3], rows="whole")  # 40 rows on 3 devices
    found = run("linear", "condition_gap", parallel, rows=whole)
    expected = fitted("linear", "condition_gap", whole)
    check_same(found.params, expected.params, 1e-13 if kind != "jit" else 1e-9)
    text = chunk_text(parallel, "linear", "condition_gap", whole)
    assert not collectives_of(text)
    assert not [word for word in COLLECTIVES if word in text]


@pytest.mark.slow
@pytest.mark.parametrize("count", [pytest.param(2, marks=SLOW), 8])
def test_all_rows_may_be_split(count):
    parallel = make_parallel("shard_map", jax.devices()[:count])
    found = run("deep", "condition_gap", parallel, rows=whole)
    check_runs(found, fitted("deep", "condition_gap", whole))


def chunk_text(parallel, family, name, rows=paired):
    """The compiled chunk loop."""
    immuniser, start, arrays = make(family, name)
    key = jax.random.key(0)
    state = parallel.put(jax.tree.map(loop._owned, immuniser.init(start, key)))
    drawn = jax.tree_util.Partial(rows, arrays, jnp.uint32(3))
    inputs = parallel.put((drawn, key, jnp.int32(0), jnp.int32(4)))
    chunk = loop._parallel_chunk(parallel)
    update = parallel.put_shared(as_argument(immuniser.update))
    return chunk.lower(update, state, *inputs).compile().as_text()


def test_a_chunk_costs_no_more_messages_than_its_steps():
    """The rows of a batch are gathered from each device's own copy of the data."""
    parallel = make_parallel("shard_map", jax.devices()[:8])
    text = chunk_text(parallel, "deep", "condition_gap")
    assert collectives_of(text) == {"all-gather": 1, "all-reduce": 1}
    gathers = [line.split(" = ")[1] for line in text.splitlines() if " gather(" in line]
    shapes = [re.findall(r"\d+", line.split("]")[0].split("[")[1]) for line in gathers]
    inputs = [shape for line, shape in zip(gathers, shapes, strict=True) if line.startswith("f64")]
    assert [(shape[0], shape[-1]) for shape in inputs] == [("2", "6")] * 2  # of 16 rows a task


@pytest.mark.parametrize("kind", helpers.thinned(["shard_map", "pmap", "jit"]))
def test_later_chunks_and_runs_compile_nothing(kind, caplog):
    immuniser, *rest = make("deep", "condition_gap")
    parallel = make_parallel(kind, jax.devices()[:2])
    run("deep", "condition_gap", parallel, made=(immuniser, *rest), steps=8)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        run("deep", "condition_gap", parallel, made=(immuniser, *rest), steps=20)
    compiled = [r.getMessage() for r in caplog.records if "XLA compilation" in r.getMessage()]
    assert not [text for text in compiled if "chunk" in text or "mapped" in text], compiled


WAYS = [("shard_map", 8), ("pmap", 2), ("jit", 4), None]


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, *(pytest.param(way, marks=SLOW) for way in (1, 2, 3))])
def test_a_run_goes_on_with_other_devices(tmp_path, first):
    """Each way's checkpoint is continued by the next way, none included."""
    ways = [
        None if way is None else make_parallel(way[0], jax.devices()[: way[1]])
        for way in (WAYS[first], WAYS[(first + 1) % len(WAYS)])
    ]
    log = MetricsLog(tmp_path / "metrics.jsonl")
    settings = {"log": log, "resume": True, "checkpoint_every": 8}
    with TrainCheckpoints(tmp_path / "checkpoints") as checkpoints:
        run("deep", "imma", ways[0], steps=8, checkpoints=checkpoints, **settings)
    with TrainCheckpoints(tmp_path / "checkpoints") as checkpoints:
        resumed = run("deep", "imma", ways[1], checkpoints=checkpoints, **settings)
    expected = fitted("deep", "imma")
    assert resumed.resumed_from == 8
    check_runs(resumed, expected)
    assert read_metrics(log.path) == resumed.trajectory


@pytest.mark.slow
def test_the_same_devices_resume_to_the_same_bits(tmp_path):
    parallel = make_parallel("pmap", jax.devices()[:2])
    straight = run("deep", "condition_gap", parallel)
    with TrainCheckpoints(tmp_path) as checkpoints:
        run("deep", "condition_gap", parallel, steps=8, checkpoints=checkpoints)
    with TrainCheckpoints(tmp_path) as checkpoints:
        resumed = run("deep", "condition_gap", parallel, checkpoints=checkpoints, resume=True)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, straight.state)
    assert resumed.trajectory == straight.trajectory


@pytest.mark.slow
def test_a_bad_number_stops_every_device():
    immuniser, *rest = make("deep", "condition_gap")

    def update(state, batch, rng_key):
        state, info = immuniser.update(state, batch, rng_key)
        poison = jnp.where(state.step == 5, jnp.nan, 1.0)
        return state, info._replace(task_loss=info.task_loss * poison)

    broken = immuniser._replace(update=update)
    with pytest.raises(FloatingPointError, match="step 5"):
        run("deep", "condition_gap", make_parallel("shard_map"), made=(broken, *rest))


# --- placement --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jit", "pmap", "shard_map"])
def test_placement_round_trips_with_keys(kind):
    parallel = make_parallel(kind, jax.devices()[:4])
    tree = {"x": jnp.arange(6.0).reshape(2, 3), "key": jax.random.key(3), "n": jnp.int32(4)}
    placed = parallel.put(tree)
    lead = (4,) if kind == "pmap" else ()
    assert placed["x"].shape == (*lead, 2, 3)
    assert placed["key"].shape == lead
    stored = parallel.replicated(placed)
    assert stored["x"].sharding == NamedSharding(parallel.mesh, P())
    for form in (parallel.one_copy(placed), stored, parallel.one_copy(_again(parallel, stored))):
        np.testing.assert_array_equal(form["x"], tree["x"])
        np.testing.assert_array_equal(form["n"], 4)
        words = jax.random.key_data(form["key"])
        np.testing.assert_array_equal(words, jax.random.key_data(tree["key"]))
    assert parallel.abstract(tree)["x"].sharding == stored["x"].sharding


def _again(parallel, stored):
    return parallel.from_replicated(stored)


@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
def test_rows_lie_in_the_order_of_devices(kind):
    parallel = make_parallel(kind, jax.devices()[:4])
    placed = parallel.put_rows({"x": jnp.arange(16.0).reshape(8, 2)})["x"]
    for number, shard in enumerate(placed.addressable_shards):
        rows = np.asarray(shard.data).reshape(2, 2)
        np.testing.assert_array_equal(rows, np.arange(16.0).reshape(8, 2)[2 * number :][:2])
        assert shard.device == jax.devices()[number]


def test_what_does_not_fit_is_refused_at_the_door():
    devices = jax.devices()
    with pytest.raises(ValueError, match=r"unknown kind 'vmap'; choose from \['jit'"):
        make_parallel("vmap")
    with pytest.raises(ValueError, match="rows must be one of"):
        make_parallel("jit", rows="some")
    for chosen in ([], [devices[0], devices[0]]):
        with pytest.raises(ValueError, match="at least one and distinct"):
            make_parallel("jit", chosen)
    with pytest.raises(ValueError, match="6 rows do not divide by the 4 devices"):
        make_parallel("jit", devices[:4]).put_rows(jnp.ones((6, 2)))
    for kind in ("jit", "pmap", "shard_map"):
        with pytest.raises(ValueError, match="16 rows does not divide by 3 devices"):
            run("deep", "condition_gap", make_parallel(kind, devices[:3]))
    three = make_parallel("shard_map", devices[:2])

    def blind(arrays, seed, step):
        return paired(arrays, seed, step)

    with pytest.raises(ValueError, match="must take part="):
        run("deep", "condition_gap", three, rows=blind)

    def deaf(arrays, seed, step, part=None):
        return paired(arrays, seed, step)

    with pytest.raises(ValueError, match="must return 1/2 of the rows"):
        run("deep", "condition_gap", three, rows=deaf)
