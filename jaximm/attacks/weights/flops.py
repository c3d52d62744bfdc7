"""FLOPs of a compiled step, as XLA counts them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaximm.attacks.grid import Hyper
from jaximm.attacks.weights.draws import _access, _batches, _draw, _Held
from jaximm.attacks.weights.problem import (
    FineTuneProblem,
    WeightAttack,
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
    for layers that share weights over positions.
    """
    n = problem.train.x.shape[0]
    dtype = problem.head.kernel.dtype
    benign = problem.benign
    d = problem.head.kernel.shape[0]

    def abstract(batch: Batch) -> Batch:
        features: Any = jax.ShapeDtypeStruct((batch.x.shape[0], d), dtype)
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
    leaves, structure = jax.tree.flatten(held)
    counted = _count(
        attack.init,
        attack.update,
        problem.features_fn,
        problem.refresh_fn,
        structure,
        tuple((leaf.shape, jnp.dtype(leaf.dtype).name) for leaf in leaves),
        tuple(hyper),
        batch_size,
    )
    setup_flops = counted.setup + attack.passes * n / counted.rows * counted.forward
    solves = (0.0, 0.0) if attack.solve_flops is None else attack.solve_flops(problem)
    return setup_flops + solves[0], counted.step + solves[1]


class _Counted(NamedTuple):
    setup: float
    step: float
    forward: float  # of one batch
    rows: int  # of a batch


@functools.lru_cache(maxsize=1024)
def _count(init, update, features_fn, refresh_fn, structure, shapes, hyper, batch_size) -> _Counted:
    """The counts; they depend on shapes alone, and lowering takes longer than a small run."""
    held = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    dtype = held.head.kernel.dtype
    cell = {name: jax.ShapeDtypeStruct((), dtype) for name in hyper}
    number = jax.ShapeDtypeStruct((), jnp.int32)

    def start(held, seed, cell):
        return init(_access(held, seed, features_fn, refresh_fn), cell)

    def step(state, batches, held, seed, cell):
        return update(state, batches, _access(held, seed, features_fn, refresh_fn), cell)

    state = jax.eval_shape(start, held, number, cell)

    def drawn(held, seed):
        return _batches(
            held, _draw(held, seed, seed, batch_size=batch_size, batched=False), seed, seed
        )

    batches = jax.eval_shape(drawn, held, number)
    m = batches.harmful.x.shape[0]
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((held.params, held.head)))
    return _Counted(
        setup=lowered_flops(start, held, number, cell, default=0.0),
        step=lowered_flops(step, state, batches, held, number, cell, default=6.0 * m * size),
        forward=lowered_flops(features_fn, held.params, batches.harmful.x, default=2.0 * m * size),
        rows=m,
    )


def lowered_flops(fun: Callable[..., Any], *args: Any, default: float) -> float:
    """The compiler's count for one call, or `default` where there is none."""
    try:
        analysis = jax.jit(fun).lower(*args).cost_analysis()
    except NotImplementedError:  # some back ends have no cost model
        return default
    if isinstance(analysis, Sequence):  # older releases: one entry a program
        analysis = analysis[0] if analysis else None
    found = analysis.get("flops", 0.0) if isinstance(analysis, Mapping) else 0.0
    return float(found) if found > 0 else default
