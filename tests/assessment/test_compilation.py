"""What an assessment compiles, and what it leaves in memory."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assessment_worker import LEVEL, bench, models
from helpers import thinned

from jaximm import assessment
from jaximm.types import Head

pytestmark = pytest.mark.heavy

ATTACKERS = ("gd", "ridge", "fine_tune_adam", "lora")


def perceptron(params, x):
    return jax.nn.relu(x @ params["in"]["kernel"] + params["in"]["bias"][None, :])


def deep(seed):
    """The bench of the worker under a perceptron, with models of other numbers for each seed."""

    def model(label, scale):
        keys = jax.random.split(jax.random.key(seed), 2)
        layer = {"kernel": scale * jax.random.normal(keys[0], (6, 5)), "bias": jnp.zeros(5)}
        head = Head(jax.random.normal(keys[1], (5, 2)), jnp.zeros(2))
        return assessment.Model(label=label, method=label, params={"in": layer}, benign_head=head)

    given = dataclasses.replace(bench(), features_fn=perceptron)
    return given, [model("none", 1.0), model("small", 1e-2)]


def linear(seed):
    given = models()
    params = {"theta": jnp.diag(1.0 + jnp.arange(6.0) * (1.0 + seed))}
    return bench(), [given[0], dataclasses.replace(given[1], params=params)]


def compiled(run):
    """Names of the programs that a call compiles."""
    names = []

    def listen(event, _, **about):
        if event.endswith("backend_compile_duration"):
            names.append(about.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return names


def assess(made):
    return assessment.assess(*made, level=LEVEL, attackers=ATTACKERS)


@pytest.mark.parametrize("make", thinned([linear, deep]))
def test_a_second_assessment_of_the_same_shapes_compiles_nothing_and_keeps_no_array_alive(make):
    assert compiled(lambda: assess(make(0)))  # makes constants of programs too, once a process

    def alive():
        gc.collect()
        return len(jax.live_arrays())

    before = alive()
    made, found = make(1), []  # other numbers, so that nothing is found again
    assert alive() > before
    assert compiled(lambda: found.append(assess(made))) == []
    assert np.isfinite(found.pop()["models"][0]["utility"]["mean"])
    del made
    assert alive() == before


@pytest.mark.slow
def test_attackers_that_differ_in_their_start_and_tasks_of_other_rows_share_programs():
    from jaximm.attacks.weights import draws, loop, measure

    jax.clear_caches()
    assessment.assess(
        *deep(0), level=LEVEL, attackers=("fine_tune_adam", "fresh_head_adam", "solved_head")
    )
    # Both heads begin in one program, the solved one in another; all take the same steps.
    assert loop._begin._cache_size() == 2
    assert loop._advance_many._cache_size() == 1
    assert draws._draw_rows._cache_size() == 1
    assert measure._measure_block._cache_size() == 1
