"""No function of features asks for memory of n x n: what XLA plans for 75,000 x 100, never run.

`jnp.linalg.svd(x, compute_uv=False)` alone plans for 1,500 times its input there.
"""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm import hessians, linalg, regularisers
from jaximm.immunisers import problem
from jaximm.immunisers.conditioning import balanced_gap, direct_kappa, row_space
from jaximm.linalg import modular
from jaximm.measures.conditioning import TaskRows, kappas
from jaximm.types import Batch, PairedBatch

pytestmark = pytest.mark.heavy

N, D = 75_000, 100
LIMIT = 4


def task_kappas(kappas_fn):
    return lambda x: kappas_fn(TaskRows(x, jnp.ones((), x.dtype)), jnp.eye(D, dtype=x.dtype))


def matvec(operator, *arguments):
    return lambda x: operator(x, *arguments)(jnp.ones((D,), x.dtype))


def weights(*shape):
    return jnp.zeros(shape, jnp.float32)


def one_step_of_gram(x):
    return hessians.gram_finalise(hessians.gram_update(hessians.gram_init(D, dtype=x.dtype), x))


def gradient(of_features):
    return jax.grad(lambda x: jnp.sum(of_features(x) ** 2))


def targets(x):
    return x[:, :2]


OF_FEATURES = {
    "condition_number": linalg.condition_number,
    "condition_number, rtol": lambda x: linalg.condition_number(x, rtol=1e-5),
    "feature_condition_number": linalg.feature_condition_number,
    "feature_condition_number, damped": lambda x: linalg.feature_condition_number(x, damping=0.1),
    "feature_condition_number, gradient": jax.grad(
        lambda x: linalg.feature_condition_number(x).log_kappa
    ),
    "modular_rank": modular.modular_rank,
    "svd_extremes": linalg.svd_extremes,
    "gram_extremes": linalg.gram_extremes,
    "singular_extremes": linalg.singular_extremes,
    "singular_extremes, fast": lambda x: linalg.singular_extremes(x, accurate=False),
    "singular_extremes, gradient": jax.grad(lambda x: linalg.singular_extremes(x).smallest),
    "damped_factor": lambda x: linalg.damped_factor(x, damping=0.1),
    "pencil_from_factors": lambda x: linalg.pencil_from_factors(x, x),
    "label_moments": lambda x: linalg.label_moments(x, targets(x)),
    "linear_eraser": lambda x: linalg.linear_eraser(linalg.label_moments(x, targets(x))),
    "well_conditioning_of_features": regularisers.well_conditioning_of_features,
    "well_conditioning_of_features, gradient": jax.grad(regularisers.well_conditioning_of_features),
    "ill_conditioning_of_features": regularisers.ill_conditioning_of_features,
    "ill_conditioning_of_features, gradient": jax.grad(regularisers.ill_conditioning_of_features),
    "l2_probe_hessian": hessians.l2_probe_hessian,
    "l2_probe_operator": matvec(hessians.l2_probe_operator),
    "logistic_probe_hessian": lambda x: hessians.logistic_probe_hessian(x, weights(D)),
    "logistic_probe_operator": matvec(hessians.logistic_probe_operator, weights(D)),
    "softmax_probe_hessian": lambda x: hessians.softmax_probe_hessian(x, weights(D, 3)),
    "softmax_probe_operator": lambda x: hessians.softmax_probe_operator(x, weights(D, 3))(
        weights(D * 3)
    ),
    "gram_update": one_step_of_gram,
    "l2_probe_hessian, gradient": gradient(hessians.l2_probe_hessian),
    "logistic_probe_hessian, gradient": gradient(
        lambda x: hessians.logistic_probe_hessian(x, weights(D), weights())
    ),
    "logistic_probe_operator, gradient": gradient(
        lambda x: hessians.logistic_probe_operator(x, weights(D), weights())(weights(D + 1))
    ),
    "softmax_probe_hessian, gradient": gradient(
        lambda x: hessians.softmax_probe_hessian(x, weights(D, 3), weights(3))
    ),
    "softmax_probe_operator, gradient": gradient(
        lambda x: hessians.softmax_probe_operator(x, weights(D, 3), weights(3))(weights(D * 3 + 3))
    ),
    "gram_update, gradient": gradient(lambda x: one_step_of_gram(x).gram),
    "conditioning.kappas": task_kappas(kappas),
    "problem.triangle": lambda x: problem.triangle(x, 0.1),
    "problem.relative_damping": lambda x: problem.relative_damping(x, 0.1),
    "direct_kappa.log_condition": jax.grad(direct_kappa.log_condition),
    "balanced_gap's spectrum": balanced_gap._log_spectrum,
}


DEAR = {f"{name}, gradient" for name in ("logistic_probe_hessian", "logistic_probe_operator")}
DEAR.add("softmax_probe_operator, gradient")
"""Seconds of compilation each: the gate has the softmax Hessian's, the largest of them."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in DEAR)) for name in OF_FEATURES]
)
def test_memory_is_linear_in_the_rows(name):
    shape = jax.ShapeDtypeStruct((N, D), jnp.float32)
    planned = jax.jit(OF_FEATURES[name]).lower(shape).compile().memory_analysis()
    needed = planned.temp_size_in_bytes + planned.output_size_in_bytes
    assert needed < LIMIT * N * D * 4, f"{needed / (N * D * 4):.1f} times the input"


def test_wide_features_need_no_d_by_d_matrix_either():
    shape = jax.ShapeDtypeStruct((D, N), jnp.float32)
    planned = jax.jit(linalg.feature_condition_number).lower(shape).compile().memory_analysis()
    assert planned.temp_size_in_bytes < LIMIT * N * D * 4


@pytest.mark.slow
def test_row_space_is_found_on_the_host_within_four_times_the_rows():
    rng = np.random.default_rng(0)
    tasks = [Batch(rng.standard_normal((n, 130)), np.zeros(n)) for n in (2000, 1900)]
    arrays = PairedBatch(*tasks)
    tracemalloc.start()
    try:
        row_space.row_space_basis(arrays)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < LIMIT * 3900 * 130 * 8 + 2**20
