"""`from_objective` on a small model of tokens: any split of the rows gives the stated means."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaximm.immunisers import Problem, Weighted, from_objective
from jaximm.objectives import TokenRows, Tokens, Unembedded
from jaximm.training.parallel import make_parallel, step_fn
from jaximm.types import Batch

pytestmark = pytest.mark.heavy

N, T, D, V = 16, 3, 4, 7
TOKENS = Tokens(chunk=4)
KEY = jax.random.key(0)


class Batches(NamedTuple):
    """A batch more than two tasks have."""

    primary: Batch
    harmful: Batch
    retain: Batch


def losses_fn(params, batch):
    states = jnp.tanh(params["table"][batch.x] @ params["kernel"])
    return TOKENS.losses(Unembedded(states, params["table"]), batch.y)


def problem(**fields):
    return Problem(
        **{
            "features_fn": lambda params, x: params["table"][x[:, -1]],
            "losses_fn": losses_fn,
            "weights_fn": lambda batch: TOKENS.weights(batch.y),
            "optimiser": optax.sgd(1.0),
            **fields,
        }
    )


def start():
    rng = np.random.default_rng(0)
    return {"table": jnp.asarray(rng.normal(size=(V, D))), "kernel": jnp.asarray(np.eye(D))}


def batches(n=N):
    rng = np.random.default_rng(1)

    def rows(share):
        tokens = jnp.asarray(rng.integers(0, V, (2, n, T)), jnp.int32)
        mask = rng.random((n, T)) < share
        mask[: n // 4] = False  # whole devices and micro-batches without a token
        return Batch(tokens[0], TokenRows(tokens[1], jnp.asarray(mask)))

    return Batches(rows(0.9), rows(0.3), rows(0.6))


def objective_of(problem):
    def objective(params, seen, memory, rng_key):
        del rng_key
        harm = -jnp.log1p(problem.losses(params, seen.harmful))
        fixed = problem.losses(memory["reference"], seen.primary)
        gradients = [
            jax.flatten_util.ravel_pytree(
                jax.grad(lambda p, rows=rows: jnp.sum(problem.losses(p, rows)))(params)
            )[0]
            for rows in (seen.retain, seen.retain._replace(x=seen.retain.y.tokens))
        ]
        norms = [jnp.sqrt(jnp.sum(gradient**2)) for gradient in gradients]
        loss = {
            "keep": Weighted(problem.losses(params, seen.primary), problem.weights(seen.primary)),
            "harm": Weighted(0.5 * harm, problem.weights(seen.harmful)),
            "rows": 0.1 * problem.losses(params, seen.harmful),  # every row counts 1
            "cosine": gradients[0] @ gradients[1] / (norms[0] * norms[1]),  # of a whole batch
        }
        memory = memory | {"count": memory["count"] + jnp.sum(problem.weights(seen.retain))}
        return loss, {"before": Weighted(fixed, problem.weights(seen.primary))}, memory

    return objective


def method(one=None, **options):
    one = problem() if one is None else one
    return from_objective(
        "test",
        one,
        objective_of(one),
        init_memory=lambda params: {"reference": params, "count": jnp.zeros(())},
        whole=("retain",),
        **options,
    )


@functools.lru_cache(maxsize=1)
def stated():
    """Value and gradient of the objective as it is stated, from all rows at once."""
    of, rows = problem(), batches()

    def total(params):
        loss, *_ = objective_of(of)(params, rows, {"reference": start(), "count": 0.0}, KEY)

        def mean(term):
            return jnp.sum(term.values * term.weights) / jnp.sum(term.weights)

        return mean(loss["keep"]) + mean(loss["harm"]) + jnp.mean(loss["rows"]) + loss["cosine"]

    value, gradient = jax.jit(jax.value_and_grad(total))(start())
    return value, jax.tree.map(jnp.subtract, start(), gradient)


def check(state, info):
    value, expected = stated()
    chex.assert_trees_all_close(state.params, expected, rtol=0, atol=1e-10)
    assert float(info.loss) == pytest.approx(float(value), abs=1e-10)
    assert float(info.keep) == pytest.approx(float(info.before))  # the reference is the start
    chex.assert_trees_all_equal(state.memory["reference"], start())
    assert float(state.memory["count"]) == float(jnp.sum(problem().weights(batches().retain)))


@pytest.mark.slow  # in the gate eight devices show it
@pytest.mark.parametrize("accumulate", [4, 1])
def test_a_step_is_the_gradient_of_the_stated_means(accumulate):
    one = method(problem(accumulate=accumulate))
    check(*jax.jit(one.update)(one.init(start(), KEY), batches(), KEY))


@pytest.mark.slow  # in the gate: methods of either kind, tests/contracts/test_immunisers.py
@pytest.mark.parametrize(
    ("kind", "accumulate"),
    [("shard_map", 2), ("jit", 1), ("jit", 2), ("pmap", 1), ("shard_map", 1)],
)
def test_eight_devices_give_the_step_of_one(kind, accumulate):
    parallel = make_parallel(kind, jax.devices()[:8])
    one = method(problem(accumulate=accumulate))
    state = parallel.put(one.init(start(), KEY))
    state, info = step_fn(one, parallel)(state, parallel.put_rows(batches()), parallel.put(KEY))
    check(*parallel.one_copy((state, info)))


@pytest.mark.slow
def test_a_second_step_compiles_nothing_and_may_have_the_memory_of_the_first():
    one, traces = method(), []

    def counted(*arguments):
        traces.append(1)
        return one.update(*arguments)

    step = jax.jit(counted, donate_argnums=0)
    state = jax.tree.map(jnp.copy, one.init(start(), KEY))
    first = jax.tree.leaves(state.params)[0]
    for _ in range(3):
        state, _ = step(state, batches(), KEY)
    assert len(traces) == 1
    assert first.is_deleted()
    assert int(state.step) == 3


@pytest.mark.slow
def test_a_route_says_which_parameters_a_term_may_move():
    only = {"keep": "kernel", "harm": "table"}

    def route(term, path):
        if term == "rows":  # a mask within a parameter
            return jnp.arange(start()[path].size).reshape(start()[path].shape) == 0
        return only.get(term) == path

    one = method(problem(accumulate=2), route=route)
    state, _ = jax.jit(one.update)(one.init(start(), KEY), batches(), KEY)
    of, rows = problem(), batches()

    def term(name):
        def mean(params):
            loss = objective_of(of)(params, rows, {"reference": start(), "count": 0.0}, KEY)[0]
            values = loss[name]
            if name == "rows":
                return jnp.mean(values)
            return jnp.sum(values.values * values.weights) / jnp.sum(values.weights)

        return jax.jit(jax.grad(mean))(start())

    keep, harm, every = term("keep"), term("harm"), term("rows")
    corner = {path: jnp.where(route("rows", path), slope, 0) for path, slope in every.items()}
    moved = {"kernel": keep["kernel"] + corner["kernel"], "table": harm["table"] + corner["table"]}
    chex.assert_trees_all_close(
        state.params, jax.tree.map(jnp.subtract, start(), moved), rtol=0, atol=1e-10
    )


def test_without_any_weight_a_mean_is_zero_and_nothing_moves():
    of = problem()

    def objective(params, seen, memory, rng_key):
        del rng_key
        return (
            {"harm": Weighted(of.losses(params, seen.harmful) + jnp.nan, jnp.zeros(N))},
            {},
            memory,
        )

    one = from_objective("test", of, objective)
    state, info = jax.jit(one.update)(one.init(start(), KEY), batches(), KEY)
    assert float(info.harm) == 0
    assert info._fields == ("loss", "harm")
    chex.assert_trees_all_equal(state.params, start())


def test_counting_weights_costs_no_forward_pass():
    """Micro-batches have a loop of their own for the weights, without the model in it."""

    def products(accumulate):
        def losses_fn(params, batch):
            return jnp.sum(jnp.tanh(params["table"][batch.x[:, 0]] @ params["kernel"]), axis=1)

        one = problem(accumulate=accumulate, losses_fn=losses_fn)

        def objective(params, seen, memory, rng_key):
            del rng_key
            values = one.losses(params, seen.harmful)
            return {"harm": Weighted(values, one.weights(seen.harmful))}, {}, memory

        made = from_objective("test", one, objective)
        text = jax.jit(made.update).lower(made.init(start(), KEY), batches(), KEY).compile()
        return text.as_text().count(" dot(")

    assert products(4) == products(1) > 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: method(problem(accumulate=3)).update, "16 primary rows of a step do not divide"),
        (
            lambda: from_objective("t", problem(), objective_of(problem()), whole=("x",)).update,
            "whole names 'x', which is none of the batches",
        ),
        (
            lambda: (
                from_objective(
                    "t", problem(), lambda p, b, m, k: ({"a": jnp.ones((2, 2))}, {}, m)
                ).update
            ),
            "'a' must be one number a row",
        ),
        (
            lambda: (
                from_objective(
                    "t", problem(), lambda p, b, m, k: ({"a": p["table"][0]}, {"a": jnp.ones(1)}, m)
                ).update
            ),
            "names of their own",
        ),
        (lambda: method(problem(losses_fn=None)), "classes and width, or a losses_fn"),
        (lambda: method(problem(optimiser=None)), "give the problem's optimiser"),
    ],
)
def test_what_cannot_be_done_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        call()(method().init(start(), KEY), batches(), KEY)
