"""Reports of deep results: groups of rows, fine-tuning attackers, recoverable accuracy."""

import copy
import csv
import io
import math
import re

import numpy as np
import pytest
import result_fixture

from jaximm import report
from jaximm.records import files
from jaximm.records.result import validate
from jaximm.report import answers, figures, formats, page, reading, run_tables
from jaximm.report import groups as grouping
from jaximm.report import table as tabular

METHODS = ("none", "condition_gap", "limit")


@pytest.fixture(scope="module")
def results():
    made = [
        files.plain(result_fixture.make_deep_result(method, seed))
        for method in METHODS
        for seed in (0, 1)
    ]
    for result in made:
        validate(result)
    return made


@pytest.fixture(scope="module")
def groups(results):
    return grouping.group_results(results)


@pytest.fixture(scope="module")
def page_text(results):
    return page.render(results)


def only(results, method):
    return [copy.deepcopy(result) for result in results if result["method"] == method]


def group_of(results, method):
    (group,) = grouping.group_results(only(results, method))
    return group


def set_accuracy_steps(results, attacker, *, before, after):
    """Overwrites what a fine-tuning attacker pays on the harmful task."""
    for result in results:
        for attack in result["attacks"]:
            if (attack["attacker"], attack["task"]) == (attacker, "harmful"):
                steps = {"before": before, "after": after}[attack["backbone"]]
                attack["steps_to_accuracy"] = steps
                attack["flops_to_accuracy"] = None if steps < 0 else 1e6 + steps * 1e9
    return results


def decide(results):
    (group,) = grouping.group_results(results)
    return answers.answer(group)


def lose_rank(results):
    for result in results:
        for row in result["conditioning"]["damped"].values():
            for task in ("harmful", "primary"):
                row[task]["after"]["rank"] = row[task]["before"]["rank"] - 3
                row[task]["after"]["log_kappa"] = 44.0
            row |= {"log_ratio_harmful": 37.0, "log_ratio_primary": 38.0, "log_rir": -1.0}
    return results


# ---------------------------------------------------------------- costs and classes of attackers


def test_fine_tuning_is_a_class_of_its_own_and_comes_last(groups):
    costs = grouping.attack_costs(groups[1], task="harmful")
    assert [cost.attacker for cost in costs[-2:]] == list(result_fixture.FINE_TUNERS)
    for cost in costs:
        assert cost.first_order + cost.informed + cost.fine_tuning == 1
    assert grouping.plain_attacker(costs[-2:]) is None


def test_fine_tuning_is_paid_for_by_accuracy_not_by_loss(results):
    chosen = set_accuracy_steps(only(results, "limit"), "fine_tune_adam", before=50, after=60)
    for result in chosen:
        for attack in result["attacks"]:
            if attack["kind"] == "fine-tuning":
                attack["steps_to_loss_gap"]["1e-2"] = 7
    (group,) = grouping.group_results(chosen)
    cost = grouping.attack_costs(group, task="harmful")[-1]
    assert (cost.before.steps, cost.after.steps, cost.steps_ratio) == (50, 60, 1.2)
    assert cost.flops_ratio == pytest.approx((1e6 + 60e9) / (1e6 + 50e9))
    row = next(a for a in chosen[0]["attacks"] if a["attacker"] == "fine_tune_adam")
    assert cost.accuracy_target == row["accuracy_target"]
    assert cost.before.accuracy == row["final_held_out_accuracy"]


def test_an_accuracy_that_is_not_reached_is_a_bound(results):
    chosen = set_accuracy_steps(only(results, "limit"), "fine_tune_adam", before=50, after=-1)
    (group,) = grouping.group_results(chosen)
    cost = grouping.attack_costs(group, task="harmful")[-1]
    assert math.isinf(cost.after.steps)
    assert (cost.bound, cost.steps_ratio) == (">", result_fixture.FINE_TUNE_BUDGET / 50)


def test_groups_of_rows_are_pooled_over_seeds(results, groups):
    for key in ("log_rir", "log_ratio_harmful"):
        rows = [result["groups"]["train"][key] for result in only(results, "limit")]
        found = grouping.group_rir(groups[2], key, split="train")
        assert found is not None
        assert found.mean == pytest.approx(np.mean([row["mean"] for row in rows]))
        assert found.sd == pytest.approx(np.sqrt(np.mean([row["sd"] ** 2 for row in rows])))
        assert found.n == 40


def test_groups_that_are_not_there_or_not_finite_are_nothing(results):
    linear = grouping.group_results([result_fixture.make_result("limit")])[0]
    assert grouping.group_rir(linear, "log_rir") is None
    (broken,) = grouping.group_results(only(results, "limit"))
    broken.results[0]["groups"]["held_out"]["log_rir"]["mean"] = None
    assert grouping.group_rir(broken, "log_rir") is None
    assert grouping.group_rir(broken, "log_rir", split="train") is not None


def test_paired_differences_have_the_measures_of_deep_results(groups):
    names = {row.measure for row in grouping.paired_differences(groups)}
    assert "log RIR by group, held-out rows" in names
    assert "recoverable harmful accuracy, held-out rows" in names


# ---------------------------------------------------------------- words


def test_verdict_has_a_clause_for_fine_tuning_that_is_not_stopped(results):
    chosen = set_accuracy_steps(only(results, "limit"), "fine_tune_adam", before=50, after=60)
    found = decide(chosen)
    assert found.tone == "mixed"
    assert found.headline.endswith(
        "fine-tuning with Adam reaches the undefended accuracy after 1.20× the steps (50 → 60 "
        "steps): no protection."
    )
    assert any(
        text.startswith("Fine-tuning with Adam: 50 → 60 steps to the undefended accuracy (target ")
        for text in found.sentences
    )


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (150, "slows fine-tuning with Adam 3.00× on the way to the undefended accuracy"),
        (-1, "slows fine-tuning with Adam more than 4.00× on the way"),
        (10, "makes fine-tuning with Adam 5.00× faster on the way"),
    ],
)
def test_verdict_says_what_happens_to_the_fine_tuner_slowed_least(results, after, words):
    chosen = set_accuracy_steps(only(results, "limit"), "fine_tune_adam", before=50, after=after)
    chosen = set_accuracy_steps(chosen, "fine_tune_sgd", before=1, after=-1)
    assert words in decide(chosen).headline


def test_fine_tuning_that_goes_on_unhindered_spoils_a_good_verdict(results):
    chosen = only(results, "limit")
    for result in chosen:
        result["attacks"] = [
            attack
            for attack in result["attacks"]
            if attack["kind"] in ("first-order", "fine-tuning")
        ]
    set_accuracy_steps(chosen, "fine_tune_sgd", before=50, after=-1)
    set_accuracy_steps(chosen, "fine_tune_adam", before=50, after=-1)
    assert decide(chosen).tone == "good"
    set_accuracy_steps(chosen, "fine_tune_adam", before=50, after=50)
    assert decide(chosen).tone == "mixed"


def test_verdict_states_groups_and_what_a_closed_form_recovers(results):
    text = " ".join(decide(only(results, "condition_gap")).sentences)
    mean = np.mean(
        [r["groups"]["held_out"]["log_rir"]["mean"] for r in only(results, "condition_gap")]
    )
    assert f"By group of 100 held-out rows (pseudo-inverse): log RIR {mean:.2f} ± " in text
    assert "recovers on held-out rows: 0.700 before, 0.650 after" in text
    assert "Primary accuracy of the head that is shipped on held-out rows: 0.870" in text
    assert "R²" not in text


def test_where_directions_are_gone_the_words_are_those_of_the_pseudo_inverse(results):
    chosen = only(results, "limit")
    expected = decide(copy.deepcopy(chosen)).warnings
    found = decide(lose_rank(chosen))
    text = " ".join(found.sentences)
    assert "rank: harmful 12 → 9, primary 12 → 9" in text
    ratio = float(
        np.mean([r["conditioning"]["pseudo_inverse"]["train"]["log_ratio_harmful"] for r in chosen])
    )
    assert f"training rows: harmful {formats.factor(ratio)} larger" in text
    assert found.warnings == expected  # (ii) of exp(38) is not believed
    table = run_tables.summary(grouping.group_results(chosen))
    assert table.rows[0][1:5] == (formats.MISSING,) * 4
    assert "limit: directions of the features are removed" in table.note
    assert "Without marks" in page.render(chosen)


def test_threat_model_names_fine_tuning_for_deep_results_only(groups):
    assert "fine-tuning attacker" in answers.threat_model(groups)
    linear = grouping.group_results([result_fixture.make_result("limit")])
    assert answers.threat_model(linear) == reading.note("threat_model")


# ---------------------------------------------------------------- tables


def test_summary_has_groups_recoverable_accuracy_and_fine_tuning(groups):
    table = run_tables.summary(groups)
    headings = [column.heading for column in table.columns]
    cells = dict(zip(headings, table.rows[1], strict=True))
    spread = grouping.group_rir(groups[1], "log_rir")
    assert spread is not None
    assert cells["RIR by group, held out"] == formats.from_log(spread.mean)
    assert cells["primary accuracy"] == "0.870→0.860"
    assert cells["harmful accuracy recoverable"] == "0.700→0.650"
    cost = grouping.attack_costs(groups[1], task="harmful")[-1]
    assert cost.attacker == "fine_tune_adam"  # slowed 1.2×, SGD four times
    assert cells["fine-tuning slowed"] == formats.multiple(cost.steps_ratio, cost.bound)
    assert "linear map after the original features" in table.note


def test_linear_reports_have_none_of_it():
    linear = [result_fixture.make_result("limit", seed) for seed in (0, 1)]
    groups = grouping.group_results(linear)
    assert not run_tables.by_group(groups).rows
    assert not run_tables.fine_tuning(groups[0]).rows
    headings = [column.heading for column in run_tables.summary(groups).columns]
    assert "fine-tuning slowed" not in headings
    assert "held-out accuracy" not in [
        column.heading for column in run_tables.costs(groups[0]).columns
    ]
    assert run_tables.utility(groups).title == "Quality of the best linear head"
    text = page.render(linear)
    for words in ("ine-tun", "by group", "Deep", "shipped"):
        assert words not in text
    with_deep = page.render([*linear, result_fixture.make_deep_result("limit")])
    assert "Limit (deep)" in with_deep


def test_table_of_groups_holds_the_means_and_names_the_protocol(results, groups):
    table = run_tables.by_group(groups)
    assert table.title == "RIR by group (20 groups of 100 rows, pseudo-inverse)"
    assert len(table.rows) == 2 * len(METHODS)
    spread = grouping.group_rir(groups[2], "log_rir", split="held_out")
    assert spread is not None
    assert table.rows[-1][0:2] == ("limit", "held-out")
    assert table.rows[-1][-2:] == (formats.mean_sd(spread), formats.from_log(spread.mean))
    other = only(results, "limit")
    other[0]["groups"]["held_out"]["groups"] = 7
    mixed = run_tables.by_group(grouping.group_results(other))
    assert mixed.title == "RIR by group (pseudo-inverse)"
    assert mixed.rows[1][2] == "20 of 100, 7 of 100"


def test_fine_tuning_has_its_own_table_of_costs(groups):
    probes, tuned = run_tables.costs(groups[1]), run_tables.fine_tuning(groups[1])
    assert not any("fine-tuning" in cell for row in probes.rows for cell in row)
    assert {row[0] for row in tuned.rows} == {"fine-tuning with SGD", "fine-tuning with Adam"}
    cost = grouping.attack_costs(groups[1], task="harmful")[-2]
    cells = dict(zip([c.heading for c in tuned.columns], tuned.rows[0], strict=False))
    assert cells["accuracy target"] == formats.decimal(cost.accuracy_target)
    assert cells["steps after"] == "> 200"
    ends = (formats.decimal(cost.before.accuracy), formats.decimal(cost.after.accuracy))
    assert cells["held-out accuracy"] == " → ".join(ends)
    assert "0.600 → 0.550" in probes.rows[0]


def test_quality_says_whose_it_is(groups):
    table = run_tables.utility(groups)
    assert [row[1] for row in table.rows[:2]] == [
        "primary, the head that is shipped",
        "harmful, the best linear classifier",
    ]
    assert {row[2] for row in table.rows} == {"accuracy"}
    assert table.rows[3][-3:] == ("0.700 ± 0.000", "0.650 ± 0.000", "−0.050")


def test_csv_of_groups_and_of_attacks(results):
    rows = list(csv.DictReader(io.StringIO(report.csv(results, what="groups"))))
    assert len(rows) == 2 * len(results)
    first = results[2]["groups"]["held_out"]
    (row,) = [
        r
        for r in rows
        if (r["method"], r["seed"], r["split"]) == ("condition_gap", "0", "held_out")
    ]
    assert float(row["log_rir_mean"]) == first["log_rir"]["mean"]
    assert float(row["log_ratio_primary_sd"]) == first["log_ratio_primary"]["sd"]
    attacks = list(csv.DictReader(io.StringIO(report.csv(results, what="attacks"))))
    tuned = [row for row in attacks if row["kind"] == "fine-tuning"]
    assert {row["accuracy_target"] for row in tuned} != {""}
    assert all(row["accuracy_target"] == "" for row in attacks if row["kind"] != "fine-tuning")
    linear = report.csv([result_fixture.make_result("limit")], what="attacks")
    assert "accuracy" not in linear.partition("\n")[0]


def test_markdown_has_every_table(results):
    text = report.markdown(results)
    for title in ("RIR by group (20 groups", "Cost to break by fine-tuning: limit"):
        assert f"**{title}" in text


@pytest.mark.parametrize("width", [70, 120])
def test_terminal_shows_groups_and_fine_tuning_within_its_width(results, width):
    from rich.console import Console

    def shown(*, everything):
        file = io.StringIO()
        console = Console(file=file, width=width)
        for part in run_tables.terminal(results, width=width, everything=everything):
            console.print(part)
        return file.getvalue()

    text = shown(everything=True)
    assert max(map(len, text.splitlines())) <= width
    flat = " ".join(text.split())
    assert "RIR by group (20 groups of 100 rows, pseudo-inverse)" in flat
    assert "Steps to the undefended accuracy by fine-tuning, harmful task" in flat
    line = next(line for line in text.splitlines() if line.startswith(" fine-tune SGD"))
    cost = grouping.attack_costs(grouping.group_results(results)[1], task="harmful")[-2]
    assert f"{cost.before.steps:.0f} ({cost.before.accuracy:.3f})" in line
    assert "RIR by group (20" not in shown(everything=False)


def test_short_quotients_in_headings_stay_whole():
    columns = [tabular.Column(heading, str, str) for heading in ("B / A", "after / before")]
    table = tabular.Table("t", columns, [1])
    headings = [str(column.header) for column in tabular.to_rich(table).columns]
    assert headings == ["B\u00a0/\u00a0A", "after\n/\nbefore"]


# ---------------------------------------------------------------- page


def test_page_says_what_deep_numbers_are(page_text):
    for words in (
        "12 features",
        "Fine-tuning, harmful task",
        "held-out accuracy",
        "training of the backbone itself can",
        "RIR by group, held-out rows",
        "FLOPs to the undefended accuracy",
        "mlp; trained: layers.1",
        f"{'a' * 16} before, {'b' * 16} after",
        f"{'a' * 16} after: the same numbers",
    ):
        assert words in page_text
    for words in ("R²", "12 inputs", "invertible linear backbone reaches"):
        assert words not in page_text


def test_page_draws_learning_curves_for_each_method_and_task(page_text):
    section = page_text.partition('id="attacks"')[2].partition('id="cost"')[0]
    assert len(re.findall(r'aria-label="Fine-tuning, \w+ task, ', section)) == 2 * len(METHODS)


def test_page_of_deep_results_without_attacks(results):
    bare = only(results, "limit")
    for result in bare:
        result["attacks"] = []
    text = page.render(bare)
    assert "Fine-tuning, harmful task" not in text
    assert "No attacks yet" in text


def test_a_panel_of_closed_forms_alone_is_not_drawn(results):
    chosen = only(results, "limit")
    for result in chosen:
        result["attacks"] = [a for a in result["attacks"] if a["attacker"] in ("gd", "ridge")]
    text = page.render(chosen)
    assert "Gradient-following attackers, harmful task" in text
    assert "Attackers with curvature or closed forms" not in text


def test_accuracy_curves_are_drawn_where_the_numbers_say():
    def ends(values):
        curve = figures.Curve((0, 1, 10, 100), values, 0, True, 0.4)
        svg = figures.accuracy_curves([curve], alt="a", furthest=100, top=0.8)
        path = re.search(r'<path d="(M [^"]*)" clip-path[^>]*style="[^"]*var\(--c0\)', svg)
        assert path is not None
        points = re.findall(r"([\d.]+) ([\d.]+)", path[1])
        return [(float(x), float(y)) for x, y in points]

    low, middle, high = ends((0.0, 0.2, 0.4, 0.8))
    assert middle[0] - low[0] == pytest.approx(high[0] - middle[0], abs=0.1)  # log steps
    assert high[1] - middle[1] == pytest.approx(2 * (middle[1] - low[1]), abs=0.1)
    assert len(ends((0.1, 0.2, None, 0.8))) == 2


def test_costs_of_probes_and_of_fine_tuning_are_drawn_apart(groups):
    probes = page._cost_panels(groups, fine_tuning=False)
    tuned = page._cost_panels(groups, fine_tuning=True)
    assert len(probes) == len(tuned) == len(METHODS)
    for panel in probes:
        assert "fine-tune" not in panel.svg
        assert "FLOPs to 1 % excess loss" in panel.svg
    for panel in tuned:
        assert all(name in panel.svg for name in ("fine-tune SGD", "fine-tune Adam"))
        assert "ridge" not in panel.svg
