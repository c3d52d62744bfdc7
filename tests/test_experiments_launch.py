"""The launch lines of experiments/README.md are commands that jaximm understands."""

import re
import shlex
from pathlib import Path

import pytest

from jaximm import cli
from jaximm.training import DistributedConfig

README = Path(__file__).parent.parent / "experiments" / "README.md"


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
    flags = [line for line in launch_lines() if "--coordinator" in line]
    assert len(flags) == 3
    assert {re.search(r"--distributed (\w+)|$", line)[1] for line in launch_lines()} == {
        "auto",
        "tpu",
        None,
    }


@pytest.mark.parametrize("line", launch_lines())
def test_a_launch_line_is_understood(line):
    args = cli.parse(shlex.split(line)[1:])
    assert args.experiment == "EXPERIMENT"
    if args.coordinator is None:
        assert args.distributed in ("auto", "tpu")
        return
    config = DistributedConfig(
        coordinator=args.coordinator, num_processes=4, process_id=args.process_id
    )
    assert config.coordinator.endswith(":8476")
