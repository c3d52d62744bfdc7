"""Every folder of experiments/ loads, has a smoke configuration, and that one runs end to end."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from assessment_fixture import make_assessment
from helpers import thinned

from experiments import deep_tables
from experiments.tables import RATIOS, attack_steps
from jaximm import assessment, report, run
from jaximm.records import result
from jaximm.run import assess as run_assess
from jaximm.run.cases import EXPERIMENTS, load_experiment
from jaximm.run.config import Experiment
from jaximm.types import Batch, Head

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[2] / "experiments"
CONFIGS = sorted(ROOT.glob("*/config.py"))
NAMES = [path.parent.name for path in CONFIGS]


def module_of(path: Path):
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script_of(name: str):
    """run.py as a module, which leaves no setting of its own behind."""
    folder, environment = str(ROOT / name), dict(os.environ)
    sys.path.insert(0, folder)
    try:
        return module_of(ROOT / name / "run.py")
    finally:
        sys.path.remove(folder)
        sys.modules.pop("config", None)
        os.environ.clear()
        os.environ.update(environment)


def test_they_are_there():
    assert {"house_price", "mnist_pairs"} <= set(NAMES)
    assert all((path.parent / "run.py").is_file() for path in CONFIGS)


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_a_config_loads_and_has_a_smoke_version(path):
    module = module_of(path)
    config = load_experiment(str(path))
    assert config == module.CONFIG
    assert isinstance(module.SMOKE, Experiment)
    assert len(module.SMOKE.methods) <= len(config.methods)
    if config.is_table:
        assert module.SMOKE.data == config.data
        assert config.name in EXPERIMENTS
    for name in vars(module):
        found = getattr(module, name)
        if isinstance(found, Experiment):
            assert Experiment.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert "Command:" in (module.__doc__ or "")


@pytest.mark.parametrize("path", thinned(CONFIGS))
def test_its_script_explains_itself(path):
    """`run.py --help` needs no data and starts from any folder."""
    done = subprocess.run(
        [sys.executable, str(path.parent / "run.py"), "--help"],
        capture_output=True,
        text=True,
        cwd=path.parents[2],
        env={**os.environ, "PYTHONPATH": str(path.parents[2])},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout


@pytest.mark.slow  # in the gate: `jaximm suite`, which is house prices too, and the tables below
def test_house_prices_end_to_end(tmp_path, capsys):
    module = module_of(ROOT / "house_price" / "config.py")
    config = dataclasses.replace(module.SMOKE, attackers=("gd", "ridge"))
    trained, closed = run.immunise(config, tmp_path)
    assert [trained["method"], closed["method"]] == list(module.SMOKE.methods)
    assert trained["timing"]["steps"] == 20
    row = closed["conditioning"]["damped"]["train"]
    assert row["log_fraction"] > 0.999
    assert abs(row["log_ratio_primary"]) < 1e-6  # t = 1 leaves the primary task as it was
    assert 0 < trained["conditioning"]["damped"]["train"]["log_fraction"] < row["log_fraction"]
    results = run.load_results([tmp_path])
    (found,) = run_assess.assess(
        [tmp_path], tmp_path / "assessment", level=None, as_configured=True
    )
    steps = attack_steps(found, "limit@t=1", "gd")
    assert steps["gd.harmful.before.loss"] == 49
    after = steps["gd.harmful.after.loss"]
    assert after == -1 or after > 100 * 49
    assert (steps["gd.primary.before.loss"], steps["gd.primary.after.loss"]) == (45, 5682)
    report.write_page(results, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000
    # The script's own tables, on these results.
    script_of("house_price").show(results, found)
    printed = capsys.readouterr().out
    for title in ("damped, train rows", "reference, held-out rows", "Primary held-out R2"):
        assert title in printed
    assert "| limit@t=1 |" in printed
    line = next(line for line in printed.splitlines() if line.startswith("| limit@t=1 | 49 -> "))
    assert line.endswith(" | 1 -> 1 |")  # ridge


@pytest.mark.slow
def test_mnist_end_to_end(tmp_path):
    module = module_of(ROOT / "mnist_pairs" / "config.py")
    (found,) = run.immunise(module.SMOKE, tmp_path)
    row = found["conditioning"]["damped"]["train"]
    assert row["log_fraction"] > 0.999
    assert abs(row["primary"]["after"]["log_kappa"]) < 1e-6  # t = 0: perfectly conditioned
    codes = [flag["code"] for flag in found["flags"]]
    assert {"constant_targets", "kappa_damping"} <= set(codes)
    result.validate(found)


@pytest.mark.slow
def test_mnist_one_pair_of_the_table():
    record = script_of("mnist_pairs").run_pair(("limit@t=1", 0, 1, "5k"))
    assert (record["method"], record["case"]) == ("limit@t=1", "0-1")
    assert record["damped.train.log_fraction"] > 0.999
    assert record["gd.harmful.after.loss"] == -1 or (
        record["gd.harmful.after.loss"] > record["gd.harmful.before.loss"]
    )


def test_mnist_tables_of_finished_pairs(tmp_path, capsys):
    """Records are lines of JSON; a table is made of those that are there."""
    script = script_of("mnist_pairs")
    assert script.read(tmp_path / "absent.jsonl") == []
    places = [f"{footing}.{split}" for footing in result.FOOTINGS for split in result.SPLITS]
    base = {f"{place}.{name}": 1.0 for place in places for name in RATIOS}
    records = [
        base | {"method": "limit@t=0", "case": f"0-{digit}", "damped.train.log_rir": float(digit),
                "r2_before": 0.5, "r2_after": 0.4, "method_s": 1.0, "pair_s": 2.0}
        for digit in (1, 3)
    ]  # fmt: skip
    script.print_tables(records)
    printed = capsys.readouterr().out
    assert "2.00 (1.41)" in printed
    assert "| limit@t=0 | 2 | 0.500 (0.000) | 0.400 (0.000) | 1.0 (0.0) | 2.0 (0.0) |" in printed


def cells_of(table: str) -> dict[str, dict[str, str]]:
    """A Markdown table by line and column."""
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")]
                       for line in table.strip().splitlines())  # fmt: skip
    return {line[0]: dict(zip(head[1:], line[1:], strict=True)) for line in lines}


def test_the_attack_matrix_prints_what_an_assessment_holds(tmp_path):
    script, found = script_of("attack_matrix"), make_assessment()

    def cheapest(kind, model):
        names = [one["name"] for one in found["attackers"] if one["kind"] == kind]
        costs = [row["flops_to_break"] for row in found["rows"]
                 if row["task"] == "harmful" and row["model"] == model
                 if row["attacker"] in names and row["flops_to_break"] is not None]  # fmt: skip
        return min(costs, default=None)

    classes = cells_of(script.class_table(found))
    assert set(classes) == {one["kind"] for one in found["attackers"]} | {"Krylov floor, steps"}
    for kind, model in (("first-order", "condition_gap"), ("fine-tuning", "limit@t=1")):
        ratio = cheapest(kind, model) / cheapest(kind, "none")
        assert float(classes[kind][model]) == pytest.approx(ratio, rel=5e-3)
    assert classes["first-order"]["erase"] == "never"
    assert classes["Krylov floor, steps"]["erase"] == "4"  # 9 x 4 over 9 steps
    quality = cells_of(script.quality_table(found))
    row = next(row for row in found["rows"] if (row["attacker"], row["model"], row["task"])
               == ("ridge", "erase", "harmful"))  # fmt: skip
    assert quality["ridge"]["erase"] == f"{row['quality']['mean']:.3f}"
    assert (quality["lora_adam"]["limit@t=1"], quality["undo_map"]["erase"]) == ("failed", "n/a")


def test_the_tables_of_deep_experiments_are_of_an_assessment(tmp_path):
    found = make_assessment(tasks=("harmful", "benign:primary"))
    rows = {(row["attacker"], row["model"], row["task"]): row for row in found["rows"]}
    steps = cells_of(deep_tables.probe_table(found, "harmful"))
    fits = [rows["gd", model, "harmful"]["fit"]["steps_to_loss_gap"]["1e-2"]
            for model in ("none", "condition_gap")]  # fmt: skip
    assert steps["condition_gap"]["gd"] == f"{fits[0]:,} -> {fits[1]:,}"
    assert steps["limit@t=1"]["gd"] == f"{fits[0]:,} -> > budget"
    tuned = cells_of(deep_tables.weight_table(found))
    ends = [100 * rows["fine_tune_adam", model, "harmful"]["quality"]["mean"]
            for model in ("none", "erase")]  # fmt: skip
    assert tuned["erase"]["fine_tune_adam: accuracy"] == f"{ends[0]:.1f} -> {ends[1]:.1f}"
    assert "steps -> " in tuned["erase"]["fine_tune_adam: to break"]
    assert tuned["limit@t=1"]["lora_adam: accuracy"] == "failed"
    deep_tables.draw(found, tmp_path / "drawn.svg", "A pair")
    assert "limit" in (tmp_path / "drawn.svg").read_text()


@pytest.mark.slow
def test_the_attack_matrix_says_what_is_left_of_a_fitted_head(tmp_path):
    """Runs give the heads, an assessment of the same experiment what attackers reach."""
    script = script_of("attack_matrix")
    config = dataclasses.replace(
        run.SUITE["house_price"], methods=("none", "erase"), name="cifar_pets"
    )
    run.immunise(config, tmp_path / "runs")
    found = make_assessment()
    reached = {(row["attacker"], row["model"]): row["quality"]["mean"] for row in found["rows"]
               if row["task"] == "harmful" and row["quality"]}  # fmt: skip
    left = cells_of(script.left_table(found, tmp_path))
    assert set(left) == {"none", "erase"}
    assert abs(float(left["erase"]["head, fitted rows"])) < 0.01
    assert float(left["none"]["head, fitted rows"]) > 0.8
    probes = [one["name"] for one in found["attackers"] if one["family"] == "probe"]
    assert left["none"]["best probe"] == f"{max(reached[name, 'none'] for name in probes):.3f}"
    tuned = max(reached[name, "erase"] for name in ("fine_tune_sgd", "fine_tune_adam"))
    assert left["erase"]["best full fine-tuning"] == f"{tuned:.3f}"


def test_the_ratios_of_the_vision_transformer_stand_beside_what_they_cost():
    """Logarithms become ratios, a loss of accuracy of more than a point is said."""

    def found(method, log_rir, after):
        return {
            "method": method,
            "groups": {"held_out": {"groups": 7, "log_rir": {"mean": 2 * log_rir, "sd": 0.5}}},
            "conditioning": {"shipped": {"held_out": {"log_rir": log_rir}}},
            "utility": {"before": {"held_out": 0.75}, "after": {"held_out": after}},
        }

    results = [found("kept", np.log(3.0), 0.7401), found("lost", 0.0, 0.7399)]
    rows = cells_of(script_of("dinov2").rir_table(results, {"kept": np.log(5.0), "lost": 0.0}))
    assert list(rows["kept"].values()) == ["9", "3", "5", "75.0 -> 74.0", "yes"]
    assert list(rows["lost"].values()) == ["1", "1", "1", "75.0 -> 74.0", "no"]
    assert rows["published, ViT-B/16, Stanford Cars"]["groups of 100"] == "34.5"


def test_kappas_of_the_vision_transformer_are_compared_at_one_rank():
    """A direction that drops below the tolerance after a method is left out of what was before."""
    script = script_of("dinov2")
    spectrum = np.array([4.0, 2.0, 1.0])
    x = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 3)))[0] * spectrum
    splits = assessment.TaskSplits(*[Batch(jnp.asarray(x), jnp.zeros(9, jnp.int32))] * 3, classes=2)
    bench = assessment.Bench(
        name="three",
        features_fn=lambda params, x: x * params["scale"][None],
        harmful=splits,
        primary=splits,
    )

    def model(label, scale, **neck):
        head = Head(jnp.zeros((3, 2)), jnp.zeros(2))
        params = {"scale": jnp.asarray(scale), **neck}
        return assessment.Model(label=label, method=label, params=params, benign_head=head)

    neck = {"neck.kernel": jnp.diag(jnp.asarray([1.0, 0.5, 0.0])), "neck.bias": jnp.zeros(3)}
    subjects = [
        model("none", [1.0, 1.0, 1.0]),
        model("dropped", [1.0, 0.5, 1e-9]),
        model("necked", [1.0, 1.0, 1.0], **neck),
    ]
    values = {one.label: script.held_out_values(bench, one)["harmful"] for one in subjects}
    np.testing.assert_allclose(values["necked"], [4.0, 1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(values["dropped"], [4.0, 1.0, 1e-9], rtol=1e-6)
    # Both tasks are the same here, so that their logarithms cancel; of one alone they do not.
    assert script.one_rank(bench, subjects) == {"none": 0.0, "dropped": 0.0, "necked": 0.0}
    assert script.log_ratio(values["none"], values["dropped"]) == pytest.approx(2 * np.log(2.0))
