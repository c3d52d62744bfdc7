"""Losses, scores and chance of rows: numbers, signs, classes, tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaximm import objectives
from jaximm.objectives import Classes, TokenRows, Tokens, Unembedded, objective

pytestmark = pytest.mark.heavy

N, T, D, V = 3, 4, 5, 11
CHUNKED = Tokens(chunk=4)  # chunks of 4, 4 and 3: one column is padding
LOSSES, SCORES = jax.jit(CHUNKED.losses), jax.jit(CHUNKED.scores)


def token_rows(seed=0, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    outputs = Unembedded(
        jnp.asarray(rng.normal(size=(N, T, D)), dtype), jnp.asarray(rng.normal(size=(V, D)), dtype)
    )
    mask = np.ones((N, T), bool)
    mask[0, 2:], mask[2] = False, False  # two tokens, four, none
    return outputs, TokenRows(jnp.asarray(rng.integers(0, V, (N, T)), jnp.int32), jnp.asarray(mask))


def direct_losses(outputs, y):
    """The formula with whole logits."""
    logits = outputs.states @ outputs.table.T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y.tokens)
    mask = y.mask.astype(losses.dtype)
    return jnp.sum(mask * losses, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)


def test_numbers_score_mean_r_squared():
    y, numbers = jnp.array([1.0, 2.0, 6.0]), objective("regression")
    assert jnp.mean(numbers.scores(y, y)) == 1
    assert jnp.mean(numbers.scores(jnp.full(3, 3.0), y)) == pytest.approx(numbers.chance(y))
    assert jnp.mean(numbers.scores(jnp.zeros(3), y)) == pytest.approx(1 - 41 / 14)
    np.testing.assert_allclose(numbers.losses(jnp.zeros((3, 1)), y), [0.5, 2, 18])
    np.testing.assert_allclose(numbers.blind_loss(y, 1), numbers.losses(jnp.full(3, 3.0), y).mean())
    constant = jnp.full(3, 2.0)
    np.testing.assert_allclose(numbers.scores(jnp.array([2.0, 3.0, 0.0]), constant), [1, 0, -3])
    assert jnp.isnan(numbers.scores(jnp.array([1.0, jnp.nan, 6.0]), y)).tolist() == [0, 1, 0]


def test_divergences_are_those_of_what_the_outputs_stand_for():
    rng = np.random.default_rng(0)
    ours, theirs = (jnp.asarray(rng.normal(size=(4, 3))) for _ in range(2))
    labels = jnp.zeros(4, jnp.int32)
    p, q = (jax.nn.softmax(side) for side in (theirs, ours))
    found = objective("classes").divergences(ours, theirs, labels)
    np.testing.assert_allclose(found, np.sum(p * np.log(p / q), axis=1), rtol=1e-12)
    np.testing.assert_array_equal(objective("classes").divergences(ours, ours, labels), 0)
    for kind in ("regression", "binary"):  # normal distributions of variance 1 around the outputs
        found = objective(kind).divergences(ours[:, :1], theirs[:, :1], jnp.ones(4))
        np.testing.assert_allclose(found, (ours - theirs)[:, 0] ** 2 / 2, rtol=1e-12)


def test_a_part_of_the_rows_scores_by_the_spread_of_all():
    y, outputs = jnp.array([1.0, 2.0, 6.0, 0.0]), jnp.array([0.0, 2.5, 4.0, 1.0])
    for kind in ("regression", "binary"):
        of = objective(kind)
        whole, spread = of.scores(outputs, y), of.spread(y)
        parts = [of.scores(outputs[rows], y[rows], spread) for rows in (slice(2), slice(2, 4))]
        np.testing.assert_array_equal(whole, jnp.concatenate(parts))


def test_signs_of_numbers():
    y, signs = jnp.array([1.0, -1.0, -1.0, 1.0]), objective("binary")
    found = signs.scores(jnp.array([0.2, -3.0, 0.1, -0.1]), y)
    assert found.tolist() == [1, 1, 0, 0]
    assert signs.scores(jnp.array([jnp.nan, jnp.nan, 0.0, jnp.inf]), y).tolist() == [0, 0, 1, 0]
    assert signs.chance(jnp.array([1.0, -1.0, -1.0, -1.0])) == 0.75
    assert signs.metric == "accuracy"


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classes_are_the_cross_entropy_and_its_slope(smoothing):
    rng = np.random.default_rng(0)
    outputs, y = jnp.asarray(rng.normal(size=(6, 4))), jnp.array([0, 1, 3, 3, 2, 0], jnp.int32)
    of = Classes(smoothing)
    log_p = np.log(np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True))
    targets = (1 - smoothing) * np.eye(4)[np.asarray(y)] + smoothing / 4
    np.testing.assert_allclose(of.losses(outputs, y), -(targets * log_p).sum(axis=1), rtol=1e-12)
    slope = jax.grad(lambda o: of.losses(o, y).sum())(outputs)
    np.testing.assert_allclose(of.residuals(outputs, y), slope, rtol=1e-9, atol=1e-12)


def test_classes_score_rows_with_numbers_alone():
    outputs = jnp.array([[1.0, 1.0], [0.0, 1.0], [jnp.nan, 1.0], [-jnp.inf, 1.0]])
    y = jnp.array([0, 1, 1, 1], jnp.int32)
    assert objective("classes").scores(outputs, y).tolist() == [1, 1, 0, 0]  # a tie: the first
    found = objective("classes").scores(np.asarray(outputs), np.asarray(y))
    assert type(found) is np.ndarray
    assert found.tolist() == [1, 1, 0, 0]
    assert objective("classes").chance(y) == 0.75
    shared = Classes().shared_scores(jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 0.9]]), y[:2], tie=0.2)
    assert shared.tolist() == [0.5, 0.5]


def test_tokens_in_chunks_are_the_whole_formula_with_its_gradient():
    outputs, y = token_rows()
    np.testing.assert_allclose(LOSSES(outputs, y), direct_losses(outputs, y), rtol=1e-12)
    weights = CHUNKED.weights(y)
    assert weights.tolist() == [2, 4, 0]

    @functools.partial(jax.jit, static_argnums=0)
    def slope_and_curvature(losses, outputs, along):
        def total(outputs):
            return jnp.sum(losses(outputs, y) * weights)

        return jax.jvp(jax.grad(total), (outputs,), (along,))  # both modes, both orders

    along, _ = token_rows(1)
    found = slope_and_curvature(CHUNKED.losses, outputs, along)
    expected = slope_and_curvature(direct_losses, outputs, along)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
        assert jnp.any(one != 0)


def test_tokens_that_do_not_count_are_never_looked_at():
    outputs, y = token_rows()
    hostile = outputs.states.at[0, 2:].set(jnp.nan).at[2].set(jnp.inf)
    odd = TokenRows(jnp.where(y.mask, y.tokens, -100), y.mask)
    found = LOSSES(outputs._replace(states=hostile), odd)
    np.testing.assert_allclose(found, LOSSES(outputs, y), rtol=1e-12)
    assert found[2] == 0  # a row without any
    worse = outputs._replace(states=outputs.states.at[1, 0].set(jnp.nan))
    assert jnp.isnan(LOSSES(worse, y)).tolist() == [0, 1, 0]
    assert SCORES(worse, y)[1] <= 0.75


def test_tokens_score_by_the_largest_logit():
    outputs, y = token_rows(1)
    top = jnp.argmax(outputs.states @ outputs.table.T, axis=-1).astype(jnp.int32)
    right = y._replace(tokens=top.at[1, 0].set((top[1, 0] + 1) % V))
    assert SCORES(outputs, right).tolist() == [1, 0.75, 0]
    same = Unembedded(jnp.ones((1, 1, D)), jnp.ones((V, D)))  # equal in every chunk: the first
    one = TokenRows(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))
    assert SCORES(same, one).tolist() == [1]
    counts = TokenRows(jnp.array([[3, 3, 1, 9]], jnp.int32), jnp.array([[True] * 3 + [False]]))
    assert CHUNKED.chance(counts) == pytest.approx(2 / 3)
    assert CHUNKED.chance(counts._replace(mask=jnp.zeros((1, 4), bool))) == 0


def test_half_precision_sums_in_float32():
    outputs, y = token_rows()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), outputs)
    found = LOSSES(half, y)
    assert found.dtype == jnp.float32
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    np.testing.assert_allclose(found, direct_losses(wide, y), rtol=1e-5)


def test_tokens_of_a_large_vocabulary_take_little_memory():
    """Planned memory of value and gradient at 512 tokens and 49,152 words; nothing is run."""

    def planned(losses):
        def total(outputs, y):
            return jnp.sum(losses(outputs, y))

        shapes = (
            Unembedded(
                jax.ShapeDtypeStruct((4, 128, 16), jnp.float32),
                jax.ShapeDtypeStruct((49_152, 16), jnp.float32),
            ),
            TokenRows(
                jax.ShapeDtypeStruct((4, 128), jnp.int32), jax.ShapeDtypeStruct((4, 128), bool)
            ),
        )
        compiled = jax.jit(jax.value_and_grad(total)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    chunked, whole = planned(Tokens().losses), planned(direct_losses)
    logits = 512 * 49_152 * 4
    assert whole >= logits
    assert chunked < logits / 3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: objective("words"), "unknown kind 'words'; choose from"),
        (lambda: Tokens(chunk=0), "chunk must be >= 1, got 0"),
        (lambda: LOSSES(token_rows()[0], TokenRows(*[jnp.ones((N, 2), bool)] * 2)), "mask"),
        (
            lambda: LOSSES(token_rows()[0]._replace(table=jnp.ones((V, D + 1))), token_rows()[1]),
            r"a table \[v, d\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_dtype_stands_for_a_kind():
    assert objectives.of_targets(jnp.zeros(2)).metric == "r2"
    assert objectives.of_targets(jnp.zeros(2, jnp.int32)).metric == "accuracy"


def test_an_entropy_is_between_zero_and_that_of_equal_predictions():
    rng = np.random.default_rng(0)
    table, states = jnp.asarray(rng.normal(size=(7, 3))), jnp.asarray(rng.normal(size=(2, 4, 3)))
    mask = jnp.array([[True, True, False, True], [False, True, False, False]])
    y = TokenRows(jnp.zeros((2, 4), jnp.int32), mask)
    logits = np.asarray(states @ table.T)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    every = -(p * np.log(p)).sum(-1)
    expected = [every[row][np.asarray(mask[row])].mean() for row in range(2)]
    for chunk in (3, 64):  # with and without columns that are no token
        found = Tokens(chunk).entropies(Unembedded(states, table), y)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    equal = Tokens(3).entropies(Unembedded(0 * states, table), y)
    np.testing.assert_allclose(equal, np.log(7), rtol=1e-12)
    labels = jnp.zeros(4, jnp.int32)
    np.testing.assert_allclose(
        Classes().entropies(jnp.asarray(logits[0]), labels), every[0], rtol=1e-12
    )
    assert np.all(np.asarray(Classes().entropies(jnp.asarray(logits[0]), labels)) < np.log(7))
    sure = Classes().entropies(jnp.array([[0.0, 800.0]]), labels[:1])
    np.testing.assert_allclose(sure, 0, atol=1e-12)
