"""Models handed over in Python: one adapter a kind, at the border.

Whatever comes in goes on as a `Backbone` of one stage "net", and comes back in its own form:

====================================  ==================================  =======================
what is handed over                   called as                           comes back as
====================================  ==================================  =======================
Flax NNX module                       ``module(x)``, evaluation mode      a module of its class
Flax Linen ``(module, variables)``    ``module.apply(variables, x)``      variables
Equinox module                        ``jax.vmap(module)(x)``             a module of its class
``(function, parameters)``            ``function(parameters, x)``         parameters
`Backbone`                            its stages                          a `Backbone`
====================================  ==================================  =======================

Inputs x [n, ...] are all rows of a batch (an Equinox module sees one at a time, as is usual there),
features [n, d]. A neck, the linear map that closed forms add after the features, is a last layer of
a module; beside variables or parameters, ``{"net": them, "neck": {"kernel": ..., "bias": ...}}``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaximm.models.backbone import Backbone, split
from jaximm.models.flat import NECK, FlatParams, under
from jaximm.models.spec import Preprocess
from jaximm.models.whole import STAGE, Whole, WholeConfig
from jaximm.types import Params

Model = Any
"""What is handed over, of one of the kinds in the table; or that with a neck."""

Inputs = jax.Array | np.ndarray | jax.ShapeDtypeStruct
"""Rows, of which only the shape counts."""


class Own(NamedTuple):
    """A model at the border.

    Attributes:
      kind: what was handed over, in words.
      name: of its class or function, an identifier.
      backbone: ``backbone(inputs) -> Backbone`` for rows [n, ...], of which only the shape counts.
      given_back: the user's form of a backbone with other numbers, without a neck.
      with_neck: that form with a neck's kernel [d, d'] and bias [d'] after it.
    """

    kind: str
    name: str
    backbone: Callable[[Inputs], Backbone]
    given_back: Callable[[Backbone], Model]
    with_neck: Callable[[Model, jax.Array, jax.Array], Model]

    def returned(self, backbone: Backbone) -> Model:
        """A backbone in the user's form, its neck included."""
        model, kernel = self.given_back(backbone), backbone.params.get("neck.kernel")
        if kernel is None:
            return model
        bias = backbone.params.get("neck.bias", jnp.zeros(kernel.shape[1], kernel.dtype))
        return self.with_neck(model, kernel, bias)


def own_model(model: Model, preprocess: Preprocess | None = None) -> Own:
    """What was handed over, recognised by the first adapter that knows it.

    Args:
      model: see the module's table.
      preprocess: from uint8 images to the model's inputs; a `Backbone` has its own.

    Raises:
      ValueError: none of the kinds.
    """
    for adapter in ADAPTERS:
        if (own := adapter(model, preprocess or Preprocess())) is not None:
            return own
    raise ValueError(
        "model must be a Flax NNX module, (Linen module, variables), an Equinox module, (function, "
        f"parameters) or a jaximm Backbone, got {_said(model)}."
    )


def _said(model: Model) -> str:
    if isinstance(model, tuple):
        return f"a tuple of {[type(part).__name__ for part in model]}"
    return f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__


# ---------------------------------------------------------------- Flax NNX


def _nnx_module(model: Model, preprocess: Preprocess) -> Own | None:
    if not isinstance(model, nnx.Module):
        return None
    name = _identifier(type(model).__name__)
    if not callable(model):
        raise ValueError(
            f"{name} cannot be called: a module gives features [n, d] by its __call__; of a model "
            "of jaximm's own give the Backbone."
        )

    def backbone(inputs: Inputs) -> Backbone:
        # A copy: the user's module stays in its mode, with its keys.
        return _whole(nnx.clone(model), name, inputs, preprocess)

    def given_back(changed: Backbone) -> nnx.Module:
        fresh = nnx.clone(model)
        for path, variable in nnx.to_flat_state(nnx.state(fresh, nnx.Param)):
            new = changed.params[".".join([STAGE, *map(str, path)])]
            variable.set_value(new)
            nnx.update(fresh, nnx.from_flat_state([(path, variable)]))
        return fresh

    def with_neck(fresh: nnx.Module, kernel: jax.Array, bias: jax.Array) -> nnx.Module:
        last = nnx.Linear(*kernel.shape, param_dtype=kernel.dtype, rngs=nnx.Rngs(0))
        last.kernel, last.bias = nnx.Param(kernel), nnx.Param(bias)
        return nnx.Sequential(fresh, last)

    return Own("Flax NNX module", name, backbone, given_back, with_neck)


# ---------------------------------------------------------------- functions of trees


def _linen(model: Model, preprocess: Preprocess) -> Own | None:
    linen = sys.modules.get("flax.linen")  # not imported: then the model is none
    if linen is None or not (_is_pair(model) and isinstance(model[0], linen.Module)):
        return None
    module, variables = model
    if not (isinstance(variables, Mapping) and "params" in variables):
        raise ValueError(
            "a Linen module comes with its variables, {'params': ..., ...}, as init gives them."
        )
    return _of_tree(
        module.apply,
        variables,
        kind="Flax Linen module",
        name=type(module).__name__,
        preprocess=preprocess,
        is_trained=lambda path: path[0] == "params",
    )


def _equinox(model: Model, preprocess: Preprocess) -> Own | None:
    equinox = sys.modules.get("equinox")  # not imported: then the model is none
    if equinox is None or not isinstance(model, equinox.Module):
        return None

    def with_neck(net: Model, kernel: jax.Array, bias: jax.Array) -> Model:
        last = equinox.nn.Linear(*kernel.shape, key=jax.random.key(0))
        last = equinox.tree_at(lambda linear: (linear.weight, linear.bias), last, (kernel.T, bias))
        return equinox.nn.Sequential([equinox.nn.Lambda(net), last])

    return _of_tree(
        lambda net, x: jax.vmap(net)(x),
        model,
        kind="Equinox module",
        name=type(model).__name__,
        preprocess=preprocess,
    )._replace(with_neck=with_neck)


def _function(model: Model, preprocess: Preprocess) -> Own | None:
    if not (_is_pair(model) and callable(model[0])):
        return None
    function, params = model
    return _of_tree(
        function,
        params,
        kind="function with parameters",
        name=getattr(function, "__name__", type(function).__name__),
        preprocess=preprocess,
    )


def _backbone(model: Model, preprocess: Preprocess) -> Own | None:
    del preprocess  # it has its own
    if not isinstance(model, Backbone):
        return None
    return Own(
        "jaximm backbone",
        model.name,
        backbone=lambda inputs: model,
        given_back=lambda changed: changed,
        with_neck=lambda changed, kernel, bias: changed,
    )


ADAPTERS = (_nnx_module, _linen, _equinox, _function, _backbone)
"""``adapter(model, preprocess) -> Own``, or None where the model is of another kind."""


class _Branch(nnx.Module):
    """A part of a tree."""


class _TreeNet(nnx.Module):
    """``function(tree, x)`` as a module; its variables are the tree's leaves, by their paths."""

    def __init__(self, paths: Sequence[tuple[str, ...]], values: Sequence[Any], run: Callable):
        self._paths, self._run = tuple(paths), run
        for path, value in zip(paths, values, strict=True):
            branch = self
            for part in path[:-1]:
                if not hasattr(branch, part):
                    setattr(branch, part, _Branch())
                branch = getattr(branch, part)
            setattr(branch, path[-1], value)

    def __call__(self, x: jax.Array) -> jax.Array:
        leaves = []
        for path in self._paths:
            value: Any = self
            for part in path:
                value = getattr(value, part)
            leaves.append(value[...])
        return self._run(leaves, x)


def _of_tree(
    function: Callable[[Params, jax.Array], jax.Array],
    tree: Params,
    *,
    kind: str,
    name: str,
    preprocess: Preprocess,
    is_trained: Callable[[tuple[str, ...]], bool] = lambda path: True,
) -> Own:
    """``function(tree, x)``: floating leaves are parameters, or else statistics; others constants.

    Raises:
      ValueError: no floating array, or two leaves of one name.
    """
    name = _identifier(name)
    entries, structure = jax.tree_util.tree_flatten_with_path(tree)
    constants = [leaf for _, leaf in entries]
    places = [at for at, leaf in enumerate(constants) if _is_floating(leaf)]
    paths = [_path(entries[at][0]) for at in places]
    if not any(map(is_trained, paths)):
        raise ValueError(f"{name} has no floating array among its parameters: nothing can train.")
    if twice := sorted({".".join(path) for path in paths if paths.count(path) > 1}):
        raise ValueError(f"{name}: two parameters would be called {twice[0]!r}; rename one.")

    def filled(leaves: list[jax.Array]) -> Params:
        whole = list(constants)
        for at, leaf in zip(places, leaves, strict=True):
            whole[at] = leaf
        return jax.tree_util.tree_unflatten(structure, whole)

    def run(leaves: list[jax.Array], x: jax.Array) -> jax.Array:
        features = function(filled(leaves), x)
        # In double precision a constant of the function's own may have widened them.
        return features.astype(x.dtype) if hasattr(features, "astype") else features

    def backbone(inputs: Inputs) -> Backbone:
        values = [
            (nnx.Param if is_trained(path) else nnx.BatchStat)(jnp.asarray(constants[at]))
            for at, path in zip(places, paths, strict=True)
        ]
        return _whole(_TreeNet(paths, values, run), name, inputs, preprocess)

    def given_back(changed: Backbone) -> Params:
        numbers = {**changed.params, **changed.stats}
        return filled([numbers[".".join([STAGE, *path])] for path in paths])

    def with_neck(net: Params, kernel: jax.Array, bias: jax.Array) -> Params:
        return {"net": net, "neck": {"kernel": kernel, "bias": bias}}

    return Own(kind, name, backbone, given_back, with_neck)


def _is_pair(model: Model) -> bool:
    return isinstance(model, tuple) and len(model) == 2


def _is_floating(leaf: object) -> bool:
    is_array = isinstance(leaf, jax.Array | np.ndarray)
    return is_array and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _path(keys: tuple[Any, ...]) -> tuple[str, ...]:
    """Names of a leaf's place; a number joins the name before it, as in Flax: layers_0."""
    parts: list[str] = []
    for key in keys:
        part = re.sub(r"\W", "_", jax.tree_util.keystr((key,), simple=True))
        if part.isdigit():
            part = f"{parts.pop() if parts else 'leaf'}_{part}"
        parts.append(f"{part}_" if hasattr(_TreeNet, part) else part)
    return tuple(parts) or ("value",)


def _identifier(name: str) -> str:
    name = re.sub(r"\W", "_", name).strip("_")
    return name if name.isidentifier() else f"model_{name}"


# ---------------------------------------------------------------- the stage


def _whole(net: nnx.Module, name: str, inputs: Inputs, preprocess: Preprocess) -> Backbone:
    """A module as the one stage of a backbone.

    Raises:
      ValueError: it does not give [n, d], or no floating numbers.
    """
    net.eval()
    graphdef, state = nnx.split(net)
    rows = jax.ShapeDtypeStruct((2, *inputs.shape[1:]), inputs.dtype)

    def features(state: nnx.State, rows: jax.Array) -> jax.Array:
        x = preprocess(rows) if rows.dtype == jnp.uint8 else rows
        return nnx.merge(graphdef, state)(x)

    given = jax.eval_shape(features, state, rows)
    shape = getattr(given, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != 2:
        got = type(given).__name__ if shape is None else list(shape)
        raise ValueError(
            f"{name} must give features [n, d] for inputs {['n', *inputs.shape[1:]]}, got {got} "
            "for n = 2; flatten them, or average over positions."
        )
    if not jnp.issubdtype(given.dtype, jnp.floating):
        raise ValueError(f"{name} must give floating features, got {given.dtype}.")
    return split(
        Whole(net, shape[1]),
        name=name,
        config=WholeConfig(),
        width=shape[1],
        preprocess=preprocess,
    )


def numbers_of(backbone: Backbone) -> FlatParams:
    """Parameters and statistics without a neck, by our paths: what "own" layouts hold."""
    whole = {**backbone.params, **backbone.stats}
    return {path: value for path, value in whole.items() if not under(path, NECK)}
