"""`import jaximm` gives the primitives and brings no heavy package with it."""

import pkgutil
import subprocess
import sys

import pytest

import jaximm

HEAVY = (
    "jinja2",
    "matplotlib",
    "orbax",
    "pandas",
    "rich",
    "tensorflow",
    "tensorflow_datasets",
    "tyro",
)
PROBE = """
import sys
import jaximm
import jaximm.linalg, jaximm.hessians, jaximm.regularisers, jaximm.preconditioner
jaximm.linalg.condition_number, jaximm.register  # what a researcher reaches first
print(*sorted(set({heavy!r}) & set(sys.modules)))
print(*sorted(name for name in sys.modules if name.startswith("jaximm.")))
"""


@pytest.fixture(scope="module")
def fresh():
    """The heavy packages and jaximm's own modules that a fresh interpreter has after the import."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(heavy=HEAVY)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stderr == ""  # nothing is printed, no warning
    heavy, own = done.stdout.split("\n")[:2]
    return heavy.split(), own.split()


def test_import_is_light(fresh):
    assert fresh[0] == []


def test_upper_floors_are_imported_only_when_touched(fresh):
    upper = {"immunisers", "attacks", "data", "training", "checkpoint", "report", "result"}
    assert not {f"jaximm.{name}" for name in upper} & set(fresh[1])
    assert {"jaximm.linalg", "jaximm.hessians", "jaximm.regularisers"} <= set(fresh[1])


EVERY_MODULE = """
import importlib, pkgutil
import jaximm
for module in pkgutil.walk_packages(jaximm.__path__, "jaximm."):
    importlib.import_module(module.name)
# What functions import when they are called.
import grain, jinja2, matplotlib.pyplot, onnx, orbax.checkpoint, rich.progress, scipy.stats
import tensorflow_datasets
"""


def test_no_import_is_deprecated():
    subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", EVERY_MODULE],
        check=True,
        timeout=300,
    )


def test_every_module_is_listed():
    modules = {module.name for module in pkgutil.iter_modules(jaximm.__path__)}
    verbs = {"assess", "attack", "immunise", "load_entry_points", "register"}
    assert set(jaximm.__all__) == modules | verbs | {"__version__"}
    assert dir(jaximm) == sorted(jaximm.__all__)
    assert jaximm.immunise.__module__ == "jaximm.face"
    assert jaximm.models.REGISTRY


def test_a_touched_module_is_there_and_an_unknown_name_is_an_attribute_error():
    assert jaximm.immunisers.REGISTRY
    assert jaximm.data.REGISTRY
    with pytest.raises(AttributeError, match="no attribute 'imunisers'"):
        _ = jaximm.imunisers
    assert len(set(jaximm.__all__)) == len(jaximm.__all__)
