"""Hessians and Gauss-Newton matrices of any loss of a pytree of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from jaximm.hessians.rows import Matvec
from jaximm.linalg.arrays import as_float, check_function


def _computing(tree):
    """A pytree with its float16 and bfloat16 leaves, NumPy's too, as `as_float` has them."""

    def leaf(value):
        dtype = getattr(value, "dtype", None)
        floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
        return as_float(value) if floating else value

    return jax.tree.map(leaf, tree)


def dense_hessian(loss_fn: Callable[..., Array]) -> Callable[..., Array]:
    """The function that gives the dense Hessian of ``loss_fn`` in its first argument.

    Args:
      loss_fn: ``loss_fn(params, *args) -> scalar``, params any pytree of floating-point arrays.
        Half-precision leaves of params and args reach it as float32.

    Returns:
      ``hessian(params, *args) -> [p, p]``, in the coordinates of
      ``jax.flatten_util.ravel_pytree(params)``. A plain function: put ``jax.jit`` around it. It
      costs p Hessian-vector products and p^2 memory.

    Raises:
      ValueError: `loss_fn` is no function.

    >>> loss = lambda params: params["a"] ** 2 * params["b"]
    >>> dense_hessian(loss)({"a": jnp.array(1.0), "b": jnp.array(3.0)}).tolist()
    [[6.0, 2.0], [2.0, 0.0]]
    """
    check_function(loss_fn, "loss_fn")

    def hessian(params, *args):
        flat, unravel = ravel_pytree(_computing(params))
        args = _computing(args)
        return jax.hessian(lambda vector: loss_fn(unravel(vector), *args))(flat)

    return hessian


def hvp(loss_fn: Callable[..., Array], params, *args) -> Matvec:
    """Hessian-vector products of ``loss_fn`` at ``params``, forward over reverse.

    Args:
      loss_fn: ``loss_fn(params, *args) -> scalar``.
      params: pytree where the Hessian is taken; half-precision leaves, of `args` too, as float32.
      *args: further arguments, held fixed.

    Returns:
      ``matvec(tangent) -> pytree``: both like ``params``. About the cost of two gradients.

    Raises:
      ValueError: `loss_fn` is no function.
    """
    check_function(loss_fn, "loss_fn")
    params, args = _computing(params), _computing(args)
    gradient = jax.grad(lambda point: loss_fn(point, *args))

    def matvec(tangent):
        return jax.jvp(gradient, (params,), (_computing(tangent),))[1]

    return matvec


def gauss_newton_operator(
    outputs_fn: Callable[[Any], Any], output_loss_fn: Callable[[Any], Array], params
) -> Matvec:
    """Products with the (generalised) Gauss-Newton matrix ``J^T H_out J``.

    J is the Jacobian of ``outputs_fn`` at ``params`` and H_out the Hessian of the loss in the
    outputs. It equals the Hessian where the outputs are linear in the parameters, and is positive
    semi-definite whenever the loss is convex in the outputs.

    Args:
      outputs_fn: ``outputs_fn(params) -> outputs``, any pytree; close over the inputs.
      output_loss_fn: ``output_loss_fn(outputs) -> scalar``; close over the targets.
      params: pytree where the matrix is taken.

    Returns:
      ``matvec(tangent) -> pytree``: both like ``params``. One jvp, one vjp, and one
      Hessian-vector product in the outputs.

    Raises:
      ValueError: one of the two is no function.
    """
    check_function(outputs_fn, "outputs_fn")
    check_function(output_loss_fn, "output_loss_fn")
    params = _computing(params)

    def matvec(tangent):
        outputs, outputs_dot = jax.jvp(outputs_fn, (params,), (_computing(tangent),))
        curved = hvp(output_loss_fn, outputs)(outputs_dot)
        _, pullback = jax.vjp(outputs_fn, params)
        return pullback(curved)[0]

    return matvec


class FlatOperator(NamedTuple):
    """A matvec on vectors ``[dim] -> [dim]``, as Krylov methods want it."""

    matvec: Matvec
    dim: int


def flatten_operator(matvec: Matvec, params) -> FlatOperator:
    """A pytree matvec in the coordinates of ``ravel_pytree(params)``.

    Args:
      matvec: linear map of pytrees like ``params``, such as `hvp` returns.
      params: a pytree that gives structure, shapes and dtype; its values do not matter.

    Raises:
      ValueError: `matvec` is no function.
    """
    check_function(matvec, "matvec")
    flat, unravel = ravel_pytree(_computing(params))
    return FlatOperator(lambda vector: ravel_pytree(matvec(unravel(vector)))[0], flat.shape[0])
