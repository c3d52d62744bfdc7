"""Attackers against NumPy references, closed forms and each other."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import thinned, thinned_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from jaximm import attacks
from jaximm.attacks.grid import at_edge, beyond, is_at
from jaximm.attacks.probe import fit, loop
from jaximm.attacks.probe import problem as base

pytestmark = pytest.mark.heavy

D = 6
RUN = {"steps": 1500, "seeds": (0, 1), "record": 20}  # one compile serves most tests of this file
EQUIVARIANT = [n for n in attacks.REGISTRY if attacks.make_attack(n).rotation_equivariant]
GRADIENT_ONLY = ["gd", "gd_best_step", "gd_line_search", "heavy_ball", "nesterov"]


def _data(case, dtype=np.float64):
    """Features and targets of one named shape, all of width D."""
    rng = np.random.default_rng(7)
    n = {"wide": 4, "tall": 30, "deficient": 30, "zero": 30}[case]
    features = rng.normal(size=(n, D)) * np.geomspace(1.0, 0.4, D)
    if case == "deficient":
        features[:, 4:] = features[:, :2] @ np.array([[1.0, 0.5], [0.2, -1.0]])
    targets = np.zeros(n) if case == "zero" else rng.normal(size=n)
    return features.astype(dtype), targets.astype(dtype)


def _problem(case="tall", dtype=np.float64, **options):
    return attacks.probe_problem(*_data(case, dtype), **options)


def _planted(kappa, n, d, seed=0):
    """A problem whose Hessian has log-uniform eigenvalues in [1, kappa]."""
    features = _with_singular_values(np.sqrt(np.geomspace(kappa, 1.0, d) * n), n, seed)
    weights = np.random.default_rng(seed).normal(size=d)
    return attacks.probe_problem(features, features @ weights)


def _with_singular_values(sigma, n, seed=0):
    """An [n, len(sigma)] matrix with these singular values and random singular vectors."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(n, len(sigma))))[0]
    return (left * sigma) @ np.linalg.qr(rng.normal(size=(len(sigma), len(sigma))))[0].T


# --- the problem ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["wide", "tall", "deficient"])
@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_problem_matches_numpy(case, penalty):
    x, y = _data(case)
    n = len(x)
    problem = attacks.probe_problem(x, y, penalty=penalty)
    hessian = x.T @ x / n + penalty * np.eye(D)
    optimum = np.linalg.lstsq(x, y, rcond=None)[0]
    if penalty:
        optimum = np.linalg.solve(hessian, x.T @ y / n)

    def loss(w):
        return np.sum((x @ w - y) ** 2) / (2 * n) + penalty * w @ w / 2

    np.testing.assert_allclose(problem.hessian, hessian, rtol=1e-12, atol=1e-13)
    expected = np.linalg.eigvalsh(hessian)[::-1]
    np.testing.assert_allclose(problem.eigenvalues, expected, rtol=1e-9, atol=1e-12)
    assert int(problem.rank) == np.linalg.matrix_rank(x)
    np.testing.assert_allclose(problem.optimum, optimum, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(problem.optimal_loss, loss(optimum), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(problem.initial_loss, loss(np.zeros(D)), rtol=1e-12)
    w = np.linspace(-1, 1, D)
    np.testing.assert_allclose(problem.excess_loss(w), loss(w) - loss(optimum), rtol=1e-9)
    np.testing.assert_allclose(problem.gradient(w), hessian @ w - x.T @ y / n, rtol=1e-10)
    solution = problem.solve(problem.moment, damping=0.1)
    ridge = np.linalg.solve(hessian + 0.1 * np.eye(D), x.T @ y / n)
    np.testing.assert_allclose(solution, ridge, rtol=1e-9, atol=1e-12)
    projector = np.linalg.pinv(x) @ x
    error = np.linalg.norm(projector @ (w - optimum))
    np.testing.assert_allclose(problem.parameter_error(w), error, rtol=1e-9)
    moved = problem.starting_from(jnp.asarray(w))
    np.testing.assert_allclose(moved.initial_loss, loss(w), rtol=1e-10)
    np.testing.assert_allclose(
        problem.from_eigenbasis(moved.error_coefficients), w - optimum, rtol=1e-9, atol=1e-12
    )


def test_the_diagonal_form_is_the_same_problem():
    problem = _problem("tall").starting_from(jnp.linspace(-1.0, 1.0, D))
    diagonal = problem.diagonal()
    assert diagonal.is_diagonal
    assert diagonal.features is None
    assert diagonal.diagonal() is diagonal
    w = jnp.linspace(0.5, 2.0, D)
    rotated = problem.to_eigenbasis(w)
    for method in ("gradient", "hvp", "solve"):
        straight = getattr(problem, method)(w)
        inside = problem.from_eigenbasis(getattr(diagonal, method)(rotated))
        np.testing.assert_allclose(inside, straight, rtol=1e-9, atol=1e-11)
    for method in ("excess_loss", "parameter_error"):
        np.testing.assert_allclose(
            getattr(diagonal, method)(rotated), getattr(problem, method)(w), rtol=1e-10
        )


def test_the_solution_survives_a_condition_number_beyond_the_gram_matrix():
    # kappa(H) = 1e18: X^T X in float64 holds nothing of the small directions, X does.
    n, d = 40, 7
    sigma = np.geomspace(1e9, 1.0, d)
    features = _with_singular_values(sigma, n)
    weights = np.ones(d)
    problem = attacks.probe_problem(features, features @ weights)
    assert int(problem.rank) == d
    np.testing.assert_allclose(problem.eigenvalues, sigma**2 / n, rtol=1e-5)
    # y carries rounding of 1e9 * eps: the smallest direction is known to about 1e-7.
    np.testing.assert_allclose(problem.optimum, weights, rtol=1e-4)


def test_probe_problem_in_float32_and_under_jit():
    x, y = _data("tall", np.float32)
    problem = attacks.probe_problem(x, y)
    chex.assert_type(
        [v for v in problem if v is not None and v.ndim == 1 and v.dtype != bool],
        [jnp.float32] * sum(v is not None and v.ndim == 1 and v.dtype != bool for v in problem),
    )
    jitted = jax.jit(attacks.probe_problem)(x, y)
    chex.assert_trees_all_close(jitted, problem, rtol=1e-5, atol=1e-6)
    assert attacks.probe_problem(x.astype(np.int64), y).optimum.dtype == jnp.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x.at[3, 2].set(jnp.nan), y), "features hold NaN or inf"),
        (lambda x, y: (x, y.at[0].set(jnp.inf)), "targets hold NaN or inf"),
        (lambda x, y: (x, y[:-1]), r"targets must be \[n\] = \(30,\)"),
        (lambda x, y: (x, y[:, None, None]), r"targets must be \[n\]"),
        (lambda x, y: (x, jnp.zeros((30, 0))), r"or \[n, k\]"),
        (lambda x, y: (x[:0], y[:0]), "at least one row"),
        (lambda x, y: (x[:, :0], y), "at least one row and one column"),
        (lambda x, y: (x[0], y), r"features must be \[n, d\]"),
    ],
)
def test_bad_data_is_refused_in_one_line(change, message):
    x, y = change(*map(jnp.asarray, _data("tall")))
    with pytest.raises(ValueError, match=message):
        attacks.probe_problem(x, y)


def test_bad_options_are_refused():
    x, y = _data("tall")
    problem = attacks.probe_problem(x, y)
    gd = attacks.make_attack("gd")
    for call, message in [
        (lambda: attacks.probe_problem(x, y, penalty=-1.0), "penalty must be >= 0"),
        (lambda: attacks.probe_problem(x, y, rtol=2.0), "rtol must be in"),
        (lambda: attacks.run_attack(gd, problem, steps=0), "steps must be between"),
        (lambda: attacks.run_attack(gd, problem, [], steps=3), "grid is empty"),
        (lambda: attacks.run_attack(gd, problem, [{"a": 1}, {"b": 1}], steps=3), "same names"),
        (lambda: attacks.run_attack(gd, problem, steps=3, seeds=()), "seeds is empty"),
        (lambda: attacks.run_attack(gd, problem, steps=3, record=1), "record must be"),
        (lambda: attacks.run_attack(gd, problem.diagonal(), steps=3), "original axes"),
        (
            lambda: attacks.run_attack(
                attacks.make_attack("adam"), problem, steps=3, in_eigenbasis=True
            ),
            "depends on the axes",
        ),
        (lambda: attacks.make_attack("prob"), "unknown attack 'prob'; choose from"),
        (lambda: attacks.make_attack("gd", rate=1.0), "'gd' cannot be made: .*'rate'"),
        (lambda: attacks.suite_attacks("tiny"), "unknown suite 'tiny'; choose from"),
        (lambda: dataclasses.replace(gd, kind="strong"), "unknown kind 'strong'"),
        (lambda: dataclasses.replace(gd, traits={"brave"}), "unknown trait 'brave'; choose from"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_starts_are_zero_or_small_and_do_not_depend_on_units():
    x, y = _data("tall")
    starts = attacks.initial_weights(attacks.probe_problem(x, y), (0, 1, 2), scale=0.1)
    assert starts.shape == (3, D)
    np.testing.assert_array_equal(starts[0], 0)
    assert float(jnp.max(jnp.abs(starts[1] - starts[2]))) > 0
    rescaled = attacks.initial_weights(attacks.probe_problem(100 * x, 3 * y), (0, 1, 2), scale=0.1)
    np.testing.assert_allclose(rescaled, 0.03 * starts, rtol=1e-12)
    many = attacks.initial_weights(attacks.probe_problem(x, y), range(1, 400), scale=0.1)
    energy = np.mean(np.sum((x @ many.T) ** 2, axis=0)) / np.sum(y**2)
    np.testing.assert_allclose(energy, 0.01, rtol=0.2)  # 400 draws


# --- every entry of the registry -----------------------------------------------------------


@pytest.mark.parametrize("name", attacks.REGISTRY)
@pytest.mark.parametrize(
    ("case", "dtype"),
    thinned_rows(
        [
            ("deficient", np.float64),
            ("tall", np.float64),
            ("wide", np.float64),
            ("tall", np.float32),
        ]
    ),
)
def test_every_attacker_finds_the_least_squares_solution(name, case, dtype):
    x, y = _data(case, dtype)
    attack = attacks.make_attack(name)
    problem = attacks.probe_problem(x, y)
    trace = attacks.run_attack(attack, problem, **RUN)
    best = fit.fastest_cell(trace)
    rough = dtype == np.float32 or name == "adam"
    expected = np.linalg.lstsq(x.astype(np.float64), y.astype(np.float64), rcond=None)[0]
    projector = np.linalg.pinv(x.astype(np.float64), rcond=1e-5) @ x
    for weights in np.asarray(trace.weights)[best]:
        found = projector @ weights
        np.testing.assert_allclose(found, expected, atol=2e-3 if rough else 1e-6)
    assert (np.asarray(trace.steps_to_loss_gap)[best] >= 1).all()
    assert not np.asarray(trace.diverged)[best].any()
    assert not np.asarray(trace.still_falling)[best].any()
    assert trace.weights.dtype == dtype
    assert trace.relative_excess_loss.dtype == dtype
    assert trace.steps_to_loss_gap.dtype == jnp.int32
    np.testing.assert_allclose(trace.relative_excess_loss[..., 0], 1, rtol=1e-5)
    np.testing.assert_allclose(trace.relative_parameter_error[..., 0], 1, rtol=1e-5)


@pytest.mark.parametrize("name", attacks.REGISTRY)
def test_zero_targets_are_solved_from_the_start(name):
    trace = attacks.run_attack(attacks.make_attack(name), _problem("zero"), **RUN)
    np.testing.assert_array_equal(trace.steps_to_loss_gap[:, 0], 0)
    np.testing.assert_array_equal(trace.steps_to_parameter_error[:, 0], 0)
    np.testing.assert_array_equal(trace.final_relative_excess_loss[:, 0], 0)
    np.testing.assert_array_equal(trace.weights[:, 0], 0)
    assert not np.asarray(trace.diverged[:, 0]).any()
    chex.assert_tree_all_finite(trace.relative_excess_loss[:, 0])


@pytest.mark.parametrize("name", attacks.REGISTRY)
def test_costs_are_positive_and_grow_with_the_data(name):
    flops = attacks.make_attack(name).flops
    small, more_rows, wider = flops(100, 10), flops(200, 10), flops(100, 20)
    assert small.step > 0
    assert small.setup >= 0
    for larger in (more_rows, wider):
        assert sum(larger) > sum(small)
        assert larger.step > small.step


def test_first_order_cost_is_that_of_the_arithmetic():
    x, w = jnp.ones((50, 20)), jnp.ones(20)

    def gradient(x, w):
        return (x @ w) @ x

    counted = jax.jit(gradient).lower(x, w).compile().cost_analysis()["flops"]
    assert attacks.make_attack("gd").flops(50, 20).step == pytest.approx(counted, rel=0.05)


# --- reference iterations in NumPy ---------------------------------------------------------


def _reference(name, h, b, steps, start, cell):
    """`steps` steps of an attacker, written out in NumPy from its source."""
    eigenvalues = np.linalg.eigvalsh(h)
    low, high = eigenvalues[0], eigenvalues[-1]
    w, previous = start.copy(), start.copy()
    residual = b - h @ w
    direction = residual.copy()
    scaled = h / np.sqrt(np.outer(np.diag(h), np.diag(h)))
    for _ in range(steps):
        g = h @ w - b
        if name == "gd":
            w = w - cell["step_scale"] / high * g
        elif name == "gd_best_step":
            w = w - cell["step_scale"] * 2 / (high + low) * g
        elif name == "gd_line_search":
            w = w - (g @ g) / (g @ h @ g) * g
        elif name == "heavy_ball":
            m = low ** (1 - cell["curvature"]) * high ** cell["curvature"]
            rate = 4 / (np.sqrt(high) + np.sqrt(m)) ** 2
            beta = ((np.sqrt(high / m) - 1) / (np.sqrt(high / m) + 1)) ** 2
            w, previous = w - rate * g + beta * (w - previous), w
        elif name == "nesterov":
            m = low ** (1 - cell["curvature"]) * high ** cell["curvature"]
            root = np.sqrt(3 * high / m + 1)
            y = w + (root - 2) / (root + 2) * (w - previous)
            w, previous = y - 4 / (3 * high + m) * (h @ y - b), w
        elif name in ("conjugate_gradients", "lbfgs"):  # the same path on a quadratic
            alpha = (residual @ residual) / (direction @ h @ direction)
            w = w + alpha * direction
            after = residual - alpha * h @ direction
            direction = after + (after @ after) / (residual @ residual) * direction
            residual = after
        elif name == "ridge":
            w = np.linalg.solve(h + cell["penalty"] * high * np.eye(len(b)), b)
        elif name == "whitened_gd":
            w = w - np.linalg.solve(h + cell["epsilon"] * high * np.eye(len(b)), g)
        elif name == "jacobi_gd":
            w = w - cell["step_scale"] / np.linalg.eigvalsh(scaled)[-1] * g / np.diag(h)
        else:
            raise AssertionError(f"no reference for {name}")
    return w


@pytest.mark.parametrize("name", [n for n in attacks.REGISTRY if n != "adam"])
def test_weights_follow_the_published_iteration_with_one_compile_for_all_grids(name):
    x, y = _data("tall")
    chex.clear_trace_counter()
    attack = attacks.make_attack(name)
    counted = dataclasses.replace(
        attack, update=chex.assert_max_traces(attack.update, n=1), errors_at=None
    )
    shrunk = [{key: value * 0.9 for key, value in cell.items()} for cell in attack.grid] or [{}]
    for cells, seeds, penalty in ((attack.grid or [{}], (0, 5), 0.0), (shrunk, (3, 4), 0.5)):
        problem = attacks.probe_problem(x, y, penalty=penalty)
        trace = attacks.run_attack(counted, problem, cells, steps=4, seeds=seeds, record=4)
        starts = np.asarray(attacks.initial_weights(problem, seeds))
        h, b = x.T @ x / len(x) + penalty * np.eye(D), x.T @ y / len(x)
        for c, cell in enumerate(cells):
            for s, start in enumerate(starts):
                expected = _reference(name, h, b, 4, start, cell)
                np.testing.assert_allclose(trace.weights[c, s], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", attacks.REGISTRY)
def test_a_second_run_compiles_nothing(name):
    problem = _problem("tall")
    attacks.run_attack(attacks.make_attack(name), problem, **RUN)
    other = problem.starting_from(jnp.ones(D))
    before = loop._run._cache_size()
    again = attacks.run_attack(attacks.make_attack(name), other, **{**RUN, "seeds": (1, 0)})
    other_budget = attacks.run_attack(attacks.make_attack(name), other, **{**RUN, "steps": 1501})
    assert again.step.shape == other_budget.step.shape
    assert loop._run._cache_size() == before


@pytest.mark.parametrize("several", thinned([True, False]))
def test_adam_is_optax_adam(several):
    problem = attacks.probe_problem(*_several()) if several else _problem("tall")
    attack = attacks.make_attack(
        "adam", learning_rates=(0.03, 0.3), first_decays=(0.9, 0.5), second_decays=(0.99,)
    )
    trace = attacks.run_attack(attack, problem, steps=25, record=4)
    for c, cell in enumerate(attack.grid):
        optimiser = optax.adam(
            cell["learning_rate"] * float(problem.weight_scale),
            b1=cell["first_decay"],
            b2=cell["second_decay"],
            eps=1e-8 * float(jnp.max(jnp.abs(problem.moment))),
        )
        with jax.numpy_dtype_promotion("standard"):
            w = jnp.zeros_like(problem.optimum)
            state = optimiser.init(w)
            for _ in range(25):
                updates, state = optimiser.update(problem.gradient(w), state)
                w = optax.apply_updates(w, updates)
        np.testing.assert_allclose(trace.weights[c, 0], w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", thinned(["gd_best_step", "gd"]))
def test_closed_form_descent_equals_the_iterated_one(name):
    # 0.5 .. 2.05 in units of 1/h_max: slow, over-relaxed, and diverging after an initial fall.
    scales = (0.5, 1.0, 1.9, 2.05) if name == "gd" else (0.25, 0.9, 1.0, 1.03)
    problem = _planted(300.0, 40, 9)
    attack = attacks.make_attack(name)
    grid = attacks.grid_product(step_scale=scales)
    run = {"steps": 3000, "seeds": (0, 2), "record": 40}
    closed = attacks.run_attack(attack, problem, grid, **run)
    iterated = attacks.run_attack(attack, problem, grid, in_eigenbasis=False, **run)
    np.testing.assert_array_equal(closed.steps_to_loss_gap, iterated.steps_to_loss_gap)
    np.testing.assert_array_equal(
        closed.steps_to_parameter_error, iterated.steps_to_parameter_error
    )
    assert (np.asarray(closed.steps_to_parameter_error)[:2] > 0).any()
    np.testing.assert_array_equal(closed.diverged, iterated.diverged)
    np.testing.assert_array_equal(closed.diverged[:, 0], [False, False, False, True])
    above = np.asarray(iterated.relative_excess_loss) > 1e-8  # below, iterating rounds or stops
    above &= np.asarray(iterated.relative_excess_loss) < 1e8
    np.testing.assert_allclose(
        closed.relative_excess_loss[above], iterated.relative_excess_loss[above], rtol=1e-5
    )


@pytest.mark.parametrize("in_eigenbasis", [True, False])
def test_a_path_that_dips_below_the_target_and_then_explodes_counts_the_dip(in_eigenbasis):
    # The diverging direction starts at 1e-4 of the error and grows by 1.05 a step.
    features = np.sqrt(2.0) * np.diag(np.sqrt([1.0, 0.5]))
    problem = attacks.probe_problem(features, features @ np.array([1e-4, 1.0]))
    trace = attacks.run_attack(
        attacks.make_attack("gd"),
        problem,
        [{"step_scale": 2.05}],
        steps=1000,
        in_eigenbasis=in_eigenbasis,
    )
    t = np.arange(1001.0)
    excess = (1e-8 * 1.05 ** (2 * t) + 0.5 * 0.025 ** (2 * t)) / (1e-8 + 0.5)
    expected = [int(np.argmax(excess <= target)) for target in base.TARGETS]
    assert trace.steps_to_loss_gap[0, 0].tolist() == expected
    assert excess[-1] > 1e12
    assert bool(trace.diverged[0, 0])


def test_descent_counts_the_step_that_the_formula_gives():
    # One eigenvalue pair (1, 1/50), equal errors: the small one decides, (1 - 1/50)^t <= target.
    problem = attacks.probe_problem(
        jnp.sqrt(2.0) * jnp.diag(jnp.sqrt(jnp.array([1.0, 0.02]))), jnp.zeros(2)
    )
    problem = attacks.probe_problem(problem.features, problem.features @ jnp.ones(2))
    trace = attacks.run_attack(attacks.make_attack("gd"), problem, steps=1000, record=2)
    # After one step only the small direction is left: error norm 0.98^t / sqrt(2).
    expected = [int(np.ceil(np.log(t * np.sqrt(2)) / np.log(0.98))) for t in base.TARGETS]
    assert trace.steps_to_parameter_error[0, 0].tolist() == expected


# --- properties ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", thinned(EQUIVARIANT, keep=4))
def test_the_eigenbasis_gives_the_same_attack(name):
    problem = _problem("deficient")
    attack = attacks.make_attack(name)
    fast = attacks.run_attack(attack, problem, **RUN)
    plain = attacks.run_attack(attack, problem, in_eigenbasis=False, **RUN)
    np.testing.assert_array_equal(fast.steps_to_loss_gap, plain.steps_to_loss_gap)
    stable = ~np.asarray(fast.diverged)
    fast_w, plain_w = np.asarray(fast.weights)[stable], np.asarray(plain.weights)[stable]
    np.testing.assert_allclose(fast_w, plain_w, rtol=1e-6, atol=1e-8)
    close = {"rtol": 1e-5, "atol": 1e-12}
    np.testing.assert_allclose(
        np.asarray(fast.relative_excess_loss)[stable],
        np.asarray(plain.relative_excess_loss)[stable],
        **close,
    )


@pytest.mark.slow
def test_the_axis_bound_attackers_do_depend_on_the_axes():
    # Conditioning along the axes is undone by them; turned away from the axes it is not.
    d = 8
    scales = np.sqrt(np.geomspace(1e4, 1.0, d))
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(60, d)))[0] * np.sqrt(60)
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    y = basis @ rng.normal(size=d)
    steps = {}
    for label, x in (("aligned", basis * scales), ("turned", (basis * scales) @ turn)):
        for name in ("jacobi_gd", "adam", "gd"):
            trace = attacks.run_attack(
                attacks.make_attack(name), attacks.probe_problem(x, y), steps=5000, record=10
            )
            hits = np.asarray(trace.steps_to_loss_gap)[:, 0, 1]
            steps[label, name] = hits[hits >= 0].min(initial=5001)
    assert steps["aligned", "gd"] == steps["turned", "gd"] > 1000
    assert steps["aligned", "jacobi_gd"] <= 2
    assert steps["turned", "jacobi_gd"] > 500
    assert steps["aligned", "adam"] * 3 < steps["turned", "adam"]


@pytest.mark.parametrize("name", attacks.REGISTRY)
def test_units_of_features_and_targets_do_not_matter(name):
    x, y = _data("tall")
    attack = attacks.make_attack(name)
    one = attacks.run_attack(attack, attacks.probe_problem(x, y), **RUN)
    other = attacks.run_attack(attack, attacks.probe_problem(64.0 * x, 8.0 * y), **RUN)
    np.testing.assert_array_equal(one.steps_to_loss_gap, other.steps_to_loss_gap)
    stable = ~np.asarray(one.diverged)
    np.testing.assert_allclose(
        np.asarray(one.relative_excess_loss)[stable],
        np.asarray(other.relative_excess_loss)[stable],
        rtol=1e-6,
        atol=1e-12,
    )


@pytest.mark.slow
@settings(max_examples=12)
@given(
    log_kappa=st.floats(0.5, 10.0),
    seed=st.integers(0, 1000),
)
def test_no_gradient_attacker_beats_conjugate_gradients(log_kappa, seed):
    problem = _planted(np.exp(log_kappa), 20, D, seed=seed)
    bound = attacks.run_attack(attacks.make_attack("conjugate_gradients"), problem, **RUN)
    least = np.asarray(bound.steps_to_loss_gap)[0]  # [seeds, targets]
    for name in GRADIENT_ONLY:
        trace = attacks.run_attack(attacks.make_attack(name), problem, **RUN)
        hits = np.asarray(trace.steps_to_loss_gap)
        assert ((hits < 0) | (hits >= least[None])).all(), name


@pytest.mark.parametrize("name", ["conjugate_gradients", "lbfgs"])
def test_krylov_methods_end_after_as_many_steps_as_distinct_eigenvalues(name):
    values = np.array([9.0, 9.0, 4.0, 4.0, 4.0, 1.0])
    features = _with_singular_values(np.sqrt(values * 30), 30)
    problem = attacks.probe_problem(features, features @ np.linspace(1.0, 2.0, D))
    trace = attacks.run_attack(attacks.make_attack(name), problem, **RUN)
    curve = np.asarray(trace.relative_excess_loss)[0, 0]
    assert curve[2] > 1e-6
    assert curve[3] < 1e-20
    chex.assert_tree_all_finite(trace.relative_excess_loss)  # held there, no 0 / 0 afterwards


@pytest.mark.slow
def test_memory_keeps_lbfgs_on_the_path_that_plain_conjugate_gradients_loses():
    d = 40
    problem = _planted(1e8, 60, d)
    plain = attacks.run_attack(attacks.make_attack("conjugate_gradients"), problem, **RUN)
    kept = attacks.run_attack(attacks.make_attack("lbfgs"), problem, **RUN)
    fewest = int(kept.steps_to_parameter_error[0, 0, 2])
    assert 0 < fewest < 2 * d < int(plain.steps_to_parameter_error[0, 0, 2])
    afresh = attacks.make_attack("conjugate_gradients", recompute_residual=True)
    recomputed = attacks.run_attack(afresh, problem, **RUN)
    assert float(recomputed.final_relative_excess_loss[0, 0]) < 1e-10
    assert afresh.flops(10, 5).step > attacks.make_attack("conjugate_gradients").flops(10, 5).step


@pytest.mark.slow
def test_known_truths_on_a_log_uniform_spectrum():
    """Published: best GD 154 / 12,340 / > 200,000; CG 24 / 161 / 1,079; whitened GD 1; one solve.

    Reproduced as steps to 1e-2 relative parameter error from w0 = 0 for a normal w*.
    """
    published = {1e2: (154, 24), 1e4: (12_340, 161), 1e6: (200_000, 1_079)}
    for kappa, (descent, krylov) in published.items():
        problem = _planted(kappa, 1000, 200)
        steps = {}
        for name, budget in (
            ("gd_best_step", 10**8),
            ("conjugate_gradients", 5000),
            ("whitened_gd", 5),
            ("ridge", 1),
        ):
            trace = attacks.run_attack(attacks.make_attack(name), problem, steps=budget, record=20)
            hits = np.asarray(trace.steps_to_parameter_error)[:, 0, 1]
            steps[name] = hits[hits >= 0].min()
        assert descent / 2 < steps["gd_best_step"]
        assert kappa == 1e6 or steps["gd_best_step"] < 2 * descent
        assert krylov / 1.5 < steps["conjugate_gradients"] < 1.5 * krylov
        assert steps["whitened_gd"] == steps["ridge"] == 1


# --- several targets -----------------------------------------------------------------------

K = 3
BRIEF = {"steps": 4, "seeds": (0, 5), "record": 4}


def _several(case="tall", dtype=np.float64):
    x, _ = _data(case, dtype)
    return x, np.random.default_rng(8).normal(size=(len(x), K)).astype(dtype)


@pytest.mark.parametrize("case", ["wide", "tall", "deficient"])
@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_several_targets_are_as_many_problems_with_one_spectrum(case, penalty):
    x, y = _several(case)
    problem = attacks.probe_problem(x, y, penalty=penalty)
    alone = [attacks.probe_problem(x, column, penalty=penalty) for column in y.T]
    for field in ("eigenvalues", "in_row_space", "hessian", "tolerance"):
        np.testing.assert_array_equal(getattr(problem, field), getattr(alone[0], field))
    for field in ("moment", "optimum", "error_coefficients"):
        expected = np.stack([getattr(one, field) for one in alone], axis=1)
        np.testing.assert_allclose(getattr(problem, field), expected, rtol=1e-9, atol=1e-12)
    for field in ("optimal_loss", "initial_loss", "initial_excess_loss", "target_energy"):
        total = sum(float(getattr(one, field)) for one in alone)
        np.testing.assert_allclose(getattr(problem, field), total, rtol=1e-9, atol=1e-14)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(D, K)))
    for form, v in ((problem, w), (problem.diagonal(), problem.to_eigenbasis(w))):
        for method in ("gradient", "hvp", "solve"):
            found = problem.from_eigenbasis(getattr(form, method)(v))
            found = getattr(form, method)(v) if form is problem else found
            expected = np.stack([getattr(o, method)(w[:, j]) for j, o in enumerate(alone)], axis=1)
            np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
        excess = sum(float(one.excess_loss(w[:, j])) for j, one in enumerate(alone))
        np.testing.assert_allclose(form.excess_loss(v), excess, rtol=1e-9)
        errors = [float(one.parameter_error(w[:, j])) for j, one in enumerate(alone)]
        np.testing.assert_allclose(form.parameter_error(v), np.linalg.norm(errors), rtol=1e-9)
    moved = problem.starting_from(w)
    residual = x @ np.asarray(w) - y
    loss = np.sum(residual**2) / (2 * len(x)) + penalty * np.sum(np.asarray(w) ** 2) / 2
    np.testing.assert_allclose(moved.initial_loss, loss, rtol=1e-10)


@pytest.mark.parametrize("name", thinned([n for n in attacks.REGISTRY if n != "adam"], keep=2))
def test_with_several_targets_an_attacker_runs_on_the_stacked_system(name):
    x, y = _several()
    attack = attacks.make_attack(name)
    problem = attacks.probe_problem(x, y)
    trace = attacks.run_attack(attack, problem, **BRIEF)
    starts = np.asarray(attacks.initial_weights(problem, BRIEF["seeds"]))
    assert trace.weights.shape == (max(len(attack.grid), 1), 2, D, K)
    h = np.kron(np.eye(K), x.T @ x / len(x))  # weights as one vector, column after column
    b = (x.T @ y / len(x)).T.ravel()
    for c, cell in enumerate(attack.grid or [{}]):
        for s, start in enumerate(starts):
            expected = _reference(name, h, b, BRIEF["steps"], start.T.ravel(), cell)
            found = np.asarray(trace.weights)[c, s].T.ravel()
            np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-10)
            gap = found - np.linalg.solve(h, b), start.T.ravel() - np.linalg.solve(h, b)
            excess = (gap[0] @ h @ gap[0]) / (gap[1] @ h @ gap[1])
            np.testing.assert_allclose(
                trace.final_relative_excess_loss[c, s], excess, rtol=1e-6, atol=1e-20
            )
    before = loop._run._cache_size()
    attacks.run_attack(attack, attacks.probe_problem(2 * x, y - 1), **{**BRIEF, "seeds": (3, 4)})
    assert loop._run._cache_size() == before


@pytest.mark.parametrize("name", thinned(["heavy_ball", "ridge", "jacobi_gd", "gd"], keep=2))
def test_a_fixed_step_moves_every_column_as_if_it_were_alone(name):
    x, y = _several()
    attack = attacks.make_attack(name)
    run = {**BRIEF, "seeds": (0, 0)}
    together = attacks.run_attack(attack, attacks.probe_problem(x, y), **run)
    for j, column in enumerate(y.T):
        alone = attacks.run_attack(attack, attacks.probe_problem(x, column), **run)
        np.testing.assert_allclose(together.weights[..., j], alone.weights, rtol=1e-9, atol=1e-12)


def test_one_column_is_one_target():
    x, y = _data("tall")
    column, vector = attacks.probe_problem(x, y[:, None]), attacks.probe_problem(x, y)
    np.testing.assert_allclose(column.weight_scale, vector.weight_scale, rtol=1e-14)
    for name in ("adam", "conjugate_gradients"):
        attack = attacks.make_attack(name)
        first = attacks.run_attack(attack, column, **{**BRIEF, "seeds": (0, 0)})
        second = attacks.run_attack(attack, vector, **{**BRIEF, "seeds": (0, 0)})
        np.testing.assert_allclose(first.weights[..., 0], second.weights, rtol=1e-10)
        np.testing.assert_allclose(first.flops_to_loss_gap, second.flops_to_loss_gap)


def test_starts_of_several_targets_do_not_depend_on_their_number():
    x, y = _data("tall")
    problem = attacks.probe_problem(x, np.stack([y] * 50, axis=1))
    np.testing.assert_allclose(
        problem.weight_scale, attacks.probe_problem(x, y).weight_scale, rtol=1e-12
    )
    starts = np.asarray(attacks.initial_weights(problem, range(1, 9), scale=0.1))
    energy = np.mean(np.sum((x @ starts) ** 2, axis=1)) / np.sum(y**2)
    np.testing.assert_allclose(energy, 0.01, rtol=0.2)  # 400 columns
    np.testing.assert_array_equal(attacks.initial_weights(problem, (0,)), np.zeros((1, D, 50)))


def test_costs_of_several_targets_share_what_is_shared():
    n, d = 1000, 20
    for name in attacks.REGISTRY:
        one = attacks.make_attack(name).flops(n, d)
        assert one.for_targets(1) == one
        assert 0 <= one.setup_shared <= one.setup
        assert 0 <= one.step_shared < one.step
        ten = one.for_targets(10)
        assert one.step < ten.step <= 10 * one.step
    # Gradients cost k times as much; the top of the spectrum and a factor are found once.
    descent = attacks.make_attack("gd").flops(n, d)
    assert descent.for_targets(10).step == 10 * descent.step
    assert descent.for_targets(10).setup == descent.setup
    factor = n * d * d + d**3 / 3
    solve = attacks.make_attack("ridge").flops(n, d).for_targets(10).step
    assert solve == pytest.approx(factor + 10 * (2 * d * d + 4 * n * d))
    mine = attacks.Cost(2.0, 3.0)  # an attacker from outside: everything is paid k times
    assert mine.for_targets(4)[:2] == (8.0, 12.0)


def test_labels_are_one_hot_targets():
    x, scores = _several()
    labels = np.argmax(scores + 2 * x[:, :K], axis=1)
    problem = attacks.probe_problem(x, labels, classes=K)
    plain = attacks.probe_problem(x, np.eye(K)[labels])
    chex.assert_trees_all_equal(problem, plain)
    assert attacks.probe_problem(x, labels).optimum.shape == (D,)  # without classes: numbers


def test_an_output_that_is_not_a_number_is_wrong():
    x, _ = _data("tall")
    labels = np.zeros(len(x), int)  # what argmax says of NaN, and of equal outputs
    for weights, right in ((np.zeros((D, K)), 1.0), (np.full((D, K), np.nan), 0.0)):
        scores = base.probe_scores(x, jnp.asarray(labels), jnp.asarray(weights))
        np.testing.assert_array_equal(scores, np.full(len(x), right))


def test_a_constant_column_is_the_intercept():
    x, y = _several()
    design = np.asarray(attacks.with_constant(x, 2.0))
    assert (design[:, -1] == 2.0).all()
    problem = attacks.probe_problem(design, y + 5.0)
    centred = np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)[0]
    np.testing.assert_allclose(problem.optimum[:-1], centred, rtol=1e-8, atol=1e-10)
    intercept = 5.0 + y.mean(0) - x.mean(0) @ centred
    np.testing.assert_allclose(2.0 * problem.optimum[-1], intercept, rtol=1e-8)


def test_labels_that_do_not_fit_are_refused():
    x, y = _several()
    labels = np.argmax(y, axis=1)
    for call, message in [
        (lambda: attacks.probe_problem(x, labels, classes=2), r"must be in 0..1, got 0..2"),
        (lambda: attacks.probe_problem(x, labels, classes=1), "classes must be at least 2"),
        (lambda: attacks.probe_problem(x, y, classes=K), r"integers \[n\], got float64\[30, 3\]"),
        (lambda: attacks.probe_problem(x, labels[1:], classes=K), "one per row of features"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# --- what a trace says ---------------------------------------------------------------------


def test_a_step_beyond_the_limit_is_called_diverged():
    # 2.001 grows by 0.1 % a step: above its start in 1500 steps, far from overflow.
    grid = attacks.grid_product(step_scale=(1.0, 2.001, 2.1, 50.0))
    for in_eigenbasis in (True, False):
        trace = attacks.run_attack(
            attacks.make_attack("gd"), _problem(), grid, in_eigenbasis=in_eigenbasis, **RUN
        )
        np.testing.assert_array_equal(trace.diverged[:, 0], [False, True, True, True])
        assert 1 < trace.final_relative_excess_loss[1, 0] < 100
        assert not np.asarray(trace.still_falling).any()
        assert fit.fastest_cell(trace) == 0


def test_a_short_budget_is_called_still_falling_and_misses_are_minus_one():
    problem = _planted(1e4, 40, D)
    attack = attacks.make_attack("gd")
    short = attacks.run_attack(attack, problem, [{"step_scale": 1e-3}], **RUN)
    assert bool(short.still_falling[0, 0])
    assert not bool(short.diverged[0, 0])
    assert int(short.steps_to_parameter_error[0, 0, 2]) == -1
    assert np.isnan(short.flops_to_parameter_error[0, 0, 2])
    long = attacks.run_attack(attack, problem, **{**RUN, "steps": 10**7})
    assert not bool(long.still_falling[0, 0])
    hit = int(long.steps_to_parameter_error[0, 0, 2])
    cost = attack.flops(40, D)
    np.testing.assert_allclose(
        long.flops_to_parameter_error[0, 0, 2], cost.setup + hit * cost.step, rtol=1e-12
    )


def test_hits_are_counted_at_every_step_however_thin_the_curve():
    problem = _planted(1e3, 40, 9)
    attack = attacks.make_attack("gd_line_search")
    thin = attacks.run_attack(attack, problem, steps=3000, record=2)
    dense = attacks.run_attack(attack, problem, steps=3000, record=3000)
    assert thin.step.tolist() == [0, 1, 2700, 3000]
    np.testing.assert_array_equal(thin.steps_to_loss_gap, dense.steps_to_loss_gap)
    curve = np.asarray(dense.relative_excess_loss)[0, 0]
    steps = np.asarray(dense.step)
    for target, hit in zip(base.TARGETS, np.asarray(dense.steps_to_loss_gap)[0, 0], strict=True):
        assert curve[steps >= hit][0] <= target
        assert (curve[steps < hit] > target).all()


def test_recorded_steps_are_few_sorted_and_hold_both_ends():
    for steps in (1, 2, 7, 1000, 10**9):
        recorded = attacks.recorded_steps(steps, points=150)
        assert recorded[0] == 0
        assert recorded[-1] == steps
        assert len(recorded) <= 153
        assert (np.diff(recorded) > 0).all()
        assert (9 * steps) // 10 in recorded


# --- suites --------------------------------------------------------------------------------


def test_the_fit_is_that_of_the_fastest_cell_from_the_first_seed():
    attack = attacks.make_attack("gd_best_step")
    trace = attacks.run_attack(attack, _problem(), **RUN)
    found = attacks.fit_of(attack, trace)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    hits = np.asarray(trace.steps_to_loss_gap)[:, 0, 1]
    cell = int(np.flatnonzero(hits == hits[hits >= 0].min())[0])
    assert cell > 0  # not the first, or the choice would show nothing
    assert found["hyper_parameters"] == dict(attack.grid[cell])
    for key in ("steps_to_loss_gap", "steps_to_parameter_error"):
        assert list(found[key]) == ["1e-1", "1e-2", "1e-3"]
        assert list(found[key].values()) == np.asarray(getattr(trace, key))[cell, 0].tolist()
    for key in ("relative_excess_loss", "relative_parameter_error"):
        assert found["curve"][key] == np.asarray(getattr(trace, key))[cell, 0].tolist()
    assert found["curve"]["step"] == np.asarray(trace.step).tolist()
    end = float(trace.final_relative_excess_loss[cell, 0])
    assert found["final_relative_excess_loss"] == end
    assert found["edge_of_grid"] == at_edge(attack, attack.grid, cell)
    assert (found["diverged"], found["still_falling"]) == (False, False)


def test_the_fit_of_what_never_arrives_has_no_steps_and_no_infinite_numbers():
    attack = attacks.make_attack("gd")
    cells = [{"step_scale": 50.0}]
    found = attacks.fit_of(attack, attacks.run_attack(attack, _problem(), cells, **RUN), cells)
    assert set(found["steps_to_loss_gap"].values()) == {-1}
    assert found["diverged"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    ridge = attacks.make_attack("ridge")
    solved = attacks.fit_of(ridge, attacks.run_attack(ridge, _problem(), steps=1))
    assert solved["steps_to_loss_gap"] == {"1e-1": 1, "1e-2": 1, "1e-3": 1}
    assert solved["hyper_parameters"] == {"penalty": 0.0}
    assert not solved["edge_of_grid"]  # no penalty is below 0


def _fake_trace(hits, finals):
    shape = (len(hits), 1)
    return loop.AttackTrace(*[np.zeros(shape)] * len(loop.AttackTrace._fields))._replace(
        steps_to_loss_gap=np.asarray(hits)[:, None, None] * np.ones((1, 1, 3), int),
        final_relative_excess_loss=np.asarray(finals, float)[:, None],
    )


def test_the_fastest_cell_is_the_first_to_arrive_then_the_lowest():
    assert fit.fastest_cell(_fake_trace([5, 3, -1], [0, 0.1, 0])) == 1
    assert fit.fastest_cell(_fake_trace([-1, -1, -1], [0.5, np.nan, 0.2])) == 2
    assert fit.fastest_cell(_fake_trace([4, 4, 4], [1e-3, 1e-26, 1e-27])) == 1


def test_the_edge_of_the_grid_is_flagged_except_at_natural_bounds():
    attack = attacks.make_attack("adam")
    cells = attacks.grid_product(learning_rate=(0.1, 1.0, 10.0), first_decay=(0.9,))
    assert [at_edge(attack, cells, c) for c in range(3)] == [True, False, True]
    ridge = attacks.make_attack("ridge")
    cells = attacks.grid_product(penalty=(0.0, 0.1, 1.0))
    assert [at_edge(ridge, cells, c) for c in range(3)] == [False, False, True]


def test_a_sweep_goes_on_at_either_end_by_its_own_factor():
    cells = attacks.grid_product(rate=(0.04, 1.0, 0.2), decay=(0.0, 1.0))
    up, down = (beyond(cells, "rate", end) for end in ("greatest", "least"))
    assert [cell["decay"] for cell in up] == [cell["decay"] for cell in down] == [0.0, 1.0]
    assert [cell["rate"] for cell in up] == pytest.approx([5.0, 5.0])
    assert [cell["rate"] for cell in down] == pytest.approx([0.008, 0.008])
    assert beyond(cells[:2], "rate", "least") == []
    at = [[is_at(cells, c, "rate", end) for c in (0, 2, 4)] for end in ("least", "greatest")]
    assert at == [[True, False, False], [False, True, False]]
    assert not is_at(cells[:1], 0, "rate", "least")


def test_a_label_gives_options():
    attack = attacks.make_attack("fine_tune_adam@learning_rates=1e-4|0.1,cosine_steps=30")
    assert [cell["learning_rate"] for cell in attack.grid] == [1e-4, 0.1]
    assert attack.init is attacks.make_attack("fine_tune_adam", cosine_steps=30).init
    one = attacks.make_attack("quantise_then_tune@bits=4,learning_rates=1e-3")
    assert (
        one.grid
        == attacks.make_attack("quantise_then_tune", bits=(4,), learning_rates=(1e-3,)).grid
    )
    # The label's go before a suite's, and of a text bars are commas.
    assert attacks.make_attack("ridge@penalties=0.1", penalties=(1.0,)).grid[0]["penalty"] == 0.1
    ours = attacks.make_attack("lora@rank=2,targets=blocks.0|blocks.1")
    assert ours.init is attacks.make_attack("lora", rank=2, targets="blocks.0,blocks.1").init
    assert attacks.describe("lora@rank=2,alphas=8|16") == attacks.describe("lora") | {
        "name": "lora@rank=2,alphas=8|16",
        "title": "LoRA (rank 2, 2 alphas)",
    }
    short = attacks.suite_attacks("quick", ["adam@learning_rates=0.5", "gd"])
    assert [len(attack.grid) for attack in short.values()] == [
        len(attacks.suite_attacks("quick", ["adam"])["adam"].grid) // 6, 1,
    ]  # fmt: skip
    budgets = attacks.suite_steps("quick", list(short))
    assert budgets["adam@learning_rates=0.5"] == attacks.SUITES["quick"].steps["adam"]


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("lora@", "label 'lora@' must read name@key=value"),
        ("lora@ranks=2", "attack 'lora@ranks=2' cannot be made|unknown option 'ranks'"),
        ("lora@rank=many", r"rank: expected whole numbers in \[1, inf\), at least one, got"),
        ("fine_tune_adam@learning_rates=fast|1", r"learning_rate: expected numbers in \(0, inf\)"),
        ("lorra@rank=2", "unknown attack 'lorra'; choose from"),
        ("ridge@penalty=1", "attack 'ridge@penalty=1' cannot be made"),
    ],
)
def test_a_label_that_makes_no_attacker_is_refused(label, words):
    with pytest.raises(ValueError, match=words):
        attacks.describe(label)


@pytest.mark.parametrize("name", attacks.SUITES)
def test_suites_name_registered_attackers_and_valid_fields(name):
    found = attacks.SUITES[name]
    assert set(found.steps) == set(attacks.REGISTRY)
    assert set(found.options) <= set(attacks.REGISTRY)
    assert set(attacks.suite_attacks(name)) == set(attacks.REGISTRY)
    for attacker, fields in found.options.items():
        grid = attacks.suite_attacks(name)[attacker].grid
        assert len(grid) >= max(len(values) for values in fields.values())


def test_an_attacker_from_outside_joins_the_registry(monkeypatch):
    gd = attacks.make_attack("gd")
    mine = attacks.Attack(
        init=gd.init,
        update=gd.update,
        kind="first-order",
        flops=lambda n, d: attacks.Cost(0.0, 4.0 * n * d),
        grid=({"step_scale": 1.5},),
    )
    monkeypatch.setitem(attacks.REGISTRY, "mine", mine)
    assert attacks.suite_attacks("quick", ["mine"]) == {"mine": mine}
    budgets = attacks.suite_steps("quick", ["mine"])
    assert budgets == {"mine": attacks.SUITES["quick"].default_steps}
    trace = attacks.run_attack(mine, _problem(), steps=budgets["mine"])
    assert attacks.fit_of(mine, trace)["steps_to_loss_gap"]["1e-3"] > 0
    with pytest.raises(ValueError, match="finished and takes no options"):
        attacks.make_attack("mine", step_scales=(1.0,))


# --- held-out rows along the way -----------------------------------------------------------


@pytest.mark.parametrize("name", thinned(["gd_best_step", "adam", "conjugate_gradients", "ridge"]))
@pytest.mark.parametrize("kind", thinned(["labels", "real"]))
def test_quality_on_other_rows_is_that_of_the_weights_then(name, kind):
    rng = np.random.default_rng(5)
    x, held = rng.normal(size=(40, 6)), rng.normal(size=(23, 6))
    direction = rng.normal(size=6)
    if kind == "real":
        y, held_y, classes = x @ direction, held @ direction + rng.normal(size=23), None
    else:
        y, held_y = ((rows @ direction > 0).astype(int) for rows in (x, held))
        classes = 2
    problem = base.probe_problem(jnp.asarray(x), jnp.asarray(y), classes=classes)
    attack = attacks.make_attack(name)
    run = {"seeds": (0, 4), "record": 5, "held_out": {"other": (held, held_y)}}
    long = loop.run_attack(attack, problem, steps=30, **run)
    assert long.scores["other"].shape == (*long.relative_excess_loss.shape, 23)
    for trace in (long, loop.run_attack(attack, problem, steps=3, **run)):
        outputs = np.einsum("nd,gsd...->gsn...", held, np.asarray(trace.weights))
        if kind == "real":
            residual = np.mean((held_y - outputs) ** 2, axis=-1)
            expected = 1 - residual / np.var(held_y)
        else:
            expected = np.mean(np.argmax(outputs, axis=-1) == held_y, axis=-1)
        found = np.mean(trace.scores["other"], axis=-1)[..., -1]
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9)
    assert loop.run_attack(attack, problem, steps=3).scores == {}


def test_held_out_rows_that_do_not_fit_are_refused():
    problem = base.probe_problem(jnp.eye(3), jnp.ones(3))
    attack = attacks.make_attack("ridge")
    for rows, message in [
        ((np.ones((2, 4)), np.ones(2)), r"features must be \[n, 3\]"),
        ((np.ones((2, 3)), np.ones(3)), "real targets"),
        ((np.ones((2, 3)), np.ones(2, int)), "real targets"),
    ]:
        with pytest.raises(ValueError, match=message):
            loop.run_attack(attack, problem, steps=1, held_out={"x": rows})


@pytest.mark.slow
@pytest.mark.parametrize("name", thinned(["gd_best_step", "gd"]))
def test_a_slow_descent_is_counted_to_its_end_in_single_precision(name):
    """A step that rounding hides is no end: kappa 1e7, hits up to 1e8 steps in float32."""
    features = _with_singular_values(np.sqrt(np.geomspace(1e7, 1.0, 8) * 16), 16)
    targets = features @ np.random.default_rng(3).normal(size=8)
    attack = attacks.make_attack(name)
    found = {}
    for dtype in (np.float32, np.float64):
        problem = attacks.probe_problem(features.astype(dtype), targets.astype(dtype))
        # Of the best steps the one before the last, which diverges.
        cells = attack.grid[-2:-1] or attack.grid
        trace = attacks.run_attack(attack, problem, cells, steps=10**9, record=100)
        found[dtype] = trace
        met = np.asarray(trace.relative_excess_loss)[:, 0] <= base.TARGETS[2]
        hits = np.asarray(trace.steps_to_loss_gap)[:, 0, 2]
        for cell, hit in enumerate(hits):  # what the curve reaches is counted
            if met[cell].any():
                assert 0 <= hit <= np.asarray(trace.step)[met[cell].argmax()]
    hits = [np.asarray(trace.steps_to_loss_gap)[:, 0, :2].astype(float) for trace in found.values()]
    assert (hits[0] >= 0).all()
    np.testing.assert_allclose(hits[0], hits[1], rtol=1.0)  # one order: rounding moves the spectrum
