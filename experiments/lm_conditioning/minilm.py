"""all-MiniLM-L6-v2, exact float32 weights: a neck after the encoder, probes before and after.

The encoder is frozen; a linear map of its sentence features is conditioned. Primary: is a sentence
of a movie review approving (sign of the mean of 20 people's scores)? Harmful, a proxy: is a mail
spam? Benign control: sentences of product reviews; null: the two halves of the primary rows. Prints
kappas and ratios of all four, then what probes take and get.

python experiments/lm_conditioning/minilm.py OUT [--rows N] [--method METHOD ...]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

jax.config.update("jax_enable_x64", True)  # of necks and spectra; the encoder is float32

sys.path.insert(0, str(Path(__file__).parents[2]))  # what the experiments share

import jaximm
from experiments.tables import markdown_table
from jaximm import linalg, measures
from jaximm.carriers import carrier_file
from jaximm.data.raw.texts import read_mails, read_snippets
from jaximm.face import Immunised
from jaximm.measures.conditioning import DAMPING
from jaximm.models import bert
from jaximm.models.llama.tokenizer import folder_tokenizer
from jaximm.report.reading import fit_steps

METHODS = ("limit@t=1", "condition_gap", "erase")
ATTACKERS = ("gd", "heavy_ball", "adam", "conjugate_gradients", "whitened_gd", "ridge")
LENGTH = 64
"""Tokens of a text that are read: mails are long, snippets short."""
CLEAR = 0.5
"""A sentence whose mean score in -4 to 4 is nearer to 0 than this is left out."""
HELD_OUT = 0.25
BATCH = 64


class Rows(NamedTuple):
    """Sentence features and labels, in an order drawn once."""

    x: Float[np.ndarray, "n d"]
    y: Float[np.ndarray, "n"]


def main() -> None:
    """Embeds the texts once, conditions, attacks, prints."""
    parser = argparse.ArgumentParser(description="A neck after MiniLM, conditioned and attacked.")
    parser.add_argument("out", type=Path, help="a new folder, for features and pages")
    parser.add_argument("--rows", type=int, default=2400, help="at most, of each task")
    parser.add_argument("--method", action="append", help="label, as jaximm has them")
    options = parser.parse_args()
    started = time.perf_counter()
    tasks = embedded(options.out, options.rows)
    for name, rows in tasks.items():
        print(f"{name}: {rows.x.shape[0]} texts, {np.mean(rows.y > 0):.3f} positive")
    ratios, probes = [], []
    for method in options.method or METHODS:
        done = jaximm.immunise(
            tasks["primary"], harmful=tasks["harmful"], method=method, kind="binary",
            held_out_fraction=HELD_OUT, name="minilm",
        )  # fmt: skip
        ratios += ratio_lines(method, tasks, done)
        assessed = jaximm.assess(done, level="quick", attackers=ATTACKERS)
        assessed.to_html(options.out / f"{method}.html")
        probes += probe_lines(method, assessed.document)
    heads = ["method", "against", "rows", "log kappa, primary", "log kappa, other", "log RIR"]
    print("\n" + markdown_table(heads, ratios))
    heads = ["method", "attacker", "task", "accuracy before -> after", "steps to 1 % excess loss"]
    print("\n" + markdown_table(heads, probes))
    print(f"\n{time.perf_counter() - started:.0f} s", file=sys.stderr)


def embedded(folder: Path, limit: int) -> dict[str, Rows]:
    """Features of every task's texts by name, from `folder` where they are there already."""
    stored = folder / f"minilm-{limit}.npz"
    if not stored.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        made: dict[str, Any] = {}
        for name, (texts, labels) in labelled_texts().items():
            order = rng.permutation(len(texts))[:limit]
            made[f"{name}_x"] = features([texts[i] for i in order])
            made[f"{name}_y"] = labels[order]
            print(f"{name}: {len(order)} texts read", file=sys.stderr, flush=True)
        np.savez(stored, **made)
    arrays = np.load(stored)
    names = [key.removesuffix("_x") for key in arrays.files if key.endswith("_x")]
    return {name: Rows(arrays[f"{name}_x"], arrays[f"{name}_y"]) for name in names}


def labelled_texts() -> dict[str, tuple[list[str], Float[np.ndarray, "n"]]]:
    """Texts of each task, none twice, and labels -1 or 1."""
    mails = {text: 1.0 for text in read_mails(spam=True).values()}
    mails |= {text: -1.0 for text in read_mails(spam=False).values()}
    tasks = {"primary": scored("movieReview"), "harmful": mails}
    tasks["control"] = scored("amazonReview")
    return {name: (list(rows), np.array(list(rows.values()))) for name, rows in tasks.items()}


def scored(source: str) -> dict[str, float]:
    """Signs of the mean scores of a source's sentences, those of clear sentences."""
    return {
        snippet.text: float(np.sign(snippet.score))
        for snippet in read_snippets(source)
        if abs(snippet.score) > CLEAR and snippet.text.strip()
    }


def features(texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
    """Sentence features in float64, computed in float32 in blocks of one shape."""
    folder = carrier_file(bert.MINILM_L6).parent
    params, config = bert.load_folder(folder)
    tokens, mask = bert.tokenize(folder_tokenizer(folder), texts, length=LENGTH)
    missing = -len(texts) % BATCH  # filled with the last text again, and left out
    tokens, mask = (np.pad(v, ((0, missing), (0, LENGTH - v.shape[1]))) for v in (tokens, mask))
    mask[len(texts) :, 0] = True
    embed = jax.jit(bert.sentence_features, static_argnums=3)
    blocks = [
        embed(params, tokens[i : i + BATCH], mask[i : i + BATCH], config)
        for i in range(0, len(tokens), BATCH)
    ]
    return np.concatenate([np.asarray(block, np.float64) for block in blocks])[: len(texts)]


def ratio_lines(method: str, tasks: dict[str, Rows], done: Immunised) -> list[list[str]]:
    """Kappas of harmful, control and null rows under the neck, each ratio over the primary's."""
    half = len(tasks["primary"].x) // 2
    pairs = {
        "harmful": (tasks["primary"].x, tasks["harmful"].x),
        "control": (tasks["primary"].x, tasks["control"].x),
        "null": (tasks["primary"].x[:half], tasks["primary"].x[half:]),
    }
    lines = []
    for against, both in pairs.items():
        for split in ("train", "held_out"):
            changes, shown = [], []
            for x in both:
                train = len(x) - round(HELD_OUT * len(x))
                rows = x[:train] if split == "train" else x[train:]
                rows = measures.task_rows(
                    jnp.asarray(rows), jnp.asarray(x[:train]), damping=DAMPING
                )
                before, after = (
                    log_kappa(measures.kappas(rows, theta).damped)
                    for theta in (None, jnp.asarray(done.model))
                )
                changes.append(after - before)
                shown.append(f"{before:.2f} -> {after:.2f}")
            ratio = changes[1] - changes[0]
            lines.append([method, against, split, *shown, f"{ratio:z.2f}"])
    return lines


def log_kappa(condition: linalg.Condition) -> float:
    """Infinite where the map is singular: the value is then that of its rounding."""
    is_known = bool(jnp.isfinite(condition.upper))
    return float(condition.log_kappa) if is_known else float("inf")


def probe_lines(method: str, document: dict) -> list[list[str]]:
    """What each probe gets and what fitting takes, on the encoder alone and behind the neck."""
    rows = {(row["model"], row["task"], row["attacker"]): row for row in document["rows"]}
    before, after = (model["label"] for model in document["models"])
    lines = []
    for attacker in ATTACKERS:
        for task, name in (("harmful", "harmful"), ("benign:primary", "primary")):
            if (before, task, attacker) not in rows:
                continue  # ordinary users alone meet the primary task
            sides = [rows[label, task, attacker] for label in (before, after)]
            got = " -> ".join(f"{row['quality']['mean']:.3f}" for row in sides)
            took = " -> ".join(map(fit_steps, sides))
            lines.append([method, attacker, name, got, took])
    return lines


if __name__ == "__main__":
    main()
