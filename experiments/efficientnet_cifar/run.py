"""Runs the EfficientNet-Lite0 experiments and prints their tables as Markdown.

python experiments/efficientnet_cifar/run.py [--quick] [--out DIR] [--resume]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy loads it

import jax

jax.config.update("jax_enable_x64", True)

from config import FASHION, QUICK, SPLIT

sys.path.insert(0, str(Path(__file__).parents[2]))  # what the experiments share

from experiments.deep_tables import draw, show
from jaximm import report, run
from jaximm.run import assess as run_assess

HERE = Path(__file__).parent


def main() -> None:
    """Immunises, assesses, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="SqueezeNet only")
    parser.add_argument("--out", type=Path, help="keep the run directories here")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp())
    for config in (QUICK,) if args.quick else (FASHION, SPLIT):
        folder = out / config.name
        run.immunise(config, folder, resume=args.resume)
        results = run.load_results([folder])
        order = {method: place for place, method in enumerate(config.methods)}
        results.sort(key=lambda found: order[found["method"]])
        (found,) = run_assess.assess(
            [folder], folder / "assessment", level=None, as_configured=True
        )
        report.write_page(results, folder / "report.html", title=config.description)
        report.write_assessment_page(found, folder / "assessment.html", title=config.description)
        print(f"\n## {config.description}\n")
        show(results, found)
        draw(found, HERE / f"convergence_{config.name}.svg", config.description)


if __name__ == "__main__":
    main()
