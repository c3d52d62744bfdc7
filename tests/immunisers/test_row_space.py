"""Working in the coordinates of the data changes no condition number of either task."""

import dataclasses
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from jaximm import data, immunisers, measures, run
from jaximm.immunisers import THETA, linear_params, relative_damping
from jaximm.immunisers.conditioning import row_space
from jaximm.immunisers.conditioning.row_space import from_row_space, row_space_basis, to_row_space
from jaximm.immunisers.problem import triangle
from jaximm.types import Batch, PairedBatch

pytestmark = pytest.mark.heavy

D, N = 12, 30


@pytest.fixture(autouse=True)
def small_multiple(monkeypatch):
    monkeypatch.setattr(row_space, "MULTIPLE", 2)


def make_arrays(seed=0, rank=4, dtype=jnp.float64):
    """Two tasks whose rows fill `rank` of D directions together, neither of them all of these."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(D, D)))[0][:, :rank]

    def task(columns, n):
        x = rng.normal(size=(n, len(columns))) * np.geomspace(1.0, 0.2, len(columns))
        x = x @ basis[:, columns].T
        y = x @ rng.normal(size=D) + 0.1 * rng.normal(size=n)
        return Batch(jnp.asarray(x, dtype), jnp.asarray(y, dtype))

    return PairedBatch(task(range(rank - 1), N), task(range(1, rank), N - 3))


def factors_of(arrays, dampings):
    return [triangle(batch.x, lam) for batch, lam in zip(arrays, dampings, strict=True)]


def dampings_of(arrays):
    return [relative_damping(batch.x, 1e-3) for batch in arrays]


def make_theta(size, seed=1, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(2))
    return jnp.asarray(left * np.geomspace(3.0, 0.1, size) @ right, dtype)


@pytest.mark.parametrize(("rank", "size"), [(4, 6), (5, 6), (7, 8)])
def test_the_basis_spans_the_rows_and_one_direction_more(rank, size):
    arrays = make_arrays(rank=rank)
    basis = row_space_basis(arrays)
    assert basis is not None
    assert basis.shape == (D, size)
    np.testing.assert_allclose(basis.T @ basis, np.eye(size), atol=1e-13)
    for batch, reduced in zip(arrays, to_row_space(arrays, basis), strict=True):
        np.testing.assert_allclose(reduced.x @ basis.T, batch.x, atol=1e-13)
        np.testing.assert_allclose(batch.x @ basis[:, -1], np.zeros(len(batch.x)), atol=1e-13)
        assert reduced.y is batch.y


@pytest.mark.parametrize("rank", [9, 10, 11, 12])
def test_no_basis_where_it_would_not_be_smaller(rank):
    """9 + 1 = 10 of 12; 10 + 1 rounds up to 12; 11 + 1 is 12; 12 leaves no direction."""
    assert (row_space_basis(make_arrays(rank=rank)) is None) == (rank >= 10)


@pytest.mark.parametrize("seed", range(4))
def test_lifting_changes_no_damped_kappa(seed):
    arrays = make_arrays(seed)
    basis = row_space_basis(arrays)
    assert basis is not None
    dampings = dampings_of(arrays)
    size = basis.shape[1]
    theta, head = make_theta(size, seed), jnp.arange(1.0, size + 1)
    reduced = to_row_space(arrays, basis)
    inside = measures.log_kappas(*factors_of(reduced, dampings), theta)
    lifted = from_row_space(linear_params(theta, head), basis)
    assert lifted.backbone[THETA].shape == (D, D)
    outside = measures.log_kappas(*factors_of(arrays, dampings), lifted.backbone[THETA])
    for task in ("primary", "harmful"):
        np.testing.assert_allclose(
            outside[f"log_kappa_{task}"], inside[f"log_kappa_{task}"], rtol=1e-9
        )
        assert int(outside[f"rank_{task}"]) == D
    # NumPy's own: theta^T (K + lam I) theta, formed.
    for task, batch, lam in zip(("primary", "harmful"), arrays, dampings, strict=True):
        x, w = np.asarray(batch.x), np.asarray(lifted.backbone[THETA])
        truth = np.linalg.cond(w.T @ (x.T @ x / len(x) + float(lam) * np.eye(D)) @ w)
        np.testing.assert_allclose(outside[f"log_kappa_{task}"], np.log(truth), rtol=1e-6)


def test_features_and_predictions_of_training_rows_are_the_same():
    arrays = make_arrays()
    basis = row_space_basis(arrays)
    assert basis is not None
    theta, head = make_theta(basis.shape[1]), jnp.arange(1.0, basis.shape[1] + 1)
    lifted = from_row_space(linear_params(theta, head), basis)
    for batch, reduced in zip(arrays, to_row_space(arrays, basis), strict=True):
        features = reduced.x @ theta
        np.testing.assert_allclose(batch.x @ lifted.backbone[THETA] @ basis, features, atol=1e-12)
        np.testing.assert_allclose(
            batch.x @ lifted.backbone[THETA] @ lifted.head, features @ head, atol=1e-11
        )


def test_many_rows_are_taken_by_blocks(monkeypatch):
    """The basis of blocks spans what that of one block spans; memory does not go with n^2."""
    arrays = make_arrays()
    whole = row_space_basis(arrays)
    monkeypatch.setattr(row_space, "BLOCK_BYTES", 1)  # then a block is d_in rows
    blocks = row_space_basis(arrays)
    assert whole is not None
    assert blocks is not None
    for batch in arrays:
        np.testing.assert_allclose(batch.x @ blocks @ blocks.T, batch.x, atol=1e-13)
        np.testing.assert_allclose(batch.x @ whole @ whole.T, batch.x, atol=1e-13)
    many = PairedBatch(*(Batch(jnp.tile(b.x, (2000, 1)), b.y) for b in arrays))
    tracemalloc.start()
    basis = row_space_basis(many)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert basis is not None
    assert peak < 4 * sum(b.x.nbytes for b in many)


def test_an_identity_is_lifted_to_the_identity():
    basis = row_space_basis(make_arrays())
    assert basis is not None
    size = basis.shape[1]
    lifted = from_row_space(linear_params(jnp.eye(size), jnp.zeros(size)), basis)
    np.testing.assert_allclose(lifted.backbone[THETA], np.eye(D), atol=1e-13)


def test_float32():
    arrays = make_arrays(dtype=jnp.float32)
    basis = row_space_basis(arrays)
    assert basis is not None
    assert basis.dtype == jnp.float32
    assert basis.shape == (D, 6)
    theta = make_theta(6, dtype=jnp.float32)
    lifted = from_row_space(linear_params(theta, jnp.zeros(6, jnp.float32)), basis)
    assert lifted.backbone[THETA].dtype == jnp.float32


def prepared_pair(fields=None):
    arrays = make_arrays(3)
    rng = np.random.default_rng(9)
    unseen = {
        f"{task}_{name}_held_out": value
        for task in ("primary", "harmful")
        for name, value in (("x", rng.normal(size=(20, D))), ("y", rng.normal(size=20)))
    }
    pair = data.task_pair_from_arrays(
        primary_x=np.asarray(arrays.primary.x),
        primary_y=np.asarray(arrays.primary.y),
        harmful_x=np.asarray(arrays.harmful.x),
        harmful_y=np.asarray(arrays.harmful.y),
        **unseen,
    )
    config = dataclasses.replace(
        run.EXPERIMENTS["house_price"], method_fields={} if fields is None else fields
    )
    return run.prepare(config, pair=pair)


def damped_row(prepared, immunised):
    return run.measure(prepared, immunised)["conditioning"]["damped"]["train"]


@pytest.mark.slow
def test_a_run_logs_the_kappas_that_its_lifted_backbone_has():
    prepared = prepared_pair({"condition_gap": {"steps": 4}})
    immunised = run.run_method(prepared, "condition_gap")
    assert immunised.params.backbone[THETA].shape == (D, D)
    row, last = damped_row(prepared, immunised), immunised.trajectory[-1]
    for task in ("primary", "harmful"):
        np.testing.assert_allclose(
            row[task]["after"]["log_kappa"], last[f"log_kappa_{task}"], rtol=1e-8
        )
        np.testing.assert_allclose(
            row[f"log_ratio_{task}"], last[f"log_ratio_{task}"], rtol=1e-6, atol=1e-8
        )
    assert abs(row["log_rir"]) > 0.1


@pytest.mark.slow
def test_the_closed_form_in_batches_reaches_the_limit_of_all_coordinates():
    """Its damping is relative to tr(K) / d: d is that of the inputs, also with many batches."""
    prepared = prepared_pair()
    train = PairedBatch(*(Batch(b.x[:24], b.y[:24]) for b in prepared.train))
    activations = {**prepared.activations, "train": train}
    prepared = dataclasses.replace(prepared, activations=activations, features=activations)
    whole = run.run_method(prepared, "limit@t=1")
    batches = run.run_method(prepared, "limit@t=1,steps=4,batch_size=6")
    assert batches.steps == 4
    for immunised in (whole, batches):
        assert damped_row(prepared, immunised)["log_fraction"] > 1 - 1e-9


def test_the_basis_is_used_for_methods_of_many_steps(monkeypatch):
    seen = []
    real = immunisers.make_immuniser

    def spy(name, config, problem):
        seen.append((name, problem.factors.primary.shape[0]))
        return real(name, config, problem)

    monkeypatch.setattr(immunisers, "make_immuniser", spy)
    prepared = prepared_pair({"condition_gap": {"steps": 4}})
    run.run_method(prepared, "condition_gap")
    run.run_method(prepared, "limit@t=1")
    assert seen == [("condition_gap", 6), ("limit", D)]
