"""A run's immunised backbone in a file that other tools load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from jaximm import checkpoint, models
from jaximm.immunisers import THETA
from jaximm.models.flat import FlatParams
from jaximm.models.weights import read_npz_metadata, read_safetensors_metadata
from jaximm.run.config import LINEAR
from jaximm.run.folders import read_result, run_folders
from jaximm.types import Json
from jaximm.version import __version__


class Exported(NamedTuple):
    """What `export` wrote, and the texts in it."""

    path: Path
    metadata: dict[str, str]


def export(
    run_dir: Path, layout: str, *, out: Path | None = None, replace: bool = False
) -> Exported:
    """Writes a run's immunised backbone, its neck and its classifier.

    Args:
      run_dir: a run directory.
      layout: a layout of the model, as ``.safetensors``, or "npz"; see
        `jaximm.models.export_backbone`.
      out: the file; None: ``backbone-LAYOUT.safetensors`` or ``backbone.npz`` in the run directory.
      replace: replace the file if it is there.

    Returns:
      The file and its metadata: the model with its configuration, `method` and `method_config`,
      `classes` (names in the classifier's order, as JSON; of numbers as targets []), the
      preprocessing, what became of neck and head, and jaximm's version.

    Raises:
      ValueError: not one run, or an unfinished one; a layout that the model has not, with those it
        has; a file that is there, or of another suffix.
      CheckpointError: a damaged backbone.
    """
    folders = run_folders(Path(run_dir))
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders[:5])
        raise ValueError(f"{run_dir} holds {len(folders)} runs; name one of them: {names}.")
    folder = folders[0]
    if not (folder / "result.json").exists():
        raise ValueError(f"{folder} is an unfinished run (no result.json): finish it first.")
    content = read_result(folder)
    tree, saved = checkpoint.load_backbone(folder / "backbone")
    model = saved.get("model", LINEAR)  # version 1 did not name a table's
    if layout != models.NPZ:
        _check_layout(model, layout)
    name = f"backbone.{models.NPZ}" if layout == models.NPZ else f"backbone-{layout}.safetensors"
    path = folder / name if out is None else Path(out)
    if path.exists() and not replace:
        raise ValueError(
            f"{path} is there already; give --replace to replace it, or another --out."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    head = tree["head"]
    classes = saved.get("classes")
    if not isinstance(head, dict):  # of a table, as version 1 wrote it
        head = {"kernel": head}
    if classes is None and "bias" in head:  # a run of before they were kept
        classes = [str(number) for number in range(head["kernel"].shape[1])]
    texts = {
        "method": content["method"],
        "method_config": json.dumps(content["config"]["method_config"]),
        "classes": json.dumps(classes or []),
    }
    if "bias" not in head or model not in models.REGISTRY:
        return _of_arrays(path, tree, head, saved, model, texts)
    loaded = checkpoint.load_immunised(folder / "backbone")
    models.export_backbone(
        loaded.backbone, path, layout=layout, head=(head["kernel"], head["bias"]), metadata=texts
    )
    read = read_npz_metadata if layout == models.NPZ else read_safetensors_metadata
    return Exported(path, dict(read(path)))


def _check_layout(model: str, layout: str) -> None:
    """Refuses a layout that a model has not."""
    if model not in models.REGISTRY:
        raise ValueError(
            f"the model {model!r} is not registered here, so only the layout npz knows its names; "
            "register it (on the command line: --load FILE)."
        )
    # A linear model has no numbers but its neck's, for which its own layout has no place.
    known = [] if model == LINEAR else list(models.REGISTRY[model].layouts)
    if layout not in known:
        raise ValueError(f"{model} has no layout {layout!r}; choose from {[*known, models.NPZ]}.")


def _of_arrays(
    path: Path, tree: Json, head: FlatParams, saved: Json, model: str, texts: dict[str, str]
) -> Exported:
    """The stored arrays as ``.npz``, nothing folded: of a table, or of a model unknown here.

    Raises:
      ValueError: another suffix.
    """
    if path.suffix != f".{models.NPZ}":
        raise ValueError(f"the path must end in .npz, got {path.name!r}.")
    arrays = {**tree["params"], **tree["stats"]} if "params" in tree else {THETA: tree["backbone"]}
    has_neck = THETA in arrays
    metadata = {
        "jaximm": __version__,
        "model": model,
        "config": json.dumps(saved.get("model_config")),
        "layout": models.NPZ,
        "preprocess": json.dumps(saved.get("preprocess")),
        "neck": "separate: after the features x, x @ neck.kernel (+ neck.bias where there is one)"
        if has_neck
        else "none",
        "head": "separate: head.kernel (+ head.bias), on the features, the neck's included",
        **texts,
    }
    arrays |= {f"head.{key}": array for key, array in head.items()}
    models.write_npz(path, arrays, metadata)
    return Exported(path, read_npz_metadata(path))
