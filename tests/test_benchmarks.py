"""Benchmarks that run where their figures are made, in their quick forms here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_accelerator_quick_form_prints_every_part():
    command = [sys.executable, str(SCRIPTS / "accelerator.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr[-2000:]
    for line in ("condition_gap", "svd default", "eigh", "shard_map", "pmap", "tokens/s"):
        assert line in done.stdout
    assert "nan" not in done.stdout
