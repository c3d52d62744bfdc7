"""The immunised backbone at the end of a run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from jaximm.checkpoint.leaves import LeafArray, LeafRow
from jaximm.models.flat import FlatParams
from jaximm.registry import Config
from jaximm.types import Fields, Json, Params

if TYPE_CHECKING:
    from jaximm.models.backbone import Backbone
from jaximm.checkpoint.disk import (
    CheckpointError,
    _line,
    _load,
    _load_together,
    _own_checkpointer,
    _quiet_orbax,
    _record,
    _save_args,
    _write_manifest,
)
from jaximm.checkpoint.leaves import (
    _dotted,
    _flatten,
    _is_first_process,
    _is_spread,
    _Leaf,
    _place,
    _share,
    _to_host,
)


def save_backbone(
    path: str | os.PathLike[str], params: Params, metadata: Json | None = None
) -> str:
    """Saves an immunised backbone with its metadata; returns its `content_hash`.

    Written under another name, checked by reading it back, then renamed: ``path`` holds the whole
    new backbone or what it held before, never a part. (Replacing takes two renames; between them
    the old one lies at ``<path>.previous``, where `load_backbone` finds it. A killed process may
    leave a ``.<name>.<id>.tmp`` beside it, which nothing reads.)

    With several processes all call it with the same global or equal arrays, and the first one
    writes; but arrays that lie in parts on several devices are written part by part, by whoever
    holds the part, and are nowhere whole. Their part of the hash is made of those of the parts.

    Args:
      path: the directory to make or replace.
      params: one array, or arrays in dicts, lists and tuples (an NNX state: ``nnx.to_pure_dict``).
      metadata: JSON-serialisable, for instance model, method, configuration, conditioning summary.

    Raises:
      ValueError: another kind of container, a typed PRNG key, no leaf at all, metadata not JSON.
      CheckpointError: the disk refused; what ``path`` held before is untouched.
    """
    target = Path(path).absolute()
    structure = _structure(params, ())
    leaves = [
        leaf if _is_spread(leaf.array) else leaf._replace(array=_to_host(leaf.array))
        for leaf in _flatten(params)
    ]
    record = _record(leaves, metadata or {}, structure=structure)
    write = _replace_together if any(_is_spread(leaf.array) for leaf in leaves) else _replace_alone
    reason, cause = write(target, leaves, record)
    if reason:
        raise CheckpointError(
            f"the backbone was not saved at {target}: {reason}; what was there is untouched."
        ) from cause
    return record["content"]


Failure = tuple[str, Exception | None]
"""A line that all processes know, "" if all went well, and this process's own exception."""


def _replace_alone(target: Path, leaves: list[_Leaf], record: Json) -> Failure:
    """The first process writes, checks and puts in place; nothing lies in parts."""
    cause = None
    if _is_first_process():
        fresh = _beside(target)
        try:
            with _quiet_orbax():
                _make_room(fresh)
                with _own_checkpointer() as checkpointer:
                    checkpointer.save(fresh, args=_save_args(leaves, record))
            _write_manifest(fresh)
            _load(fresh, str(fresh))
            _put_in_place(fresh, target)
        except Exception as error:
            cause = error
            _sweep(fresh)
    return _share("" if cause is None else _line(cause))[0], cause


def _replace_together(target: Path, leaves: list[_Leaf], record: Json) -> Failure:
    """Every process writes its parts and reads them back; the first puts them in place."""
    fresh = target.with_name(_share(_beside(target).name)[0])
    parts = {
        leaf.path: jax.ShapeDtypeStruct(
            leaf.array.shape, leaf.array.dtype, sharding=leaf.array.sharding
        )
        for leaf in leaves
        if _is_spread(leaf.array)
    }

    def write():
        with _quiet_orbax(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(fresh, args=_save_args(leaves, record))

    stages: list[tuple[bool, Callable[[], object]]] = [  # whether every process does it, and what
        (False, lambda: _make_room(fresh)),
        (True, write),
        (False, lambda: _write_manifest(fresh)),
        (True, lambda: _load_together(fresh, str(fresh), lambda row: parts.get(row["path"]))),
        (False, lambda: _put_in_place(fresh, target)),
    ]
    for everyone, stage in stages:
        cause = None
        try:
            if everyone or _is_first_process():
                stage()
        except Exception as error:
            cause = error
        reason = next(filter(None, _share("" if cause is None else _line(cause))), "")
        if reason:
            if _is_first_process():
                _sweep(fresh)
            return reason, cause
    return "", None


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _make_room(fresh: Path) -> None:
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.parent.mkdir(parents=True, exist_ok=True)


def _put_in_place(fresh: Path, target: Path) -> None:
    previous = target.with_name(target.name + ".previous")
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        target.rename(previous)
    fresh.rename(target)
    shutil.rmtree(previous, ignore_errors=True)


def _sweep(fresh: Path) -> None:
    for half in fresh.parent.glob(fresh.name + "*"):
        shutil.rmtree(half, ignore_errors=True)


def load_backbone(
    path: str | os.PathLike[str],
    *,
    sharding: Callable[[str, tuple[int, ...]], Sharding] | None = None,
) -> tuple[Params, Json]:
    """Loads and verifies a backbone saved by `save_backbone`, without knowing its structure.

    Args:
      path: the directory.
      sharding: ``sharding(path, shape)`` of a leaf by its dotted path: where it is to lie, on
        whatever mesh there is now (`jaximm.training.Sharded.sharding`). What is to lie in parts is
        read part by part and is nowhere whole. None: NumPy arrays.

    Returns:
      ``(params, metadata)``: the dicts, lists and tuples that were saved, with NumPy leaves of the
      saved dtypes (float64 stays float64 whatever ``jax_enable_x64`` says; `jax.device_put` places
      them), or arrays where `sharding` wants them, and the metadata with ``"content_hash"`` added.

    Raises:
      CheckpointError: nothing there, not a backbone, or damaged; the message names the file.
    """
    target = Path(path).absolute()
    previous = target.with_name(target.name + ".previous")
    if not target.exists() and previous.exists():  # killed between the two renames of a replacement
        target = previous
    place = f"the backbone at {target}"

    def wanted(row: LeafRow) -> jax.ShapeDtypeStruct:
        assert sharding is not None
        shape = tuple(row["shape"])
        at = sharding(_dotted(row["path"]), shape)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(row["dtype"]), sharding=at)

    def in_parts(row: LeafRow) -> jax.ShapeDtypeStruct | None:
        return wanted(row) if sharding is not None and _is_spread(wanted(row)) else None

    arrays, record = _load_together(target, place, in_parts)
    if "structure" not in record:
        raise CheckpointError(f"{place} is a training state, not a backbone.")
    if sharding is not None:
        rows = zip(record["leaves"], arrays, strict=True)
        arrays = [_place(wanted(row), array, row, place) for row, array in rows]
    params = _rebuild(record["structure"], iter(arrays))
    return params, {**record["user"], "content_hash": record["content"]}


class Immunised(NamedTuple):
    """What `load_immunised` gives back.

    Attributes:
      backbone: the whole backbone, ready to run.
      head: ``{"kernel": [d, k], "bias": [k]}`` of the primary task, None where none was saved.
      metadata: ``model``, ``model_config``, ``preprocess``, ``method``, ``config``,
        ``conditioning``, ``classes`` and ``content_hash``.
    """

    backbone: Backbone
    head: dict[str, jax.Array] | None
    metadata: Json


def save_immunised(
    path: str | os.PathLike[str],
    backbone: Backbone,
    head: Params | None = None,
    *,
    method: str,
    config: Config | None = None,
    conditioning: Mapping[str, object] | None = None,
    classes: Sequence[str] | None = None,
) -> str:
    """Saves an immunised backbone as an item of its own; returns its `content_hash`.

    What is saved is all that `load_immunised` needs: parameters and batch statistics, the model's
    name and configuration, its preprocessing, and what was done to it.

    Args:
      path: the directory to make or replace; see `save_backbone`.
      backbone: with the immunised parameters in place (`Trainable.whole`).
      head: ``kernel`` [d, k] and ``bias`` [k] of the primary task, as a dict or a NamedTuple.
      method: name of the immuniser; "none" for a reference.
      config: of the method: a dataclass, or something JSON-serialisable.
      conditioning: log kappas and ratios, JSON-serialisable.
      classes: names of the primary task's classes, in the head's order.

    Raises:
      ValueError: a model configuration that JSON cannot hold, with the field; other metadata that
        it cannot hold; a head without a kernel.
      CheckpointError: the disk refused; what ``path`` held before is untouched.
    """
    tree: dict[str, Params] = {"params": dict(backbone.params), "stats": dict(backbone.stats)}
    if head is not None:
        tree["head"] = dict(head._asdict() if hasattr(head, "_asdict") else head)
        if "kernel" not in tree["head"]:
            raise ValueError(f"a head has a kernel (and a bias), got {sorted(tree['head'])}.")
    metadata = {
        "kind": _IMMUNISED,
        "model": backbone.name,
        "model_config": _fields_to_json(backbone.config, f"config of {backbone.name}"),
        "width": backbone.width,
        "preprocess": _fields_to_json(backbone.preprocess, "preprocess"),
        "method": method,
        "config": _fields_to_json(config, "config") if dataclasses.is_dataclass(config) else config,
        "conditioning": None if conditioning is None else dict(conditioning),
        "classes": None if classes is None else list(classes),
    }
    return save_backbone(path, tree, metadata)


def load_immunised(path: str | os.PathLike[str], *, template: Backbone | None = None) -> Immunised:
    """Loads, verifies and rebuilds what `save_immunised` saved.

    Args:
      path: the directory.
      template: a backbone of the same structure, for a model that is not in
        `jaximm.models.REGISTRY`; its numbers are not used.

    Raises:
      ValueError: a model, or a field of its configuration, that this version does not know; stored
        parameters that are not those of the model. The message names them.
      CheckpointError: nothing there, something else, or damaged; the message names the file.
    """
    tree, metadata = load_backbone(path)
    place = f"the backbone at {Path(path).absolute()}"
    if metadata.get("kind") != _IMMUNISED:
        raise CheckpointError(
            f"{place} was not saved by save_immunised; load_backbone gives its arrays."
        )
    if template is None:
        template = _backbone_template(metadata, place)
    elif template.name != metadata["model"]:
        raise ValueError(f"{place} is a {metadata['model']}, the template a {template.name}.")
    for kind in ("params", "stats"):
        _check_shapes(tree[kind], getattr(template, kind), f"{place}: {kind}")
    backbone = dataclasses.replace(
        template,
        params={name: jnp.array(value) for name, value in tree["params"].items()},
        stats={name: jnp.array(value) for name, value in tree["stats"].items()},
        width=metadata["width"],
        preprocess=_fields_from_json(template.preprocess, metadata["preprocess"], "preprocess"),
    )
    head = tree.get("head")
    if head is not None:
        head = {name: jnp.array(value) for name, value in head.items()}
    shown = {key: value for key, value in metadata.items() if key not in ("kind", "width")}
    return Immunised(backbone, head, shown)


_IMMUNISED = "immunised backbone"


def _backbone_template(metadata: Json, place: str) -> Backbone:
    """The model of a checkpoint with shapes in place of numbers."""
    from flax import nnx

    from jaximm import models
    from jaximm.models.backbone import Backbone

    name = metadata["model"]
    if name not in models.REGISTRY:
        raise ValueError(
            f"{place} is a {name!r}, which is no model here; choose from {sorted(models.REGISTRY)} "
            "or pass template= (on the command line: --load FILE, the code that registers it)."
        )
    spec = models.REGISTRY[name]
    config = _fields_from_json(spec.config, metadata["model_config"], f"config of {name}")
    module = nnx.eval_shape(lambda: spec.build(config, nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def flat(state):
        return {
            ".".join(map(str, path)): variable.get_value()
            for path, variable in nnx.to_flat_state(state)
        }

    return Backbone(
        name=name,
        config=config,
        graphdef=graphdef,
        params=flat(params),
        stats=flat(rest),
        stage_names=tuple(module.stage_names),
        width=metadata["width"],
        preprocess=spec.preprocess,
    )


def _check_shapes(stored: FlatParams, expected: FlatParams, place: str) -> None:
    neck = {name for name in stored if name.split(".")[0] == "neck"}
    for problem, names in (
        ("are missing", sorted(set(expected) - set(stored))),
        ("are not the model's", sorted(set(stored) - set(expected) - neck)),
    ):
        if names:
            raise ValueError(f"{place} {names[:3]} {problem} ({len(names)} in all).")
    for name in sorted(set(stored) & set(expected)):
        if stored[name].shape != tuple(expected[name].shape):
            raise ValueError(
                f"{place} {name} has shape {stored[name].shape}, the model's "
                f"{tuple(expected[name].shape)}."
            )


def _fields_to_json(config: Config, place: str) -> Json:
    """A dataclass as JSON values; dtypes by name."""
    fields = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = _fields_to_json(value, f"{place}, {field.name}")
        elif isinstance(value, np.dtype) or (isinstance(value, type) and _is_dtype(value)):
            value = np.dtype(value).name
        try:
            fields[field.name] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"field {field.name!r} of {place} is no JSON value: {error}."
            ) from error
    return fields


def _fields_from_json(template: Config, fields: Fields, place: str) -> Config:
    """A dataclass like ``template`` with the stored fields."""
    known = {field.name for field in dataclasses.fields(template)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(
            f"unknown field {unknown[0]!r} in the {place}; this version knows {sorted(known)}."
        )
    values = {}
    for name, value in fields.items():
        like = getattr(template, name)
        if dataclasses.is_dataclass(like) and isinstance(value, Mapping):
            value = _fields_from_json(like, value, f"{place}, {name}")
        elif isinstance(value, str) and not isinstance(like, str) and _is_dtype(like):
            value = jnp.dtype(value) if isinstance(like, np.dtype) else jnp.dtype(value).type
        values[name] = _to_tuples(value)
    try:
        return dataclasses.replace(template, **values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error


def _is_dtype(value: Any) -> bool:
    try:
        return value is not None and bool(jnp.dtype(value).name)
    except TypeError:
        return False


def _to_tuples(value: Any) -> Any:
    """JSON lists as the tuples that frozen configurations hold."""
    return tuple(map(_to_tuples, value)) if isinstance(value, list) else value


Structure = Json | str
"""Containers of a tree: ``{"dict": [[key, structure], ...]}``, ``{"list": ...}`` or "leaf"."""


def _structure(tree: Params, path: tuple[str | int, ...]) -> Structure:
    """The containers of ``tree`` as JSON, in the order in which jax flattens them."""
    if isinstance(tree, dict):
        keys = sorted(tree)
        if not all(isinstance(key, str | int) for key in keys):
            raise ValueError(f"backbone dict keys must be str or int, got {keys} at {path}.")
        return {"dict": [[key, _structure(tree[key], (*path, key))] for key in keys]}
    if type(tree) in (list, tuple):
        children = [_structure(child, (*path, i)) for i, child in enumerate(tree)]
        return {"list" if isinstance(tree, list) else "tuple": children}
    if isinstance(tree, jax.Array) and jnp.issubdtype(tree.dtype, jax.dtypes.prng_key):
        raise ValueError(f"a backbone holds no PRNG keys, found one at {path}.")
    if isinstance(tree, jax.Array | np.ndarray | np.generic | int | float | complex):
        return "leaf"
    raise ValueError(
        f"a backbone is made of arrays in dicts, lists and tuples, got {type(tree).__name__} at "
        f"{path or 'the root'}; convert it (for an NNX state: nnx.to_pure_dict) before saving."
    )


def _rebuild(structure: Structure, arrays: Iterator[LeafArray]) -> Params:
    if structure == "leaf":
        return next(arrays)
    assert isinstance(structure, dict)
    ((kind, children),) = structure.items()
    if kind == "dict":
        return {key: _rebuild(child, arrays) for key, child in children}
    rebuilt = [_rebuild(child, arrays) for child in children]
    return rebuilt if kind == "list" else tuple(rebuilt)
