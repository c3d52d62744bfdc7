"""The loop that runs attackers of weights, and what it measures of them.

Trajectories (cells of hyper-parameters by seeds) run one after the other or some at once, the loop
over their steps on the host or in one compiled program; the same numbers either way. What does not
depend on the attacker, the rows of every step and the measuring, is compiled once for all of them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaximm.attacks.grid import MAX_STEPS, Hyper, recorded_steps
from jaximm.attacks.probe.problem import check_attacker
from jaximm.attacks.weights.draws import (
    DRAWN,
    _access,
    _batches,
    _draw,
    _Held,
    _held,
    with_canonical,
)
from jaximm.attacks.weights.flops import count_flops
from jaximm.attacks.weights.measure import (
    _curves,
    _gradient_norms,
    _measure,
    _read,
    _Rows,
    _sets_of,
)
from jaximm.attacks.weights.problem import (
    FineTuneProblem,
    ModelWeights,
    WeightAttack,
    guessing_loss,
    not_applicable,
    posed,
)
from jaximm.types import as_argument

Loop = Literal["host", "device"]


def _measured_at_once(problem: FineTuneProblem) -> int:
    """Rows that a program measures for loops on the device: one size for all sets of a problem.

    Few sizes, so that tasks of other rows share a program; but 24 rows are not filled up to 256.
    """
    n = max(part.x.shape[0] for part in problem.measured_sets().values())
    return min(256, max(32, 1 << (n - 1).bit_length()))


class FineTuneTrace(NamedTuple):
    """One attacker on one problem: g cells of hyper-parameters by s seeds, at r recorded steps.

    All but the weights is on the host.

    Losses are mean cross-entropies in nats, or half mean squared errors. Quality is accuracy, or
    R^2 for real targets; a row whose outputs are not all numbers counts as wrong (R^2: the quality
    is NaN).
    """

    step: Int[np.ndarray, "r"]  # 0, then log-spaced up to the budget
    train_loss: Float[np.ndarray, "g s r"]  # on `problem.measured`
    held_out_loss: Float[np.ndarray, "g s r"]
    held_out_quality: Float[np.ndarray, "g s r"]
    utility: Float[np.ndarray, "g s r"]  # of the benign task; NaN without one
    utility_scores: Float[np.ndarray, "g s r m"]  # by its held-out row; m = 0 without one
    finite: Bool[np.ndarray, "g s r"]  # whether the loss of every held-out row is, of both tasks
    selection_loss: Float[np.ndarray, "g s r"]  # NaN without such rows, as the quality
    selection_quality: Float[np.ndarray, "g s r"]
    scores: Float[np.ndarray, "g s r n"]  # by held-out row, of mean `held_out_quality`
    readings: dict[str, Float[np.ndarray, "g s r"]]  # of `FineTuneProblem.readings_fn`
    gradient: Float[np.ndarray, "g s 2"]  # norm at the start and the end of that of all weights
    backbone_gradient: Float[np.ndarray, "g s"]  # norm at the end of that of `params` alone
    diverged: Bool[np.ndarray, "g s"]  # not finite, or above both its start and guessing at the end
    still_falling: Bool[np.ndarray, "g s"]  # the training loss fell by 1 % over the last tenth
    setup_flops: float
    step_flops: float  # of one update on one mini-batch
    weights: ModelWeights | None  # at the end, leaves [g, s, ...]; only if asked for


def run_fine_tune(
    attack: WeightAttack,
    problem: FineTuneProblem,
    grid: Sequence[Hyper] | None = None,
    *,
    steps: int,
    seeds: Sequence[int] = (0,),
    batch_size: int | None = 64,
    record: int | Sequence[int] = 20,
    chunk: int | None = 1,
    loop: Loop = "host",
    keep_weights: bool = False,
    devices: Sequence[Any] = (),
) -> FineTuneTrace:
    """Run every cell of the grid from every seed for `steps` steps, by one compiled step.

    Hyper-parameters, seeds and data are traced: another grid of the same size, another problem of
    the same `features_fn` and shapes, or another budget does not compile again. A seed fixes the
    mini-batches, the same for every cell and every backbone.

    Args:
      attack: the attacker.
      problem: the task and the backbone.
      grid: cells of hyper-parameters, all with the same names; `attack.grid` if None.
      steps: the budget, 1 <= steps <= 2^30.
      seeds: of the mini-batches; >= 0.
      batch_size: rows of a task a step, at most those of `problem.train`; None for all of them. An
        attacker who has fewer takes all of his.
        Rows are measured in blocks of this size too, or with loop="device" of a power of two, 32
        to 256, where they are no texts.
      record: at most this many log-spaced points of the curves (three more are always there); or
        the steps themselves, rising from 0 to the budget.
      chunk: how many trajectories run at once, as one batched computation: 1, one after the other,
        suits large models and CPUs; None, all at once, suits small models and accelerators.
        `fastest_execution` measures which.
      loop: where the loop over steps runs. On a CPU, XLA runs a convolution inside a compiled loop
        some fifty times slower than outside of it (measured with jax 0.10.2): "host" for those,
        "device" for small models without any.
      keep_weights: also return the final weights of every trajectory.
      devices: of this process, over which the trajectories of a chunk are spread, the chunk rounded
        up to a multiple of them; each holds the problem once. Fewer than two: where it lies.

    Raises:
      ValueError: no WeightAttack (a name, say), an attacker that needs what the problem does not
        have, an empty or ragged grid, no seeds, a budget, a batch size, a number of points or a
        chunk out of range.
    """
    check_attacker(attack, WeightAttack)
    if not isinstance(problem, FineTuneProblem):
        raise ValueError(
            "expected a FineTuneProblem, as fine_tune_problem returns it, got "
            f"{type(problem).__name__}."
        )
    n = problem.train.x.shape[0]
    reason = not_applicable(attack, problem)
    if reason is not None:
        raise ValueError(f"this attacker cannot be run here: {reason}.")
    form = posed(attack, problem)
    assert isinstance(form, FineTuneProblem)
    problem = form
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be between 1 and {MAX_STEPS}, got {steps}.")
    recorded = _recorded(steps, record)
    if len(seeds) == 0 or min(seeds) < 0:
        raise ValueError(f"seeds must be numbers >= 0, at least one, got {tuple(seeds)}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, or None for all at once, got {chunk}.")
    if loop not in ("host", "device"):
        raise ValueError(f'loop must be "host" or "device", got {loop!r}.')
    if batch_size is not None and not 1 <= batch_size <= n:
        raise ValueError(
            f"batch_size must be in [1, {n}] for {n} training rows, got {batch_size}; use None "
            "for all rows."
        )
    cells = checked_cells(attack.grid if grid is None else grid, default=grid is None)
    dtype = problem.dtype
    cases = [(cell, seed) for cell in cells for seed in seeds]
    at_once = len(cases) if chunk is None else chunk
    if len(devices) > 1:
        at_once = -(-at_once // len(devices)) * len(devices)
    block = problem.train.x.shape[0] if batch_size is None else batch_size
    held = _held(problem, block)
    # A text is as many rows as it has tokens.
    small = loop == "host" or not problem.head
    sets = _sets_of(problem, block if small else _measured_at_once(problem))
    spread, held = _over(devices, held)
    chunks = []
    for start in range(0, len(cases), at_once):
        part = cases[start : start + at_once]
        # A chunk is filled up: another size would compile again.
        filled = part + part[-1:] * (at_once - len(part))
        hyper = {key: np.asarray([cell[key] for cell, _ in filled], dtype) for key in cells[0]}
        numbers = np.asarray([seed for _, seed in filled], np.int32)
        if at_once == 1:  # without a batch axis, which turns convolutions into grouped ones
            hyper, numbers = {key: values[0] for key, values in hyper.items()}, numbers[0]
        hyper, numbers = spread((hyper, numbers))
        curves, state_weights = _run_chunk(
            attack,
            problem,
            held,
            sets,
            hyper,
            numbers,
            recorded=recorded,
            batch_size=batch_size,
            batched=at_once > 1,
            loop=loop,
        )
        if not keep_weights:
            state_weights = None
        if at_once == 1:
            curves, state_weights = jax.tree.map(lambda v: v[None], (curves, state_weights))
        kept = slice(len(part))
        chunks.append(jax.tree.map(lambda v, kept=kept: v[kept], (curves, state_weights)))
    shape = (len(cells), len(seeds))

    def gather(*parts):
        whole = (np if isinstance(parts[0], np.ndarray) else jnp).concatenate(parts)
        return whole.reshape(*shape, *whole.shape[1:])

    curves, final_weights = jax.tree.map(gather, *chunks)
    train_loss = curves["measured_loss"]
    final, before = (
        train_loss[..., -1],
        train_loss[..., np.searchsorted(recorded, (9 * steps) // 10)],
    )
    diverged = ~np.isfinite(final)
    if attack.follows_loss:
        diverged |= final > np.maximum(train_loss[..., 0], guessing_loss(problem))
    setup_flops, step_flops = count_flops(attack, problem, cells[0], batch_size=batch_size)
    return FineTuneTrace(
        step=recorded,
        train_loss=train_loss,
        held_out_loss=curves["held_out_loss"],
        held_out_quality=curves["held_out_quality"],
        utility=curves["benign_quality"],
        utility_scores=curves["benign_scores"],
        finite=curves["finite"],
        selection_loss=curves["selection_loss"],
        selection_quality=curves["selection_quality"],
        scores=curves["held_out_scores"],
        readings=curves["readings"],
        gradient=curves["gradient"],
        backbone_gradient=curves["backbone_gradient"],
        diverged=diverged,
        still_falling=~diverged & (final < 0.99 * before),
        setup_flops=setup_flops,
        step_flops=step_flops,
        weights=final_weights,
    )


def _recorded(steps: int, record: int | Sequence[int]) -> Int[np.ndarray, "r"]:
    """The steps at which curves are kept, from their number or as they are given."""
    if isinstance(record, int):
        if record < 2:
            raise ValueError(f"record must be at least 2 points, got {record}.")
        return recorded_steps(steps, points=record)
    points = np.asarray(record, np.int32)
    if len(points) < 2 or (points[0], points[-1]) != (0, steps) or np.any(np.diff(points) <= 0):
        raise ValueError(f"record must rise from 0 to {steps}, got {tuple(record)}.")
    return points


def _over(devices: Sequence[Any], held: _Held) -> tuple[Callable[[Any], Any], _Held]:
    """What spreads arrays with a leading axis of trajectories, and the problem's on every device.

    The compiled programs are those of one device: what they return lies as what they are given.
    """
    if len(devices) < 2:
        return lambda tree: tree, held
    mesh = jax.sharding.Mesh(np.asarray(devices), ("trajectories",))
    along, everywhere = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in (("trajectories",), ())
    )
    return functools.partial(jax.device_put, device=along), jax.device_put(held, everywhere)


def checked_cells(grid: Sequence[Hyper], *, default: bool) -> list[Hyper]:
    """The cells to run; an empty default grid is one cell without hyper-parameters."""
    cells = list(grid)
    if not cells and default:
        return [{}]
    if not cells:
        raise ValueError("grid is empty; give at least one cell, for example [{}].")
    for cell in cells:
        if set(cell) != set(cells[0]):
            raise ValueError(
                f"all cells of a grid need the same names, got {sorted(cells[0])} "
                f"and {sorted(cell)}."
            )
    return cells


class Execution(NamedTuple):
    """How trajectories run: see `run_fine_tune`. `seconds` a trajectory and step, as measured."""

    chunk: int | None
    loop: Loop
    seconds: dict[str, float]


def fastest_execution(
    attack: WeightAttack,
    problem: FineTuneProblem,
    *,
    trajectories: int,
    batch_size: int | None = 64,
    steps: int = 20,
    loops: Sequence[Loop] = ("host", "device"),
) -> Execution:
    """The fastest of one trajectory at a time, four at a time and all at once, by a short trial.

    Vmapping everything is not always fastest: on two CPU cores large probes run faster in sequence.
    Each way is run once to compile and once for the clock.

    Args:
      attack, problem, batch_size: what will be run.
      trajectories: how many (cells times seeds).
      steps: of the trial.
      loops: those to try; leave "device" out for convolutions on a CPU.
    """
    cell = (tuple(attack.grid) or ({},))[0]
    trials: dict[str, tuple[float, int | None, Loop]] = {}
    sizes = sorted({1, min(4, trajectories), trajectories})
    for loop in loops:
        for size in sizes:
            options: dict[str, Any] = {
                "steps": steps,
                "seeds": tuple(range(size)),
                "batch_size": batch_size,
                "record": 2,
                "chunk": size,
                "loop": loop,
            }
            run_fine_tune(attack, problem, [cell], **options)
            started = time.perf_counter()
            jax.block_until_ready(run_fine_tune(attack, problem, [cell], **options).train_loss)
            seconds = (time.perf_counter() - started) / (size * steps)
            trials[f"{loop} {size}"] = (seconds, size, loop)
    _, chunk, loop = min(trials.values(), key=lambda item: item[0])
    return Execution(chunk, loop, {key: value[0] for key, value in trials.items()})


def _run_chunk(
    attack: WeightAttack,
    problem: FineTuneProblem,
    held: _Held,
    sets: dict[str, _Rows],
    hyper: Hyper,
    seeds: Int[np.ndarray, "c"] | Int[np.ndarray, ""],
    *,
    recorded: Int[np.ndarray, "r"],
    batch_size: int | None,
    batched: bool,
    loop: Loop,
) -> tuple[dict[str, Any], Any]:
    """Some trajectories to the end: what is measured of them, and final weights."""
    n = problem.train.x.shape[0]
    block = n if batch_size is None else batch_size
    functions = problem.functions
    features_fn = functions.features_fn
    begun = with_canonical(held, attack, problem)
    state = _begin(attack.init, begun, seeds, hyper, functions=functions, batched=batched)
    sample = problem.once(
        ("sample", block),
        lambda: jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[:block]), problem.measured),
    )
    read = hyper
    if attack.update_reads is not None:
        read = {name: hyper[name] for name in attack.update_reads}
    points, norms, readings, draws = [], [], [], None
    read_fn = as_argument(problem.readings_fn)
    begin = 0
    for end in map(int, recorded):
        while begin < end:
            if begin % DRAWN == 0:
                draws = _draw(held, seeds, np.int32(begin), batch_size=batch_size, batched=batched)
            until = min(end, begin - begin % DRAWN + DRAWN)
            arguments = (seeds, np.int32(begin), np.int32(until), draws, held, read)
            advance = _advance if loop == "host" else _advance_many
            for t in range(begin, until if loop == "host" else begin + 1):
                at = (seeds, np.int32(t), *arguments[2:]) if loop == "host" else arguments
                state = advance(attack.update, state, *at, functions=functions, batched=batched)
            begin = until
        points.append(_measure(features_fn, state.weights, sets, batched=batched))
        readings.append(_read(read_fn, state.weights, batched=batched))
        if end in (0, recorded[-1]):
            norms.append(_gradient_norms(features_fn, state.weights, sample, batched=batched))
    points, norms, readings = jax.device_get((points, norms, readings))
    curves = _curves(points, norms, sets)
    curves["readings"] = jax.tree.map(lambda *values: np.stack(values, axis=-1), *readings)
    return curves, state.weights


@functools.partial(jax.jit, static_argnames=("init", "batched"))
def _begin(init, held, seeds, hyper, *, functions, batched):
    """The state at step 0, in buffers of its own: those of the problem are never donated."""

    def one(seed, cell):
        return jax.tree.map(jnp.copy, init(_access(held, seed, functions), cell))

    return jax.vmap(one)(seeds, hyper) if batched else one(seeds, hyper)


_STATIC = ("update", "batched")


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="state")
def _advance(update, state, seeds, t, end, draws, held, hyper, *, functions, batched):
    """One step of some trajectories."""
    del end

    def one(state, seed, drawn, cell):
        access = _access(held, seed, functions)
        return update(state, _batches(held, drawn, seed, t), access, cell)

    if batched:
        return jax.vmap(one)(state, seeds, draws, hyper)
    return one(state, seeds, draws, hyper)


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="state")
def _advance_many(update, state, seeds, begin, end, draws, held, hyper, **options):
    """Steps begin .. end - 1 in one compiled loop."""

    def body(t, state):
        return _advance(update, state, seeds, t, end, draws, held, hyper, **options)

    return jax.lax.fori_loop(begin, end, body, state)
