"""Run directories: their names, what may be in them, and what finished ones hold."""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import jax
import numpy as np

import jaximm
from jaximm.records import files, result
from jaximm.records.lease import LOCK
from jaximm.run.config import Code, Experiment, read_code, read_config, read_fields
from jaximm.types import Json


def run_folder(label: str, seed: int) -> str:
    """Name of the run directory of a method label and seed.

    >>> run_folder("limit@t=1,damping=0.01", 0)
    'limit@t=1,damping=0.01-s0'
    """
    return f"{label.replace('/', '_')}-s{seed}"


def check_folder(folder: Path, config: Experiment, code: Sequence[Code], resume: bool) -> None:
    """Refuses a run directory that holds something, unless it is resumed by the same experiment.

    Raises:
      ValueError: as said.
    """
    # A kill may leave the draft of a file behind, which is nothing to keep.
    if not folder.exists() or all(
        path.suffix == ".tmp" or path.name == LOCK for path in folder.iterdir()
    ):
        return
    if not resume:
        state = "a finished run" if (folder / "result.json").exists() else "an unfinished run"
        raise ValueError(f"{folder} holds {state}; give --resume to continue it, or another --out.")
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is not a run directory: it has no config.json.")
    earlier = read_config(folder / "config.json")
    wanted = dataclasses.replace(config, methods=earlier.methods, seeds=earlier.seeds)
    if earlier.to_json() != wanted.to_json():
        theirs, ours = earlier.to_json(), wanted.to_json()
        changed = [key for key in ours if ours[key] != theirs.get(key)]
        raise ValueError(
            f"{folder} was run with another configuration ({', '.join(changed)} differ); "
            "resume with the same one, or give another --out."
        )
    now = {name: part for part in code for name in part.registers}
    for part in read_code(folder / "config.json"):
        for name in part.registers:
            if name in now and now[name].sha256 != part.sha256:
                raise ValueError(
                    f"{folder} was run with another {name} ({part.file or part.entry_point}, whose "
                    "code has changed since); resume with the same one, or give another --out."
                )


def write_json(path: Path, content: Mapping[str, object], *, of: str) -> None:
    """Writes JSON with an envelope (`jaximm.records.files`), whole or not at all."""
    content = files.sealed(files.plain(content), of=of)
    files.write_text(path, json.dumps(content, indent=1) + "\n")


def run_folders(path: Path) -> list[Path]:
    """The run directories at or below `path`: those with a config.json.

    Raises:
      ValueError: there are none, or one has lost its config.json.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; give a run directory or one that holds runs.")
    for file in path.rglob("result.json"):
        folder = file.parent
        if (folder / "metrics.jsonl").exists() and not (folder / "config.json").exists():
            raise ValueError(f"{folder} is a run that has lost its config.json; restore it.")
    folders = sorted({file.parent for file in path.rglob("config.json")})
    if not folders:
        raise ValueError(f"{path} holds no runs (no config.json at or below it).")
    return folders


def load_results(paths: Iterable[Path]) -> list[Json]:
    """Every result at or below the paths, in order of folder.

    Raises:
      ValueError: a path without runs, or an unfinished run.
      ResultError: a damaged result file, named.
    """
    results = []
    for path in paths:
        for folder in run_folders(Path(path)):
            file = folder / "result.json"
            if not file.exists():
                words = ["jaximm", "immunise", str(folder / "config.json")]
                command = shlex.join([*words, "--out", str(folder.parent), "--resume"])
                raise ValueError(
                    f"{folder} is an unfinished run (no result.json); finish it with `{command}`."
                )
            results.append(read_result(folder))
    return results


def read_result(folder: Path) -> Json:
    """The result of a run directory, whose configuration is that of its ``config.json``.

    Raises:
      ResultError: damaged, or of another run.
      ValueError: a damaged ``config.json``.
    """
    file = folder / "result.json"
    content, fields = result.read(file), read_fields(folder / "config.json")
    other = [key for key in fields if content["config"].get(key, ...) != fields[key]]
    if other:
        raise files.ResultError(
            f"{file}: its configuration is not that of {folder / 'config.json'} "
            f"({', '.join(sorted(other))} differ): one of the two is of another run."
        )
    return content


def versions() -> dict[str, str]:
    """Versions of Python, jax, jaximm and NumPy."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaximm": jaximm.__version__,
        "numpy": np.__version__,
    }


class Device(TypedDict):
    """The device that the run used."""

    platform: str
    kind: str
    count: int


def device() -> Device:
    """The default one."""
    first = jax.devices()[0]
    return {"platform": first.platform, "kind": first.device_kind, "count": jax.device_count()}
