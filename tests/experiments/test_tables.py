"""Means, deviations and medians of many runs, and the tables made of them."""

import math
import statistics

import assessment_fixture
import pytest

from experiments import tables as footings
from experiments.tables import (
    attack_steps,
    by_method,
    flatten,
    footing_tables,
    markdown_table,
    mean_sd,
    mean_sd_of_exp,
    median_steps,
    steps_table,
)
from experiments.trade import draw_trade, trade_table
from jaximm.immunisers.conditioning.limit import LimitChoice, LimitConfig
from jaximm.records import result
from tests import result_fixture

METHODS, SEEDS = ("none", "limit"), (0, 1, 2)


@pytest.fixture(scope="module")
def results():
    return result_fixture.make_results(METHODS, SEEDS)


@pytest.fixture(scope="module")
def records(results):
    return [
        {"method": found["method"], "case": found["seed"]} | flatten(found["conditioning"])
        for found in results
    ]


@pytest.fixture(scope="module")
def assessed():
    return assessment_fixture.make_assessment(tasks=("harmful", "benign:primary"))


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_flatten_names_every_ratio_by_footing_and_split(results):
    section = results[-1]["conditioning"]
    record = flatten(section)
    for footing in result.FOOTINGS:
        for split in result.SPLITS:
            row = section[footing][split]
            for name in footings.RATIOS:
                assert record[f"{footing}.{split}.{name}"] == row[name]
            for task in ("primary", "harmful"):
                assert record[f"{footing}.{split}.rank_{task}"] == row[task]["after"]["rank"]
    assert record["log_rir_limit"] == section["damped"]["train"]["log_rir_limit"]
    assert len(record) == 1 + len(result.FOOTINGS) * 2 * (len(footings.RATIOS) + 2)


def test_attack_steps_are_those_of_the_fit_on_the_undefended_model_and_on_this(assessed):
    record = attack_steps(assessed, "condition_gap", "gd")
    assert len(record) == 2 * 2 * 2
    for row in assessed["rows"]:
        sides = {"none": "before", "condition_gap": "after"}
        if row["attacker"] == "gd" and row["model"] in sides:
            task = {"harmful": "harmful", "benign:primary": "primary"}[row["task"]]
            place = f"gd.{task}.{sides[row['model']]}"
            assert record[f"{place}.loss"] == row["fit"]["steps_to_loss_gap"]["1e-2"]
            assert record[f"{place}.parameters"] == row["fit"]["steps_to_parameter_error"]["1e-2"]
    assert record["gd.harmful.after.loss"] == 45 * record["gd.harmful.before.loss"]
    assert attack_steps(assessed, "none", "nobody") == {}
    assert attack_steps(assessed, "none", "fine_tune_sgd") == {}  # of the weights: no optimum


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1.0, 2.0, 4.5], "2.50 (1.80)"),  # sd with n - 1
        ([3.0], "3.00 (0.00)"),
        ([1.0, None, 3.0, math.nan, math.inf], "2.00 (1.41)"),
        ([None], "-"),
        ([], "-"),
    ],
)
def test_mean_and_deviation_of_what_is_defined(values, shown):
    assert mean_sd([{"a": value} for value in values], "a") == shown


def test_a_missing_key_is_undefined():
    assert mean_sd([{"b": 1.0}, {"a": 2.0}], "a", 1) == "2.0 (0.0)"


def test_ratios_are_averaged_as_ratios():
    logs = [0.0, math.log(3.0)]
    shown = mean_sd_of_exp([{"a": value} for value in logs], "a")
    assert shown == "2 (1.41)"  # not exp of the mean log, 1.73
    assert mean_sd_of_exp([{"a": None}], "a") == "-"
    assert mean_sd_of_exp([{"a": math.log(4.0)}], "a") == "4 (0)"


@pytest.mark.parametrize(
    ("steps", "shown"),
    [
        ([7, 9, 8], "8"),
        ([12_345], "12,345"),
        ([5, -1, -1], "> budget"),
        ([5, 0, -1], "5"),
        ([5, 9], "9"),  # of two in the middle, the larger
        ([5, -1], "> budget"),
        ([None, 4], "4"),
        ([], "-"),
    ],
)
def test_median_of_steps(steps, shown):
    assert median_steps([{"a": value} for value in steps], "a") == shown


def test_groups_keep_the_order_of_appearance():
    records = [{"method": name, "case": i} for i, name in enumerate("baba")]
    groups = by_method(records)
    assert list(groups) == ["b", "a"]
    assert [record["case"] for record in groups["a"]] == [1, 3]


def test_a_markdown_table():
    assert markdown_table(["m", "x"], [["a", "1"], ["b", "2"]]).splitlines() == [
        "| m | x |",
        "| --- | ---: |",
        "| a | 1 |",
        "| b | 2 |",
    ]


def test_footing_tables_hold_the_means(results, records):
    parts = footing_tables(records).split("\n\n")
    titles, tables = parts[::2], parts[1::2]
    assert [title.split("*")[2] for title in titles] == [
        f"{footing}, {split} rows"
        for footing in ("damped", "pseudo-inverse", "reference")
        for split in ("train", "held-out")
    ]
    header, _, *rows = tables[0].splitlines()
    assert cells(header) == [
        "method", "log (i)", "log (ii)", "log RIR", "of limit", "(i)", "(ii)", "RIR"
    ]  # fmt: skip
    assert [cells(row)[0] for row in rows] == list(METHODS)
    logs = [
        found["conditioning"]["damped"]["train"]["log_rir"]
        for found in results
        if found["method"] == "limit"
    ]
    shown = cells(rows[1])
    assert shown[3] == f"{statistics.fmean(logs):.2f} ({statistics.stdev(logs):.2f})"
    assert shown[4] == "1.000 (0.000)"
    assert float(shown[7].split()[0]) == pytest.approx(
        statistics.fmean(map(math.exp, logs)), rel=1e-3
    )
    assert cells(rows[0])[3] == "0.00 (0.00)"
    # Only the measure has a limit.
    assert "of limit" not in tables[2] + tables[4]
    # Each table is of its own footing and split.
    held_out = [
        found["conditioning"]["reference"]["held_out"]["log_ratio_harmful"]
        for found in results
        if found["method"] == "limit"
    ]
    assert cells(tables[5].splitlines()[-1])[1] == (
        f"{statistics.fmean(held_out):.2f} ({statistics.stdev(held_out):.2f})"
    )


def test_the_table_of_steps():
    steps = {"none": (49, 49, 51), "limit": (7, -1, 9)}
    records = [
        {"method": method, "gd.harmful.after.loss": count}
        for method, counts in steps.items()
        for count in counts
    ]
    header, _, *rows = steps_table(records).splitlines()
    names = cells(header)
    column = names.index("harmful, 1 % loss, after")
    assert [cells(row)[column] for row in rows] == ["49", "9"]
    assert len(names) == 1 + 8
    assert steps_table(records, "nobody").splitlines()[-1] == "| limit" + " | -" * 8 + " |"


# The trade of the closed form over damping and t.

CELLS = [
    LimitChoice(LimitConfig(t=t, damping=damping, shrinkage=shrinkage), t + damping, 0.5 - t, 0.0)
    for shrinkage in (0.0, 0.1)
    for damping in (0.1, 0.001)
    for t in (1.0, 0.0)
]


def test_the_trade_is_shown_by_damping_and_t_without_shrinkage():
    chosen = LimitConfig(t=1.0, damping=0.1, shrinkage=0.1)
    table, last = trade_table(chosen, CELLS).split("\n\n")
    assert table.splitlines()[::2] == [
        "| damping | t = 0 | t = 1 |",
        "| 0.001 | 0.00 / 0.500 | 1.00 / -0.500 |",
    ]
    assert table.splitlines()[3] == "| 0.1 | 0.10 / 0.500 | 1.10 / -0.500 |"
    assert last == "Chosen: t = 1, damping = 0.1, shrinkage = 0.1."


def test_the_trade_is_drawn(tmp_path):
    path = tmp_path / "trade.svg"
    draw_trade(CELLS[0].config, CELLS, path, quality_before=0.4, title="A pair of tasks")
    text = path.read_text()
    for words in ("A pair of tasks", "damping 0.001", "damping 0.1", "raw quality - 0.02"):
        assert words in text
