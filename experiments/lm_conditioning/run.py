"""SmolLM2-135M-Instruct: a method's kappas by site beside a benign and a null control.

A first look, of one seed and few tokens: the dialogues are kept, made-up facts are harmful, replies
are the benign control, the halves of the dialogues the null. Prints a line a site, split and text.

python experiments/lm_conditioning/run.py OUT [--method METHOD] [--steps N]
"""

from __future__ import annotations

import argparse
import resource
from pathlib import Path

import jax

from jaximm.run.language import LanguageExperiment, immunise_language


def main() -> None:
    """Runs one method and prints what was measured."""
    parser = argparse.ArgumentParser(description="SmolLM2's kappas by site, before and after.")
    parser.add_argument("out", type=Path, help="a new folder, for the model (0.5 GB)")
    parser.add_argument("--method", default="condition_gap", help="label, as jaximm has them")
    parser.add_argument("--steps", type=int, default=20, help="of trained methods")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)  # of triangles and spectra; the model is float32
    config = LanguageExperiment(
        model="smollm2",
        method=options.method,
        primary="text:dialogue",
        harmful="text:secrets",
        control="text:replies",
        text_fields={
            "harmful": {"parted": "facts", "count": 128, "counted": "all"},
            "control": {"too_long": "leave_out"},
        },
        train="last:2",
        sites=("layers.15.output",),
        steps=options.steps,
        batch_size=4,
        measured_rows=96,
    )
    found = immunise_language(config, options.out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    change = found["change_of_logits"]
    print(f"{found['method']}: {found['precision']}; {found['seconds']:.0f} s, {peak:.0f} MiB")
    print(f"a logit changed by {change['largest_change']:.1e} of {change['largest_logit']:.1f}")
    for role, before in found["utility"]["before"].items():
        after = found["utility"]["after"][role]
        print(f"{role}: {before['nats']:.3f} -> {after['nats']:.3f} nats a token, held out")
    print(f"{'site':18}{'split':10}{'against':9}{'kappa P':>16}{'other':>16}{'RIR':>7}{'limit':>7}")
    for row in found["conditioning"]:
        kappas = [
            f"{row[text]['before']['log_kappa']:.2f} -> {row[text]['after']['log_kappa']:.2f}"
            for text in ("primary", "other")
        ]
        print(
            f"{row['site']:18}{row['split']:10}{row['against']:9}{kappas[0]:>16}{kappas[1]:>16}"
            f"{row['log_rir']:z7.2f}{row['log_rir_limit']:7.2f}"
        )


if __name__ == "__main__":
    main()
