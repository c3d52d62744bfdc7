"""Backbones: a registry of models, random or with weights from files, and export for other tools.

`REGISTRY` maps a name to a `ModelSpec`. A new model is one file that ends in a spec, and one line
here. A Flax module from elsewhere: ``jaximm.register("model", name, whole(MyModule, width=...))``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from jaximm.models.backbone import Backbone, Trainable, run_stages, split
from jaximm.models.efficientnet import EFFICIENTNET_LITE0, EFFICIENTNET_LITE1, EFFICIENTNET_LITE2
from jaximm.models.flat import NECK, FlatParams, under
from jaximm.models.linear import LINEAR
from jaximm.models.mlp import MLP, MLPConfig
from jaximm.models.neck import fold_neck
from jaximm.models.pretrained import PRETRAINED, pretrained_weights
from jaximm.models.resnet import RESNET18, RESNET50
from jaximm.models.spec import Entry, Layout, ModelSpec, Preprocess
from jaximm.models.squeezenet import SQUEEZENET1_1
from jaximm.models.vit import DINOV2_S14, VIT_B16, VIT_B16_TORCHVISION, VIT_S16
from jaximm.models.weights import (
    CLASSIFIER,
    HEAD_KEYS,
    NPZ_METADATA,
    WeightFileError,
    export_state,
    fitting,
    from_npz,
    import_state,
    key_problem,
    own_layout,
    read_weights,
    select,
    with_separate_head,
)
from jaximm.models.weights.errors import advice, shown
from jaximm.models.weights.said import NOTHING, read_said
from jaximm.models.whole import whole
from jaximm.registry import Config
from jaximm.types import Fields, Json
from jaximm.version import __version__

REGISTRY: dict[str, ModelSpec] = {
    "linear": LINEAR,
    "mlp": MLP,
    "squeezenet1_1": SQUEEZENET1_1,
    "efficientnet_lite0": EFFICIENTNET_LITE0,
    "efficientnet_lite1": EFFICIENTNET_LITE1,
    "efficientnet_lite2": EFFICIENTNET_LITE2,
    "resnet18": RESNET18,
    "resnet50": RESNET50,
    "vit_s16": VIT_S16,
    "vit_b16": VIT_B16,
    "vit_b16_torchvision": VIT_B16_TORCHVISION,
    "dinov2_s14": DINOV2_S14,
}

__all__ = [
    "NECK",
    "NPZ",
    "PRETRAINED",
    "REGISTRY",
    "Backbone",
    "Entry",
    "FlatParams",
    "Layout",
    "ModelSpec",
    "Preprocess",
    "Trainable",
    "WeightFileError",
    "create",
    "export_backbone",
    "fold_neck",
    "make_config",
    "preprocess_fields",
    "read_weights",
    "timm_config",
    "whole",
    "write_npz",
]


def make_config(name: str, **fields: Any) -> Config:
    """The configuration of model `name` with the given fields, others at their registered values.

    >>> make_config("mlp", widths=(8, 4)).widths
    (8, 4)

    Raises:
      ValueError: unknown name or field, with the known ones; or a value that the class refuses.
    """
    spec = _spec(name)
    known = [field.name for field in dataclasses.fields(spec.config)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"{name}: unknown config key {unknown[0]!r}; choose from {known}.")
    return dataclasses.replace(spec.config, **fields)


def create(
    name: str,
    *,
    weights: str | Path | Mapping[str, np.ndarray] | None = None,
    layout: str | None = None,
    prefix: str = "",
    rng_key: jax.Array | None = None,
    classifier: bool = True,
    preprocess: Preprocess | Fields | None = None,
    **config_fields: Any,
) -> Backbone:
    """A backbone with random or with given weights.

    Args:
      name: a key of `REGISTRY`.
      weights: "pretrained": the weights that an installed package carries. A path: of a file or
        folder that `read_weights` reads. Arrays by key: a state dict. None: random ones, from
        `rng_key`.
      layout: of the weights, one of the model's; None: the first whose keys fit.
      prefix: of the model's arrays where there are more, as `read_weights` takes it. A file of
        `export_backbone` says its own layout, configuration and preprocessing: they stand in the
        place of the registered ones, and a head beside the model becomes its classifier.
      rng_key: for random weights; they are float32 and drawn in one compiled program.
      classifier: False: given weights' own classifier is left, so that its number of classes does
        not matter; ours is random where there is a key, else zero.
      preprocess: in place of the registered one, for weights from elsewhere may expect another; or
        those of its fields that differ: ``{"size": 128}``.
      config_fields: fields of the model's configuration. A perceptron's square images set the size
        in its preprocessing.

    >>> backbone = create("mlp", widths=(8, 4), rng_key=jax.random.key(0))
    >>> backbone.width, backbone.params["layers.1.kernel"].shape
    (4, (8, 4))

    Raises:
      ValueError: unknown model, field or layout; neither weights nor key.
      WeightFileError: (a ValueError) weights that cannot be read; that do not fit, with the layouts
        tried, why each failed and the prefix that would fit; whose numbers are not finite, or not
        in the model's dtype, in the other byte order, or variances below 0: with key and count.
      MissingCarrierError: (a ValueError) the package with the weights is not installed.
    """
    spec, said = _spec(name), NOTHING
    if weights is not None and not isinstance(weights, Mapping):
        said = read_said(weights, of=name)
    try:
        config = make_config(name, **{**said.config, **config_fields})
        images = _preprocess(spec, config, said.preprocess)
    except ValueError as error:
        if said is NOTHING:
            raise
        raise WeightFileError(f"{shown(Path(str(weights)).name)}: {error}") from error
    if weights is None:
        if rng_key is None:
            raise ValueError(f"{name}: give weights ('pretrained' or a path) or a rng_key.")
        if layout is not None or prefix:
            raise ValueError("layout and prefix belong to weights; random ones have neither.")
        backbone = _build(name, spec, config, rng_key, abstract=False)
    else:
        source, origin, layout = _source(name, weights, layout or said.layout or None, prefix)
        backbone = _build(name, spec, config, jax.random.key(0), abstract=True)
        if layout == NPZ:
            source = from_npz(source)
        chosen = _choose_layout(backbone, spec, source, origin, layout, classifier)
        imported = import_state(
            source,
            chosen,
            backbone.params,
            backbone.stats,
            name=origin,
            classifier=classifier,
        )
        params = dict(imported.params)
        if not classifier:
            params |= _classifier(spec, config, backbone, rng_key)
        necks = {path: params.pop(path) for path in list(params) if under(path, NECK)}
        backbone = dataclasses.replace(backbone, params=params, stats=imported.stats)
        try:
            backbone = backbone.replace(necks)
        except ValueError as error:
            raise WeightFileError(f"{origin}: {error}") from error
    return dataclasses.replace(backbone, preprocess=_replaced(images, preprocess))


def preprocess_fields(fields: Fields) -> Json:
    """Fields of `Preprocess` by name; lists, as JSON has them, become tuples.

    Raises:
      ValueError: an unknown field, with the known ones.
    """
    known = [field.name for field in dataclasses.fields(Preprocess)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r} of preprocess; choose from {known}.")
    return {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}


NPZ = "npz"
"""Layout of every model: a NumPy archive with our own paths as names."""

TIMM = "timm"
"""Layout of the models that timm has."""


def export_backbone(
    backbone: Backbone,
    path: str | Path,
    *,
    layout: str | None = None,
    head: tuple[jax.Array | np.ndarray, jax.Array | np.ndarray] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes a backbone as ``.safetensors`` with somebody else's names and shapes, or as ``.npz``.

    A neck is folded where `fold_neck` can; otherwise it is there as ``neck.weight`` [d', d] and
    ``neck.bias``, a linear layer to run after the features. `create` reads the file back with head,
    classes and preprocessing; a separate head only where the model's classifier is linear and of
    the neck's width (else give ``classifier=False``: it is left).

    Args:
      backbone: what to write.
      path: ends in ``.safetensors``, of the layout "npz" in ``.npz``; replaced whole if there.
      layout: of the model's layouts; None: its first. "npz" has our paths as names, and our shapes:
        ``neck.kernel`` [d, d'], ``head.kernel`` [d, k].
      head: ``(kernel [d, k], bias [k])``, a linear classifier on the features, the neck's included.
        It takes the place of the original classifier: under that one's keys if that is a linear
        layer on features and no neck is left before it, else under ``head.weight`` [k, d] and
        ``head.bias``, so that a strict loader of the original architecture refuses the file.
      metadata: texts beside those below.

    Returns:
      `path`. The file's metadata name jaximm's version, the model, its configuration and layout,
      what became of neck and head, and the preprocessing, as JSON with pixels in 0..255; in timm's
      layout also ``timm``: architecture, number of classes and preprocessing as timm's
      ``config.json`` has them (`timm_config`). Those of ``.npz`` are JSON in UTF-8, as uint8 under
      ``__metadata__``.

    Raises:
      ValueError: another suffix, an unknown layout, a head of another width.
    """
    path = Path(path)
    suffix = f".{NPZ}" if layout == NPZ else ".safetensors"
    if path.suffix != suffix:
        raise ValueError(f"the path must end in {suffix}, got {path.name!r}.")
    layout_fn = None
    if layout != NPZ:
        spec = _spec(backbone.name)
        layout = next(iter(spec.layouts)) if layout is None else layout
        layout_fn = _layout(backbone.name, spec, layout)
    neck = "none"
    if "neck.kernel" in backbone.params:
        folded = fold_neck(backbone)
        run = "x @ neck.kernel" if layout_fn is None else "x @ neck.weight.T"
        neck = f"separate: after the features x, {run} (+ neck.bias where there is one)"
        if "neck.kernel" not in folded.params:
            neck = f"folded into {backbone.stage_names[-1]}: the features are those with the neck"
        backbone = folded
    params, head_words, config = dict(backbone.params), "none", backbone.config
    extra: dict[str, np.ndarray] = {}
    if head is not None:
        kernel, bias = head
        if kernel.shape != (backbone.width, *bias.shape) or bias.ndim != 1:
            raise ValueError(
                f"expected a head [{backbone.width}, k] and [k], got {list(kernel.shape)} and "
                f"{list(bias.shape)}."
            )
        original = params.get(f"{CLASSIFIER}.kernel")
        params = {key: value for key, value in params.items() if not under(key, CLASSIFIER)}
        linear = hasattr(config, "classes") and (original is None or original.ndim == 2)
        if linear:
            config = dataclasses.replace(config, classes=bias.shape[0])
        keys = {CLASSIFIER} if layout_fn is None else {e.path for e in layout_fn(config).entries}
        has_place = any(under(path, CLASSIFIER) for path in keys)
        if linear and has_place and "neck.kernel" not in params:
            params |= {f"{CLASSIFIER}.kernel": kernel, f"{CLASSIFIER}.bias": bias}
            head_words = "under the keys of the original classifier"
        elif layout_fn is None:
            extra = {"head.kernel": np.asarray(kernel), "head.bias": np.asarray(bias)}
        else:
            arrays = np.array(np.asarray(kernel).T, order="C"), np.asarray(bias)
            extra = dict(zip(HEAD_KEYS, arrays, strict=True))
        if extra:
            head_words = f"separate: {', '.join(extra)}, on the features, the neck's included"
    described = {
        "format": "pt",
        "jaximm": __version__,
        "model": backbone.name,
        "config": json.dumps(dataclasses.asdict(config)),
        "layout": str(layout),
        "preprocess": json.dumps(dataclasses.asdict(backbone.preprocess)),
        "neck": neck,
        "head": head_words,
        **(metadata or {}),
    }
    if layout_fn is None:
        return write_npz(path, {**params, **backbone.stats, **extra}, described)
    if layout == TIMM:
        described["timm"] = json.dumps(timm_config(backbone, config))
    chosen = layout_fn(config)
    from safetensors.numpy import save_file

    partial = path.with_suffix(".partial")  # a stop leaves no half file under the final name
    save_file(export_state(params, backbone.stats, chosen) | extra, partial, described)
    os.replace(partial, path)
    return path


def timm_config(backbone: Backbone, config: Config) -> Json:
    """What timm's ``config.json`` says of a backbone in timm's layout.

    ``timm.create_model(c["architecture"], num_classes=c["num_classes"], **c["model_args"])`` loads
    the arrays strictly (without a neck), and ``timm.data.resolve_data_config(c["pretrained_cfg"])``
    prepares images as the backbone expects them: means and deviations of pixels in [0, 1], the crop
    as a share of the shorter side.

    Args:
      backbone: of a model that timm has; sizes that the published architecture has not give "" as
        its name.
      config: with the number of classes of the head.
    """
    spec, images = _spec(backbone.name), backbone.preprocess
    fields = dataclasses.asdict(config)
    known = dataclasses.asdict(spec.config)
    as_published = all(fields[key] == known[key] for key in known if key != "classes")
    classes, args = fields["classes"] or 0, {}
    crop = images.size / images.resize
    while math.floor(images.size / crop) < images.resize:  # as timm computes the shorter side
        crop = math.nextafter(crop, 0)
    if "grid" in fields:  # positions are stored for one size, and resampled for others
        args["img_size"] = fields["grid"] * fields["patch"]
        args["dynamic_img_size"] = True
    return {
        "architecture": spec.timm if as_published else "",
        "num_classes": classes,
        "num_features": backbone.width,
        "model_args": args,
        "pretrained_cfg": {
            "num_classes": classes,
            "input_size": [3, images.size, images.size],
            "mean": [entry / 255 for entry in images.mean],
            "std": [entry / 255 for entry in images.std],
            "interpolation": images.interpolation,
            "crop_pct": crop,
            "crop_mode": "center",
        },
    }


def write_npz(path: Path, arrays: Mapping[str, ArrayLike], metadata: Mapping[str, str]) -> Path:
    """Writes arrays by our paths and texts beside them, as `read_npz_metadata` reads those."""
    text = json.dumps({key: value for key, value in metadata.items() if key != "format"})
    held: dict[str, Any] = {key: np.asarray(value) for key, value in arrays.items()}
    held[NPZ_METADATA] = np.frombuffer(text.encode(), np.uint8)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.savez(stream, **held)
    os.replace(partial, path)
    return path


def _spec(name: str) -> ModelSpec:
    if name not in REGISTRY:
        raise ValueError(f"unknown model {name!r}; choose from {sorted(REGISTRY)}.")
    return REGISTRY[name]


def _layout(name: str, spec: ModelSpec, layout: str) -> Callable[[Config], Layout]:
    if layout not in spec.layouts:
        raise ValueError(
            f"unknown layout {layout!r} of {name}; choose from {sorted(spec.layouts)}."
        )
    return spec.layouts[layout]


def _build(
    name: str, spec: ModelSpec, config: Config, rng_key: jax.Array, *, abstract: bool
) -> Backbone:
    """A backbone with random arrays, or with only their shapes."""
    program, structure = _initialiser(name, spec.build, spec.width, spec.preprocess, config)
    if abstract:
        params, stats = jax.eval_shape(program, rng_key)
    else:
        params, stats = program(rng_key)
    backbone = dataclasses.replace(structure[0], params=params, stats=stats)
    return dataclasses.replace(backbone, width=_width(spec, backbone))


@functools.lru_cache(maxsize=64)
def _initialiser(name, build, width, preprocess, config) -> tuple[Any, list[Backbone]]:
    """``program(rng_key) -> (params, stats)``, and the structure once that is traced."""
    structure: list[Backbone] = []

    def initialise(key):
        module = build(config, nnx.Rngs(key))
        whole = split(module, name=name, config=config, width=width, preprocess=preprocess)
        structure.append(dataclasses.replace(whole, params={}, stats={}))
        return whole.params, whole.stats

    return _quickly(initialise), structure


def _quickly(fun: Callable[[jax.Array], Any]) -> Any:
    """One program, compiled without optimisation since it runs once: a third of the waiting."""
    return jax.jit(fun, compiler_options={"xla_backend_optimization_level": 0})


def _width(spec: ModelSpec, backbone: Backbone) -> int:
    """The number of features, which a configuration other than the registered one may change."""
    if backbone.config == spec.config:
        return spec.width
    side = spec.preprocess.size
    shape = getattr(backbone.config, "input_shape", (side, side, 3))
    inputs = jax.ShapeDtypeStruct((1, *shape), jnp.float32)

    def features(params, stats, x):
        whole = dataclasses.replace(backbone, params=params, stats=stats)
        return run_stages(whole, params, x, whole.stage_names)

    return jax.eval_shape(features, backbone.params, backbone.stats, inputs).shape[-1]


def _preprocess(spec: ModelSpec, config: Config, said: Fields) -> Preprocess:
    """The preprocessing that a file says, or the model's."""
    own = spec.preprocess
    if isinstance(config, MLPConfig) and len(config.input_shape) == 3:
        side = config.input_shape[0]
        if config.input_shape == (side, side, 3):
            own = dataclasses.replace(own, size=side, resize=side)
    return _replaced(own, said)


def _replaced(own: Preprocess, given: Preprocess | Fields | None) -> Preprocess:
    """The preprocessing given, or `own` with some fields replaced."""
    if isinstance(given, Preprocess):
        return given
    fields = preprocess_fields({} if given is None else given)
    try:
        return dataclasses.replace(own, **fields)
    except TypeError as error:  # a text for a number
        raise ValueError(f"preprocess {fields}: {error}.") from error


def _source(
    name: str, weights: str | Path | Mapping[str, np.ndarray], layout: str | None, prefix: str
) -> tuple[Mapping[str, np.ndarray], str, str | None]:
    """Arrays by key, what to call their source, and the layout as far as it is known."""
    if isinstance(weights, Mapping):
        origin = f"weights for {name}"
        return select(_arrays(weights, origin), prefix, origin), origin, layout
    if weights != "pretrained":
        return read_weights(weights, prefix=prefix), shown(Path(weights).name), layout
    if layout is not None or prefix:
        raise ValueError("layout and prefix of the pretrained weights are known; leave them out.")
    return pretrained_weights(name), f"pretrained {name}", PRETRAINED[name].layout


def _choose_layout(
    backbone: Backbone,
    spec: ModelSpec,
    source: Mapping[str, np.ndarray],
    origin: str,
    layout: str | None,
    classifier: bool,
) -> Layout:
    """The layout asked for, or the first whose keys fit."""
    name, config = backbone.name, backbone.config
    if layout is not None:
        if layout == NPZ:
            chosen = own_layout([*backbone.params, *backbone.stats])
        else:
            chosen = _layout(name, spec, layout)(config)
        chosen = with_separate_head(chosen, source, backbone.params) if classifier else chosen
        problem = key_problem(source, chosen, classifier=classifier)
        if problem is None:
            return chosen
        hints = _fitting(source, chosen, classifier)
        raise WeightFileError(f"{origin}: {problem}.{hints}")
    problems: dict[str, list[str]] = {}
    hints = ""
    for tried, layout_fn in spec.layouts.items():
        try:
            candidate = layout_fn(config)
        except ValueError as error:  # a layout that this configuration cannot have
            problem = str(error).rstrip(".")
        else:
            problem = key_problem(source, candidate, classifier=classifier)
            if problem is None:
                return candidate
            hints = hints or _fitting(source, candidate, classifier)
        problems.setdefault(problem, []).append(tried)
    tries = "; ".join(f"{' and '.join(tried)}: {why}" for why, tried in problems.items())
    # The advice first: a message may be cut.
    raise WeightFileError(f"{origin} fits no layout of {name}.{hints} Tried {tries}.")


def _fitting(source: Mapping[str, np.ndarray], layout: Layout, classifier: bool) -> str:
    """What to pass so that a layout fits after all; "" where nothing would do."""
    for needed in (True, False) if classifier else (False,):
        prefixes = [prefix for prefix in fitting(source, layout, classifier=needed) if prefix]
        if prefixes:
            also = "" if needed == classifier else f", and {advice('classifier', False)}"
            return f" To use it, {' or '.join(advice('prefix', p) for p in prefixes[:3])}{also}."
    return ""


def _arrays(weights: Mapping[str, Any], origin: str) -> dict[str, np.ndarray]:
    """Arrays by key, whatever array library they are of."""
    arrays = {}
    for key, value in weights.items():
        if not isinstance(key, str):
            raise WeightFileError(f"{origin}: keys must be text, got a {type(key).__name__}.")
        if isinstance(value, Mapping):
            raise WeightFileError(
                f"{origin}: {shown(key)} is a mapping; pass arrays by their dotted names, or "
                f"weights[{shown(key)!r}]."
            )
        try:
            arrays[key] = np.asarray(value)
        except (TypeError, ValueError, RuntimeError) as error:  # a bfloat16 tensor of torch
            raise WeightFileError(f"{origin}: {shown(key)} is no array: {error}") from error
    return arrays


def _classifier(
    spec: ModelSpec, config: Config, backbone: Backbone, rng_key: jax.Array | None
) -> FlatParams:
    """A classifier in place of one that was left: random with a key, else zero."""
    shapes = {path: s for path, s in backbone.params.items() if under(path, CLASSIFIER)}
    if rng_key is None:
        return {path: jnp.zeros(s.shape, s.dtype) for path, s in shapes.items()}

    def initialise(key):
        # Only what is returned is computed.
        module = spec.build(config, nnx.Rngs(key))
        whole = split(
            module, name=backbone.name, config=config, width=0, preprocess=spec.preprocess
        )
        return {path: whole.params[path] for path in shapes}

    return _quickly(initialise)(rng_key)
