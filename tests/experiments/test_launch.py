"""The launch lines of experiments/README.md are commands that jaximm understands."""

import re
import shlex
from pathlib import Path

import pytest

from jaximm import cli
from jaximm.training import DistributedConfig

README = Path(__file__).parents[2] / "experiments" / "README.md"


def launch_lines():
    """Every `jaximm immunise ...` of a code block, on one line, shell variables being 0."""
    blocks = re.findall(r"^```\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    lines = []
    for block in blocks:
        joined = re.sub(r"\\\n\s*|(?<=--resume)\n\s+(?=--)", " ", block)
        joined = re.sub(r'"?\$\((.*?)\)', "host", joined).replace('host:8476"', "host:8476")
        for found in re.findall(r"jaximm immunise [^\n'&]+", joined):
            lines.append(re.sub(r"\"?\$\w+\"?", "0", found).strip())
    return lines


def test_every_kind_of_launch_is_shown():
    lines = launch_lines()
    assert sum("--coordinator" in line for line in lines) == 3
    assert {kind for line in lines for kind in re.findall(r"--distributed (\w+)", line)} == {
        "auto",
        "tpu",
    }


@pytest.mark.parametrize("line", launch_lines())
def test_a_launch_line_is_understood(line):
    args = cli.parse(shlex.split(line)[1:])
    assert args.experiment == "EXPERIMENT"
    if args.coordinator is None:
        assert args.distributed in ("auto", "tpu")
        return
    assert args.coordinator.endswith(":8476")
    DistributedConfig(coordinator=args.coordinator, num_processes=4, process_id=args.process_id)
