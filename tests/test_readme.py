"""The README's library example runs, and its commands parse."""

import dataclasses
import re
import runpy
import shlex
from pathlib import Path

import assessment_worker as worker
import jax
import numpy as np
import pytest
from PIL import Image

from jaximm import attacks, cli, evaluation, models, result

pytestmark = pytest.mark.heavy

README = Path(__file__).parent.parent / "README.md"


def _blocks(language):
    """Texts of the fenced blocks of a language, in order."""
    pieces = re.split(r"^```(\w*)$", README.read_text(), flags=re.M)
    # Every second fence closes: text, opening language, block, "", text, ...
    return [
        block for name, block in zip(pieces[1::4], pieces[2::4], strict=True) if name == language
    ]


def test_the_library_example_runs_and_prints_what_it_says(capsys):
    example, *_ = _blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(example, "README.md", "exec"), {})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("log kappa ")
    assert "rank 32, dominated by" in first
    # K_P^{-1} K_H = diag(1/4, 9): log 36.
    assert second.endswith("3.58")


def test_the_users_own_network_runs_from_its_folders(tmp_path, monkeypatch, capsys):
    _, example, _ = _blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) < 20
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(example)
    rng = np.random.default_rng(0)
    for task, base in (("keep", 60), ("harm", 130)):
        for number, name in enumerate(("a", "b")):
            folder = Path("photos") / task / name
            folder.mkdir(parents=True)
            for index in range(140):
                pixels = rng.normal(base + 40 * number, 40, (20, 24, 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.jpg")
    try:
        with jax.numpy_dtype_promotion("standard"):
            code = cli.main(["immunise", "mine.py", "--out", "runs", "--steps", "4"])
    finally:
        models.REGISTRY.pop("net", None)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "limit@t=1" in printed.out
    found = result.read(Path("runs") / "limit@t=1-s0" / "result.json")
    assert found["backbone"]["model"] == "net"
    row = found["conditioning"]["damped"]["train"]
    assert row["log_rir"] > 0.5 * row["log_rir_limit"] > 0


def test_the_users_own_attacker_is_one_of_the_suite(tmp_path):
    *_, example = _blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    file = tmp_path / "my_attacker.py"
    file.write_text(example)
    try:
        runpy.run_path(str(file))
        assert attacks.describe("sign_descent")
        document = evaluation.assess(
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


@pytest.mark.parametrize(
    "line", [line for block in _blocks("") for line in block.splitlines() if "jaximm " in line]
)
def test_every_command_line_parses(line):
    words = shlex.split(line, comments=True)
    assert words[0] == "jaximm"
    assert cli.parse(words[1:]) is not None
