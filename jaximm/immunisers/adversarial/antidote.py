r"""AntiDote: the model is trained against a hypernetwork that writes adapters to break it.

With m(x) = log p(safe answer | x) - log p(harmful answer | x) of a row, both means over tokens,
softly clipped to c tanh(m / c), H_phi the hypernetwork
(`jaximm.models.adapters.hypernetwork`) and patch = H_phi(what theta makes of harmful rows),

    adversary   min_phi    mean softplus(beta m_{theta + patch}(x)),
    defender    min_theta  mean softplus(-beta m_{theta + patch}(x))
                           + anchor mean softplus(-beta m_theta(x))
                           + task_weight CE(primary) + keep_weight KL(reference || theta)(primary),

with the patch held constant for the defender and |patch| <= budget |W| for every kernel. Every
`block` updates the adversary takes `block` steps of Adam, theta fixed; phi is kept between blocks.

Sanyal, Ray, Mandal (2025), AntiDote, https://arxiv.org/abs/2509.08000. **No working version of it
is public**: the released code runs its adversary without gradients, so that it never learns, calls
no part of the hypernetwork's body, swaps chosen and rejected, and takes a cross-entropy for the KL.
This is a first working one, not a port, and reproduces none of the paper's tables. Added to the
paper are the budget (without it a layer is overwritten), the anchor on the unpatched model, and the
clip: without it the cheapest defence is large logits, which slow an attacker until he rescales the
last layer. Changed are the reference's KL, which is KL(reference || theta) as
everywhere here, and the defender, which trains the problem's parameters, not adapters.

Batches: beside primary and harmful ones, `safe` holds the harmful prompts, row by row, with their
safe answers, and `attack` (`Attack`, with `block` times as many rows) what the adversary's steps
see, one part each; without it they all see the step's harmful rows. On a plain pair no answer is
known to be safe, and every other answer is: m = log(1 - p) - log p, p = p(harmful answer | x), the
geometric mean over tokens. At beta 1 the adversary then descends the harmful loss, the defender the
unlikelihood of Welleck et al. (2020), https://arxiv.org/abs/1908.04319.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from jaximm import collectives
from jaximm.immunisers.about import About
from jaximm.immunisers.gradient import Weighted, from_objective
from jaximm.immunisers.meta.inner import in_steps
from jaximm.immunisers.problem import FEATURES, Problem, check_run
from jaximm.models.adapters.hypernetwork import HyperSize, Phi, hyper_apply, hyper_init
from jaximm.models.adapters.lora import Adapters, matrix_shape, merged, named_by, start
from jaximm.models.llama import stacked_axes
from jaximm.training.optimiser import Stepped, optimiser_state, optimiser_step
from jaximm.types import AnyBatch, Batch, Immuniser, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class AntidoteConfig:
    """Trains the model against a hypernetwork that writes low-rank adapters to undo its safety.

    Attributes:
      beta: inverse temperature of the margins, > 0.
      clip: of margins, in nats, > 0; None: margins grow without bound, and logits with them.
      anchor: of the safety of the unpatched model.
      task_weight: of the primary loss.
      keep_weight: of the distance of primary predictions from the reference's.
      block: steps of the adversary at a time, and updates between them.
      adversary_rate: of its Adam; 0: it never learns, an ablation.
      budget: of a patch beside its kernel, in Frobenius norms, > 0.
      rank, width: of the adapters and of the hypernetwork.
      rows: of activations that the hypernetwork reads, at most.
      targets: dotted path prefixes of the kernels that are patched, separated by commas; "*": all.
      own_inputs: whether each kernel's adapter is written from the kernel's own inputs, which must
        be sites of the problem, in place of the features.
      steps: updates.
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="AntiDote",
        source="Sanyal et al. (2025), AntiDote, https://arxiv.org/abs/2509.08000",
        against="short fine-tuning with low-rank adapters, from a head at the scale it has",
        broken_by="a fresh or rescaled head, a mix of both tasks' rows, longer full fine-tuning",
        traits=frozenset({"needs_harmful_head"}),
    )

    beta: float = 0.5
    clip: float | None = 15.0
    anchor: float = 1.0
    task_weight: float = 0.8
    keep_weight: float = 0.3
    block: int = 20
    adversary_rate: float = 1e-3
    budget: float = 0.5
    rank: int = 4
    width: int = 48
    rows: int = 64
    targets: str = "*"
    own_inputs: bool = False
    steps: int = 1200
    batch_size: int | None = None

    def __post_init__(self):
        for name in ("beta", "budget", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be finite and > 0, got {value}.")
        for name in ("anchor", "task_weight", "keep_weight", "adversary_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}.")
        for name in ("block", "rows"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")
        check_run(self.steps, self.batch_size)
        named_by(self.targets)
        self.size()

    def size(self) -> HyperSize:
        """Of the hypernetwork, which refuses what it cannot be."""
        return HyperSize(width=self.width, rank=self.rank)


class Attack(NamedTuple):
    """Harmful rows, and the same prompts with safe answers where these are known."""

    harmful: Batch
    safe: Batch | None = None


class Batches(NamedTuple):
    """What a step of the defender sees."""

    primary: Batch
    harmful: Batch
    safe: Batch | None = None


class Memory(NamedTuple):
    """The reference model, the adversary, its first and last loss of a block, its last patch."""

    reference: Params
    phi: Phi
    opt_state: optax.OptState
    first: Float[Array, ""]
    last: Float[Array, ""]
    patch: Adapters


def margins(problem: Problem, params: Params, rows: Attack, clip: float | None) -> Array:
    """m of each row, clipped; see the module."""
    losses = problem.losses(params, rows.harmful)
    if rows.safe is None:
        losses = jnp.maximum(losses, jnp.finfo(losses.dtype).eps)
        found = losses + jnp.log(-jnp.expm1(-losses))
    else:
        found = losses - problem.losses(params, rows.safe)
    return found if clip is None else clip * jnp.tanh(found / clip)


@dataclasses.dataclass(frozen=True, eq=False)
class Adversary:
    """A hypernetwork against the models of a problem."""

    config: AntidoteConfig
    problem: Problem

    def kernels(self, params: Params) -> dict[str, Any]:
        """What it may patch, by path: trained kernels, and the head where one does both tasks."""
        named = named_by(self.config.targets)
        found = {}
        for parts, leaf in jax.tree_util.tree_leaves_with_path(params):
            path = jax.tree_util.keystr(parts, simple=True, separator=".")
            # No gradient reaches what a language model holds frozen; tables are looked up.
            closed = path.startswith(("frozen.", "adapters.")) or path.endswith(".table")
            if self.problem.harmful_head is not None:
                closed |= path.startswith("head.")
            if not closed and leaf.ndim - _layers(path) >= 2 and (named(path) or named(_own(path))):
                found[path] = leaf
        if not found:
            raise ValueError(
                f"antidote patches kernels that train and that targets {self.config.targets!r} "
                "names, got none; train weights themselves, not adapters or vectors alone."
            )
        return found

    def begun(self, params: Params, rng_key: jax.Array) -> tuple[Phi, optax.OptState]:
        """A hypernetwork for these parameters, and the state of its optimiser."""
        kernels = self.kernels(params)
        layers = {path: _layers(path) for path in kernels}
        assert self.problem.width is not None
        widths = {FEATURES: self.problem.width}
        if self.config.own_inputs:
            widths |= {
                path: matrix_shape(kernel.shape, layers[path])[-2]
                for path, kernel in kernels.items()
                if not path.startswith("head.")
            }
        phi = hyper_init(rng_key, kernels, widths, self.config.size(), stacked=layers)
        return phi, optimiser_state(self.optimiser, phi)

    @property
    def optimiser(self) -> optax.GradientTransformation:
        """Of phi."""
        return optax.adam(self.config.adversary_rate)

    def write(self, phi: Phi, params: Params, batch: Batch) -> Adapters:
        """Adapters against a model, from what it makes of a batch."""
        problem, config = self.problem, self.config
        model = params if problem.losses_fn is not None else params.backbone
        sites = lax.stop_gradient(problem.sites(model, batch.x))
        counted = problem.counted(batch)
        kernels = self.kernels(params)
        rows = {FEATURES: _thinned(sites[FEATURES], config.rows)}
        if config.own_inputs:
            for path, kernel in kernels.items():
                if not path.startswith("head."):
                    rows[path] = _thinned(_inputs_of(path, kernel, sites), config.rows)
        if counted is not None:
            counted = _thinned(counted[:, None], config.rows)[:, 0]
        return hyper_apply(phi, rows, kernels, config.size(), config.budget, counted=counted)

    def loss(self, phi: Phi, params: Params, rows: Attack) -> Float[Array, ""]:
        """mean softplus(beta m) of the patched model."""
        patched = merged(params, self.write(phi, params, rows.harmful))
        found = margins(self.problem, patched, rows, self.config.clip)
        weights = self.problem.weights(rows.harmful).astype(found.dtype)
        losses = jax.nn.softplus(self.config.beta * found)
        return jnp.sum(weights * losses) / jnp.maximum(jnp.sum(weights), 1)

    def trained(self, memory: Memory, params: Params, seen: Attack, inner: Attack | None) -> Memory:
        """The memory after a block of steps on `inner`, one part each, or all on `seen`."""
        steps = self.config.block
        parts = None if inner is None else in_steps(inner, steps)

        def step(carry, part):
            phi, opt_state = carry
            rows = seen if part is None else part
            loss, slopes = jax.value_and_grad(self.loss)(phi, params, rows)
            return optimiser_step(self.optimiser, slopes, opt_state, phi), loss

        ended, losses = lax.scan(step, Stepped(memory.phi, memory.opt_state), parts, length=steps)
        return memory._replace(
            phi=ended.params, opt_state=ended.opt_state, first=losses[0], last=losses[-1]
        )


def _own(path: str) -> str:
    """A path as the backbone or the language model has it."""
    return path.removeprefix("backbone.").removeprefix("trained.")


def _layers(path: str) -> int:
    """How many leading axes of a parameter hold layers: of a language model's trained part, one."""
    return stacked_axes(_own(path)) if path.startswith("trained.") else 0


def _thinned(rows: Float[Array, "*stacked n width"], most: int) -> Array:
    """At most so many rows, evenly spaced."""
    return rows[..., :: -(-rows.shape[-2] // most), :]


def _inputs_of(path: str, kernel: Any, sites: dict[str, Array]) -> Array:
    """The rows of a kernel's own site, one set a layer where layers are stacked."""
    name = _own(path).removesuffix(".kernel")
    names = [name]
    if _layers(path):
        first, _, rest = name.partition(".")
        names = [f"{first}.{layer}.{rest}" for layer in range(kernel.shape[0])]
    missing = [one for one in names if one not in sites]
    if missing:
        raise ValueError(
            f"own_inputs: {path!r} needs a site {missing[0]!r}, the problem has {sorted(sites)}; "
            "add it to its sites, leave the kernel out of targets, or read the features."
        )
    return jnp.stack([sites[one] for one in names]) if _layers(path) else sites[name]


def antidote(config: AntidoteConfig, problem: Problem) -> Immuniser:
    """Alternates blocks of the adversary and of the defender.

    Raises:
      ValueError: what `from_objective` refuses; a problem without a width; when it starts, a model
        of which no kernel trains; at trace time, a site that `own_inputs` asks for in vain.
    """
    if problem.width is None:
        raise ValueError("antidote reads the model's features: give the problem's width.")
    adversary = Adversary(config, problem)

    def objective(params, batches, memory, rng_key):
        del rng_key
        rows = Attack(batches.harmful, batches.safe)
        primary, model = batches.primary, problem.with_harmful_head(params)
        patched = merged(model, memory.patch)
        under, clean = (margins(problem, one, rows, config.clip) for one in (patched, model))
        kept = problem.training_losses(params, primary)
        moved = problem.divergences(params, memory.reference, primary)
        length, weights = problem.weights(rows.harmful), problem.weights(primary)
        safety = jax.nn.softplus(-config.beta * under)
        anchored = config.anchor * jax.nn.softplus(-config.beta * clean)
        loss = {
            "safety": Weighted(safety, length),
            "anchor": Weighted(anchored, length),
            "retain": Weighted(config.task_weight * kept, weights),
            "kept": Weighted(config.keep_weight * moved, weights),
        }
        info = {
            "task_loss": Weighted(kept, weights),
            "margin": Weighted(clean, length),
            "patched_margin": Weighted(under, length),
            "adversary_first": memory.first,
            "adversary_last": memory.last,
        }
        return loss, info, memory

    method = from_objective("antidote", problem, objective)

    def init(params, rng_key):
        model = problem.with_harmful_head(params)
        kernels = adversary.kernels(model)
        phi, opt_state = adversary.begun(model, rng_key)
        patch = start(model, lambda path, _: path in kernels, config.rank, rng_key, stacked=_layers)
        zero = jnp.zeros((), next(iter(kernels.values())).dtype)
        memory = Memory(problem.reference_of(params), phi, opt_state, zero, zero, patch)
        return method.init(params, rng_key)._replace(memory=memory)

    def update(state, batches: AnyBatch, rng_key):
        rows = Attack(batches.harmful, getattr(batches, "safe", None))
        seen, inner = collectives.gather_tree((rows, getattr(batches, "attack", None)))
        params = problem.with_harmful_head(state.params)

        def trained(memory: Memory) -> Memory:
            return adversary.trained(memory, params, seen, inner)

        memory = lax.cond(state.step % config.block == 0, trained, lambda same: same, state.memory)
        memory = memory._replace(patch=adversary.write(memory.phi, params, seen.harmful))
        state = state._replace(memory=memory)
        return method.update(state, Batches(batches.primary, *rows), rng_key)

    return method._replace(init=init, update=update)
