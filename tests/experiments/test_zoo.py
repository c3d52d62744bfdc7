"""Fakes and honest models of known truth: the verdict is wrong of none of them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

RUN = Path(__file__).parents[2] / "experiments" / "meta_evaluation" / "run.py"


def test_no_fake_of_a_few_is_believed_and_no_honest_model_is_called_broken(tmp_path):
    """In a process of its own: the precision of a user, not of the tests."""
    command = [sys.executable, str(RUN), "--zoo", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    records = {one["name"]: one for one in map(json.loads, _lines(tmp_path / "zoo.jsonl"))}
    said = {name: record["holds"] for name, record in records.items()}
    present = {name for name, record in records.items() if record["truth"] == "present"}
    assert not {name for name in present if said[name] in ("yes", "erased")}
    assert said["honest_retrained"] in ("yes", "erased")
    # What is there is read inside the model; what is drowned there is not, and that is said.
    for name in ("stopped_all", "decoy_checksum"):
        assert said[name] in ("no", "weak"), name
        assert records[name]["best"] == "tapped_head"
    assert "lying_gradient" in records["stopped_all"]["capped"]
    assert "jumps" in records["decoy_checksum"]["capped"]
    assert said["hashed_noise"] == "unknown"
    assert "input_noise" in records["hashed_noise"]["capped"]
    assert "false yes 0, false no 0, unknown 1." in done.stdout
    # Every fake of the zoo holds what it hides.
    found = re.search(
        r"(\d+) models, revealed by one edit: ridge reads ([\d.]+) or more", done.stdout
    )
    assert found is not None
    assert int(found[1]) >= 24
    assert float(found[2]) >= 0.9 * records["undefended"]["reached"]
    assert all(record["utility"] > 0.95 for record in records.values())


def _lines(path):
    return path.read_text().splitlines()
