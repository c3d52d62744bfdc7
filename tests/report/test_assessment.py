"""The page, words and tables of an assessment say what its rows say."""

import copy
import csv
import io
import json
import math
import re

import assessment_fixture
import numpy as np
import pytest
from rich.console import Console

from jaximm import cli
from jaximm.assessment import verdict
from jaximm.records import assessment as assessment_record
from jaximm.records.files import ResultError
from jaximm.report import assessment_tables, figures, page
from jaximm.report import heat as heat_maps
from tests.report.test_report import Reader, drawn_points

PROBES = [name for name, spec in assessment_fixture.ATTACKERS.items() if spec[0] == "probe"]
WEIGHTS = [name for name, spec in assessment_fixture.ATTACKERS.items() if spec[0] == "weights"]


@pytest.fixture(scope="module")
def made():
    content = assessment_fixture.make_assessment()
    assessment_record.validate(content)
    return content


@pytest.fixture
def found(made):
    return copy.deepcopy(made)


@pytest.fixture(scope="module")
def page_text(made):
    return page.render_assessment(made)


def model_of(found, label):
    return next(model for model in found["models"] if model["label"] == label)


def decide(found, label):
    return verdict.decide(found, model_of(found, label))


EFFECTS = "Attacker by attacker: "


def effects(said):
    """Who is slowed and who is not, as the evidence says it, without the words that begin it."""
    return next(text for text in said.sentences if text.startswith(EFFECTS)).removeprefix(EFFECTS)


def row_of(found, label, attacker, task="harmful"):
    return next(
        row for row in found["rows"]
        if (row["model"], row["attacker"], row["task"]) == (label, attacker, task)
    )  # fmt: skip


def set_row(found, label, attackers, *, steps="same", quality=None):
    """Overwrites cost, as steps (None: never broken), and quality on the harmful task."""
    for attacker in attackers:
        row = row_of(found, label, attacker)
        if steps != "same":
            row["flops_to_break"] = (
                None if steps is None else row["setup_flops"] + steps * row["step_flops"]
            )
        if quality is not None:
            row |= {"quality": assessment_fixture.interval(quality), "best_quality": quality}


def drop(found, label, attackers):
    found["rows"] = [row for row in found["rows"]
                     if row["model"] != label or row["attacker"] not in attackers]  # fmt: skip


# ---------------------------------------------------------------- costs and shares


@pytest.mark.parametrize(
    ("after", "before", "ratio", "bound"),
    [
        (300, 10, 30.0, "="),
        (None, 10, 2000.0, ">"),  # the whole budget of 20,000 steps over 10
        (10, None, 0.0005, "<"),
        (None, None, math.nan, "?"),
        (0, 0, 1.0, "="),
    ],
)
def test_cost_ratios_and_their_bounds(found, after, before, ratio, bound):
    set_row(found, "limit@t=1", ["gd"], steps=after)
    set_row(found, "none", ["gd"], steps=before)
    compared = verdict.comparisons(found, model_of(found, "limit@t=1"), task="harmful")
    gd = next(item for item in compared if item.name == "gd")
    np.testing.assert_allclose(gd.ratio.value, ratio)
    assert gd.ratio.bound == bound


def test_what_is_left_is_counted_from_chance_and_needs_something_to_take(found):
    set_row(found, "none", ["gd", "adam"], quality=0.5)
    set_row(found, "limit@t=1", ["gd"], quality=0.3)
    set_row(found, "none", ["adam"], quality=0.12)
    set_row(found, "limit@t=1", ["adam"], quality=0.1)
    compared = {
        item.name: item
        for item in verdict.comparisons(found, model_of(found, "limit@t=1"), task="harmful")
    }
    np.testing.assert_allclose(compared["gd"].left, (0.3 - 0.1) / (0.5 - 0.1))
    assert math.isnan(compared["adam"].left)
    assert not compared["adam"].nothing_left


def test_the_reference_is_that_of_the_same_seed(found):
    other = model_of(found, "none") | {"label": "none, seed 1", "seed": 1}
    found["models"].append(other)
    chosen = model_of(found, "erase")
    assert verdict.reference_of(found, chosen)["label"] == "none"
    chosen["seed"] = 1
    assert verdict.reference_of(found, chosen)["label"] == "none, seed 1"


# ---------------------------------------------------------------- verdicts


def test_verdict_slowed_but_not_against_a_whitening_attacker(found):
    set_row(found, "none", ["gd"], steps=100)
    set_row(found, "condition_gap", ["gd"], steps=4320)
    said = decide(found, "condition_gap")
    assert effects(said).startswith(
        "slows plain gradient descent 43.2× (4,320 steps), 80.0 of 80.0; no protection against "
        "whitened gradient descent, 81.0 of 81.0 (1 solve); fine-tuning with SGD recovers 84.5 of "
        "84.5, at about the undefended cost."
    )
    assert "1 solve" not in said.threat_model
    assert "6 probes on frozen features, 4 attackers of the weights" in said.threat_model


def test_verdict_says_more_than_where_the_budget_ran_out(found):
    set_row(found, "none", ["gd"], steps=500)
    set_row(found, "limit@t=1", ["gd"], steps=None)
    said = decide(found, "limit@t=1")
    assert effects(said).startswith(
        "slows plain gradient descent more than 40.0× (not within 20,000 steps)"
    )


def test_verdict_not_slowed_and_made_faster(found):
    for attacker in assessment_fixture.ATTACKERS:
        row_of(found, "condition_gap", attacker)["flops_to_break"] = row_of(
            found, "none", attacker
        )["flops_to_break"]
    set_row(found, "none", ["gd"], steps=100)
    set_row(found, "condition_gap", ["gd"], steps=110)
    said = decide(found, "condition_gap")
    assert effects(said).startswith("does not slow plain gradient descent (110 steps); no protec")
    assert said.warnings == ()
    set_row(found, "condition_gap", ["gd"], steps=25)
    said = decide(found, "condition_gap")
    assert effects(said).startswith("makes plain gradient descent 4.00× faster (25 steps)")
    assert said.warnings == ("Speeds up attacks on the harmful task: gradient descent.",)


@pytest.mark.parametrize(
    ("breaks", "end"), [(True, "at or above the breaking threshold."), (False, "not enough to")]
)
def test_verdict_says_what_is_left_without_the_trained_part(found, breaks, end):
    for model in found["models"]:
        model["bypass"]["breaks"] = breaks
    (said,) = (text for text in decide(found, "limit@t=1").sentences if "Without its" in text)
    assert said.startswith("Without its trainable part, ridge on the 65 numbers that enter it")
    assert "reaches 80.0 for 2.5" in said
    assert end in said


def test_verdict_nothing_left_for_a_probe_but_fine_tuning_recovers(found):
    set_row(found, "erase", PROBES, steps=None, quality=0.104)
    set_row(found, "none", ["fine_tune_sgd"], quality=0.845)
    set_row(found, "erase", ["fine_tune_sgd"], quality=0.837)
    set_row(found, "erase", ["fine_tune_adam", "lora_adam"], quality=0.7)
    said = decide(found, "erase")
    assert effects(said).startswith(
        "nothing left for a linear probe (10.4 of 80.0, chance 10.0); fine-tuning with SGD "
        "recovers 83.7 of 84.5, slowed 2.27×."
    )
    assert (
        "Probes: nothing left: gradient descent, heavy ball, Adam, conjugate gradients, whitened "
        "gradient descent, ridge."
    ) in said.sentences
    assert said.warnings == ("Costs the primary task quality: 92.0 to 84.0.",)
    model = model_of(found, "erase")
    model["flags"].append(
        {"code": "bypassed", "severity": "warning", "message": "It is.", "caps": False}
    )
    assert any("ridge on the 65 numbers" in text for text in decide(found, "erase").warnings)


def test_verdict_one_probe_that_still_learns_is_not_nothing_left(found):
    set_row(found, "erase", PROBES, steps=None, quality=0.104)
    set_row(found, "erase", ["ridge"], steps=1, quality=0.7)
    said = decide(found, "erase")
    assert effects(said).startswith("nothing left for plain gradient descent; no protection "
                                    "against ridge, 70.0 of 81.5 (1 solve)")  # fmt: skip


def test_verdict_partial_recovery_and_nothing_left_for_anyone(found):
    set_row(found, "erase", WEIGHTS[:3], steps=None, quality=0.41)
    assert effects(decide(found, "erase")).split("; ")[1].startswith("fine-tuning with SGD gets "
                                                                     "41.0 of")  # fmt: skip
    set_row(found, "erase", WEIGHTS[:3], steps=None, quality=0.101)
    said = decide(found, "erase")
    assert "nothing left for attackers of the weights (10.1 of" in effects(said)


def test_verdict_not_attacked_and_attacks_that_failed(found):
    for row in found["rows"]:
        if row["model"] == "erase":
            row |= {"status": "failed", "reason": "out of memory"}
    said = decide(found, "erase")
    assert (said.tone, said.headline) == (
        "open",
        "No attack on the harmful task was completed: 10 failed, 0 do not apply.",
    )
    drop(found, "erase", set(assessment_fixture.ATTACKERS))
    said = decide(found, "erase")
    assert (said.tone, said.headline) == ("open", "Not attacked on the harmful task.")


def test_verdict_says_which_family_was_not_run(found):
    drop(found, "condition_gap", WEIGHTS)
    said = decide(found, "condition_gap")
    assert effects(said).endswith("; its weights were not attacked.")
    assert "no attackers of the weights" in said.threat_model
    drop(found, "limit@t=1", PROBES)
    assert effects(decide(found, "limit@t=1")).startswith("no probe on its features was run;")
    for name in WEIGHTS:
        row_of(found, "erase", name)["status"] = "failed"
    assert "no attacker of the weights finished" in effects(decide(found, "erase"))


def test_verdict_of_the_undefended_model_and_without_one(found):
    said = decide(found, "none")
    assert said.tone == "reference"
    assert said.headline == (
        "Undefended: broken by conjugate gradients for 26.0 MFLOP (13 steps), the cheapest "
        "attacker."
    )
    alone = assessment_fixture.make_assessment(models=("limit@t=1",))
    said = decide(alone, "limit@t=1")
    assert said.tone == "alone"
    assert said.headline.endswith("no undefended model to compare with.")
    assert not any("undefended cost" in text for text in said.sentences)
    set_row(alone, "limit@t=1", PROBES + WEIGHTS[:2] + WEIGHTS[3:], steps=None)
    assert decide(alone, "limit@t=1").headline.startswith(
        "No attacker breaks it; fine-tuning with SGD gets furthest, 84.5"
    )


def test_verdict_states_the_worst_case_with_interval_and_bound(found):
    kept, free = (model_of(found, "limit@t=1")[key] for key in ("break", "break_unbounded"))
    kept |= {"flops": None, "attacker": None, "ratio": 40.0, "bound": ">", "lower": None,
             "upper": None, "highest_harm": 0.5, "utility_bound": 0.81}  # fmt: skip
    free |= {"flops": 5e9, "attacker": "ridge", "ratio": 12.3, "bound": "=", "lower": 8.1,
             "upper": 17.0, "highest_harm": 0.8}  # fmt: skip
    said = decide(found, "limit@t=1")
    assert tuple(text for text in said.sentences if text.startswith("Worst case")) == (
        "Worst case over attackers, utility kept at 81.0 or more: not broken by 40.0× the own "
        "undefended steps of each that counts; highest harm 50.0.",
        "Worst case over attackers, whatever is left of the utility: broken by ridge for 5.00 "
        "GFLOP, 12.3× (8.10 to 17.0) the undefended cost; highest harm 80.0.",
    )


def test_verdict_of_r_squared_is_not_in_per_cent(found):
    found["data"] |= {"metric": "r2", "chance": None}
    set_row(found, "erase", PROBES, steps=None, quality=0.004)
    assert effects(decide(found, "erase")).startswith(
        "nothing left for a linear probe (0.004 of 0.800, chance 0.000);"
    )


# ---------------------------------------------------------------- tables


def test_verdict_says_what_conditioning_acts_on(found):
    model = found["models"][1]
    model["conditioning"] = {
        "log_ratio_harmful": math.log(200.0), "log_ratio_primary": math.log(0.5),
        "log_rir": math.log(400.0), "log_rir_limit": 14.0, "log_fraction": 0.7564,
        "log_rir_held_out": math.log(3.0),
        "dominated_by": {"primary": "none", "harmful": "damping"},
    }  # fmt: skip
    sentences = verdict.decide(found, model).sentences
    after = fit_of(found, "gd", "condition_gap")["steps_to_loss_gap"]["1e-2"]
    steps = f"Plain gradient descent to 1 % excess loss: harmful task 120 → {after:,} steps."
    assert steps in sentences
    assert (
        "Condition numbers, training rows: harmful 200× larger, primary 2.00× smaller; RIR 400, "
        "0.756 of the limit in logarithm; RIR on held-out rows 3.00."
    ) in sentences
    model["conditioning"]["dominated_by"]["harmful"] = "rounding"
    assert not any("Condition numbers" in text for text in verdict.decide(found, model).sentences)
    bare = verdict.decide(found, found["models"][0]).sentences
    assert "Plain gradient descent to 1 % excess loss: harmful task 120 steps." in bare


def test_verdict_warns_where_conditioning_went_the_wrong_way(found):
    model = found["models"][1]
    model["conditioning"] = {"log_ratio_harmful": -math.log(4.0), "log_rir": -math.log(50.0),
                             "log_ratio_primary": math.log(12.5)}  # fmt: skip
    warnings = verdict.decide(found, model).warnings
    assert any("harmful task easier" in w and "falls to 0.250 of" in w for w in warnings)
    assert any("primary task harder" in w and "grows 12.5×, (ii) > 1" in w for w in warnings)
    model["conditioning"] |= {"log_ratio_harmful": 0.04, "log_ratio_primary": 0.04}
    assert not [w for w in verdict.decide(found, model).warnings if "condition number" in w]


def test_leaderboard_is_sorted_by_ratio_then_harm(found):
    values = {"none": (1.0, "=", 0.9), "condition_gap": (5.0, ">", 0.7),
              "limit@t=1": (5.0, "=", 0.6), "erase": (None, "?", 0.1)}  # fmt: skip
    for label, (ratio, bound, harm) in values.items():
        model = model_of(found, label)
        model["break_unbounded"] |= {"ratio": ratio, "bound": bound, "highest_harm": harm,
                                     "lower": None, "upper": None}  # fmt: skip
        model["conditions"]["resistance"]["holds"] = "no"
    table = assessment_tables.leaderboard([found])
    # Never broken is first, whatever was tried.
    assert [row[0] for row in table.rows] == ["condition_gap", "limit@t=1", "none", "erase"]
    assert [row[2] for row in table.rows] == ["not broken, budgets to 5.00×", "5.00×", "1.00×", "–"]
    model_of(found, "none")["break_unbounded"] |= {"ratio": None, "bound": ">"}  # without a number
    assert assessment_tables.leaderboard([found]).rows[1][:3] == ("none", "90.0", "not broken")
    # What is said of resistance goes before any ratio.
    for label, holds in (("erase", "yes"), ("limit@t=1", "unknown"), ("none", "weak")):
        model_of(found, label)["conditions"]["resistance"]["holds"] = holds
    order = [row[0] for row in assessment_tables.leaderboard([found]).rows]
    assert order == ["erase", "limit@t=1", "none", "condition_gap"]


def test_leaderboard_groups_experiments_and_tells_equal_labels_apart(found):
    other = assessment_fixture.make_assessment(name="mnist", models=("none", "erase"))
    again = assessment_fixture.make_assessment(models=("none", "erase"))
    model_of(again, "erase")["hash"] = "feed" * 16
    again["code"] = "another"
    table = assessment_tables.leaderboard([found, other, again])
    assert [row[0] for row in table.rows] == ["cifar_pets"] * 5 + ["mnist"] * 2
    erased = [row[1] for row in table.rows if row[1].startswith("erase (")]
    assert sorted(erased)[1] == "erase (feedfeed)"
    assert sum(row[1] == "none" for row in table.rows) == 2  # the same model counts once
    assert "different protocols, levels or code: cifar_pets." in table.note
    with pytest.raises(ValueError, match="at least one assessment"):
        assessment_tables.leaderboard([])


def test_heat_maps_colour_and_mark(found):
    row_of(found, "limit@t=1", "gd")["quality"] = None
    heat = heat_maps.quality_map(found)
    assert [len(members) for _, members in heat.families] == [len(PROBES), len(WEIGHTS)]
    cells = {
        (row.attacker, label): cell
        for _, members in heat.families
        for row in members
        for label, cell in zip(heat.models, row.cells, strict=True)
    }
    free = [row_of(found, "none", name)["quality"] for name in assessment_fixture.ATTACKERS]
    top = max(quality["mean"] for quality in free if quality)
    ridge = row_of(found, "none", "ridge")["quality"]["mean"]
    expected = round(100 * (ridge - 0.1) / (top - 0.1))
    assert cells["ridge", "none"] == ("81.5", "80.7 to 82.3", "hot", expected)
    assert cells["ridge", "erase"].level == 0
    assert cells["gradient descent", "limit@t=1"].tone == "none"
    assert cells["lora adam", "limit@t=1"][0::2] == ("failed", "failed")
    assert cells["undo map", "none"][0::2] == ("n/a", "na")
    assert "not finite" in cells["lora adam", "limit@t=1"].detail
    ratios = heat_maps.ratio_map(found)
    ((gd, *_),) = [members for name, members in ratios.families if name.startswith("Probes")]
    assert [cell.tone for cell in gd.cells] == ["none", "cool", "cool", "cool"]
    assert gd.cells[0].text == "412 MFLOP"
    assert gd.cells[1].level == round(100 * math.log10(float(gd.cells[1].text[:-1])) / 2)


def test_tables_are_rectangular_and_nothing_is_dropped(found):
    made = assessment_tables.all_tables(found)
    made += [assessment_tables.choices(found, name) for name in assessment_fixture.ATTACKERS]
    for table in made:
        assert table.rows, table.title
        assert {len(row) for row in table.rows} == {len(table.columns)}
    lost = assessment_tables.failed(found)
    assert len(lost.rows) == found["cells"]["failed"] + found["cells"]["not_applicable"]
    assert lost.rows[0][0] == "failed"
    severities = [row[0] for row in assessment_tables.flags(found).rows]
    assert severities == sorted(severities, reverse=True)  # warnings first
    chosen = sum(len(table.rows) for table in made[-len(assessment_fixture.ATTACKERS) :])
    assert chosen == found["cells"]["done"]


def test_choices_name_the_grid_and_what_became_of_each_cell(found):
    table = assessment_tables.choices(found, "gd")
    row = next(row for row in table.rows if row[:2] == ("none", "harmful"))
    assert row[2] == "learning rate 0.01"
    grid = row[-1].replace("\u00a0", " ")
    assert grid == "learning rate: 0.001 → 78.0; 0.01 → 80.0; 0.1 → diverged"
    assert row[5] == "–"  # a probe leaves the utility alone
    kept = next(row for row in assessment_tables.choices(found, "fine_tune_sgd").rows
                if row[:2] == ("none", "harmful"))[5]  # fmt: skip
    assert kept.startswith("learning rate 0.001, stop ")
    assert len(assessment_tables.choices(found, "gd", grids=False).columns) == 8


def fit_of(found, attacker, model, task="harmful"):
    place = (attacker, model, task)
    (row,) = (r for r in found["rows"] if (r["attacker"], r["model"], r["task"]) == place)
    return row["fit"]


def test_steps_to_fit_are_those_of_the_rows(found):
    table = assessment_tables.steps_to_fit(found)
    assert [column.heading for column in table.columns[1:]] == [
        label.replace("_", " ") for label in assessment_fixture.MODELS
    ]
    rows = {row[0]: row[1:] for row in table.rows}
    probes = [key for key, value in assessment_fixture.ATTACKERS.items() if value[0] == "probe"]
    assert len(rows) == len(probes)  # attackers of the weights have no optimum
    gd = fit_of(found, "gd", "none")["steps_to_loss_gap"]
    assert rows["gradient descent"][0] == f"{gd['1e-2']:,}" == "120"
    assert rows["gradient descent"][2] == "> 20,000"  # 2,000 times slower
    tasks = [one.title for one in assessment_tables.all_steps_to_fit(found)]
    assert tasks == [f"Steps to fit, task {task}" for task in assessment_fixture.TASKS]


def test_csv_has_the_steps_of_every_target(found):
    lines = list(csv.DictReader(io.StringIO(assessment_tables.assessment_csv(found))))
    for line, row in zip(lines, found["rows"], strict=True):
        for key in ("steps_to_loss_gap", "steps_to_parameter_error"):
            for target in ("1e-1", "1e-2", "1e-3"):
                text = line[f"{key}_{target}"]
                assert (int(text) if text else None) == (row["fit"] and row["fit"][key][target])
        own = json.loads(line["fit"])
        assert (own and own["hyper_parameters"]) == (row["fit"] and row["fit"]["hyper_parameters"])


def test_csv_of_curves_has_every_recorded_point(found):
    lines = list(csv.DictReader(io.StringIO(assessment_tables.curves_csv(found))))
    curves = [row["curve"] for row in found["rows"] if row["curve"]]
    assert len(lines) == sum(len(curve["step"]) for curve in curves)
    for attacker in ("gd", "fine_tune_adam"):
        own = [line for line in lines if (line["attacker"], line["model"], line["task"])
               == (attacker, "none", "harmful")]  # fmt: skip
        (row,) = [row for row in found["rows"] if (row["attacker"], row["model"], row["task"])
                  == (attacker, "none", "harmful")]  # fmt: skip
        assert [int(line["step"]) for line in own] == row["curve"]["step"]
        assert [float(line["quality"]) for line in own] == row["curve"]["quality"]
        fit = row["fit"] and row["fit"]["curve"]["relative_excess_loss"]
        excess = [line["relative_excess_loss"] for line in own]
        assert ([float(text) for text in excess] if any(excess) else None) == fit
        assert [bool(line["utility"]) for line in own] == [bool(row["curve"]["utility"])] * len(own)


def test_csv_has_a_line_a_row_and_the_raw_numbers(found):
    for content in (found, assessment_fixture.nulls(assessment_fixture.make_assessment())):
        reader = csv.DictReader(io.StringIO(assessment_tables.assessment_csv(content)))
        lines = list(reader)
        assert tuple(reader.fieldnames) == assessment_tables.CSV_COLUMNS
        assert len(lines) == len(content["rows"])
        for line, row in zip(lines, content["rows"], strict=True):
            assert [line[key] for key in ("model", "attacker", "task", "status")] == [
                row[key] for key in ("model", "attacker", "task", "status")
            ]
            quality = row["quality"] or {"mean": None, "lower": None}
            for text, value in (
                (line["quality"], quality["mean"]),
                (line["quality_lower"], quality["lower"]),
                (line["flops_to_break"], row["flops_to_break"]),
                (line["loss_end"], (row["loss"] or {"end": None})["end"]),
            ):
                assert (float(text) if text else None) == value
            assert json.loads(line["grid"]) == row["grid"]
            assert json.loads(line["by_seed"]) == row["by_seed"]


def test_markdown_is_rectangular_escaped_and_has_the_numbers(found):
    found["models"][3]["label"] = evil = "e|<script>"
    for row in [*found["rows"], *found["certificates"]]:
        row["model"] = evil if row["model"] == "erase" else row["model"]
    text = assessment_tables.assessment_markdown(found)
    assert "<script>" not in text
    assert "e\\|&lt;script&gt;" in text
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(blocks) >= 8
    for block in blocks:
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    board = next(block for block in blocks if "cost-to-break" in block)
    for model in found["models"]:
        name = model["label"].replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")
        line = next(line for line in board.splitlines() if line.startswith(f"| {name} "))
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
        np.testing.assert_allclose(float(cells[2]), 100 * model["break_unbounded"]["highest_harm"],
                                   atol=0.05)  # fmt: skip
        np.testing.assert_allclose(
            float(cells[3].split("×")[0].replace(",", "")), model["break_unbounded"]["ratio"],
            rtol=0.006,
        )  # fmt: skip
    assert found["cells"]["digest"] in text


def test_terminal_fits_its_width(found):
    console = Console(width=80, file=io.StringIO())
    for part in assessment_tables.terminal_assessment(found, width=80):
        console.print(part)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for words in ("Leaderboard", "Cost of harm", "condition_gap", "Resistance weak", "warning",
                  "lora adam on limit@t=1"):  # fmt: skip
        assert words in text


# ---------------------------------------------------------------- page


def test_page_is_well_formed_small_and_loads_nothing(page_text):
    reader = Reader(page_text)
    assert reader.stack == []
    assert len(page_text.encode()) < 2_000_000
    assert "http" not in page_text
    assert "@import" not in page_text
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(reader.tags)
    assert not [a for a in reader.attributes if a[1] == "src"]
    links = {value for _, name, value in reader.attributes if name in ("href", "xlink:href")}
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert {link[1:] for link in links} <= set(ids)
    assert all(link.startswith("#") for link in links)
    # two curves of harm; two sorts of probes and the attackers of the weights, a panel a model
    assert reader.tags.count("svg") == 2 + 3 * len(assessment_fixture.MODELS)


def test_page_has_the_sections_in_order(page_text):
    sections = re.findall(r'<section id="(\w+)"', page_text)
    assert sections == ["leaderboard", "verdict", "classes", "curves", "heat", "fits", "conditions",
                        "together", "flags", "choices", "failed", "protocol"]  # fmt: skip
    for name, body in re.findall(r'<section id="(\w+)">(.*?)</section>', page_text, re.DOTALL):
        if "<svg" in body or "heat" in name:
            assert "How to read it:" in body


def test_page_states_the_facts(page_text, found):
    text = " ".join("".join(Reader(page_text).text).split())
    for model in found["models"]:
        said = decide(found, model["label"])
        for sentence in (said.headline, said.threat_model, *said.sentences, *said.warnings):
            assert sentence in text
        assert model["hash"][:16] in text
    for flag in [*found["flags"], *(flag for m in found["models"] for flag in m["flags"])]:
        assert flag["message"] in text
    for row in found["rows"]:
        if row["reason"]:
            assert row["reason"] in text
    for words in (
        found["command"], found["cells"]["digest"], "jax 0.12.0.1", "100, 101 to choose",
        "0, 1, 2 to report", "gd 20000; ridge 1", "krylov floor", "fine-tuning with Adam",
        "head floor 0.8 accuracy (every model)", "standard",
    ):  # fmt: skip
        assert words in text


def test_page_escapes_every_text_of_an_assessment(found):
    evil = '<script>alert("x")</script>'
    for row in [*found["rows"], *found["certificates"]]:
        row["model"] = evil if row["model"] == "erase" else row["model"]
    for row in found["rows"]:
        row["attacker"] = evil if row["attacker"] == "gd" else row["attacker"]
        row["hyper_parameters"], row["grid"] = {evil: evil}, [{evil: evil, "selection": 0.5}]
        row["reason"] = evil
    found["attackers"][0] |= {"name": evil, "kind": evil, "what": evil}
    found["models"][3] |= {"label": evil, "method": evil, "hash": evil}
    found["models"][3]["portfolio"] |= {"winner": evil, "hyper_parameters": {evil: evil}}
    found["models"][3]["flags"] = [
        {"code": evil, "severity": "info", "message": evil, "caps": False}
    ]
    found["models"][3]["break"]["attacker"] = evil
    for condition in found["models"][3]["conditions"].values():
        condition |= {"attacker": evil, "meaning": evil}
    found |= {"name": evil, "level": evil, "command": evil, "code": evil, "versions": {evil: evil},
              "device": {evil: [evil]}}  # fmt: skip
    for key in ("name", "description", "source"):
        found["data"][key] = evil
    found["data"]["tasks"]["primary"]["name"] = evil
    found["protocol"] |= {"loop": evil, "probe_steps": {evil: 1}}
    for row in found["certificates"]:
        row |= {"name": evil, "threat_model": evil, "unit": evil, "target": evil}
    found["cells"]["digest"] = evil
    assessment_record.validate(found)
    text = page.render_assessment(found, title=evil)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "script" not in Reader(text).tags


def test_page_of_one_model_and_of_nulls(tmp_path):
    one = assessment_fixture.make_assessment(models=("limit@t=1",))
    empty = assessment_fixture.nulls(assessment_fixture.make_assessment())
    bare = one | {"models": [], "rows": [], "certificates": [], "attackers": []}
    for content, words in (
        (one, 'No undefended model (method "none")'),
        (empty, "No flags were raised."),
        (bare, "Every attack finished."),
    ):
        assessment_record.validate(content)
        path = tmp_path / "page.html"
        page.write_assessment_page(content, path, title="One")
        text = path.read_text(encoding="utf-8")
        assert "<title>One</title>" in text
        assert words in " ".join("".join(Reader(text).text).split())
        assert Reader(text).stack == []
        assert not re.search(r"\b(nan|None|inf)\b", "".join(Reader(text).text))
        assert assessment_tables.assessment_markdown(content)
        assert assessment_tables.terminal_assessment(content)
        assert [item.name for item in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.slow
def test_page_leaves_out_the_grids_where_it_would_grow_too_large(found, page_text, monkeypatch):
    whole = page_text
    monkeypatch.setattr(page, "LIMIT", len(whole.encode()) - 1)
    short = page.render_assessment(found)
    assert len(short) < len(whole)
    assert "The grids are left out here" in short
    assert "0.1\u00a0→\u00a0diverged" in whole
    assert "0.1\u00a0→\u00a0diverged" not in short


@pytest.mark.heavy
def test_page_is_the_same_for_the_same_assessment_and_a_failed_write_keeps_the_old_one(
    found, page_text, tmp_path, monkeypatch
):
    assert page.render_assessment(found) == page_text
    path = tmp_path / "page.html"
    path.write_text("old")
    monkeypatch.setattr(page.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        page.write_assessment_page(found, path)
    assert path.read_text() == "old"


# ---------------------------------------------------------------- figures


def test_cost_curves_step_where_the_numbers_say():
    line = figures.Line([0.0, 1e3, 1e5], [0.1, 0.5, 0.9], 2, floors=(1e4,))
    svg = figures.cost_curves([line], alt='a "b"', ylabel="y", threshold=0.8, chance=0.1)
    points = max(drawn_points(svg, "--c2"), key=len)
    xs, ys = points[:, 0], points[:, 1]
    # Free of charge at the left edge, then steps that hold until the next cost.
    assert np.all(np.diff(xs) >= 0)
    assert ys[1] == ys[0]
    assert xs[1] == xs[2]
    heights = np.unique(ys)[::-1]
    assert len(heights) == 3
    np.testing.assert_allclose(
        (heights[0] - heights[1]) / (heights[0] - heights[2]), 0.5, atol=0.01
    )
    (floor,) = re.findall(r'<path d="M ([\d.]+) [^"]*"[^>]*stroke-width: 2\.4', svg)
    np.testing.assert_allclose(float(floor), (xs.min() + xs.max()) / 2, atol=0.6)
    assert ">broken</text>" in svg
    assert 'aria-label="a &quot;b&quot;"' in svg


def drawn_paths(svg, colour):
    """Vertices of every line in one colour, and whether it is dashed."""
    return [
        (np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), float), "dasharray" in style)
        for path, style in re.findall(
            r'<path d="([^"]*)"[^>]*style="([^"]*stroke: var\(' + colour + r'\)[^"]*)"', svg
        )
        if path.count("L") > 1
    ]


def test_curves_of_probes_are_drawn_against_the_undefended_model(found):
    none, gap = found["models"][:2]
    rows = page._curve_rows(found, [none, gap], weights=False)
    assert [row.heading for row in rows] == [
        "Probes that follow gradients, task harmful",
        "Probes with curvature or closed forms, task harmful",
    ]
    assert [key.name for key in rows[0].legend] == ["gradient descent", "heavy ball", "Adam"]
    bare, defended = (drawn_paths(panel.svg, "--c0") for panel in rows[0].panels)
    assert [dashed for _, dashed in bare] == [False]
    assert sorted(dashed for _, dashed in defended) == [False, True]
    # 45 times slower: later at each height, and so further right where it is cut.
    ends = {dashed: points[:, 0].max() for points, dashed in defended}
    assert ends[False] > ends[True]
    for one in found["rows"]:
        one["fit"] = None
    assert page._curve_rows(found, [none, gap], weights=False) == []


def test_curves_of_the_weights_are_those_of_who_gets_furthest(found, monkeypatch):
    models = found["models"][:2]
    (row,) = page._curve_rows(found, models, weights=True)
    assert row.heading == "Attackers of the weights, task harmful"
    assert len(row.panels) == 2
    monkeypatch.setattr(figures, "PALETTE_SIZE", 2)
    (row,) = page._curve_rows(found, models, weights=True)
    kept = [key.name for key in row.legend]
    assert kept == ["fine-tuning with SGD", "fine-tuning with Adam"]


def test_quality_curves_are_drawn_where_the_numbers_say():
    def ends(values):
        curve = figures.Curve((0, 1, 10, 100), values, 0, True)
        svg = figures.quality_curves([curve], alt="a", furthest=100)
        return drawn_paths(svg, "--c0")[0][0]

    low, middle, high = ends((0.0, 0.2, 0.4, 0.8))
    assert middle[0] - low[0] == pytest.approx(high[0] - middle[0], abs=0.1)  # log steps
    assert high[1] - middle[1] == pytest.approx(2 * (middle[1] - low[1]), abs=0.1)
    cut, zero, _ = ends((0.0, -3.0, 0.0, 0.5))
    assert cut[1] == zero[1]  # worse than guessing


def test_cost_curves_of_nothing():
    line = figures.Line([None], [None], 0)
    assert "<svg" in figures.cost_curves([line, line], alt="a", ylabel="y")
    assert "<svg" in figures.cost_curves([], alt="a", ylabel="y")


def test_a_diverged_or_collapsed_attack_is_no_protection(found):
    rows = {row["attacker"]: row for row in found["rows"]
            if (row["model"], row["task"]) == ("limit@t=1", "harmful")}  # fmt: skip
    lost = {"diverged": True, "quality": None, "best_quality": 0.1, "flops_to_break": None}
    rows["fine_tune_sgd"] |= lost
    rows["gd"] |= {"quality": {"mean": 0.01, "lower": 0.0, "upper": 0.02}, "best_quality": 0.1,
                   "flops_to_break": None}  # fmt: skip
    model = model_of(found, "limit@t=1")
    compared = {one.name: one
                for one in verdict.comparisons(found, model, task="harmful")}  # fmt: skip
    sgd, gd = compared["fine_tune_sgd"], compared["gd"]
    assert (sgd.diverged, sgd.slowed, sgd.nothing_left, sgd.ratio.bound) == (
        True,
        False,
        False,
        "?",
    )
    assert not gd.nothing_left  # far below chance
    said = decide(found, "limit@t=1")
    assert any("diverged, which says nothing: fine-tuning with SGD" in s for s in said.sentences)


def test_a_defence_that_speeds_more_up_than_it_slows_is_called_so(found):
    for row in found["rows"]:
        if row["task"] == "harmful" and row["status"] == "done":
            free = row["model"] == "none"
            row |= {"flops_to_break": 1e8 if free or row["attacker"] == "gd" else 1e6}
            if not free and row["attacker"] == "gd":
                row["flops_to_break"] = 1e10
    assert decide(found, "condition_gap").tone == "mixed"  # as its resistance is said to be
    model_of(found, "condition_gap")["conditions"]["resistance"]["holds"] = "no"
    assert decide(found, "condition_gap").tone == "worse"


def test_the_least_slowed_attacker_of_the_weights_stands_beside_the_strongest(found):
    """Quality is quoted of whoever gets furthest, cost of whoever is stopped least."""
    set_row(found, "condition_gap", ["fine_tune_sgd"], steps=30_000)
    said = effects(decide(found, "condition_gap"))
    assert "fine-tuning with SGD recovers 84.5 of 84.5, slowed" in said
    assert said.endswith("breaks it at about the undefended cost.")


def test_curves_are_those_of_the_undefended_and_of_the_hardest_models(monkeypatch, found):
    monkeypatch.setattr(page, "LINES", 2)
    model_of(found, "limit@t=1")["break_unbounded"] |= {"ratio": 99.0, "bound": "="}
    text = page.render_assessment(found)
    keys = re.search(r'<section id="curves">.*?<ul class="key">(.*?)</ul>', text, re.DOTALL)
    assert keys is not None
    names = re.findall(r"</span>([^<]+)</li>", keys[1])
    assert names[0] == "none"
    board = [row[0] for row in assessment_tables.leaderboard([found]).rows]
    assert names[1] == next(name for name in board if name != "none")
    assert "of 2 more there are only tables" in text


# ---------------------------------------------------------------- stored verdicts, lost utility


def test_the_document_holds_what_the_rows_say(found):
    stored = {model["label"]: model["verdict"] for model in found["models"]}
    for label, one in stored.items():
        said = decide(found, label)
        assert one["headline"] == said.headline
        assert one["sentences"] == list(said.sentences)
    assert verdict.with_verdicts(found) == found
    row = row_of(found, "condition_gap", "gd")
    np.testing.assert_allclose(
        row["ratio"]["value"], row["flops_to_break"] / row_of(found, "none", "gd")["flops_to_break"]
    )
    assert row_of(found, "none", "undo_map")["ratio"] == {"value": None, "bound": "?"}
    model_of(found, "erase")["verdict"]["headline"] = "As it was stored."
    assert "As it was stored." in page.render_assessment(found)


@pytest.mark.parametrize("version", assessment_record.EARLIER)
def test_documents_by_an_earlier_rule_are_refused_with_what_to_do(found, version, tmp_path, capsys):
    """They hold no reference, positive control or scores by row: no words can be made of them."""
    file = tmp_path / "assessment.json"
    file.write_text(json.dumps(found | {"schema": version}))
    with pytest.raises(ResultError, match=rf"{version} .*assess again, by `jaximm assess runs"):
        assessment_record.read(file)
    for command in ("report", "compare"):
        assert cli.main([command, str(tmp_path)]) == 1
        message = capsys.readouterr().err
        assert str(file) in message
        assert "assess again" in message
    with pytest.raises(ResultError, match="assessment/4"):
        assessment_record.validate(found | {"schema": "jaximm.assessment/4"})


def lose_utility(found, label, mean):
    model_of(found, label)["utility"] = assessment_fixture.interval(mean)
    return verdict.with_verdicts(found)


@pytest.mark.parametrize(
    ("metric", "free", "own", "kept"),
    [
        ("r2", 0.599, -3.767, False),
        ("r2", 0.599, 0.56, True),
        ("r2", 0.599, 0.53, False),  # below nine tenths
        ("accuracy", 0.92, 0.84, True),
        ("accuracy", 0.92, 0.5, False),
        ("r2", -0.2, -5.0, None),  # the undefended model has nothing to keep
    ],
)
def test_a_model_that_lost_its_own_task_is_not_green_and_not_first(found, metric, free, own, kept):
    found["data"]["utility_metric"] = metric
    model_of(found, "erase")["conditions"]["resistance"]["holds"] = "yes"
    found = lose_utility(lose_utility(found, "none", free), "erase", own)
    said = model_of(found, "erase")["verdict"]
    assert said["utility_kept"] is kept
    assert said["tone"] == ("costly" if kept is False else "good")
    board = assessment_tables.leaderboard([found])
    assert (board.rows[-1][0] == "erase") == (kept is False)
    assert ("'lost'" in board.note) == (kept is False)
    assert (", lost" in board.rows[-1][6]) == (kept is False)
    for _, members in heat_maps.ratio_map(found).families:  # nor is any of its costs green
        column = [row.cells[3] for row in members]
        assert any(cell.tone == "cool" for cell in column) <= (kept is not False)
    lead = assessment_tables.lead(found)
    assert lead.startswith("2 of 3" if kept is False else "3 of 3")
    assert ("erase" in lead) == (kept is not False)
    if own == -3.767:  # one drawn page is enough
        assert '<article class="verdict costly">' in page.render_assessment(found)


def test_the_page_opens_with_a_sentence_then_the_table_then_the_cards(page_text, found):
    lead = assessment_tables.lead(found)
    text = page_text.replace("&#39;", "'")
    places = [text.index(part) for part in (f'<p class="lead">{lead}</p>', "<table", "<article")]
    assert places == sorted(places)
    assert text[: places[1]].count("<p") == 1
    assert lead.endswith("(undefended 84.5).")
    alone = assessment_fixture.make_assessment(models=("limit@t=1",))
    assert "no undefended cost to compare with" in assessment_tables.lead(alone)
    assert assessment_tables.lead(alone).startswith("limit@t=1 is hardest")
    bare = assessment_fixture.make_assessment(models=("none",))
    assert assessment_tables.lead(bare) == "No defended model was assessed."


def test_the_leaderboard_has_a_page(found, tmp_path):
    other = assessment_fixture.make_assessment(name="mnist", models=("none", "erase"))
    page.write_leaderboard_page([found, other], tmp_path / "board.html")
    text = (tmp_path / "board.html").read_text()
    assert Reader(text).stack == []
    assert Reader(text).tags.count("tr") == 1 + 4 + 2
    assert "mnist: erase is hardest to break" in text
