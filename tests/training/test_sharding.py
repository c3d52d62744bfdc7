"""Parameters spread over eight simulated devices: one device's numbers, memory, checkpoints."""

import functools
import math

import jax
import jax.numpy as jnp
import language
import numpy as np
import optax
import pytest
from helpers import thinned
from jax.sharding import PartitionSpec as P
from language import CONFIG

from jaximm import training
from jaximm.checkpoint import TrainCheckpoints
from jaximm.immunisers import make_config, make_immuniser
from jaximm.immunisers.language import language_problem
from jaximm.models import llama
from jaximm.models.llama import Language
from jaximm.training import FSDP, FSDP_TENSOR, TENSOR, dry_run, make_sharded
from jaximm.training.sharding import spec_of
from jaximm.types import PairedBatch

pytestmark = pytest.mark.heavy

MODEL = Language(config=CONFIG)
ROWS = PairedBatch(language.rows(8, seed=1), language.rows(8, seed=2))
KINDS = {
    "fsdp": ({"fsdp": 8}, FSDP, "fsdp"),
    "tensor": ({"tensor": 8}, TENSOR, None),
    "both": ({"fsdp": 4, "tensor": 2}, FSDP_TENSOR, "fsdp"),
}
QUERY = "layers.query.kernel"
HELD = {"fsdp": (2, 2, 16), "tensor": (2, 16, 2), "both": (2, 4, 8)}
"""Of the query's [2, 16, 16], on each device."""


def batch_fn(step):
    del step
    return ROWS


@functools.cache
def method():
    with jax.numpy_dtype_promotion("standard"):
        # SGD: Adam's first steps are of the size of the rate, whatever rounding made the gradient.
        problem = language_problem(MODEL, optax.sgd(0.1, momentum=0.9))
    return make_immuniser("npo", make_config("npo", beta=1.0), problem)


def spread(kind):
    axes, rules, rows = KINDS[kind]
    return make_sharded(axes, rules, rows=rows)


def fitted(steps=2, **options):
    start = llama.every_parameter(language.params(dtype=jnp.float32))
    return training.fit(method(), start, batch_fn, seed=0, steps=steps, log_every=1, **options)


@functools.cache
def one_device():
    return fitted()


@pytest.mark.slow
@pytest.mark.parametrize("kind", thinned(KINDS))  # tensor: the next test
def test_spread_parameters_give_one_devices_numbers_and_stay_spread(kind):
    run = fitted(parallel=spread(kind))
    for path, expected in one_device().params.trained.items():
        np.testing.assert_allclose(run.params.trained[path], expected, rtol=1e-5, atol=1e-6)
    for found, expected in zip(run.trajectory, one_device().trajectory, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    held = run.params.trained[QUERY].addressable_shards[0].data.shape
    assert held == HELD[kind]
    momentum = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(run.state.opt_state)
        if jax.tree_util.keystr(path, simple=True, separator=".").endswith(QUERY)
    ]
    assert momentum
    assert all(leaf.addressable_shards[0].data.shape == held for leaf in momentum)
    reference = run.state.memory.trained[QUERY]  # the method's copy of theta_0
    assert reference.addressable_shards[0].data.shape == held


def test_a_checkpoint_is_read_onto_another_mesh(tmp_path):
    with TrainCheckpoints(tmp_path / "run") as checkpoints:
        saved = fitted(steps=1, parallel=spread("fsdp"), checkpoints=checkpoints)
    with TrainCheckpoints(tmp_path / "run") as checkpoints:
        run = fitted(steps=1, parallel=spread("tensor"), checkpoints=checkpoints, resume=True)
    assert run.resumed_from == 1
    assert saved.params.trained[QUERY].addressable_shards[0].data.shape == HELD["fsdp"]
    assert run.params.trained[QUERY].addressable_shards[0].data.shape == HELD["tensor"]
    for path, expected in saved.params.trained.items():
        np.testing.assert_array_equal(run.params.trained[path], expected)


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_on_another_mesh(tmp_path):
    with TrainCheckpoints(tmp_path / "run") as checkpoints:
        fitted(steps=1, parallel=spread("fsdp"), checkpoints=checkpoints)
    with TrainCheckpoints(tmp_path / "run") as checkpoints:
        run = fitted(parallel=spread("tensor"), checkpoints=checkpoints, resume=True)
    assert run.resumed_from == 1
    assert run.params.trained[QUERY].addressable_shards[0].data.shape == HELD["tensor"]
    for path, expected in one_device().params.trained.items():
        np.testing.assert_allclose(run.params.trained[path], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_memory_of_a_step_is_planned_without_the_model():
    config = llama.LlamaConfig(
        vocabulary=2048, width=512, layers=4, heads=8, kv_heads=8, head_width=64, hidden=2048
    )
    model = Language(config=config, compute_dtype=jnp.bfloat16, remat=True)
    problem = language_problem(model, optax.adamw(1e-3))
    npo = make_immuniser("npo", make_config("npo"), problem)
    params = jax.eval_shape(
        lambda: llama.every_parameter(llama.init(jax.random.key(0), config, dtype=jnp.float32))
    )
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), ROWS)
    planned = dry_run(npo, params, batch, make_sharded({"fsdp": 8}, FSDP, rows="fsdp"))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert planned.parameters == count
    # Parameters, two moments and the reference, in eighths; norms, counts and rows besides.
    assert planned.arguments == pytest.approx(4 * 4 * count / 8, rel=0.01)
    assert planned.aliased == pytest.approx(planned.arguments, rel=0.01)
    assert 4 * count / 8 < planned.temporaries < 4 * 4 * count  # at least the gradient's part
    assert planned.peak == planned.arguments + planned.temporaries + (
        planned.outputs - planned.aliased
    )


@pytest.mark.slow
def test_llama_3_8b_is_compiled_for_eight_devices_that_could_not_hold_it():
    config = llama.LlamaConfig(
        vocabulary=128_256,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_width=128,
        hidden=14_336,
    )
    model = Language(config=config, compute_dtype=jnp.bfloat16, remat=True)
    problem = language_problem(model, optax.adamw(1e-4))
    none = make_immuniser("npo", make_config("npo"), problem)

    def start():
        base = llama.init(jax.random.key(0), config, dtype=jnp.bfloat16)
        return llama.with_adapters(base, jax.random.key(1), rank=16)

    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((8, 512), leaf.dtype), ROWS)
    planned = dry_run(
        none, jax.eval_shape(start), batch, make_sharded({"fsdp": 8}, FSDP, rows="fsdp")
    )
    assert planned.parameters > 8.03e9
    assert planned.arguments == pytest.approx(2 * 2 * 8.03e9 / 8, rel=0.1)  # and the reference


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("params.trained.layers.up.kernel", (2, 16, 24), P(None, "fsdp", None)),
        ("0.mu.trained.embedding.table", (64, 16), P("fsdp", None)),
        ("params.trained.layers.mlp_norm.scale", (2, 16), P()),
        ("step", (), P()),
    ],
)
def test_rules_go_by_the_end_of_a_path(path, shape, expected):
    mesh = training.make_mesh({"fsdp": 8})
    assert spec_of(path, shape, mesh, FSDP) == expected


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: training.make_mesh({"fsdp": 9}), "needs 9 devices, of 8"),
        (lambda: make_sharded({"fsdp": 8}, FSDP, rows="data"), "rows='data' is no axis"),
        (
            lambda: spec_of("layers.up.kernel", (2, 12, 24), training.make_mesh({"fsdp": 8}), FSDP),
            "cannot be cut into 8 along an axis of 12",
        ),
        (
            lambda: spec_of("layers.up.kernel", (2, 16, 24), training.make_mesh({"x": 8}), FSDP),
            "wants a mesh axis 'fsdp'",
        ),
        (
            lambda: fitted(parallel=make_sharded({"fsdp": 3}, FSDP, rows="fsdp")),
            "does not divide by 3 devices|cannot be cut into 3",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
