r"""ArchLock: a search for an architecture that does the owner's task and not others.

No key and no mask: with P(a, b, e) the chance that architecture a ranks above b on a task of
embedding e, and rank(a) the number of a population's members that a is beaten by,

    choose the a of largest    rank_targets(a) - lambda rank_source(a)

by regularised evolution. P is a small perceptron, trained on pairs that are labelled by the
majority of seven zero-cost scores: no network is trained in the search. Targets are those that are
known, or embeddings simulated at a given cosine from the source's:

    e = |s| d ( d s^ + sqrt(1 - d^2) o^ ),    o^ of unit length, orthogonal to s^

What may be claimed: of the networks in the space, one whose frozen features serve the targets less.
An attacker takes another architecture, or tunes all the weights: what is hard to train on a target
from scratch was never shown to be so when tuned, and the released code picks its result by the true
accuracy on the targets. A demonstration in a small space of perceptrons, no defence of weights.

Zhou, Ren, Xu (2024), ArchLock, ICLR, https://openreview.net/forum?id=e2YOVTenU9. Deviations: the
space; embeddings are diagonals of Fisher matrices of one random network, reduced by a fixed random
projection, where the paper takes 2,048 numbers of a ResNet-50.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jaximm.training.optimiser import optimiser_state, optimiser_step
from jaximm.types import Batch, Params

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "square": jnp.square,
}
DEPTHS, WIDTHS = (1, 2, 3), (16, 32, 64)
SCORES = ("fisher", "flops", "grad_norm", "grasp", "jacobian", "nwot", "snip")


class Cell(NamedTuple):
    """One perceptron of the space."""

    depth: int
    width: int
    activation: str
    skip: bool
    pooled: bool  # pairs of inputs are averaged first


SPACE: tuple[Cell, ...] = tuple(
    Cell(*parts)
    for parts in itertools.product(DEPTHS, WIDTHS, ACTIVATIONS, (False, True), (False, True))
)


def encoding(cell: Cell) -> Float[np.ndarray, "e"]:
    """One-hot by field, then two flags."""
    return np.concatenate(
        [
            np.equal(DEPTHS, cell.depth),
            np.equal(WIDTHS, cell.width),
            np.equal(list(ACTIVATIONS), cell.activation),
            [cell.skip, cell.pooled],
        ]
    ).astype(np.float32)


def init_cell(cell: Cell, inputs: int, classes: int, rng_key: Array) -> list[Array]:
    """Matrices of every layer, and of the head."""
    widths = [inputs // 2 if cell.pooled else inputs, *[cell.width] * cell.depth]
    keys = jax.random.split(rng_key, cell.depth + 1)
    sizes = [*itertools.pairwise(widths), (cell.width, classes)]
    return [
        jax.random.normal(key, size) * (2 / size[0]) ** 0.5
        for key, size in zip(keys, sizes, strict=True)
    ]


def features(
    cell: Cell,
    params: Sequence[Array],
    x: Float[Array, "n d_in"],
    offsets: Sequence[Array] | None = None,
) -> list[Array]:
    """Every layer's activations; `offsets` are added to them."""
    if cell.pooled:
        x = x[:, : x.shape[1] // 2 * 2].reshape(x.shape[0], -1, 2).mean(axis=2)
    found = []
    for layer, kernel in enumerate(params[: cell.depth]):
        out = ACTIVATIONS[cell.activation](x @ kernel)
        if cell.skip and layer:
            out = out + x
        x = out if offsets is None else out + offsets[layer]
        found.append(x)
    return found


def losses(cell: Cell, params, batch: Batch, offsets=None) -> Float[Array, "n"]:
    """Cross-entropies."""
    logits = features(cell, params, batch.x, offsets)[-1] @ params[-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)


def zero_cost_scores(cell: Cell, batch: Batch, classes: int, rng_key: Array) -> np.ndarray:
    """The `SCORES` of an untrained network on a batch of a task, larger is better, [7].

    fisher: sum over units of (sum over rows of a dl/da)^2, a the activations. flops: of one row.
    grad_norm: |dL|. grasp: theta . (H dL) with the sign that the paper of the score gives,
    -theta . H dL. jacobian: minus the sum of log(v + k) + 1 / (v + k) over the eigenvalues v of the
    correlations of the rows' input gradients, k = 1e-5. nwot: log |det| of the matrix of numbers of
    units on which two rows agree whether they are above 0. snip: sum |theta dL|.
    """
    params = init_cell(cell, batch.x.shape[1], classes, rng_key)
    return np.asarray(_scores(cell, params, batch))


@functools.partial(jax.jit, static_argnums=0)
def _scores(cell: Cell, params, batch: Batch) -> Array:
    def mean_loss(params):
        return jnp.mean(losses(cell, params, batch))

    slope, curved = jax.jvp(jax.grad(mean_loss), (params,), (jax.grad(mean_loss)(params),))
    activations = features(cell, params, batch.x)
    pulled = jax.grad(lambda offsets: jnp.sum(losses(cell, params, batch, offsets)))(
        [jnp.zeros_like(a) for a in activations]
    )
    fisher = sum(
        jnp.sum(jnp.sum(a * g, axis=0) ** 2) for a, g in zip(activations, pulled, strict=True)
    )
    flops = 2.0 * sum(kernel.size for kernel in params)
    rows = jax.vmap(jax.grad(lambda x: jnp.sum(features(cell, params, x[None])[-1] @ params[-1])))(
        batch.x
    )
    rows = rows - rows.mean(axis=1, keepdims=True)
    rows = rows / (jnp.linalg.norm(rows, axis=1, keepdims=True) + 1e-12)
    spectrum = jnp.clip(jnp.linalg.eigvalsh(rows @ rows.T), 0, None) + 1e-5
    codes = jnp.concatenate([a > 0 for a in activations], axis=1).astype(batch.x.dtype)
    agree = codes @ codes.T + (1 - codes) @ (1 - codes).T
    leaves = zip(params, slope, curved, strict=True)
    products = [(jnp.sum(jnp.abs(p * g)), -jnp.sum(p * h)) for p, g, h in leaves]
    scores = [
        fisher,
        flops,
        jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in slope)),
        sum(grasp for _, grasp in products),
        -jnp.sum(jnp.log(spectrum) + 1 / spectrum),
        jnp.linalg.slogdet(agree)[1],
        sum(snip for snip, _ in products),
    ]
    return jnp.stack([jnp.asarray(score, batch.x.dtype) for score in scores])


def task_embedding(batch: Batch, classes: int, size: int = 16) -> Float[np.ndarray, "size"]:
    """Mean squared gradients of one fixed random network on a task, projected to `size` numbers."""
    cell = Cell(2, 32, "tanh", skip=False, pooled=False)
    params = init_cell(cell, batch.x.shape[1], classes, jax.random.key(0))
    slopes = jax.vmap(
        lambda x, y: jax.grad(lambda p: losses(cell, p, Batch(x[None], y[None]))[0])(params[:-1])
    )(batch.x, batch.y)
    fisher = np.concatenate(
        [np.mean(np.square(np.asarray(leaf)), axis=0).ravel() for leaf in slopes]
    )
    found = np.log(fisher + 1e-8)
    directions = np.random.default_rng(0).standard_normal((size, found.size))
    return (directions @ (found - found.mean()) / found.size**0.5).astype(np.float32)


def simulate_targets(
    source: Float[np.ndarray, "d"], count: int, cosine: float, seed: int
) -> Float[np.ndarray, "count d"]:
    """Embeddings at a cosine from the source's, of length cosine * |source|.

    Raises:
      ValueError: a cosine outside (0, 1], or a source of length 0.
    """
    length = float(np.linalg.norm(source))
    if not 0 < cosine <= 1 or not length > 0:
        raise ValueError(
            f"cosine must be in (0, 1] and the source not 0, got {cosine} and a length of {length}."
        )
    unit = source / length
    drawn = np.random.default_rng(seed).standard_normal((count, source.size))
    drawn -= np.outer(drawn @ unit, unit)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    sine = (1 - cosine**2) ** 0.5
    return (length * cosine * (cosine * unit + sine * drawn)).astype(source.dtype)


class Pairs(NamedTuple):
    """Which of two architectures is better on a task: inputs [a, b, task], 1.0 or 0.0."""

    inputs: Float[np.ndarray, "m e"]
    wins: Float[np.ndarray, "m"]


def labelled_pairs(
    cells: Sequence[Cell], scores: Float[np.ndarray, "cells 7"], task: np.ndarray
) -> Pairs:
    """All ordered pairs, labelled by the majority of the scores."""
    codes = np.stack([encoding(cell) for cell in cells])
    first, second = np.nonzero(~np.eye(len(cells), dtype=bool))
    wins = (scores[first] > scores[second]).sum(axis=1) > scores.shape[1] / 2
    tasks = np.tile(task, (first.size, 1))
    inputs = np.concatenate([codes[first], codes[second], tasks], axis=1)
    return Pairs(inputs.astype(np.float32), wins.astype(np.float32))


def predictor(psi: Params, inputs: Float[Array, "m e"]) -> Float[Array, "m"]:
    """Logits that the first of each pair is better."""
    for kernel, bias in psi[:-1]:
        inputs = jax.nn.relu(inputs @ kernel + bias[None, :])
    return (inputs @ psi[-1][0] + psi[-1][1][None, :])[:, 0]


def fit_predictor(pairs: Pairs, *, steps: int = 500, rate: float = 3e-3, rng_key: Array) -> Params:
    """A perceptron 128-64-32-16-1 on labelled pairs: Adam on batches of 128."""
    widths = (pairs.inputs.shape[1], 128, 64, 32, 16, 1)
    keys = jax.random.split(rng_key, len(widths))
    psi = [
        (
            jax.random.normal(key, size, jnp.float32) * (2 / size[0]) ** 0.5,
            jnp.zeros(size[1], jnp.float32),
        )
        for key, size in zip(keys, itertools.pairwise(widths), strict=False)
    ]
    inputs, wins, optimiser = jnp.asarray(pairs.inputs), jnp.asarray(pairs.wins), optax.adam(rate)

    def step(carry, number):
        rows = jax.random.randint(jax.random.fold_in(keys[-1], number), (128,), 0, inputs.shape[0])
        slope = jax.grad(
            lambda psi: jnp.mean(
                optax.sigmoid_binary_cross_entropy(predictor(psi, inputs[rows]), wins[rows])
            )
        )(carry[0])
        return tuple(optimiser_step(optimiser, slope, carry[1], carry[0])), None

    start = (psi, optimiser_state(optimiser, psi))
    return jax.jit(lambda start: lax.scan(step, start, jnp.arange(steps))[0][0])(start)


def ranks(psi: Params, cells: Sequence[Cell], task: np.ndarray) -> Int[np.ndarray, "cells"]:
    """By how many of the others each is beaten; 0 is best."""
    pairs = labelled_pairs(cells, np.zeros((len(cells), 1)), task)
    loses = np.asarray(_jitted(psi, jnp.asarray(pairs.inputs))) < 0
    return loses.reshape(len(cells), len(cells) - 1).sum(axis=1)


_jitted = jax.jit(predictor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Regularised evolution.

    Attributes:
      rounds: children.
      population: members; the oldest leaves.
      sample: members of which the fittest has the child.
      source_weight: lambda of the source's rank.
      seed: of all draws.
    """

    rounds: int = 40
    population: int = 10
    sample: int = 5
    source_weight: float = 2.0
    seed: int = 0

    def __post_init__(self):
        if self.rounds < 1 or not 1 <= self.sample <= self.population <= len(SPACE):
            raise ValueError(
                f"need rounds >= 1 and 1 <= sample <= population <= {len(SPACE)}, got {self}."
            )


class Found(NamedTuple):
    """The fittest of all that were met, and all of them in their order."""

    cell: Cell
    history: tuple[Cell, ...]


def evolve(
    psi: Params, source: np.ndarray, targets: Float[np.ndarray, "count d"], config: SearchConfig
) -> Found:
    """Children of the fittest of a sample; fitness is by the predicted ranks in the whole space.

    The result is chosen by that fitness too, not by any accuracy on a target.
    """
    harm = np.mean([ranks(psi, SPACE, target) for target in targets], axis=0)
    fitness = dict(zip(SPACE, harm - config.source_weight * ranks(psi, SPACE, source), strict=True))
    draw = np.random.default_rng(config.seed)
    members = [SPACE[i] for i in draw.choice(len(SPACE), config.population, replace=False)]
    history = list(members)
    for _ in range(config.rounds):
        sampled = [members[i] for i in draw.choice(len(members), config.sample, replace=False)]
        child = _mutated(max(sampled, key=fitness.__getitem__), draw)
        history.append(child)
        members = [*members[1:], child]
    return Found(max(history, key=fitness.__getitem__), tuple(history))


def _mutated(cell: Cell, draw: np.random.Generator) -> Cell:
    """One field changed to another of its values."""
    neighbours = [
        other for other in SPACE if sum(a != b for a, b in zip(cell, other, strict=True)) == 1
    ]
    return neighbours[draw.integers(len(neighbours))]
