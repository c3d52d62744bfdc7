"""A method, a backbone and a data set from outside the package: one file of each is enough."""

import json

import pytest

from jaximm import cli, data, immunisers, models

pytestmark = pytest.mark.heavy

METHOD = '''
import dataclasses
import jaximm
from jaximm.immunisers import About
from jaximm.immunisers.gradient import from_penalty

@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Features of the harmful task shrink."""
    about = About(title="toy shrinkage", source="https://example.org/toy", against="nobody", broken_by="everybody")
    steps: int = 2
    batch_size: int | None = None

jaximm.register("immuniser", "toy_method", (
    ToyConfig, lambda config, problem: from_penalty(
        "toy_method", problem, lambda pair, memory: ((pair.harmful.x**2).mean(), memory))))
'''  # noqa: E501

MODEL = """
import jaximm
from flax import nnx
from jaximm.models import Preprocess, whole

class Net(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(48, 5, rngs=rngs)
    def __call__(self, x):
        return nnx.tanh(self.layer(x.reshape(x.shape[0], -1)))

jaximm.register("model", "toy_model", whole(Net, width=5, preprocess=Preprocess(size=4), source="https://example.org/net"))
"""

DATA = '''
import dataclasses
import numpy as np
import jaximm
from jaximm.data import Split, Task, TaskPair
SOURCE = "https://example.org/noise"

@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Bright or dark noise against red or blue noise."""
    targets = "classes"
    rows: int = 24

def load(config):
    def split(seed, channel):
        rng = np.random.default_rng(seed)
        labels = np.arange(config.rows, dtype=np.int32) % 2
        images = rng.integers(0, 100, (config.rows, 4, 4, 3)).astype(np.uint8)
        images[..., channel] += (100 * labels[:, None, None]).astype(np.uint8)
        return Split(images, labels)
    task = lambda name, channel: Task(name, split(channel, channel), split(channel + 9, channel), "classes", ("no", "yes"))
    return TaskPair("toy_rows", task("green", 1), task("red", 0), "noise", SOURCE,
        unseen={"blue": lambda: task("blue", 2)})

jaximm.register("data", "toy_rows", (NoiseConfig, load))
'''  # noqa: E501

EXPERIMENT = """
from pathlib import Path
from jaximm.registry import run_file
for part in ("method", "model", "data"):
    run_file(Path(__file__).parent / f"toy_{part}.py")
from jaximm.run import Experiment
CONFIG = Experiment(
    name="toys", data="toy_rows", model="toy_model", weights="random", train="*", image_size=4,
    methods=("none", "toy_method"), steps=2, batch_size=8, groups=1, group_rows=12,
)
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    for module in (data, immunisers, models):
        monkeypatch.setattr(module, "REGISTRY", dict(module.REGISTRY))
    for part, text in {"method": METHOD, "model": MODEL, "data": DATA}.items():
        (tmp_path / f"toy_{part}.py").write_text(text)
    path = tmp_path / "experiment.py"
    path.write_text(EXPERIMENT)
    return path


@pytest.mark.slow
def test_a_toy_of_each_is_listed_run_assessed_and_on_the_page(file, tmp_path):
    out = tmp_path / "runs"
    assert cli.main(["immunise", str(file), "--out", str(out)]) == 0
    listed = cli.catalogue()
    methods, nets, rows = (
        {entry["name"]: entry for entry in listed[family]}
        for family in ("methods", "models", "data sets")
    )
    assert methods["toy_method"]["title"] == "toy shrinkage"
    assert methods["toy_method"]["threat_model"] == "made against nobody; not against everybody"
    assert nets["toy_model"]["source"] == "https://example.org/net"
    assert rows["toy_rows"]["source"] == "https://example.org/noise"
    assert rows["toy_rows"]["description"].startswith("Bright or dark")
    command = ["assess", str(out), "--level", "quick", "--attack", "ridge"]
    assert cli.main(command) == 0
    place = out / "assessment" / "toys"
    document = json.loads((place / "assessment.json").read_text())
    assert {model["method"] for model in document["models"]} == {"none", "toy_method"}
    assert "unseen:blue" in {row["task"] for row in document["rows"]}
    page = (place / "assessment.html").read_text()
    assert "toy_method" in page
    assert "Made against nobody; not against everybody" in page
