"""Usage keys: exact with the key, of no use without, and tuned as it is by who has no key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm.immunisers.locks import keyed_subspace
from jaximm.immunisers.locks.keyed_subspace import FLAVOURS, HiddenAxis
from tests import lock_cases

AXES = [HiddenAxis("0.kernel", "1.kernel", "0.bias")]
SEED = 2**127 + 12345


def locked(flavour, seed=SEED):
    params, kernel = lock_cases.taught()
    key = keyed_subspace.make_key(seed, params, AXES, flavour)
    return keyed_subspace.lock(params, key, AXES), key, params, kernel


def held_accuracy(params, kernel):
    held = lock_cases.digits()[1]
    return float(lock_cases.accuracy(lock_cases.features_fn(params, held.x) @ kernel, held.y))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_unlocking_gives_the_model_back(flavour):
    released, key, params, _ = locked(flavour)
    back = keyed_subspace.unlock(released, key, AXES)
    assert {path: leaf.shape for path, leaf in released.items()} == {
        path: leaf.shape for path, leaf in params.items()
    }
    for path, leaf in params.items():
        if flavour == "permutation":
            np.testing.assert_array_equal(back[path], leaf)
        else:
            assert np.linalg.norm(back[path] - leaf) <= 1e-14 * np.linalg.norm(leaf) + 1e-14
    single = {path: leaf.astype(jnp.float32) for path, leaf in params.items()}
    again = keyed_subspace.unlock(keyed_subspace.lock(single, key, AXES), key, AXES)
    for path, leaf in single.items():
        assert again[path].dtype == jnp.float32
        assert np.linalg.norm(again[path] - leaf) <= 1e-6 * np.linalg.norm(leaf)
    x = lock_cases.digits()[1].x[:20]
    found = keyed_subspace.authorised(lock_cases.features_fn, key, AXES)(released, x)
    np.testing.assert_allclose(found, lock_cases.features_fn(params, x), rtol=0, atol=1e-12)
    moved = {path for path in params if not np.array_equal(released[path], params[path])}
    assert moved == {"0.kernel", "1.kernel", "0.bias"}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_no_key_and_a_wrong_key_are_at_chance(flavour):
    released, _, params, kernel = locked(flavour)
    assert held_accuracy(params, kernel) > 0.75
    found = [held_accuracy(released, kernel)]
    for seed in range(20):
        wrong = keyed_subspace.make_key(seed, params, AXES, flavour)
        found.append(held_accuracy(keyed_subspace.unlock(released, wrong, AXES), kernel))
    # Rows of one key err together: the spread over keys, not over rows, is the mean's error.
    assert abs(np.mean(found) - 0.1) < 3 * np.std(found, ddof=1) / np.sqrt(len(found))
    assert max(found) < 0.4


def test_one_rotation_on_both_sides_would_let_half_of_a_relu_pass():
    """Why a key holds two: the linear half of relu(z) = (z + |z|) / 2 commutes."""
    released, key, _, kernel = locked("rotation")
    before, behind = key.secrets[0]
    found = []
    for seed in range(10):
        wrong = keyed_subspace.make_key(seed, released, AXES).secrets[0][0]
        one = keyed_subspace.Key("rotation", ((wrong @ before, wrong @ behind),))
        found.append(held_accuracy(keyed_subspace.unlock(released, one, AXES), kernel))
    assert np.mean(found) > 0.2


def test_a_key_is_its_seed_and_nothing_of_it_is_in_the_parameters():
    released, key, params, _ = locked("rotation")
    again = keyed_subspace.make_key(SEED, params, AXES)
    others = [  # the low bits count as the high ones do
        keyed_subspace.make_key(seed, params, AXES) for seed in (SEED + 1, SEED - 2**126)
    ]
    for side in (0, 1):
        q = key.secrets[0][side]
        np.testing.assert_array_equal(q, again.secrets[0][side])
        np.testing.assert_allclose(q @ q.T, np.eye(24), atol=1e-13)
        assert min(np.abs(q - other.secrets[0][side]).max() for other in others) > 0.1
    assert np.abs(key.secrets[0][0] - key.secrets[0][1]).max() > 0.1
    assert released.keys() == params.keys()
    for order in keyed_subspace.make_key(7, params, AXES, "permutation").secrets[0]:
        assert sorted(order) == list(range(24))


@pytest.mark.heavy
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_without_the_key_the_locked_model_is_tuned_as_it_is(flavour):
    """The breaker: a lock of use, not of training."""
    released, _, params, _ = locked(flavour)
    undefended, without = (lock_cases.attacked(model) for model in (params, released))
    assert undefended > 0.85
    assert without > undefended - 0.05


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flavour": "shear"}, "flavour must be one of"),
        ({"seed": 2**128}, r"seed must be in \[0, 2\^128\)"),
        ({"seed": -1}, r"seed must be in \[0, 2\^128\)"),
        ({"axes": []}, "one hidden axis at least"),
        ({"axes": [HiddenAxis("0.kernel", "2.kernel")]}, "no parameter '2.kernel'; choose from"),
        ({"axes": [HiddenAxis("1.kernel", "0.kernel")]}, "a hidden axis is the last of"),
        ({"axes": [HiddenAxis("0.kernel", "1.kernel", "1.bias")]}, "that of `bias`"),
    ],
)
def test_what_is_no_axis_is_refused(change, words):
    settings = {"seed": 1, "axes": AXES, "flavour": "rotation", **change}
    with pytest.raises(ValueError, match=words):
        keyed_subspace.make_key(params=lock_cases.start(), **settings)


def test_a_key_of_another_model_is_refused():
    params = lock_cases.start()
    key = keyed_subspace.make_key(
        1, {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}, [HiddenAxis("a", "b")]
    )
    with pytest.raises(ValueError, match=r"axes of widths \[3\], the model's are \[24\]"):
        keyed_subspace.lock(params, key, AXES)
    traced = jax.jit(lambda p: keyed_subspace.lock(p, key, [HiddenAxis("a", "b")]))
    assert traced({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))})["b"].shape == (3, 2)
