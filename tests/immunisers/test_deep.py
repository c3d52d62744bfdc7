"""The shared deep update and every method's penalty on it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import thinned

from jaximm import immunisers, regularisers
from jaximm.immunisers import ProbeParams, Problem, init_head
from jaximm.immunisers.conditioning.balanced_gap import BalancedGapConfig
from jaximm.immunisers.conditioning.balanced_gap import gap_penalty as balanced_penalty
from jaximm.immunisers.conditioning.condition_gap import ConditionGapConfig, gap_penalty
from jaximm.types import Batch, Head, PairedBatch

pytestmark = pytest.mark.heavy

D_IN, HIDDEN, D, CLASSES, HARMFUL = 6, 9, 5, 3, 4
TRAINED = {
    "condition_gap": {"primary_weight": 0.01, "harmful_weight": 0.5},
    "ill_only": {"harmful_weight": 0.5},
    "imma": {"weight": 0.2},
    "direct_kappa": {"weight": 0.1},
    "balanced_gap": {"weight": 0.1, "budget": 0.0},
}


def features_fn(params, x):
    return jnp.tanh(x @ params["layers.0.kernel"]) @ params["layers.1.kernel"]


def sites_fn(params, x):
    hidden = jnp.tanh(x @ params["layers.0.kernel"])
    return {"features": hidden @ params["layers.1.kernel"], "layers.1": hidden}


def problem(**fields):
    return Problem(
        **{
            "features_fn": features_fn,
            "width": D,
            "classes": CLASSES,
            "harmful_classes": HARMFUL,
            "optimiser": optax.sgd(0.05),
            "harmful_head": Head(jnp.eye(D, HARMFUL), jnp.zeros(HARMFUL)),
            **fields,
        }
    )


def start(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    backbone = {
        "layers.0.kernel": jax.random.normal(keys[0], (D_IN, HIDDEN)) / D_IN**0.5,
        "layers.1.kernel": jax.random.normal(keys[1], (HIDDEN, D)) / HIDDEN**0.5,
    }
    head = init_head(D, CLASSES, jnp.float64)
    kernel = jax.random.normal(keys[2], (D, CLASSES)) * 0.3
    return ProbeParams(backbone, head._replace(kernel=kernel))


def batch(n_primary=16, n_harmful=24, seed=1):
    keys = jax.random.split(jax.random.key(seed), 4)
    return PairedBatch(
        Batch(
            jax.random.normal(keys[0], (n_primary, D_IN)),
            jax.random.randint(keys[1], (n_primary,), 0, CLASSES),
        ),
        Batch(
            jax.random.normal(keys[2], (n_harmful, D_IN)) + 1,
            jax.random.randint(keys[3], (n_harmful,), 0, HARMFUL),
        ),
    )


def make(name, one=None):
    config = immunisers.make_config(name, **TRAINED.get(name, {}))
    return immunisers.make_immuniser(name, config, problem() if one is None else one)


def run(immuniser, steps=3, params=None, wrap=jax.jit):
    key = jax.random.key(0)
    state = immuniser.init(start() if params is None else params, key)
    update = wrap(immuniser.update)
    for step in range(steps):
        state, info = update(state, batch(seed=step), key)
    return state, info


def test_an_update_is_the_gradient_of_the_stated_objective():
    weights = {"primary_weight": 0.01, "harmful_weight": 0.5}
    rows, params = batch(), start()

    def objective(params):
        primary = features_fn(params.backbone, rows.primary.x)
        harmful = features_fn(params.backbone, rows.harmful.x)
        logits = primary @ params.head.kernel + params.head.bias[None, :]
        targets = 0.9 * jax.nn.one_hot(rows.primary.y, CLASSES) + 0.1 / CLASSES
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        h_primary = primary.T @ primary / primary.shape[0]
        h_harmful = harmful.T @ harmful / harmful.shape[0]
        h_primary /= jax.lax.stop_gradient(jnp.trace(h_primary) / D)
        h_harmful /= jax.lax.stop_gradient(jnp.trace(h_harmful) / D)
        return (
            loss
            + weights["primary_weight"] * regularisers.well_conditioning(h_primary)
            + weights["harmful_weight"] * regularisers.ill_conditioning(h_harmful)
        )

    method = immunisers.make_immuniser(
        "condition_gap", ConditionGapConfig(**weights), problem(optimiser=optax.sgd(1.0))
    )
    key = jax.random.key(0)
    state, info = jax.jit(method.update)(method.init(params, key), rows, key)
    value, slope = jax.jit(jax.value_and_grad(objective))(params)
    expected = jax.tree.map(lambda p, g: p - g, params, slope)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-10, atol=1e-12)
    assert float(info.task_loss + info.penalty) == pytest.approx(float(value), rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", thinned(sorted(TRAINED)))
def test_micro_batches_give_the_same_update(name):
    whole, _ = run(make(name))
    parts, _ = run(make(name, problem(accumulate=4)))
    chex.assert_trees_all_close(whole.params, parts.params, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", thinned(sorted(TRAINED), keep=3))
def test_every_penalty_moves_what_it_is_for(name):
    """A penalty alone, small steps on one batch: its own objective falls."""
    config = immunisers.make_config(name, **TRAINED[name])
    method = immunisers.make_immuniser(name, config, problem(optimiser=optax.adam(1e-3)))
    rows, key = batch(), jax.random.key(0)
    state = method.init(start(), key)
    update = jax.jit(method.update)
    penalties = []
    for _ in range(40):
        state, info = update(state, rows, key)
        penalties.append(float(info.penalty))

    def log_kappa(params, x):
        values = np.linalg.svd(np.asarray(features_fn(params, x)), compute_uv=False)
        return 2 * np.log(values[0] / values[-1])

    before, after = start().backbone, state.params.backbone
    harmful = log_kappa(after, rows.harmful.x) - log_kappa(before, rows.harmful.x)
    primary = log_kappa(after, rows.primary.x) - log_kappa(before, rows.primary.x)
    if name != "imma":
        assert harmful - primary > 0.01
    if name in ("condition_gap", "ill_only", "direct_kappa"):
        assert penalties[-1] < penalties[0]


def test_imma_raises_the_adapted_harmful_loss_up_to_its_ceiling():
    config = immunisers.make_config("imma", weight=3.0, adapter_steps=1)
    one = problem(optimiser=optax.sgd(0.3), features_fn=lambda p, x: features_fn(p, x))
    method = immunisers.make_immuniser("imma", config, one)
    rows, key = batch(), jax.random.key(0)
    state, update = method.init(start(), key), jax.jit(method.update)
    losses = []
    for _ in range(200):
        state, info = update(state, rows, key)
        losses.append(-float(info.penalty) / 3.0)
    assert losses[-1] > losses[5]
    assert max(losses) <= 2 * np.log(HARMFUL) + 1e-9


def test_no_weights_train_the_primary_task_alone():
    assert gap_penalty(ConditionGapConfig(primary_weight=0, harmful_weight=0)) is None
    config = ConditionGapConfig(primary_weight=0, harmful_weight=0)
    method = immunisers.make_immuniser("condition_gap", config, problem())
    _, info = run(method, steps=50)
    assert float(info.penalty) == 0
    key = jax.random.key(0)
    first = jax.jit(method.update)(method.init(start(), key), batch(seed=49), key)[1]
    assert float(info.task_loss) < float(first.task_loss)


@pytest.mark.slow
def test_balanced_gap_takes_the_primary_side_only_over_its_budget():
    features = PairedBatch(*(Batch(rows.x, rows.y) for rows in batch()))
    for budget, moved in ((50.0, "harmful"), (-50.0, "primary")):
        penalty = balanced_penalty(BalancedGapConfig(budget=budget))
        slopes = jax.grad(
            lambda primary, harmful, penalty=penalty: penalty(
                PairedBatch(Batch(primary, None), Batch(harmful, None)), jnp.asarray(jnp.nan)
            )[0],
            argnums=(0, 1),
        )(features.primary.x, features.harmful.x)
        sizes = {
            "primary": float(jnp.abs(slopes[0]).max()),
            "harmful": float(jnp.abs(slopes[1]).max()),
        }
        other = "primary" if moved == "harmful" else "harmful"
        assert sizes[moved] > 1e-4
        assert sizes[other] == 0


@pytest.mark.slow
def test_sites_average_their_penalties():
    one = problem(sites_fn=sites_fn, optimiser=optax.sgd(1.0), site_weights={"layers.1": 3.0})
    rows, key, params = batch(), jax.random.key(0), start()
    config = ConditionGapConfig(primary_weight=0.01, harmful_weight=0.5)
    method = immunisers.make_immuniser("condition_gap", config, one)
    _, info = jax.jit(method.update)(method.init(params, key), rows, key)
    penalty = jax.jit(lambda pair: gap_penalty(config)(pair, None)[0])
    parts = {}
    for name in ("features", "layers.1"):
        pair = [sites_fn(params.backbone, task.x)[name] for task in rows]
        parts[name] = float(penalty(PairedBatch(*(Batch(x, None) for x in pair))))
    expected = (parts["features"] + 3 * parts["layers.1"]) / 4
    assert float(info.penalty) == pytest.approx(expected, rel=1e-10)
    assert abs(parts["features"] - parts["layers.1"]) > 1e-6


def test_limit_on_features_keeps_the_logits_and_reaches_the_limit():
    rows, params, key = batch(64, 80), start(), jax.random.key(0)
    config = immunisers.make_config("limit", t=1.0, damping=1e-9, rotate=False)
    method = immunisers.make_immuniser("limit", config, problem())
    state, _ = jax.jit(method.update)(method.init(params, key), rows, key)
    found = method.finish(state)
    features = {task: features_fn(params.backbone, getattr(rows, task).x) for task in rows._fields}
    moved = {task: features[task] @ found.backbone["neck.kernel"] for task in features}
    before = features["primary"] @ params.head.kernel + params.head.bias[None, :]
    after = moved["primary"] @ found.head.kernel + found.head.bias[None, :]
    np.testing.assert_allclose(after, before, rtol=1e-7, atol=1e-9)

    def log_kappa(x):
        values = np.linalg.svd(np.asarray(x), compute_uv=False)
        return 2 * np.log(values[0] / values[-1])

    log_rir = (log_kappa(moved["harmful"]) - log_kappa(features["harmful"])) - (
        log_kappa(moved["primary"]) - log_kappa(features["primary"])
    )
    k_primary, k_harmful = (np.asarray(x.T @ x / x.shape[0]) for x in features.values())
    root = np.linalg.cholesky(np.linalg.inv(k_primary))
    values = np.linalg.eigvalsh(root.T @ k_harmful @ root)
    limit = np.log(values[-1] / values[0]) + log_kappa(features["primary"])
    assert log_rir == pytest.approx(limit - log_kappa(features["harmful"]), rel=1e-5)


@pytest.mark.slow
def test_limit_streams_like_one_batch():
    # Without the rotation: at t = 0 it breaks exact ties by the last digit of the Gram matrices.
    config = immunisers.make_config("limit", rotate=False)
    method = immunisers.make_immuniser("limit", config, problem())
    key, rows = jax.random.key(0), batch(64, 80)
    whole = method.finish(method.update(method.init(start(), key), rows, key)[0])
    state = method.init(start(), key)
    for part in range(4):
        piece = PairedBatch(
            *(
                Batch(*(leaf.reshape(4, -1, *leaf.shape[1:])[part] for leaf in task))
                for task in rows
            )
        )
        state, _ = method.update(state, piece, key)
    streamed = method.finish(state).backbone["neck.kernel"]
    theta = whole.backbone["neck.kernel"]
    np.testing.assert_allclose(streamed, theta, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"accumulate": 0}, "accumulate"),
        ({"classes": 0}, "classes"),
    ],
)
def test_a_bad_problem_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        problem(**fields)


def test_a_bad_start_is_refused():
    method = make("condition_gap")
    with pytest.raises(ValueError, match="kernel must be"):
        method.init(ProbeParams(start().backbone, init_head(D + 1, CLASSES)), jax.random.key(0))
    with pytest.raises(ValueError, match="starts from ProbeParams"):
        method.init(ProbeParams(start().backbone, jnp.zeros(D)), jax.random.key(0))
    with pytest.raises(ValueError, match="do not divide"):
        run(make("condition_gap", problem(accumulate=3)))


def test_info_is_of_the_state_before():
    _, info = run(make("condition_gap"), steps=1)
    rows, task = batch(seed=0).primary, problem().primary
    outputs = task.outputs(features_fn(start().backbone, rows.x), start().head)
    loss = task.loss(outputs, rows.y)
    accuracy = np.mean(np.argmax(np.asarray(outputs), axis=1) == np.asarray(rows.y))
    assert float(info.task_loss) == pytest.approx(float(loss))
    assert float(info.accuracy) == pytest.approx(float(accuracy))
