"""The floor of a head: closed forms, SciPy, and a dual that no head passes."""

import inspect
import json

import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from jaximm import attacks
from jaximm.measures import head_floor
from jaximm.records import assessment

N, D, K = 60, 7, 4


def make_rows(seed, n=N, d=D, k=K, spread=1e-2, offset=2.0, noise=1.0):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    x = rng.normal(size=(n, d)) * np.geomspace(1.0, spread, d)
    labels = np.argmax(x @ rng.normal(size=(d, k)) + noise * rng.normal(size=(n, k)), axis=1)
    labels[:k] = np.arange(k)
    return x @ basis + offset, labels


def cross_entropy(x, labels, kernel, bias):
    scores = x @ kernel + bias
    return np.mean(scipy.special.logsumexp(scores, axis=1) - scores[np.arange(len(x)), labels])


def scipy_optimum(x, labels, k, penalty):
    d = x.shape[1]

    def objective(flat):
        kernel, bias = flat[: d * k].reshape(d, k), flat[d * k :]
        a = scipy.special.softmax(x @ kernel + bias, axis=1) - np.eye(k)[labels]
        gradient = np.concatenate(
            [(x.T @ a / len(x) + penalty * kernel).ravel(), np.mean(a, axis=0)]
        )
        value = cross_entropy(x, labels, kernel, bias) + penalty * np.sum(kernel**2) / 2
        return value, gradient

    options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-10}
    start = np.zeros(d * k + k)
    return scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-3])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_cross_entropy_floor_is_the_optimum_of_scipy(seed, penalty):
    x, labels = make_rows(seed)
    floor = head_floor.cross_entropy_floor(x, labels, classes=K, penalty=penalty)
    found = scipy_optimum(x, labels, K, penalty)
    assert floor.converged
    assert 0 <= floor.gap == floor.primal - floor.dual <= 1e-8 * floor.primal
    np.testing.assert_allclose(found.fun, floor.primal, rtol=1e-6)
    assert found.fun >= floor.dual
    np.testing.assert_allclose(found.x[: D * K].reshape(D, K), floor.weights, atol=2e-3 / penalty)
    # The primal is that of the weights and the bias handed back.
    own = cross_entropy(x, labels, floor.weights, floor.bias) + penalty / 2 * np.sum(
        floor.weights**2
    )
    np.testing.assert_allclose(own, floor.primal, rtol=1e-12)


def test_the_gradient_vanishes_at_the_weights():
    x, labels = make_rows(2)
    floor = head_floor.cross_entropy_floor(x, labels, classes=K, penalty=1e-3, tolerance=1e-12)
    a = scipy.special.softmax(x @ floor.weights + floor.bias, axis=1) - np.eye(K)[labels]
    np.testing.assert_allclose(x.T @ a / N, -1e-3 * floor.weights, atol=1e-6)
    np.testing.assert_allclose(np.mean(a, axis=0), 0, atol=1e-6)
    assert np.max(np.abs(floor.weights)) > 1


def test_two_balanced_points_in_closed_form():
    # x = +-1, one point a class, W = [-w/2, w/2]: log(1 + exp(-w)) + penalty w^2 / 4.
    penalty = 0.1
    x, labels = np.array([[-1.0], [1.0]]), np.array([0, 1])
    low, w = 0.0, 20.0  # its derivative, penalty w / 2 - 1 / (1 + exp(w)), rises through zero
    for _ in range(60):
        middle = (low + w) / 2
        rises = penalty * middle / 2 > 1 / (1 + np.exp(middle))
        low, w = (low, middle) if rises else (middle, w)
    value = np.log1p(np.exp(-w)) + penalty * w**2 / 4
    floor = head_floor.cross_entropy_floor(x, labels, classes=2, penalty=penalty, tolerance=1e-12)
    np.testing.assert_allclose(floor.dual, value, rtol=1e-11)
    np.testing.assert_allclose(floor.weights, [[-w / 2, w / 2]], rtol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_dual_holds_at_any_point_however_few_the_steps(seed):
    """What is certified needs no convergence: each early dual is below the optimum."""
    x, labels = make_rows(seed, spread=1e-4)
    best = head_floor.cross_entropy_floor(x, labels, classes=K, penalty=1e-4)
    duals = []
    for steps in range(8):
        floor = head_floor.cross_entropy_floor(
            x, labels, classes=K, penalty=1e-4, max_steps=steps, tolerance=0.0
        )
        assert floor.dual <= best.primal
        assert floor.primal >= best.dual
        duals.append(floor.dual)
    assert duals == sorted(duals)
    assert duals[0] < 0.9 * best.dual  # early ones are loose, or nothing was tested
    early = head_floor.cross_entropy_floor(x, labels, classes=K, penalty=1e-4, max_steps=1)
    assert not early.converged


def test_the_bias_constraint_is_not_forgotten():
    """Residuals that do not sum to zero give more than the optimum: the correction is needed."""
    x, labels = make_rows(3, offset=0.0)
    penalty = 1e-2
    best = head_floor.cross_entropy_floor(x, labels, classes=K, penalty=penalty)
    onehot = np.eye(K)[labels]
    # The optimum for a bias held at 0: its residuals have X^T A / n = -penalty W but no zero sum.
    uniform = np.full((N, K), 1 / K)
    centred = x - x.mean(axis=0)
    naive = np.log(K) - np.sum((centred.T @ (uniform - onehot) / N) ** 2) / (2 * penalty)
    corrected = head_floor._cross_entropy_dual(centred, uniform, onehot, penalty)
    assert corrected < naive
    assert corrected <= best.primal
    # On features that say nothing the floor is the entropy of the labels, below log k.
    labels = np.array([0] * 9 + [1])
    floor = head_floor.cross_entropy_floor(np.zeros((10, 2)), labels, classes=2, penalty=1.0)
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    np.testing.assert_allclose(floor.dual, entropy, rtol=1e-12)
    assert (
        head_floor._cross_entropy_dual(
            np.zeros((10, 2)), np.full((10, 2), 0.5), np.eye(2)[labels], 1.0
        )
        <= entropy
    )


def test_tight_at_its_own_norm_and_a_floor_at_every_other():
    x, labels = make_rows(4)
    floors = {
        penalty: head_floor.cross_entropy_floor(x, labels, classes=K, penalty=penalty)
        for penalty in (1.0, 1e-1, 1e-2, 1e-3)
    }
    for floor in floors.values():
        norm = float(np.linalg.norm(floor.weights))
        own = cross_entropy(x, labels, floor.weights, floor.bias)
        bound = head_floor.floor_for_norm(floor, norm)
        assert own >= bound
        np.testing.assert_allclose(own, bound, rtol=1e-7)
        for other in floors.values():
            assert own >= head_floor.floor_for_norm(other, norm)
    floor = floors[1e-2]
    values = [head_floor.floor_for_norm(floor, norm) for norm in (0.0, 1.0, 3.0, 1e9, np.inf)]
    assert values == sorted(values, reverse=True)
    assert values[0] == floor.dual
    assert values[-1] == 0.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_separable_rows_fewer_rows_than_features_and_other_dtypes(dtype):
    rng = np.random.default_rng(5)
    x = np.round(100 * rng.normal(size=(12, 30))).astype(dtype)
    labels = np.arange(12) % 3
    previous = np.inf
    for penalty in (1.0, 1e-2, 1e-4, 1e-6):
        floor = head_floor.cross_entropy_floor(x, labels, classes=3, penalty=penalty)
        assert floor.converged
        assert floor.weights.dtype == np.float64
        assert floor.primal < previous
        previous = floor.primal
    assert previous < 1e-5  # separable: the loss goes to zero with the penalty
    # Nothing outside the span of the rows.
    outside = np.linalg.svd(x.astype(float) - x.mean(axis=0))[2][12:]
    np.testing.assert_allclose(outside @ floor.weights, 0, atol=1e-12)


def test_conditioning_does_not_matter_and_float32_is_cast_up():
    # kappa(X^T X) = 1e12 and an attack in float32 would stall; the optimum is found all the same.
    x, labels = make_rows(6, n=300, spread=1e-6)
    floor = head_floor.cross_entropy_floor(
        jnp.asarray(x, jnp.float32), labels, classes=K, penalty=1e-10
    )
    assert floor.converged
    exact = np.asarray(jnp.asarray(x, jnp.float32), np.float64)
    same = head_floor.cross_entropy_floor(exact, labels, classes=K, penalty=1e-10)
    assert floor.dual == same.dual
    assert np.linalg.norm(floor.weights) > 100


def test_classes_without_rows():
    x, labels = make_rows(7)
    dense = head_floor.cross_entropy_floor(x, labels, classes=K, penalty=1e-2)
    sparse = head_floor.cross_entropy_floor(x, 2 * labels, classes=2 * K, penalty=1e-2)
    assert sparse.dual == dense.dual
    assert np.all(sparse.bias[1::2] == -np.inf)
    np.testing.assert_array_equal(sparse.weights[:, 1::2], 0)
    np.testing.assert_array_equal(sparse.weights[:, ::2], dense.weights)
    # Heads of all classes stay above it.
    rng = np.random.default_rng(0)
    for _ in range(20):
        kernel, bias = rng.normal(size=(D, 2 * K)), rng.normal(size=2 * K)
        loss = cross_entropy(x, 2 * labels, kernel, bias)
        assert loss >= head_floor.floor_for_norm(sparse, np.linalg.norm(kernel))
    one = head_floor.cross_entropy_floor(x, np.zeros(N, int), classes=2, penalty=1e-2)
    assert (one.primal, one.dual, one.converged) == (0.0, 0.0, True)


def test_scaling_and_rotation():
    x, labels = make_rows(8)
    base = head_floor.cross_entropy_floor(x, labels, classes=K, penalty=1e-2)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0]
    turned = head_floor.cross_entropy_floor(x @ turn + 5.0, labels, classes=K, penalty=1e-2)
    np.testing.assert_allclose(turned.primal, base.primal, rtol=1e-7)
    scaled = head_floor.cross_entropy_floor(10 * x, labels, classes=K, penalty=1.0)
    np.testing.assert_allclose(scaled.primal, base.primal, rtol=1e-7)


def squared_loss(x, y, weights):
    return np.sum((x @ weights - y) ** 2) / (2 * len(x))


@pytest.mark.parametrize("penalty", [0.0, 1e-6, 1e-2, 10.0])
@pytest.mark.parametrize("columns", [None, 3])
def test_the_squared_floor_is_the_normal_equations(penalty, columns):
    rng = np.random.default_rng(9)
    x, _ = make_rows(9)
    y = rng.normal(size=N if columns is None else (N, columns))
    floor = head_floor.squared_floor(x, y, penalty=penalty)
    expected = np.linalg.solve(x.T @ x / N + penalty * np.eye(D), x.T @ y / N)
    np.testing.assert_allclose(floor.weights, expected, rtol=1e-8, atol=1e-10)
    value = squared_loss(x, y, expected) + penalty * np.sum(expected**2) / 2
    np.testing.assert_allclose(floor.primal, value, rtol=1e-12)
    assert floor.converged
    assert 0 <= floor.gap <= 1e-10 * floor.primal
    assert floor.weights.shape == expected.shape
    assert floor.bias.shape == expected.shape[1:]
    assert floor.leak == 0 if penalty else 0 < floor.leak < 1e-12
    for scale in (0.0, 0.5, 1.0, 1.0 + 1e-9, 2.0):
        head = scale * expected + (scale != 1) * 0.01 * rng.normal(size=expected.shape)
        norm = np.linalg.norm(head)
        assert squared_loss(x, y, head) >= head_floor.floor_for_norm(floor, norm)


def test_it_is_the_optimal_loss_of_a_probe_problem():
    x, labels = make_rows(10)
    problem = attacks.probe_problem(jnp.asarray(x), jnp.asarray(labels), classes=K, penalty=1e-3)
    floor = head_floor.squared_floor(x, np.eye(K)[labels], penalty=1e-3)
    np.testing.assert_allclose(floor.primal, float(problem.optimal_loss), rtol=1e-10)
    with_bias = head_floor.squared_floor(
        np.asarray(attacks.with_constant(jnp.asarray(x))), np.eye(K)[labels], penalty=1e-3
    )
    assert with_bias.primal < floor.primal


def test_a_perfect_fit_has_a_floor_of_zero():
    rng = np.random.default_rng(11)
    x = rng.normal(size=(5, 9))  # n < d
    floor = head_floor.squared_floor(x, rng.normal(size=5))
    # Zero to the rounding of the residuals, which the norm of a head pays for.
    assert 0.0 <= floor.dual < 1e-14
    assert floor.primal < 1e-28
    assert head_floor.floor_for_norm(floor, float(np.linalg.norm(floor.weights))) == 0.0


def test_a_direction_below_the_tolerance_is_paid_for_in_norm():
    """Without penalty: a head may use a direction of 1e-17, at a norm that its bound counts."""
    rng = np.random.default_rng(12)
    left = np.linalg.qr(rng.normal(size=(20, 3)))[0]
    x = left * np.array([1.0, 0.5, 1e-17])
    y = left[:, 2] + 0.1 * rng.normal(size=20)
    floor = head_floor.squared_floor(x, y)
    exact = left.T @ y / np.array([1.0, 0.5, 1e-17])
    loss = squared_loss(x, y, exact)
    assert loss < 0.5 * floor.dual  # far below the dual itself
    assert loss >= head_floor.floor_for_norm(floor, np.linalg.norm(exact))


def test_the_row_fits_the_schema():
    x, labels = make_rows(13)
    soft = head_floor.cross_entropy_floor(x, labels, classes=K, penalty=1e-2)
    hard = head_floor.squared_floor(x, np.eye(K)[labels])
    schema = assessment.SCHEMA["properties"]["certificates"]["items"]
    for floor, norm in ((soft, None), (soft, 1.5), (hard, None), (hard, 2.0)):
        row = head_floor.head_floor_row(floor, norm=norm)
        placed = row | {"model": "none", "task": "harmful", "flops": None}
        jsonschema.validate(json.loads(json.dumps(placed)), schema)
        assert row["name"] == f"head_floor_{floor.loss}"
        assert row["value"] == (
            floor.dual if norm is None else head_floor.floor_for_norm(floor, norm)
        )
        assert "any optimiser" in row["threat_model"]
        assert "frozen features" in row["threat_model"]
    text = head_floor.head_floor_row(soft)["threat_model"]
    assert "0.01/2 |W|^2" in text
    text = head_floor.head_floor_row(soft, norm=1.5)["threat_model"]
    assert "|W| <= 1.5" in text
    assert "any bias" in text


X, Y = np.ones((3, 2)), np.array([0, 1, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"penalty": 0.0}, "separable"),
        ({"penalty": -1.0}, "> 0"),
        ({"penalty": np.nan}, "> 0"),
        ({"labels": np.array([0, 1])}, "labels"),
        ({"labels": np.array([0.0, 1.0, 1.0])}, "integers"),
        ({"labels": np.array([0, 1, 2])}, r"0\.\.1"),
        ({"labels": np.array([0, 1, -1])}, r"0\.\.1"),
        ({"classes": 1}, "classes"),
        ({"features": np.ones(3)}, "features"),
        ({"features": np.full((3, 2), np.nan)}, "NaN"),
    ],
)
def test_the_door_of_the_cross_entropy(change, message):
    fine = {"features": X, "labels": Y, "classes": 2, "penalty": 1.0}
    head_floor.cross_entropy_floor(**fine)
    with pytest.raises(ValueError, match=message):
        head_floor.cross_entropy_floor(**{**fine, **change})


@pytest.mark.parametrize(
    ("features", "targets", "options", "message"),
    [
        (X, np.ones(2), {}, "targets"),
        (X, np.full(3, np.inf), {}, "NaN or inf"),
        (X, np.ones(3), {"penalty": -1.0}, ">= 0"),
        (np.ones((0, 2)), np.ones(0), {}, "features"),
    ],
)
def test_the_door_of_the_squared_loss(features, targets, options, message):
    with pytest.raises(ValueError, match=message):
        head_floor.squared_floor(features, targets, **options)


def test_the_door_of_the_norm():
    floor = head_floor.squared_floor(X, np.ones(3))
    for norm in (-1.0, np.nan):
        with pytest.raises(ValueError, match="norm"):
            head_floor.floor_for_norm(floor, norm)


def test_the_names_of_a_floor():
    expected = ("primal", "dual", "gap", "weights", "penalty", "converged")
    assert head_floor.HeadFloor._fields[:6] == expected
    assert inspect.signature(head_floor.floor_for_norm).parameters.keys() == {"floor", "norm"}
