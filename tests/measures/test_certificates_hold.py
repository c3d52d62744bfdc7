"""Nobody beats a certificate of his class; and whoever is outside of the class does.

Each part has its negative control, an opponent of another class or a certificate made a little too
good, so that a test which compares a thing with itself would be found out.
"""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special
from hypothesis import strategies as st

from jaximm import attacks, data, immunisers, linalg, measures
from jaximm.immunisers.conditioning.limit import limit_theta
from jaximm.measures import certificates, head_floor
from jaximm.measures.conditioning import TaskRows
from jaximm.types import Batch, PairedBatch
from tests import helpers

pytestmark = pytest.mark.heavy

# (a) Krylov floors -------------------------------------------------------------------------------

N, D = 200, 79  # those of the house prices, so that every attacker is compiled once
SPAN_KINDS = ("first-order", "momentum", "krylov", "quasi-newton")
SPAN = [name for name in attacks.REGISTRY if attacks.make_attack(name).kind in SPAN_KINDS]
QUICK = ("gd_best_step", "heavy_ball", "conjugate_gradients")  # the others take a minute to compile
SEEDS = (0, 1)
STEPS, CLOSED_FORM_STEPS = 500, 5_000


def marked(names, quick):
    """Parameters of which all but the quick ones are slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def spectrum(name: str, rng) -> np.ndarray:
    """Eigenvalues of H, descending."""
    return {
        "geometric 1e2": np.geomspace(1, 1e-2, D),
        "geometric 1e6": np.geomspace(1, 1e-6, D),
        "geometric 1e10": np.geomspace(1, 1e-10, D),
        "log-uniform": np.exp(-np.sort(rng.uniform(0, 12, D))),
        "four values": np.repeat([1.0, 0.3, 0.01, 1e-4], [1, 20, 30, 28]),
        "outliers": np.r_[100.0, 10.0, np.linspace(1, 0.5, D - 2)],
        "power law": 1 / np.arange(1, D + 1) ** 2.0,
        "rank 40": np.r_[np.geomspace(1, 1e-4, 40), np.zeros(D - 40)],
    }[name]


SPECTRA = (
    "geometric 1e2",
    "geometric 1e6",
    "geometric 1e10",
    "log-uniform",
    "four values",
    "outliers",
    "power law",
    "rank 40",
)
HOUSE = ("house primary", "house harmful")


@functools.cache
def probe(name: str, penalty: float = 0.0):
    """A probe by name: a spectrum in random axes with a random optimum and noise, or real rows."""
    if name in HOUSE:
        task = getattr(data.load("house_prices"), name.split()[1]).train
        return attacks.probe_problem(jnp.asarray(task.x), jnp.asarray(task.y), penalty=penalty)
    rng = np.random.default_rng(SPECTRA.index(name))
    left = np.linalg.qr(rng.normal(size=(N, D)))[0]
    right = np.linalg.qr(rng.normal(size=(D, D)))[0]
    x = np.sqrt(N) * left * np.sqrt(spectrum(name, rng)) @ right.T
    y = x @ rng.normal(size=D) + 0.1 * rng.normal(size=N)
    return attacks.probe_problem(jnp.asarray(x), jnp.asarray(y), penalty=penalty)


@functools.cache
def trace_of(attacker: str, name: str):
    """Every cell of an attacker's own grid from every start."""
    attack = attacks.make_attack(attacker)
    steps = STEPS if attack.errors_at is None else CLOSED_FORM_STEPS
    return attacks.run_attack(attack, probe(name), steps=steps, seeds=SEEDS)


@functools.cache
def certificate(name: str, seed: int):
    """Floors for TARGETS from the start of a seed, and the least gap after each step."""
    problem = probe(name)
    start = problem.starting_from(attacks.initial_weights(problem, [seed])[0])
    h, c = np.asarray(problem.eigenvalues), np.asarray(start.error_coefficients)
    found = linalg.krylov_certificate(h, c, relative_gap=0.0, max_steps=60)
    return list(certificates.floors(h, c).values()), found.relative_gap


def beaten(attacker: str, name: str) -> list[str]:
    """Where a finished run is below the floor in steps, or below the least gap at some step."""
    trace, found = trace_of(attacker, name), []
    hits, gaps = np.asarray(trace.steps_to_loss_gap), np.asarray(trace.relative_excess_loss)
    for index, seed in enumerate(SEEDS):
        floors, least = certificate(name, seed)
        for cell in range(len(hits)):
            for target, hit, floor in zip(attacks.TARGETS, hits[cell, index], floors, strict=True):
                if 0 <= hit < floor:
                    found.append(f"seed {seed}, cell {cell}: {hit} < {floor} steps to {target}")
            # Below 1e-10 the runner stops, and what it measures is rounding of its own.
            for step, gap in zip(np.asarray(trace.step), gaps[cell, index], strict=True):
                if step < len(least) and least[step] > 1e-10 and gap < least[step] * (1 - 1e-6):
                    found.append(f"seed {seed}, cell {cell}: {gap} < {least[step]} at {step}")
    return found


def test_the_class_is_there():
    assert {"gd", "gd_best_step", "gd_line_search", "heavy_ball", "nesterov"} < set(SPAN)
    assert {"conjugate_gradients", "lbfgs"} < set(SPAN)
    assert not {"adam", "ridge", "whitened_gd", "jacobi_gd"} & set(SPAN)
    # The runs below must reach the targets often enough to say something.
    assert all(certificate(name, 0)[0][1] >= 2 for name in (*SPECTRA, *HOUSE) if "rank" not in name)


@pytest.mark.parametrize("attacker", marked(SPAN, QUICK))
def test_no_attacker_of_the_class_is_below_the_krylov_floor(attacker):
    reached = 0
    for name in (*SPECTRA, *HOUSE):
        assert beaten(attacker, name) == [], (attacker, name)
        reached += int(np.sum(np.asarray(trace_of(attacker, name).steps_to_loss_gap) >= 0))
    assert reached > 20


def test_the_floor_is_met_so_a_floor_of_one_more_step_would_be_beaten():
    met = 0
    for name in (*SPECTRA, *HOUSE):
        hits = np.asarray(trace_of("conjugate_gradients", name).steps_to_loss_gap)[0]
        floors = np.array([certificate(name, seed)[0] for seed in SEEDS])
        met += int(np.sum(hits == floors))
    assert met >= 0.9 * hits.size * len((*SPECTRA, *HOUSE))


@pytest.mark.parametrize("attacker", marked(["ridge", "whitened_gd"], ["whitened_gd"]))
def test_whoever_solves_is_below_the_krylov_floor(attacker):
    for name in ("geometric 1e6", "log-uniform", *HOUSE):
        assert beaten(attacker, name) != [], (attacker, name)


def test_scaling_the_axes_is_below_the_krylov_floor_where_they_are_to_blame():
    x = np.sqrt(N) * np.eye(N)[:, :D] * np.sqrt(np.geomspace(1, 1e-6, D))
    problem = attacks.probe_problem(jnp.asarray(x), jnp.asarray(x @ np.ones(D)))
    trace = attacks.run_attack(attacks.make_attack("jacobi_gd"), problem, steps=50)
    floors = certificates.floors(
        np.asarray(problem.eigenvalues), np.asarray(problem.error_coefficients)
    )
    assert np.min(np.asarray(trace.steps_to_loss_gap)[1, 0]) == 1 < floors["1e-1"]


def test_a_floor_is_of_its_own_start():
    """The certificate is of w = 0: from a random head the same attacker may need fewer steps."""
    floors = {seed: certificate("house harmful", seed)[0] for seed in SEEDS}
    hits = np.asarray(trace_of("conjugate_gradients", "house harmful").steps_to_loss_gap)[0]
    assert hits.tolist() == [floors[0], floors[1]]
    assert floors[1][1] < floors[0][1]
    assert "from w = 0" in certificates.THREAT_MODEL


@pytest.mark.parametrize("penalty", [1e-4, 1e-1])
def test_with_weight_decay(penalty):
    problem = probe("geometric 1e6", penalty)
    floors = certificates.floors(
        np.asarray(problem.eigenvalues), np.asarray(problem.error_coefficients)
    )
    for attacker in QUICK[1:]:
        trace = attacks.run_attack(attacks.make_attack(attacker), problem, steps=STEPS, seeds=SEEDS)
        for hits in np.asarray(trace.steps_to_loss_gap)[:, 0]:
            assert all(
                hit < 0 or hit >= floor for hit, floor in zip(hits, floors.values(), strict=True)
            )


@st.composite
def schedules(draw):
    """A spectrum, an error, and a schedule of steps and momenta of any size."""
    size = draw(st.integers(2, 8))
    log_h = draw(st.lists(st.floats(-6, 0), min_size=size, max_size=size))
    c = draw(st.lists(st.floats(-3, 3), min_size=size, max_size=size))
    length = draw(st.integers(1, 6))
    steps = draw(st.lists(st.floats(-2, 1e3), min_size=length, max_size=length))
    momenta = draw(st.lists(st.floats(-1, 2), min_size=length, max_size=length))
    return np.exp(log_h), np.array(c), steps, momenta


@hypothesis.given(schedules())
@hypothesis.settings(max_examples=200)
def test_no_schedule_of_steps_and_momenta_is_below_the_least_gap(drawn):
    h, c, steps, momenta = drawn
    hypothesis.assume(np.sum(h * c**2) > 1e-12)
    least = linalg.krylov_certificate(h, c, relative_gap=0.0).relative_gap
    error, previous = c.astype(np.longdouble), c.astype(np.longdouble)
    for t, (step, momentum) in enumerate(zip(steps, momenta, strict=True), 1):
        error, previous = (
            error - step * h * error + momentum * (error - previous),
            error,
        )
        gap = np.sum(h * error**2) / np.sum(h * c**2)
        assert gap >= least[min(t, len(least) - 1)]


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_the_best_schedule_of_plain_descent_meets_the_least_gap(steps):
    """Descent with the reciprocals of the Ritz values: "any schedule" is not an idle class."""
    rng = np.random.default_rng(0)
    h, c = np.geomspace(1, 1e-3, 30), rng.normal(size=30)
    basis = np.linalg.qr(np.stack([h ** (i + 1.0) * c for i in range(steps)], axis=1))[0]
    # Residuals of conjugate gradients vanish at the Ritz values of H on span{g, H g, ...}.
    ritz = np.linalg.eigvalsh(basis.T @ (h[:, None] * basis))
    error = c.copy()
    for value in ritz:
        error = error - h * error / value
    gap = np.sum(h * error**2) / np.sum(h * c**2)
    least = linalg.krylov_certificate(h, c, relative_gap=0.0).relative_gap[steps]
    np.testing.assert_allclose(gap, least, rtol=1e-6)
    assert gap >= least


# (b) Floors of convex heads ----------------------------------------------------------------------

ROWS, WIDTH, CLASSES = 90, 12, 3
TASKS = ("noisy", "separable", "immunised", "few rows of each class")
PENALTIES = tuple(10.0**e for e in range(-7, 2))
OPTIMISERS = {
    "adam": (optax.adam, (1e-2, 1e-1, 1.0)),
    "sgd": (optax.sgd, (1e-2, 1.0, 10.0)),
    "lbfgs": (optax.lbfgs, (0.1, 1.0)),
}


@functools.cache
def rows(name: str):
    """Features [n, d] and labels; "immunised" has kappa(X^T X) = 1e8."""
    rng = np.random.default_rng(TASKS.index(name))
    spread = 1e-4 if name == "immunised" else 0.3
    x = rng.normal(size=(ROWS, WIDTH)) * np.geomspace(1, spread, WIDTH)
    noise = 0.0 if name == "separable" else 1.0
    scores = x @ rng.normal(size=(WIDTH, CLASSES)) + noise * rng.normal(size=(ROWS, CLASSES))
    labels = np.argmax(scores, axis=1)
    if name == "few rows of each class":
        labels = np.where(np.arange(ROWS) < 4, np.arange(ROWS) % 2 + 1, 0)
    return x @ np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0] + 1.0, labels


@functools.cache
def head_floors(name: str):
    x, labels = rows(name)
    found = [
        head_floor.cross_entropy_floor(x, labels, classes=CLASSES, penalty=penalty)
        for penalty in PENALTIES
    ]
    assert all(floor.converged for floor in found)
    return found


def floor_at(name: str, norm: float | np.floating) -> float:
    """The best floor of heads of that norm."""
    return max(head_floor.floor_for_norm(floor, norm) for floor in head_floors(name))


def cross_entropy(x, labels, kernel, bias) -> float:
    scores = x @ kernel + bias
    return np.mean(scipy.special.logsumexp(scores, axis=1) - scores[np.arange(len(x)), labels])


@functools.partial(jax.jit, static_argnames=("optimiser", "steps"))
def train(optimiser, rate, x, labels, *, steps):
    """Cross-entropy and kernel norm of a head after every step."""
    transform = OPTIMISERS[optimiser][0](rate)

    def loss(head):
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(x @ head[0] + head[1][None, :], labels)
        )

    def step(carry, _):
        head, state = carry
        value, gradient = jax.value_and_grad(loss)(head)
        updates, state = transform.update(
            gradient, state, head, value=value, grad=gradient, value_fn=loss
        )
        return (optax.apply_updates(head, updates), state), (value, jnp.linalg.norm(head[0]))

    transform = optax.with_extra_args_support(transform)
    head = jnp.zeros((WIDTH, CLASSES)), jnp.zeros(CLASSES)
    (head, _), path = jax.lax.scan(step, (head, transform.init(head)), length=steps)
    return head, path


@pytest.mark.parametrize("optimiser", marked(OPTIMISERS, ("adam", "sgd")))
def test_no_trained_head_is_below_the_floor_of_its_norm(optimiser):
    closest = np.inf
    for name in TASKS:
        x, labels = rows(name)
        for rate in OPTIMISERS[optimiser][1]:
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                head, (losses, norms) = train(
                    optimiser, rate, jnp.asarray(x), jnp.asarray(labels), steps=300
                )
            for loss, norm in zip(np.asarray(losses), np.asarray(norms), strict=True):
                assert loss >= floor_at(name, norm) * (1 - 1e-13), (name, rate)
                if floor_at(name, norm) > 0:
                    closest = min(closest, loss / floor_at(name, norm))
            kernel, bias = (np.asarray(part) for part in head)
            loss = cross_entropy(x, labels, kernel, bias)
            assert loss >= floor_at(name, np.linalg.norm(kernel)) * (1 - 1e-13)
    assert closest < 1.02  # some optimiser comes near: a floor 2 % higher would be beaten


@hypothesis.given(
    name=st.sampled_from(TASKS),
    index=st.integers(0, len(PENALTIES) - 1),
    log_size=st.floats(-9, 2),
    scale=st.floats(0, 4),
    seed=st.integers(0, 2**16),
)
@hypothesis.settings(max_examples=150)
def test_no_head_near_or_far_is_below_the_floor_of_its_norm(name, index, log_size, scale, seed):
    x, labels = rows(name)
    best = head_floors(name)[index]
    rng = np.random.default_rng(seed)
    kernel = scale * best.weights + 10.0**log_size * rng.normal(size=(WIDTH, CLASSES))
    bias = best.bias + 10.0**log_size * rng.normal(size=CLASSES)
    loss = cross_entropy(x, labels, kernel, bias)
    assert loss >= floor_at(name, np.linalg.norm(kernel)) - 1e-13


@pytest.mark.parametrize("name", TASKS)
def test_a_floor_a_little_too_high_is_beaten(name):
    x, labels = rows(name)
    for floor in head_floors(name):
        norm = np.linalg.norm(floor.weights)
        loss = cross_entropy(x, labels, floor.weights, floor.bias)
        assert loss >= head_floor.floor_for_norm(floor, norm) - 1e-13
        assert loss < head_floor.floor_for_norm(floor, norm) * 1.0001 + 1e-9
        if norm > 0.1:  # and a head that under-reports its norm passes
            assert loss < head_floor.floor_for_norm(floor, norm / 2)


def test_other_features_are_another_class():
    """An attacker who moves the features is not held by the floor of the frozen ones."""
    x, labels = rows("noisy")
    moved = np.concatenate([x, np.eye(CLASSES)[labels]], axis=1)
    best = head_floor.cross_entropy_floor(moved, labels, classes=CLASSES, penalty=1e-3)
    loss = cross_entropy(moved, labels, best.weights, best.bias)
    assert loss < 0.5 * floor_at("noisy", np.linalg.norm(best.weights))


@pytest.mark.parametrize(
    "attackers", [(*QUICK, "whitened_gd"), pytest.param((*SPAN, "ridge"), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["geometric 1e6", "rank 40", *HOUSE])
def test_no_probe_is_below_the_floor_of_the_squared_loss(name, attackers):
    """Solvers included: this floor is for every attacker."""
    problem = probe(name)
    x, y = np.asarray(problem.features), np.asarray(problem.targets)
    floors = [head_floor.squared_floor(x, y, penalty=p) for p in (0.0, 1e-6, 1e-3, 1e-1)]
    closest = np.inf
    for attacker in attackers:
        weights = np.asarray(trace_of(attacker, name).weights).reshape(-1, D)
        for head in weights[np.all(np.isfinite(weights), axis=1)]:
            with np.errstate(over="ignore"):
                loss, norm = np.sum((x @ head - y) ** 2) / (2 * len(x)), np.linalg.norm(head)
            bounds = [head_floor.floor_for_norm(floor, norm) for floor in floors]
            assert loss >= max(bounds), (attacker, loss, bounds)
            closest = min(closest, loss / floors[0].dual)
    assert closest < 1 + 1e-3


# (c) The limit of RIR ----------------------------------------------------------------------------

PAIRS = ("random", "rank deficient", "house prices")


@functools.cache
def tasks(name: str):
    """Both tasks' rows with the measure's damping."""
    if name == "house prices":
        pair = data.load("house_prices")
        inputs = [pair.primary.train.x, pair.harmful.train.x]
    else:
        rng = np.random.default_rng(PAIRS.index(name))
        inputs = []
        for _ in range(2):  # of one shape, so that the measure is compiled once
            x = rng.normal(size=(40, 9)) * np.geomspace(1, 0.05, 9)[rng.permutation(9)]
            x = x @ np.linalg.qr(rng.normal(size=(9, 9)))[0]
            if name == "rank deficient":
                x[:, 4], x[:, 5] = 0.0, x[:, 6]
            inputs.append(x)
    return [
        TaskRows(jnp.asarray(x), immunisers.relative_damping(jnp.asarray(x), 1e-3)) for x in inputs
    ]


@functools.cache
def limit_of(name: str) -> float:
    return float(measures.log_rir_limit(*tasks(name)))


@functools.cache
def before(name: str):
    """Both damped condition numbers of the raw inputs."""
    d = tasks(name)[0].x.shape[1]
    return [measures.kappas(task, jnp.eye(d)).damped for task in tasks(name)]


def excess(name: str, theta) -> float:
    """log RIR over its limit, on the damped footing; its lower end must not be above the limit."""
    primary, harmful = (measures.kappas(task, jnp.asarray(theta)).damped for task in tasks(name))
    found = linalg.relative_immunisation(
        harmful_after=harmful,
        harmful_before=before(name)[1],
        primary_after=primary,
        primary_before=before(name)[0],
    )
    assert float(found.rir.lower) <= limit_of(name)
    return float(found.rir.log_ratio) - limit_of(name)


def grams(name: str):
    return [np.asarray(task.x.T @ task.x) / len(task.x) for task in tasks(name)]


def damped_grams(name: str):
    return [
        gram + float(task.damping) * np.eye(len(gram))
        for gram, task in zip(grams(name), tasks(name), strict=True)
    ]


def inverse_root(gram):
    values, vectors = np.linalg.eigh(gram)
    return vectors / np.sqrt(values) @ vectors.T


@hypothesis.given(
    name=st.sampled_from(PAIRS[:2]),
    kind=st.sampled_from(["gaussian", "diagonal", "rotated", "whitened", "limit"]),
    decades=st.floats(0, 4),
    seed=st.integers(0, 2**16),
)
@hypothesis.settings(max_examples=30)
def test_no_linear_map_is_above_the_limit(name, kind, decades, seed):
    rng = np.random.default_rng(seed)
    d = tasks(name)[0].x.shape[1]
    scales = np.diag(10.0 ** rng.uniform(-decades, 0, d))
    turn, other = (np.linalg.qr(rng.normal(size=(d, d)))[0] for _ in range(2))
    k_p, k_h = damped_grams(name)
    theta = {
        "gaussian": lambda: rng.normal(size=(d, d)) / np.sqrt(d),
        "diagonal": lambda: scales,
        "rotated": lambda: turn @ scales @ other,
        "whitened": lambda: inverse_root(k_p if seed % 2 else k_h) @ turn @ scales,
        "limit": lambda: np.asarray(limit_backbone(name, seed % 5 / 4)) @ scales,
    }[kind]()
    hypothesis.assume(np.linalg.cond(theta) < 1e7)
    assert excess(name, theta) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_no_linear_map_of_the_house_prices_is_above_the_limit(seed):
    name, rng = "house prices", np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(D, D)))[0]
    scales = 10.0 ** rng.uniform(-3, 0, D)
    for theta in (turn, np.diag(scales), inverse_root(damped_grams(name)[seed % 2]) * scales):
        assert excess(name, theta) <= 1e-6
    if seed < 3:
        turned = np.asarray(limit_backbone(name, seed / 2)) @ turn
        assert excess(name, turned) <= 1e-6


@functools.cache
def limit_backbone(name: str, t: float):
    return limit_theta(*(jnp.asarray(gram) for gram in grams(name)), t=t, rotate=False)


@pytest.mark.parametrize("name", marked(PAIRS, PAIRS[:2]))
def test_the_limit_is_met_for_every_t_so_a_lower_one_would_be_beaten(name):
    assert limit_of(name) > 1
    for t in (0.0, 0.25, 0.5, 1.0):
        assert abs(excess(name, limit_backbone(name, t))) < 1e-9
    # Any rotation after whitening, too: kappa(H_P) = 1 and kappa(H_H) = kappa(M).
    whitened = inverse_root(damped_grams(name)[0])
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=whitened.shape))[0]
    assert abs(excess(name, whitened)) < 1e-8
    assert abs(excess(name, whitened @ turn)) < 1e-8


@pytest.mark.parametrize("name", marked(PAIRS, PAIRS[:2]))
def test_a_map_at_the_edge_of_rounding_is_not_above_the_limit_by_its_interval(name):
    rng = np.random.default_rng(1)
    d = tasks(name)[0].x.shape[1]
    for decades in (8, 12, 15, 20):
        scales = 10.0 ** -np.linspace(0, decades, d)
        for theta in (np.diag(scales), np.asarray(limit_backbone(name, 0.0)) * scales):
            excess(name, theta)  # asserts the lower end
            excess(name, theta[rng.permutation(d)])


def test_no_search_finds_a_map_above_the_limit():
    """Ascent of log RIR itself, from several starts: it ends at the limit, from below."""
    k_p, k_h = damped_grams("random")
    d = len(k_p)
    base_log = np.log(np.linalg.cond(k_h)) - np.log(np.linalg.cond(k_p))

    def objective(flat):
        theta = flat.reshape(d, d)
        value, gradient = base_log, np.zeros((d, d))
        for sign, gram in ((-1, k_h), (1, k_p)):
            values, vectors = np.linalg.eigh(theta.T @ gram @ theta)
            value += sign * np.log(values[-1] / values[0])
            for index, part in ((-1, sign), (0, -sign)):
                v = vectors[:, index]
                gradient += part * 2 * np.outer(gram @ theta @ v, v) / values[index]
        return value, gradient.ravel()

    best = -np.inf
    for seed in range(3):
        start = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
        found = scipy.optimize.minimize(
            objective, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 3000}
        )
        over = excess("random", found.x.reshape(d, d))
        assert over <= 1e-6
        best = max(best, over)
    assert best > -0.3 * limit_of("random")  # the search is a serious one


METHODS = sorted(set(helpers.METHODS_OF_NUMBERS) - {"erase"})  # an erasure is not invertible


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_no_method_is_above_the_limit(method):
    primary, harmful = (task.x for task in tasks("random"))
    batch = PairedBatch(
        Batch(primary, primary @ jnp.ones(9)), Batch(harmful, harmful @ jnp.ones(9))
    )
    problem = immunisers.linear_problem(
        batch,
        damping_primary=float(tasks("random")[0].damping),
        damping_harmful=float(tasks("random")[1].damping),
    )
    config = immunisers.make_config(method)
    immuniser = immunisers.make_immuniser(method, config, problem)
    key = jax.random.key(0)
    state = immuniser.init(immunisers.init_params(9, None), key)
    update = jax.jit(immuniser.update)
    for step in range(1 if method == "limit" else 60):
        state, _ = update(state, batch, jax.random.fold_in(key, step))
    over = excess("random", immuniser.finish(state).backbone[immunisers.THETA])
    assert over <= 1e-6
    if method == "limit":
        assert over > -1e-6


def test_a_map_of_its_own_for_each_task_is_above_the_limit():
    name = "random"
    k_p, k_h = damped_grams(name)
    start = np.log(np.linalg.cond(k_h)) - np.log(np.linalg.cond(k_p))
    harmful = np.diag(np.geomspace(1, 1e-6, 9))  # used for the harmful task alone
    whitened = inverse_root(k_p)
    after = np.log(np.linalg.cond(harmful @ k_h @ harmful))
    after -= np.log(np.linalg.cond(whitened @ k_p @ whitened))
    assert after - start > limit_of(name) + 1


def conditioning(primary, harmful, theta):
    """Rows by footing of a linear backbone, the identity before."""
    before, after = (
        measures.Tasks(measures.kappas(primary, kernel), measures.kappas(harmful, kernel))
        for kernel in (None, theta)
    )
    return measures.conditioning(
        before,
        after,
        limit=float(measures.log_rir_limit(primary, harmful)),
        dampings=(primary.damping, harmful.damping),
        dtype=str(theta.dtype),
    ).rows


@pytest.mark.slow
def test_the_limit_of_one_footing_is_not_that_of_another():
    """On undamped kappas of rank-deficient rows the damped limit is passed: the row says damped."""
    theta = limit_backbone("rank deficient", 0.0)
    primary, harmful = tasks("rank deficient")
    rows_found = conditioning(primary, harmful, jnp.asarray(theta))
    limits = {footing: row["log_rir_limit"] for footing, row in rows_found.items()}
    assert limits == {
        "damped": limit_of("rank deficient"),
        "pseudo_inverse": None,
        "reference": None,
    }
    scales = np.geomspace(1, 1e-5, 9)
    x_p, x_h = (
        np.linalg.qr(rng.normal(size=(40, 9)))[0]
        * scales
        @ np.linalg.qr(rng.normal(size=(9, 9)))[0]
        for rng in map(np.random.default_rng, (0, 1))
    )
    primary, harmful = (TaskRows(jnp.asarray(x), jnp.asarray(1e-3)) for x in (x_p, x_h))
    whitening = np.linalg.pinv(x_p) @ np.linalg.qr(x_p)[0]
    row = conditioning(primary, harmful, jnp.asarray(whitening))
    assert row["pseudo_inverse"]["log_rir"] > row["damped"]["log_rir_limit"] + 1
    assert row["damped"]["log_rir"] <= row["damped"]["log_rir_limit"] + 1e-6
