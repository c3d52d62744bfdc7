"""A Flax module of your own as a backbone: `whole` makes a `ModelSpec` of it.

>>> import jaximm
>>> from flax import nnx
>>> class MyNet(nnx.Module):
...     def __init__(self, *, rngs: nnx.Rngs):
...         self.fc1 = nnx.Linear(48, 16, rngs=rngs)
...         self.fc2 = nnx.Linear(16, 6, rngs=rngs)
...
...     def __call__(self, x):  # [n, 4, 4, 3] to features [n, 6]
...         return self.fc2(nnx.relu(self.fc1(x.reshape(x.shape[0], -1))))
>>> spec = whole(MyNet, width=6, preprocess=Preprocess(size=4, resize=4))
>>> jaximm.register("model", "my_net", spec)
>>> backbone = jaximm.models.create("my_net", rng_key=jax.random.key(0))
>>> sorted(backbone.split_at("net.fc2").params)
['net.fc2.bias', 'net.fc2.kernel']
>>> del jaximm.models.REGISTRY["my_net"]

The module is one stage, "net", so there is nothing to cut: any part of it can train, and what does
not train stays as it is, but the whole module runs in every step. A frozen prefix that runs once
over the data needs a chain of stages, a `jaximm.models.backbone.StagedModule`, of which
`jaximm.models.mlp` is a short example.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaximm.models.backbone import split
from jaximm.models.spec import Entry, Layout, ModelSpec, Preprocess

STAGE = "net"
"""The one stage, and the first part of every path."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeConfig:
    """No fields: the module's own constructor says everything."""


class Whole(nnx.Module):
    """A module in evaluation mode as a single stage; a `jaximm.models.backbone.StagedModule`."""

    stage_names = (STAGE,)

    def __init__(self, net: nnx.Module, width: int):
        if not isinstance(net, nnx.Module):
            raise ValueError(f"expected build to return an nnx.Module, got {type(net).__name__}.")
        net.eval()
        for _, layer in nnx.iter_modules(net):
            # In evaluation mode these layers draw nothing, so they need no keys.
            if isinstance(layer, nnx.Dropout | nnx.MultiHeadAttention):
                layer.rngs = nnx.data(None)
        self.net = net
        self.width = width

    def run_stage(self, name: str, x: jax.Array) -> Float[Array, "n d"]:
        """Features.

        Raises:
          ValueError: another stage, or features of another shape than [n, width].
        """
        if name != STAGE:
            raise ValueError(f"unknown stage {name!r}; there is only {STAGE!r}.")
        net: Any = self.net
        features = net(x)
        expected = (x.shape[0], self.width)
        if getattr(features, "shape", None) != expected:
            got = list(features.shape) if hasattr(features, "shape") else type(features).__name__
            raise ValueError(
                f"{type(net).__name__} must return features {list(expected)} of inputs "
                f"{list(x.shape)}, got {got}; pass its width, and average over positions."
            )
        return features

    def classify(self, hidden: jax.Array, features: jax.Array) -> jax.Array:
        """There is no classifier.

        Raises:
          ValueError: always.
        """
        raise ValueError("this model has no classifier: use its features, with a head of your own.")


def whole(
    build: Callable[..., nnx.Module],
    *,
    width: int,
    preprocess: Preprocess | None = None,
    source: str = "",
) -> ModelSpec:
    """A registry entry for a module whose ``__call__(x)`` gives features [n, width].

    Parameters are ``net.<path in the module>``, batch-norm statistics too. The module runs in
    evaluation mode: batch norm on its stored statistics, dropout off. Its one checkpoint layout,
    "own", has our paths as keys, so `jaximm.models.export_backbone` and ``create(weights=...)``
    work; `jaximm.checkpoint` finds the module by its registered name.

    Args:
      build: a module class or a function, called as ``build(rngs)``, or as ``build(rngs=rngs)``
        where that is a keyword-only argument. Its random weights are what it draws.
      width: d.
      preprocess: from uint8 images to the module's inputs; None: those of `Preprocess`.
      source: paper and where weights come from, one line.

    Raises:
      ValueError: ``build`` is no function, a width below 1; later, from `jaximm.models.create`:
        variables other than `nnx.Param` and `nnx.BatchStat`; and in use: features of another shape.
    """
    if not callable(build) or isinstance(build, nnx.Module):
        raise ValueError(
            f"expected a module class or a function of rngs, got {type(build).__name__}."
        )
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}.")

    def build_whole(config: WholeConfig, rngs: nnx.Rngs) -> Whole:
        del config
        return Whole(build(rngs=rngs) if _by_keyword(build) else build(rngs), width)

    chosen = Preprocess() if preprocess is None else preprocess

    def own_layout(config: WholeConfig) -> Layout:
        paths: list[str] = []

        def initialise(key):
            module = build_whole(config, nnx.Rngs(key))
            backbone = split(module, name=STAGE, config=config, width=width, preprocess=chosen)
            paths.extend([*backbone.params, *backbone.stats])
            return backbone.params

        jax.eval_shape(initialise, jax.random.key(0))
        return Layout(tuple(Entry(path, (path,)) for path in paths))

    return ModelSpec(
        config=WholeConfig(),
        build=build_whole,
        width=width,
        preprocess=chosen,
        layouts={"own": own_layout},
        source=source or f"{getattr(build, '__name__', 'a module')}, registered by its user",
    )


def _by_keyword(build: Callable[..., Any]) -> bool:
    # The metaclass of NNX modules hides the constructor's signature.
    function = build.__init__ if isinstance(build, type) else build
    parameter = inspect.signature(function).parameters.get("rngs")
    return parameter is not None and parameter.kind is inspect.Parameter.KEYWORD_ONLY
