"""AntiDote: its formula, its two players, and on which models it may play."""

import functools

import chex
import jax
import jax.numpy as jnp
import language
import numpy as np
import optax
import pytest

from jaximm.immunisers import ProbeParams, Problem, make_config, make_immuniser
from jaximm.immunisers.adversarial.antidote import Adversary, Attack, Batches, margins
from jaximm.immunisers.language import language_problem
from jaximm.models import llama
from jaximm.models.adapters.lora import merged
from jaximm.types import Batch, Head, PairedBatch

pytestmark = pytest.mark.heavy

CLASSES, SAFE, ROWS, BLOCK = 4, 3, 12, 4
KEY = jax.random.key(0)
SMALL = {"block": BLOCK, "width": 8, "rank": 2, "rows": 8, "steps": 8, "adversary_rate": 3e-2}
WEIGHTS = {"beta": 0.7, "clip": 4.0, "anchor": 0.6, "task_weight": 0.9, "keep_weight": 0.2}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


PARAMS = ProbeParams(
    {"0.kernel": normal(0, 5, 6), "0.bias": normal(1, 6), "1.kernel": normal(2, 6, 4)},
    Head(normal(3, 4, CLASSES), normal(4, CLASSES)),
)
PRIMARY = Batch(normal(5, ROWS, 5), jnp.arange(ROWS) % CLASSES)
HARMFUL = Batch(normal(6, ROWS, 5), jnp.arange(ROWS) % SAFE)
REFUSALS = HARMFUL._replace(y=jnp.full(ROWS, SAFE))


class Game(Batches):
    """The batches of a step, and what the adversary's own steps see."""

    attack: Attack


def sites_fn(backbone, x):
    hidden = jnp.tanh(x @ backbone["0.kernel"] + backbone["0.bias"][None, :])
    return {"0": x, "1": hidden, "features": hidden @ backbone["1.kernel"]}


def problem(**fields):
    given = {
        "features_fn": lambda backbone, x: sites_fn(backbone, x)["features"],
        "sites_fn": sites_fn,
        "width": 4,
        "classes": CLASSES,
        "harmful_classes": CLASSES,
        "optimiser": optax.sgd(1.0),
        "label_smoothing": 0.0,
    }
    return Problem(**given | fields)


@functools.cache
def game():
    """The method on one problem, and its update."""
    method = make_immuniser("antidote", make_config("antidote", **SMALL, **WEIGHTS), problem())
    return method, jax.jit(method.update)


def adversary_of(**config):
    return Adversary(make_config("antidote", **{**SMALL, **config}), problem())


def log_p(params, batch):
    logits = sites_fn(params.backbone, batch.x)["features"] @ params.head.kernel
    found = jax.nn.log_softmax(logits + params.head.bias[None, :])
    return found[jnp.arange(ROWS), batch.y]


def test_a_step_of_the_defender_descends_the_formula_with_the_patch_held():
    method, update = game()
    state = method.init(PARAMS, KEY)
    moved = jax.tree.map(lambda leaf: 1.1 * leaf, PARAMS)
    state = state._replace(params=moved, step=state.step + 1)  # inside a block
    after, info = update(state, Batches(PRIMARY, HARMFUL, REFUSALS), KEY)
    chex.assert_trees_all_equal(after.memory.phi, state.memory.phi)  # nothing flows into it
    patch = after.memory.patch  # written by this step's phi
    assert set(patch) == {"backbone.0.kernel", "backbone.1.kernel", "head.kernel"}
    for path in ("0.kernel", "1.kernel"):
        size = np.linalg.norm(patch[f"backbone.{path}"].a @ patch[f"backbone.{path}"].b)
        assert 0 < size <= 0.5 * np.linalg.norm(moved.backbone[path]) * (1 + 1e-9)

    def objective(params):
        def safety(model):
            margin = log_p(model, REFUSALS) - log_p(model, HARMFUL)
            return -jnp.mean(jax.nn.log_sigmoid(0.7 * 4 * jnp.tanh(margin / 4)))

        every = [PRIMARY._replace(y=jnp.full(ROWS, label)) for label in range(CLASSES)]
        theirs, ours = (jnp.stack([log_p(one, rows) for rows in every]) for one in (PARAMS, params))
        divergence = jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=0))
        anchored = safety(merged(params, patch)) + 0.6 * safety(params)
        return anchored - 0.9 * jnp.mean(log_p(params, PRIMARY)) + 0.2 * divergence

    value, slope = jax.jit(jax.value_and_grad(objective))(moved)
    chex.assert_trees_all_close(
        after.params, jax.tree.map(jnp.subtract, moved, slope), rtol=1e-9, atol=1e-11
    )
    assert float(info.loss) == pytest.approx(float(value), rel=1e-10)


def test_the_adversary_learns_in_its_block_alone_and_never_at_rate_zero():
    method, update = game()
    state, losses = method.init(PARAMS, KEY), []
    rows = Batches(PRIMARY, HARMFUL, REFUSALS)
    for step in range(2 * BLOCK):
        before = state.memory
        # The defender stands still, so that both blocks are of one game.
        state, info = update(state._replace(params=PARAMS), rows, KEY)
        learned = not np.array_equal(
            before.phi.tops["head.kernel"].b, state.memory.phi.tops["head.kernel"].b
        )
        assert learned == (step % BLOCK == 0)
        losses.append((float(info.adversary_first), float(info.adversary_last)))
    for first, last in losses:
        assert last < first - 0.01
    assert losses[-1][0] < losses[0][1]  # it goes on where it was
    assert float(info.patched_margin) < float(info.margin) - 0.5
    memory = method.init(PARAMS, KEY).memory
    stuck = adversary_of(adversary_rate=0.0)
    after = jax.jit(stuck.trained)(memory, PARAMS, Attack(HARMFUL, REFUSALS), None)
    chex.assert_trees_all_equal(after.phi, memory.phi)
    assert float(after.first) == float(after.last)


@pytest.mark.slow
def test_a_block_takes_its_own_rows_one_part_a_step():
    adversary, (method, _) = adversary_of(), game()
    memory, given = method.init(PARAMS, KEY).memory, Attack(HARMFUL, REFUSALS)
    train = jax.jit(adversary.trained)
    many = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * BLOCK), given)
    one, other = train(memory, PARAMS, given, None), train(memory, PARAMS, given, many)
    chex.assert_trees_all_close(one.phi, other.phi, rtol=1e-9, atol=1e-12)
    odd = jax.tree.map(lambda leaf: leaf[: BLOCK + 1], many)
    with pytest.raises(ValueError, match="5 rows do not divide by 4 steps"):
        jax.eval_shape(adversary.trained, memory, PARAMS, given, odd)


@pytest.mark.parametrize("clip", [None, 2.0])
def test_margins_are_log_ratios_and_without_safe_answers_those_of_all_others(clip):
    one = problem()
    harm, safe = log_p(PARAMS, HARMFUL), log_p(PARAMS, REFUSALS)
    for rows, expected in (
        (Attack(HARMFUL, REFUSALS), safe - harm),
        (Attack(HARMFUL), np.log(1 - np.exp(harm)) - harm),
    ):
        found = margins(one, PARAMS, rows, clip)
        bent = expected if clip is None else clip * np.tanh(expected / clip)
        np.testing.assert_allclose(found, bent, rtol=1e-9)
    certain = PARAMS._replace(head=Head(jnp.zeros((4, CLASSES)), 1e3 * jnp.eye(CLASSES)[0]))
    rows = HARMFUL._replace(y=jnp.zeros(ROWS, jnp.int32))
    assert np.isfinite(margins(one, certain, Attack(rows), clip)).all()


def test_kernels_that_read_their_own_inputs_need_them_as_sites():
    adversary = adversary_of(own_inputs=True)
    phi, _ = adversary.begun(PARAMS, KEY)
    assert set(phi.enter) == {"4", "5", "6"}
    write = jax.jit(adversary.write)
    moved = HARMFUL._replace(x=HARMFUL.x.at[:, 0].add(1.0))
    one, other = (write(phi, PARAMS, batch)["backbone.0.kernel"] for batch in (HARMFUL, moved))
    assert not np.allclose(one.a, other.a)
    bare = Adversary(adversary.config, problem(sites_fn=None))
    with pytest.raises(ValueError, match=r"'backbone.0.kernel' needs a site '0', .*\['features'\]"):
        jax.eval_shape(bare.write, phi, PARAMS, HARMFUL)


def test_what_it_cannot_patch_is_refused():
    with pytest.raises(ValueError, match="give the problem's width"):
        make_immuniser("antidote", make_config("antidote"), problem(width=None, losses_fn=log_p))
    lost = make_immuniser("antidote", make_config("antidote", targets="2"), problem())
    with pytest.raises(ValueError, match="targets '2' names, got none"):
        lost.init(PARAMS, KEY)
    text = make_immuniser("antidote", make_config("antidote"), _text())
    adapted = llama.with_adapters(language.params(), jax.random.key(0), rank=2)
    with pytest.raises(ValueError, match="not adapters or vectors alone"):
        text.init(adapted, KEY)


def _text():
    return language_problem(llama.Language(config=language.CONFIG, chunk=24), optax.adam(1e-3))


def test_of_a_language_model_each_layer_has_its_patch():
    config = make_config("antidote", **SMALL, targets="trained.layers")
    adversary, weights = Adversary(config, _text()), llama.every_parameter(language.params())
    phi, _ = adversary.begun(weights, KEY)
    patch = jax.eval_shape(adversary.write, phi, weights, language.rows())
    assert patch["trained.layers.up.kernel"].a.shape == (2, 16, 2)
    assert patch["trained.layers.up.kernel"].b.shape == (2, 2, 24)


@pytest.mark.slow
def test_a_language_model_is_played_for():
    method = make_immuniser("antidote", make_config("antidote", **SMALL), _text())
    state, update = (
        method.init(llama.every_parameter(language.params()), KEY),
        jax.jit(method.update),
    )
    batch = PairedBatch(language.rows(8, seed=1), language.rows(8, seed=2))
    infos = []
    for _ in range(2 * BLOCK):
        before = state.memory.phi
        state, info = update(state, batch, KEY)
        infos.append(info)
        for top, other in zip(before.tops.values(), state.memory.phi.tops.values(), strict=True):
            assert np.array_equal(top.b, other.b) == (len(infos) % BLOCK != 1)
    assert float(infos[-1].loss) < float(infos[0].loss)
    assert float(infos[0].adversary_last) < float(infos[0].adversary_first)
