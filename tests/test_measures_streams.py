"""Rows in parts are the rows at once, for every measure of conditioning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm.measures import kappas, log_rir_limit, streams, task_rows

pytestmark = pytest.mark.heavy

D = 6


@jax.jit
def add(stream, rows, mask):
    return streams.add_rows(stream, rows, mask)


def stream_of(rows, mask, parts, dtype=jnp.float64):
    stream = streams.row_stream(D, dtype)
    for index in range(parts):
        stream = add(stream, rows[index::parts], mask[index::parts])
    return stream


@pytest.fixture(scope="module")
def texts():
    """Rows [n, t, d] of two texts, graded over six decades, and which positions count."""
    rng = np.random.default_rng(0)
    scales = np.logspace(0, -6, D)
    rows = {n: jnp.asarray(rng.standard_normal((8, 5, D)) * scales) for n in ("one", "other")}
    mask = jnp.asarray(rng.random((8, 5)) < 0.7)
    return {name: jnp.where(mask[..., None], x, jnp.nan) for name, x in rows.items()}, mask


def test_kappas_limit_and_damping_are_those_of_all_rows(texts):
    rows, mask = texts
    whole = {n: task_rows(x[mask], damping=1e-11) for n, x in rows.items()}
    parts = {n: streams.stream_rows(stream_of(x, mask, 4), damping=1e-11) for n, x in rows.items()}
    for name, expected in whole.items():
        found = parts[name]
        np.testing.assert_allclose(found.damping, expected.damping, rtol=1e-12)
        ours, theirs = (kappas(r, rtol=1e-9) for r in (found, expected))
        np.testing.assert_allclose(ours.damped.log_kappa, theirs.damped.log_kappa, rtol=1e-9)
        assert int(ours.pseudo_inverse.rank) == int(theirs.pseudo_inverse.rank) == D
    limits = [log_rir_limit(r["one"], r["other"]) for r in (parts, whole)]
    np.testing.assert_allclose(limits[0], limits[1], rtol=1e-9)
    assert float(stream_of(rows["one"], mask, 4).count) == int(mask.sum())
    halves = [stream_of(rows["one"][part::2], mask[part::2], 1) for part in (0, 1)]
    both = streams.stream_rows(streams.joined(*halves), damping=1e-11)
    np.testing.assert_allclose(both.damping, whole["one"].damping, rtol=1e-12)
    np.testing.assert_allclose(
        kappas(both, rtol=1e-9).damped.log_kappa,
        kappas(whole["one"], rtol=1e-9).damped.log_kappa,
        rtol=1e-9,
    )


def test_damping_may_be_relative_to_other_rows(texts):
    rows, mask = texts
    stream, other = stream_of(rows["one"], mask, 2), stream_of(rows["other"] * 3, mask, 2)
    found = streams.stream_rows(stream, other, damping=0.1)
    expected = task_rows(rows["one"][mask], 3 * rows["other"][mask], damping=0.1)
    np.testing.assert_allclose(found.damping, expected.damping, rtol=1e-12)


def test_float32_keeps_the_small_directions_that_its_gram_matrix_loses(texts):
    rows, mask = texts
    turned = rows["one"] @ np.linalg.qr(np.random.default_rng(1).standard_normal((D, D)))[0]
    stream = stream_of(turned.astype(jnp.float32), mask, 4, jnp.float32)
    sizes = np.linalg.svd(np.asarray(stream.triangle, np.float64), compute_uv=False)
    exact = np.linalg.svd(np.asarray(turned[mask]), compute_uv=False)
    np.testing.assert_allclose(sizes, exact, rtol=0.2)
    rounded = np.asarray(turned[mask], np.float32)
    squared = np.linalg.eigvalsh(rounded.T @ rounded)[0]
    assert abs(squared) > 10 * exact[-1] ** 2


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"rows \[..., 6\]"):
        streams.add_rows(streams.row_stream(D), jnp.ones((3, 5)))
    with pytest.raises(ValueError, match="mask of their leading axes"):
        streams.add_rows(streams.row_stream(D), jnp.ones((2, 3, D)), jnp.ones((3,), bool))
