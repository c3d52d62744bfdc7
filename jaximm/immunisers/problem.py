"""What every immuniser is given: the problem, and the parameters that it starts from.

A method is built by ``factory(config, problem)``. `Problem` says what the model is, as plain
functions of parameters (a pytree that holds the whole model) and of batches (pytrees of arrays with
rows first: images and labels, or tokens and masks):

``problem.losses(params, batch) -> [rows]``   loss of each row; of tokens, the mean over a row's own
``problem.scores(params, batch) -> [rows]``   numbers of mean accuracy
``problem.divergences(params, reference, batch) -> [rows]``   KL(reference || model), in nats
``problem.entropies(params, batch) -> [rows]``  entropy of the predictions, in nats
``problem.weights(batch) -> [rows]``          how much a row counts in a mean: its tokens, else 1
``problem.sites(backbone, inputs)``           activations by path, the features among them
``problem.activations(params, batch)``        the same of a batch, from whole parameters
``problem.lens_losses(params, batch) -> [layers, rows]``   losses as the head reads them off layers
``problem.perturbed_losses(params, batch, offsets) -> [rows]``   with offsets added at sites
``problem.with_harmful_head(params)``         the same model as it does the harmful task
``problem.reference_of(params)``              the model that is compared with: theta_0, as a rule

How they meet in an objective, and what can be said with them, stands in
`jaximm.immunisers.gradient`. Where only a linear map theta of fixed rows trains (a table's columns,
or the features of a frozen backbone), a problem has the whole-data factors ``R`` with
``R^T R = K + lam I``: methods then take their exact step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaximm import collectives, linalg, objectives
from jaximm.linalg.arrays import exponent_of, times_power_of_two
from jaximm.types import AnyBatch, Batch, FeaturesFn, Head, PairedBatch, Params

FEATURES = "features"
"""Name of the last site: what a probe sees."""

THETA = "neck.kernel"
"""Path of the linear map after a backbone's features, [d_in, d]."""


def check_run(steps: int, batch_size: int | None, task_rate: float = 0.0) -> None:
    """The fields that every method's configuration has, at the door.

    Raises:
      ValueError: steps or batch_size below 1, or task_rate outside [0, 1].
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}.")
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be >= 1, or None for all rows, got {batch_size}.")
    if not 0 <= task_rate <= 1:
        raise ValueError(f"task_rate must be in [0, 1], got {task_rate}.")


RowsFn = Callable[[Params, AnyBatch], Float[Array, "rows"]]
"""``fun(params, batch) -> [rows]``: one number a row."""

Offsets = dict[str, Float[Array, "rows width"]]
"""By name of site, what is added to its rows."""


class ProbeParams(NamedTuple):
    """A backbone and the primary task's linear head.

    ``backbone`` holds arrays by dotted path; the linear map of fixed rows is at `THETA`. The head
    is a `Head` for classes, and weights [d] for numbers.
    """

    backbone: Params
    head: Params


class LinearTask(NamedTuple):
    """A task that a linear head does: how the head starts, what it predicts, how a step moves it.

    Attributes:
      classes: labels are 0 .. classes - 1 and the head is a `Head`; None: targets are numbers and
        the head is weights [d].
      label_smoothing: of the cross-entropy, in [0, 1).
    """

    classes: int | None = None
    label_smoothing: float = 0.0

    @property
    def objective(self) -> objectives.Numbers | objectives.Classes:
        """Loss and score of a row."""
        if self.classes is None:
            return objectives.Numbers()
        return objectives.Classes(self.label_smoothing)

    def start(self, width: int, dtype: DTypeLike) -> Params:
        """A head of zeros."""
        if self.classes is None:
            return jnp.zeros(width, dtype)
        return init_head(width, self.classes, dtype)

    def kernel(self, head: Params) -> Float[Array, "d k"]:
        """The head's weights, one column an output."""
        return head[:, None] if self.classes is None else head.kernel

    def outputs(self, features: Float[Array, "n d"], head: Params) -> Float[Array, "n *k"]:
        """What the head predicts: numbers [n], or logits [n, k]."""
        return features @ head if self.classes is None else head.outputs(features)

    def loss(self, outputs: Float[Array, "n *k"], y: Array) -> Float[Array, ""]:
        """Mean over rows of the loss, nats or half squared units."""
        return jnp.mean(self.objective.losses(outputs, y))

    def stepped(self, head: Params, slope: Float[Array, "d k"], shift: Float[Array, "k"]) -> Params:
        """The head less a step in its weights, and one in its bias where it has one."""
        if self.classes is None:
            return head - slope[:, 0]
        return Head(head.kernel - slope, head.bias - shift)

    def scaled(self, head: Params, scale: Float[Array, ""]) -> Params:
        """The head with its weights times `scale`."""
        if self.classes is None:
            return head * scale
        return head._replace(kernel=head.kernel * scale)

    def lifted(self, head: Params, basis: Float[Array, "d_in d"]) -> Params:
        """The head on rows of which the head's own are the coordinates in a basis."""
        if self.classes is None:
            return basis @ head
        return head._replace(kernel=basis @ head.kernel)


NUMBERS = LinearTask()
"""Targets are numbers."""


class Factors(NamedTuple):
    """Upper-triangular R of each task, [d_in, d_in], with R^T R = X^T X / n + lam I."""

    primary: Float[Array, "d_in d_in"]
    harmful: Float[Array, "d_in d_in"]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """What a method works on: any differentiable backbone.

    Keep one object for runs of one shape: compilations are shared by its identity.

    Attributes:
      features_fn: ``features_fn(params, inputs) -> [n, d]``; inputs are rows, images, or the
        activations of a frozen prefix.
      factors: where only theta of ``inputs @ theta`` trains, the whole-data factors; else None.
      width: d; None: unknown, which methods by gradients refuse.
      classes: labels of the primary task, 0 .. classes - 1; None: its targets are numbers.
      harmful_classes: the same of the harmful task.
      optimiser: of parameters and head where no exact step is known, any optax transformation; a
        schedule in it counts updates.
      label_smoothing: of the primary cross-entropy, in [0, 1).
      accumulate: micro-batches a step; the rows of a device's batch must divide by it.
      sites_fn: ``sites_fn(params, inputs) -> {"features": [n, d], site: [rows, width], ...}`` to
        regularise the inputs of several layers at once, penalties averaged by `site_weights`;
        None: the features alone.
      site_weights: by name of site; a site that is not named weighs 1.
      losses_fn: ``losses_fn(params, batch) -> [rows]``; None: `params` is a `ProbeParams`, and a
        batch is a `Batch` with the labels of its head.
      scaled_losses_fn: ``scaled_losses_fn(params, batch, scale) -> [rows]``, the losses with all
        logits times a scalar, for methods that ask for them beside a `losses_fn`; else None.
      scores_fn: ``scores_fn(params, batch) -> [rows]``; None: as above.
      weights_fn: ``weights_fn(batch) -> [rows]``; None: every row counts 1.
      lens_fn: ``lens_fn(params, batch) -> [layers, rows]``, a row's loss as the head reads it off
        each layer, the last of them `losses_fn`; None: of the sites that are as wide as the
        features and have a row an input, or of the outputs alone.
      perturbed_fn: ``perturbed_fn(params, inputs, offsets) -> [n, d]``, the features with
        ``offsets[site]`` added to every site's rows; None: offsets of the features alone.
      perturbed_losses_fn: ``perturbed_losses_fn(params, batch, offsets) -> [rows]``, the same
        beside a `losses_fn`; None: there are no offsets.
      keep: of the mean distance of primary predictions from the reference's, where a method trains
        by `losses_fn` and a penalty; 0: without.
      counted_fn: ``counted_fn(batch) -> [rows]``, whether each row of the sites counts: no padding;
        None: all do.
      divergences_fn: ``divergences_fn(params, reference, batch) -> [rows]``; None: of the classes.
      entropies_fn: ``entropies_fn(params, batch) -> [rows]``; None: of the classes.
      reference: parameters of the model that methods compare with; None: those that a run starts
        from.
      harmful_head: what reads the harmful task off the features of theta_0, for methods that work
        on its loss; None: one head does both tasks, as in a language model.
    """

    features_fn: FeaturesFn
    factors: Factors | None = None
    width: int | None = None
    classes: int | None = None
    harmful_classes: int | None = None
    optimiser: optax.GradientTransformation | None = None
    label_smoothing: float = 0.1
    accumulate: int = 1
    sites_fn: Callable[[Params, Array], dict[str, Array]] | None = None
    site_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    losses_fn: RowsFn | None = None
    scaled_losses_fn: Callable[[Params, AnyBatch, Array], Float[Array, "rows"]] | None = None
    scores_fn: RowsFn | None = None
    weights_fn: Callable[[AnyBatch], Float[Array, "rows"]] | None = None
    lens_fn: Callable[[Params, AnyBatch], Float[Array, "layers rows"]] | None = None
    perturbed_fn: Callable[[Params, Array, Offsets], Float[Array, "n d"]] | None = None
    perturbed_losses_fn: Callable[[Params, AnyBatch, Offsets], Array] | None = None
    keep: float = 0.0
    counted_fn: Callable[[AnyBatch], Bool[Array, "rows"]] | None = None
    divergences_fn: Callable[[Params, Params, AnyBatch], Float[Array, "rows"]] | None = None
    entropies_fn: RowsFn | None = None
    reference: Params | None = None
    harmful_head: Head | None = None

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}.")
        for name in ("width", "classes", "harmful_classes", "accumulate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}.")

    @property
    def primary(self) -> LinearTask:
        """Of the primary task."""
        return LinearTask(self.classes, 0.0 if self.classes is None else self.label_smoothing)

    @property
    def harmful(self) -> LinearTask:
        """Of the harmful task, without label smoothing."""
        return LinearTask(self.harmful_classes)

    def sites(self, params: Params, inputs: Array) -> dict[str, Array]:
        """Every site's rows; the features are always among them."""
        if self.sites_fn is None:
            return {FEATURES: self.features_fn(params, inputs)}
        return self.sites_fn(params, inputs)

    def activations(self, params: Params, batch: AnyBatch) -> dict[str, Array]:
        """Every site's rows of a batch."""
        backbone = params if self.losses_fn is not None else params.backbone
        return self.sites(backbone, batch.x)

    def lens_losses(self, params: Params, batch: AnyBatch) -> Float[Array, "layers rows"]:
        """Losses of each row as the head reads them off layers; the last are `losses`."""
        if self.lens_fn is not None:
            return self.lens_fn(params, batch)
        if self.losses_fn is not None:
            return self.losses_fn(params, batch)[None]
        sites = self.activations(params, batch)
        features = sites.pop(FEATURES)
        read = [rows for rows in sites.values() if rows.shape == features.shape]
        outputs = [params.head.outputs(rows) for rows in (*read, features)]
        return jnp.stack([objectives.Classes().losses(each, batch.y) for each in outputs])

    def perturbed_losses(
        self, params: Params, batch: AnyBatch, offsets: Offsets
    ) -> Float[Array, "rows"]:
        """`training_losses` with offsets of the form of `offsets` added at the sites.

        Raises:
          ValueError: a `losses_fn` without a `perturbed_losses_fn`.
        """
        if self.losses_fn is not None:
            return self._perturbed_losses_fn()(params, batch, offsets)
        if self.perturbed_fn is not None:
            features = self.perturbed_fn(params.backbone, batch.x, offsets)
        else:
            features = self.features_fn(params.backbone, batch.x) + offsets[FEATURES]
        return self.primary.objective.losses(params.head.outputs(features), batch.y)

    def offsets(self, params: Params, batch: AnyBatch) -> Offsets:
        """Zeros, which change nothing.

        Raises:
          ValueError: as `perturbed_losses`.
        """
        shapes = jax.eval_shape(self.activations, params, batch)
        if self.losses_fn is not None:
            self._perturbed_losses_fn()
        elif self.perturbed_fn is None:
            shapes = {FEATURES: shapes[FEATURES]}
        return {site: jnp.zeros(shape.shape, shape.dtype) for site, shape in shapes.items()}

    def _perturbed_losses_fn(self):
        if self.perturbed_losses_fn is None:
            raise ValueError(
                "offsets at activations need a model that adds them: give the problem a "
                "perturbed_losses_fn beside its losses_fn."
            )
        return self.perturbed_losses_fn

    def losses(self, params: Params, batch: AnyBatch) -> Float[Array, "rows"]:
        """Loss of each row, in nats, as it is measured: without label smoothing."""
        if self.losses_fn is not None:
            return self.losses_fn(params, batch)
        return objectives.Classes().losses(self._outputs(params, batch), batch.y)

    def scaled_losses(
        self, params: Params, batch: AnyBatch, scale: Float[Array, ""]
    ) -> Float[Array, "rows"]:
        """The same with all logits times `scale`; needs `scaled_losses_fn` beside `losses_fn`."""
        if self.scaled_losses_fn is not None:
            return self.scaled_losses_fn(params, batch, scale)
        outputs = self._outputs(params, batch)
        return objectives.Classes().losses(outputs * scale.astype(outputs.dtype), batch.y)

    def training_losses(self, params: Params, batch: AnyBatch) -> Float[Array, "rows"]:
        """The same as a primary task is trained on it: with the problem's label smoothing."""
        if self.losses_fn is not None:
            return self.losses_fn(params, batch)
        return self.primary.objective.losses(self._outputs(params, batch), batch.y)

    def scores(self, params: Params, batch: AnyBatch) -> Float[Array, "rows"]:
        """Score of each row."""
        if self.scores_fn is not None:
            return self.scores_fn(params, batch)
        return objectives.Classes().scores(self._outputs(params, batch), batch.y)

    def counted(self, batch: AnyBatch) -> Bool[Array, "rows"] | None:
        """Whether each row of the sites counts; None: all do."""
        return None if self.counted_fn is None else self.counted_fn(batch)

    def divergences(
        self, params: Params, reference: Params, batch: AnyBatch
    ) -> Float[Array, "rows"]:
        """KL of the model's predictions from those of a reference, in nats, of each row.

        KL_i = sum_c p_ic (log p_ic - log q_ic) with p the reference's and q the model's; a mean
        over the tokens of a row. No gradient goes to the reference.
        """
        if self.divergences_fn is not None:
            return self.divergences_fn(params, reference, batch)
        reference = jax.lax.stop_gradient(reference)
        ours, theirs = (
            jax.nn.log_softmax(self._outputs(model, batch)) for model in (params, reference)
        )
        return jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=1)

    def entropies(self, params: Params, batch: AnyBatch) -> Float[Array, "rows"]:
        """Entropy of the predictions of each row, in nats; a mean over the tokens of a row."""
        if self.entropies_fn is not None:
            return self.entropies_fn(params, batch)
        return objectives.Classes().entropies(self._outputs(params, batch), batch.y)

    def weights(self, batch: AnyBatch) -> Float[Array, "rows"]:
        """How much each row counts in a mean over rows."""
        if self.weights_fn is not None:
            return self.weights_fn(batch)
        return jnp.ones(jax.tree.leaves(batch)[0].shape[0])

    def with_harmful_head(self, params: Params) -> Params:
        """Parameters that do the harmful task: the same backbone, with its head if there is one.

        Raises:
          ValueError: tasks of other numbers of classes, and one head for both.
        """
        if self.harmful_head is not None:
            return params._replace(head=self.harmful_head)
        if self.losses_fn is None and self.classes != self.harmful_classes:
            raise ValueError(
                f"one head cannot do {self.classes} classes of the primary task and "
                f"{self.harmful_classes} of the harmful one; give the problem a harmful_head."
            )
        return params

    def reference_of(self, params: Params) -> Params:
        """The reference, or `params` where there is none."""
        return params if self.reference is None else self.reference

    def _outputs(self, params: Params, batch: AnyBatch) -> Float[Array, "rows k"]:
        return params.head.outputs(self.features_fn(params.backbone, batch.x))

    def check_rows(self, method: str) -> None:
        """Refuses numbers as targets where the backbone is not a linear map of its inputs.

        Raises:
          ValueError: as said.
        """
        linear = self.factors is not None or self.features_fn is linear_features
        if self.classes is None and not linear:
            raise ValueError(
                f"{method} on targets that are numbers needs a linear backbone, got a problem "
                "without factors whose features_fn is not linear_features; use "
                "jaximm.immunisers.linear_problem, or give the classes of the targets."
            )


def linear_features(backbone: Mapping[str, Array], inputs: Float[Array, "n d_in"]) -> Array:
    """Features of a linear backbone: ``inputs @ theta``."""
    return inputs @ backbone[THETA]


def linear_params(theta: Float[Array, "d_in d"], head: Params) -> ProbeParams:
    """Parameters of a linear backbone."""
    return ProbeParams({THETA: theta}, head)


def linear_problem(
    arrays: PairedBatch, *, damping_primary, damping_harmful, **fields: Any
) -> Problem:
    """The problem of a linear map of fixed rows, with both tasks' whole-data factors.

    Args:
      arrays: all training rows of both tasks.
      damping_primary: lam_P, in units of the mean-convention Gram matrix, > 0 where K_P is
        singular.
      damping_harmful: lam_H.
      fields: others of `Problem`; without `classes` the targets are numbers.

    Raises:
      ValueError: arrays of other shapes, widths that differ, a damping that is negative or not
        finite, or primary rows of deficient rank without damping: no factor of a singular K_P can
        be divided by.
    """
    for task, batch in zip(arrays._fields, arrays, strict=True):
        message = {"custom_message": f"the {task} task needs inputs [n, d] and targets [n, ...]"}
        chex.assert_rank(batch.x, 2, **message, exception_type=ValueError)
        chex.assert_equal_shape_prefix(list(batch), 1, **message, exception_type=ValueError)
    widths = arrays.primary.x.shape[1], arrays.harmful.x.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(
            f"the two tasks must have inputs of one width, got {widths[0]} and {widths[1]}."
        )
    for name, damping in (("primary", damping_primary), ("harmful", damping_harmful)):
        if not 0 <= damping < math.inf:
            raise ValueError(f"damping_{name} must be finite and >= 0, got {damping}.")
    factors = Factors(
        triangle(arrays.primary.x, damping_primary), triangle(arrays.harmful.x, damping_harmful)
    )
    if damping_primary == 0:
        values = np.linalg.svd(np.asarray(factors.primary), compute_uv=False)
        least = linalg.rank_rtol(arrays.primary.x.shape, factors.primary.dtype) * values[0]
        if not values[-1] > least:
            raise ValueError(
                f"the primary rows have rank {np.sum(values > least)} of {widths[0]}, so their "
                "undamped Gram matrix is singular; pass damping_primary > 0, or fewer columns."
            )
    return Problem(features_fn=linear_features, factors=factors, width=widths[0], **fields)


@jax.jit
def triangle(inputs: Float[Array, "n d"], damping) -> Float[Array, "d d"]:
    """Upper-triangular R with R^T R = X^T X / n + lam I, by QR: the Gram matrix is not formed."""
    return jnp.linalg.qr(linalg.damped_factor(inputs, damping=damping), mode="r")


def relative_damping(inputs: Float[Array, "n d"], relative: float) -> Float[Array, ""]:
    """``relative * tr(X^T X / n) / d``: damping as a part of the mean eigenvalue of the task."""
    exponent = exponent_of(inputs)
    mean_square = jnp.mean(times_power_of_two(inputs, -exponent) ** 2)
    return times_power_of_two(relative * mean_square, 2 * exponent)


def init_params(d_in: int, key: jax.Array | None, *, dtype: DTypeLike | None = None) -> ProbeParams:
    """A linear backbone to start from: the identity, or with a key entries of N(0, 1 / d_in)."""
    dtype = jnp.zeros(()).dtype if dtype is None else dtype
    if key is None:
        theta = jnp.eye(d_in, dtype=dtype)
    else:
        theta = jax.random.normal(key, (d_in, d_in), dtype) / d_in**0.5
    return linear_params(theta, jnp.zeros(d_in, dtype))


def init_head(width: int, classes: int, dtype: DTypeLike = jnp.float32) -> Head:
    """A head of zeros."""
    return Head(jnp.zeros((width, classes), dtype), jnp.zeros(classes, dtype))


def global_batch(batch: PairedBatch) -> PairedBatch:
    """The rows of every device, where they are spread over devices: one all-gather.

    Linear methods then do the same small arithmetic on every device.
    """
    rows = collectives.gather_rows(*batch.primary, *batch.harmful)
    return PairedBatch(Batch(*rows[:2]), Batch(*rows[2:]))
