"""Every linear method does the arithmetic of its source and stays below the limit.

What all methods promise is in `contracts/test_immunisers.py`.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.test_util import check_grads

import jaximm
from jaximm import immunisers, linalg, preconditioner, regularisers
from jaximm.data import paired_batch
from jaximm.immunisers import THETA, problem
from jaximm.immunisers.conditioning import balanced_gap, direct_kappa, limit, whole_data
from jaximm.training import fit
from jaximm.types import Batch, PairedBatch
from tests import helpers

pytestmark = pytest.mark.heavy

D, ROWS_PRIMARY, ROWS_HARMFUL, BATCH = 9, 40, 31, 7
DAMPING = 1e-3
KEY = jax.random.key(7)
METHODS = helpers.METHODS_OF_NUMBERS
FORMS = ["condition_gap", "balanced_gap", "limit", "erase"]
EACH_FORM = helpers.thinned([*FORMS, *sorted(set(METHODS) - set(FORMS))], keep=len(FORMS))
"""Methods of gradients, with a budget, in closed form, of moments; the others are slow."""


@functools.partial(jax.jit, static_argnames=("seed", "dtype"))
def make_arrays(seed=0, dtype=jnp.float64) -> PairedBatch:
    """Two linear regressions on inputs whose columns have scales from 1 to 0.2."""

    def task(number, n):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), 4)
        scale = jnp.geomspace(1.0, 0.2, D)[jax.random.permutation(keys[3], D)]
        x = jax.random.normal(keys[0], (n, D)) * scale[None, :]
        y = x @ jax.random.normal(keys[1], (D,)) + 0.1 * jax.random.normal(keys[2], (n,))
        return Batch(x.astype(dtype), y.astype(dtype))

    return PairedBatch(task(0, ROWS_PRIMARY), task(1, ROWS_HARMFUL))


def make_problem(arrays):
    primary, harmful = (problem.relative_damping(task.x, DAMPING) for task in arrays)
    return immunisers.linear_problem(arrays, damping_primary=primary, damping_harmful=harmful)


ARRAYS = make_arrays()


@functools.cache
def shared():
    """Made when first asked for: collecting compiles nothing."""
    return make_problem(ARRAYS)


def numpy_grams(arrays=ARRAYS, damping=DAMPING):
    """K + lam I of both tasks in NumPy, lam = damping * tr(K) / d."""
    grams = []
    for task in arrays:
        x = np.asarray(task.x, np.float64)
        gram = x.T @ x / x.shape[0]
        grams.append(gram + damping * np.trace(gram) / D * np.eye(D))
    return grams


K_P, K_H = numpy_grams()


def log_kappa(gram, theta=None):
    theta = np.eye(D) if theta is None else np.asarray(theta, np.float64)
    values = np.linalg.svd(np.linalg.cholesky(gram).T @ theta, compute_uv=False)
    return 2 * np.log(values[0] / values[-1])


def log_ratios(theta):
    """log (i) and log (ii) of a backbone."""
    return log_kappa(K_H, theta) - log_kappa(K_H), log_kappa(K_P, theta) - log_kappa(K_P)


def log_rir(theta):
    harmful, primary = log_ratios(theta)
    return harmful - primary


def log_rir_limit():
    values = np.linalg.eigvals(np.linalg.solve(K_P, K_H)).real
    return np.log(values.max() / values.min()) + log_kappa(K_P) - log_kappa(K_H)


def random_theta(seed=3, dtype=jnp.float64):
    return helpers.matrix_with_spectrum(jnp.geomspace(2.0, 0.5, D), D, D, jax.random.key(seed))


def params_of(theta, head=0.3):
    return problem.linear_params(theta, head * jnp.ones(D, theta.dtype))


def batch_fn(arrays, batch_size=BATCH):
    def draw(arrays, step):
        return paired_batch(arrays, 1, step, batch_size=batch_size)

    return jax.tree_util.Partial(_DRAWS.setdefault(batch_size, draw), arrays)


_DRAWS: dict = {}  # one function a batch size, so that runs share their compilation


def run(name, *, arrays=ARRAYS, params=None, steps=4, batch_size=BATCH, fields=None, **kwargs):
    config = immunisers.make_config(name, **(fields or {}))
    immuniser = immunisers.make_immuniser(name, config, make_problem(arrays))
    if params is None:
        params = problem.init_params(D, None, dtype=arrays.primary.x.dtype)
    settings = {"seed": 5, "log_every": 2, **kwargs}
    return fit(immuniser, params, batch_fn(arrays, batch_size), steps=steps, **settings)


def one_step(name, params, batch=ARRAYS, of=None, **fields):
    of = shared() if of is None else of
    immuniser = immunisers.make_immuniser(name, immunisers.make_config(name, **fields), of)
    return jax.jit(immuniser.update)(immuniser.init(params, KEY), batch, KEY)


@pytest.mark.parametrize("name", helpers.thinned(EACH_FORM, keep=2))
def test_no_method_passes_the_limit_from_any_start(name):
    batch_size = None if name == "limit" else BATCH  # limit then meets it
    for start in (jnp.eye(D), random_theta()):
        params = problem.linear_params(start, jnp.zeros(D))
        theta = run(name, params=params, steps=20, batch_size=batch_size).params.backbone[THETA]
        assert log_rir(theta) <= log_rir_limit() + 1e-8


@pytest.mark.parametrize(
    ("name", "fields", "least"),
    helpers.thinned_rows(
        [
            ("condition_gap", {}, 1.0),
            ("balanced_gap", {"budget": 0.0}, 3.0),
            ("limit", {}, 5.0),
            ("balanced_gap", {"budget": 0.0, "both_ends": False}, 1.0),
            ("direct_kappa", {"learning_rate": 0.05}, 3.0),
        ],
        keep=3,
    ),
)
def test_log_rir_rises(name, fields, least):
    fields = fields | ({"steps": 150} if name != "limit" else {})
    params = run(name, fields=fields, steps=150, batch_size=None).params
    assert log_rir(params.backbone[THETA]) > least  # 0 for the identity


def test_controls_do_what_their_names_say():
    raw = problem.init_params(D, KEY)
    chex.assert_trees_all_equal(run("none", params=raw).params, raw)
    params = run("ill_only", steps=150, batch_size=None).params
    harmful, primary = log_ratios(params.backbone[THETA])
    assert harmful > 1
    assert primary > 0  # nothing holds the primary kappa


# base: factors, starts, the task step.


def test_factors_damping_and_starts():
    for factor, gram in zip(shared().factors, (K_P, K_H), strict=True):
        np.testing.assert_allclose(factor.T @ factor, gram, rtol=1e-12, atol=1e-14)
        np.testing.assert_array_equal(factor, np.triu(factor))
    chex.assert_trees_all_equal(problem.init_params(4, None).backbone[THETA], jnp.eye(4))
    drawn = problem.init_params(60, KEY, dtype=jnp.float32).backbone[THETA]
    assert drawn.dtype == jnp.float32
    np.testing.assert_allclose(np.var(drawn), 1 / 60, rtol=0.1)


@pytest.mark.slow
@hypothesis.given(
    log_theta=st.floats(-4, 4),
    log_head=st.floats(-4, 4),
    rate=st.floats(0.01, 1.0),
    seed=st.integers(0, 10),
)
def test_task_step_lowers_the_loss_at_any_scale(log_theta, log_head, rate, seed):
    head = jax.random.normal(jax.random.key(seed), (D,)) * 10.0**log_head
    params = problem.linear_params(random_theta(seed) * 10.0**log_theta, head)

    def loss(params, batch):
        return problem.NUMBERS.loss(batch.x @ params.backbone[THETA] @ params.head, batch.y)

    stepped = whole_data.task_step(params, ARRAYS.primary, rate)
    before, after = loss(params, ARRAYS.primary), loss(stepped.params, ARRAYS.primary)
    np.testing.assert_allclose(stepped.loss, before, rtol=1e-9)
    assert after < before


def test_task_step_from_a_zero_head_leaves_theta_and_zero_rate_leaves_all():
    params = problem.linear_params(random_theta(), jnp.zeros(D))
    stepped = whole_data.task_step(params, ARRAYS.primary, 0.0).params
    chex.assert_trees_all_equal(stepped, params)
    zero = problem.linear_params(jnp.zeros((D, D)), jnp.zeros(D))  # no curvature and no gradient
    chex.assert_trees_all_equal(whole_data.task_step(zero, ARRAYS.primary, 1.0).params, zero)


def test_capped_keeps_direction_and_size():
    rates = jnp.array([0.1, -2.0, 0.5])
    np.testing.assert_allclose(whole_data.capped(rates, 0.5), rates / 4, rtol=1e-14)
    np.testing.assert_array_equal(whole_data.capped(rates, 3.0), rates)
    np.testing.assert_array_equal(whole_data.capped(jnp.zeros(2), 0.5), np.zeros(2))


# condition_gap.


def explicit_change(theta, weight, regulariser, gram):
    """weight * K^{-1} dR(theta^T K theta)/dtheta, by autodiff of the regulariser and a solve."""
    gram = jnp.asarray(gram)
    gradient = jax.grad(lambda theta: regulariser(theta.T @ gram @ theta))(theta)
    return weight * np.linalg.solve(gram, gradient)


@pytest.mark.parametrize(
    ("primary_weight", "harmful_weight"),
    helpers.thinned_rows([(0.01, 0.05), (0.01, 0.0), (0.0, 0.05)]),
)
def test_full_rows_step_is_algorithm_1(primary_weight, harmful_weight):
    theta = random_theta()
    state, info = one_step(
        "condition_gap",
        params_of(theta),
        primary_weight=primary_weight,
        harmful_weight=harmful_weight,
        task_rate=0.0,
        cap=0.999,
    )
    well = explicit_change(theta, primary_weight, regularisers.well_conditioning, K_P)
    ill = explicit_change(theta, harmful_weight, regularisers.ill_conditioning, K_H)
    for change in (well, ill):  # below the cap, and not nothing
        assert np.linalg.norm(np.linalg.solve(theta, change), 2) < 0.999
    np.testing.assert_allclose(
        state.params.backbone[THETA], theta - well - ill, rtol=1e-9, atol=1e-11
    )
    assert np.linalg.norm(well + ill) > 1e-3
    np.testing.assert_array_equal(state.params.head, params_of(theta).head)
    if primary_weight:
        expected = regularisers.well_conditioning(theta.T @ K_P @ theta)
        np.testing.assert_allclose(info.well, expected, rtol=1e-9)
    if harmful_weight:
        expected = regularisers.ill_conditioning(theta.T @ K_H @ theta)
        np.testing.assert_allclose(info.ill, expected, rtol=1e-9)


@pytest.mark.parametrize("n", helpers.thinned([BATCH, 13]))  # the n x n and the d x d side
def test_batch_rows_step_is_the_explicit_formula(n):
    theta = random_theta()
    batch = jax.tree.map(lambda rows: rows[:n], ARRAYS)
    weights = {"primary_weight": 1e-3, "harmful_weight": 5e-3}
    state, info = one_step(
        "condition_gap",
        params_of(theta),
        batch,
        rows="batch",
        task_rate=0.0,
        cap=0.999,
        **weights,
    )
    change = 0
    for weight, regulariser, rows, gram, seen in (
        (1e-3, regularisers.well_conditioning_of_features, batch.primary.x, K_P, info.well),
        (5e-3, regularisers.ill_conditioning_of_features, batch.harmful.x, K_H, info.ill),
    ):
        value, gradient = jax.value_and_grad(
            lambda theta, regulariser=regulariser, rows=rows: regulariser(rows @ theta)
        )(theta)
        inverse = preconditioner.factor_covariance(jnp.asarray(gram))
        term = weight * preconditioner.apply_inverse(inverse, gradient)
        assert 1e-4 < np.linalg.norm(term) < 0.999 * np.linalg.norm(theta)
        np.testing.assert_allclose(seen, value, rtol=1e-10)
        change = change + term
    np.testing.assert_allclose(state.params.backbone[THETA], theta - change, rtol=1e-9, atol=1e-11)


def test_the_task_part_is_added_to_the_regularisers():
    params = params_of(random_theta())
    with_task, info = one_step("condition_gap", params, task_rate=0.5)
    without, _ = one_step("condition_gap", params, task_rate=0.0)
    task, loss = whole_data.task_step(params, ARRAYS.primary, 0.5)
    np.testing.assert_allclose(
        with_task.params.backbone[THETA] - without.params.backbone[THETA],
        task.backbone[THETA] - params.backbone[THETA],
        atol=1e-12,
    )
    np.testing.assert_allclose(with_task.params.head, task.head, rtol=1e-12)
    np.testing.assert_allclose(info.task_loss, loss, rtol=1e-12)


@pytest.mark.parametrize("cap", helpers.thinned([0.1, 0.4]))
def test_cap_bounds_a_step_and_keeps_its_direction(cap):
    theta = random_theta()
    fields = {"harmful_weight": 1e6, "cap": cap, "task_rate": 0.0}
    full, _ = one_step("ill_only", params_of(theta), **fields)
    relative = np.linalg.solve(theta, theta - full.params.backbone[THETA])
    np.testing.assert_allclose(np.linalg.norm(relative, 2), cap, rtol=1e-9)
    explicit = np.linalg.solve(
        theta, explicit_change(theta, 1.0, regularisers.ill_conditioning, K_H)
    )
    cosine = np.sum(relative * explicit) / np.linalg.norm(relative) / np.linalg.norm(explicit)
    np.testing.assert_allclose(cosine, 1, rtol=1e-9)
    batch, _ = one_step("ill_only", params_of(theta), rows="batch", **fields)
    size = np.linalg.norm(theta - batch.params.backbone[THETA]) / np.linalg.norm(theta)
    np.testing.assert_allclose(size, cap, rtol=1e-9)


def test_slopes_are_finite_at_the_pole():
    state, _ = one_step(
        "condition_gap",
        params_of(jnp.asarray(np.linalg.inv(np.linalg.cholesky(K_H)).T)),  # H_H = I
    )
    chex.assert_tree_all_finite(state.params)


# balanced_gap.


def test_balanced_gap_keeps_its_budget_within_one_step():
    config = immunisers.make_config("balanced_gap", budget=-1.0, steps=120)
    immuniser = immunisers.make_immuniser("balanced_gap", config, shared())
    update = jax.jit(immuniser.update)
    state, kappas, turns = immuniser.init(problem.init_params(D, None), KEY), [], []
    for _ in range(120):
        kappas.append(log_kappa(K_P, state.params.backbone[THETA]))
        state, info = update(state, ARRAYS, KEY)
        turns.append(float(info.harmful_turn))
    bound = log_kappa(K_P) - 1.0
    np.testing.assert_array_equal(turns, np.asarray(kappas) <= bound)
    assert 0 < sum(turns) < 120
    reached = turns.index(1.0)
    steps = np.diff(kappas)
    assert max(kappas[reached:]) <= bound + np.max(np.abs(steps[reached:]))
    assert np.max(np.abs(steps[-20:])) < np.max(np.abs(steps[:20]))  # the rate decays
    np.testing.assert_allclose(np.linalg.norm(state.params.backbone[THETA]), np.sqrt(D), rtol=1e-12)


def unit(values):
    return values / np.max(np.abs(values))


@pytest.mark.parametrize("both_ends", helpers.thinned([True, False]))
@pytest.mark.parametrize("harmful_turn", [True, False])
def test_balanced_gap_moves_each_eigenvalue_by_its_own_rate(harmful_turn, both_ends):
    theta, rate = random_theta(), 0.2
    state, info = one_step(
        "balanced_gap",
        params_of(theta),
        budget=50.0 if harmful_turn else -50.0,
        rate=rate,
        task_rate=0.0,
        both_ends=both_ends,
    )
    assert float(info.harmful_turn) == harmful_turn
    gram = K_H if harmful_turn else K_P
    regulariser = regularisers.ill_conditioning if harmful_turn else regularisers.well_conditioning
    values = np.linalg.eigvalsh(theta.T @ gram @ theta)

    def slope(values):
        return np.diagonal(jax.grad(regulariser)(jnp.diag(jnp.asarray(values))))

    rates = unit(slope(values))
    if both_ends:  # d log h = -d log (1 / h)
        rates = rates - unit(slope(1 / values))
    moved = values * (1 - rate * rates) ** 2
    after = state.params.backbone[THETA]
    scale = np.sum(np.linalg.eigvalsh(after.T @ gram @ after)) / np.sum(moved)  # |theta|^2 = d
    np.testing.assert_allclose(
        np.linalg.eigvalsh(after.T @ gram @ after), np.sort(moved) * scale, rtol=1e-8
    )
    features = ARRAYS.primary.x @ after @ state.params.head  # the head makes up for the scale
    unscaled = after / np.sqrt(scale)
    np.testing.assert_allclose(
        features, ARRAYS.primary.x @ unscaled @ params_of(theta).head, rtol=1e-8, atol=1e-12
    )


# direct_kappa.


@pytest.mark.parametrize(("n", "d"), helpers.thinned_rows([(12, 5), (5, 8)]))
def test_log_condition_and_its_gradient(n, d):
    sigma = jnp.geomspace(3.0, 0.1, 5)
    features = helpers.matrix_with_spectrum(sigma, n, d, KEY)
    value, gradient = jax.value_and_grad(direct_kappa.log_condition)(features)
    np.testing.assert_allclose(value, 2 * np.log(30), rtol=1e-10)
    u, s, vt = np.linalg.svd(features, full_matrices=False)
    u, s, vt = u[:, :5], s[:5], vt[:5]
    expected = 2 * (np.outer(u[:, 0], vt[0]) / s[0] - np.outer(u[:, -1], vt[-1]) / s[-1])
    np.testing.assert_allclose(gradient, expected, atol=1e-8)
    if n > d:  # with n < d the values left out come back under a finite difference
        check_grads(direct_kappa.log_condition, (features,), order=1, modes=["rev"], rtol=1e-4)


@pytest.mark.slow
def test_log_condition_is_finite_at_ties():
    for features in (jnp.eye(4), helpers.orthogonal(6, KEY)[:, :4], jnp.ones((3, 1))):
        value, gradient = jax.value_and_grad(direct_kappa.log_condition)(features)
        np.testing.assert_allclose(value, 0, atol=1e-12)
        assert np.all(np.isfinite(gradient))


def test_direct_kappa_reaches_the_limit():
    fields = {"learning_rate": 0.03, "steps": 600}
    result = run("direct_kappa", fields=fields, steps=600, batch_size=None, log_every=600)
    assert log_rir(result.params.backbone[THETA]) >= 0.97 * log_rir_limit()
    last = result.trajectory[-1]  # seen before the last update, whose rate is nearly nothing
    np.testing.assert_allclose(
        last["objective"],
        log_kappa(K_P) - log_kappa(K_H) - log_rir(result.params.backbone[THETA]),
        atol=0.02,
    )


# limit.


@pytest.mark.slow
def test_streamed_gram_matrices_give_the_backbone_of_one_pass():
    whole = run("limit", steps=1, batch_size=None).params
    immuniser = immunisers.make_immuniser("limit", immunisers.make_config("limit"), shared())
    state = immuniser.init(problem.init_params(D, None), KEY)
    cuts = [0, 6, 13, 31, None]  # uneven, and the harmful task's last batch is empty
    for start, stop in itertools.pairwise(cuts):
        part = jax.tree.map(lambda rows, start=start, stop=stop: rows[start:stop], ARRAYS)
        state, _ = immuniser.update(state, part, KEY)
    streamed = immuniser.finish(state)
    # Rounding turns the rotation that follows theta at will, so compare what no rotation changes.
    np.testing.assert_allclose(
        streamed.backbone[THETA] @ streamed.backbone[THETA].T,
        whole.backbone[THETA] @ whole.backbone[THETA].T,
        rtol=1e-8,
    )
    np.testing.assert_allclose(
        streamed.backbone[THETA] @ streamed.head, whole.backbone[THETA] @ whole.head, rtol=1e-8
    )


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_the_whole_frontier_attains_the_limit(t, rotate):
    theta = limit.limit_theta(*raw_grams(), t=t, damping=DAMPING, rotate=rotate)
    np.testing.assert_allclose(log_kappa(K_P, theta), t * log_kappa(K_P), atol=1e-6)
    np.testing.assert_allclose(log_rir(theta), log_rir_limit(), rtol=1e-6)
    hessian_primary, hessian_harmful = theta.T @ K_P @ theta, theta.T @ K_H @ theta
    np.testing.assert_allclose(np.trace(hessian_primary), np.trace(K_P), rtol=1e-9)
    spread = np.ptp(np.diagonal(hessian_harmful)) / np.mean(np.diagonal(hessian_harmful))
    assert spread < 1e-9 if rotate else spread > 0.1


def raw_grams():
    return tuple(jnp.asarray(gram) for gram in numpy_grams(damping=0.0))


@pytest.mark.slow
def test_the_limit_does_not_hang_on_the_scale_of_either_task():
    grams = [gram.astype(jnp.float32) for gram in raw_grams()]
    expected = limit.limit_theta(*grams, rotate=False)
    for powers in ((100, 100), (-100, -100), (80, -90)):
        scaled = (g * jnp.float32(2.0) ** p for g, p in zip(grams, powers, strict=True))
        np.testing.assert_array_equal(limit.limit_theta(*scaled, rotate=False), expected)
    half = limit.limit_theta(*(gram.astype(jnp.bfloat16) for gram in grams), rotate=False)
    assert half.dtype == jnp.float32


def test_limit_agrees_with_linalg_s_own_limit():
    found = linalg.pencil_from_factors(*shared().factors)
    kappas = [linalg.condition_number(factor).log_kappa * 2 for factor in shared().factors]
    certificate = linalg.rir_limit(found, log_kappa_primary=kappas[0], log_kappa_harmful=kappas[1])
    np.testing.assert_allclose(certificate, log_rir_limit(), rtol=1e-9)


@pytest.mark.parametrize(("damping", "shrinkage"), [(1e-3, 0.0), (0.1, 0.3)])
def test_limit_s_head_solves_the_damped_normal_equations(damping, shrinkage):
    fields = {"t": 0.5, "damping": damping, "shrinkage": shrinkage}
    params = run("limit", steps=1, batch_size=None, fields=fields).params
    theta, head = params.backbone[THETA], params.head
    x, y = (np.asarray(rows) for rows in ARRAYS.primary)
    gram = x.T @ x / ROWS_PRIMARY
    regularised = (1 - shrinkage) * gram + shrinkage * np.diag(np.diag(gram))
    regularised += damping * np.trace(gram) / D * np.eye(D)
    residual = theta.T @ (regularised @ theta @ head - x.T @ y / ROWS_PRIMARY)
    np.testing.assert_allclose(residual, np.zeros(D), atol=1e-10)
    np.testing.assert_allclose(  # the shrunk matrix is the one that kappa(H_P) = kappa^t refers to
        2 * log_kappa(regularised, theta), log_kappa(regularised), rtol=1e-6
    )


def test_choose_limit_takes_the_best_cell_that_keeps_the_quality():
    table = {1e-3: (9.0, 0.50, 0.1), 1e-2: (7.0, 0.59, 0.2), 1e-1: (5.0, 0.61, 0.3)}
    grid = {"dampings": tuple(table), "ts": (0.0, 1.0), "shrinkages": (0.0,)}

    def measure(config):
        log_rir, quality, primary = table[config.damping]
        return log_rir - config.t, quality, primary

    chosen, cells = limit.choose_limit(measure, quality_before=0.6, **grid)
    assert (chosen.damping, chosen.t) == (1e-2, 0.0)
    assert len(cells) == 6
    assert cells[0] == limit.LimitChoice(limit.LimitConfig(damping=1e-3, t=0.0), 9.0, 0.50, 0.1)
    loose, _ = limit.choose_limit(measure, quality_before=0.6, tolerance=0.11, **grid)
    assert loose.damping == 1e-3
    none_keeps, _ = limit.choose_limit(measure, quality_before=0.9, **grid)
    assert none_keeps.damping == 1e-1

    def broken(config):
        return (float("nan"), 1.0, 0.0) if config.damping == 1e-3 else measure(config)

    assert limit.choose_limit(broken, quality_before=0.6, **grid)[0].damping == 1e-2
    for dampings in ((), (1e-3,)):
        with pytest.raises(ValueError, match="choose_limit needs a cell"):
            limit.choose_limit(broken, quality_before=0.6, **(grid | {"dampings": dampings}))


# imma.


def test_imma_s_adapter_learns_and_the_backbone_unlearns():
    theta = random_theta()
    state, info = one_step("imma", params_of(theta), ascent_rate=0.05, task_rate=0.0)
    assert info.harmful_loss_adapted < 0.9 * info.harmful_loss_start
    ascent = state.params.backbone[THETA] - theta
    np.testing.assert_allclose(np.linalg.norm(ascent), 0.05 * np.linalg.norm(theta), rtol=1e-9)
    x, y = ARRAYS.harmful

    def harmful_loss(theta):
        return jnp.mean((x @ theta @ state.harmful_head - y) ** 2) / 2

    np.testing.assert_allclose(harmful_loss(theta), info.harmful_loss_adapted, rtol=1e-10)
    assert harmful_loss(state.params.backbone[THETA]) > info.harmful_loss_adapted
    gradient = jax.grad(harmful_loss)(theta)
    np.testing.assert_allclose(
        ascent / jnp.linalg.norm(ascent), gradient / jnp.linalg.norm(gradient), atol=1e-10
    )


def test_imma_s_adapter_converges_to_least_squares():
    result, _ = one_step(
        "imma", params_of(random_theta()), adapter_steps=20_000, ascent_rate=1e-9, task_rate=0.0
    )
    features = np.asarray(ARRAYS.harmful.x @ random_theta())
    solution = np.linalg.lstsq(features, np.asarray(ARRAYS.harmful.y))[0]
    np.testing.assert_allclose(result.harmful_head, solution, rtol=1e-4, atol=1e-4)


# At the door.

NAN = float("nan")


def squared_features(backbone, inputs):
    return (inputs @ backbone[THETA]) ** 2


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"none"}))
def test_linear_methods_refuse_other_backbones(name):
    other = problem.Problem(features_fn=squared_features)
    with pytest.raises(ValueError, match=r"linear backbone.*linear_problem"):
        immunisers.make_immuniser(name, immunisers.make_config(name), other)


def test_none_takes_any_backbone():
    other = problem.Problem(features_fn=squared_features)
    params = params_of(random_theta())
    state, info = one_step("none", params, of=other)
    chex.assert_trees_all_equal(state.params, params)
    error = squared_features(params.backbone, ARRAYS.primary.x) @ params.head - ARRAYS.primary.y
    np.testing.assert_allclose(info.task_loss, np.mean(error**2) / 2, rtol=1e-12)


def test_linear_problem_refuses_mismatched_widths_and_bad_damping():
    narrow = ARRAYS._replace(harmful=Batch(ARRAYS.harmful.x[:, :5], ARRAYS.harmful.y))
    with pytest.raises(ValueError, match="one width, got 9 and 5"):
        immunisers.linear_problem(narrow, damping_primary=0.1, damping_harmful=0.1)
    for damping in (-0.1, NAN, float("inf")):
        with pytest.raises(ValueError, match="damping_harmful must be finite and >= 0"):
            immunisers.linear_problem(ARRAYS, damping_primary=0.1, damping_harmful=damping)
    copied = ARRAYS.primary.x.at[:, 1].set(2 * ARRAYS.primary.x[:, 0])
    singular = ARRAYS._replace(primary=Batch(copied, ARRAYS.primary.y))
    with pytest.raises(ValueError, match="primary rows have rank 8 of 9"):
        immunisers.linear_problem(singular, damping_primary=0.0, damping_harmful=0.1)
    immunisers.linear_problem(singular, damping_primary=0.1, damping_harmful=0.0)


@pytest.mark.parametrize("exponent", [-70, 70])
def test_powers_of_two_of_the_features_are_split_off(exponent):
    x = ARRAYS.primary.x.astype(jnp.float32)
    moved = x * jnp.float32(2.0**exponent)
    damping, theta = problem.relative_damping(x, 0.5), jnp.eye(9, dtype=jnp.float32)
    plain, scaled = whole_data.spectrum(x[:9], theta), whole_data.spectrum(moved[:9], theta)
    np.testing.assert_array_equal(scaled.vectors, plain.vectors)
    logs = balanced_gap._log_spectrum(moved) - balanced_gap._log_spectrum(x)
    np.testing.assert_allclose(logs, 2 * exponent * np.log(2), rtol=1e-5)
    small = problem.relative_damping(x * jnp.float32(2.0 ** (exponent * 0.8)), 0.5)
    np.testing.assert_array_equal(small, damping * jnp.float32(2.0 ** (exponent * 1.6)))


# Adding a method takes one file and one line: here it is, outside the package.


class UserInfo(NamedTuple):
    task_loss: jax.Array


def test_a_user_method_is_fifteen_lines(monkeypatch):
    monkeypatch.setattr(immunisers, "REGISTRY", dict(immunisers.REGISTRY))

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class TowardsIdentityConfig:
        rate: float = 0.5

    def towards_identity(config, problem):
        objective = problem.primary

        def update(params, batch, rng_key):
            theta, (x, y) = params.backbone[THETA], batch.primary
            outputs = objective.outputs(problem.features_fn(params.backbone, x), params.head)
            moved = theta + config.rate * (jnp.eye(D) - theta)
            params = params._replace(backbone={THETA: moved})
            return params, UserInfo(objective.loss(outputs, y))

        return jaximm.types.Immuniser(lambda params, rng_key: params, update, lambda state: state)

    jaximm.register("immuniser", "towards_identity", (TowardsIdentityConfig, towards_identity))
    result = run("towards_identity", params=params_of(random_theta()), steps=3)
    expected = np.eye(D) + 0.125 * (random_theta() - np.eye(D))
    np.testing.assert_allclose(result.params.backbone[THETA], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (Batch(jnp.ones(6), jnp.ones(6)), "primary task needs inputs"),
        (Batch(jnp.ones((6, 2)), jnp.ones(5)), "primary task needs inputs"),
    ],
)
def test_a_problem_of_rows_of_another_shape_is_refused(rows, message):
    good = Batch(jnp.ones((6, 2)), jnp.ones(6))
    with pytest.raises(ValueError, match=message):
        problem.linear_problem(PairedBatch(rows, good), damping_primary=1.0, damping_harmful=1.0)
