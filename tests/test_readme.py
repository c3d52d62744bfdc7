"""The README's blocks run in order, from an empty folder, and its commands parse."""

import dataclasses
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import assessment_worker as worker
import jax
import pytest
from helpers import thinned

from jaximm import assessment, attacks, cli, immunisers, models, run
from jaximm.records import assessment as assessment_record
from jaximm.records import result

pytestmark = pytest.mark.heavy

README = Path(__file__).parent.parent / "README.md"
FILES = (None, None, "mine.py", "my_attacker.py")
"""Where the text says that its Python blocks go; the first two are run as they are."""


def _blocks(page=README):
    """Language and text of the fenced blocks, in order."""
    pieces = re.split(r"^```(\w*)$", page.read_text(), flags=re.M)
    # Every second fence closes: text, opening language, block, "", text, ...
    return list(zip(pieces[1::4], pieces[2::4], strict=True))


def _texts(language):
    return [text for name, text in _blocks() if name == language]


def _commands(block):
    """The lines of a shell block; a here-document belongs to the line that begins it."""
    return [found.group() for found in re.finditer(r"^.*<<'END'\n[\s\S]*?^END$|^.+$", block, re.M)]


def _takes_minutes(command):
    comment = command.partition("  # ")[2]
    return any(words in comment for words in ("minutes", "longer", "line before"))


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """An empty working directory; what is registered there is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "REGISTRY", dict(models.REGISTRY))
    monkeypatch.setattr(attacks, "WEIGHT_REGISTRY", dict(attacks.WEIGHT_REGISTRY))
    own = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join([own, os.environ["PATH"]]))
    return tmp_path


def _shell(text):
    subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True, capture_output=True)


@pytest.mark.parametrize("left_out", thinned(["runs/mine", None]))  # house prices: test_run_assess
def test_the_blocks_run_in_order_from_an_empty_folder(left_out, empty_folder, capsys):
    """All but what takes long, in this process: starting a new one costs seconds a line."""
    files, shown = iter(FILES), []
    for language, text in _blocks():
        if language == "python":
            file = next(files)
            if file is None:
                with jax.numpy_dtype_promotion("standard"):
                    exec(compile(text, "README.md", "exec"), {})
                shown.append(capsys.readouterr().out)
            else:
                Path(file).write_text(text)
        for command in _commands(text) if language == "bash" else ():
            if _takes_minutes(command) or (left_out and left_out in command):
                continue
            if not command.startswith("jaximm "):
                _shell(command)
                continue
            with jax.numpy_dtype_promotion("standard"):
                code = cli.main(shlex.split(command, comments=True)[1:])
            assert code == 0, (command, capsys.readouterr().err)
    call, example = shown
    assert "linear map, float64; log RIR" in call
    assert result.read(Path("runs/arrays/result.json"))["method"] == "limit"
    assert "<table" in Path("runs/arrays/assessment.html").read_text()
    first, second = example.splitlines()
    assert first.startswith("log kappa ")
    assert "rank 32, dominated by" in first
    # K_P^{-1} K_H = diag(1/4, 9): log 36.
    assert second.endswith("3.58")
    assert set(FILES) - {None} <= {path.name for path in Path().iterdir()}
    net = {found["method"]: found for found in run.load_results([Path("runs/net")])}
    assert net["none"]["backbone"]["model"] == "net"
    found = net["limit@t=1"]["conditioning"]["pseudo_inverse"]["train"]
    assert found["log_rir"] > 1
    assessed = assessment_record.read(Path("runs/net/assessment/mine/assessment.json"))
    assert [one["name"] for one in assessed["attackers"]] == ["ridge"]
    assert Path("runs/mine/condition_gap-s0/result.json").exists() == (left_out is None)


@pytest.mark.slow
def test_every_line_works_in_a_shell(empty_folder):
    """Each line in a process of its own, as a reader would run it; half an hour on two cores."""
    files = iter(FILES)
    for language, text in _blocks():
        if language == "python":
            file = next(files)
            Path(file or "example.py").write_text(text)
            if file is None:
                _shell("python example.py")
        elif language == "bash":
            _shell(text)
    assert result.read(Path("runs/long/condition_gap-s0/result.json"))["timing"]["steps"] == 3000
    assert "sign_descent" in Path("runs/net/assessment/mine/assessment.md").read_text()


@pytest.mark.slow
def test_the_page_on_methods_runs(empty_folder, capsys):
    [(language, text)] = _blocks(README.parent / "docs" / "methods.md")
    assert language == "python"
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(text, "methods.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "(80, 8)" in shown
    assert shown.endswith("['first', 'last']\n")


def test_the_call_is_ten_lines_and_the_library_example_fifteen():
    call, example, *_ = _texts("python")
    assert len([line for line in call.splitlines() if line and not line.startswith("import")]) <= 10
    assert len([line for line in example.splitlines() if line.strip()]) <= 15


def test_the_users_own_attacker_is_one_of_the_suite(tmp_path):
    *_, example = _texts("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    file = tmp_path / "my_attacker.py"
    file.write_text(example)
    try:
        runpy.run_path(str(file))
        assert attacks.describe("sign_descent")
        document = assessment.assess(
            dataclasses.replace(worker.bench(), benign={}, unseen={}),
            worker.models()[:1],
            level=worker.LEVEL,
            attackers=["sign_descent"],
        )
    finally:
        attacks.WEIGHT_REGISTRY.pop("sign_descent", None)
    (row,) = [row for row in document["rows"] if row["task"] == "harmful"]
    assert row["quality"]["mean"] > 0.6  # 20 steps of 0.01 from a head of zeros
    assert row["hyper_parameters"]["step"] in (pytest.approx(0.01), pytest.approx(0.001))


INLINE = re.findall(r"`(jaximm [^`]+)`", README.read_text())
LINES = [
    line
    for language in ("bash", "sh")  # what takes hours is "sh": parsed, not run
    for text in _texts(language)
    for line in text.splitlines()
    if "jaximm " in line
]


@pytest.mark.parametrize("line", [*LINES, *INLINE])
def test_every_command_line_parses(line):
    words = shlex.split(line, comments=True)
    assert words[0] == "jaximm"
    assert cli.parse(words[1:]) is not None


def test_every_method_says_for_whom_it_is():
    page = (README.parent / "docs" / "methods.md").read_text()
    first = [row.split("|")[1] for row in page.splitlines() if row.startswith("| `")]
    named = set(re.findall(r"`(\w+)`", " ".join(first)))
    assert set(immunisers.REGISTRY) - {"none"} <= named
