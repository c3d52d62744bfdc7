"""Every rule fires where it should, is quiet where it should not, and survives missing numbers."""

import copy
from typing import Any

import pytest

from jaximm import measures
from jaximm.measures import flags
from jaximm.records import result
from tests import result_fixture

BASE = result_fixture.make_result("condition_gap")


def sound():
    """A result that raises no flag at all."""
    found = copy.deepcopy(BASE)
    for splits in found["conditioning"].values():
        for row in splits.values():
            for task in ("primary", "harmful"):
                for when in ("before", "after"):
                    row[task][when]["dominated_by"] = "none"
    for split in result.SPLITS:
        set_ratios(found, harmful=3.0, primary=-1.0, split=split)
    found["utility"]["after"]["held_out"] = found["utility"]["before"]["held_out"]
    return found


DEEP = result_fixture.make_deep_result("condition_gap")


def sound_deep():
    """A deep result that raises no flag at all."""
    keys = ("backbone", "groups", "harmful_utility", "logits_change", "utility")
    return sound() | {key: copy.deepcopy(DEEP[key]) for key in keys}


def set_ratios(found, *, harmful, primary, split="train"):
    row = found["conditioning"]["damped"][split]
    row["log_ratio_harmful"], row["log_ratio_primary"] = harmful, primary
    rir = None if harmful is None or primary is None else harmful - primary
    row["log_rir"] = row["log_rir_lower"] = row["log_rir_upper"] = rir


def keep_the_numbers(found):
    found["backbone"]["hash_after"] = found["backbone"]["hash_before"]


def recover(found):
    found["harmful_utility"]["after"]["held_out"] = (
        found["harmful_utility"]["before"]["held_out"] - 0.009
    )


def remove_directions(found):
    for row in found["conditioning"]["damped"].values():
        row["harmful"]["after"]["rank"] = row["harmful"]["before"]["rank"] - 2


def share_inputs(found):
    found["data"]["inputs_shared"] = True


def leave_unchanged(found):
    set_ratios(found, harmful=0.0, primary=0.0)
    for task in found["spectra"].values():
        task["after"] = [3.0 * value for value in task["before"]]  # the scale does not matter


def make_harmful_easier(found):
    set_ratios(found, harmful=-0.06, primary=-1.0)


def make_primary_harder(found):
    set_ratios(found, harmful=3.0, primary=0.06)


def lose_utility(found):
    found["utility"]["after"]["held_out"] = found["utility"]["before"]["held_out"] - 0.021


def lose_on_held_out(found):
    set_ratios(found, harmful=0.99, primary=-1.0, split="held_out")  # of 4 on training rows


def round_off(found):
    found["conditioning"]["pseudo_inverse"]["held_out"]["harmful"]["after"]["dominated_by"] = (
        "rounding"
    )


def damp(found):
    found["conditioning"]["damped"]["train"]["harmful"]["before"]["dominated_by"] = "damping"


def drop_rows(found):
    found["data"]["primary"]["n_train"] = found["data"]["primary"]["d"] - 1


def hold_out_few(found):
    found["data"]["harmful"]["n_held_out"] = 5


def choose_on_held_out(found):
    found["config"]["chosen_on_held_out"] = True


def make_constant(found):
    found["data"]["harmful"]["kind"] = "constant"


# Rule -> (code, what triggers it, what its message must name).
def move_the_logits(found):
    found.update(method="limit@t=1", logits_change=4.5e-3)


TRIGGERS: dict[Any, tuple[str, Any, str]] = {
    flags.inputs_shared: ("inputs_shared", share_inputs, "RIR is 1"),
    flags.same_numbers: ("same_numbers", keep_the_numbers, "All parameters of the mlp"),
    flags.closed_form_recovers: ("closed_form_recovers", recover, "recovers 0.691 held-out"),
    flags.directions_removed: ("directions_removed", remove_directions, "harmful 12 to 10"),
    flags.unchanged: ("before_equals_after", leave_unchanged, "nothing moved"),
    flags.harmful_easier: ("harmful_easier", make_harmful_easier, "log (i) = -0.06"),
    flags.primary_harder: ("primary_harder", make_primary_harder, "log (ii) = 0.06"),
    flags.utility_lost: ("utility_lost", lose_utility, "held-out r2 fell from"),
    flags.does_not_generalise: ("held_out_gap", lose_on_held_out, "4.00 on training rows and 1.99"),
    flags.rounding_dominates: (
        "kappa_rounding",
        round_off,
        "Round-off decides 1 condition numbers (pseudo_inverse, held_out, harmful after)",
    ),
    flags.damping_dominates: ("kappa_damping", damp, "of the harmful task"),
    flags.few_rows: ("n_below_d", drop_rows, "(primary)"),
    flags.few_held_out: ("few_held_out", hold_out_few, "(harmful 5)"),
    flags.chosen_on_held_out: ("chosen_on_held_out", choose_on_held_out, "optimistic"),
    flags.nothing_to_attack: ("constant_targets", make_constant, "not run"),
    flags.logits_moved: ("logits_moved", move_the_logits, "moved by 4.5e-03"),
}


# Rules about what only deep results have.
DEEP_RULES = (
    flags.same_numbers,
    flags.closed_form_recovers,
    flags.directions_removed,
    flags.logits_moved,
)


def sound_for(rule):
    return sound_deep() if rule in DEEP_RULES else sound()


def test_every_rule_has_a_trigger_here():
    assert set(TRIGGERS) == set(measures.RULES)
    assert len({code for code, *_ in TRIGGERS.values()}) == len(measures.RULES)


@pytest.mark.parametrize("make", [sound, sound_deep])
def test_a_sound_result_raises_nothing(make):
    found = make()
    result.validate(found)
    assert measures.flags_of(found) == []


@pytest.mark.parametrize("rule", measures.RULES, ids=lambda rule: rule.__name__)
def test_a_rule_fires_on_its_trigger_and_alone(rule):
    code, trigger, words = TRIGGERS[rule]
    found = sound_for(rule)
    assert rule(found) is None
    trigger(found)
    raised = measures.flags_of(found)
    assert [flag["code"] for flag in raised] == [code]
    assert raised == [rule(found)]
    assert words in raised[0]["message"]
    assert "\n" not in raised[0]["message"]
    found["flags"] = raised
    result.validate(found)  # severity and shape fit the schema


@pytest.mark.parametrize("rule", measures.RULES, ids=lambda rule: rule.__name__)
def test_no_rule_trips_over_what_may_be_missing(rule):
    """Every number of the schema that may be null is null; only the damped footing is optional."""
    found = sound_for(rule)
    for splits in found["conditioning"].values():
        for row in splits.values():
            row |= {key: None for key in row if key.startswith("log_")}
    found["utility"] = found["harmful_utility"] = None
    found["spectra"] = {t: {"before": [], "after": []} for t in ("primary", "harmful")}
    result.validate(found)
    assert rule(found) is None
    found["conditioning"] = {"reference": found["conditioning"]["reference"]}
    assert rule(found) is None


def test_an_infinite_held_out_figure_is_a_gap_that_can_be_said():
    found = sound()
    set_ratios(found, harmful=None, primary=None, split="held_out")
    flag = flags.does_not_generalise(found)
    assert flag is not None
    assert "not defined on held-out rows" in flag["message"]


# The borders of the rules.


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        (flags.harmful_easier, lambda f: set_ratios(f, harmful=-0.05, primary=-1.0)),
        (flags.primary_harder, lambda f: set_ratios(f, harmful=3.0, primary=0.05)),
        (
            flags.does_not_generalise,
            lambda f: set_ratios(f, harmful=1.0, primary=-1.0, split="held_out"),
        ),
        (flags.few_rows, lambda f: f["data"]["primary"].update(n_train=f["data"]["primary"]["d"])),
        (flags.few_held_out, lambda f: f["data"]["harmful"].update(n_held_out=50)),
        (flags.chosen_on_held_out, lambda f: f["config"].update(chosen_on_held_out=False)),
        # The reference footing's round-off is its definition, not news.
        (
            flags.rounding_dominates,
            lambda f: f["conditioning"]["reference"]["train"]["primary"]["after"].update(
                dominated_by="rounding"
            ),
        ),
    ],
)
def test_a_rule_keeps_quiet_at_its_border(rule, change):
    found = sound()
    change(found)
    assert rule(found) is None


def test_the_method_none_is_meant_to_change_nothing():
    found = sound()
    leave_unchanged(found)
    found["method"] = "none"
    assert flags.unchanged(found) is None


def test_a_moved_spectrum_of_unit_ratio_is_not_unchanged():
    found = sound()
    set_ratios(found, harmful=0.0, primary=0.0)
    assert flags.unchanged(found) is None


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        (flags.logits_moved, lambda f: f.update(method="limit@t=1", logits_change=1e-4)),
        (flags.logits_moved, lambda f: f.update(method="imma", logits_change=1.0)),
        (flags.same_numbers, lambda f: (keep_the_numbers(f), f.update(method="none"))),
        (
            flags.closed_form_recovers,
            lambda f: f["harmful_utility"]["after"].update(
                held_out=f["harmful_utility"]["before"]["held_out"] - 0.011
            ),
        ),
        (
            flags.closed_form_recovers,
            lambda f: (recover(f), set_ratios(f, harmful=-1.0, primary=-1.04)),
        ),
        # R² of an invertible linear backbone never changes: that is no news.
        (
            flags.closed_form_recovers,
            lambda f: (recover(f), f["harmful_utility"].update(metric="r2")),
        ),
        (
            flags.directions_removed,
            lambda f: f["conditioning"]["damped"]["train"]["harmful"]["after"].update(rank=13),
        ),
        (flags.directions_removed, lambda f: (remove_directions(f), f.pop("backbone"))),
    ],
)
def test_a_rule_about_deep_results_keeps_quiet_at_its_border(rule, change):
    found = sound_deep()
    change(found)
    assert rule(found) is None


def test_equal_numbers_are_said_once_and_equal_features_of_moved_numbers_otherwise():
    found = sound_deep()
    leave_unchanged(found)
    flag = flags.unchanged(found)
    assert flag is not None
    assert "Parameters moved" in flag["message"]
    keep_the_numbers(found)
    codes = [flag["code"] for flag in flags.flags_of(found)]
    assert "same_numbers" in codes
    assert "before_equals_after" not in codes


def test_where_directions_are_gone_the_pseudo_inverse_is_judged():
    found = sound_deep()
    set_ratios(found, harmful=37.0, primary=38.0)
    found["conditioning"]["pseudo_inverse"]["train"]["log_ratio_primary"] = -0.5
    assert flags.primary_harder(found) is not None
    remove_directions(found)
    assert flags.primary_harder(found) is None


def test_the_gravest_come_first():
    found = sound_deep()
    for _, trigger, _ in TRIGGERS.values():
        trigger(found)
    raised = [flag["code"] for flag in measures.flags_of(found)]
    order = [TRIGGERS[rule][0] for rule in measures.RULES]
    assert raised == [code for code in order if code in raised]
    severities = [flag["severity"] for flag in measures.flags_of(found)]
    assert severities == sorted(severities, key=("warning", "info").index)
