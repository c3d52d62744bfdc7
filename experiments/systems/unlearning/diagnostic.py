"""Whether honest fine-tuning walks an unlearning back: the cosine of two changes of the weights.

python experiments/systems/unlearning/diagnostic.py [--seeds N] [--only LABEL ...]

Of every row of rows.py, cos(tuned - released, released - start) over all parameters
(`jaximm.measures.task_vectors`), after 150 steps of Adam at 1e-3 on a relation that no method saw,
and the harmful accuracy before and after it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy loads it

sys.path.insert(0, str(Path(__file__).parents[3]))

from jaximm.compilation import keep_programs

if __name__ == "__main__":
    keep_programs()

import numpy as np

from experiments.systems.run import family_of
from experiments.systems.tasks import TOYS, Model, trained
from jaximm.measures.task_vectors import task_vector_cosine
from jaximm.report.table import Column, Table, to_markdown

TUNED_ON = "relation 4"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[])
    asked = parser.parse_args(argv)
    family = family_of("unlearning")
    toy = TOYS[family.TASK](1.0)
    rows = []
    for label, defence in family.ROWS.items():
        if asked.only and label not in asked.only:
            continue
        found = []
        for seed in range(asked.seeds):
            start, released = toy.starts["undefended"](seed), defence(toy, seed)
            tuned = trained(
                toy.problem, released.params, toy.pools[TUNED_ON], steps=150, seed=200 + seed
            )
            cosine = task_vector_cosine(start=start, released=released.params, tuned=tuned)
            harm = [toy.accuracy(model, "harmful") for model in (released, Model(tuned))]
            found.append([cosine, *harm])
        rows.append((label, np.asarray(found)))
        print(f"{label}: done", file=sys.stderr, flush=True)

    def column(title: str, place: int) -> Column:
        def text(values: np.ndarray) -> str:
            low, mean, high = values.min(), values.mean(), values.max()
            return f"{mean:.3f} ({low:.3f} to {high:.3f})"

        return Column(title, lambda row: row[1][:, place], text)

    columns = [
        Column("defence", lambda row: row[0]),
        column("cosine", 0),
        column("harmful before", 1),
        column("harmful after", 2),
    ]
    note = f"Means over {asked.seeds} seeds, and the range; fine-tuned on {TUNED_ON}."
    print(to_markdown(Table("Task vectors", columns, rows, note)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
