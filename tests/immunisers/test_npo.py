"""NPO on digits: a small perceptron that knows ten, and is to forget five of them."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from jaximm import cli, data, immunisers, training
from jaximm.checkpoint import TrainCheckpoints
from jaximm.data.tables import mnist
from jaximm.immunisers import ProbeParams, Problem
from jaximm.training.parallel import make_parallel, step_fn
from jaximm.types import Batch, Head, PairedBatch

pytestmark = pytest.mark.heavy

ROWS, WIDTHS, KNOWN = 320, (49, 24, 12), 5
KEY = jax.random.key(0)


@functools.lru_cache(maxsize=1)
def digits() -> PairedBatch:
    """Which of 0 to 4 (primary), which of 5 to 9 (harmful); 7 x 7 pixels."""
    read = mnist.read_5k()
    pixels = np.asarray(read.images, float).reshape(-1, 7, 4, 7, 4).mean(axis=(2, 4)) / 255
    batches = []
    for task in (0, 1):
        rows = np.flatnonzero(read.labels // KNOWN == task)
        rows = np.random.default_rng(task).permutation(rows)[:ROWS]
        labels = read.labels[rows] % KNOWN
        batches.append(
            Batch(jnp.asarray(pixels[rows].reshape(ROWS, -1)), jnp.asarray(labels, jnp.int32))
        )
    return PairedBatch(*batches)


def features_fn(backbone, x):
    return jnp.tanh(x @ backbone["0"]) @ backbone["1"]


@functools.lru_cache(maxsize=1)
def taught() -> tuple[ProbeParams, Head]:
    """A perceptron that knows both tasks, and its two heads."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (WIDTHS[:2], WIDTHS[1:], (WIDTHS[2], 2 * KNOWN))
    weights = [jax.random.normal(k, s) / s[0] ** 0.5 for k, s in zip(keys, shapes, strict=True)]
    params = {"0": weights[0], "1": weights[1], "head": weights[2]}
    x = jnp.concatenate([digits().primary.x, digits().harmful.x])
    y = jnp.concatenate([digits().primary.y, digits().harmful.y + KNOWN])

    def loss_fn(params):
        logits = features_fn(params, x) @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    optimiser = optax.adam(0.02)

    @jax.jit
    def step(carry, _):
        params, state = carry
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(jax.grad(loss_fn)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimiser.init(params)), None, length=200)
    heads = [
        Head(params["head"][:, part], jnp.zeros(KNOWN))
        for part in (slice(KNOWN), slice(KNOWN, None))
    ]
    return ProbeParams({"0": params["0"], "1": params["1"]}, heads[0]), heads[1]


def method(optimiser=None, **fields):
    config = {key: fields.pop(key) for key in ("beta", "retain_weight") if key in fields}
    one = Problem(
        **{
            "features_fn": features_fn,
            "width": WIDTHS[-1],
            "classes": KNOWN,
            "harmful_classes": KNOWN,
            "optimiser": optimiser or optax.adam(3e-3),
            "harmful_head": taught()[1],
            "label_smoothing": 0.0,
            **fields,
        }
    )
    return immunisers.make_immuniser("npo", immunisers.make_config("npo", **config), one)


def mean_loss(params, rows, head):
    logits = features_fn(params.backbone, rows.x) @ head.kernel + head.bias[None, :]
    return float(optax.softmax_cross_entropy_with_integer_labels(logits, rows.y).mean())


def steps(one, count, update=None):
    state, update = one.init(taught()[0], KEY), update or jax.jit(one.update)
    for _ in range(count):
        state, info = update(state, digits(), KEY)
    return state, info


def test_a_step_descends_the_formula():
    params, harmful_head = taught()
    moved = params._replace(backbone=jax.tree.map(lambda leaf: 1.1 * leaf, params.backbone))
    beta, gamma = 0.5, 0.7
    primary, harmful = digits()

    def objective(params):
        def log_p(params, head):
            logits = features_fn(params.backbone, harmful.x) @ head.kernel + head.bias[None, :]
            return jax.nn.log_softmax(logits)[jnp.arange(ROWS), harmful.y]

        ratio = log_p(params, harmful_head) - log_p(taught()[0], harmful_head)
        forget = jnp.mean(-2 / beta * jax.nn.log_sigmoid(-beta * ratio))
        logits = features_fn(params.backbone, primary.x) @ params.head.kernel
        logits += params.head.bias[None, :]
        kept = jnp.mean(-jax.nn.log_softmax(logits)[jnp.arange(ROWS), primary.y])
        return forget + gamma * kept

    one = method(optax.sgd(1.0), beta=beta, retain_weight=gamma)
    state = one.init(taught()[0], KEY)._replace(params=moved)
    found, info = jax.jit(one.update)(state, digits(), KEY)
    value, slope = jax.jit(jax.value_and_grad(objective))(moved)
    expected = jax.tree.map(jnp.subtract, moved, slope)
    chex.assert_trees_all_close(found.params, expected, rtol=1e-10, atol=1e-12)
    assert float(info.loss) == pytest.approx(float(value), rel=1e-12)
    assert float(info.retain) == pytest.approx(gamma * float(info.task_loss), rel=1e-12)
    assert float(info.harmful_loss) == pytest.approx(mean_loss(moved, harmful, harmful_head))


def accuracy(params, rows, head):
    logits = features_fn(params.backbone, rows.x) @ head.kernel + head.bias[None, :]
    return float(jnp.mean(jnp.argmax(logits, axis=1).astype(rows.y.dtype) == rows.y))


def test_the_harmful_digits_are_forgotten_and_the_others_kept():
    (params, head), (primary, harmful) = taught(), digits()
    assert mean_loss(params, harmful, head) < 0.1
    state, _ = steps(method(), 60)
    assert mean_loss(state.params, harmful, head) > 10
    assert accuracy(state.params, harmful, head) < 1 / KNOWN + 0.1
    assert accuracy(state.params, primary, state.params.head) > 0.97
    chex.assert_trees_all_equal(state.memory, params)  # the reference is where it started
    alone, _ = steps(method(retain_weight=0.0), 60)
    assert accuracy(alone.params, primary, alone.params.head) < 0.8


@pytest.mark.slow
def test_micro_batches_and_eight_devices_give_the_same_steps():
    whole, _ = steps(method(), 3)
    parts, _ = steps(method(accumulate=4), 3)
    chex.assert_trees_all_close(whole.params, parts.params, rtol=0, atol=1e-9)
    parallel = make_parallel("shard_map", jax.devices()[:8])
    one = method(accumulate=2)
    update, rows = step_fn(one, parallel), parallel.put_rows(digits())
    state = parallel.put(one.init(taught()[0], KEY))
    for _ in range(3):
        state, _ = jax.block_until_ready(update(state, rows, parallel.put(KEY)))
    spread = parallel.one_copy(state)
    chex.assert_trees_all_close(whole.params, spread.params, rtol=0, atol=1e-9)
    chex.assert_trees_all_equal(spread.memory, taught()[0])


@pytest.mark.parametrize("accumulate", [1, 4])
def test_float32_stays_float32(accumulate):
    def half(tree):
        return jax.tree.map(
            lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf, tree
        )

    one = method(harmful_head=half(taught()[1]), accumulate=accumulate)
    start = one.init(half(taught()[0]), KEY)
    state, info = jax.eval_shape(one.update, start, half(digits()), KEY)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
    assert {leaf.dtype for leaf in info} == {jnp.dtype("float32")}


def test_one_head_cannot_do_other_classes():
    one = method(harmful_head=None, harmful_classes=KNOWN + 1)
    with pytest.raises(ValueError, match="give the problem a harmful_head"):
        jax.eval_shape(one.update, one.init(taught()[0], KEY), digits(), KEY)


@pytest.mark.slow
def test_a_resumed_run_is_the_run(tmp_path):
    one = method()

    def batch(step):
        return data.paired_batch(digits(), 0, step, batch_size=32)

    def run(steps, **options):
        return training.fit(one, taught()[0], batch, seed=0, steps=steps, log_every=4, **options)

    through = run(8)
    with TrainCheckpoints(tmp_path) as checkpoints:
        run(4, checkpoints=checkpoints)
        resumed = run(8, checkpoints=checkpoints, resume=True)
    assert resumed.resumed_from == 4
    chex.assert_trees_all_equal(resumed.state, through.state)
    assert resumed.trajectory == through.trajectory


@pytest.mark.parametrize(
    ("fields", "words"), [({"beta": 0.0}, "beta"), ({"retain_weight": -1.0}, "retain_weight")]
)
def test_bad_settings_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        method(**fields)


@pytest.mark.slow
def test_from_the_command_line(tmp_path, capsys):
    """Digits as folders of images, a perceptron of random weights, its harmful head fitted."""
    read = mnist.read_5k()
    for task, name in enumerate(("primary", "harmful")):
        for label in range(2):
            folder = tmp_path / name / str(label)
            folder.mkdir(parents=True)
            for index in np.flatnonzero(read.labels == KNOWN * task + label)[:60]:
                pixels = np.asarray(read.images[index], np.uint8).reshape(28, 28)
                Image.fromarray(pixels).convert("RGB").save(folder / f"{index}.png")
    case = tmp_path / "digits.py"
    case.write_text(f"""
from jaximm.run import Experiment
CONFIG = Experiment(
    name="digits", data="image_folder", model="mlp", weights="random", train="layers.1",
    data_fields={{"primary_path": {str(tmp_path / "primary")!r}, "size": 8, "resize": 8,
                 "harmful_path": {str(tmp_path / "harmful")!r}, "held_out_fraction": 0.25}},
    model_fields={{"input_shape": (8, 8, 3), "widths": (16, 8)}}, groups=2, group_rows=10,
)
""")
    runs = tmp_path / "runs"
    words = ("--method", "npo", "--steps", "40", "--batch-size", "32", "--set", "npo.beta=0.2")
    words += ("--set", "optimiser.learning_rate=0.01", "--out", str(runs))
    assert cli.main(["immunise", str(case), *words]) == 0
    found = json.loads((runs / "npo-s0" / "result.json").read_text())
    assert found["config"]["method_config"]["beta"] == 0.2
    first, last = found["trajectory"][0], found["trajectory"][-1]
    assert last["harmful_loss"] > first["harmful_loss"] + 0.5
    assert found["utility"]["after"]["train"] >= found["utility"]["before"]["train"] - 0.05
    assert found["backbone"]["hash_before"] != found["backbone"]["hash_after"]
