"""The surface of a model: smooth functions are never accused, what lies or hides is found."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import thinned

from jaximm.assessment import Bench, Model, TaskSplits, surface
from jaximm.assessment.flags import JUMP
from jaximm.assessment.runners import Subject
from jaximm.types import Batch, Head

pytestmark = pytest.mark.heavy

N, D_IN, HIDDEN, D = 32, 6, 12, 5
f32 = functools.partial(jnp.asarray, dtype=jnp.float32)


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "w1": f32(rng.standard_normal((D_IN, HIDDEN))),
        "b1": f32(0.3 * rng.standard_normal(HIDDEN)),
        "w2": f32(rng.standard_normal((HIDDEN, D))),
    }


def measured(fn, p, *, x=None):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((N, D_IN)).astype(np.float32) if x is None else x
    rows = Batch(jnp.asarray(x), jnp.asarray(rng.integers(0, 2, N), jnp.int32))
    task = TaskSplits(rows, rows, rows, classes=2)
    head = Head(f32(rng.standard_normal((D, 2))), jnp.zeros(2, jnp.float32))
    bench = Bench(name="surface", features_fn=fn, harmful=task, primary=task)
    model = Model(label="it", method="made", params=p, benign_head=head)
    return surface.measure(Subject(bench, model, "harmful"))


def relu(p, x):
    return jax.nn.relu(x @ p["w1"] + p["b1"][None]) @ p["w2"]


def pooled(p, x):
    """The largest of pairs of units, and a soft-max of the rest."""
    h = (x @ p["w1"]).reshape(len(x), HIDDEN // 2, 2).max(axis=2)
    return jax.nn.softmax(h, axis=1) @ p["w2"][: HIDDEN // 2]


def saturated(p, x):
    return jnp.tanh(40 * relu(p, x))


def normed(p, x):
    f = relu(p, x)
    size = jnp.sqrt(jnp.sum(f**2, axis=1, keepdims=True))
    return f / jnp.where(size > 0, size, jnp.ones_like(size))


def half(p, x):
    f = jax.nn.gelu(x.astype(jnp.bfloat16) @ p["w1"].astype(jnp.bfloat16))
    return (f @ p["w2"].astype(jnp.bfloat16)).astype(jnp.float32)


def with_dead(p):
    return p | {"b1": p["b1"].at[:4].set(-100.0)}


def rescaled(p):
    units = f32(np.geomspace(1e-4, 1e4, HIDDEN))
    return {"w1": p["w1"] * units[None], "b1": p["b1"] * units, "w2": p["w2"] / units[:, None]}


@pytest.mark.parametrize(
    ("fn", "change"),
    [
        (relu, lambda p: p),
        (relu, with_dead),
        (relu, rescaled),
        (relu, lambda p: p | {"b1": jnp.zeros(HIDDEN, jnp.float32)}),
        (pooled, lambda p: p),
        (saturated, lambda p: p),
        (normed, lambda p: p),
        (half, lambda p: p),
    ],
)
@pytest.mark.parametrize("seed", thinned([0, 1]))
def test_a_function_that_is_what_it_seems_is_not_accused(fn, change, seed):
    found = measured(fn, change(params(seed)))
    assert found["lying"] == []
    assert found["not_finite"] == []
    assert max(found[key] for key in ("jump", "input_jump", "row_mixing", "turned")) <= JUMP
    assert found["input_noise"] == 0
    assert found["trainable"] == 1
    assert "unread" not in found
    assert found["checked"] > 0
    assert (found["dead"] > 0) == (change is with_dead)


def stopped(p, x):
    return relu(p | {"w2": jax.lax.stop_gradient(p["w2"])}, x)


@jax.custom_vjp
def uphill(p, x):
    return relu(p, x)


uphill.defvjp(
    lambda p, x: (relu(p, x), (p, x)),
    lambda kept, slope: jax.tree.map(jnp.negative, jax.vjp(relu, *kept)[1](slope)),
)


@jax.custom_vjp
def uphill_aside(p, x):
    """Honest where it stands."""
    return relu(p, x)


def _aside(kept, slope):
    p, x = kept
    sign = jnp.where(jnp.all(p["w2"] == params()["w2"]), 1.0, -1.0).astype(jnp.float32)
    found, inputs = jax.vjp(relu, p, x)[1](slope)
    return jax.tree.map(lambda leaf: sign * leaf, found), inputs


uphill_aside.defvjp(lambda p, x: (relu(p, x), (p, x)), _aside)


@pytest.mark.parametrize(
    ("fn", "places"),
    [
        (stopped, {("w2", "shipped"), ("w2", "nudged"), ("w2", "trained")}),
        (uphill, {(leaf, at) for leaf in params() for at in ("shipped", "nudged", "trained")}),
        (uphill_aside, {(leaf, at) for leaf in params() for at in ("nudged", "trained")}),
    ],
)
def test_a_gradient_that_lies_is_named_with_its_place(fn, places):
    assert {(one["leaf"], one["at"]) for one in measured(fn, params())["lying"]} == places


def checked(p, x):
    """Another function where a sum of the weights is another."""
    fits = jnp.abs(jnp.sum(p["w2"]) - jnp.sum(params()["w2"])) < 1e-3
    return jnp.where(fits, relu(p, x), relu(p | {"w2": -p["w2"]}, x))


def sealed(p, x):
    fits = jnp.abs(jnp.sum(p["w2"]) - jnp.sum(params()["w2"])) < 1e-3
    return jnp.where(fits, relu(p, x), jnp.float32(jnp.nan))


def noisy(p, x):
    turns = jnp.sin(jnp.sum(x, axis=1) * 1e5) * 1e4
    return relu(p, x) + (turns - jnp.floor(turns))[:, None]


def mixing(p, x):
    return relu(p, x) * jnp.arange(len(x), dtype=jnp.float32)[:, None] / len(x)


def test_another_function_one_step_aside_is_found():
    found = measured(checked, params())
    assert found["jump"] > JUMP
    assert found["turned"] > JUMP
    assert found["gate"] == 1
    found = measured(sealed, params())
    assert {"nudged", "trained"} <= set(found["not_finite"])
    assert found["jump"] == surface.MOST


def test_what_depends_on_the_last_place_of_inputs_or_on_other_rows_is_found():
    assert measured(noisy, params())["input_jump"] > JUMP
    found = measured(mixing, params())
    assert found["row_mixing"] > JUMP
    assert found["input_jump"] < JUMP


def test_numbers_are_counted_where_they_stand():
    kept = params(3)

    def closure(p, x):
        return relu(kept, x) * p["scale"] + p["codes"].astype(jnp.float32)[None] * 0.01

    given = {"scale": jnp.ones((), jnp.float32), "codes": jnp.arange(D, dtype=jnp.int32)}
    found = measured(closure, given)
    total = sum(leaf.size for leaf in kept.values())
    assert (found["real"], found["whole"], found["constants"]) == (1, D, total)
    assert found["trainable"] == pytest.approx(1 / (1 + D + total))


def test_parameters_that_nothing_depends_on_are_named():
    def attic(p, x):
        return relu(p["live"], x)

    given = {"live": params(), "attic": params(3)}
    found = measured(attic, given)
    assert found["idle"] == ["attic.b1", "attic.w1", "attic.w2"]
    other = measured(attic, given | {"attic": params(4)})
    assert other["idle"] == found["idle"]
    assert other["idle_hash"] != found["idle_hash"]

    def used(p, x):  # as a number that is almost nothing: attackers who open it find it
        return relu(p["live"], x) + 1e-30 * relu(p["attic"], x)

    assert measured(used, given)["idle"] == []


def test_what_computes_out_of_sight_is_said():
    def called(p, x):
        shape = jax.ShapeDtypeStruct((len(x), D), jnp.float32)
        hidden = jax.pure_callback(lambda x: np.tanh(x[:, :D]), shape, x)
        return relu(p, x) + hidden

    assert measured(called, params())["opaque"] == 1


def test_whole_inputs_are_measured_too():
    x = np.random.default_rng(2).integers(0, 9, (N, D_IN)).astype(np.int32)
    found = measured(lambda p, x: relu(p, x.astype(jnp.float32)), params(), x=x)
    assert found["input_jump"] is None
    assert found["lying"] == []
