"""The README's library example runs, and its commands parse."""

import re
import shlex
from pathlib import Path

import jax
import pytest

from jaximm import cli

README = Path(__file__).parent.parent / "README.md"


def _blocks(language):
    """Texts of the fenced blocks of a language, in order."""
    pieces = re.split(r"^```(\w*)$", README.read_text(), flags=re.M)
    # Every second fence closes: text, opening language, block, "", text, ...
    return [
        block for name, block in zip(pieces[1::4], pieces[2::4], strict=True) if name == language
    ]


def test_the_library_example_runs_and_prints_what_it_says(capsys):
    (example,) = _blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(example, "README.md", "exec"), {})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("log kappa ")
    assert "rank 32, dominated by" in first
    # K_P^{-1} K_H = diag(1/4, 9): log 36.
    assert second.endswith("3.58")


@pytest.mark.parametrize(
    "line", [line for block in _blocks("") for line in block.splitlines() if "jaximm " in line]
)
def test_every_command_line_parses(line):
    words = shlex.split(line, comments=True)
    assert words[0] == "jaximm"
    assert cli.parse(words[1:]) is not None
