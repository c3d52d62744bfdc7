"""`jaximm export`: an immunised backbone for other tools."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from jaximm.cli.common import Common, load_code_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Common):
    """Write a run's immunised backbone and its classifier for other tools.

    Attributes:
      run_dir: a run directory.
      layout: names and shapes: timm or torchvision, where the model has them (or another layout of
        its own), as safetensors; npz: a NumPy archive with jaximm's own names.
      out: the file to write; by default backbone-LAYOUT.safetensors or backbone.npz in RUN_DIR.
      replace: replace that file if it is there.
      load: a Python file to run first, which registers what is yours: attackers, models, data.
    """

    run_dir: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN_DIR")]
    layout: Annotated[str, tyro.conf.arg(metavar="timm|torchvision|npz")]
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    replace: bool = False
    load: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None


def run_command(args: Export, command: str) -> None:
    """Writes the file and prints what it holds."""
    del command
    from jaximm.models import NPZ
    from jaximm.run.export import export

    if args.layout != NPZ:  # names of arrays are those of the code
        load_code_of([args.run_dir])
    written = export(args.run_dir, args.layout, out=args.out, replace=args.replace)
    for key, text in written.metadata.items():
        if key in ("model", "method", "classes", "neck", "head"):
            print(f"{key}: {text}")
    told = json.loads(written.metadata.get("timm", "{}"))
    if told.get("architecture"):
        keywords = {"num_classes": told["num_classes"], **told["model_args"]}
        words = ", ".join(f"{key}={value!r}" for key, value in keywords.items())
        print(f"timm: create_model({told['architecture']!r}, {words})")
    print(f"export: {written.path}")
