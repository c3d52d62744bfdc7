"""Assessments with plausible numbers, so that reports can be tested without running attackers.

Learning curves rise from chance to a ceiling; a defence lowers the ceiling or stretches the cost.
What an assessment derives from its rows (costs, envelopes, areas) is derived here too.
"""

import math

import numpy as np

from jaximm import attacks
from jaximm.assessment.verdict import with_verdicts
from jaximm.records import assessment as assessment_record

CHANCE = 0.1
UTILITY = {"none": 0.92, "condition_gap": 0.915, "limit": 0.905, "erase": 0.84}
MODELS = ("none", "condition_gap", "limit@t=1", "erase")

# name -> family, kind, what, ceiling, steps to one e-fold, budget, FLOPs of a step, of the setup
ATTACKERS = {
    "gd": ("probe", "first-order", "Gradient descent, step 1/L", 0.80, 60, 20000, 2e6, 0.0),
    "heavy_ball": ("probe", "momentum", "Polyak's momentum", 0.80, 15, 20000, 2e6, 0.0),
    "adam": ("probe", "adaptive", "Adam", 0.81, 20, 20000, 2.2e6, 0.0),
    "conjugate_gradients": ("probe", "krylov", "Conjugate gradients", 0.81, 4, 200, 2e6, 0.0),
    "whitened_gd": ("probe", "preconditioned", "Whitens, then one step", 0.81, 0.2, 20, 2e6, 3e7),
    "ridge": ("probe", "closed-form", "Ridge regression", 0.82, 0.2, 1, 1e6, 4e7),
    "fine_tune_sgd": ("weights", "fine-tuning", "All weights, SGD", 0.845, 60, 600, 3e9, 1e6),
    "fine_tune_adam": ("weights", "fine-tuning", "All weights, Adam", 0.843, 30, 600, 3e9, 1e6),
    "lora_adam": ("weights", "low-rank", "Low-rank update, Adam", 0.83, 40, 600, 2e9, 1e6),
    "undo_map": ("weights", "undo", "Inverts the added map", 0.81, 5, 200, 2e6, 5e7),
}

# method -> kind or attacker -> (how many times slower, share of what is above chance that is left)
DEFENCE = {
    "none": {},
    "condition_gap": {"first-order": (45, 1), "momentum": (7, 1), "adaptive": (9, 1),
                      "krylov": (3, 1), "fine-tuning": (1.1, 1)},
    "limit": {"first-order": (2000, 1), "momentum": (45, 1), "adaptive": (40, 1),
              "krylov": (6, 1), "fine-tuning": (1.3, 1)},
    "erase": {kind: (1, 0.004) for kind in ("first-order", "momentum", "adaptive", "krylov",
                                            "preconditioned", "closed-form")}
             | {"fine-tuning": (2.5, 0.99), "low-rank": (2, 0.9)},
}  # fmt: skip

STATUS = {
    ("erase", "undo_map"): ("not_applicable", "The model has no added map to undo."),
    ("none", "undo_map"): ("not_applicable", "The model has no added map to undo."),
    ("limit@t=1", "lora_adam"): ("failed", "FloatingPointError: loss is not finite at step 31."),
}
TASKS = ("harmful", "unseen:textures", "benign:digits")


def base(method):
    return method.split("@")[0]


def interval(mean, half=0.008):
    return {"mean": mean, "lower": mean - half, "upper": mean + half}


def make_row(model, attacker, task):
    """One row, "done" unless `STATUS` says otherwise."""
    family, kind, _, ceiling, fold, budget, step_flops, setup = ATTACKERS[attacker]
    status, reason = STATUS.get((model, attacker), ("done", None))
    empty = {
        "model": model, "attacker": attacker, "task": task, "status": status, "reason": reason,
        "hyper_parameters": {}, "grid": [], "edge_of_grid": False, "quality": None,
        "best_quality": None, "change": None, "utility": None, "by_seed": [], "stop": 0, "steps": 0,
        "setup_flops": None, "step_flops": None, "flops_to_break": None, "curve": None,
        "selected": None, "loss": None, "gradient": None, "diverged": False,
        "still_falling": False, "within_bound": None, "fit": None, "counts": None, "spent": None,
        "reached": None, "costs": [], "class": assessment_record.class_of(make_attacker(attacker)),
    }  # fmt: skip
    if status != "done":
        return empty
    slower, left = DEFENCE[base(model)].get(kind, (1, 1))
    if task.startswith("benign"):
        slower, left = 1 + math.log10(slower) / 4, 1 if left == 1 else 0.97
    elif task.startswith("unseen"):
        slower, left = math.sqrt(slower), 1 - (1 - left) * 0.3
    top = CHANCE + (ceiling - CHANCE) * left
    steps = np.unique(np.concatenate([[0], np.geomspace(1, budget, 40).astype(int)]))
    quality = CHANCE + (top - CHANCE) * (1 - np.exp(-steps / (fold * slower)))
    utility = UTILITY[base(model)] - 0.1 * (1 - np.exp(-steps / 900)) * (family == "weights")
    flops = setup + steps * step_flops
    threshold = CHANCE + 0.9 * (0.845 - CHANCE)
    reached = np.nonzero(quality >= threshold)[0]
    end = float(quality[-1])
    undefended = CHANCE + (ceiling - CHANCE) * (1 - math.exp(-budget / fold))
    rates = (1e-3, 1e-2, 1e-1)
    choice = {
        "hyper_parameters": {"learning_rate": 1e-2} if budget > 1 else {"penalty": 1e-4},
        "selected": end + 0.003,
        "stop": budget,
        "quality": interval(end),
        "change": interval(end - undefended),
        "utility": interval(float(utility[-1])) if family == "weights" else None,
        "by_seed": [end - 0.004, end, end + 0.004],
        "edge_of_grid": attacker == "adam",
        "diverged": False,
        "still_falling": slower > 1000,
    }
    kept = None
    if family == "weights" and not task.startswith("benign"):
        early = int(np.flatnonzero(utility >= 0.95 * UTILITY[base(model)])[-1])
        kept = choice | {
            "hyper_parameters": {"learning_rate": 1e-3},
            "selected": float(quality[early]) + 0.003,
            "stop": int(steps[early]),
            "quality": interval(float(quality[early])),
            "utility": interval(float(utility[early])),
            "by_seed": [float(quality[early]) + shift for shift in (-0.004, 0.0, 0.004)],
        }
    broken = bool(len(reached)) and not task.startswith("benign")
    return empty | choice | {
        "counts": broken or None,
        "reached": 0.9 if broken else 0.0,
        "costs": make_costs(flops, quality),
        "within_bound": kept,
        "grid": [{"learning_rate": rate, "selection": end - 0.02 * abs(math.log10(rate / 1e-2)),
                  "diverged": rate == 1e-1 and attacker == "gd"} for rate in rates]
                if budget > 1 else [],
        "best_quality": float(quality.max()),
        "steps": budget,
        "setup_flops": setup,
        "step_flops": step_flops,
        "flops_to_break": float(flops[reached[0]]) if len(reached) else None,
        "curve": {"step": steps.tolist(), "flops": flops.tolist(), "quality": quality.tolist(),
                  "utility": utility.tolist() if family == "weights" else []},
        "loss": {"start": math.log(10), "end": 0.7, "guessing": math.log(10)},
        "gradient": {"start": 0.3, "end": 0.01, "backbone": 0.2 if family == "weights" else None},
        "fit": make_fit(steps, fold * slower) if family == "probe" else None,
    }  # fmt: skip


def make_costs(flops, quality):
    """Costs at fractions of the way, half a recorded step early and as late as they are."""
    found = []
    for fraction in (0.25, 0.5, 0.75, 0.9):
        threshold = CHANCE + fraction * (0.845 - CHANCE)
        places = np.nonzero(quality >= threshold)[0]
        cost = float(flops[places[0]]) if len(places) else None
        found.append({"fraction": fraction, "threshold": threshold, "flops": cost,
                      "lower": 0.5 * (cost or float(flops[-1])), "upper": cost})  # fmt: skip
    return found


def make_cheapest(rows, label):
    """The least cost of some attackers on a model at each fraction, over the undefended one's."""
    found = []
    for place in range(4):
        ends = {}
        for model in (label, "none"):
            costs = [(row["costs"][place]["flops"], row["attacker"]) for row in rows
                     if row["model"] == model and row["costs"]]  # fmt: skip
            ends[model] = min((c for c in costs if c[0] is not None), default=(None, None))
        (cost, who), (bare, _) = ends[label], ends["none"]
        known = [row["costs"][place] for row in rows if row["model"] == label and row["costs"]]
        ratio = cost / bare if cost and bare else None
        found.append({
            "fraction": known[0]["fraction"], "threshold": known[0]["threshold"], "flops": cost,
            "lower": min(one["lower"] for one in known), "upper": cost, "attacker": who,
            "ratio": ratio, "ratio_lower": ratio and 0.5 * ratio,
            "ratio_upper": ratio and 2 * ratio,
        })  # fmt: skip
    return found


def make_part(rows, label, name):
    """The part of a class of attackers."""
    own = [row for row in rows
           if row["model"] == label and row["class"] == name and row["curve"]]  # fmt: skip
    best = max(own, key=lambda row: row["selected"])
    broken = any(row["flops_to_break"] is not None for row in own)
    return {
        "class": name,
        "holds": "no" if broken else "unknown",
        "why": f"{best['attacker']} decides for {name}",
        "tried": len(own),
        "counted": sum(bool(row["counts"]) for row in own),
        "attacker": best["attacker"],
        "harm": best["quality"],
        "reference": CHANCE,
        "reached": max(row["reached"] for row in own),
        "spent": None if broken else 12.0,
        "costs": make_cheapest([row for row in rows if row["class"] == name], label),
    }


def make_fit(steps, fold):
    """Steps of a probe whose excess loss falls tenfold in `fold` steps; the error is its root."""
    budget, excess = int(steps[-1]), 10.0 ** (-steps / fold)

    def first(decades):
        return math.ceil(decades * fold) if decades * fold <= budget else -1

    return {
        "hyper_parameters": {"learning_rate": 1e-1},
        "edge_of_grid": True,
        "steps_to_loss_gap": {f"1e-{k}": first(k) for k in (1, 2, 3)},
        "steps_to_parameter_error": {f"1e-{k}": first(2 * k) for k in (1, 2, 3)},
        "final_relative_excess_loss": float(excess[-1]),
        "diverged": False,
        "still_falling": first(3) < 0,
        "curve": {"step": steps.tolist(), "relative_excess_loss": excess.tolist(),
                  "relative_parameter_error": np.sqrt(excess).tolist()},
    }  # fmt: skip


def make_break(rows, undefended, *, bound):
    """Cheapest attacker to the threshold, and the worst case over attackers as a curve."""
    threshold = CHANCE + 0.9 * (0.845 - CHANCE)
    points = sorted(
        (flops, quality, row["attacker"])
        for row in rows
        for place, (flops, quality) in enumerate(
            zip(row["curve"]["flops"], row["curve"]["quality"], strict=True)
        )
        if bound is None or not row["curve"]["utility"] or row["curve"]["utility"][place] >= bound
    )
    envelope, highest = {"flops": [], "harm": [], "attacker": []}, -math.inf
    broken = None
    for flops, quality, attacker in points:
        if quality > highest:
            highest = quality
            for key, value in (("flops", flops), ("harm", quality), ("attacker", attacker)):
                envelope[key].append(value)
            if broken is None and quality >= threshold:
                broken = (flops, attacker)
    last = points[-1][0]
    flops, attacker = broken or (None, None)
    cost = None if undefended is None else (flops or last) / undefended
    return {
        "threshold": threshold, "utility_bound": bound, "flops": flops, "attacker": attacker,
        "ratio": cost, "bound": "?" if cost is None else "=" if broken else ">",
        "lower": 0.8 * cost if broken and cost else None,
        "upper": 1.25 * cost if broken and cost else None,
        "highest_harm": highest, "area": 0.55 * highest, "envelope": envelope,
    }  # fmt: skip


def make_condition(name, value, undefended, holds, attacker, flops):
    meanings = {
        "resistance": "Worst-case harmful accuracy over attackers at the end of the budget.",
        "stability": "Primary accuracy of the defended model, before any attack.",
        "trainability": "Accuracy on a benign task that a plain fine-tune reaches.",
        "generalisation": "Worst-case accuracy on harmful domains that the defence did not see.",
    }
    return {
        "holds": holds,
        "value": value,
        "undefended": undefended,
        "attacker": attacker,
        "flops": flops,
        "meaning": meanings[name],
    }


def make_model(label, rows, undefended):
    """`undefended` has the costs of the undefended model, bounded and not."""
    method, own = label, [row for row in rows if row["model"] == label and row["curve"]]
    harmful = [row for row in own if row["task"] == "harmful"]
    task_rows = [row for row in rows if row["task"] == "harmful"]
    utility = UTILITY[base(method)]
    breaks = [
        make_break(harmful, cost, bound=bound)
        for cost, bound in zip(undefended, (0.9 * utility, None), strict=True)
    ]
    worst = max(row["quality"]["mean"] for row in harmful)
    defended = method != "none"
    return {
        "label": label,
        "method": method,
        "seed": 0,
        "hash": f"{abs(hash_of(label)):064x}",
        "conditioning": {"log_rir": 5.1, "log_ratio_harmful": 4.6} if defended else None,
        "utility": interval(utility, 0.004),
        "conditions": {
            "resistance": make_condition(
                "resistance", interval(worst), interval(0.845), "weak" if defended else "no",
                "fine_tune_sgd", 5.4e11,
            ),
            "stability": make_condition(
                "stability", interval(utility, 0.004), interval(0.92, 0.004),
                "no" if base(method) == "erase" else "yes", None, None,
            ),
            "trainability": make_condition(
                "trainability", interval(0.84), interval(0.845), "yes", "fine_tune_adam", 1.8e12,
            ),
            "generalisation": make_condition("generalisation", None, None, "unknown", None, None),
        },
        "why": "fine-tuning gives it away" if defended else "it is the undefended model",
        "reference": {"kind": "chance", "model": None, "attacker": None, "quality": CHANCE,
                      "undefended": interval(0.845), "undefended_attacker": "fine_tune_sgd",
                      "room": True},
        "classes": [make_part(task_rows, label, name) for name in assessment_record.CLASSES
                    if any(row["class"] == name for row in harmful)],
        "costs": make_cheapest(task_rows, label),
        "spread": {"examples": interval(worst), "attack_seeds": interval(worst, 0.004),
                   "defence_seeds": None},
        "threat": {"access": list(dict.fromkeys(row["class"] for row in harmful)),
                   "harmful_rows": 5000, "flops": 1.8e12, "spent": 12.0, "trainable": "bench",
                   "attack_seeds": 3, "defence_seeds": 1, "chosen_on_held_out": defended},
        "break": breaks[0],
        "break_unbounded": breaks[1],
        "bypass": {"quality": interval(0.8), "flops": 2.5e9, "breaks": True, "d": 65,
                   "hyper_parameters": {"penalty": 0.01}, "selected": 0.81},
        "union": {"quality": worst + 0.05, "expected": worst + 0.045, "worst": worst},
        "portfolio": {"winner": "fine_tune_sgd", "hyper_parameters": {"learning_rate": 0.01},
                      "selection": worst + 0.01, "spent": 4e10, "exhaustive": 1e12, "arms": 30,
                      "rungs": [{"flops": 1e8, "arms": 30}, {"flops": 9e8, "arms": 10}]}
        if defended
        else None,
        "flags": [
            {
                "code": "edge_of_grid",
                "severity": "warning",
                "message": "adam: the best learning rate, 0.01, is at the edge of the grid.",
                "caps": False,
            },
            {"code": "few_seeds", "severity": "info", "message": "Three seeds: wide intervals.",
             "caps": False},
        ]
        if defended
        else [],
    }  # fmt: skip


def hash_of(text):
    return int.from_bytes(text.encode(), "big") % 2**200


def make_attacker(name):
    """An attacker as a document has it; without traits if the package does not know it."""
    family, kind, what, *_ = ATTACKERS[name]
    said = attacks.describe(name) if name in {**attacks.REGISTRY, **attacks.WEIGHT_REGISTRY} else {}
    return said | {"name": name, "family": family, "kind": kind, "what": what}


def make_assessment(models=MODELS, attackers=tuple(ATTACKERS), tasks=TASKS, name="cifar_pets"):
    """One valid assessment, deterministic in its arguments."""
    rows = [make_row(model, attacker, task)
            for model in models for task in tasks for attacker in attackers]  # fmt: skip
    costs = (None, None)
    if "none" in models:
        free = make_model("none", rows, costs)
        costs = (free["break"]["flops"], free["break_unbounded"]["flops"])
    statuses = [row["status"] for row in rows]
    task = {"n_train": 5000, "n_selection": 500, "n_held_out": 1000}
    content = {
        "schema": assessment_record.SCHEMA_VERSION,
        "name": name,
        "level": "standard",
        "command": f"jaximm assess runs/{name} --level standard --out assessment.json",
        "code": "c0ffee" * 10,
        "versions": {"python": "3.12.3", "jax": "0.12.0.1", "jaximm": "0.1.0"},
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "data": {
            "name": name,
            "description": "Ten classes of small images; the harmful task is another ten.",
            "source": "made with NumPy for the tests",
            "metric": "accuracy",
            "utility_metric": "accuracy",
            "chance": CHANCE,
            "inputs_shared": False,
            "d": 64,
            "tasks": {key: {"name": f"{key} images"} | task for key in ("primary", *tasks)},
        },
        "protocol": {
            "select_seeds": [100, 101],
            "report_seeds": [0, 1, 2],
            "utility_fraction": 0.9,
            "break_fraction": 0.9,
            "probe_steps": {"gd": 20000, "ridge": 1},
            "weight_steps": 600,
            "batch_size": 64,
            "chunk": None,
            "loop": "scan",
        },
        "models": [make_model(label, rows, costs) for label in models],
        "attackers": [make_attacker(key) for key in attackers],
        "rows": rows,
        "certificates": [
            row
            for place, label in enumerate(models, start=1)
            for row in (
                {"model": label, "name": "krylov_floor",
                 "threat_model": "iterates in the span of gradients", "value": 9.0 * place,
                 "unit": "steps", "task": "harmful", "target": "1e-2", "flops": 1.8e7 * place},
                {"model": label, "name": "head_floor", "threat_model": "any head on the features",
                 "value": 0.8, "unit": "accuracy", "task": "harmful", "target": "best head",
                 "flops": None},
            )
        ],
        "cells": {status: statuses.count(status) for status in assessment_record.STATUS}
                 | {"digest": "d1ce" * 16},
        "flags": [{"code": "inputs_close", "severity": "warning",
                   "message": "Harmful and primary inputs are of one distribution.",
                   "caps": False}],
    }  # fmt: skip
    return with_verdicts(content)


def nulls(content):
    """The same assessment with null, or nothing, everywhere the schema allows it."""
    interval_of_null = {"mean": None, "lower": None, "upper": None}
    content["data"] |= {"chance": None, "description": "", "source": ""}
    content["protocol"] |= {"utility_fraction": None, "break_fraction": None, "probe_steps": {},
                            "batch_size": None, "chunk": None}  # fmt: skip
    content |= {"command": "", "versions": {}, "device": {}, "certificates": [], "flags": []}
    for model in content["models"]:
        model |= {"conditioning": None, "utility": None, "portfolio": None, "flags": [],
                  "bypass": None,
                  "union": {"quality": None, "expected": None, "worst": None}}  # fmt: skip
        for condition in model["conditions"].values():
            condition |= {"holds": "unknown", "value": None, "undefended": interval_of_null,
                          "attacker": None, "flops": None}  # fmt: skip
        model |= {"classes": [], "costs": [], "spread": dict.fromkeys(model["spread"]),
                  "reference": model["reference"] | {"attacker": None, "quality": None,
                                                     "undefended": None, "room": False},
                  "threat": model["threat"] | {"access": [], "flops": None, "spent": None},
                  }  # fmt: skip
        for key in ("break", "break_unbounded"):
            model[key] = dict.fromkeys(model[key]) | {
                "bound": "?",
                "envelope": {"flops": [None], "harm": [None], "attacker": [""]},
            }
    for row in content["rows"]:
        if row["status"] == "done":
            number = dict.fromkeys(("start", "end", "guessing"))
            row |= {"quality": interval_of_null, "best_quality": None, "change": None,
                    "utility": interval_of_null, "by_seed": [None], "setup_flops": None,
                    "step_flops": None, "flops_to_break": None, "selected": None, "loss": number,
                    "gradient": None, "hyper_parameters": {}, "grid": [{}],
                    "within_bound": None, "fit": None, "counts": None, "spent": None,
                    "reached": None, "costs": [],
                    "curve": {"step": [0], "flops": [None], "quality": [None], "utility": []},
                    }  # fmt: skip
    return with_verdicts(content)
