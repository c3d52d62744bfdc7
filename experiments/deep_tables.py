"""Tables and figures of an experiment on a deep backbone: its runs and its attackers."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt

from experiments import tables
from experiments.tables import markdown_table
from jaximm.assessment import verdict


def show(results, assessed) -> None:
    """Tables of one experiment: what the runs measured, and what attackers reach."""
    print(f"{sizes(results[0])}\n")
    train, held_out = (results[0]["groups"][split] for split in ("train", "held_out"))
    size = train["rows"]
    print(f"Groups of {size} rows: {train['groups']} of training, {held_out['groups']} held-out.\n")
    print(f"**RIR_theta0 by groups of {size} rows, pseudo-inverse: mean (sd) of the logarithm**\n")
    print(group_table(results))
    print("\n**All rows: log RIR by footing, with ranks; primary accuracy of the shipped head**\n")
    print(full_table(results))
    print("\n**Probe attackers: steps to 1 % excess loss, before -> after**\n")
    for task in ("harmful", "primary"):
        print(f"{task} task\n\n{probe_table(assessed, task)}\n")
    if any(one["family"] == "weights" for one in assessed["attackers"]):
        print("**Fine-tuning of the trained blocks on the harmful task: its end, to break**\n")
        print(weight_table(assessed))


def sizes(found) -> str:
    """One line on the rows, and what the head and a closed-form probe reach before."""
    tasks = [found["data"][task] for task in ("primary", "harmful")]
    rows = "; ".join(
        f"{task['name']}: {task['n_train']} training, {task['n_held_out']} held-out rows"
        for task in tasks
    )
    return f"{rows}; d = {tasks[0]['d']}; trained: {found['config']['train']}."


def group_table(results) -> str:
    """Log ratios by group, both sets of rows."""
    rows = []
    for found in results:
        row = [found["method"]]
        for split in ("train", "held_out"):
            groups = found["groups"][split]
            row += [
                mean_sd(groups[key])
                for key in ("log_ratio_harmful", "log_ratio_primary", "log_rir")
            ]
        row.append(f"{math.exp(found['groups']['held_out']['log_rir']['mean']):.4g}")
        rows.append(row)
    head = ["method", "log (i)", "log (ii)", "log RIR"]
    return markdown_table(
        [*head, *(f"{name}, held-out" for name in head[1:]), "RIR, held-out"], rows
    )


def mean_sd(moments) -> str:
    """Mean and standard deviation of a group summary."""
    sd = moments["sd"]
    return f"{moments['mean']:.2f}" + ("" if sd is None else f" ({sd:.2f})")


def full_table(results) -> str:
    """Three footings on all rows, accuracies and time."""
    rows = []
    for found in results:
        conditioning = found["conditioning"]
        damped, shipped, pinv = (
            conditioning[footing] for footing in ("damped", "shipped", "pseudo_inverse")
        )
        utility, harmful = found["utility"], found["harmful_utility"]
        ranks = [pinv["train"][task]["after"]["rank"] for task in ("primary", "harmful")]
        rows.append(
            [
                found["method"],
                *(f"{damped[split]['log_rir']:z.2f}" for split in ("train", "held_out")),
                f"{damped['train']['log_fraction']:.3f}",
                *(f"{shipped[split]['log_rir']:z.2f}" for split in ("train", "held_out")),
                *(f"{pinv[split]['log_rir']:z.2f}" for split in ("train", "held_out")),
                f"{ranks[0]}, {ranks[1]}",
                arrow(utility["before"]["held_out"], utility["after"]["held_out"]),
                f"{found['logits_change']:.1e}",
                arrow(harmful["before"]["held_out"], harmful["after"]["held_out"]),
                f"{found['timing']['immunise_s']:.0f}",
            ]
        )
    head = [
        "method",
        "damped, training",
        "held-out",
        "of limit",
        "damped after theta, training",
        "held-out",
        "pseudo-inverse, training",
        "held-out",
        "ranks after",
        "primary accuracy, held-out",
        "primary logits moved",
        "harmful, closed form",
        "seconds",
    ]
    return markdown_table(head, rows)


def arrow(before: float, after: float) -> str:
    """Two accuracies in per cent."""
    return f"{100 * before:.1f} -> {100 * after:.1f}"


def probe_table(found, task: str) -> str:
    """Steps of every probe that met a task."""
    names = [one["name"] for one in found["attackers"] if one["family"] == "probe"]
    fits = {
        (model["label"], name): tables.fits(found, model["label"], name, task)
        for model in found["models"]
        for name in names
    }
    met = [name for name in names if any(fit for (_, who), fit in fits.items() if who == name)]
    rows = [
        [
            model["label"],
            *(
                " -> ".join(count(fit["steps_to_loss_gap"]["1e-2"]) for fit in pair.values())
                for pair in (fits[model["label"], name] for name in met)
            ),
        ]
        for model in found["models"]
    ]
    return markdown_table(["method", *met], rows)


def count(steps: int) -> str:
    """Steps, or that the budget did not do."""
    return "> budget" if steps < 0 else f"{steps:,}"


def weight_table(found) -> str:
    """What fine-tuning reaches where it stops, and the steps that it takes to break the model."""
    names = [one["name"] for one in found["attackers"] if one["family"] == "weights"]
    rows = {
        (row["model"], row["attacker"]): row for row in found["rows"] if row["task"] == "harmful"
    }
    lines = []
    for model in found["models"]:
        reference = verdict.reference_of(found, model) or model
        cells = []
        for name in names:
            pair = rows[reference["label"], name], rows[model["label"], name]
            if any(row["quality"] is None for row in pair):  # it failed, or does not apply
                cells += [pair[1]["status"].replace("_", " "), "-"]
                continue
            cells.append(arrow(*(row["quality"]["mean"] for row in pair)))
            cells.append(" -> ".join(map(verdict.effort, pair)))
        lines.append([model["label"], *cells])
    head = [f"{name}: {what}" for name in names for what in ("accuracy", "to break")]
    return markdown_table(["method", *head], lines)


def name_of(method: str) -> str:
    """A label short enough for a legend."""
    if "weight=0," in method:
        return "task alone"
    return method.replace("harmful_weight", "weight").replace(",damping=1e-6", "")


def draw(found, path: Path, title: str) -> None:
    """Excess loss of plain gradient descent against steps, both tasks, every method."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for panel, task in zip(axes, ("harmful", "primary"), strict=True):
        for number, model in enumerate(found["models"]):
            fit = tables.fits(found, model["label"], "gd", task).get("after")
            if fit is not None:
                panel.plot(
                    [max(step, 1) for step in fit["curve"]["step"]],
                    fit["curve"]["relative_excess_loss"],
                    color=plt.get_cmap("tab10")(number),
                    label=name_of(model["label"]),
                )
        panel.set(xscale="log", yscale="log", xlabel="steps of gradient descent", title=task)
        panel.set_ylim(1e-6, 2)
    axes[0].set_ylabel("excess loss / that at the start")
    axes[1].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)
    plt.close(figure)
