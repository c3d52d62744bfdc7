"""How many held-out rows a verdict needs: the table behind `FEWEST_ROWS`.

python benchmarks/bench_few_rows.py [--repeats 4000]
"""

from __future__ import annotations

import argparse

from jaximm.measures import few_rows
from jaximm.measures.evidence import HALF

ROWS = (10, 20, 30, 40, 60, 100, 200, 300, 500, 1000)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=4000)
    repeats = parser.parse_args().repeats
    print("Absent models called broken, of random benches with 1 to 40 attackers\n")
    print("| held-out rows | by the mean | by the lower bound, 0.9 | 0.5 of the way | not judged |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for rows in ROWS:
        found = few_rows.false_alarms(rows, repeats=repeats)
        half = few_rows.false_alarms(rows, fraction=HALF, repeats=repeats)
        print(
            f"| {rows} | {found.mean:.1%} | {found.lower:.2%} | {half.lower:.2%} "
            f"| {found.unjudged:.1%} |"
        )
    print("\nThe cheapest of 1 to 40 equal attackers is credited with less than the true cost\n")
    print("| held-out rows | by the mean | points | by the lower bound | points | not broken |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for rows in ROWS:
        found = few_rows.cheapest(rows, repeats=max(repeats // 4, 2))
        print(
            f"| {rows} | {found.mean:.1%} | {found.mean_points:.1f} | {found.lower:.1%} "
            f"| {found.lower_points:.1f} | {found.unbroken:.1%} |"
        )
    print("\nA closed form on two classes is said to get no more than guessing + 0.03\n")
    print("| held-out rows | nothing is left | it gets guessing + 0.03 | guessing + 0.05 |")
    print("| ---: | ---: | ---: | ---: |")
    for rows in (500, 1000, 2000, 3000, 4000):
        found = [few_rows.shown_absent(rows, above=more) for more in (0.0, 0.03, 0.05)]
        print(f"| {rows} | {' | '.join(f'{one:.1%}' for one in found)} |")


if __name__ == "__main__":
    main()
