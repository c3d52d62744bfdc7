"""The answer in words: what one method did, against whom, at what price.

Every sentence is computed from the rows of the results. The thresholds from which a change
is called one are the constants of `jaximm.report.reading`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaximm.report import formats, reading
from jaximm.report.groups import (
    PLAIN,
    Cost,
    Group,
    any_deep,
    attack_costs,
    group_rir,
    is_deep,
    plain_attacker,
    quality,
    rank_lost,
    ratio,
)


class Answer(NamedTuple):
    """The answer for one method: a headline, sentences that support it, and warnings.

    ``tone`` is a key of `jaximm.records.assessment.TONES`; "costly" comes before all others: what
    slows attackers of a model that lost its own task is no protection.
    """

    label: str
    tone: str
    headline: str
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]


class _Ends(NamedTuple):
    """Mean quality before and after, and what guessing has."""

    before: float
    after: float
    chance: float
    metric: str

    @property
    def gone(self) -> bool:
        """Whether there was something, and nothing is left."""
        return (
            self.after <= self.chance + reading.NOTHING
            and self.before > self.chance + 5 * reading.NOTHING
        )

    @property
    def kept(self) -> bool:
        """Whether most of what is above chance is still there."""
        least = reading.KEPT * (self.before - self.chance)
        return self.before <= self.chance or self.after - self.chance >= least

    def text(self, arrow: str = " → ") -> str:
        return arrow.join(map(formats.decimal, (self.before, self.after)))


def _quality(group: Group, task: str, split: str = "held_out") -> _Ends | None:
    key = "utility" if task == "primary" else "harmful_utility"
    before, after = (quality(group, side, key=key, split=split) for side in ("before", "after"))
    if before is None or after is None:
        return None
    data = group.results[0]["data"][task]
    chance = {"binary": 1 / 2, "classes": 1 / data.get("classes", math.inf)}.get(data["kind"], 0)
    metric = next(result[key]["metric"] for result in group.results if result[key])
    return _Ends(before.mean, after.mean, chance, reading.metric_word(metric))


def answer(group: Group) -> Answer:
    """What the rows of `group` say, in words."""
    harmful = attack_costs(group, task="harmful")
    tone, headline = _headline(group, harmful)
    sentences = [*_other_attackers(harmful), *_fine_tuning(harmful), *_conditioning(group)]
    sentences += [*_primary_attackers(group), *_qualities(group)]
    return Answer(group.label, tone, headline, tuple(sentences), tuple(_warnings(group)))


def lead(groups: Sequence[Group]) -> str:
    """One sentence over all methods: which of those that keep the primary task does most."""
    if len(groups) == 1:
        return answer(groups[0]).headline
    defended = [group for group in groups if group.method != "none"] or list(groups)
    kept = [group for group in defended if not _costly(group)]
    count = f"{len(kept)} of {len(defended)} methods keep{'s' * (len(kept) == 1)} the primary task"
    if not any(_quality(group, "primary") for group in defended):
        count = "What is left of the primary task was not measured"
    if not kept:
        return f"{count}: none is a defence."
    plain = [(plain_attacker(attack_costs(group, task="harmful")), group) for group in kept]
    slowed = [(cost, group) for cost, group in plain if cost and _known(cost)]
    logs = [(ratio(group, "log_rir", split="held_out"), group) for group in kept]
    known = [(spread.mean, group) for spread, group in logs if spread]
    if slowed:
        cost, best = max(slowed, key=lambda pair: pair[0].steps_ratio)
        what = f"slows {_attacker(cost)} most ({_times(cost)})"
    elif known:
        log_rir, best = max(known, key=lambda pair: pair[0])
        what = f"has the largest RIR on held-out rows ({formats.from_log(log_rir)})"
    else:
        return f"{count}; none was attacked."
    what = f"{count}; of these {best.label} {what}"
    left = _quality(best, "harmful")
    if left is not None:
        before, after = map(formats.decimal, (left.before, left.after))
        what += f"; on held-out rows a linear head still gets harmful {left.metric} {after} of "
        what += before
    return what + "."


def threat_model(groups: Sequence[Group]) -> str:
    """Whom the defence is against, in words."""
    deep = ["threat_model_deep"] * any_deep(groups)
    return " ".join(map(reading.note, ["threat_model", *deep]))


def cost_steps(cost: Cost, side: str) -> str:
    """Steps before or after."""
    return formats.steps(getattr(cost, side).steps, cost.budget)


def compared(cost: Cost) -> str:
    """'49 → 7,322 steps', or with '> budget' where the attack did not arrive."""
    before, after = (cost_steps(cost, side) for side in ("before", "after"))
    unit = "step" if before == after == "1" else "steps"
    return f"{before} → {after} {unit}"


def _slowed(cost: Cost) -> bool:
    return cost.steps_ratio >= reading.NOTICEABLE and cost.bound != "<"


def _hastened(cost: Cost) -> bool:
    return cost.steps_ratio <= 1 / reading.NOTICEABLE and cost.bound != ">"


def _known(cost: Cost) -> bool:
    return not math.isnan(cost.steps_ratio)


def _costly(group: Group) -> bool:
    found = _quality(group, "primary")
    return found is not None and not found.kept


def _headline(group: Group, costs: Sequence[Cost]) -> tuple[str, str]:
    if not costs:
        clause = "Not attacked yet: what follows is conditioning and quality only."
        return ("costly" if _costly(group) else "open"), clause
    clauses: list[str] = []
    slowed: list[bool] = []
    own = _quality(group, "primary")
    if own is not None and not own.kept:
        clauses.append(f"the model loses its own task ({own.metric} {own.text()} on held-out rows)")
    fitted = _quality(group, "harmful", "train")
    if fitted is not None and fitted.gone:
        slowed.append(True)
        clauses.append(
            "leaves nothing of the harmful task to a linear probe on the fitted rows "
            f"({fitted.text()} in closed form): steps to a probe's optimum say nothing"
        )
        costs = [cost for cost in costs if cost.fine_tuning]
    plain = plain_attacker(costs)
    if plain is not None:
        clauses.append(_effect(plain))
        slowed.append(_slowed(plain))
    informed = [cost for cost in costs if cost.informed]
    # The headline names whom the defence does not stop: the cheapest of those it does not slow.
    weakest = cheapest(cost for cost in informed if not _slowed(cost)) or cheapest(informed)
    if weakest is not None:
        stopped, clause = _informed(weakest, _quality(group, "harmful"))
        slowed.append(stopped)
        clauses.append(clause)
    tuned = least_slowed([cost for cost in costs if cost.fine_tuning])
    if tuned is not None:
        slowed.append(_slowed(tuned))
        clauses.append(_effect(tuned))
    tone = "good" if all(slowed) else "mixed" if any(slowed) else "bad"
    headline = "; ".join(clauses) + "."
    return "costly" if _costly(group) else tone, headline[0].upper() + headline[1:]


def _informed(cost: Cost, left: _Ends | None) -> tuple[bool, str]:
    """Whether a probe that uses more than gradients is stopped, and what is said of it.

    That it still reaches its optimum says nothing where the optimum is worth nothing any more: what
    counts is the quality on held-out rows.
    """
    who, steps = _attacker(cost), compared(cost)
    if _slowed(cost):
        return True, f"slows {who} {_times(cost)}"
    if not math.isfinite(cost.before.steps) and not math.isfinite(cost.after.steps):
        return False, f"{who} does not arrive before or after"
    if not math.isfinite(cost.after.steps):
        return False, f"{who} does not arrive any more ({steps})"
    if left is not None and left.before - left.after > reading.UTILITY_LOSS:
        text = f"{who} still arrives ({steps}), where {left.metric} on held-out rows is {{}}"
        return left.gone, text.format(f"{left.text()} for the best linear head")
    held = "" if left is None else f", {left.metric} {left.text()} on held-out rows"
    return False, f"no protection against {who} ({steps}{held})"


def _effect(cost: Cost) -> str:
    """What an attacker meets, as a clause."""
    who, steps, tuned = _attacker(cost), compared(cost), cost.fine_tuning
    where = "on the way to the undefended accuracy" if tuned else "on the harmful task"
    if not _known(cost):
        never = "reach the undefended accuracy" if tuned else "arrive within its budget"
        return f"{who} does not {never}, before or after ({steps})"
    if _slowed(cost):
        return f"slows {who} {_times(cost)} {where} ({steps})"
    if _hastened(cost):
        return f"makes {who} {_faster(cost)} faster {where} ({steps})"
    if not tuned:
        return f"does not slow {who} {where} ({steps})"
    times = formats.multiple(cost.steps_ratio, cost.bound)
    return f"{who} reaches the undefended accuracy after {times} the steps ({steps}): no protection"


def _faster(cost: Cost) -> str:
    return formats.factor(-math.log(cost.steps_ratio))


def _attacker(cost: Cost) -> str:
    return "plain " * (cost.attacker == PLAIN) + formats.name(cost.attacker)


def _times(cost: Cost) -> str:
    return "more than " * (cost.bound == ">") + formats.multiple(cost.steps_ratio)


def least_slowed(costs: Sequence[Cost]) -> Cost | None:
    """The attacker whose steps grew least: whom a defence of all must slow."""
    known = [cost for cost in costs if _known(cost)]
    return min(known, key=lambda cost: cost.steps_ratio, default=next(iter(costs), None))


def cheapest(costs: Iterable[Cost]) -> Cost | None:
    """The attacker that a well-informed adversary would take: the fewest FLOPs after."""
    attacked = [cost for cost in costs if not math.isnan(cost.after.flops)]
    return min(attacked, key=lambda cost: (cost.after.flops, cost.after.steps), default=None)


def _other_attackers(costs: Sequence[Cost]) -> list[str]:
    plain = plain_attacker(costs)
    fastest = cheapest(cost for cost in costs if cost.first_order)
    if fastest is None or plain is None or fastest.attacker == plain.attacker:
        return []
    who = f"{formats.name(fastest.attacker)}, {compared(fastest)}"
    change = formats.multiple(fastest.steps_ratio, fastest.bound)
    return [f"Cheapest first-order attacker on the immunised backbone: {who} ({change})."]


def _fine_tuning(costs: Sequence[Cost]) -> list[str]:
    """One sentence an attacker that trains the backbone too."""
    sentences = []
    for cost in (cost for cost in costs if cost.fine_tuning):
        who = formats.name(cost.attacker)
        text = f"{who[0].upper()}{who[1:]}: {compared(cost)} to the undefended accuracy"
        if cost.accuracy_target is not None:
            text += f" (target {formats.decimal(cost.accuracy_target)})"
        accuracies = (cost.before.accuracy, cost.after.accuracy)
        if accuracies != (None, None):
            ends = map(formats.decimal, accuracies)
            text += f"; held-out accuracy after all {cost.budget:,}: {' → '.join(ends)}"
        sentences.append(text + ".")
    return sentences


def _footing(group: Group) -> str:
    """Damped; the pseudo-inverse where directions are gone, on which damping says nothing."""
    return "pseudo_inverse" if any(map(rank_lost, group.results)) else "damped"


def _conditioning(group: Group) -> list[str]:
    sentences = []
    footing = _footing(group)
    if footing != "damped":
        lost = next(filter(None, map(rank_lost, group.results)))
        ranks = ", ".join(f"{task} {before} → {after}" for task, (before, after) in lost.items())
        sentences.append(
            f"Removes directions of the features (rank: {ranks}): condition numbers are those of "
            "what is left (pseudo-inverse)."
        )
    for split, rows in (("train", "training"), ("held_out", "held-out")):
        harmful, primary, rir, fraction = (
            ratio(group, key, footing=footing, split=split)
            for key in ("log_ratio_harmful", "log_ratio_primary", "log_rir", "log_fraction")
        )
        if harmful is None or primary is None or rir is None:
            continue
        text = (
            f"Condition numbers, {rows} rows: harmful {_change(harmful.mean)}, primary "
            f"{_change(primary.mean)}; RIR {formats.from_log(rir.mean)}"
        )
        if fraction is not None:
            text += f", {formats.decimal(fraction.mean)} of the limit in logarithm"
        sentences.append(text + ".")
    by_group = group_rir(group, "log_rir")
    if by_group is not None:
        size = next(r["groups"]["held_out"]["rows"] for r in group.results if "groups" in r)
        text = f"By group of {size} held-out rows (pseudo-inverse): log RIR"
        sentences.append(f"{text} {formats.mean_sd(by_group)} over groups.")
    return sentences


def _change(log_ratio: float) -> str:
    if abs(log_ratio) < reading.UNCHANGED_LOG:
        return "unchanged"
    if log_ratio > 0:
        return f"{formats.factor(log_ratio)} larger"
    return f"{formats.factor(-log_ratio)} smaller"


def _primary_attackers(group: Group) -> list[str]:
    cost = plain_attacker(attack_costs(group, task="primary"))
    if cost is None or not _known(cost) or _slowed(cost):  # slowed: a warning, below
        return []
    effect = f"{_faster(cost)} fewer" if _hastened(cost) else "about as many"
    return [f"Primary task: {formats.name(cost.attacker)} needs {effect} steps ({compared(cost)})."]


def _qualities(group: Group) -> list[str]:
    """Held-out quality: of the primary task, and what a closed form gets out of the harmful one."""
    deep = any(map(is_deep, group.results))
    shipped, best = (" of the head that is shipped", "classifier") if deep else ("", "head")
    texts = {
        "primary": f"Primary {{0}}{shipped} on held-out rows: {{1}}.",
        "harmful": f"Harmful {{0}} that the best linear {best} recovers on held-out rows: {{1}}.",
    }
    return [
        text.format(found.metric, found.text(" before, ") + " after")
        for task, text in texts.items()
        if (found := _quality(group, task)) is not None
    ]


def _warnings(group: Group) -> list[str]:
    warnings = []
    if group.results[0]["data"]["inputs_shared"]:
        warnings.append(reading.note("inputs_shared"))
    footing = _footing(group)
    harmful = ratio(group, "log_ratio_harmful", footing=footing)
    primary = ratio(group, "log_ratio_primary", footing=footing)
    kappa = "its condition number"
    if harmful is not None and harmful.mean < -reading.UNCHANGED_LOG:
        left = f"falls to {formats.from_log(harmful.mean)} of what it was, (i) < 1."
        warnings.append(f"Makes the harmful task easier: {kappa} {left}")
    if primary is not None and primary.mean > reading.UNCHANGED_LOG:
        grown = f"grows {formats.factor(primary.mean)}, (ii) > 1."
        warnings.append(f"Makes the primary task harder: {kappa} {grown}")
    cost = plain_attacker(attack_costs(group, task="primary"))
    if cost is not None and _slowed(cost):
        warnings.append(
            f"Slows the primary task too: {formats.name(cost.attacker)} needs {_times(cost)} the "
            f"steps ({compared(cost)})."
        )
    own = _quality(group, "primary")
    if own is not None and own.before - own.after > reading.UTILITY_LOSS:
        warnings.append(f"Costs the primary task quality: {own.text(' to ')} on held-out rows.")
    hastened = [cost.attacker for cost in attack_costs(group, task="harmful") if _hastened(cost)]
    if hastened:
        names = ", ".join(map(formats.name, hastened))
        warnings.append(f"Speeds up attacks on the harmful task: {names}.")
    return warnings
