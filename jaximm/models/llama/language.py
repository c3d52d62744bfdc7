r"""A decoder as a language model: losses, scores and activations of rows of tokens.

A batch is `jaximm.types.Batch`: ``x`` [n, t] the tokens that are seen, ``y`` a
`jaximm.objectives.TokenRows`, the token that is to come at each position and which positions count.
Losses are in nats a token, a row counts by its tokens, and logits are never there as a whole.

Which numbers train is a matter of `Weights`: three dicts by path, of which `frozen` gets no
gradient. `every_parameter`, `named_parameters`, `last_layers` and `with_adapters` make them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaximm import objectives
from jaximm.models.adapters import lora
from jaximm.models.flat import FlatParams
from jaximm.models.llama import model
from jaximm.models.llama.spec import LlamaConfig
from jaximm.objectives import Unembedded
from jaximm.types import Batch

FEATURES = "features"
"""Name of the last site: hidden states after the final norm."""


class Weights(NamedTuple):
    """All numbers of a model, by what may move them.

    A path below ``layers.`` that is in both of the first two is cut: the frozen part holds the
    first layers, the trained part the last.
    """

    trained: FlatParams
    frozen: FlatParams
    adapters: lora.Adapters  # they train too


def every_parameter(params: Mapping[str, jax.Array]) -> Weights:
    """Everything trains."""
    return Weights(dict(params), {}, {})


def named_parameters(params: Mapping[str, jax.Array], targets: str) -> Weights:
    """What a pattern names trains (`jaximm.models.adapters.lora.named_by`), the rest is frozen.

    Raises:
      ValueError: a pattern that names nothing.
    """
    named = lora.named_by(targets)
    trained = {path: value for path, value in params.items() if named(path)}
    if not trained:
        raise ValueError(f"targets {targets!r} names no parameter; there are {sorted(params)}.")
    return Weights(trained, {k: v for k, v in params.items() if k not in trained}, {})


def last_layers(params: Mapping[str, jax.Array], k: int) -> Weights:
    """The last k layers and the final norm train.

    Raises:
      ValueError: a k that is not in 1 .. layers.
    """
    layers = model.layers_of(params)
    count = next(iter(layers.values())).shape[0]
    if not 1 <= k <= count:
        raise ValueError(f"k must be in 1..{count} of these layers, got {k}.")
    trained, frozen = {}, {}
    for path, value in params.items():
        if not model.stacked_axes(path):
            (trained if path == "norm.scale" else frozen)[path] = value
            continue
        trained[path] = value[count - k :]
        if k < count:
            frozen[path] = value[: count - k]
    return Weights(trained, frozen, {})


def with_adapters(
    params: Mapping[str, jax.Array],
    rng_key: jax.Array,
    *,
    rank: int = 8,
    targets: str = "layers",
) -> Weights:
    """Adapters of the kernels that a pattern names train; at first they change nothing.

    Raises:
      ValueError: a rank below 1, or a pattern that names no kernel of a layer.
    """
    named, layers = lora.named_by(targets), model.layers_of(params)

    def chosen(path, leaf):
        del leaf
        return named(path) and path.removeprefix(model.LAYERS) in model.KERNELS

    adapters = lora.start(params, chosen, rank, rng_key, stacked=model.stacked_axes)
    if not adapters:
        kernels = sorted(model.LAYERS + path for path in layers if path in model.KERNELS)
        raise ValueError(f"targets {targets!r} names no kernel of a layer; there are {kernels}.")
    return Weights({}, dict(params), adapters)


def whole(weights: Weights, *, scale: float = 1.0) -> FlatParams:
    """The parameters of the model, with trained parts in place and adapters merged.

    Args:
      weights: of whatever kind.
      scale: see `Language.scale`.
    """
    params = {**weights.frozen, **weights.trained}
    for path in weights.frozen.keys() & weights.trained.keys():
        params[path] = jnp.concatenate([weights.frozen[path], weights.trained[path]])
    return lora.merged(params, weights.adapters, scale)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Language:
    """Plain functions of `Weights` and batches of tokens.

    Compilations are shared by its identity: `Language.shared` is one object for equal attributes.

    Attributes:
      config: of the decoder.
      compute_dtype: of layers and logits, for instance bfloat16; norms, softmaxes and losses are
        taken in float32 at least. None: as the parameters are.
      remat: whether a layer's activations are computed again in the backward pass.
      chunk: columns of the vocabulary at a time.
      scale: alpha / rank of adapters.
      sites: linear maps whose inputs `sites` returns: "layers.5.down"; one of query, key, value,
        output, gate, up, down.
    """

    config: LlamaConfig
    compute_dtype: DTypeLike | None = None
    remat: bool = False
    chunk: int = 4096
    scale: float = 1.0
    sites: tuple[str, ...] = ()

    def __post_init__(self):
        for site in self.sites:
            self._place(site)

    @classmethod
    @functools.lru_cache(maxsize=64)
    def shared(cls, **attributes: Any) -> Language:
        """The one object of these attributes in this process; it holds no arrays."""
        return cls(**attributes)

    @property
    def objective(self) -> objectives.Tokens:
        """Loss and score of a row."""
        return objectives.Tokens(self.chunk)

    def outputs(self, weights: Weights, tokens: Int[Array, "n t"]) -> Unembedded:
        """Final hidden states in the compute dtype, and the table that makes logits of them.

        Raises:
          ValueError: parameters that are not the configuration's.
        """
        adapters = lora.scaled(weights.adapters, self.scale)
        return self._outputs(weights._replace(adapters=adapters), tokens)

    def outputs_of_params(
        self, params: FlatParams, tokens: Int[Array, "n t"], adapters: lora.Adapters | None = None
    ) -> Unembedded:
        """`outputs` of parameters in one dict, and perhaps of adapters that are scaled already.

        The `features_fn` of a problem of attackers of weights.
        """
        return self._outputs(Weights(params, {}, adapters or {}), tokens)

    def _outputs(self, weights: Weights, tokens) -> Unembedded:
        states, _ = self._run(weights, tokens, {})
        dtype = states.dtype if self.compute_dtype is None else self.compute_dtype
        return Unembedded(states.astype(dtype), model.unembedding(self._held(weights)))

    def losses(self, weights: Weights, batch: Batch) -> Float[Array, "n"]:
        """Cross-entropy of each row in nats, mean over its own tokens."""
        return self.objective.losses(self.outputs(weights, batch.x), batch.y)

    def scaled_losses(
        self, weights: Weights, batch: Batch, scale: Float[Array, ""]
    ) -> Float[Array, "n"]:
        """The same with all logits times a scalar."""
        states, table = self.outputs(weights, batch.x)
        return self.objective.losses(
            Unembedded(states * scale.astype(states.dtype), table), batch.y
        )

    def scores(self, weights: Weights, batch: Batch) -> Float[Array, "n"]:
        """Share of each row's tokens that are predicted."""
        return self.objective.scores(self.outputs(weights, batch.x), batch.y)

    def weights(self, batch: Batch) -> Float[Array, "n"]:
        """Tokens of each row that count."""
        return self.objective.weights(batch.y)

    def divergences(self, weights: Weights, reference: Weights, batch: Batch) -> Float[Array, "n"]:
        """KL(reference || model) of each row, see `jaximm.objectives.Tokens.divergences`."""
        outputs, other = (self.outputs(one, batch.x) for one in (weights, reference))
        return self.objective.divergences(outputs, other, batch.y)

    def entropies(self, weights: Weights, batch: Batch) -> Float[Array, "n"]:
        """Entropy of each row's predictions, see `jaximm.objectives.Tokens.entropies`."""
        return self.objective.entropies(self.outputs(weights, batch.x), batch.y)

    def activations(self, weights: Weights, tokens: Int[Array, "n t"]) -> dict[str, Array]:
        """``{"features": [rows, d], site: [rows, width], ...}``, in float32 at least.

        Rows are all positions but the first of each text, which has activations of its own,
        whatever the text: n (t - 1) of them, a text after the other.
        """
        places, taps = self._taps()
        adapters = lora.scaled(weights.adapters, self.scale)
        states, tapped = self._run(weights._replace(adapters=adapters), tokens, taps)
        rows = {FEATURES: states}
        for site, (layer, name) in places.items():
            rows[site] = tapped[name][taps[name].index(layer)]
        return {
            site: inputs[:, 1:].reshape(-1, inputs.shape[-1]).astype(model.wide(inputs.dtype))
            for site, inputs in rows.items()
        }

    def features(self, weights: Weights, tokens: Int[Array, "n t"]) -> Float[Array, "rows d"]:
        """The features among `activations`."""
        return self.activations(weights, tokens)[FEATURES]

    def lens_losses(self, weights: Weights, batch: Batch) -> Float[Array, "layers+1 n"]:
        """`losses` as the final norm and the table read them off what enters each layer.

        The last are `losses` themselves. nostalgebraist (2020), Interpreting GPT: the logit lens.
        """
        adapters = lora.scaled(weights.adapters, self.scale)
        taps = {model.STREAM: list(range(self.config.layers))}
        states, tapped = self._run(weights._replace(adapters=adapters), batch.x, taps)
        held = self._held(weights)

        def losses(states):
            dtype = states.dtype if self.compute_dtype is None else self.compute_dtype
            outputs = Unembedded(states.astype(dtype), model.unembedding(held))
            return self.objective.losses(outputs, batch.y)

        def read(stream):
            return losses(model.final_norm(held, stream, self.config))

        early = jax.lax.map(read, tapped[model.STREAM])  # one layer's logits at a time
        return jnp.concatenate([early, losses(states)[None]])

    def perturbed_losses(
        self, weights: Weights, batch: Batch, offsets: Mapping[str, Float[Array, "rows width"]]
    ) -> Float[Array, "n"]:
        """`losses` with offsets of the form of `activations` added to each site and the features.

        The first position of a text gets none.
        """
        n, t = batch.x.shape
        whole = {
            site: jnp.pad(rows.reshape(n, t - 1, -1), ((0, 0), (1, 0), (0, 0)))
            for site, rows in offsets.items()
        }
        places, taps = self._taps()
        added = {
            name: jnp.stack([whole[site] for site in sorted(places, key=places.__getitem__)
                             if places[site][1] == name])
            for name in taps
        }  # fmt: skip
        adapters = lora.scaled(weights.adapters, self.scale)
        states, _ = self._run(weights._replace(adapters=adapters), batch.x, taps, added)
        states += whole[FEATURES].astype(states.dtype)
        dtype = states.dtype if self.compute_dtype is None else self.compute_dtype
        outputs = Unembedded(states.astype(dtype), model.unembedding(self._held(weights)))
        return self.objective.losses(outputs, batch.y)

    def row_flops(self, params: Mapping[str, jax.Array], t: int) -> float:
        """Of the forward pass of a text of t tokens: 2 a parameter and token, and attention."""
        config, size = self.config, 0.0
        for path, value in params.items():
            size += 0.0 if path == "embedding.table" and not config.tied else value.size
        mixing = 2.0 * config.layers * config.heads * config.head_width * t  # causal: half of 4
        return t * (2.0 * size + mixing)

    def _held(self, weights: Weights) -> FlatParams:
        """Parameters outside of the layers; no gradient goes to frozen ones."""
        frozen = jax.lax.stop_gradient(weights.frozen)
        return {k: v for k, v in {**frozen, **weights.trained}.items() if not model.stacked_axes(k)}

    def _taps(self) -> tuple[dict[str, tuple[int, str]], dict[str, list[int]]]:
        """Layer and linear map of each site, and the layers, in order, by linear map."""
        places = {site: self._place(site) for site in self.sites}
        taps: dict[str, list[int]] = {}
        for layer, name in sorted(places.values()):
            taps.setdefault(name, []).append(layer)
        return places, taps

    def _run(
        self,
        weights: Weights,
        tokens,
        taps: Mapping[str, list[int]],
        offsets: Mapping[str, Array] | None = None,
    ):
        """States after the final norm, and tapped inputs by name of the linear map.

        Offsets are [taps, n, t, width], by that name and in the order of the taps.
        """
        frozen = jax.lax.stop_gradient(weights.frozen)
        first, last = model.layers_of(frozen), model.layers_of(weights.trained)
        stacks = [first, last] if first.keys() & last.keys() else [{**first, **last}]
        self._check(weights, stacks)
        held = self._held(weights)
        x, start = model.embed(held, tokens, self.compute_dtype), 0
        tapped: dict[str, list[Array]] = {name: [] for name in taps}
        for stack in stacks:
            stop = start + next(iter(stack.values())).shape[0]
            here = {
                name: [layer - start for layer in layers if start <= layer < stop]
                for name, layers in taps.items()
            }
            chosen = {name: [start <= layer < stop for layer in taps[name]] for name in taps}
            x, seen = model.advance(
                x,
                stack,
                self.config,
                adapters=model.layers_of(weights.adapters),
                remat=self.remat,
                taps={name: layers for name, layers in here.items() if layers},
                offsets={
                    name: given[np.flatnonzero(chosen[name])]
                    for name, given in (offsets or {}).items()
                    if any(chosen[name])
                },
            )
            for name, rows in seen.items():
                tapped[name].append(rows)
            start = stop
        states = model.final_norm(held, x, self.config)
        return states, {name: jnp.concatenate(rows) for name, rows in tapped.items()}

    def _check(self, weights: Weights, stacks: list[dict[str, Array]]) -> None:
        shapes = {}
        for path in {**weights.frozen, **weights.trained}:
            parts = [part[path] for part in (weights.frozen, weights.trained) if path in part]
            shapes[path] = (
                parts[0].shape
                if len(parts) == 1
                else (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
            )
        model.check_shapes(shapes, self.config)
        for path, factors in weights.adapters.items():
            if path not in shapes:
                raise ValueError(f"there is an adapter of {path!r}, which is no parameter.")
            *_, rows, columns = shapes[path]
            if (factors.a.shape[-2], factors.b.shape[-1]) != (rows, columns):
                raise ValueError(
                    f"the adapter of {path!r} must be [.., {rows}, rank] and [.., rank, "
                    f"{columns}], got {list(factors.a.shape)} and {list(factors.b.shape)}."
                )
        if len(stacks) > 1:
            if stacks[0].keys() != stacks[1].keys():
                raise ValueError("layers that are cut in two must be cut alike in every path.")
            if weights.adapters:
                raise ValueError("layers that are cut in two take no adapters.")

    def _place(self, site: str) -> tuple[int, str]:
        """Layer and linear map of a site."""
        parts = site.split(".")
        if (
            len(parts) != 3
            or parts[0] != "layers"
            or not parts[1].isdecimal()
            or int(parts[1]) >= self.config.layers
            or parts[2] not in model.LINEAR
        ):
            raise ValueError(
                f"there is no site {site!r}; sites are layers.0 .. "
                f"layers.{self.config.layers - 1}, each with one of {list(model.LINEAR)}."
            )
        return int(parts[1]), parts[2]
