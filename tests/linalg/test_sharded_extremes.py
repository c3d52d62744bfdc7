"""Operators and Gram matrices spread over eight devices, and extremes without a d x d matrix."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaximm import hessians, linalg
from tests import helpers

pytestmark = pytest.mark.heavy

P = PartitionSpec
WIDE = 16_384
KEY = jax.random.key(0)


def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


LINE, GRID = mesh_of(data=8), mesh_of(data=4, model=2)
PLACES = {
    "rows": (LINE, {"rows": "data"}),
    "columns": (LINE, {"columns": "data"}),
    "both": (GRID, {"rows": "data", "columns": "model"}),
}


def rows(n, d, dtype=jnp.float64):
    scale = jnp.geomspace(1.0, 0.1, d, dtype=dtype)
    return jax.random.normal(KEY, (n, d), dtype) * scale[None, :]


def place(x, mesh, rows=None, columns=None):
    return jax.device_put(x, NamedSharding(mesh, P(rows, columns)))


def hlo(compiled) -> str:
    return compiled.as_text() or ""


def all_reduces(text: str) -> int:
    return len(re.findall(r"= .* all-reduce(?:-start)?\(", text))


def largest_array(text: str) -> int:
    """Elements of the largest array in a compiled program, which is what one device runs."""
    shapes = re.findall(r"\b(?:f64|f32|bf16|s64|s32|u32|pred)\[([\d,]+)\]", text)
    return max(math.prod(int(length) for length in shape.split(",")) for shape in shapes)


def temporaries(compiled) -> int:
    """Bytes of scratch memory, as the compiler planned them."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("convention", ["mean", "sum"])
def test_a_spread_operator_is_the_hessian(where, convention):
    mesh, axes = PLACES[where]
    x = rows(16, 24)
    v = jax.random.normal(jax.random.key(1), (24,))
    expected = hessians.l2_probe_hessian(x, convention=convention, damping=0.3) @ v

    def product(x, v):
        operator = hessians.sharded_l2_probe_operator(
            x, mesh, **axes, convention=convention, damping=0.3
        )
        return operator(v)

    compiled = jax.jit(product).lower(place(x, mesh, **axes), v).compile()
    np.testing.assert_allclose(compiled(place(x, mesh, **axes), v), expected, rtol=1e-12)
    assert all_reduces(hlo(compiled)) == len(axes)
    # Of arrays that lie anywhere, too.
    np.testing.assert_allclose(jax.jit(product)(x, v), expected, rtol=1e-12)


@pytest.mark.parametrize("where", ["rows", "columns"])
def test_the_compiler_spreads_the_plain_operator_with_one_all_reduce_of_a_vector(where):
    mesh, axes = PLACES[where]
    x, v = rows(16, 24), jnp.arange(24.0)
    expected = hessians.l2_probe_hessian(x) @ v
    vector = jax.device_put(v, NamedSharding(mesh, P(axes.get("columns"))))
    product = jax.jit(lambda x, v: hessians.l2_probe_operator(x)(v))
    compiled = product.lower(place(x, mesh, **axes), vector).compile()
    np.testing.assert_allclose(compiled(place(x, mesh, **axes), vector), expected, rtol=1e-12)
    # And of the powers of two split off, one a column, where a column is spread.
    assert all_reduces(hlo(compiled)) == {"rows": 1 + 1, "columns": 1}[where]


@pytest.mark.slow
def test_a_spread_gram_matrix_and_its_dual():
    x = rows(16, 24)
    gram = jax.jit(lambda x: hessians.column_sharded_gram(x, LINE, axis="data", damping=0.2))(
        place(x, LINE, "data")
    )
    np.testing.assert_allclose(gram, hessians.l2_probe_hessian(x, damping=0.2), rtol=1e-12)
    assert {shard.data.shape for shard in gram.addressable_shards} == {(24, 3)}
    v = jnp.arange(24.0)
    product = jax.jit(lambda g, v: hessians.column_sharded_operator(g, LINE, axis="data")(v))
    compiled = product.lower(gram, v).compile()
    np.testing.assert_allclose(compiled(gram, v), np.asarray(gram) @ v, rtol=1e-12)
    assert all_reduces(hlo(compiled)) == 1
    total = sum(
        hessians.column_sharded_gram(x[8 * i : 8 * i + 8], LINE, axis="data", convention="sum")
        for i in range(2)
    )
    np.testing.assert_allclose(total, x.T @ x, rtol=1e-12)
    dual = jax.jit(lambda x: hessians.dual_gram(x, LINE, columns="data"))
    lowered = dual.lower(place(x, LINE, None, "data")).compile()
    np.testing.assert_allclose(lowered(place(x, LINE, None, "data")), x @ x.T / 16, rtol=1e-12)
    assert all_reduces(hlo(lowered)) == 1 + 1


def check_extremes(found, values, damping, rtol=1e-9):
    """Against ascending true eigenvalues of the undamped operator."""
    top, bottom = values[-1] + damping, values[0] + damping
    assert found.largest_converged
    assert found.smallest_converged
    np.testing.assert_allclose(found.largest, top, rtol=rtol)
    np.testing.assert_allclose(found.smallest, bottom, rtol=rtol)
    # What is proven, to rounding.
    slack = 1e-12 * top
    assert found.largest <= top + slack
    assert found.smallest >= bottom - slack
    for value, residual in (
        (found.largest, found.largest_residual),
        (found.smallest, found.smallest_residual),
    ):
        assert np.min(np.abs(values + damping - value)) <= residual + slack


@pytest.mark.parametrize("kind", helpers.thinned(["operator", "gram"]))
def test_extremes_agree_with_the_dense_eigenvalues(kind):
    x, damping = rows(80, 48), 1e-3
    spread = place(x, LINE, "data")

    @jax.jit
    def extremes(x):
        if kind == "operator":
            matvec = hessians.sharded_l2_probe_operator(x, LINE, rows="data")
        else:
            gram = hessians.column_sharded_gram(x, LINE, axis="data")
            matvec = hessians.column_sharded_operator(gram, LINE, axis="data")
        return linalg.damped_operator_extremes(matvec, 48, KEY, damping=damping)

    values = np.linalg.eigvalsh(np.asarray(x.T @ x) / 80)
    check_extremes(extremes(spread), values, damping)


@pytest.mark.slow
def test_the_existing_krylov_routines_take_a_spread_operator():
    x = rows(80, 48)

    @jax.jit
    def measure(x):
        matvec = hessians.sharded_l2_probe_operator(x, LINE, rows="data")
        inverse = linalg.conjugate_gradient_inverse(matvec, damping=1e-3)
        whole = linalg.krylov_extremes(matvec, 48, KEY, steps=48)
        bound = linalg.operator_condition_number(
            matvec, 48, KEY, steps=40, damping=1e-3, inverse_matvec=inverse
        )
        return whole, bound

    whole, bound = measure(place(x, LINE, "data"))
    values = np.linalg.eigvalsh(np.asarray(x.T @ x) / 80)
    assert whole.converged
    np.testing.assert_allclose(whole.largest, values[-1], rtol=1e-10)
    np.testing.assert_allclose(whole.smallest, values[0], rtol=1e-8)
    truth = np.log((values[-1] + 1e-3) / (values[0] + 1e-3))
    assert bound.lower <= truth <= bound.upper < truth + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("where", ["rows", "columns"])
def test_16384_features_without_a_square_matrix(where):
    mesh, axes = PLACES[where]
    n, damping = 64, 3e-2
    x = rows(n, WIDE)
    spread = place(x, mesh, **axes)

    def extremes(x):
        matvec = hessians.sharded_l2_probe_operator(
            x, mesh, rows=axes.get("rows"), columns=axes.get("columns")
        )
        return linalg.damped_operator_extremes(matvec, WIDE, KEY, damping=damping, steps=48)

    compiled = jax.jit(extremes).lower(spread).compile()
    found = compiled(spread)
    dual = jax.jit(lambda x: hessians.dual_gram(x, LINE, columns="data"))(x)
    values = np.append(0.0, np.linalg.eigvalsh(np.asarray(dual)))
    assert values[1] > 0.1  # 0 has multiplicity d - n, and is what the inverse must find
    check_extremes(found, values, damping)
    largest = largest_array(hlo(compiled))
    assert WIDE < largest <= 49 * WIDE  # the Krylov basis, the largest there is
    assert temporaries(compiled) < 0.1 * 8 * WIDE**2


def test_the_memory_check_sees_a_square_matrix():
    """What the test above looks for is found where it is."""
    x = jax.ShapeDtypeStruct((64, WIDE), jnp.float32, sharding=NamedSharding(LINE, P("data")))

    def gram(x):
        return hessians.column_sharded_gram(x, LINE, axis="data")

    blocks = jax.jit(gram).lower(x).compile()  # compiled, not run: a gigabyte in all
    assert largest_array(hlo(blocks)) == WIDE * WIDE // 8
    assert temporaries(blocks) < 4 * WIDE * (WIDE // 8 + 3 * 64)
    whole = jax.jit(lambda x: hessians.l2_probe_hessian(x)).lower(x).compile()
    assert largest_array(hlo(whole)) == WIDE * WIDE


@pytest.mark.slow
def test_solves_that_fall_short_are_told():
    @jax.jit
    def extremes(matrix, damping):
        return linalg.damped_operator_extremes(
            lambda v: matrix @ v, 60, KEY, damping=damping, steps=60, solve_steps=12
        )

    matrix = helpers.psd_with_spectrum(jnp.geomspace(1.0, 1e-8, 60), KEY)
    short = extremes(matrix, 1e-9)
    assert short.largest_converged
    assert not short.smallest_converged
    assert short.smallest > 1e-8  # an upper bound all the same
    # A vector may be an eigenvector of S while the inverse was none: the solves decide.
    easy = helpers.psd_with_spectrum(jnp.r_[jnp.full(58, 1.0), 0.3, 0.1], KEY)
    found = extremes(easy, 1e-3)
    assert found.smallest_converged
    np.testing.assert_allclose(found.smallest, 0.101, rtol=1e-12)
    for exponent in (-800, 900):
        scale = 2.0**exponent
        scaled = extremes(easy * scale, 1e-3 * scale)
        assert scaled.smallest_converged
        assert (scaled.largest, scaled.smallest) == (found.largest * scale, found.smallest * scale)
    indefinite = helpers.psd_with_spectrum(jnp.r_[jnp.full(58, 1.0), 0.3, -0.1], KEY)
    assert not extremes(indefinite, 1e-3).smallest_converged
    assert not extremes(easy, -0.05).smallest_converged
    assert not extremes(easy * jnp.nan, 1e-3).largest_converged


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_inside_of_shard_map_each_device_its_own_operator(check_vma):
    mesh = mesh_of(data=8)
    x = jax.random.normal(KEY, (8, 12, 5))

    def both(x):
        def matvec(v):
            return x[0].T @ (x[0] @ v)

        damped = linalg.damped_operator_extremes(matvec, 5, KEY, damping=0.1)
        solved = linalg.conjugate_gradient_inverse(matvec, damping=0.1)(jnp.ones(5))
        return jnp.stack([damped.smallest, jnp.sum(solved)])[None], damped.smallest_converged[None]

    found, converged = jax.jit(
        jax.shard_map(both, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma)
    )(x)
    assert np.all(converged)
    for rows_of_one, (damped, solved) in zip(np.asarray(x), np.asarray(found), strict=True):
        gram = rows_of_one.T @ rows_of_one
        smallest = np.linalg.eigvalsh(gram)[0]
        np.testing.assert_allclose(damped - 0.1, smallest, rtol=1e-9)
        exact = np.sum(np.linalg.solve(gram + 0.1 * np.eye(5), np.ones(5)))
        np.testing.assert_allclose(solved, exact, rtol=1e-9)


@pytest.mark.slow
def test_inside_of_shard_map_one_operator_of_all_devices():
    x = jax.random.normal(KEY, (8, 4, 5))

    def smallest(x):
        matvec = lambda v: jax.lax.psum(x[0].T @ (x[0] @ v), "data")  # noqa: E731
        found = linalg.krylov_extremes(matvec, 5, KEY)
        return found.smallest, found.converged

    found, converged = jax.jit(
        jax.shard_map(smallest, mesh=LINE, in_specs=P("data"), out_specs=P())
    )(x)
    flat = np.asarray(x).reshape(-1, 5)
    np.testing.assert_allclose(found, np.linalg.eigvalsh(flat.T @ flat)[0], rtol=1e-9)
    assert converged


def test_a_solve_that_falls_short_is_not_a_number():
    matrix = jnp.diag(jnp.geomspace(1.0, 1e-4, 30))
    short = linalg.conjugate_gradient_inverse(lambda v: matrix @ v, steps=3)
    assert np.all(np.isnan(jax.jit(short)(jnp.ones(30))))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_conjugate_gradients_invert(dtype):
    matrix = helpers.psd_with_spectrum(jnp.geomspace(1.0, 1e-2, 30), KEY).astype(dtype)
    b = jnp.arange(30).astype(dtype)
    solve = linalg.conjugate_gradient_inverse(lambda v: matrix @ v, damping=0.1)
    found = jax.jit(solve)(b)
    assert found.dtype == dtype
    found = np.asarray(found, np.float64)
    exact = np.linalg.solve(np.asarray(matrix, np.float64) + 0.1 * np.eye(30), np.asarray(b))
    eps = float(jnp.finfo(dtype).eps)
    assert np.linalg.norm(found - exact) < 20 * eps**0.75 * np.linalg.norm(exact) * 10
    np.testing.assert_array_equal(jax.jit(solve)(jnp.zeros_like(b)), np.zeros(30))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: hessians.sharded_l2_probe_operator(x, LINE, rows="model"), "axes"),
        (lambda x: hessians.sharded_l2_probe_operator(x[:15], LINE, rows="data"), "15 rows"),
        (lambda x: hessians.sharded_l2_probe_operator(x, LINE, columns="data"), "20 columns"),
        (
            lambda x: hessians.sharded_l2_probe_operator(x, GRID, rows="data", columns="data"),
            "different axes",
        ),
        (lambda x: hessians.column_sharded_gram(x, LINE, axis="data"), "20 columns"),
        (lambda x: hessians.dual_gram(x, LINE, columns="data"), "20 columns"),
        (lambda x: hessians.column_sharded_operator(x, LINE, axis="data"), "square"),
        (
            lambda x: linalg.damped_operator_extremes(lambda v: v, 3, KEY, damping=0.0),
            "damping",
        ),
        (
            lambda x: linalg.damped_operator_extremes(lambda v: v, 0, KEY, damping=1.0),
            "dim",
        ),
        (lambda x: linalg.conjugate_gradient_inverse(lambda v: v, steps=0), "steps"),
    ],
)
def test_senseless_input_is_refused_at_the_door(call, message):
    with pytest.raises(ValueError, match=message):
        call(rows(16, 20))
