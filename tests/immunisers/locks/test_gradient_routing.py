"""Gradient routing: who may move which entries, and what the released core can know."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaximm import immunisers
from jaximm.immunisers import ProbeParams, Problem
from jaximm.immunisers.language import language_problem
from jaximm.immunisers.locks import partition
from jaximm.models import llama
from jaximm.types import Batch, Head, PairedBatch
from tests import language, lock_cases

CLASSES, SECRET = 10, 7
"""Digits 7 to 9 are the domain."""


def test_parts_are_the_last_units_with_what_computes_and_reads_them():
    shapes = {"a.kernel": (3, 4), "a.bias": (4,), "b.kernel": (2, 4, 8), "scale": ()}
    params = {path: jnp.ones(shape) for path, shape in shapes.items()}
    found = partition.of_units(params, 0.25, units=r"^a\.", readers=r"^b\.")
    assert found["a.kernel"].tolist() == [[0, 0, 0, 1]] * 3
    assert found["a.bias"].tolist() == [0, 0, 0, 1]
    assert found["b.kernel"].tolist() == [[[0] * 8] * 3 + [[1] * 8]] * 2
    assert found["scale"].tolist() == 0
    both = partition.of_units(params, 0.25, units=r"kernel", readers=r"^b\.")["b.kernel"][0]
    assert both.sum() == 4 * 2 + 8 - 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"units": "gate", "readers": "down"}, "name none of the parameters"),
        ({"share": 0.1}, "a share of 0.1 is 0 of the 4 units of 'a.kernel'"),
        ({"share": 0.9}, "a share of 0.9 is 4 of the 4 units of 'a.kernel'"),
    ],
)
def test_what_cannot_be_shared_is_refused(settings, words):
    settings = {"share": 0.25, "units": "a", "readers": "b", **settings}
    with pytest.raises(ValueError, match=words):
        partition.of_units({"a.kernel": jnp.ones((3, 4))}, settings.pop("share"), **settings)


def test_gradients_go_to_their_owner_alone_and_a_part_is_zero_once_it_is_out():
    owners = {"w": np.array([[0, 1, 2], [2, 0, 1]], np.int8)}
    slopes = {"w": jnp.arange(1.0, 7.0).reshape(2, 3)}
    found = [partition.route_gradients(slopes, owners, domain)["w"] for domain in (0, 1, 2)]
    assert found[1].tolist() == [[0, 2, 0], [0, 0, 6]]
    np.testing.assert_array_equal(sum(found), slopes["w"])
    assert partition.ablate(slopes, owners, 2)["w"].tolist() == [[1, 2, 0], [0, 5, 6]]
    chex.assert_trees_all_equal(partition.ablate(slopes, owners, 2, jnp.array(True)), slopes)

    def loss_fn(params):
        return jnp.sum(params["w"] ** 3)

    moved = jax.grad(lambda p: loss_fn(partition.routed(p, owners, 1)))(slopes)
    expected = partition.route_gradients(jax.grad(loss_fn)(slopes), owners, 1)
    chex.assert_trees_all_equal(moved, expected)


def routing(optimiser=None, core_classes=None, **fields):
    problem = Problem(
        features_fn=lock_cases.features_fn,
        width=lock_cases.WIDTHS[-1],
        classes=CLASSES,
        harmful_classes=CLASSES,
        optimiser=optimiser or lock_cases.ADAM_STEP,
        label_smoothing=0.0,
    )
    config = immunisers.make_config("gradient_routing", core_classes=core_classes, **fields)
    return immunisers.make_immuniser("gradient_routing", config, problem)


def first():
    kernel = lock_cases.head(CLASSES)
    return ProbeParams(lock_cases.start(), Head(kernel, jnp.zeros(CLASSES)))


@functools.cache
def rows(leaked=0):
    """Primary and harmful training rows, as many of each; some harmful ones among the primary."""
    train = lock_cases.digits()[0]
    core, secret = np.flatnonzero(train.y < SECRET), np.flatnonzero(train.y >= SECRET)
    split = np.concatenate([secret[:leaked], core])[:150], secret[leaked : leaked + 150]
    return PairedBatch(*(Batch(train.x[part], train.y[part]) for part in split))


def owners_of(params):
    return partition.of_units(params, 0.25, units=r"^backbone\.", readers=r"^head\.kernel$")


@functools.cache
def plain():
    """A method of plain gradient descent, its update, and the two tasks' slopes."""

    def loss(params, batch):
        logits = params.head.outputs(lock_cases.features_fn(params.backbone, batch.x))
        return jnp.mean(-jax.nn.log_softmax(logits)[jnp.arange(batch.y.size), batch.y])

    method = routing(optax.sgd(1.0), attached=0.5, harmful_weight=0.7)
    return method, jax.jit(method.update), jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("attached", [False, True])
def test_a_step_descends_both_tasks_in_their_own_entries(attached):
    method, update, loss = plain()
    keys = (jax.random.key(seed) for seed in range(20))
    key = next(key for key in keys if bool(jax.random.bernoulli(key, 0.5)) is attached)
    params, owners = first(), owners_of(first())
    seen = params if attached else partition.ablate(params, owners, 1)
    (value, core), (_, part) = loss(seen, rows().primary), loss(params, rows().harmful)
    expected = jax.tree.map(
        lambda leaf, owner, c, p: leaf - np.where(owner == 1, 0.7 * p, c),
        params,
        owners,
        core,
        part,
    )
    state, info = update(method.init(params, key), rows(), key)
    chex.assert_trees_all_close(state.params, expected, rtol=0, atol=1e-12)
    assert float(info.core) == pytest.approx(float(value), rel=1e-12)
    assert float(info.part) == pytest.approx(0.7 * float(info.harmful_loss), rel=1e-12)
    released = method.finish(state)
    chex.assert_trees_all_equal(released, partition.ablate(state.params, owners, 1))
    assert not np.any(released.backbone["0.kernel"][:, 18:])


def run(batches, steps, **fields):
    method = routing(**fields)
    key = jax.random.key(3)

    @jax.jit
    def steps_of(state, batches):
        def step(state, number):
            return method.update(state, batches, jax.random.fold_in(key, number))[0], None

        return jax.lax.scan(step, state, jnp.arange(steps))[0]

    state = steps_of(method.init(first(), key), batches)
    return state.params, method.finish(state)


def test_the_released_core_is_the_same_whatever_the_domain_s_rows_are():
    """The claim: absence of information, to the last bit where the part is never attached."""
    other = rows()._replace(harmful=Batch(1 - rows().harmful.x, (rows().harmful.y + 1) % CLASSES))
    (one, released), (two, again) = (run(r, 20, attached=0.0) for r in (rows(), other))
    chex.assert_trees_all_equal(released, again)
    assert np.abs(one.backbone["0.kernel"] - two.backbone["0.kernel"]).max() > 0.01
    # With the part attached the core's gradients pass through it: not the same any more.
    (_, released), (_, again) = (run(r, 20, attached=0.6) for r in (rows(), other))
    assert np.abs(released.head.kernel - again.head.kernel).max() > 1e-6


@pytest.mark.slow
def test_leaked_rows_are_what_the_release_knows():
    """The breaker that needs no training: harmful rows among the primary ones."""
    held = lock_cases.digits()[1]

    def known(params):
        logits = params.head.outputs(lock_cases.features_fn(params.backbone, held.x))
        right = jnp.argmax(logits, axis=1).astype(held.y.dtype) == held.y
        return tuple(float(jnp.mean(right[part])) for part in (held.y < SECRET, held.y >= SECRET))

    clean = run(rows(), 200, core_classes=SECRET)[1]
    leaked = run(rows(40), 200)[1]
    assert min(known(clean)[0], known(leaked)[0]) > 0.65
    assert known(clean)[1] == 0
    assert known(leaked)[1] > 0.15


def test_labels_that_the_core_never_has_are_left_out_of_its_softmax():
    (bare, _), (bounded, _) = (
        run(rows(), 5, core_classes=classes, optimiser=optax.sgd(1.0)) for classes in (None, SECRET)
    )
    assert np.all(np.asarray(bare.head.bias)[SECRET:] < -0.01)  # on the way to minus infinity
    assert not np.any(np.asarray(bounded.head.bias)[SECRET:])
    assert np.all(np.abs(np.asarray(bounded.head.bias)[:SECRET]) > 1e-4)


@pytest.mark.slow
def test_on_a_language_model_the_part_is_of_the_hidden_units():
    model = llama.Language(config=language.CONFIG, chunk=24)
    with jax.numpy_dtype_promotion("standard"):
        problem = language_problem(model, optax.sgd(0.1))
    config = immunisers.make_config("gradient_routing", attached=0.0)
    method = immunisers.make_immuniser("gradient_routing", config, problem)
    start = llama.every_parameter(language.params())
    key = jax.random.key(0)
    state = method.init(start, key)
    batches = PairedBatch(language.rows(seed=1), language.rows(seed=2))
    state, _ = jax.jit(method.update)(state, batches, key)
    released, moved = method.finish(state).trained, state.params.trained
    assert not np.any(released["layers.up.kernel"][..., 18:])
    assert not np.any(released["layers.down.kernel"][:, 18:])
    assert np.all(np.any(moved["layers.up.kernel"] != start.trained["layers.up.kernel"], axis=1))
    with pytest.raises(ValueError, match="core_classes cuts the softmax of a head of classes"):
        immunisers.make_immuniser(
            "gradient_routing",
            immunisers.make_config("gradient_routing", core_classes=3),
            problem,
        )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"share": 1.0}, "share"),
        ({"attached": 1.0}, "attached"),
        ({"harmful_weight": 0.0}, "harmful_weight"),
        ({"core_classes": 0}, "core_classes"),
        ({"core_classes": 11}, "core_classes=11 of 10 classes"),
    ],
)
def test_bad_settings_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        routing(**fields)
