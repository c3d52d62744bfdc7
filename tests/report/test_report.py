"""Reports: the words, the tables and the page say what the rows say."""

import copy
import csv
import html.parser
import io
import math
import re

import numpy as np
import pytest
import result_fixture
from rich.console import Console

from jaximm import report
from jaximm.cli.output import MARK
from jaximm.records import files
from jaximm.records.result import EARLIER, FOOTINGS, SPLITS, validate
from jaximm.report import figures, formats, page, run_tables
from jaximm.report import groups as grouping


@pytest.fixture(scope="module")
def results():
    made = [files.plain(result) for result in result_fixture.make_results()]
    for result in made:
        validate(result)
    return made


@pytest.fixture(scope="module")
def page_text(results):
    return page.render(results)


def only(results, method):
    return [copy.deepcopy(result) for result in results if result["method"] == method]


# ---------------------------------------------------------------- grouping and statistics


def test_groups_are_methods_and_their_results_are_ordered_by_seed(results):
    groups = grouping.group_results(results[::-1])
    assert [group.label for group in groups] == list(result_fixture.METHODS)[::-1]
    assert all([r["seed"] for r in group.results] == [0, 1, 2] for group in groups)


def test_one_seed_twice_is_told_apart_by_its_config_and_a_copy_counts_once(results):
    first = only(results, "limit")[0]
    second = copy.deepcopy(first)
    first["config"]["method"]["t"], second["config"]["method"]["t"] = 0.0, 1.0
    labels = [g.label for g in grouping.group_results([first, second, copy.deepcopy(first)])]
    assert labels == ["limit (t=0.0)", "limit (t=1.0)"]


def test_labels_name_experiment_and_start_only_where_they_differ(results):
    first, second = only(results, "limit")[:2]
    second["init"] = "random"
    other = {**first, "experiment": "mnist"}
    assert [g.label for g in grouping.group_results([first, second])] == [
        "limit, identity start",
        "limit, random start",
    ]
    assert [g.label for g in grouping.group_results([first, other])] == [
        "house_price: limit",
        "mnist: limit",
    ]


def test_moments_are_those_of_numpy(results):
    values = [1.0, 2.5, 4.0, -1.0]
    spread = grouping.moments([values[0], None, *values[1:]])
    np.testing.assert_allclose(spread.mean, np.mean(values))
    np.testing.assert_allclose(spread.sd, np.std(values, ddof=1))
    assert spread.n == 4
    assert grouping.moments([None]) is None


def test_paired_differences_match_numpy_and_use_common_seeds_only(results):
    chosen = only(results, "condition_gap") + only(results, "limit")[1:]
    rows = grouping.paired_differences(grouping.group_results(chosen))
    row = next(row for row in rows if row.measure == "log RIR, held-out rows")
    values = {
        (r["method"], r["seed"]): r["conditioning"]["damped"]["held_out"]["log_rir"] for r in chosen
    }
    differences = [values["condition_gap", s] - values["limit", s] for s in (1, 2)]
    assert row.seeds == (1, 2)
    np.testing.assert_allclose(row.difference.mean, np.mean(differences))
    np.testing.assert_allclose(row.difference.sd, np.std(differences, ddof=1))
    assert row.first_larger == sum(d > 0 for d in differences)


def test_no_paired_differences_without_two_common_seeds(results):
    chosen = only(results, "condition_gap")[:2] + only(results, "limit")[1:]
    assert grouping.paired_differences(grouping.group_results(chosen)) == []


# ---------------------------------------------------------------- the first sentence


@pytest.mark.parametrize(
    ("kind", "before", "after", "costly"),
    [
        ("regression", 0.599, -3.767, True),
        ("regression", 0.599, 0.55, False),
        ("binary", 0.9, 0.55, True),  # above chance an eighth is left
        ("binary", 0.9, 0.88, False),
        ("regression", -0.1, -3.0, False),  # there was nothing to keep
    ],
)
def test_the_first_sentence_names_no_method_that_ruins_its_own_task(
    results, kind, before, after, costly
):
    chosen = only(results, "limit")
    for result in chosen:
        result["data"]["primary"]["kind"] = kind
        result["utility"]["before"]["held_out"] = before
        result["utility"]["after"]["held_out"] = after
        result["conditioning"]["damped"]["held_out"]["log_rir"] = math.log(5e4)
    lead = run_tables.lead(grouping.group_results([*only(results, "condition_gap"), *chosen]))
    assert lead.startswith("1 of 2 methods keeps" if costly else "2 of 2 methods keep the")
    best = "condition_gap" if costly else "limit"
    assert f"of these {best} has the largest RIR on held-out rows" in lead
    assert ("(50,000)" in lead) != costly
    assert run_tables.lead(grouping.group_results(chosen)).startswith("limit: RIR ")


def test_results_of_the_first_version_say_how_to_attack_them(results, tmp_path):
    old = [one | {"schema": EARLIER} for one in only(results, "limit")]
    words = "`jaximm assess RUN_DIR` attacks these runs anew"
    file = io.StringIO()
    for part in run_tables.terminal(old, width=200):
        Console(file=file, width=200).print(part)
    for text in (page.render(old), report.markdown(old), " ".join(file.getvalue().split())):
        assert words in text
    assert words not in page.render(only(results, "limit"))
    assert words not in report.markdown(only(results, "limit"))


def test_the_page_opens_with_a_sentence_then_the_table(page_text, results):
    lead = run_tables.lead(grouping.group_results(results))
    head, table = page_text.index(f'<p class="lead">{lead}</p>'), page_text.index("<table")
    assert head < table
    assert page_text[:table].count("<p") == 1
    assert "harmful R² recoverable" in page_text[table : page_text.index("</table>")]


# ---------------------------------------------------------------- tables


def printed(results, *, width=80, everything=False):
    file = io.StringIO()
    console = Console(file=file, width=width)
    for part in run_tables.terminal(results, width=width, everything=everything):
        console.print(part)
    return file.getvalue()


def test_summary_fits_a_terminal_and_holds_the_geometric_means(results):
    text = printed(results)
    assert max(map(len, text.splitlines())) <= 80
    logs = [r["conditioning"]["damped"]["train"]["log_ratio_harmful"]
            for r in only(results, "limit")]  # fmt: skip
    line = next(line for line in text.splitlines() if line.strip().startswith("limit"))
    assert line.split()[1] == f"{np.exp(np.mean(logs)):,.0f}"


def test_tables_that_are_empty_are_left_out(results):
    titles = [table.title for table in run_tables.all_tables(grouping.group_results(results))]
    assert titles[:2] == ["Summary", "Condition numbers, damped (the measure)"]
    assert {"Paired differences", "Flags"} <= set(titles)
    chosen = only(results, "limit")[:1]
    chosen[0]["flags"] = []
    titles = [table.title for table in run_tables.all_tables(grouping.group_results(chosen))]
    assert len(titles) == 3


def test_terminal_tables_take_markup_literally(results):
    chosen = only(results, "limit")
    for result in chosen:
        result["method"] = "[red]m[/red]"
    assert "[red]m[/red]" in printed(chosen, width=120)


def test_csv_carries_the_raw_numbers(results):
    rows = list(csv.DictReader(io.StringIO(report.csv(results))))
    assert len(rows) == len(results) * len(FOOTINGS) * len(SPLITS)
    row = next(
        r for r in rows
        if [r[key] for key in ("method", "seed", "footing", "split")]
        == ["limit", "2", "damped", "held_out"]
    )  # fmt: skip
    source = only(results, "limit")[2]
    expected = source["conditioning"]["damped"]["held_out"]
    assert float(row["log_rir"]) == expected["log_rir"]
    assert float(row["log_kappa_harmful_after"]) == expected["harmful"]["after"]["log_kappa"]
    assert float(row["utility_after"]) == source["utility"]["after"]["held_out"]


def test_an_unknown_table_is_refused(results):
    with pytest.raises(ValueError, match=r"choose from \['conditioning', 'groups'\]"):
        report.csv(results, what="attacks")


def test_markdown_tables_are_rectangular_and_escaped(results):
    chosen = only(results, "limit")
    for result in chosen:
        result["method"] = "a|b<script>"
    text = report.markdown(chosen)
    assert "<script>" not in text
    assert "a\\|b&lt;script&gt;" in text
    widths = [
        {len(re.split(r"(?<!\\)\|", line)) for line in block}
        for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
        for block in [block.splitlines()]
    ]
    assert len(widths) >= 3
    assert all(len(width) == 1 for width in widths)


def test_no_results_are_refused():
    for make in (report.markdown, report.csv, page.render):
        with pytest.raises(ValueError, match="at least one result"):
            make([])


@pytest.mark.parametrize("log_value", [-30.0, -7.0, -0.5, 0.0, 4.6, 11.6, 40.0, 2000.0])
def test_factors_are_right_to_three_digits(log_value):
    text = formats.from_log(log_value).replace(",", "")
    if "×" in text:
        mantissa, power = text.split(" × 10")
        digits = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
        value = math.log(float(mantissa)) + int(power.translate(digits)) * math.log(10)
    else:
        value = math.log(float(text))
    np.testing.assert_allclose(value, log_value, atol=0.006)


# ---------------------------------------------------------------- page


class Reader(html.parser.HTMLParser):
    """Collects what a browser would see: tags, attributes, text outside style."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.stack = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack[-1:]:
            self.text.append(data)


def test_page_is_well_formed_and_loads_nothing(page_text):
    assert MARK.decode() in page_text[:4096]  # by which commands know a page of theirs
    reader = Reader(page_text)
    assert reader.stack == []
    assert "http" not in page_text
    assert "@import" not in page_text
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(reader.tags)
    assert not [a for a in reader.attributes if a[1] == "src"]
    links = {value for _, name, value in reader.attributes if name in ("href", "xlink:href")}
    assert all(link.startswith("#") for link in links)
    urls = re.findall(r"url\(([^)]*)\)", page_text)
    assert urls
    assert all(url.startswith("#") for url in urls)
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert {link[1:] for link in links} | {url[1:] for url in urls} <= set(ids)


def test_page_size_and_figures(page_text, results):
    assert len(page_text.encode()) < 2_000_000
    methods = len(result_fixture.METHODS)
    # ratios 2 x 2, spectra, utility x 2, trajectories of 3
    assert Reader(page_text).tags.count("svg") == 4 + methods + 2 + 3
    assert not any(token in page_text for token in figures._TOKENS)


def test_page_states_the_facts(page_text, results):
    text = " ".join("".join(Reader(page_text).text).split())
    for group in grouping.group_results(results):
        for result in group.results:
            assert result["command"] in text
    for words in (
        "jax 0.12.0.1", "1 × cpu (cpu)", "at the edge of the dtype",
        "Paired differences over common seeds", "made with NumPy for the tests",
        "float64", "pseudo-inverse",
    ):  # fmt: skip
        assert words in text


def test_page_escapes_every_text_of_a_result(results):
    evil = '<script>alert("x")</script>'
    chosen = only(results, "condition_gap")
    for result in chosen:
        result["experiment"] = result["method"] = result["command"] = evil
        result["config"] = {evil: evil}
        result["versions"] = {"python": evil, "jax": evil, "jaximm": evil}
        result["device"] = {"platform": evil, "kind": evil, "count": 1}
        for key in ("name", "description", "source"):
            result["data"][key] = evil
        for task in ("primary", "harmful"):
            result["data"][task]["name"] = evil
        result["flags"] = [{"code": evil, "severity": "warning", "message": evil, "caps": False}]
        validate(result)
    text = page.render(chosen, title=evil)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "script" not in Reader(text).tags


def test_page_of_one_result_says_how_to_attack_it(tmp_path, results):
    chosen = only(results, "limit")[:1]
    path = tmp_path / "report.html"
    report.write_page(chosen, path, title="One run")
    text = path.read_text(encoding="utf-8")
    assert "<title>One run</title>" in text
    assert "jaximm attack RUN_DIR" in text
    assert "Methods compared" not in text
    assert "Without training steps" in text
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    report.write_page(chosen, path, title="Again")
    assert "<title>Again</title>" in path.read_text(encoding="utf-8")


def test_page_takes_the_emptiest_valid_result(results):
    chosen = only(results, "limit")[:1]
    (result,) = chosen
    row = result["conditioning"]["pseudo_inverse"]["train"]
    for key in row:
        if key.startswith("log_"):
            row[key] = None
    for task in ("primary", "harmful"):
        for side in ("before", "after"):
            row[task][side] |= {"log_kappa": None, "lower": None, "upper": None}
            result["spectra"][task][side] = []
    result |= {
        "conditioning": {"pseudo_inverse": {"train": row}},
        "trajectory": [], "utility": None, "harmful_utility": None,
        "flags": [], "config": {}, "command": "",
    }  # fmt: skip
    validate(result)
    text = page.render(chosen)
    for words in ("Not measured: these tasks have no targets", "No flags were raised"):
        assert words in text
    assert report.markdown(chosen)
    assert report.csv(chosen)


def test_page_is_the_same_for_the_same_results(results):
    chosen = only(results, "ill_only")[:1]
    assert page.render(chosen) == page.render(copy.deepcopy(chosen))


@pytest.mark.slow
def test_more_methods_than_panels_are_said_to_be_left_out(results):
    chosen = []
    for index in range(page.DOT_METHODS + 3):
        result = only(results, "limit")[0]
        result["method"] = f"method_{index}"
        chosen.append(result)
    text = page.render(chosen)
    assert f"first {page.DOT_METHODS} methods; 3 more are in the tables" in text
    hidden = page.DOT_METHODS + 3 - page.FIGURE_METHODS
    assert f"first {page.FIGURE_METHODS} methods; {hidden} more are in the tables" in text


def test_a_failed_write_keeps_the_old_page(tmp_path, results, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(page.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    chosen = only(results, "limit")[:1]
    with pytest.raises(OSError, match="full"):
        report.write_page(chosen, path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


# ---------------------------------------------------------------- figures


def drawn_points(svg, colour):
    """The vertices of the longest path in one colour."""
    paths = re.findall(r'<path d="([^"]*)"[^>]*style="[^"]*stroke: var\(' + colour + r"\)", svg)
    return [
        np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), float)
        for path in paths
        if path.count("L") > 1
    ]


def test_attack_curves_are_drawn_where_the_numbers_say():
    steps = [0, 1, 10, 100, 1000]
    curve = figures.Curve(steps, [1.0, 0.5, 1e-1, 1e-2, 1e-3], 2, True)
    svg = figures.attack_curves([curve], alt="a", furthest=1000)
    (points,) = drawn_points(svg, "--c2")
    assert len(points) == 4  # step 0 has no place on a logarithmic axis
    # Both axes logarithmic: decades are equally far apart.
    np.testing.assert_allclose(np.diff(points[:, 0]), np.diff(points[:, 0])[0], atol=0.05)
    np.testing.assert_allclose(np.diff(points[1:, 1]), np.diff(points[1:, 1])[0], atol=0.05)
    assert np.all(np.diff(points[:, 1]) > 0)  # down the page
    assert "stroke-dasharray" not in svg.split("var(--c2)")[0].rsplit("<path", 1)[1]


def test_before_is_dashed_and_long_curves_are_thinned():
    steps = np.arange(1, 100_000)
    wave = 10 ** (-1.5 + np.sin(3 * np.log(steps)))  # a straight line would be two points
    curve = figures.Curve(steps.tolist(), wave.tolist(), 0, False)
    svg = figures.attack_curves([curve], alt="a", furthest=1e5)
    (points,) = drawn_points(svg, "--c0")
    assert 20 < len(points) <= figures.MAX_POINTS
    assert re.search(r"stroke-dasharray[^\"]*var\(--c0\)", svg)
    assert len(svg) < 30_000


def test_names_with_dollars_are_text_and_long_ones_keep_their_end():
    rows = [figures.Row("$x_1$ & <b>", (0.5,)), figures.Row("limit_of_everything (t=0.25)", (1.0,))]
    svg = figures.ratio_dots(rows, alt='say "<i>"', xlabel="x")
    assert "$x_1$ &amp; &lt;b&gt;" in svg
    assert "(t=0.25)" in svg
    assert 'aria-label="say &quot;&lt;i&gt;&quot;"' in svg


def test_texts_in_figures_are_left_as_they_are():
    label = 'lam=0.0012345 id="x"'
    svg = figures.ratio_dots([figures.Row(label, (0.5,)), figures.Row("#010101", (1.0,))], alt="a",
                           xlabel="x")  # fmt: skip
    assert f">{label}</text>" in svg
    assert ">#010101</text>" in svg
    ticks = figures.before_after([figures.Span("m", 0.301, 0.312)], alt="a", xlabel="x")
    labels = re.findall(r">([\d.]+)</text>", ticks)
    assert len(labels) >= 3
    assert len(set(labels)) == len(labels)


def test_a_side_that_was_not_measured_has_no_mark():
    both, one = (figures.before_after([figures.Span("m", 0.3, after)], alt="a", xlabel="x")
                 for after in (0.4, None))  # fmt: skip
    assert both.count("var(--harmful)") > one.count("var(--harmful)") > 0


def test_importing_the_report_does_not_import_the_plotting_library():
    import subprocess
    import sys

    code = "import sys, jaximm.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_figure_has_a_sentence_on_how_to_read_it(page_text):
    sections = re.findall(r'<section id="(\w+)">(.*?)</section>', page_text, flags=re.DOTALL)
    with_figures = [name for name, body in sections if "<svg" in body]
    assert set(with_figures) == {
        "conditioning", "spectra", "utility", "trajectory"
    }  # fmt: skip
    for name, body in sections:
        if name in with_figures:
            assert body.index("How to read it:") < body.index("<svg")


def test_tables_are_rectangular(results):
    groups = grouping.group_results(results)
    made = [run_tables.summary(groups), run_tables.footings(groups), run_tables.utility(groups)]
    made += [run_tables.paired(groups), run_tables.flags(groups)]
    made += [run_tables.conditioning(groups, footing=f) for f in FOOTINGS]
    for table in made:
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.columns)}
