r"""What a row's loss and score are, and what guessing scores: numbers, classes and tokens.

An objective says, of targets ``y`` and of what a model puts out for them,

``losses(outputs, y) -> [n]``      what is descended, row by row: nats, or half squared units
``scores(outputs, y) -> [n]``      numbers whose mean over rows is the `metric`
``mean(values, y)``                of one number a row, in which each row counts by its `weights`
``chance(y)``                      the mean score of the best constant answer
``metric``                         "accuracy" or "r2"

Rows come first. A loss that is not finite stays so; a score of classes counts an output that is not
finite as wrong, a score of numbers becomes NaN. Equal largest outputs are decided for the first.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

Outputs = Any
"""What a model puts out: numbers or logits, or `Unembedded`; JAX's or NumPy's."""

Targets = Any
"""Numbers, labels, or `TokenRows`; JAX's or NumPy's."""

Spread = Any
"""What the scores of a part of some rows need to know of all of them: a scalar array."""


class Objective(Protocol):
    """What `Numbers`, `Signs`, `Classes` and `Tokens` share; see the module."""

    metric: ClassVar[str]

    def losses(self, outputs: Outputs, y: Targets) -> Float[Array, "n"]:
        """The loss of each row."""
        ...

    def scores(self, outputs: Outputs, y: Targets, spread: Spread = None) -> Float[Array, "n"]:
        """The score of each row; `spread` is that of all the rows of which these are a part."""
        ...

    def spread(self, y: Targets) -> Spread:
        """What the scores of a part of some rows need to know of all of them."""
        ...

    def weights(self, y: Targets) -> Float[Array, "n"]:
        """How much each row counts in a mean."""
        ...

    def mean(self, values: Float[Array, "n"], y: Targets) -> Float[Array, ""]:
        """The mean over rows, each by its weight; 0 where none has any."""
        ...

    def divergences(self, outputs: Outputs, reference: Outputs, y: Targets) -> Float[Array, "n"]:
        """How far the predictions of each row have moved from those of a reference, in nats."""
        ...

    def chance(self, y: Targets) -> float:
        """The mean score of the best constant answer to concrete targets."""
        ...

    def blind_loss(self, y: Targets, outputs: int) -> Float[Array | np.ndarray, ""]:
        """The mean loss of knowing nothing about the inputs, with so many outputs."""
        ...


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Real targets [n], outputs [n] or [n, 1]: squared errors.

    loss_i = (o_i - y_i)^2 / 2;  score_i = 1 - (o_i - y_i)^2 / mean((y - mean y)^2), of mean R^2.
    """

    metric: ClassVar[str] = "r2"
    curvature: ClassVar[float] = 1.0  # bound on the loss's second derivative in an output

    def losses(self, outputs: Float[Array, "n ..."], y: Shaped[Array, "n"]) -> Float[Array, "n"]:
        """Half the squared error, in the dtype of the outputs."""
        return self.residuals(outputs, y)[:, 0] ** 2 / 2

    def residuals(self, outputs: Float[Array, "n ..."], y: Array) -> Float[Array, "n 1"]:
        """The slope of each row's loss in its output."""
        return (outputs.reshape(y.shape) - y.astype(outputs.dtype))[:, None]

    def scores(
        self, outputs: Float[Array, "n ..."], y: Array, spread: Spread = None
    ) -> Float[Array, "n"]:
        """Numbers of mean R^2: 1 is perfect, 0 is the constant mean."""
        spread = self.spread(y) if spread is None else spread
        return 1 - self.residuals(outputs, y)[:, 0] ** 2 / spread.astype(outputs.dtype)

    def spread(self, y: Shaped[Array | np.ndarray, "n"]) -> Float[Array | np.ndarray, ""]:
        """Mean square of the targets around their mean; 1 if they are one constant."""
        # Of NumPy arrays on the host, where nothing compiles.
        spread: Any = ((y - y.mean()) ** 2).mean()
        return spread + (spread <= 0).astype(spread.dtype)

    def weights(self, y: Array) -> Float[Array, "n"]:
        """Every row counts 1."""
        return jnp.ones(y.shape[0])

    def mean(self, values: Float[Array, "n"], y: Targets) -> Float[Array, ""]:
        """The plain mean."""
        del y
        return jnp.mean(values)

    def divergences(
        self, outputs: Float[Array, "n ..."], reference: Float[Array, "n ..."], y: Array
    ) -> Float[Array, "n"]:
        """Half the squared distance: KL of two normal distributions of variance 1."""
        return self.residuals(outputs, reference.reshape(y.shape))[:, 0] ** 2 / 2

    def chance(self, y: Targets) -> float:
        """0: the R^2 of the mean."""
        del y
        return 0.0

    def blind_loss(self, y: Targets, outputs: int) -> Float[Array | np.ndarray, ""]:
        """The mean loss of knowing nothing but the mean."""
        del outputs
        return self.spread(y) / 2


@dataclasses.dataclass(frozen=True)
class Signs(Numbers):
    """Targets -1 and +1 fitted as `Numbers`; a row scores 1 where the sign is right.

    An output of 0 counts as -1.
    """

    metric: ClassVar[str] = "accuracy"

    def scores(
        self, outputs: Float[Array, "n ..."], y: Array, spread: Spread = None
    ) -> Float[Array, "n"]:
        """Numbers of mean accuracy."""
        del spread
        outputs = outputs.reshape(y.shape)
        return (((outputs > 0) == (y > 0)) & (abs(outputs) < math.inf)).astype(outputs.dtype)

    def chance(self, y: Targets) -> float:
        """The share of the more frequent sign."""
        positive = float(np.mean(np.asarray(y) > 0))
        return max(positive, 1 - positive)


@dataclasses.dataclass(frozen=True)
class Classes:
    """Integer labels [n] of logits [n, k]: cross-entropy in nats.

    loss_i = -sum_c t_ic log softmax(o_i)_c, t_i = (1 - s) onehot(y_i) + s / k;  score_i is 1 where
    the largest logit is that of the label.

    Attributes:
      label_smoothing: s, in [0, 1).
    """

    label_smoothing: float = 0.0

    metric: ClassVar[str] = "accuracy"
    curvature: ClassVar[float] = 0.5

    def losses(self, outputs: Float[Array, "n k"], y: Int[Array, "n"]) -> Float[Array, "n"]:
        """Cross-entropy, in the dtype of the outputs."""
        if self.label_smoothing:
            return optax.softmax_cross_entropy(outputs, self._targets(outputs, y))
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y)

    def residuals(self, outputs: Float[Array, "n k"], y: Int[Array, "n"]) -> Float[Array, "n k"]:
        """The slope of each row's loss in its outputs."""
        return jax.nn.softmax(outputs) - self._targets(outputs, y)

    def scores(self, outputs: Outputs, y: Targets, spread: Spread = None) -> Float[Array, "..."]:
        """Numbers of mean accuracy. More axes before the rows are kept; NumPy gives NumPy."""
        del spread
        right = outputs.argmax(-1).astype(y.dtype) == y
        return (right & (abs(outputs) < math.inf).all(-1)).astype(outputs.dtype)

    def divergences(
        self, outputs: Float[Array, "n k"], reference: Float[Array, "n k"], y: Int[Array, "n"]
    ) -> Float[Array, "n"]:
        """KL(reference || outputs) of each row's softmaxes, in nats; the labels do not matter."""
        del y
        logs, wanted = (jax.nn.log_softmax(logits) for logits in (outputs, reference))
        return optax.losses.kl_divergence_with_log_targets(logs, wanted)

    def entropies(self, outputs: Float[Array, "n k"], y: Int[Array, "n"]) -> Float[Array, "n"]:
        """-sum_c p_ic log p_ic of each row's softmax, in nats, 0 .. log k; labels do not matter."""
        del y
        logs = jax.nn.log_softmax(outputs)
        return -jnp.sum(jnp.exp(logs) * logs, axis=1)

    def shared_scores(
        self, outputs: Float[Array, "n k"], y: Int[Array, "n"], *, tie: float
    ) -> Float[Array, "n"]:
        """`scores` in which outputs less than `tie` below the largest share a guess."""
        level = outputs >= jnp.max(outputs, axis=1, keepdims=True) - tie
        level = level.astype(outputs.dtype)
        credit = level / jnp.sum(level, axis=1, keepdims=True)
        return jnp.take_along_axis(credit, y[:, None], axis=1)[:, 0]

    def spread(self, y: Shaped[Array | np.ndarray, "n"]) -> Float[Array | np.ndarray, ""]:
        """1: rows score alone."""
        del y
        return np.ones(())

    def weights(self, y: Array) -> Float[Array, "n"]:
        """Every row counts 1."""
        return jnp.ones(y.shape[0])

    def mean(self, values: Float[Array, "n"], y: Targets) -> Float[Array, ""]:
        """The plain mean."""
        del y
        return jnp.mean(values)

    def chance(self, y: Targets) -> float:
        """The share of the most frequent label."""
        return float(np.max(np.bincount(np.asarray(y)))) / len(y)

    def blind_loss(self, y: Targets, outputs: int) -> Float[Array | np.ndarray, ""]:
        """The mean loss of equal logits: log k."""
        del y
        return np.log(np.asarray(outputs, jnp.zeros(()).dtype))

    def _targets(self, outputs, y):
        k, smooth = outputs.shape[1], self.label_smoothing
        hot = jax.nn.one_hot(y, k, dtype=outputs.dtype)
        return (1 - smooth) * hot + smooth / k


class TokenRows(NamedTuple):
    """Targets of `Tokens`: the token that is to come at each position, and which positions count.

    What stands in `tokens` where `mask` is False is never looked at.
    """

    tokens: Int[Array, "n t"]
    mask: Bool[Array, "n t"]


class Unembedded(NamedTuple):
    """Outputs of `Tokens` that are not formed: logits = states @ table^T.

    `table` has a row a token, as an embedding has, so that tied weights go in as they are.
    """

    states: Float[Array, "n t d"]
    table: Float[Array, "v d"]


class _Columns(NamedTuple):
    """What some columns of the logits say of every position."""

    log_sum: Array  # log sum exp
    largest: Array
    place: Array  # of the largest


@dataclasses.dataclass(frozen=True)
class Tokens:
    r"""Sequences of tokens: cross-entropy in nats, mean over a row's positions that count.

    loss_i = -mean_{t: mask_it} log softmax(states_it @ table^T)[tokens_it];  score_i is the share
    of those positions whose largest logit is that of the token. A row counts by the number of them
    (`weights`), so that the weighted mean over rows is the mean over tokens, and ``losses *
    weights`` is -log p of the whole row. A row without any has loss, score and weight 0.

    The logits [n t, v] are never there as a whole: `chunk` columns at a time are computed, and
    again in the backward pass. Memory is that of [n t, chunk], whatever v. Derivatives of any order
    and direction work: the chunks are checkpointed, there is no custom rule.

    Attributes:
      chunk: columns of the vocabulary at a time.
    """

    chunk: int = 4096

    metric: ClassVar[str] = "accuracy"

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"chunk must be >= 1, got {self.chunk}.")

    def losses(self, outputs: Unembedded, y: TokenRows) -> Float[Array, "n"]:
        """Cross-entropy, in the dtype of the states but at least float32.

        Raises:
          ValueError: states, tokens and mask that do not have the same rows and positions, or a
            table of another width.
        """
        states, tokens = self._positions(outputs, y)
        dtype = _wide(states.dtype)
        rows = outputs.table[tokens].astype(states.dtype)  # rounded as the logits of all tokens are
        wanted = jnp.sum(states.astype(dtype) * rows.astype(dtype), axis=-1)
        log_sum = jax.nn.logsumexp(self._columns(states, outputs.table).log_sum, axis=0)
        return self._row_means(log_sum - wanted, y.mask)

    def scores(self, outputs: Unembedded, y: TokenRows, spread: Spread = None) -> Float[Array, "n"]:
        """Share of right tokens; a position with an output that is not finite is wrong."""
        del spread
        states, tokens = self._positions(outputs, y)
        columns = self._columns(states, outputs.table)
        first = jnp.argmax(columns.largest, axis=0)[None]  # of equal ones, that of the first chunk
        place = jnp.take_along_axis(columns.place, first, axis=0)[0]
        finite = jnp.all(jnp.isfinite(columns.log_sum), axis=0)
        right = (place.astype(tokens.dtype) == tokens) & finite
        return self._row_means(right.astype(columns.log_sum.dtype), y.mask)

    def spread(self, y: TokenRows) -> Float[np.ndarray, ""]:
        """1: rows score alone."""
        del y
        return np.ones(())

    def weights(self, y: TokenRows) -> Float[Array, "n"]:
        """Positions of a row that count."""
        return jnp.sum(y.mask, axis=1, dtype=jnp.zeros(()).dtype)

    def mean(self, values: Float[Array, "n"], y: TokenRows) -> Float[Array, ""]:
        """The mean over tokens of a mean over each row's."""
        weights = self.weights(y).astype(values.dtype)
        total = jnp.sum(weights)
        return jnp.sum(values * weights) / jnp.where(total > 0, total, 1)

    def divergences(
        self, outputs: Unembedded, reference: Unembedded, y: TokenRows
    ) -> Float[Array, "n"]:
        r"""How far the predictions have moved from those of a reference, in nats.

        KL_i = mean_{t: mask_it} sum_v p_v (log p_v - log q_v),   p the reference's softmax, q the
        outputs'.

        It is computed in chunks as the losses are, both softmaxes at once, and no gradient goes to
        the reference. Exactly 0 of equal outputs; below 0 by rounding alone.

        Raises:
          ValueError: as `losses`; another vocabulary.
        """
        states, _ = self._positions(outputs, y)
        other, _ = self._positions(jax.lax.stop_gradient(reference), y)
        if outputs.table.shape[0] != reference.table.shape[0]:
            raise ValueError(
                f"both models need one vocabulary, got {outputs.table.shape[0]} and "
                f"{reference.table.shape[0]} tokens."
            )
        tables = outputs.table, jax.lax.stop_gradient(reference.table)

        def compared(start, ours, theirs):
            del start
            log_sum, reference_sum = (jax.nn.logsumexp(logits, axis=1) for logits in (ours, theirs))
            gap = jnp.where(jnp.isneginf(theirs), 0, theirs - ours)  # where no token is
            share = jnp.exp(theirs - reference_sum[:, None])
            return log_sum, reference_sum, jnp.sum(share * gap, axis=1)

        ours, theirs, gaps = self._over_chunks(compared, (states, other), tables)
        log_sum, reference_sum = (jax.nn.logsumexp(sums, axis=0) for sums in (ours, theirs))
        gap = jnp.sum(jnp.exp(theirs - reference_sum[None]) * gaps, axis=0)
        return self._row_means(gap - (reference_sum - log_sum), y.mask)

    def entropies(self, outputs: Unembedded, y: TokenRows) -> Float[Array, "n"]:
        """H_i = -mean_{t: mask_it} sum_v p_v log p_v of each row's softmaxes, in nats, 0 .. log v.

        In chunks, as the losses are.

        Raises:
          ValueError: as `losses`.
        """
        states, _ = self._positions(outputs, y)

        def column_sums(start, logits):
            del start
            log_sum = jax.nn.logsumexp(logits, axis=1)
            there = jnp.where(jnp.isneginf(logits), 0, logits)  # where no token is
            return log_sum, jnp.sum(jnp.exp(logits - log_sum[:, None]) * there, axis=1)

        log_sums, means = self._over_chunks(column_sums, (states,), (outputs.table,))
        log_sum = jax.nn.logsumexp(log_sums, axis=0)
        mean = jnp.sum(jnp.exp(log_sums - log_sum[None]) * means, axis=0)
        return self._row_means(log_sum - mean, y.mask)

    def chance(self, y: TokenRows) -> float:
        """The share of the most frequent token among those that count; 0 without any."""
        counted = np.asarray(y.tokens)[np.asarray(y.mask)]
        return float(np.max(np.bincount(counted))) / len(counted) if len(counted) else 0.0

    def blind_loss(self, y: TokenRows, outputs: int) -> Float[Array | np.ndarray, ""]:
        """The mean loss of equal logits: log v."""
        return Classes().blind_loss(y.tokens, outputs)

    def _positions(self, outputs: Unembedded, y: TokenRows):
        """States [n t, d] and tokens [n t], 0 where a position does not count."""
        states, table = outputs
        if not states.shape[:-1] == y.tokens.shape == y.mask.shape or (
            table.ndim != 2 or table.shape[1] != states.shape[-1]
        ):
            raise ValueError(
                "tokens need states [n, t, d], a table [v, d], tokens [n, t] and a mask [n, t], "
                f"got {states.shape}, {table.shape}, {y.tokens.shape} and {y.mask.shape}."
            )
        tokens = jnp.where(y.mask, y.tokens, 0).reshape(-1)
        return states.reshape(-1, states.shape[-1]), tokens

    def _columns(self, states: Float[Array, "p d"], table: Float[Array, "v d"]) -> _Columns:
        """`_Columns` [chunks, p] of every chunk, one after the other."""

        def columns(start, logits):
            place = start + jnp.argmax(logits, axis=1).astype(jnp.int32)
            return _Columns(jax.nn.logsumexp(logits, axis=1), jnp.max(logits, axis=1), place)

        return self._over_chunks(columns, (states,), (table,))

    def _over_chunks(self, fun, states: tuple[Array, ...], tables: tuple[Array, ...]) -> Any:
        """``fun(start, *logits [p, size])`` of every chunk of the columns, stacked.

        Columns past the vocabulary are -inf.
        """
        v = tables[0].shape[0]
        chunks = -(-v // self.chunk)
        size = -(-v // chunks)  # as equal as they come: often nothing is padded
        padded = [jnp.pad(table, ((0, chunks * size - v), (0, 0))) for table in tables]

        @jax.checkpoint
        def chunk(parts_and_start):
            parts, start = parts_and_start
            there = start + jnp.arange(size, dtype=jnp.int32) < v
            logits = []
            for rows, part in zip(states, parts, strict=True):
                # Cast a chunk at a time: no second copy of the table is there.
                part = part.astype(rows.dtype)
                columns = jnp.matmul(rows, part.T, preferred_element_type=_wide(rows.dtype))
                logits.append(jnp.where(there[None, :], columns, -jnp.inf))
            return fun(start, *logits)

        starts = size * jnp.arange(chunks, dtype=jnp.int32)
        parts = tuple(table.reshape(chunks, size, -1) for table in padded)
        return jax.lax.map(chunk, (parts, starts))

    def _row_means(self, values: Float[Array, "p"], mask: Bool[Array, "n t"]) -> Float[Array, "n"]:
        values = jnp.where(mask, values.reshape(mask.shape), 0)
        counted = jnp.sum(mask, axis=1, dtype=values.dtype)
        return jnp.sum(values, axis=1) / jnp.maximum(counted, 1)


def _wide(dtype: DTypeLike) -> DTypeLike:
    """float32 for half precisions: sums over a vocabulary need its digits."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


KINDS: dict[str, Objective] = {
    "regression": Numbers(),
    "constant": Numbers(),
    "binary": Signs(),
    "classes": Classes(),
    "tokens": Tokens(),
}
"""Kind of a task to its objective."""


def objective(kind: str) -> Objective:
    """The objective of a task's kind.

    >>> y = jnp.array([0, 1, 1])
    >>> logits = jnp.array([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    >>> objective("classes").scores(logits, y).tolist()
    [1.0, 1.0, 0.0]
    >>> objective("classes").metric, round(objective("classes").chance(y), 3)
    ('accuracy', 0.667)

    Raises:
      ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; choose from {list(KINDS)}.")
    return KINDS[kind]


def of_targets(y: Targets) -> Objective:
    """The objective of targets: `Tokens` of `TokenRows`, `Classes` of integers, else `Numbers`."""
    if hasattr(y, "tokens"):
        return KINDS["tokens"]
    is_real = jnp.issubdtype(y.dtype, jnp.floating)
    return KINDS["regression" if is_real else "classes"]
