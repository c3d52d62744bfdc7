r"""What methods that simulate an attacker share: what it holds, its steps, and what it is denied.

An attacker of a problem of classes trains the backbone and a head of the harmful task; of a model
that does both tasks by itself, the parameters that train. Its steps are those of
`jaximm.immunisers.meta.inner.inner_steps`.

The rows that it trains on are others than those on which its gain is read off. Of a plain pair of
batches they are the first and the second half of the harmful rows; a caller of
`jaximm.training.fit` may give batches ``attack`` and ``held_out`` instead. An attacker who first
trains on the primary task takes the rows of ``retain``, else the primary ones. All of these are
whole batches: every device simulates the same attack.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaximm.immunisers.gradient import Memory, Objective, Weighted, from_objective
from jaximm.immunisers.problem import Problem
from jaximm.objectives import Classes
from jaximm.types import AnyBatch, Head, Immuniser, Params

FRESH = 0.02
"""Standard deviation of the weights of a fresh head."""

WHOLE = ("harmful", "attack", "held_out", "retain")
"""Batches that every part of a step sees whole."""

InnerOptimiser = Literal["adam", "adamw", "sgd"]


def check_least(config: Any, **least: float) -> None:
    """Fields of a configuration that are finite numbers, at least as large as said.

    Raises:
      ValueError: naming the first that is not.
    """
    for name, bound in least.items():
        value = getattr(config, name)
        if not bound <= value < math.inf:
            raise ValueError(f"{name} must be finite and >= {bound:g}, got {value}.")


def check_attack(config: Any) -> None:
    """The fields of an inner attack: optimiser, rates, rows.

    Raises:
      ValueError: as said.
    """
    if config.inner_optimiser not in ("adam", "adamw", "sgd"):
        raise ValueError(
            f'inner_optimiser must be "adam", "adamw" or "sgd", got {config.inner_optimiser!r}.'
        )
    if not config.inner_rates or not all(0 < rate < math.inf for rate in config.inner_rates):
        raise ValueError(f"inner_rates must be finite and > 0, got {config.inner_rates}.")
    check_rows(config.inner_rows)


def check_rows(inner_rows: int | None) -> None:
    """Rows of an inner step.

    Raises:
      ValueError: fewer than one.
    """
    if inner_rows is not None and inner_rows < 1:
        raise ValueError(f"inner_rows must be >= 1, or None for all rows, got {inner_rows}.")


class Held(NamedTuple):
    """What an attacker trains: what trains of a model, and its own head, or () without one."""

    params: Params
    head: Head | tuple[()]


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A model as an attacker takes it over, at the start of an attack.

    Attributes:
      problem: of which the model is.
      params: the released model.
      start: where the attacker starts.
    """

    problem: Problem
    params: Params
    start: Held

    def primary(self, held: Held) -> Params:
        """The attacked model, as it does the primary task."""
        frozen = getattr(self.params, "frozen", None)  # is carried through no step
        return held.params if frozen is None else held.params._replace(frozen=frozen)

    def harmful(self, held: Held) -> Params:
        """The attacked model, as it does the harmful task."""
        model = self.primary(held)
        return model._replace(head=held.head) if held.head else model

    def loss(self, model: Params, batch: AnyBatch) -> Float[Array, ""]:
        """Mean loss over rows, by their weights."""
        return self.mean(self.problem.losses(model, batch), batch)

    def mean(self, values: Float[Array, "rows"], batch: AnyBatch) -> Float[Array, ""]:
        """Mean over rows, by their weights."""
        weights = self.problem.weights(batch).astype(values.dtype)
        return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1)

    def logits(self, held: Held, batch: AnyBatch) -> Float[Array, "rows k"]:
        """Of the attacker's own head."""
        return held.head.outputs(self.problem.features_fn(held.params.backbone, batch.x))  # pyrefly: ignore[missing-attribute]

    def guessing(self, batch: AnyBatch) -> Float[Array, ""] | float:
        """The loss of equal predictions: log(classes), or that of a model of zeros."""
        if self.problem.losses_fn is None:
            return math.log(self.start.head.kernel.shape[1])  # pyrefly: ignore[missing-attribute]
        return jax.lax.stop_gradient(self.loss(jax.tree.map(jnp.zeros_like, self.params), batch))


def taken_over(
    problem: Problem, params: Params, rng_key: jax.Array, *, fresh_head: bool = False
) -> Target:
    """The model at the start of an attack; its harmful head fitted, or drawn from N(0, .02^2)."""
    if problem.losses_fn is not None:
        frozen = getattr(params, "frozen", None)
        held = params if frozen is None else params._replace(frozen={})
        return Target(problem, params, Held(held, ()))
    head = problem.with_harmful_head(params).head if not fresh_head else None
    if head is None:
        dtype, width, classes = params.head.kernel.dtype, problem.width, problem.harmful_classes
        assert width is not None  # `meta_method` has looked
        assert classes is not None
        kernel = FRESH * jax.random.normal(rng_key, (width, classes), dtype)
        head = Head(kernel, jnp.zeros(classes, dtype))
    return Target(problem, params, Held(params, head))


def meta_method(
    name: str,
    problem: Problem,
    objective: Objective,
    *,
    init_memory: Callable[[Params], Memory] = lambda params: None,
    retain: bool = False,
) -> Immuniser:
    """`from_objective` with the batches of an attack whole, as a dict.

    Args:
      name, problem, objective, init_memory: see `jaximm.immunisers.gradient.from_objective`.
      retain: whether the objective looks at ``batches["retain"]``.

    Raises:
      ValueError: as `from_objective`; a problem of classes without `harmful_classes`.
    """
    if problem.losses_fn is None and problem.classes and problem.harmful_classes is None:
        raise ValueError(f"{name} trains a harmful head: give the problem's harmful_classes.")

    def with_whole(whole):
        return from_objective(name, problem, objective, init_memory=init_memory, whole=whole)

    def update(state, batch, rng_key):
        named = dict(batch) if isinstance(batch, Mapping) else batch._asdict()
        if retain:
            named.setdefault("retain", named["primary"])
        whole = [key for key in WHOLE if key in named]
        return with_whole(whole).update(state, named, rng_key)

    return with_whole(())._replace(update=update)


class Rows(NamedTuple):
    """Rows that an attacker trains on, and those on which its gain is read off."""

    attack: AnyBatch
    held_out: AnyBatch


def rows_of(batches: Mapping[str, AnyBatch]) -> Rows:
    """Batches ``attack`` and ``held_out``, else the two halves of the harmful rows.

    Raises:
      ValueError: one of the two alone; a single harmful row.
    """
    given = [key for key in Rows._fields if key in batches]
    if len(given) == 1:
        raise ValueError(f"batches hold {given[0]!r} alone; give both {Rows._fields}, or neither.")
    if given:
        return Rows(batches["attack"], batches["held_out"])
    n = jax.tree.leaves(batches["harmful"])[0].shape[0]
    if n < 2:
        raise ValueError(f"an attack needs two harmful rows a step or more, got {n}.")
    first, second = slice(n // 2), slice(n // 2, 2 * (n // 2))
    return Rows(
        *(
            jax.tree.map(lambda leaf, part=part: leaf[part], batches["harmful"])
            for part in (first, second)
        )
    )


def drawn(batch: AnyBatch, rng_key: jax.Array, rows: int) -> AnyBatch:
    """Some rows, with replacement."""
    n = jax.tree.leaves(batch)[0].shape[0]
    chosen = jax.random.randint(rng_key, (rows,), 0, n)
    return jax.tree.map(lambda leaf: leaf[chosen], batch)


class Step(NamedTuple):
    """What an inner step looks at: its number, and whether it trains the primary task."""

    number: Int[Array, "..."]
    retains: Bool[Array, "..."]


def attack_loss(
    target: Target,
    rows: Rows,
    rng_key: jax.Array,
    inner_rows: int | None,
    retain: AnyBatch | None = None,
) -> Callable[[Held, Step], Float[Array, ""]]:
    """The loss that an attacker descends in a step: harmful, or primary where it retains.

    Args:
      target: the model.
      rows: of the attack.
      rng_key: of the rows of every step.
      inner_rows: of a step; None: all.
      retain: rows of the primary task; None: it never retains.
    """

    def loss(held: Held, step: Step) -> Float[Array, ""]:
        def own(batch):
            if inner_rows is None:
                return batch
            return drawn(batch, jax.random.fold_in(rng_key, step.number), inner_rows)

        def on_harmful(held):
            return target.loss(target.harmful(held), own(rows.attack))

        def on_primary(held):
            return target.loss(target.primary(held), own(retain))

        if retain is None:
            return on_harmful(held)
        return jax.lax.cond(step.retains, on_primary, on_harmful, held)

    return loss


def one_of(rates: tuple[float, ...], rng_key: jax.Array) -> Float[Array, ""] | float:
    """One of some rates, all as likely."""
    if len(rates) == 1:
        return rates[0]
    return jnp.asarray(rates)[jax.random.randint(rng_key, (), 0, len(rates))]


def optimiser_of(
    name: InnerOptimiser, rate: Float[Array, ""] | float, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """An attacker's optimiser at a rate that may be traced.

    Entries that Adam does not move, as all of a frozen part, do not decay.
    """

    def decayed(updates, params):
        return jax.tree.map(
            lambda move, leaf: jnp.where(move == 0, move, move + weight_decay * leaf),
            updates,
            params,
        )

    def in_dtype(updates, params):  # a traced rate has one of its own
        return jax.tree.map(lambda move, leaf: move.astype(leaf.dtype), updates, params)

    return optax.chain(
        *([] if name == "sgd" else [optax.scale_by_adam()]),
        *([optax.stateless(decayed)] if name == "adamw" else []),
        optax.scale_by_learning_rate(rate),
        optax.stateless(in_dtype),
    )


# ------------------------------------------------------------------ what an attacker is denied


def negative_entropy(target: Target, held: Held, batch: AnyBatch) -> Float[Array, ""]:
    """Mean over rows of sum_v p_v log p_v of the attacked model, in [-log V, 0]."""
    return -target.mean(target.problem.entropies(target.harmful(held), batch), batch)


def clamped_cross_entropy(
    target: Target, held: Held, batch: AnyBatch, ceiling: float
) -> Float[Array, ""]:
    """-min(CE, ceiling * CE of guessing) of the attacked model.

    Of two classes the smaller of CE(z) and CE(-z) counts: answers that are all the wrong way round
    are one change of sign from right.
    """
    if held.head:
        logits = target.logits(held, batch)
        loss = jnp.mean(Classes().losses(logits, batch.y))
        if logits.shape[1] == 2:
            loss = jnp.minimum(loss, jnp.mean(Classes().losses(-logits, batch.y)))
    else:
        loss = target.loss(target.harmful(held), batch)
    return -jnp.minimum(loss, ceiling * target.guessing(batch))


def preference(
    log_ratio_preferred: Float[Array, "rows"], log_ratio_rejected: Float[Array, "rows"], beta: float
) -> Float[Array, ""]:
    """IPO: mean (r_w - r_l - 1 / (2 beta))^2, r the log p of an answer less the reference's.

    Azar et al. (2023), https://arxiv.org/abs/2310.12036, equation 17.
    """
    return jnp.mean((log_ratio_preferred - log_ratio_rejected - 1 / (2 * beta)) ** 2)


def distances(
    problem: Problem, params: Params, reference: Params, batch: AnyBatch, *, squared: bool
) -> Weighted:
    """Distance of the activations from a reference's, row by row, mean over positions and sites.

    |h(x_i) - h_ref(x_i)|, or its square; a row of tokens counts by those that do.
    """

    def sites(model):
        return problem.sites(model.backbone if problem.losses_fn is None else model, batch.x)

    ours, theirs = sites(params), jax.lax.stop_gradient(sites(reference))
    n = jax.tree.leaves(batch)[0].shape[0]

    def size(site):
        square = jnp.sum((ours[site] - theirs[site]) ** 2, axis=1)
        far = square > 0  # the norm has no slope where nothing moved
        norm = jnp.where(far, jnp.sqrt(jnp.where(far, square, 1)), 0)
        return (square if squared else norm).reshape(n, -1)

    mean = jnp.mean(jnp.stack([size(site) for site in ours]), axis=0)
    counted = problem.counted(batch)
    counts = jnp.ones_like(mean) if counted is None else counted.reshape(n, -1).astype(mean.dtype)
    totals = jnp.sum(counts, axis=1)
    return Weighted(jnp.sum(mean * counts, axis=1) / jnp.maximum(totals, 1), totals)


def random_mapping(
    problem: Problem, params: Params, batch: AnyBatch, rng_key: jax.Array
) -> Float[Array, ""]:
    """Mean over positions and sites of 1 - |cos(h, R[token])|, R a table of Gaussian rows.

    The row of R is that of the input token at a position; of inputs that are no tokens, of the
    label. R is never held: its row v is drawn from the key and v.
    """

    def direction(token, width, dtype):
        return jax.random.normal(jax.random.fold_in(rng_key, token), (width,), dtype)

    model = params.backbone if problem.losses_fn is None else params
    counted = problem.counted(batch)
    of_tokens = jnp.issubdtype(batch.x.dtype, jnp.integer)
    found = []
    for rows in problem.sites(model, batch.x).values():
        positions = rows.shape[0] // batch.x.shape[0]
        # Positions are the last ones of a text (`Language.activations` leaves out the first).
        tokens = batch.x[:, -positions:] if of_tokens else batch.y[:, None].repeat(positions, 1)
        to = jax.vmap(lambda token, rows=rows: direction(token, rows.shape[1], rows.dtype))(
            tokens.reshape(-1)
        )
        sizes = jnp.linalg.norm(to, axis=1) * jnp.sqrt(jnp.sum(rows**2, axis=1) + 1e-12)
        cosines = jnp.abs(jnp.sum(rows * to, axis=1)) / sizes
        found.append(jnp.mean(1 - cosines, where=counted))
    return jnp.mean(jnp.stack(found))
