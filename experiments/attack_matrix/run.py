"""Runs the attack matrix and prints its tables as Markdown.

python experiments/attack_matrix/run.py [--deep] [--out DIR] [--level quick|standard|full]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy loads it

import jax

jax.config.update("jax_enable_x64", True)

from config import CONFIG, DEEP_LEVEL, LEVEL

from jaximm import report, run, run_assess


def main() -> None:
    """Immunises, assesses, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deep", action="store_true", help="the backbone in place of linear cases")
    parser.add_argument("--level", default=LEVEL, help="of the linear cases")
    parser.add_argument("--out", type=Path, help="keep runs and cells here, and go on from them")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp())
    command = f"python experiments/attack_matrix/run.py{' --deep' if args.deep else ''}"
    if args.deep:
        run.immunise(CONFIG, out / "runs" / CONFIG.name, resume=True, command=command)
        found = run_assess.assess([out / "runs"], out, level=DEEP_LEVEL, command=command)
    else:
        found = run_assess.suite(out, level=args.level, command=command)
    for one in found:
        report.write_assessment_page(one, out / one["name"] / "assessment.html")
        print(report.assessment_markdown(one))


if __name__ == "__main__":
    main()
