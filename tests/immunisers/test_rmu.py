"""RMU against its formula; what may not move does not, to the last bit."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaximm.immunisers.unlearning.rmu import direction
from jaximm.types import Batch
from tests.immuniser_cases import features_fn
from tests.immunisers import unlearning_cases as cases

pytestmark = pytest.mark.heavy


class Three(NamedTuple):
    """With rows that are to be retained."""

    primary: Batch
    harmful: Batch
    retain: Batch


def test_a_step_descends_the_formula():
    c, alpha = 2.0, 3.0
    u = np.asarray(direction(4, 5))
    reference = cases.params()

    def objective(theta):
        harm, kept, before = (
            features_fn(model.backbone, batch.x)
            for model, batch in (
                (theta, cases.PAIR.harmful),
                (theta, cases.PAIR.primary),
                (reference, cases.PAIR.primary),
            )
        )
        steered = jnp.sum((harm - c * u[None, :]) ** 2) / harm.size
        return steered + alpha * jnp.sum((kept - before) ** 2) / kept.size

    one = cases.method("rmu", steering=c, retain_weight=alpha, direction=5)
    state, info = cases.stepped(one, cases.moved(), cases.PAIR)
    value, expected = cases.descended(objective, cases.moved())
    chex.assert_trees_all_close(state.params, expected, rtol=1e-10, atol=1e-12)
    assert float(info.loss) == pytest.approx(float(value), rel=1e-12)
    assert float(info.retain) > 0


def test_the_direction_is_a_unit_vector_of_its_number():
    u = np.asarray(direction(400, 1))
    assert np.linalg.norm(u) == pytest.approx(1, rel=1e-6)
    assert np.all(u >= 0)
    # Uniform entries over their norm: of mean (1/2) / sqrt(1/3) / sqrt(d).
    assert np.mean(u) * np.sqrt(400) == pytest.approx(np.sqrt(3) / 2, abs=0.05)
    np.testing.assert_array_equal(u, direction(400, 1))
    assert np.max(np.abs(u - direction(400, 2))) > 0.01


def test_what_targets_do_not_name_keeps_every_bit_under_weight_decay():
    with jax.numpy_dtype_promotion("standard"):
        posed = cases.problem(optimiser=optax.adamw(0.1, weight_decay=0.5))
    one = cases.method("rmu", posed, retain_weight=1.0, targets="backbone.second")
    state, _ = cases.stepped(one, cases.params(), cases.PAIR)
    start = cases.params()
    chex.assert_trees_all_equal(state.params.backbone["first"], start.backbone["first"])
    chex.assert_trees_all_equal(state.params.head, start.head)
    assert np.all(state.params.backbone["second"] != start.backbone["second"])


def test_a_batch_of_its_own_is_retained():
    retain = cases.rows(9, 3)
    one = cases.method("rmu", retain_weight=2.0)
    batch = Three(*cases.PAIR, retain)
    _, info = cases.stepped(one, cases.moved(), batch)
    change = features_fn(cases.moved().backbone, retain.x)
    change -= features_fn(cases.params().backbone, retain.x)
    assert float(info.retain) == pytest.approx(2 * float(jnp.mean(change**2)), rel=1e-10)


def test_unknown_sites_and_targets_are_refused():
    one = cases.method("rmu", site="layers.1")
    with pytest.raises(ValueError, match=r"site 'layers.1' is none .*\['features'\]"):
        cases.stepped(one, cases.params(), cases.PAIR)
    one = cases.method("rmu", targets="second")
    with pytest.raises(ValueError, match=r"targets 'second' names no parameter.*backbone.first"):
        one.init(cases.params(), cases.KEY)
