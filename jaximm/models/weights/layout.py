"""Between our flat dicts of parameters and the names and shapes of somebody else's checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jaximm.models.flat import NECK, FlatParams, under
from jaximm.models.spec import Entry, Layout
from jaximm.models.weights.errors import WeightFileError, advice, shown
from jaximm.models.weights.numbers import check_byte_order, count_bad
from jaximm.models.weights.trees import some

CLASSIFIER = "classifier"
"""Our path of the original classifier."""

HEAD_KEYS = ("head.weight", "head.bias")
"""Keys of a head, [k, d] and [k], where the layout has no linear classifier to put it under."""

_NECK_ENTRIES = (
    Entry("neck.kernel", ("neck.weight",), "linear"),
    Entry("neck.bias", ("neck.bias",)),
)

# Axes of theirs in our order, and back.
_IMPORT_AXES = {"linear": (1, 0), "conv": (2, 3, 1, 0)}
_EXPORT_AXES = {"linear": (1, 0), "conv": (3, 2, 0, 1)}


_WITHOUT = advice("classifier", False)


class Imported(NamedTuple):
    """Arrays by our dotted paths: what may be trained, and batch-norm statistics."""

    params: FlatParams
    stats: FlatParams


def import_state(
    source: Mapping[str, np.ndarray],
    layout: Layout,
    template_params: Mapping[str, Any],
    template_stats: Mapping[str, Any],
    *,
    name: str,
    classifier: bool = True,
) -> Imported:
    """Our parameters and statistics of a checkpoint's arrays.

    Each entry's arrays are transformed, then joined along its axis. Floating dtypes, float16 and
    bfloat16 included, are cast to the template's. A neck (``neck.weight`` [d', d], ``neck.bias``),
    which our own exports may hold, comes back as ``neck.kernel`` [d, d'] and ``neck.bias``.

    Args:
      source: arrays by their keys, as `read_weights` gives them.
      layout: which key is which of our paths.
      template_params: arrays, or their shapes and dtypes, by our paths.
      template_stats: the same for statistics.
      name: of the source, for messages.
      classifier: False: the original classifier is neither needed nor returned, whatever the source
        holds under its keys or `HEAD_KEYS`.

    Raises:
      WeightFileError: (a ValueError) keys that are missing; keys that no entry uses and the layout
        does not ignore; another shape, or integers where numbers are expected; numbers that are not
        finite, or not after the cast, or bytes in the other order; negative variances.
      ValueError: a layout that does not cover the template.
    """
    entries = _entries(source, layout, classifier)
    problem = key_problem(source, layout, classifier=classifier)
    if problem:
        raise WeightFileError(f"{name}: {problem}.")
    check_byte_order({key: source[key] for entry in entries for key in entry.keys}, name)
    templates = {**template_params, **template_stats}
    wanted = [path for path in templates if classifier or not under(path, CLASSIFIER)]
    paths = [entry.path for entry in entries if not under(entry.path, NECK)]
    if set(paths) != set(wanted) or len(set(paths)) != len(paths):
        wrong = sorted(set(paths) ^ set(wanted)) or paths
        raise ValueError(f"{name}: the layout and the model differ in {some(wrong)}.")
    arrays = {
        entry.path: _import_entry(source, entry, templates.get(entry.path), name=name)
        for entry in entries
    }
    bad = [text for entry in entries for text in count_bad(source, entry, arrays[entry.path])]
    if bad:
        raise WeightFileError(
            f"{name}: {'; '.join(bad[:3])}"
            + (f"; and {len(bad) - 3} arrays more" if len(bad) > 3 else "")
            + ". Nothing was computed; give weights whose training did not diverge, in a dtype "
            "that holds them."
        )
    params = {path: jnp.asarray(array) for path, array in arrays.items()}
    stats = {path: params.pop(path) for path in template_stats}
    return Imported(params, stats)


def key_problem(source: Collection[str], layout: Layout, *, classifier: bool = True) -> str | None:
    """Why a source's keys do not fit a layout, in words; None where they do."""
    heads = [entry for entry in layout.entries if under(entry.path, CLASSIFIER)]
    head_keys = {*HEAD_KEYS, *(key for entry in heads for key in entry.keys)}
    entries = _entries(source, layout, classifier)
    needed = [key for entry in entries for key in entry.keys]
    missing = [key for key in needed if key not in source]
    if missing:
        hint = f"; {_WITHOUT} to do without" if set(missing) <= head_keys else ""
        return f"it lacks {some(missing)}{hint}"
    known = set(needed) | (set() if classifier else head_keys)
    unused = [key for key in source if key not in known and not key.endswith(layout.ignored)]
    if unused:
        hint = f"; {_WITHOUT} to leave its head" if set(unused) <= head_keys else ""
        return f"it holds {some(list(map(shown, unused)))}, for which the model has no place{hint}"
    return None


def fitting(source: Iterable[str], layout: Layout, *, classifier: bool = True) -> list[str]:
    """Prefixes under which a source holds all that a layout needs: ["module."], ["ema.", "net."].

    "" is among them where the keys fit as they are but for others beside them.
    """
    needed = [key for entry in _entries({}, layout, classifier) for key in entry.keys]
    if not needed:
        return []
    first = needed[0]
    prefixes = [key.removesuffix(first) for key in source if key.endswith(first)]
    return [
        prefix
        for prefix in prefixes
        if all(prefix + key in source for key in needed)
        and key_problem(
            {k.removeprefix(prefix) for k in source if k.startswith(prefix)},
            layout,
            classifier=classifier,
        )
        is None
    ]


def export_state(
    params: Mapping[str, Any], stats: Mapping[str, Any], layout: Layout
) -> dict[str, np.ndarray]:
    """A checkpoint's arrays of our parameters and statistics: the exact inverse of `import_state`.

    The layout's constants are added. A neck goes to ``neck.weight`` [d', d] and ``neck.bias``. The
    classifier may be absent.

    Raises:
      ValueError: paths that the layout lacks, entries whose path is not there, or an axis that does
        not split into its keys.
    """
    ours = {**params, **stats}
    has_classifier = any(under(path, CLASSIFIER) for path in ours)
    entries = [
        *(e for e in layout.entries if has_classifier or not under(e.path, CLASSIFIER)),
        *(e for e in _NECK_ENTRIES if e.path in ours),
    ]
    wrong = sorted(set(ours) ^ {entry.path for entry in entries})
    if wrong:
        raise ValueError(f"the layout and the model differ in {some(wrong)}.")
    exported = {key: np.asarray(value) for key, value in layout.constants.items()}
    for entry in entries:
        exported.update(_export_entry(np.asarray(ours[entry.path]), entry))
    return exported


def own_layout(paths: Iterable[str]) -> Layout:
    """The layout that has our paths as keys, and our shapes."""
    return Layout(tuple(Entry(path, (path,)) for path in paths))


def from_npz(source: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of our own ``.npz``, neck and head under the keys that they have elsewhere."""
    moved = {"neck.kernel": "neck.weight", "head.kernel": HEAD_KEYS[0]}
    return {
        moved.get(key, key): array.T if key in moved else array for key, array in source.items()
    }


def with_separate_head(
    layout: Layout, source: Collection[str], params: Mapping[str, Any]
) -> Layout:
    """The layout with `HEAD_KEYS` in the classifier's place, where a source has them instead.

    The model's own classifier must be linear, as such a head is.
    """
    kernel = params.get(f"{CLASSIFIER}.kernel")
    rest = tuple(entry for entry in layout.entries if not under(entry.path, CLASSIFIER))
    keys = {key for entry in layout.entries for key in entry.keys if entry not in rest}
    if kernel is None or len(kernel.shape) != 2 or keys & set(source):
        return layout
    if not set(HEAD_KEYS) <= set(source):
        return layout
    kernel_key, bias_key = HEAD_KEYS
    head = [
        Entry(f"{CLASSIFIER}.kernel", (kernel_key,), "linear"),
        Entry(f"{CLASSIFIER}.bias", (bias_key,)),
    ]
    return layout._replace(entries=(*rest, *head))


def _entries(source: Collection[str], layout: Layout, classifier: bool) -> list[Entry]:
    """The entries to import: the neck's are there where the source has them."""
    necks = [entry for entry in _NECK_ENTRIES if set(entry.keys) <= set(source)]
    return [e for e in layout.entries if classifier or not under(e.path, CLASSIFIER)] + necks


def _import_entry(source: Mapping[str, np.ndarray], entry: Entry, template: Any, *, name: str):
    theirs = f"{name}: {', '.join(entry.keys)}"
    parts = []
    for key in entry.keys:
        part = source[key]
        # bfloat16 is no np.floating.
        if not np.issubdtype(part.dtype, np.floating) and part.dtype != ml_dtypes.bfloat16:
            raise WeightFileError(
                f"{name}: {key} has dtype {part.dtype}, expected a floating one; export the "
                "weights without quantisation."
            )
        axes = _IMPORT_AXES.get(entry.transform, tuple(range(part.ndim)))
        if part.ndim != len(axes):
            raise WeightFileError(
                f"{name}: {key} has shape {list(part.shape)}; {entry.path}, a {entry.transform} "
                f"kernel, needs {len(axes)} axes; give weights of this model."
            )
        parts.append(part.transpose(axes))
    if template is None:  # a neck, whose shape is the source's own
        (part,) = parts
        wanted = part.dtype if part.dtype in (np.float32, np.float64) else np.float32
        return _cast(part, jax.dtypes.canonicalize_dtype(wanted))
    shape = _joined_shape([part.shape for part in parts], entry.axis)
    if shape != tuple(template.shape):
        hint = "give weights of this model"
        if under(entry.path, CLASSIFIER):
            hint = f"{_WITHOUT} to leave it"
            classes = shape[-1] if shape else 1
            if classes != template.shape[-1]:
                also = f"(on the command line: --set backbone.classes={classes})"
                hint = f"pass classes={classes} {also}, or {hint}"
        fault = f"gives shape {list(shape)}" if shape is not None else _DISJOINT
        raise WeightFileError(f"{theirs} {fault}, {entry.path} has {list(template.shape)}; {hint}.")
    return _cast(parts[0] if len(parts) == 1 else np.concatenate(parts, entry.axis), template.dtype)


_DISJOINT = "do not join"


def _joined_shape(shapes: list[tuple[int, ...]], axis: int) -> tuple[int, ...] | None:
    """Of arrays joined along an axis; None where they do not fit. Nothing is copied before."""
    if len(shapes) == 1:
        return shapes[0]
    if not all(-len(shape) <= axis < len(shape) for shape in shapes):
        return None
    rest = {(*shape[:axis], 0, *shape[axis:][1:]) for shape in shapes}
    if len(rest) > 1:
        return None
    joined = list(shapes[0])
    joined[axis] = sum(shape[axis] for shape in shapes)
    return tuple(joined)


def _cast(value: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # counted afterwards, by name
        return np.array(value, dtype, order="C")


def _export_entry(value: np.ndarray, entry: Entry) -> dict[str, np.ndarray]:
    count = len(entry.keys)
    if count == 1:
        parts = [value]
    else:
        length = value.shape[entry.axis]
        sizes = entry.sizes or (length // count,) * count
        if sum(sizes) != length or len(sizes) != count:
            raise ValueError(
                f"{entry.path}: axis {entry.axis} of {list(value.shape)} does not split into "
                f"{list(sizes)}."
            )
        parts = np.split(value, np.cumsum(sizes)[:-1], entry.axis)
    axes = _EXPORT_AXES.get(entry.transform, tuple(range(value.ndim)))
    # Contiguous: safetensors writes the memory as it lies, whatever the strides.
    return {
        key: np.array(part.transpose(axes), order="C")
        for key, part in zip(entry.keys, parts, strict=True)
    }
