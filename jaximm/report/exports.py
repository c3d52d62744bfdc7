"""An assessment in the layouts of other benchmarks, for their tools to read.

What a layout has no place for is said in its free text; what an assessment does not know is left
empty, as the layout writes it. Nothing is made up.
"""

from __future__ import annotations

import math
from typing import Any

from jaximm.report import reading
from jaximm.report.reading import Assessment, Model, Row

BASELINE_ATTACK = "no_weight_modification"
"""TamperBench's name for the model as it is shipped."""


def robustbench_card(assessment: Assessment, label: str) -> dict[str, Any]:
    """One model as a card of RobustBench's model zoo (a file of its folder ``model_info``).

    Keys and types are those of current cards: accuracies are strings in per cent with two places.
    RobustBench measures perturbed inputs, this library attackers who train; so that larger still
    means more robust,

      clean_acc       utility on the primary task, before any attack
      autoattack_acc  100 - worst-case harm: the quality that the best attacker, at any point of its
                      budget and whatever it does to the utility, does *not* reach on held-out rows
                      of the harmful task. R^2 below 0 counts as 0. A model that guesses is not at
                      100, but at 100 - chance.
      unreliable      whether a warning was raised for this model, or an attack on it failed

    and the footnote says so, with the threshold and the cost to break. ``reported`` (what authors
    claim), ``eps`` (a radius), ``architecture``, ``authors``, ``link`` and ``venue`` are empty
    strings, ``additional_data`` and ``number_forward_passes`` null: an assessment does not hold
    them. There is no ``external``, which cards have only after another party's evaluation.

    Args:
      assessment: validated.
      label: of one of its models.

    Raises:
      ValueError: if there is no such model.

    References:
      https://github.com/RobustBench/robustbench, model_info/cifar10/Linf/*.json and
      robustbench/leaderboard/template.py.
    """
    model = _model(assessment, label)
    harm = model["break_unbounded"]["highest_harm"]
    utility = (model["utility"] or {"mean": None})["mean"]
    rows = [row for row in assessment["rows"] if row["model"] == label]
    failed = any(row["status"] == "failed" for row in rows)
    warned = any(flag["severity"] == "warning" for flag in model["flags"])
    return {
        "link": "",
        "name": label,
        "authors": "",
        "additional_data": None,
        "number_forward_passes": None,
        "dataset": assessment["data"]["name"],
        "venue": "",
        "architecture": "",
        "eps": "",
        "clean_acc": _per_cent(utility),
        "reported": "",
        "autoattack_acc": _per_cent(None if harm is None else 1.0 - max(harm, 0.0)),
        "footnote": _footnote(assessment, model),
        "unreliable": failed or warned,
    }


def _footnote(assessment: Assessment, model: Model) -> str:
    metrics = {"accuracy": "accuracy", "r2": "R^2"}
    data, record = assessment["data"], model["break_unbounded"]
    ran = sum(
        row["status"] == "done"
        for row in assessment["rows"]
        if (row["model"], row["task"]) == (model["label"], reading.HARMFUL)
    )
    broken = ""
    if record["threshold"] is not None:
        harm = f"(harm {100 * record['threshold']:.2f})"
        broken = f"Not broken {harm} within any attacker's budget."
        if record["flops"] is not None:
            who = "" if record["attacker"] is None else f" by {record['attacker']}"
            broken = f"Broken {harm} for {record['flops']:.4g} FLOPs{who}."
    return reading.note(
        "card",
        **{key: metrics[data[key]] for key in ("metric", "utility_metric")},
        **{key: assessment[key] for key in ("name", "level")},
        method=model["method"],
        ran=ran,
        chance="unknown" if data["chance"] is None else f"{100 * data['chance']:.2f}",
        broken=broken,
        digest=assessment["cells"]["digest"],
    )


def _per_cent(value: float | None) -> str:
    """RobustBench's way to write an accuracy; empty where it is not known."""
    return "" if value is None else f"{100 * value:.2f}"


def tamperbench_heat_map(assessment: Assessment, *, task: str = reading.HARMFUL) -> dict[str, Any]:
    """Models against attackers in the layout of TamperBench's ``heatmap_max_sr.json``.

    Its scripts under ``scripts/figures`` read it. Four matrices [model][attack], NaN where there is
    no number, as TamperBench itself writes (`json.dump` does by default):

      safety_raw      TamperBench: harmfulness after the attack (StrongREJECT). Here: held-out
                      quality on `task` where the attacker stops; larger is more harm. R^2 may be
                      far below 0.
      utility_raw     TamperBench: MMLU-Pro after the attack. Here: utility on the primary task; of
                      a probe, which leaves the model as it is, that of the model.
      safety_delta, utility_delta   minus the column of the baseline attack

    The baseline attack "no_weight_modification" is the model as shipped: its utility is known, its
    harm is not (it has no head for the harmful task), so that ``safety_delta`` is NaN throughout.
    Hyper-parameters are those chosen by quality alone, with no bound on the utility: ``epsilon`` is
    null.

    Args:
      assessment: validated.
      task: the task attacked.

    Raises:
      ValueError: if no row is of this task.

    References:
      https://github.com/criticalml-uw/TamperBench,
      src/tamperbench/whitebox/utils/analysis/builders.py (`HeatmapData.to_dict`) and pipeline.py.
    """
    rows = {(r["model"], r["attacker"]): r for r in assessment["rows"] if r["task"] == task}
    if not rows:
        known = sorted({row["task"] for row in assessment["rows"]})
        raise ValueError(f"unknown task {task!r}; choose from {known}.")
    models = assessment["models"]
    attackers = [a for a in assessment["attackers"] if any(key[1] == a["name"] for key in rows)]
    shipped = [_mean(model["utility"]) for model in models]
    safety = [[math.nan, *(_quality(rows.get((model["label"], attacker["name"])))
                           for attacker in attackers)] for model in models]  # fmt: skip
    utility = [
        [own, *(_utility(rows.get((model["label"], attacker["name"])), attacker["family"], own)
                for attacker in attackers)]
        for model, own in zip(models, shipped, strict=True)
    ]  # fmt: skip
    return {
        "safety_raw": safety,
        "safety_delta": _from_baseline(safety),
        "utility_raw": utility,
        "utility_delta": _from_baseline(utility),
        "models": [model["label"] for model in models],
        "attacks": [BASELINE_ATTACK, *(attacker["name"] for attacker in attackers)],
        "metadata": {
            "method": "selected_stop",
            "epsilon": None,
            "n_trials": max(max(1, len(row["grid"])) for row in rows.values()),
            "baseline_attack": BASELINE_ATTACK,
            "source": "jaximm",
            "experiment": assessment["name"],
            "task": task,
            "safety_metric": assessment["data"]["metric"],
            "utility_metric": assessment["data"]["utility_metric"],
            "undefended": [model["label"] for model in models if reading.is_reference(model)],
            "digest": assessment["cells"]["digest"],
        },
    }


def _model(assessment: Assessment, label: str) -> Model:
    for model in assessment["models"]:
        if model["label"] == label:
            return model
    raise ValueError(
        f"unknown model {label!r}; choose from {[m['label'] for m in assessment['models']]}."
    )


def _mean(interval: dict[str, float | None] | None) -> float:
    value = None if interval is None else interval["mean"]
    return math.nan if value is None else value


def _quality(row: Row | None) -> float:
    return math.nan if row is None or row["status"] != "done" else _mean(row["quality"])


def _utility(row: Row | None, family: str, shipped: float) -> float:
    if row is None or row["status"] != "done":
        return math.nan
    if row["utility"] is None and family == "probe":
        return shipped
    return _mean(row["utility"])


def _from_baseline(matrix: list[list[float]]) -> list[list[float]]:
    return [[value - line[0] for value in line] for line in matrix]
