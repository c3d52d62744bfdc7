"""The command line: what it parses, what it calls, where it prints, and its exit codes."""

import dataclasses
import errno
import json
import os
import shlex
import signal
import subprocess
import sys

import assessment_fixture
import jax
import pytest
import result_fixture

from jaximm import attacks, cli, data, immunisers, report, run
from jaximm.checkpoint import CheckpointError
from jaximm.cli import errors
from jaximm.records import assessment as assessment_record
from jaximm.records import files, result
from jaximm.records.files import plain
from jaximm.run import assess as run_assess
from jaximm.training import Stopped

pytestmark = pytest.mark.heavy


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def quick_page(monkeypatch):
    """A page of one line in place of the drawn one, which takes a second."""

    def write(results, path):
        methods = [row["method"] for row in results]
        path.write_text(f'<meta name="generator" content="jaximm">page of {methods}')

    monkeypatch.setattr(report, "write_page", write)
    monkeypatch.setattr(
        report, "write_assessment_page", lambda found, path: path.write_text(found["name"])
    )


@pytest.fixture
def runs(tmp_path):
    """A directory with finished runs of three methods."""
    folder = tmp_path / "my runs"  # a name that a shell must have in quotes
    for method in ("limit", "none", "condition_gap"):
        write_run(folder, method)
    return folder


@pytest.fixture
def called(monkeypatch, quick_page):
    """Replaces `immunise`, `assess` and `demo` of `jaximm.run`; what they were called with."""
    calls = []
    document = assessment_fixture.make_assessment()

    def assessed(*args, progress=None, **kwargs):
        calls.append(("assess", args, kwargs))
        (args[1] / document["name"]).mkdir(parents=True)
        return [document]

    def fake(name):
        def function(*args, progress=None, **kwargs):
            calls.append((name, args, kwargs))
            out = args[0] if name != "immunise" else args[1]
            for method in ("none", "limit"):
                write_run(out, method)
                record = {"log_ratio_harmful": 3.0, "log_ratio_primary": -1.0}
                for done in (1, 2):
                    progress(f"{method} s0", done, 2, record)
            if name == "immunise":
                return run.load_results([out])
            (out / "assessment" / document["name"]).mkdir(parents=True, exist_ok=True)
            return document

        return function

    for name in ("immunise", "demo"):
        monkeypatch.setattr(run, name, fake(name))
    monkeypatch.setattr(run_assess, "assess", assessed)
    return calls


def write_run(folder, method, seed=0):
    place = folder / f"{method}-s{seed}"
    place.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(run.EXPERIMENTS["house_price"], methods=(method,), seeds=(seed,))
    (place / "config.json").write_text(json.dumps(config.to_json()))
    made = result_fixture.make_result(method, seed)
    result.write(place / "result.json", made | {"config": made["config"] | plain(config.to_json())})
    return place


def error_line(capsys):
    """The one line on stderr; nothing on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("jaximm: ")
    return lines[0]


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in ("list", "immunise", "attack", "compare", "report", "demo"):
        assert command in shown


def test_version(capsys):
    import jaximm

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaximm {jaximm.__version__}\n"


def test_immunise_has_a_flag_for_every_scalar_field_with_its_text(capsys):
    assert cli.main(["immunise", "--help"]) == 0
    shown = capsys.readouterr().out
    fields = {field.name for field in dataclasses.fields(run.Experiment)}
    scalars = fields - {
        *("data_fields", "model_fields", "preprocess", "methods", "method_fields", "seeds"),
        *("optimiser", "sites", "attackers", "weight_attackers"),
    }
    assert {"name", "data", "model", "init", "damping", "suite", "batch_size"} <= scalars
    for key in scalars | {"images", "backbone"}:  # earlier names
        assert f"--{key.replace('_', '-')} " in shown
    assert "records in a run's trajectory" in shown
    assert "identity|random" in shown


# Usage errors


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["imunise"],
        ["list", "--bogus"],
        ["immunise", "house_price"],
        ["immunise", "--out", "x"],
        ["immunise", "house_price", "--out", "x", "--seed", "one"],
        ["attack"],
        ["report"],
        ["attack", "x", "--attack"],
    ],
    ids=" ".join,
)
def test_what_the_parser_refuses_is_exit_code_2_and_printed_on_stderr(argv, capsys):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip()
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["assess", "x", "--load", "a.py", "--load", "b.py"], "--load"),
        (["assess", "x", "--load=a.py", "--out", "y", "--load=b.py"], "--load"),
        (
            ["immunise", "house_price", "--out", "x", "--damping", "1", "--damping", "2"],
            "--damping",
        ),
        (
            ["immunise", "mine.py", "--out", "x", "--batch-size", "1", "--batch_size=2"],
            "--batch_size",
        ),
        (["compare", "x", "--rows", "1", "--rows", "2"], "--rows"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_of_one_value_is_given_once(argv, flag, capsys):
    assert cli.main(argv) == 2
    assert error_line(capsys) == f"jaximm: {flag} is given twice; it takes one value."


IMMUNISE = ["immunise", "house_price", "--out", "runs"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["compare"], "RUN_DIR"),
        (["immunise", "hous", "--out", "runs"], "'hous'; choose from ['house_price'"),
        ([*IMMUNISE, "--method", "limt"], "'limt'; choose from ['antidote', 'balanced_gap'"),
        ([*IMMUNISE, "--method", "limit@q=1"], "'q'; choose from ['t', 'damping'"),
        ([*IMMUNISE, "--method", "limit@t"], "name@key=value"),
        ([*IMMUNISE, "--set", "damping"], "KEY=VALUE, got 'damping'"),
        ([*IMMUNISE, "--set", "=3"], "KEY=VALUE, got '=3'"),
        ([*IMMUNISE, "--set", "damping=1", "--set", "damping=2"], "--set damping is given twice"),
        ([*IMMUNISE, "--set", "damping=1", "--damping", "2"], "damping is given twice"),
        ([*IMMUNISE, "--method", "limit@t=abc"], "'limit@t=abc': t must be float, got 'abc'"),
        ([*IMMUNISE, "--set", "sede=3"], "'sede'; choose from ['name', 'data'"),
        ([*IMMUNISE, "--set", "limt.t=3"], "'limt.t'"),
        ([*IMMUNISE, "--set", "limit.q=3"], "'limit.q'; choose from ['t', 'damping'"),
        ([*IMMUNISE, "--set", "data.rows=3"], "'data.rows'; choose from ['train_rows'"),
        ([*IMMUNISE, "--set", "limit.t=big"], "limit.t must be float, got 'big'"),
        ([*IMMUNISE, "--set", "limit.t=7", "--method", "none"], "limit: t must be in [0, 1]"),
        ([*IMMUNISE, "--set", "limit.rotate=3"], "limit.rotate must be bool, got '3'"),
        ([*IMMUNISE, "--set", "limit.steps=1.5"], "limit.steps must be int, got '1.5'"),
        ([*IMMUNISE, "--set", 'seeds=["a"]'], "seeds must be"),
        ([*IMMUNISE, "--set", 'attackers=["gdd"]'], "'gdd'; choose from"),
        ([*IMMUNISE, "--damping", "much"], "damping must be float or null, got 'much'"),
        ([*IMMUNISE, "--damping", "-1"], "damping must be > 0"),
        ([*IMMUNISE, "--init", "zero"], "one of ['identity', 'random', 'pretrained'], got 'zero'"),
        ([*IMMUNISE, "--data", "houses"], "'houses'; choose from ['arrays'"),
        ([*IMMUNISE, "--suite", "huge"], "'huge'; choose from ['full'"),
        (["attack", "runs", "--attack", "gdd"], "'gdd'; choose from ['adam'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_nobody_knows_is_one_line_with_what_is_known_and_exit_code_2(
    argv, expected, capsys, called, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    assert expected in error_line(capsys)
    assert called == []
    assert list(tmp_path.iterdir()) == []


# Failures


FAILURES = [
    (ValueError("held-out rows:\n none"), "held-out rows: none", 1),
    (files.ResultError("x/result.json: damaged"), "x/result.json: damaged", 1),
    (CheckpointError("checkpoint 3 is damaged"), "checkpoint 3 is damaged", 1),
    (FloatingPointError("not finite at step 7"), "not finite at step 7", 1),
    (OSError(errno.ENOSPC, "No space left on device", "x"), "No space left on device: x", 1),
    (data.MissingCarrierError("run `pip install y`"), "run `pip install y`", 1),
    (TypeError("who knows"), "unexpected TypeError: who knows (--traceback shows where)", 1),
    (KeyboardInterrupt(), "stopped; the same with --resume goes on.", 130),
    (KeyboardInterrupt("jaximm demo --out x"), "stopped; `jaximm demo --out x` goes on.", 130),
    (
        Stopped("step 8 of 14 is kept", signal.SIGTERM),
        "stopped, step 8 of 14 is kept; the same with --resume goes on.",
        143,
    ),
]


@pytest.mark.parametrize(("error", "line", "code"), FAILURES, ids=lambda value: "")
def test_a_failure_is_one_line(error, line, code, monkeypatch, capsys, tmp_path):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(run, "immunise", fail)
    argv = ["immunise", "house_price", "--out", str(tmp_path)]
    assert cli.main(argv) == code
    assert error_line(capsys) == f"jaximm: {line}"
    assert cli.main([*argv, "--traceback"]) == code
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith(f"jaximm: {line}\n")


def test_nothing_to_report(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 1
    assert f"{tmp_path} holds no runs" in error_line(capsys)
    assert cli.main(["compare", str(tmp_path / "gone")]) == 1
    assert "gone" in error_line(capsys)


@pytest.mark.parametrize("command", ["report", "compare", "attack"])
def test_a_damaged_result_is_named(command, runs, capsys):
    damaged = runs / "limit-s0" / "result.json"
    damaged.write_text(damaged.read_text()[:100])
    assert cli.main([command, str(runs)]) == 1
    assert str(damaged) in error_line(capsys)
    assert not (runs / "report.html").exists()


@pytest.mark.parametrize("command", ["report", "compare", "attack"])
def test_an_unfinished_run_is_named_with_what_finishes_it(command, runs, capsys, monkeypatch):
    (runs / "limit-s0" / "result.json").unlink()
    assert cli.main([command, str(runs)]) == 1
    line = error_line(capsys)
    assert f"{runs / 'limit-s0'} is an unfinished run" in line
    words = shlex.split(line.partition("`")[2].partition("`")[0])  # the command as it is printed
    monkeypatch.setattr(run, "immunise", lambda config, out, **options: called.append(
        (config, out, options)) or run.load_results([runs / "none-s0"]))  # fmt: skip
    monkeypatch.setattr(cli.immunise, "write_page", lambda *args, **options: None)
    called = []
    assert words[0] == "jaximm"
    assert cli.main(words[1:]) == 0
    [(config, out, options)] = called
    assert (config.methods, out, options["resume"]) == (("limit",), runs, True)


def test_results_that_are_there_are_not_overwritten(runs, capsys):
    before = (runs / "none-s0" / "result.json").read_bytes()
    assert cli.main(["immunise", "house_price", "--method", "none", "--out", str(runs)]) == 1
    line = error_line(capsys)
    assert f"{runs / 'none-s0'} holds a finished run" in line
    assert "--resume" in line
    assert (runs / "none-s0" / "result.json").read_bytes() == before


def test_a_config_file_that_is_refused_is_a_failure_and_no_usage_error(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text('{"name": "x", "data": "house_prices", "sede": 3}')
    assert cli.main(["immunise", str(path), "--out", str(tmp_path / "out")]) == 1
    line = error_line(capsys)
    assert str(path) in line
    assert "'sede'; choose from" in line


def test_a_page_that_cannot_be_written_is_named(runs, capsys, tmp_path):
    in_the_way = tmp_path / "page"
    in_the_way.touch()
    page = in_the_way / "page.html"
    assert cli.main(["report", str(runs), "--out", str(page)]) == 1
    assert error_line(capsys).endswith(f": {in_the_way}")


# What is called


def test_immunise_hands_over_the_experiment_that_its_flags_describe(called, tmp_path):
    out = tmp_path / "a run"
    argv = ["immunise", "house_price", "--out", str(out), "--resume", "--seed", "3", "--seed", "4"]
    argv += ["--method", "limit@t=1", "--method", "none", "--damping", "1e-2", "--init", "random"]
    argv += [
        "--name",
        "17",
        "--log-points",
        "7",
        "--set",
        "limit.t=1",
        "--set",
        "checkpoint_every=5",
    ]
    argv += ["--set", "attackers=ridge", "--set", "data.train_rows=150"]
    assert cli.main(argv) == 0
    [(name, (config, folder), options)] = called
    assert (name, folder, options["resume"]) == ("immunise", out, True)
    assert config == run.Experiment(
        name="17",
        data="house_prices",
        data_fields={"train_rows": 150},
        methods=("limit@t=1", "none"),
        method_fields={"limit": {"t": 1.0}},
        seeds=(3, 4),
        init="random",
        damping=0.01,
        attackers=("ridge",),
        log_points=7,
        checkpoint_every=5,
        description=run.EXPERIMENTS["house_price"].description,
    )
    assert isinstance(config.method_fields["limit"]["t"], float)
    words = f"jaximm immunise house_price --out '{out}' --resume --seed 3 --seed 4 "
    assert options["command"].startswith(words)


def test_without_flags_the_experiment_is_the_registered_one(called, tmp_path):
    assert cli.main(["immunise", "mnist_slant", "--out", str(tmp_path)]) == 0
    [(_, (config, _), options)] = called
    assert config == run.EXPERIMENTS["mnist_slant"]
    assert options["resume"] is False


def test_values_are_json_or_text_as_the_field_asks(called, tmp_path):
    argv = ["immunise", "mnist_slant", "--out", str(tmp_path)]
    argv += ["--set", "seeds=[5, 6]", "--set", "checkpoint_every=null", "--set", "attackers=null"]
    argv += ["--set", 'name="quoted"', "--set", "limit.rotate=false", "--description", "null"]
    argv += ["--set", 'methods=["limit"]', "--set", "limit.batch_size=32"]
    assert cli.main(argv) == 0
    [(_, (config, _), _)] = called
    assert (config.seeds, config.checkpoint_every, config.attackers) == ((5, 6), None, None)
    assert (config.name, config.description, config.methods) == ("quoted", "null", ("limit",))
    assert config.method_fields["limit"] == {"rotate": False, "batch_size": 32}
    assert config.method_fields["imma"] == run.EXPERIMENTS["mnist_slant"].method_fields["imma"]
    assert run.EXPERIMENTS["mnist_slant"].method_fields.keys() == config.method_fields.keys() - {
        "limit"
    }


def test_another_data_set_starts_from_its_own_defaults(called, tmp_path):
    argv = ["immunise", "mnist_slant", "--out", str(tmp_path), "--data", "house_prices"]
    assert cli.main(argv) == 0
    [(_, (config, _), _)] = called
    assert (config.data, config.data_fields) == ("house_prices", {})


def test_attack_is_assess_with_the_experiments_own_defaults(called, runs, capsys):
    argv = ["attack", str(runs), "--level", "full", "--attack", "gd", "--attack", "ridge"]
    assert cli.main([*argv, "--out", str(runs / "other")]) == 0
    assert cli.main(["attack", str(runs), "--suite", "quick", "--out", str(runs / "third")]) == 0
    assert cli.main(["attack", str(runs)]) == 0
    few = ["--harmful-rows", "4", "--harmful-rows", "16"]
    assert cli.main(["assess", str(runs), "--out", str(runs / "fourth"), *few]) == 0
    assert [options["harmful_rows"] for _, _, options in called] == [(), (), (), (4, 16)]
    said = [(options["level"], options["attackers"], options["as_configured"])
            for _, _, options in called]  # fmt: skip
    assert said == [
        ("full", ("gd", "ridge"), True),
        ("quick", None, True),
        (None, None, True),
        ("standard", None, False),
    ]
    assert [args for _, args, _ in called[:3]] == [
        ((runs,), runs / name) for name in ("other", "third", "assessment")
    ]
    assert called[2][2]["command"] == shlex.join(["jaximm", "attack", str(runs)])
    folder = runs / "assessment" / "cifar_pets"
    written = {path.name for path in folder.iterdir()}
    assert written == {path.name for path in (runs / "fourth" / "cifar_pets").iterdir()}
    assert {"assessment.html", "assessment.csv", "curves.csv", "assessment.md"} <= written
    assert f"report: {folder / 'assessment.html'}" in capsys.readouterr().out


def test_demo_never_writes_into_an_earlier_one(called, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert cli.main(["demo"]) == 0
    assert [str(args[0]) for _, args, _ in called] == [
        os.path.join("runs", name) for name in ("demo", "demo-2", "demo-3")
    ]
    assert "runs/demo holds an earlier demo; this one goes to runs/demo-2." in (
        capsys.readouterr().err
    )
    assert cli.main(["demo", "--out", "runs/demo"]) == 1
    assert "runs/demo is not empty" in error_line(capsys)
    assert cli.main(["demo", "--resume"]) == 0
    assert str(called[-1][1][0]) == os.path.join("runs", "demo")
    assert called[-1][2] == {"resume": True, "command": "jaximm demo --resume"}


# What is printed


def test_results_go_to_stdout_and_progress_to_stderr(called, tmp_path, capsys):
    assert cli.main(["immunise", "house_price", "--out", str(tmp_path), "--method", "none"]) == 0
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 2  # no terminal: no bar, a line a finished run
    assert lines[0].startswith("[1/1] none s0: 2 steps, log RIR 4.00 (damped, training rows), ")
    assert "none s0" not in captured.out
    assert "preparing" not in captured.err
    assert f"report: {tmp_path / 'report.html'}" in captured.out
    assert (tmp_path / "report.html").read_text().split(">")[1] == "page of ['none', 'limit']"
    assert captured.out.index("Summary") < captured.out.index("limit")


def test_compare_prints_tables_and_writes_page_markdown_and_csv(runs, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    argv = ["compare", str(runs / "limit-s0"), str(runs), "--out", str(out)]
    argv += ["--markdown", str(out / "t.md"), "--csv", str(out / "c" / "t.csv")]
    assert cli.main(argv) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for title in ("Summary", "Quality of the best linear head"):
        assert title in captured.out
    page = (out / "compare.html").read_text()
    assert all(method in page for method in ("limit", "none", "condition_gap"))
    assert "| method |" in (out / "t.md").read_text()
    head, *rows = (out / "c" / "t.csv").read_text().splitlines()
    assert head.startswith("experiment,method,init,seed,footing")
    assert {row.split(",")[1] for row in rows} == {"limit", "none", "condition_gap"}


@pytest.mark.usefixtures("quick_page")
def test_compare_writes_into_the_current_directory_or_to_a_named_page(
    runs, tmp_path, monkeypatch, quick_page
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", str(runs)]) == 0
    assert (tmp_path / "compare.html").exists()
    assert cli.main(["compare", str(runs), "--out", "mine.html"]) == 0
    assert (tmp_path / "mine.html").is_file()


@pytest.mark.usefixtures("quick_page")
def test_nothing_that_is_there_is_replaced_unasked(runs, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    mine = folder / "mine.npz"
    for command in (
        ["report", str(runs / "none-s0"), "--out", str(mine)],
        ["compare", str(runs), "--out", str(folder), "--csv", str(mine)],
        ["compare", str(runs), "--out", str(folder), "--markdown", str(mine)],
        ["leaderboard", str(runs), "--out", str(mine)],
    ):
        mine.write_text("precious")
        assert cli.main(command) == 2
        said = f"{mine} is there already; give --replace to replace it, or name another file."
        assert error_line(capsys) == f"jaximm: {said}"
        assert mine.read_text() == "precious"
        mine.unlink()
        mine.symlink_to("/dev/full")
        assert cli.main([*command, "--replace"]) == 2
        assert error_line(capsys) == f"jaximm: {mine} is no regular file; name a file to write."
        assert mine.is_symlink()
        mine.unlink()
    assert not list(folder.iterdir())  # nothing else was written before the refusal
    report_of = ["report", str(runs / "none-s0"), "--out", str(mine)]
    assert cli.main(report_of) == cli.main([*report_of, "--replace"]) == 0
    capsys.readouterr()
    theirs = runs / "report.html"
    theirs.write_text("<html>theirs</html>")
    for command in (["report", str(runs)], ["immunise", "house_price", "--out", str(runs)]):
        assert cli.main(command) == 2
        assert "report.html is there and no page of jaximm: move it" in error_line(capsys)
        assert theirs.read_text() == "<html>theirs</html>"
    assert cli.main(["immunise", "house_price", "--out", ""]) == 2
    assert error_line(capsys) == "jaximm: --out is given without a name."


@pytest.mark.usefixtures("quick_page")
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_tables_fit_the_terminal_and_keep_names_whole(columns, runs, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["compare", str(runs), "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    tables_part = shown.partition("comparison: ")[0]
    assert max(map(len, tables_part.splitlines())) <= columns
    summary = shown.partition("Quality of")[0]
    methods = [
        line.split()[0] for line in summary.splitlines() if line.startswith(" ") and line.split()
    ]
    assert [name for name in methods if name in immunisers.REGISTRY][:3] == [
        "none",
        "condition_gap",
        "limit",
    ]


def test_flags_are_listed_once_with_the_methods_that_have_them(runs, capsys, tmp_path, quick_page):
    place = runs / "limit-s0" / "result.json"
    found = result.read(place)
    found["flags"].append(
        {"code": "only_here", "severity": "info", "message": "A thing apart.", "caps": False}
    )
    result.write(place, found)
    assert cli.main(["compare", str(runs), "--out", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "warning kappa rounding (every method). Round-off decides 1 condition" in shown
    assert "info only here (limit). A thing apart." in shown
    assert shown.count("kappa rounding (") == 1


def test_list_has_every_entry_with_a_line_and_a_source(capsys):
    assert cli.main(["list", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out)
    for family, registry in {
        "methods": immunisers.REGISTRY,
        "attacks": attacks.REGISTRY,
        "data sets": data.REGISTRY,
        "experiments": run.EXPERIMENTS,
    }.items():
        assert [entry["name"] for entry in found[family]] == list(registry)
        assert all(entry["description"] and entry["source"] for entry in found[family])
    kinds = {entry["name"]: entry["kind"] for entry in found["attacks"]}
    assert (kinds["ridge"], kinds["gd"]) == ("closed-form", "first-order")
    sources = {entry["name"]: entry["source"] for entry in found["methods"]}
    assert "2505.23760" in sources["condition_gap"]
    assert sources["limit"] == immunisers.about("limit").source


def test_list_shows_what_was_registered_from_outside(capsys, monkeypatch):
    monkeypatch.setitem(attacks.REGISTRY, "mine", attacks.make_attack("ridge"))
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:1] == ["mine"] and "[closed-form]" in line for line in lines)


# The process


def test_a_reader_that_leaves_early_gets_no_error():
    with subprocess.Popen(
        [sys.executable, "-m", "jaximm.cli", "list", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_the_parser_is_read_without_what_only_a_run_needs():
    code = (
        "import sys, jaximm.cli; jaximm.cli.main(['--help']); "
        "print([name for name in ('jaximm.run', 'jaximm.report', 'matplotlib', 'orbax', "
        "'tensorflow_datasets', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_house_prices_from_the_first_command_to_the_page(tmp_path, capsys, monkeypatch):
    out = tmp_path / "houses"
    argv = ["immunise", "house_price", "--out", str(out), "--method", "limit"]
    argv += ["--set", "limit.t=0.5", "--set", "limit.steps=2", "--log-points", "2"]
    with monkeypatch.context() as patched:  # one drawn page is enough
        patched.setattr(report, "write_page", lambda results, path: None)
        assert cli.main(argv) == 0
        captured = capsys.readouterr()
        assert "[1/1] limit s0: 2 steps, log RIR 14.38 (damped, training rows), " in captured.err
        [limit] = run.load_results([out])
        assert limit["command"] == " ".join(["jaximm", *argv])
        assert limit["dtype"] == "float64"
        assert limit["conditioning"]["damped"]["train"]["log_fraction"] == pytest.approx(1)
        assert [row["step"] for row in limit["trajectory"]] == [1, 2]

        assert cli.main([*argv, "--resume"]) == 0  # finished: not run again
        assert capsys.readouterr().err == ""
        assert run.load_results([out]) == [limit]

        assert cli.main(["attack", str(out), "--attack", "ridge"]) == 0
        captured = capsys.readouterr()
        assert captured.err.startswith("[1] assess house_price: ")
        assert "ridge" in captured.out
    assert run.load_results([out]) == [limit]  # an assessment is a document of its own
    folder = out / "assessment" / "house_price"
    found = assessment_record.read(folder / "assessment.json")
    assert [one["name"] for one in found["attackers"]] == ["ridge"]
    assert [model["label"] for model in found["models"]] == ["none", "limit"]

    assert cli.main(["report", str(out)]) == 0
    pages = [out / "report.html", folder / "assessment.html"]
    assert capsys.readouterr().out == "".join(f"report: {page}\n" for page in pages)
    assert all(page.read_text().startswith("<!") for page in pages)
    assert cli.main(["report", str(out), "--out", str(out / "one.html")]) == 0
    assert capsys.readouterr().out == f"report: {out / 'one.html'}\n"


def test_a_platform_that_is_not_there_is_one_line(monkeypatch):
    def absent():
        raise AssertionError

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert errors._missing_device() == ""  # this process has a device
    monkeypatch.setattr(jax, "devices", absent)
    message = errors.message(AssertionError(), ["demo"])
    assert message == "no CUDA device: unset JAX_PLATFORMS or install jax[cuda]"
    monkeypatch.setenv("JAX_PLATFORMS", "rubbish")
    assert errors.message(RuntimeError("?"), []) == "no rubbish device: unset JAX_PLATFORMS"
