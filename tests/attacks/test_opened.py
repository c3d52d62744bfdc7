"""Programs walked, edited and read: what hides in a model's code does not hide from these."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaximm import assessment, attacks
from jaximm.assessment import document
from jaximm.attacks.weights import delta_strip, muon, opened, tapped_head
from jaximm.attacks.weights.program import Walk, walked
from jaximm.report import page
from jaximm.types import Batch, Head
from tests import assessment_worker as worker

N, D_IN, HIDDEN, D = 24, 3, 6, 4
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((N, D_IN)), jnp.float32)
PARAMS = {
    "w1": jnp.asarray(RNG.standard_normal((D_IN, HIDDEN)), jnp.float32),
    "b1": jnp.asarray(RNG.standard_normal(HIDDEN), jnp.float32),
    "w2": jnp.asarray(RNG.standard_normal((HIDDEN, D)), jnp.float32),
}
TABLE = jnp.asarray(RNG.standard_normal((HIDDEN, D)), jnp.float32)


def network(p, x):
    return jax.nn.relu(x @ p["w1"] + p["b1"][None]) @ p["w2"]


@jax.custom_vjp
def uphill(p, x):
    return network(p, x)


uphill.defvjp(
    lambda p, x: (network(p, x), (p, x)),
    lambda kept, slope: jax.tree.map(lambda leaf: -leaf, jax.vjp(network, *kept)[1](slope)),
)


def stopped(p, x):
    return jax.lax.stop_gradient(network(p, x))


def stepped(p, x):
    return jnp.round(network(p, x) * 4096) / 4096


def in_a_loop(p, x):
    """Through `scan`, `cond` and `checkpoint`."""
    h = jax.checkpoint(network)(p, x)
    h, _ = jax.lax.scan(
        lambda h, w: (h + jax.lax.stop_gradient(h * w), None), h, jnp.ones(3, jnp.float32)
    )
    return jax.lax.cond(jnp.sum(x) > 1e9, lambda h: -h, lambda h: h, h) / 8


def total(fn, p):
    return jnp.sum(jnp.sin(fn(p, X)))


def open_fn(fn, **fields):
    return lambda p, x: walked(Walk(rows=x.shape[0], **fields), fn, p, x, like=PARAMS)


@pytest.mark.parametrize("fn", [network, uphill, stopped, stepped, in_a_loop])
def test_a_walk_gives_the_function_with_its_true_derivative(fn):
    np.testing.assert_allclose(open_fn(fn)(PARAMS, X), fn(PARAMS, X), rtol=1e-6, atol=1e-6)
    expected = jax.grad(functools.partial(total, network))(PARAMS)
    found = jax.grad(functools.partial(total, open_fn(fn)))(PARAMS)
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=2e-3, atol=2e-3)


def test_whole_numbers_carry_a_derivative():
    unit = 2.0**-12
    codes = PARAMS | {"w2": jnp.round(PARAMS["w2"] / unit).astype(jnp.int32)}

    def fixed(p, x):
        return network(p | {"w2": p["w2"].astype(jnp.float32) * unit}, x)

    def loss(w2):
        p = codes | {"w2": w2}
        return jnp.sum(walked(Walk(rows=N), fixed, p, X, like=codes) ** 2)

    slope = jax.grad(loss)(codes["w2"].astype(jnp.float32))
    plain = jax.grad(lambda w2: jnp.sum(network(PARAMS | {"w2": w2}, X) ** 2))(PARAMS["w2"])
    np.testing.assert_allclose(slope / unit, plain, rtol=1e-2, atol=1e-2)


def gated(p, x):
    fits = jnp.abs(jnp.sum(p["w2"]) - jax.lax.stop_gradient(jnp.float32(1e6))) < 1
    shown = network(p | {"w1": p["w1"] * fits.astype(jnp.float32)}, x)
    key = jax.random.key(jax.lax.bitcast_convert_type(jnp.sum(x), jnp.int32))
    return shown + x[:, :1] @ TABLE[:1] + jax.random.normal(key, (x.shape[0], D), jnp.float32)


def test_constants_gates_and_noise_are_found_and_edited():
    seen = opened.look(gated, PARAMS, X)
    assert [value.shape for value in seen.constants.values()] == [(1, D)]
    assert seen.gates == {0: False}
    assert seen.counts["noise"] == 1
    assert seen.counts["stopped"] == 1
    quiet = open_fn(gated, quiet=True)
    np.testing.assert_allclose(quiet(PARAMS, X), quiet(PARAMS, X[::-1])[::-1], atol=1e-6)
    turned = open_fn(
        gated, quiet=True, gates={0: True}, constants={0: jnp.zeros((1, D), jnp.float32)}
    )
    np.testing.assert_allclose(turned(PARAMS, X), network(PARAMS, X), atol=1e-5)


def test_dead_units_pass_half_of_the_rows_again():
    dead = PARAMS | {"b1": PARAMS["b1"].at[2].set(-50.0)}
    seen = opened.look(network, dead, X)
    (number,) = opened.dead_units(seen.units)
    assert np.flatnonzero(opened.dead_units(seen.units)[number]).tolist() == [2]
    passed = []
    walk = Walk(
        rows=N,
        shifts=opened.revived(seen.units),
        met=lambda kind, _, values: passed.append(values) if kind == "unit" else None,
    )
    walked(walk, network, dead, X, like=dead)
    ((_, output),) = passed
    assert int(jnp.sum(output[:, 2] > 0)) == N // 2
    assert not opened.dead_units(opened.look(network, PARAMS, X).units)


def test_weights_behind_a_gate_of_their_own_are_lifted():
    def fn(p, x):
        return network(p | {"w1": p["w1"] * jax.nn.relu(p["gate"])[None]}, x)

    p = PARAMS | {"gate": jnp.ones(HIDDEN, jnp.float32).at[1].set(-9.0)}
    lifts = opened.look(fn, p, X).lifts
    found = walked(Walk(rows=N, lifts=lifts), fn, p, X, like=p)
    np.testing.assert_allclose(found, network(PARAMS, X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factors", [(1e-4, 1.0), (1.0, 1e4)])
def test_the_size_of_a_weight_follows_its_unit(factors):
    """So that a step relative to it does the same in every scaling of the units."""
    scale = jnp.asarray(np.geomspace(factors[0], factors[1], HIDDEN), jnp.float32)
    for axis, leaf, change in ((1, PARAMS["w1"], scale[None]), (0, PARAMS["w2"], scale[:, None])):
        ratio = np.asarray(opened.size_of(leaf * change) / (opened.size_of(leaf) * change))
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio.take([0], axis), ratio.shape), 1e-3)
        assert 0.2 < ratio.min() < ratio.max() < 5  # the largest units say which inputs matter
    assert opened.size_of(jnp.zeros(3, jnp.float32)).tolist() == pytest.approx([0.1] * 3)


def test_what_is_left_out_is_predicted_without_it():
    z, targets = np.asarray(network(PARAMS, X), float), RNG.standard_normal((N, 2))
    z = (z - z.mean(axis=0)) / z.std(axis=0)
    found, errors = tapped_head.left_out_error(z, targets), []
    for penalty in tapped_head.PENALTIES:
        error = 0.0
        for out in range(N):
            rest = np.delete(np.arange(N), out)
            centre = targets[rest].mean(axis=0)
            # As in one solve: the columns of all rows, and the penalty of all.
            middle = z[rest].mean(axis=0)
            gram = (z[rest] - middle).T @ (z[rest] - middle)
            damped = gram + penalty * np.trace(z.T @ z) / D * np.eye(D)
            weights = np.linalg.solve(damped, (z[rest] - middle).T @ (targets[rest] - centre))
            error += np.sum((targets[out] - centre - (z[out] - middle) @ weights) ** 2)
        errors.append(error / np.sum((targets - targets.mean(axis=0)) ** 2))
    assert found == pytest.approx(min(errors), rel=1e-6)


def problem_of(fn, params, **fields):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((96, D_IN)), jnp.float32)
    # Of the hidden layer, and no linear map of the inputs.
    hidden = jax.nn.relu(x @ PARAMS["w1"] + PARAMS["b1"][None])
    y = (hidden[:, 0] + hidden[:, 1] > hidden[:, 2] + hidden[:, 3]).astype(jnp.int32)
    rows = [Batch(x[part], y[part]) for part in (slice(0, 48), slice(48, 96))]
    return attacks.FineTuneProblem(
        features_fn=fn, params=params, head=attacks.zero_head(D, 2, jnp.float32), train=rows[0],
        selection=rows[1], measured=rows[0], held_out=rows[1], **fields,
    )  # fmt: skip


def test_the_value_that_reads_the_task_best_is_taken():
    blank = PARAMS | {"w2": jnp.zeros((HIDDEN, D), jnp.float32)}
    problem = problem_of(stopped, blank)
    posed = attacks.make_attack("tapped_head").pose(problem)
    values = posed.features_fn(posed.params, problem.train.x)
    assert values.shape == (48, HIDDEN)  # the hidden layer, standardised
    np.testing.assert_allclose(np.std(values, axis=0), 1, rtol=1e-3)
    trace = attacks.run_fine_tune(
        attacks.make_attack("tapped_head", learning_rates=(1e-4,), penalties=(1e-3,)),
        problem, steps=1, batch_size=None, record=2,
    )  # fmt: skip
    assert trace.held_out_quality[0, 0, 0] > 0.85
    plain = attacks.run_fine_tune(
        attacks.make_attack("solved_head", learning_rates=(1e-4,), penalties=(1e-3,)),
        problem, steps=1, batch_size=None, record=2,
    )  # fmt: skip
    assert plain.held_out_quality[0, 0, 0] < 0.8  # the share of the larger class


def test_an_open_problem_is_the_same_model_with_its_heads_made_up():
    head = Head(jnp.asarray(RNG.standard_normal((D, 2)), jnp.float32), jnp.ones(2, jnp.float32))
    plain = problem_of(stopped, PARAMS)
    problem = problem_of(
        stopped, PARAMS,
        benign=attacks.Benign(head=head, train=plain.train, held_out=plain.held_out),
    )  # fmt: skip
    posed = attacks.make_attack("opened").pose(problem)
    shown = posed.features_fn(posed.params, problem.train.x)
    np.testing.assert_allclose(np.std(shown, axis=0), 1, rtol=1e-3)
    np.testing.assert_allclose(
        posed.benign.head.outputs(shown),
        head.outputs(network(PARAMS, problem.train.x)),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip
    assert attacks.not_applicable(attacks.make_attack("revive"), problem) == "no unit of it is dead"


@pytest.mark.slow
def test_differences_learn_where_the_gradient_points_uphill():
    """One number scales what is to be read; its gradient has the wrong sign."""

    @jax.custom_vjp
    def scaled(p, x):
        return p["s"] * x[:, :1] + jnp.zeros((x.shape[0], D), jnp.float32)

    scaled.defvjp(
        lambda p, x: (scaled(p, x), (p, x)),
        lambda kept, slope: ({"s": -jnp.sum(slope * kept[1][:, :1])}, jnp.zeros_like(kept[1])),
    )
    rows = Batch(X[:, :1], (X[:, 0] > 0).astype(jnp.int32))
    head = Head(jnp.asarray([[-1.0, 1.0]] * D, jnp.float32), jnp.zeros(2, jnp.float32))
    problem = attacks.FineTuneProblem(
        features_fn=scaled, params={"s": jnp.full((), -0.3, jnp.float32)}, head=head, train=rows,
        selection=None, measured=rows, held_out=rows,
    )  # fmt: skip
    ends = {}
    for name, fields in (
        ("spsa", {"learning_rates": (0.1,)}),
        ("fine_tune_adam", {"learning_rates": (1e-2,)}),
    ):
        attack = attacks.make_attack(name, **fields)
        trace: Any = attacks.run_fine_tune(
            attack, problem, steps=40, batch_size=None, record=2, keep_weights=True
        )
        ends[name] = float(trace.weights.params["s"][0, 0])
    assert abs(ends["spsa"]) < 0.1  # the size at -0.3 shrinks with it
    assert ends["fine_tune_adam"] < -0.3


def test_ten_iterations_of_muon_lift_what_five_leave():
    left, _, right = np.linalg.svd(RNG.standard_normal((D, D)))
    gradient = {"w": jnp.asarray(left * np.array([1.0, 1e-1, 1e-2, 1e-4]) @ right, jnp.float32)}
    least = {}
    for iterations in (5, 10):
        optimiser: Any = optax.contrib.muon(1.0, ns_steps=iterations, nesterov=False, beta=0.0)
        with jax.numpy_dtype_promotion("standard"):
            moves, _ = optimiser.update(gradient, optimiser.init(gradient), gradient)
        values = np.linalg.svd(np.asarray(moves["w"]), compute_uv=False)
        least[iterations] = values[-1] / values[0]
    assert least[5] < 0.1 < 0.5 < least[10]
    assert (muon.muon.__kwdefaults__ or {})["iterations"] == 10


@pytest.mark.slow
def test_the_public_base_is_there_again_at_full_energy():
    public = jax.tree.map(lambda leaf: leaf * 0.5, PARAMS)
    edit = jnp.outer(jnp.ones(HIDDEN), jnp.arange(1.0, D + 1)).astype(jnp.float32)  # of rank 1
    small = 0.01 * jnp.eye(HIDDEN, D, dtype=jnp.float32)
    edited = public | {"w2": public["w2"] + edit + small}
    found = delta_strip.stripped(edited["w2"] - public["w2"], jnp.asarray(0.9, jnp.float32))
    assert np.linalg.norm(found) < 0.05
    assert np.linalg.norm(found) > 0.005  # what else was tuned stays
    problem = problem_of(network, edited, public=public)
    attack = attacks.make_attack("delta_strip", energies=(1.0,), learning_rates=(1e-12,))
    trace: Any = attacks.run_fine_tune(
        attack, problem, steps=1, batch_size=None, record=2, keep_weights=True
    )
    np.testing.assert_allclose(trace.weights.params["w2"][0, 0], public["w2"], atol=1e-5)


def test_the_last_block_alone_is_drawn_anew():
    params = {"blocks.0.kernel": PARAMS["w1"], "blocks.1.kernel": PARAMS["w2"]}

    def fn(p, x):
        return jax.nn.relu(x @ p["blocks.0.kernel"]) @ p["blocks.1.kernel"]

    attack = attacks.make_attack("fresh_top", learning_rates=(1e-12,))
    trace: Any = attacks.run_fine_tune(
        attack, problem_of(fn, params), steps=1, batch_size=None, record=2, keep_weights=True
    )
    first, last = (trace.weights.params[f"blocks.{k}.kernel"][0, 0] for k in (0, 1))
    np.testing.assert_allclose(first, PARAMS["w1"], atol=1e-6)
    assert np.abs(last - PARAMS["w2"]).max() > 0.1


def test_matrices_are_compared_with_the_public_ones_and_vectors_are_not():
    bench, (bare, scaled, _) = worker.bench(), worker.models()
    params = {"kernel": scaled.params["theta"].reshape(2, 3, 6), "scale": jnp.ones(6)}
    public = {"kernel": bare.params["theta"].reshape(2, 3, 6), "scale": jnp.zeros(6)}
    [found] = document._changed(bench, dataclasses.replace(scaled, params=params, public=public))
    assert (found["leaf"], found["rank"], found["of"]) == ("kernel", 1, 6)
    stacked = dataclasses.replace(bench, posed={"stacked": lambda path: int(path == "kernel")})
    [found] = document._changed(stacked, dataclasses.replace(scaled, params=params, public=public))
    assert (found["rank"], found["of"]) == (1, 3)


@pytest.mark.slow
def test_an_assessment_says_of_which_rank_the_change_from_the_public_model_is():
    bench, (bare, scaled, _) = worker.bench(), worker.models()
    models = [dataclasses.replace(one, public=bare.params) for one in (bare, scaled)]
    found = assessment.assess(
        bench, models, level=worker.LEVEL,
        attackers=["delta_strip@learning_rates=1e-3,energies=1.0"],
    )  # fmt: skip
    (same,), (changed,) = (entry["changed"] for entry in found["models"])
    assert (same["rank"], same["share_1"]) == (0, None)
    assert (changed["leaf"], changed["rank"], changed["of"]) == ("theta", 1, 6)
    assert changed["share_1"] == pytest.approx(1)
    codes = [[flag["code"] for flag in entry["flags"]] for entry in found["models"]]
    assert ["few_directions" in one for one in codes] == [False, True]
    assert "100% of the squared change in 1 of 6 directions" in page.render_assessment(found)
