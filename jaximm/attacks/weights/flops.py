"""FLOPs of a compiled step, as XLA counts them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaximm.attacks.grid import Hyper
from jaximm.attacks.weights.draws import _access, _batches, _draw, _Held, with_canonical
from jaximm.attacks.weights.problem import (
    FineTuneProblem,
    WeightAttack,
    dtype_of,
    posed,
)
from jaximm.types import Batch


def count_flops(
    attack: WeightAttack, problem: FineTuneProblem, hyper: Hyper, *, batch_size: int | None
) -> tuple[float, float]:
    """Floating-point operations of the set-up and of one update, as the compiler counts them.

    The count is that of the lowered program, before fusion, so it does not depend on the back end
    (a multiplication and an addition count one each; nothing is run or compiled). The set-up is
    `init`, with `attack.passes` forward passes over the training rows. Factorisations and compiled
    loops, which the compiler does not count, come from `attack.solve_flops`. Where the compiler
    gives no count, a training step counts 6 and a pass 2 operations a parameter and row, a floor
    for layers that share weights over positions. A problem's own `row_flops` go before the count: a
    step is then three forward passes of its rows, and `attack.step_passes` more.
    """
    form = posed(attack, problem)
    assert isinstance(form, FineTuneProblem)  # not applicable otherwise
    problem = form
    n = problem.train.x.shape[0]
    benign = problem.benign

    def abstract(batch: Batch) -> Batch | None:
        if not problem.head:
            return None
        d = problem.head.kernel.shape[0]
        features: Any = jax.ShapeDtypeStruct((batch.x.shape[0], d), problem.dtype)
        return Batch(features, batch.y)

    held = _Held(
        problem.params,
        problem.head,
        problem.train,
        abstract(problem.train),
        () if benign is None else benign.head,
        None if benign is None else benign.train,
        None if benign is None else abstract(benign.train),
        problem.public,
    )
    held = with_canonical(held, attack, problem)
    leaves, structure = jax.tree.flatten((held, problem.functions))
    shapes = structure, tuple((leaf.shape, jnp.dtype(leaf.dtype).name) for leaf in leaves)
    read = hyper if attack.update_reads is None else attack.update_reads
    setup, state = _setup(attack.init, shapes, tuple(hyper))
    counted = _step(attack.update, shapes, state, tuple(read), batch_size)
    if problem.row_flops is not None:
        forward = counted.rows * problem.row_flops
        counted = counted._replace(step=(3 + attack.step_passes) * forward, forward=forward)
    setup += attack.passes * n / counted.rows * counted.forward
    solves = (0.0, 0.0) if attack.solve_flops is None else attack.solve_flops(problem)
    return setup + solves[0], counted.step + solves[1]


Shapes = tuple[Any, tuple[tuple[tuple[int, ...], str], ...]]
"""The structure of a tree, and shape and dtype of its leaves: what a count depends on."""


class _Counted(NamedTuple):
    step: float
    forward: float  # of one batch
    rows: int  # of a batch


def _abstract(shapes: Shapes) -> Any:
    return jax.tree.unflatten(shapes[0], [jax.ShapeDtypeStruct(*leaf) for leaf in shapes[1]])


def _cell(held: _Held, names: tuple[str, ...]) -> dict[str, Any]:
    dtype = dtype_of(held.head, held.params)
    return {name: jax.ShapeDtypeStruct((), dtype) for name in names}


_NUMBER = jax.ShapeDtypeStruct((), np.dtype("int32"))


# The counts depend on shapes alone, and lowering takes longer than a small run.
@functools.lru_cache(maxsize=1024)
def _setup(init, shapes: Shapes, names) -> tuple[float, Shapes]:
    """The count of `init`, and the shapes of the state that it gives."""
    held, functions = _abstract(shapes)
    cell = _cell(held, names)

    def start(held, functions, seed, cell):
        return init(_access(held, seed, functions), cell)

    arguments = held, functions, _NUMBER, cell
    leaves, structure = jax.tree.flatten(jax.eval_shape(start, *arguments))
    state = structure, tuple((leaf.shape, jnp.dtype(leaf.dtype).name) for leaf in leaves)
    return lowered_flops(start, *arguments, default=0.0), state


@functools.lru_cache(maxsize=1024)
def _step(update, shapes: Shapes, state: Shapes, names, batch_size) -> _Counted:
    """The counts of one update and of a forward pass of its batch."""
    held, functions = _abstract(shapes)

    def step(state, batches, held, functions, seed, cell):
        return update(state, batches, _access(held, seed, functions), cell)

    def drawn(held, seed):
        return _batches(
            held, _draw(held, seed, seed, batch_size=batch_size, batched=False), seed, seed
        )

    batches = jax.eval_shape(drawn, held, _NUMBER)
    m = batches.harmful.x.shape[0]
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((held.params, held.head)))
    cell = _cell(held, names)
    return _Counted(
        step=lowered_flops(
            step, _abstract(state), batches, held, functions, _NUMBER, cell, default=6.0 * m * size
        ),
        forward=lowered_flops(
            applied, functions.features_fn, held.params, batches.harmful.x, default=2.0 * m * size
        ),
        rows=m,
    )


def applied(features_fn: Any, params: Any, inputs: Any) -> Any:
    """``features_fn(params, inputs)``, the function an argument; see `jaximm.types.as_argument`."""
    return features_fn(params, inputs)


def lowered_flops(fun: Callable[..., Any], *args: Any, default: float) -> float:
    """The compiler's count for one call, or `default` where there is none."""
    try:
        analysis = jax.jit(fun).lower(*args).cost_analysis()
    except NotImplementedError:  # some back ends have no cost model
        return default
    if isinstance(analysis, Sequence):  # older releases: one entry a program
        analysis = analysis[0] if analysis else None
    count = analysis.get("flops", 0.0) if isinstance(analysis, Mapping) else 0.0
    return float(count) if count > 0 else default
