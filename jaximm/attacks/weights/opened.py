r"""The model's program is opened: then nothing in it is closed to a gradient.

Whoever has a model has its code, so what an author calls frozen, stopped, checked or noisy is that
only for those who run the code as it stands. These attackers evaluate it by
`jaximm.attacks.weights.program.Walk`, and train in its place

    parameters (whole numbers as real ones), every large constant, and a shift and a scale of what
    enters units that are dead (so that half of the rows pass),

with true derivatives through custom rules, stopped gradients and rounding (BPDA), with choices by
the weights alone (checksums, seals) fixed as they are in the model as it came, and with noise that
is keyed by the inputs at its mean. Features are standardised, which the benign head makes up for.

Steps are relative, so that a function-preserving rescaling of layers or units changes nothing:

    w_ij <- w_ij - rate * s_ij * m_ij / sqrt(v_ij),      s_ij = r_i c_j / rms(w),

with Adam's moments m and v, and r_i, c_j the root mean squares of row and column (Adafactor's
factored size); a vector goes by its own size, the head by 1. Rates rise over the first
`WARMUP` steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from jaximm.attacks.grid import Hyper, Values, grid
from jaximm.attacks.weights.descent import descent
from jaximm.attacks.weights.factor_insert import spectrum_flops
from jaximm.attacks.weights.problem import (
    Access,
    FineTuneProblem,
    ModelWeights,
    WeightAttack,
)
from jaximm.attacks.weights.program import Walk, walked
from jaximm.attacks.weights.solved_head import ridge_head
from jaximm.types import Head, as_argument

SOURCE = (
    "Athalye, Carlini, Wagner (2018), Obfuscated gradients give a false sense of security, "
    "https://arxiv.org/abs/1802.00420; relative steps: You et al. (2020), "
    "https://arxiv.org/abs/1904.00962, and Shazeer and Stern (2018), "
    "https://arxiv.org/abs/1804.04235"
)

LEAST_CONSTANT = 2
"""A constant with fewer numbers is none that weights hide in."""

WARMUP = 10
"""Steps over which rates rise."""

BLOCK = 256
"""Rows that are looked at, at most."""

ALIKE = 1e-6
"""A unit whose outputs differ by less than this, over what enters, is dead."""


class Unit(NamedTuple):
    """Of the units of an activation, over rows and positions: [p] each.

    `before` and `after` are the spans of what enters and what comes out; `middle` and `size` are
    median and standard deviation of what enters.
    """

    before: np.ndarray
    after: np.ndarray
    middle: np.ndarray
    size: np.ndarray


def unit_of(entering: Any, output: Any) -> Unit:
    """`Unit` of values [n, ..., p]."""
    before, after = (np.asarray(one).reshape(-1, one.shape[-1]) for one in (entering, output))
    return Unit(
        np.ptp(before, axis=0),
        np.ptp(after, axis=0),
        np.median(before, axis=0),
        np.std(before, axis=0),
    )


class Looked(NamedTuple):
    """What is in a model's program, at its weights, on some rows; all but `counts` by number.

    `lifts`: what brings weights whose own activation hides them to the size of the others.
    """

    constants: dict[int, Any]
    gates: dict[int, bool]
    units: dict[int, Unit]
    lifts: dict[int, Any]
    counts: dict[str, int]


def look(features_fn: Callable[..., Any], params: Any, x: Any, **walk: Any) -> Looked:
    """Walks a program once and keeps what it meets.

    Args:
      features_fn, params, x: the model and rows.
      **walk: further fields of `Walk`.
    """
    record = Looked({}, {}, {}, {}, {})

    def met(kind: str, number: int, values: Any) -> None:
        record.counts[kind] = record.counts.get(kind, 0) + 1
        if kind == "constant" and np.size(values) >= LEAST_CONSTANT:
            record.constants[number] = jnp.asarray(values)
        if kind == "gate":
            sides = np.unique(np.asarray(values))
            if sides.size == 1:
                record.gates[number] = bool(sides[0])
        if kind == "lift" and values[0].shape == values[1].shape and (lift := _lift(*values)).any():
            record.lifts[number] = jnp.asarray(lift)
        if kind == "unit" and values[1].ndim >= 2 and values[0].shape == values[1].shape:
            record.units[number] = unit_of(*values)

    model, n = as_argument(features_fn), x.shape[0]
    walked(Walk(rows=n, met=met, **walk), model, params, x, like=params)
    # What has another shape for other rows is no weight.
    shapes: dict[int, tuple[int, ...]] = {}

    def seen(kind: str, number: int, values: Any) -> None:
        if kind == "constant":
            shapes[number] = np.shape(values)

    fewer = jax.tree.map(lambda leaf: leaf[: n - 1], x)
    jax.eval_shape(
        lambda params, x: walked(Walk(rows=n - 1, met=seen, **walk), model, params, x, like=params),
        params,
        fewer,
    )
    for number in list(record.constants):
        if shapes.get(number) != record.constants[number].shape:
            del record.constants[number]
    return record


def _lift(before: Any, after: Any) -> np.ndarray:
    """What is missing of weights that an activation flattens, so that they pass like the others."""
    before, after = np.asarray(before), np.asarray(after)
    hidden = after != before
    passing = np.abs(after[~hidden])
    typical = float(passing.mean()) if passing.any() else 1.0
    return np.where(hidden, after + typical - before, 0.0)


def dead_units(units: Mapping[int, Unit]) -> dict[int, np.ndarray]:
    """By number, which units (of the last axis) are alike for all rows; what enters is not."""
    masks = {
        number: (unit.after <= ALIKE * unit.before) & (unit.before > 0)
        for number, unit in units.items()
    }
    return {number: dead for number, dead in masks.items() if dead.any()}


def revived(units: Mapping[int, Unit]) -> dict[int, tuple[jax.Array, jax.Array]]:
    """(shift, scale) by which dead units pass half of the rows, with a spread of 1."""
    pairs = {}
    for number, dead in dead_units(units).items():
        unit = units[number]
        shift = np.where(dead, -unit.middle, 0.0).astype(unit.middle.dtype)
        scale = np.where(dead, 1 / np.where(unit.size > 0, unit.size, 1.0), 1.0)
        pairs[number] = jnp.asarray(shift), jnp.asarray(scale.astype(unit.size.dtype))
    return pairs


@dataclasses.dataclass(frozen=True)
class Opened:
    """A program with its edits, as a function of (model, fixed arrays, params, x).

    Attributes:
      like: structure, shapes and dtypes of the parameters as the model takes them.
      gates: (number, side) pairs.
      tap: number of the value that is given; None: the features.
    """

    like: Any
    gates: tuple[tuple[int, bool], ...]
    tap: int | None = None

    def __call__(self, model: Any, fixed: Any, params: Any, x: Any) -> Any:
        """What is tapped, or the features, by an edited walk of `model`."""
        mean, size = fixed
        structure, shapes = self.like
        like = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*one) for one in shapes])
        taken: list[Any] = []

        def tapped(number: int, array: Any) -> None:
            if number == self.tap:
                taken.append(array)

        walk = Walk(
            rows=x.shape[0],
            constants={int(key): value for key, value in params["constants"].items()},
            gates=dict(self.gates),
            lifts={int(key): value for key, value in params["lifts"].items()},
            shifts={int(key): value for key, value in params["shifts"].items()},
            quiet=True,
            tapped=tapped,
        )
        output = walked(walk, model, params["model"], x, like=like)
        if self.tap is not None:
            (output,) = taken
        if mean is None:
            return output
        return (flat(output) - mean[None]) / size[None]


WIDTH = 1024
"""Values with more numbers a row than this are averaged over their positions."""


def flat(values: jax.Array) -> jax.Array:
    """Values [n, ...] as [n, p]."""
    n, *shape = values.shape
    if len(shape) > 1 and int(np.prod(shape)) > WIDTH:
        values = jnp.mean(values, axis=tuple(range(1, len(shape))))
    return values.reshape(n, -1)


def _real(leaf: Any) -> Any:
    """Whole numbers as real ones."""
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf


def like_of(params: Any) -> Any:
    """What `Opened.like` is of parameters."""
    leaves, structure = jax.tree.flatten(params)
    return structure, tuple((leaf.shape, jnp.dtype(leaf.dtype).name) for leaf in leaves)


def rows_of(problem: FineTuneProblem) -> jax.Array:
    """Training rows that are looked at; of texts, a few."""
    return jnp.asarray(np.asarray(problem.train.x)[: BLOCK if problem.head else 4])


def looked(problem: FineTuneProblem) -> Looked:
    """`look` at a problem's model, with its noise at the mean; once."""
    return problem.once(
        "looked",
        lambda: look(problem.features_fn, problem.params, rows_of(problem), quiet=True),
    )


class World(NamedTuple):
    """Edits of a program; see `Walk`."""

    gates: dict[int, bool]
    shifts: dict[int, Any]
    lifts: dict[int, Any]


MOST_GATES = 8
"""Gates that are tried the other way one by one."""


def worlds(problem: FineTuneProblem) -> dict[str, World]:
    """Programs that are worth a look: as it is, with dead units revived, with gates turned."""
    record = looked(problem)
    gates, shifts = record.gates, revived(record.units)
    programs = {"as it is": World(gates, {}, {})}
    if shifts or record.lifts:
        programs["revived"] = World(gates, shifts, record.lifts)
    for number in list(gates)[:MOST_GATES]:
        programs[f"gate {number} turned"] = World(gates | {number: not gates[number]}, {}, {})
    if len(gates) > 1:
        turned = {number: not answer for number, answer in gates.items()}
        programs["all gates turned"] = World(turned, {}, {})
    return programs


def opened_problem(
    problem: FineTuneProblem,
    *,
    world: World,
    tap: int | None = None,
    heads_of: Callable[[jax.Array, jax.Array], dict[str, Any]] = lambda mean, size: {},
) -> FineTuneProblem:
    """The problem of a model whose program is open, with what it gives standardised.

    Args:
      problem: as posed.
      world: what is edited in the program before it is trained.
      tap: see `Opened`.
      heads_of: fields of the problem that follow from mean and size of the columns.
    """
    record = looked(problem)
    params = {
        "model": jax.tree.map(_real, problem.params),
        "constants": {str(number): value for number, value in record.constants.items()},
        "shifts": {str(number): pair for number, pair in world.shifts.items()},
        "lifts": {str(number): lift for number, lift in world.lifts.items()},
    }
    program = Opened(like_of(problem.params), tuple(sorted(world.gates.items())), tap)
    model, standard, heads = as_argument(problem.features_fn), (None, None), {}
    if problem.head:
        values = np.asarray(flat(program(model, standard, params, rows_of(problem))))
        standard = standard_of(values)
        heads = heads_of(*standard)
    return dataclasses.replace(
        problem,
        features_fn=Partial(program, model, standard),
        params=params,
        public=None,
        canonical_fn=None,
        refresh_fn=None,
        takes_adapters=False,
        scale_path=None,
        readings_fn=None,
        stacked=_Stacked(problem.stacked),
        opened=True,
        **heads,
    )


@dataclasses.dataclass(frozen=True)
class _Stacked:
    """``stacked`` of parameters below "model"."""

    inner: Callable[[str], int]

    def __call__(self, path: str) -> int:
        first, _, rest = path.partition(".")
        return self.inner(rest) if first == "model" else 0


def standard_of(values: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of columns; 1 where a column is constant."""
    mean, size = np.mean(values, axis=0), np.std(values, axis=0)
    # A column of a constant has the spread of its rounding.
    flat_one = size <= 1e-6 * np.abs(mean)
    return jnp.asarray(mean), jnp.asarray(np.where(flat_one | (size == 0), 1.0, size))


def _standardised(problem: FineTuneProblem, world: World) -> FineTuneProblem:
    """An open problem whose heads make up for what was done to the features."""

    def made_up(head: Head, mean: jax.Array, size: jax.Array) -> Head:
        mean, size = mean.astype(head.kernel.dtype), size.astype(head.kernel.dtype)
        moved = jnp.matmul(mean, head.kernel, precision="highest")
        return Head(head.kernel * size[:, None], head.bias + moved)

    def heads_of(mean: jax.Array, size: jax.Array) -> dict[str, Any]:
        benign = problem.benign
        if benign is not None:
            benign = dataclasses.replace(benign, head=made_up(benign.head, mean, size))
        return {"head": made_up(problem.head, mean, size), "benign": benign}

    return opened_problem(problem, world=world, heads_of=heads_of)


def _open(problem: FineTuneProblem) -> FineTuneProblem | str:
    return _standardised(problem, worlds(problem)["as it is"])


def _revive(problem: FineTuneProblem) -> FineTuneProblem | str:
    world = worlds(problem).get("revived")
    return "no unit of it is dead" if world is None else _standardised(problem, world)


# --- the optimiser -------------------------------------------------------------------------------


def size_of(leaf: jax.Array) -> jax.Array:
    """The size of each entry, by row and column of the last two axes; a vector's own.

    >>> size_of(jnp.array([[1.0, 100.0], [2.0, 200.0]])).round(1).tolist()
    [[1.0, 100.0], [2.0, 200.0]]
    """
    if leaf.ndim < 2:
        there = leaf != 0
        logs = jnp.log(jnp.where(there, jnp.abs(leaf), 1.0))
        # Units may be of very different sizes: a zero among them gets that in the middle.
        middle = jnp.exp(jnp.sum(logs) / jnp.maximum(jnp.sum(there), 1).astype(leaf.dtype))
        size = jnp.where(there, jnp.abs(leaf), middle)
    else:
        matrix = leaf.reshape(-1, leaf.shape[-1])
        scale = jnp.max(jnp.abs(matrix))
        unit = matrix / jnp.where(scale > 0, scale, 1.0)  # squares stay in range
        rows, columns = (jnp.sqrt(jnp.mean(unit**2, axis=axis)) for axis in (1, 0))
        whole = jnp.sqrt(jnp.mean(unit**2))
        size = rows[:, None] * columns[None] / jnp.where(whole > 0, whole, 1.0)
        size = (size * scale).reshape(leaf.shape)
    # What is zero has no size of its own.
    return jnp.where(jnp.any(leaf != 0), size, jnp.full_like(size, 0.1))


def _relative(hyper: Hyper, access: Access) -> optax.GradientTransformation:
    """Adam's direction, times the size of what it moves."""
    del access

    def sized(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def of_params(step: jax.Array, leaf: jax.Array) -> jax.Array:
            return step * size_of(leaf)

        moves = jax.tree.map(of_params, updates.params, params.params)
        return updates._replace(params=moves), state

    ramp = optax.linear_schedule(1 / WARMUP, 1.0, WARMUP)
    return optax.chain(
        optax.scale_by_adam(eps=1e-30, eps_root=0.0),
        optax.GradientTransformation(lambda params: optax.EmptyState(), sized),
        optax.scale_by_schedule(ramp),
        optax.scale(-1.0 * hyper["learning_rate"]),
    )


def _start(access: Access, hyper: Hyper) -> ModelWeights:
    """The weights with a solved head, where the task has one of its own."""
    weights = access.weights
    if not weights.head:
        return weights
    kernel, bias = weights.head
    head = ridge_head(access.features, kernel.shape[1], hyper["penalty"])
    is_class = jnp.issubdtype(access.features.y.dtype, jnp.integer)
    scale = jnp.asarray(4.0 if is_class else 1.0, bias.dtype)
    return weights._replace(head=Head(*(part.astype(bias.dtype) * scale for part in head)))


# Built once: the same function objects each time, so that jit finds the compiled run again.
_RELATIVE = descent(_relative, _start)


def _attacker(learning_rates: Values, penalties: Values, **said: Any) -> WeightAttack:
    init, update = _RELATIVE
    return WeightAttack(
        init=init,
        update=update,
        update_reads=("learning_rate",),
        grid=grid(learning_rate=(learning_rates, "(0, inf)"), penalty=(penalties, "(0, inf)")),
        swept=("learning_rate",),
        source=SOURCE,
        passes=1.0,
        solve_flops=lambda problem: spectrum_flops(problem) if problem.head else (0.0, 0.0),
        knows="the code of the model",
        **said,
    )


def opened(
    *, learning_rates: Values = (1e-2, 1e-1), penalties: Values = (1e-3, 1e2)
) -> WeightAttack:
    """Relative steps on everything in the model's program, with its true derivatives.

    Args:
      learning_rates: > 0, of the size of a weight.
      penalties: > 0, of the head that is solved first, over the mean variance of a feature.
    """
    return _attacker(
        learning_rates,
        penalties,
        pose=_open,
        kind="opened",
        title="the program opened",
        traits=frozenset({"preconditions", "undoes_defence", "opens"}),
    )


def revive(
    *, learning_rates: Values = (1e-2, 1e-1), penalties: Values = (1e-3, 1e2)
) -> WeightAttack:
    """Dead units pass half of the rows again, then as `opened`.

    Args:
      learning_rates, penalties: those of `opened`.
    """
    return _attacker(
        learning_rates,
        penalties,
        pose=_revive,
        kind="opened",
        title="dead units revived",
        traits=frozenset({"preconditions", "undoes_defence", "opens"}),
    )
