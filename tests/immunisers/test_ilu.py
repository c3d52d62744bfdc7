"""ILU: three readings of its penalty in closed form, an unbiased estimate, its two rivals."""

import itertools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import thinned

from jaximm.immunisers.unlearning import invariance
from jaximm.types import Batch
from tests.immunisers import unlearning_cases as cases

pytestmark = pytest.mark.heavy

ENVIRONMENT = cases.rows(11, 3)


class Batches(NamedTuple):
    """With an honest user's rows."""

    primary: Batch
    harmful: Batch
    environment: Batch


BATCHES = Batches(*cases.PAIR, ENVIRONMENT)


def part(start, stop):
    return jax.tree.map(lambda leaf: leaf[start:stop], ENVIRONMENT)


def logit_slope(theta, batch):
    """E[sum_v p_v z_v - z_y]."""
    z = np.asarray(cases.logits(theta, batch))
    p = np.asarray(jax.nn.softmax(z))
    return np.mean(np.sum(p * z, axis=1) - z[np.arange(len(z)), np.asarray(batch.y)])


def mean_loss(theta, batch):
    z = cases.logits(theta, batch)
    return -jnp.mean(jax.nn.log_softmax(z)[jnp.arange(len(z)), batch.y])


def test_each_reading_is_its_closed_form():
    theta, posed = cases.params(), cases.problem()
    first, second = invariance.halves(ENVIRONMENT)
    slopes = [jax.grad(mean_loss)(theta, batch) for batch in (first, second)]
    along = [
        sum(jax.tree.leaves(jax.tree.map(lambda w, g: float(jnp.sum(w * g)), theta, slope)))
        for slope in slopes
    ]
    across = sum(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.sum(a * b)), *slopes)))
    expected = {
        "logit_scale": logit_slope(theta, first) * logit_slope(theta, second),
        "parameter_scale": along[0] * along[1],
        "gradient_norm": across,
    }
    for reading, value in expected.items():
        found = invariance.penalty(reading, posed, theta, first, second)
        assert float(found) == pytest.approx(value, rel=1e-10), reading


def test_the_penalty_of_a_logit_scale_is_zero_where_the_scale_is_right():
    """Along z -> w z the loss is convex, and its slope vanishes at the best w alone."""
    theta, posed = cases.params(), cases.problem()
    labels = jnp.argmax(cases.logits(theta, ENVIRONMENT), axis=1).astype(jnp.int32)
    labels = labels.at[:3].set((labels[:3] + 1) % 3)  # mostly right: the best w is finite and > 0
    batch = Batch(ENVIRONMENT.x, labels)
    scale, lower, upper = 1.0, 0.0, 50.0
    for _ in range(60):
        scale = (lower + upper) / 2
        head = jax.tree.map(lambda leaf, by=scale: by * leaf, theta.head)
        if logit_slope(theta._replace(head=head), batch) > 0:
            upper = scale
        else:
            lower = scale
    best = theta._replace(head=jax.tree.map(lambda leaf: scale * leaf, theta.head))
    assert 0.01 < scale < 49
    value = invariance.penalty("logit_scale", posed, best, batch, batch)
    elsewhere = invariance.penalty("logit_scale", posed, theta, batch, batch)
    assert float(value) < 1e-20 < 1e-4 < float(elsewhere)


@pytest.mark.parametrize("reading", invariance.READINGS)
def test_two_batches_are_unbiased_where_a_square_is_not(reading):
    """Over all pairs of four rows, which are the whole environment: exactly, no Monte Carlo."""
    theta, posed = cases.params(), cases.problem()
    ones = [part(i, i + 1) for i in range(4)]
    slopes = [invariance.slope(reading, posed, theta, one) for one in ones]

    def product(a, b):
        return sum(
            float(jnp.sum(x * y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
        )

    whole = jax.tree.map(lambda *leaves: sum(leaves) / 4, *slopes)
    truth = product(whole, whole)
    pairs = list(itertools.product(range(4), repeat=2))  # two independent draws of one row
    unbiased = np.mean([product(slopes[i], slopes[j]) for i, j in pairs])
    squared = np.mean([product(slope, slope) for slope in slopes])
    assert unbiased == pytest.approx(truth, rel=1e-10)
    assert squared > truth + 0.01 * abs(truth)
    found = invariance.penalty(reading, posed, theta, part(0, 4), part(0, 4))
    assert float(found) == pytest.approx(truth, rel=1e-10)


def test_the_gradient_of_a_gradient_norm_is_that_of_finite_differences():
    theta, posed = cases.params(), cases.problem()

    def value(theta):
        return invariance.penalty("gradient_norm", posed, theta, *invariance.halves(ENVIRONMENT))

    slope, step = jax.jit(jax.grad(value))(theta), 1e-5
    along = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size * 1.0)).reshape(leaf.shape), theta
    )
    ahead, behind = (
        float(value(jax.tree.map(lambda w, d, by=by: w + by * d, theta, along)))
        for by in (step, -step)
    )
    expected = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float(jnp.sum(g * d)), slope, along)))
    assert (ahead - behind) / (2 * step) == pytest.approx(expected, rel=1e-6)


def npo_term(theta, reference, beta):
    ratio = cases.losses(reference, cases.PAIR.harmful, cases.HARMFUL_HEAD)
    ratio -= cases.losses(theta, cases.PAIR.harmful, cases.HARMFUL_HEAD)
    return 2 / beta * jnp.mean(jax.nn.softplus(beta * ratio))


@pytest.mark.parametrize("two_batches", thinned([True, False]))
def test_a_step_descends_npo_and_the_penalty(two_batches):
    beta, gamma, weight, theta = 0.5, 0.7, 0.3, cases.moved()

    def objective(theta):
        batches = invariance.halves(ENVIRONMENT) if two_batches else (ENVIRONMENT, ENVIRONMENT)
        slopes = []
        for batch in batches:
            z = cases.logits(theta, batch)
            rows = jnp.sum(jax.nn.softmax(z) * z, axis=1) - z[jnp.arange(len(z)), batch.y]
            slopes.append(jnp.mean(rows))
        kept = jnp.mean(cases.losses(theta, cases.PAIR.primary))
        forget = npo_term(theta, cases.params(), beta)
        return forget + gamma * kept + weight * slopes[0] * slopes[1]

    fields = {"beta": beta, "retain_weight": gamma, "weight": weight, "two_batches": two_batches}
    state, info = cases.stepped(cases.method("ilu", **fields), theta, BATCHES)
    value, expected = cases.descended(objective, theta)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-9, atol=1e-11)
    assert float(info.loss) == pytest.approx(float(value), rel=1e-10)
    if two_batches:  # on the plain pair the primary rows are the environment
        _, plain = cases.stepped(cases.method("ilu", **fields), theta, cases.PAIR)
        first, second = invariance.halves(cases.PAIR.primary)
        square = logit_slope(theta, first) * logit_slope(theta, second)
        assert float(plain.penalty) == pytest.approx(weight * square, rel=1e-9)


@pytest.mark.slow
def test_the_rivals_environment_as_data_and_sharpness_aware_steps():
    theta, radius, beta = cases.moved(), 0.05, 0.1
    slope = jax.grad(npo_term)(theta, cases.params(), beta)
    size = radius / optax.tree.norm(slope)
    ahead = jax.tree.map(lambda w, g: w + size * g, theta, slope)

    def objective(theta):
        environment = jnp.mean(cases.losses(theta, ENVIRONMENT))
        return jnp.mean(cases.losses(theta, cases.PAIR.primary)) + 0.4 * environment

    one = cases.method("ilu", weight=0.0, environment_weight=0.4, sam_radius=radius)
    state, info = cases.stepped(one, theta, BATCHES)
    sharp = jax.grad(npo_term)(ahead, cases.params(), beta)
    rest = jax.grad(objective)(theta)
    expected = jax.tree.map(lambda w, a, b: w - a - b, theta, sharp, rest)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-9, atol=1e-11)
    assert set(info._fields) == {"loss", "forget", "retain", "environment"}
    plain = jax.grad(npo_term)(theta, cases.params(), beta)
    assert abs(float(optax.tree.norm(plain) - optax.tree.norm(sharp))) > 1e-6


@pytest.mark.slow
def test_on_rmu_its_terms_are_those_of_rmu():
    base = cases.method("rmu", steering=2.0, retain_weight=3.0)
    ilu = cases.method("ilu", base="rmu", steering=2.0, retain_weight=3.0, weight=0.0)
    (state, info), (other, others) = (
        cases.stepped(one, cases.moved(), cases.PAIR) for one in (ilu, base)
    )
    chex.assert_trees_all_close(state.params, other.params, rtol=1e-12)
    assert (info.forget, info.retain) == (others.forget, others.retain)


def test_what_cannot_be_done_is_said():
    posed = cases.problem(losses_fn=lambda params, batch: batch.x[:, 0])
    with pytest.raises(ValueError, match="scaled_losses_fn"):
        cases.method("ilu", posed)
    cases.method("ilu", posed, reading="gradient_norm")
    one, single = cases.method("ilu"), BATCHES._replace(environment=part(0, 1))
    with pytest.raises(ValueError, match="two rows at least, got 1"):
        jax.eval_shape(one.update, one.init(cases.params(), cases.KEY), single, cases.KEY)
