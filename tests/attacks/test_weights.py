"""The protocol of attackers of weights: what they hold, what is measured of them."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import language
import numpy as np
import pytest
from helpers import thinned

from jaximm import attacks
from jaximm.attacks.weights import measure
from jaximm.attacks.weights import problem as weights
from jaximm.models.llama import Language
from jaximm.types import Batch, Head

pytestmark = pytest.mark.heavy

D_IN, D = 5, 4
ATTACK = attacks.make_attack("fine_tune_adam", learning_rates=(3e-2, 1e-1))
RUN = {"steps": 30, "batch_size": 16, "record": 4, "seeds": (0, 3), "keep_weights": True}


def features_fn(params, x):
    return jnp.tanh(x @ params["kernel"])


def _rows(n, seed, kind="real"):
    x = np.random.default_rng(seed).normal(size=(n, D_IN))
    y = np.sin(x[:, 0]) + 0.5 * x[:, 1]
    if kind == "labels":
        return Batch(jnp.asarray(x), jnp.asarray(x[:, 2] > 0, jnp.int32))
    return Batch(jnp.asarray(x), jnp.asarray(y))


def _head(k, seed=0):
    return Head(0.3 * jax.random.normal(jax.random.key(seed), (D, k)), jnp.full((k,), 0.1))


PARAMS = {"kernel": jax.random.normal(jax.random.key(1), (D_IN, D))}
BENIGN = attacks.Benign(
    head=_head(2, 5), train=_rows(33, 7, "labels"), held_out=_rows(29, 8, "labels")
)
PROBLEM = attacks.FineTuneProblem(
    features_fn=features_fn,
    params=PARAMS,
    head=_head(1),
    train=_rows(50, 1),
    selection=_rows(20, 2),
    measured=_rows(40, 1),
    held_out=_rows(31, 3),
    benign=BENIGN,
)


@pytest.fixture(scope="module")
def trace():
    return attacks.run_fine_tune(ATTACK, PROBLEM, **RUN)


@pytest.mark.slow
def test_real_targets_are_learnt_and_scored_by_r2(trace):
    assert PROBLEM.is_regression
    quality = np.asarray(trace.held_out_quality)
    assert quality[..., -1].max() > quality[..., 0].max() + 0.3
    for c in range(2):
        for s in range(2):
            held = PROBLEM.held_out
            params = jax.tree.map(lambda leaf, at=(c, s): leaf[at], trace.weights.params)
            head = jax.tree.map(lambda leaf, at=(c, s): leaf[at], trace.weights.head)
            output = np.asarray(features_fn(params, held.x) @ head.kernel + head.bias[None, :])[
                :, 0
            ]
            y = np.asarray(held.y)
            r2 = 1 - np.mean((y - output) ** 2) / np.var(y)
            np.testing.assert_allclose(quality[c, s, -1], r2, rtol=1e-10)
            np.testing.assert_allclose(np.mean(trace.scores[c, s, -1]), r2, rtol=1e-10)
            np.testing.assert_allclose(
                trace.held_out_loss[c, s, -1], np.mean((y - output) ** 2) / 2, rtol=1e-10
            )
            selection = features_fn(params, PROBLEM.selection.x) @ head.kernel + head.bias[None, :]
            y = np.asarray(PROBLEM.selection.y)
            r2 = 1 - np.mean((y - np.asarray(selection)[:, 0]) ** 2) / np.var(y)
            np.testing.assert_allclose(trace.selection_quality[c, s, -1], r2, rtol=1e-10)


def test_the_utility_is_that_of_the_benign_head_on_the_moved_features(trace):
    before = features_fn(PARAMS, BENIGN.held_out.x) @ BENIGN.head.kernel + BENIGN.head.bias[None, :]
    accuracy = np.mean(np.argmax(np.asarray(before), axis=1) == np.asarray(BENIGN.held_out.y))
    np.testing.assert_allclose(trace.utility[..., 0], accuracy)
    params = jax.tree.map(lambda leaf: leaf[1, 0], trace.weights.params)
    after = features_fn(params, BENIGN.held_out.x) @ BENIGN.head.kernel + BENIGN.head.bias[None, :]
    accuracy = np.mean(np.argmax(np.asarray(after), axis=1) == np.asarray(BENIGN.held_out.y))
    np.testing.assert_allclose(trace.utility[1, 0, -1], accuracy)
    assert (np.asarray(trace.weights.benign_head.kernel) == np.asarray(BENIGN.head.kernel)).all()
    alone = attacks.run_fine_tune(ATTACK, dataclasses.replace(PROBLEM, benign=None), **RUN)
    assert np.isnan(alone.utility).all()
    np.testing.assert_allclose(alone.train_loss, trace.train_loss, rtol=1e-12)


def test_the_gradient_is_that_of_the_weights_and_of_the_backbone(trace):
    sample = jax.tree.map(lambda leaf: leaf[:16], PROBLEM.measured)

    def loss(params, head):
        output = (features_fn(params, sample.x) @ head.kernel + head.bias[None, :])[:, 0]
        return jnp.mean((output - sample.y) ** 2) / 2

    for place, number in ((0, 0), (1, -1)):
        params, head = PROBLEM.params, PROBLEM.head
        if place:
            params, head = (
                jax.tree.map(lambda leaf: leaf[1, 1], part)
                for part in (trace.weights.params, trace.weights.head)
            )
        slopes = jax.grad(loss, argnums=(0, 1))(params, head)
        norm = math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(slopes)))
        np.testing.assert_allclose(trace.gradient[1, 1, number], norm, rtol=1e-10)
        if place:
            norm = float(jnp.linalg.norm(slopes[0]["kernel"]))
            np.testing.assert_allclose(trace.backbone_gradient[1, 1], norm, rtol=1e-10)


@pytest.mark.parametrize("chunk", thinned([3, 1]))
def test_where_the_loop_runs_changes_no_number(trace, chunk):
    other = attacks.run_fine_tune(ATTACK, PROBLEM, loop="device", chunk=chunk, **RUN)
    for field in ("train_loss", "held_out_quality", "selection_quality", "utility"):
        np.testing.assert_allclose(getattr(other, field), getattr(trace, field), rtol=1e-8)


def test_rows_that_are_cut_when_they_are_measured_give_the_same(trace, monkeypatch):
    monkeypatch.setattr(measure, "HELD", 0)
    problem = dataclasses.replace(PROBLEM)  # which has cut nothing yet
    other = attacks.run_fine_tune(ATTACK, problem, **RUN)
    sets = measure._sets_of(problem, RUN["batch_size"])
    assert all(isinstance(rows.blocks, measure._Cut) for rows in sets.values())
    for field in ("train_loss", "held_out_quality", "scores", "utility"):
        np.testing.assert_array_equal(getattr(other, field), getattr(trace, field))


class State(NamedTuple):
    weights: weights.ModelWeights


def test_an_attacker_holds_features_both_tasks_and_a_key():
    seen = {}

    def init(access, hyper):
        del hyper
        expected = features_fn(PARAMS, PROBLEM.train.x)
        seen["features"] = access.features.x.shape == expected.shape
        seen["benign"] = access.benign_features.x.shape == (33, D)
        # A head in closed form from what init is given.
        solved = jnp.linalg.lstsq(access.features.x, access.features.y[:, None])[0]
        head = Head(solved, jnp.zeros((1,)))
        return State(access.weights._replace(head=head, shift=jnp.zeros(D_IN)))

    def update(state, batches, access, hyper):
        seen["rows"] = batches.harmful.x.shape == batches.benign.x.shape == (16, D_IN)
        noise = jax.random.normal(batches.rng_key, (D_IN,))
        del access, hyper
        return State(state.weights._replace(shift=noise))

    attack = attacks.WeightAttack(init=init, update=update)
    found = attacks.run_fine_tune(attack, PROBLEM, **RUN)
    assert seen == {"features": True, "benign": True, "rows": True}
    design = np.asarray(features_fn(PARAMS, PROBLEM.train.x))
    solved = np.linalg.lstsq(design, np.asarray(PROBLEM.train.y), rcond=None)[0]
    np.testing.assert_allclose(found.weights.head.kernel[0, 0, :, 0], solved, rtol=1e-7)
    shift = np.asarray(found.weights.shift)
    assert (shift[0, 0] != shift[0, 1]).all()  # another seed, another key
    # What is measured is measured with the shift; the benign task never is.
    x = np.asarray(PROBLEM.held_out.x) + shift[0, 1]
    output = np.tanh(x @ np.asarray(PARAMS["kernel"])) @ solved
    loss = np.mean((output - np.asarray(PROBLEM.held_out.y)) ** 2) / 2
    np.testing.assert_allclose(found.held_out_loss[0, 1, -1], loss, rtol=1e-7)
    assert (np.asarray(found.utility)[..., 0] == np.asarray(found.utility)[..., -1]).all()


def test_what_an_attacker_needs_is_asked_for_before_it_runs():
    bare = dataclasses.replace(
        PROBLEM,
        benign=None,
        head=attacks.zero_head(D, 1),
        features_fn=lambda params, x: x[:, :D] * params["scale"][None, :],
        params={"scale": jnp.ones(D)},
    )
    rows = language.rows(4)
    text = attacks.language_problem(
        Language(config=language.CONFIG), language.params(), train=rows, held_out=rows
    )
    of_text = {"own_head", "real_inputs", "blocks"}
    for need in weights.NEEDS:
        attack, problem = dataclasses.replace(ATTACK, needs=(need,)), bare
        if need in of_text:
            problem = text
        assert attacks.not_applicable(attack, problem) == weights.NEEDS[need]
        with pytest.raises(ValueError, match=weights.NEEDS[need]):
            attacks.run_fine_tune(attack, problem, steps=1)
    known = {"refresh_fn": lambda p, x: p, "canonical_fn": lambda p: (p,)}
    full = dataclasses.replace(PROBLEM, public=PARAMS, **known)
    missing = {"norms", "unembedding", "answers"}  # no such layers, real targets
    for need in set(weights.NEEDS) - missing:
        assert attacks.not_applicable(dataclasses.replace(ATTACK, needs=(need,)), full) is None


def test_a_trial_measures_every_way_and_names_the_fastest():
    found = attacks.fastest_execution(ATTACK, PROBLEM, trajectories=3, batch_size=16, steps=4)
    assert set(found.seconds) == {f"{loop} {n}" for loop in ("host", "device") for n in (1, 3)}
    assert found.seconds[f"{found.loop} {found.chunk}"] == min(found.seconds.values()) > 0
    only = attacks.fastest_execution(
        ATTACK, PROBLEM, trajectories=1, batch_size=16, steps=2, loops=("host",)
    )
    assert (only.chunk, only.loop) == (1, "host")


def test_problems_that_do_not_fit_are_refused():
    for change, message in [
        ({"head": _head(2)}, "real targets need a head of one output"),
        ({"benign": dataclasses.replace(BENIGN, head=attacks.zero_head(D + 1, 2))}, "both heads"),
        ({"public": {"kernel": jnp.zeros((D_IN, D + 1))}}, "structure and shapes of params"),
        ({"train": Batch(PROBLEM.train.x, PROBLEM.train.y > 0)}, "integers, or real targets"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(PROBLEM, **change)
