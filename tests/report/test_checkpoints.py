"""Two checkpoints compared: the numbers against NumPy, the tables against the numbers."""

import copy
import html.parser
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaximm import attacks, models
from jaximm.checkpoint import CheckpointError, load_immunised, save_immunised
from jaximm.report import checkpoints as report
from jaximm.report import formats, page
from jaximm.run import compare as run_compare

pytestmark = pytest.mark.heavy

D_IN, D = 6, 4
ATTACKERS = ("gd", "ridge")  # the quickest to compile


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 50).astype(np.int32)
    inputs = rng.normal(size=(50, D_IN)) + labels[:, None]
    return {
        "primary": run_compare.TaskInputs(inputs.astype(np.float32), labels),
        "harmful": run_compare.TaskInputs(
            rng.normal(size=(41, D_IN)).astype(np.float32),
            np.where(rng.normal(size=41) > 0, 1.0, -1.0),
        ),
    }


@pytest.fixture(scope="module")
def backbone():
    return models.create(
        "mlp", input_shape=(D_IN,), widths=(5, D), classes=3, rng_key=jax.random.key(1)
    )


@pytest.fixture(scope="module")
def paths(tmp_path_factory, backbone):
    """A reference and the same with a neck and one moved layer."""
    folder = tmp_path_factory.mktemp("pair")
    neck = jnp.diag(jnp.asarray([1.0, 1.0, 1.0, 0.01], jnp.float32))
    moved = backbone.replace(
        {
            "neck.kernel": neck,
            "layers.1.kernel": 1.5 * backbone.params["layers.1.kernel"],
        }
    )
    head = {"kernel": jnp.eye(D, 3, dtype=jnp.float32), "bias": jnp.zeros(3, jnp.float32)}
    save_immunised(folder / "a", backbone, head, method="none")
    save_immunised(folder / "b", moved, head, method="condition_gap", config={"steps": 3})
    return folder / "a", folder / "b"


@pytest.fixture(scope="module")
def compared(paths, rows):
    return run_compare.compare_checkpoints(*paths, **rows, batch_size=16, attackers=ATTACKERS)


def perceptron(params, inputs):
    x = np.asarray(inputs, np.float64)
    w = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = np.maximum(x @ w["layers.0.kernel"] + w["layers.0.bias"], 0)
    x = x @ w["layers.1.kernel"] + w["layers.1.bias"]
    return x @ w["neck.kernel"] if "neck.kernel" in w else x


def log_kappa(features):
    values = np.linalg.svd(features, compute_uv=False)
    return 2 * math.log(values[0] / values[-1])


@pytest.mark.slow
def test_kappas_are_those_of_features_computed_anew(compared, paths, rows):
    found = compared["conditioning"]["pseudo_inverse"]
    expected = {}
    for side, name, path in (("a", "before", paths[0]), ("b", "after", paths[1])):
        params = load_immunised(path).backbone.params
        for task in ("primary", "harmful"):
            features = perceptron(params, rows[task].inputs)
            expected[side, task] = log_kappa(features)
            row = found[task][name]
            np.testing.assert_allclose(row["log_kappa"], expected[side, task], rtol=1e-4)
            assert (row["rank"], row["dtype"]) == (D, "float32")
    for task in ("primary", "harmful"):
        np.testing.assert_allclose(
            found[f"log_ratio_{task}"], expected["b", task] - expected["a", task], atol=1e-3
        )
    np.testing.assert_allclose(
        found["log_rir"], found["log_ratio_harmful"] - found["log_ratio_primary"], atol=1e-12
    )
    damped = compared["conditioning"]["damped"]
    assert damped["log_rir"] == pytest.approx(found["log_rir"], abs=0.05)  # a tiny damping
    assert damped["log_rir_limit"] > 0
    assert compared["rows"] == {"primary": 50, "harmful": 41}


def test_identity_and_head_accuracy(compared, paths, rows):
    a, b = (load_immunised(path) for path in paths)
    assert compared["a"]["path"] == str(paths[0])
    assert (compared["a"]["method"], compared["b"]["method"]) == ("none", "condition_gap")
    assert compared["b"]["config"] == {"steps": 3}
    assert compared["a"]["content_hash"] == a.metadata["content_hash"]
    assert not compared["same_numbers"]
    for found, loaded in ((compared["a"], a), (compared["b"], b)):
        features = perceptron(loaded.backbone.params, rows["primary"].inputs)
        accuracy = np.mean(np.argmax(features[:, :3], axis=1) == rows["primary"].targets)
        assert found["primary_accuracy"] == pytest.approx(accuracy)


def test_what_moved(compared, backbone):
    moved = compared["movement"]
    assert moved["added"] == ["neck.kernel"]
    changed = {row["path"]: row for row in moved["parameters"] if row["changed"]}
    assert set(changed) == {"layers.1.kernel"}
    row = changed["layers.1.kernel"]
    assert row["relative_norm"] == pytest.approx(0.5, rel=1e-6)
    kernel = np.asarray(backbone.params["layers.1.kernel"], np.float64)
    values = np.linalg.svd(kernel, compute_uv=False)
    assert row["before"]["log_kappa"] == pytest.approx(math.log(values[0] / values[-1]), rel=1e-9)
    assert row["top_singular_values"][0] == pytest.approx(0.5 * values[0], rel=1e-6)
    assert [stage["path"] for stage in moved["stages"]] == ["layers.0", "layers.1", "classifier"]


def test_attacks_are_run_on_both(compared):
    assert set(run_compare.ATTACKERS) <= set(attacks.REGISTRY)
    found = {(row["attacker"], row["task"]): row for row in compared["attacks"]}
    assert set(found) == {(name, task) for name in ATTACKERS for task in ("primary", "harmful")}
    steps = [found["gd", "harmful"][side]["fit"]["steps_to_loss_gap"]["1e-2"] for side in "ab"]
    assert steps[1] > steps[0] > 0  # a direction was shrunk a hundredfold


def test_tables_say_what_the_numbers_say(compared):
    found = {table.title: table for table in report.all_tables(compared)}
    assert list(found) == [
        "Checkpoints",
        "Condition numbers of the features",
        "Stages moved",
        "Layers moved",
        "Cost of fitting, B against A",
    ]
    for table in found.values():
        assert all(len(row) == len(table.columns) for row in table.rows)
    row = compared["conditioning"]["damped"]
    cells = found["Condition numbers of the features"].rows[0]
    assert cells[:3] == (
        "damped (the measure)",
        "harmful",
        formats.from_log(row["harmful"]["before"]["log_kappa"]),
    )
    assert cells[4:7] == (
        formats.factor(row["log_ratio_harmful"]),
        formats.factor(row["log_rir"]),
        "4 of 4 → 4 of 4",
    )
    assert found["Layers moved"].rows[0][:3] == ("layers.1.kernel", "5 × 4", "50.0 %")
    costs = found["Cost of fitting, B against A"]
    assert [column.heading for column in costs.columns][3:6] == ["steps A", "steps B", "B / A"]
    (gd,) = (row for row in compared["attacks"]
             if (row["attacker"], row["task"]) == ("gd", "harmful"))  # fmt: skip
    a, b = (gd[side]["fit"]["steps_to_loss_gap"]["1e-2"] for side in "ab")
    (cells,) = (row for row in costs.rows if row[:3] == ("gradient descent", gd["kind"], "harmful"))
    assert cells[3:6] == (f"{a:,}", f"{b:,}", formats.multiple(b / a))
    flops = [
        gd[side]["setup_flops"] + n * gd[side]["step_flops"] for side, n in (("a", a), ("b", b))
    ]
    assert cells[6:9] == (*map(formats.flops, flops), formats.multiple(flops[1] / flops[0]))
    lost = copy.deepcopy(compared)
    for one in lost["attacks"]:
        one["b"]["fit"]["steps_to_loss_gap"]["1e-2"] = -1
    cells = next(row for row in report.attacks(lost).rows if row[0] == "gradient descent")
    assert cells[4] == f"> {gd['steps']:,}"
    assert cells[5].startswith("> ")
    assert (cells[7], cells[8][0]) == (formats.MISSING, ">")
    markdown = report.markdown(compared)
    assert "1 of 6 parameters moved" in markdown
    assert "B adds neck.kernel" in markdown
    assert f"RIR {formats.factor(row['log_rir'])}" in markdown
    buffer = io.StringIO()
    console = Console(file=buffer, width=200)
    for part in report.terminal(compared, width=200):
        console.print(part)
    assert "condition_gap" in buffer.getvalue()


class Checker(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.rows, self.loads = [], 0, []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.rows += tag == "tr"
        self.loads += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_escaped_and_loads_nothing(compared):
    compared = copy.deepcopy(compared)
    compared["b"]["method"] = "<script>alert(1)</script>"
    text = page.render_comparison(compared, title="A & B")
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.loads == []
    tables = report.all_tables(compared)
    assert checker.rows == sum(1 + len(table.rows) for table in tables)
    assert "<script>" not in text
    assert "A &amp; B" in text


def test_a_checkpoint_compared_with_itself_is_the_same_numbers(paths, rows):
    a = load_immunised(paths[0])
    same = run_compare.compare_checkpoints(a, paths[0], **rows, attackers=())
    assert same["same_numbers"]
    assert same["a"]["path"] is None
    assert same["attacks"] == []
    assert same["movement"]["total"]["relative_norm"] == 0
    assert same["conditioning"]["pseudo_inverse"]["log_rir"] == pytest.approx(0, abs=1e-12)
    assert report.sentences(same)[0].startswith("A and B hold the same numbers")
    assert report.layers(same).rows == ()
    json.dumps(same, allow_nan=False)


@pytest.mark.slow
def test_two_architectures_compare_by_their_features_only(tmp_path, paths, rows):
    other = models.create(
        "mlp", input_shape=(D_IN,), widths=(3,), classes=2, rng_key=jax.random.key(2)
    )
    save_immunised(tmp_path / "other", other, method="none")
    found = run_compare.compare_checkpoints(paths[0], tmp_path / "other", **rows, attackers=())
    assert found["movement"] is None
    assert found["conditioning"]["damped"]["harmful"]["after"]["rank"] == 3
    words = report.sentences(found)
    assert words[0] == "Layers are not compared: A and B are mlp of two configurations."
    assert any("differ in rank" in line for line in words)
    assert "Layers moved" not in report.markdown(found)


def test_integer_labels_of_a_subset_of_classes_are_attacked(paths, rows):
    labels = np.where(rows["harmful"].targets > 0, 7, 3)
    harmful = rows["harmful"]._replace(targets=labels)
    primary = rows["primary"]._replace(targets=None)
    found = run_compare.compare_checkpoints(
        *paths, primary=primary, harmful=harmful, attackers=ATTACKERS[1:]
    )
    assert {row["task"] for row in found["attacks"]} == {"harmful"}
    assert found["a"]["primary_accuracy"] is None
    with pytest.raises(ValueError, match="two classes, got only 7"):
        run_compare.compare_checkpoints(
            *paths,
            primary=primary,
            harmful=harmful._replace(targets=np.full(41, 7)),
            attackers=ATTACKERS[1:],
        )


def test_what_cannot_be_compared_is_refused(tmp_path, paths, rows):
    a = load_immunised(paths[0])
    good = {side: {task: np.ones((5, 2)) for task in ("primary", "harmful")} for side in "ab"}
    for side, task, shape, message in (
        ("b", "harmful", (4, 2), r"harmful task must be \[n, d\] of the same rows"),
        ("a", "primary", (5,), r"primary task must be \[n, d\]"),
    ):
        bad = copy.deepcopy(good)
        bad[side][task] = np.ones(shape)
        with pytest.raises(ValueError, match=message):
            run_compare.compare_features(a, a, features=bad)
    with pytest.raises(ValueError, match=r"targets of the primary task must be \[n\] = \(5,\)"):
        run_compare.compare_features(a, a, features=good, targets={"primary": np.ones(4)})
    with pytest.raises(ValueError, match="unknown task 'other'"):
        run_compare.compare_features(a, a, features=good, targets={"other": np.ones(5)})
    with pytest.raises(ValueError, match="batch_size"):
        run_compare.compare_checkpoints(a, a, **rows, batch_size=0)
    with pytest.raises(ValueError, match="no rows"):
        run_compare.compare_checkpoints(
            a, a, primary=rows["primary"], harmful=run_compare.TaskInputs(np.zeros((0, D_IN)))
        )
    with pytest.raises(CheckpointError, match="does not exist"):
        run_compare.compare_checkpoints(tmp_path / "absent", paths[1], **rows)


def test_the_last_batch_is_filled_up_not_compiled_again(backbone):
    traces = []
    run = run_compare._feature_runner(backbone)
    counted = jax.jit(lambda *args: (traces.append(1), run(*args))[1])
    inputs = np.random.default_rng(3).normal(size=(23, D_IN)).astype(np.float32)
    found = run_compare._features(counted, backbone, inputs, 10)
    assert len(traces) == 1
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, perceptron(backbone.params, inputs), rtol=1e-5, atol=1e-5)
