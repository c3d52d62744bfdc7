import jax.numpy as jnp
import numpy as np
import pytest

from jaximm import hessians, linalg, regularisers
from jaximm.linalg.arrays import as_float, as_square


@pytest.mark.parametrize("dtype", [">f4", ">f8"])
def test_both_byte_orders_give_the_same_bits(dtype):
    stored = np.random.default_rng(0).normal(size=(8, 8)).astype(dtype)
    native = stored.astype(stored.dtype.newbyteorder("="))
    for function in (
        lambda x: linalg.feature_condition_number(x).log_kappa,
        lambda x: linalg.singular_extremes(x).smallest,
        hessians.l2_probe_hessian,
        regularisers.well_conditioning,
    ):
        np.testing.assert_array_equal(function(stored), function(native))


@pytest.mark.parametrize("came", [np.ones((2, 2), int), [[1.0]], None, np.ones((2, 2), complex)])
def test_what_is_no_float_array_is_named(came):
    with pytest.raises(ValueError, match="hessian must be an array of float dtype, got"):
        as_float(came, name="hessian")


def test_a_square_says_what_shape_came():
    with pytest.raises(ValueError, match=r"gram must be square \(d, d\), got shape \(2, 3\)"):
        as_square(jnp.ones((2, 3)), name="gram")
