"""SmolLM2-135M-Instruct attacked: as it is, and in weights of the same function.

Eight made-up facts, full fine-tuning by AdamW and by SGD with swept rates; the sweep goes on where
the best lies at an edge. Prints what was learned by step, of every model and attacker.

python experiments/lm_conditioning/attack.py OUT [--model FOLDER ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)  # of triangles and spectra; the model is float32

sys.path.insert(0, str(Path(__file__).parents[2]))  # what the experiments share

from experiments.tables import markdown_table
from jaximm import report
from jaximm.assessment import Level
from jaximm.run.assess_language import assess_language, read_record
from jaximm.run.language import LanguageExperiment, immunise_language

TEXTS: dict[str, Any] = {
    "primary": "text:dialogue",
    "harmful": "text:secrets",
    "control": "",
    "text_fields": {"harmful": {"count": 8, "phrasings": 3}},
    "length": 32,
    "measured_rows": 8,
    "remat": False,
}
LEVEL = Level(
    probes="quick",
    weight_steps=20,
    batch_size=4,
    select_seeds=(0,),
    record=5,
    trial=False,
    patience=1.0,  # ten times the steps would be hours: who did not arrive is unknown
)
ATTACKERS = (
    "fine_tune_adam@learning_rates=3e-5|3e-4",
    "fine_tune_sgd@learning_rates=3e-2|3e-1",
    "rebalance@forms=1,learning_rates=3e-5|3e-4",
)


def main() -> None:
    """Makes the gauged model where none is given, attacks, prints."""
    parser = argparse.ArgumentParser(description="Attackers of SmolLM2.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, action="append", help="of lm_conditioning/run.py")
    parser.add_argument("--attacker", action="append", help="label; all three if not given")
    parser.add_argument("--seeds", type=int, default=2, help="of the attackers that are reported")
    parser.add_argument("--extensions", type=int, default=2, help="of a sweep beyond each end")
    options = parser.parse_args()
    seeds = tuple(range(101, 101 + options.seeds))
    level = dataclasses.replace(LEVEL, report_seeds=seeds, extensions=options.extensions)
    started = time.perf_counter()
    folders = options.model
    if not folders:
        folders = [options.out / "gauge_all"]
        if read_record(folders[0]) is None:
            config = LanguageExperiment(
                model="smollm2", method="gauge@kind=log_uniform,spread=1000", **TEXTS
            )
            immunise_language(config, folders[0])
    found = assess_language(
        folders,
        "smollm2",
        options.out / "assessment",
        texts=TEXTS,
        level=level,
        attackers=options.attacker or ATTACKERS,
        command="python experiments/lm_conditioning/attack.py OUT",
        progress=lambda label, done, total, record: print(
            f"{label}: {done} of {total}", file=sys.stderr, flush=True
        ),
    )
    report.write_assessment_page(found, options.out / "assessment" / "assessment.html")
    lines = []
    for row in found["rows"]:
        if row["curve"] is None:
            lines.append(
                [row["task"], row["attacker"].partition("@")[0], row["model"], "n/a", "", ""]
            )
            continue
        rate = row["hyper_parameters"].get("learning_rate")
        curve = zip(row["curve"]["step"], row["curve"]["quality"], strict=True)
        lines.append(
            [
                row["task"],
                row["attacker"].partition("@")[0],
                row["model"],
                f"{rate:.1e}",
                ", ".join(f"{step}: {share:.2f}" for step, share in curve),
                f"{row['utility']['mean']:.2f}" if row["utility"] else "",
            ]
        )
    heads = ["task", "attacker", "model", "rate", "share of right tokens by step", "utility"]
    print(markdown_table(heads, lines))
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
