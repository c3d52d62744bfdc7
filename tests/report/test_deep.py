"""Reports of deep results: groups of rows, recoverable accuracy."""

import copy
import csv
import io

import numpy as np
import pytest
import result_fixture

from jaximm import report
from jaximm.records import files
from jaximm.records.result import validate
from jaximm.report import formats, page, run_tables
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


def lose_rank(results):
    for result in results:
        for row in result["conditioning"]["damped"].values():
            for task in ("harmful", "primary"):
                row[task]["after"]["rank"] = row[task]["before"]["rank"] - 3
                row[task]["after"]["log_kappa"] = 44.0
            row |= {"log_ratio_harmful": 37.0, "log_ratio_primary": 38.0, "log_rir": -1.0}
    return results


# ---------------------------------------------------------------- groups of rows


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


def test_where_directions_are_gone_damped_numbers_are_not_shown(results):
    chosen = lose_rank(only(results, "limit"))
    table = run_tables.summary(grouping.group_results(chosen))
    assert table.rows[0][1:6] == (formats.MISSING,) * 5
    assert "limit: directions of the features are removed" in table.note
    assert "Without marks" in page.render(chosen)
    both = grouping.group_results([*only(results, "condition_gap"), *chosen])
    assert "of these condition_gap has the largest RIR" in run_tables.lead(both)


# ---------------------------------------------------------------- tables


def test_summary_has_groups_and_recoverable_accuracy(groups):
    table = run_tables.summary(groups)
    headings = [column.heading for column in table.columns]
    cells = dict(zip(headings, table.rows[1], strict=True))
    spread = grouping.group_rir(groups[1], "log_rir")
    assert spread is not None
    after_theta = grouping.ratio(groups[1], "log_rir", footing="shipped", split="held_out")
    assert after_theta is not None
    shown = cells["RIR held out, damped after theta"]
    assert shown == formats.from_log(after_theta.mean) != cells["RIR held out"]
    assert cells["RIR by group, held out"] == formats.from_log(spread.mean)
    assert cells["primary accuracy"] == "0.870→0.860"
    assert cells["harmful accuracy recoverable"] == "0.700→0.650"
    assert "linear map after the original features" in table.note


def test_linear_reports_have_none_of_it():
    linear = [result_fixture.make_result("limit", seed) for seed in (0, 1)]
    groups = grouping.group_results(linear)
    assert not run_tables.by_group(groups).rows
    headings = [column.heading for column in run_tables.summary(groups).columns]
    assert "RIR by group, held out" not in headings
    assert run_tables.utility(groups).title == "Quality of the best linear head"
    text = page.render(linear)
    for words in ("by group", "Deep", "shipped"):
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


def test_quality_says_whose_it_is(groups):
    table = run_tables.utility(groups)
    assert [row[1] for row in table.rows[:2]] == [
        "primary, the head that is shipped",
        "harmful, the best linear classifier",
    ]
    assert {row[2] for row in table.rows} == {"accuracy"}
    assert table.rows[3][-3:] == ("0.700 ± 0.000", "0.650 ± 0.000", "−0.050")


def test_csv_of_groups(results):
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


def test_markdown_has_every_table(results):
    text = report.markdown(results)
    for title in ("RIR by group (20 groups", "Quality of both tasks"):
        assert f"**{title}" in text


@pytest.mark.parametrize("width", [70, 120])
def test_terminal_shows_groups_within_its_width(results, width):
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
        "held-out accuracy",
        "training of the backbone itself can",
        "RIR by group, held-out rows",
        "mlp; trained: layers.1",
        f"{'a' * 16} before, {'b' * 16} after",
        f"{'a' * 16} after: the same numbers",
    ):
        assert words in page_text
    for words in ("R²", "12 inputs", "invertible linear backbone reaches"):
        assert words not in page_text
