"""`jaximm compare` on two checkpoints of immunised backbones, through the command line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaximm import cli, data, models
from jaximm.checkpoint import Immunised, save_immunised
from jaximm.records import files
from jaximm.report import checkpoints, page
from jaximm.run import compare as run_compare
from jaximm.run.compare import is_checkpoint
from jaximm.run.config import Experiment

pytestmark = pytest.mark.heavy

SIZE, D, CLASSES = 6, 4, 2


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """Fields of an image pair: two tasks of two classes of coloured noise each."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for task, base in (("primary", 60), ("harmful", 130)):
        for number, name in enumerate(("a", "b")):
            folder = root / task / name
            folder.mkdir(parents=True)
            for index in range(20):
                pixels = rng.normal(base + 40 * number, 40, (SIZE, SIZE, 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    paths = {f"{task}_path": str(root / task) for task in ("primary", "harmful")}
    return paths | {"size": SIZE, "resize": SIZE, "held_out_fraction": 0.5}


@pytest.fixture(scope="module")
def backbone():
    return models.create(
        "mlp",
        input_shape=(SIZE, SIZE, 3),
        widths=(5, D),
        preprocess=models.Preprocess(size=SIZE, resize=SIZE),
        rng_key=jax.random.key(1),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, backbone, fields):
    """Two run directories with a checkpoint and a configuration, and a bare checkpoint."""
    root = tmp_path_factory.mktemp("runs")
    neck = jnp.diag(jnp.asarray([1.0, 1.0, 1.0, 0.01], jnp.float32))
    moved = backbone.replace({"neck.kernel": neck})
    head = {"kernel": jnp.eye(D, CLASSES, dtype=jnp.float32)}
    config = Experiment(
        name="tiny",
        data="image_folder",
        data_fields=fields,
        model="mlp",
        model_fields={"input_shape": (SIZE, SIZE, 3), "widths": (5, D)},
        weights="random",
        train="layers.1",
    )
    for folder, saved, method in (("none-s0", backbone, "none"), ("limit-s0", moved, "limit")):
        save_immunised(root / folder / "backbone", saved, head, method=method)
        (root / folder / "config.json").write_text(json.dumps(config.to_json()))
    save_immunised(root / "bare", moved, head, method="limit")
    return root


def set_fields(fields):
    return [part for key, value in fields.items() for part in ("--set", f"{key}={value}")]


def test_two_checkpoints_are_compared_on_the_images_of_their_runs(
    runs, fields, backbone, tmp_path, capsys
):
    out = tmp_path / "new"
    argv = ["compare", str(runs / "none-s0" / "backbone"), str(runs / "limit-s0" / "backbone")]
    argv += ["--out", str(out), "--markdown", str(out / "t.md")]
    assert cli.main(argv) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for title in ("Checkpoints", "Condition numbers of the features", "Stages moved", "B adds"):
        assert title in captured.out
    assert "20 harmful and 20 primary rows of the training images" in captured.out
    assert f"comparison: {out / 'compare.html'}" in captured.out
    page = (out / "compare.html").read_text()
    assert "<title>Two checkpoints compared</title>" in page
    assert "| footing | task |" in (out / "t.md").read_text()
    # kappa of A, from NumPy: the images through the model's own preprocessing
    images = data.load("image_folder", **fields).harmful.train.x
    x = np.asarray(backbone.features(backbone.params, backbone.preprocess(jnp.asarray(images))))
    singular = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    assert singular[-1] > 1e-5 * singular[0]
    kappa = (singular[0] / singular[-1]) ** 2
    line = next(line for line in captured.out.splitlines() if line.startswith(" pseudo-inverse  "))
    assert float(line.split()[2].replace(",", "")) == pytest.approx(kappa, rel=6e-3)


def test_images_and_rows_can_be_named(runs, fields, tmp_path, capsys):
    both = [str(runs / "bare")] * 2
    argv = ["compare", *both, "--out", str(tmp_path / "mine.html")]
    assert cli.main(argv) == 2
    assert "--images NAME" in capsys.readouterr().err
    argv += ["--images", "image_folder", "--rows", "8", *set_fields(fields)]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert "8 harmful and 8 primary rows" in shown
    assert "bit for bit" in shown
    assert (tmp_path / "mine.html").is_file()


def test_one_run_beside_a_checkpoint_is_enough_to_name_the_images(runs):
    name, found = run_compare.recorded_images(runs / "bare", runs / "limit-s0" / "backbone")
    assert (name, found["size"]) == ("image_folder", SIZE)


def test_runs_on_different_images_do_not_agree(runs, fields, tmp_path):
    other = json.loads((runs / "none-s0" / "config.json").read_text())
    other["data_fields"]["held_out_fraction"] = 0.25
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="different images"):
        run_compare.recorded_images(tmp_path / "backbone", runs / "limit-s0" / "backbone")


def test_rows_are_spread_over_all_of_them(fields):
    pair = data.load("image_folder", **fields)
    some = run_compare.rows_of_pair(pair, rows=6)["primary"]
    assert some.inputs.dtype == np.uint8
    assert some.inputs.shape == (6, SIZE, SIZE, 3)
    whole = pair.primary.train
    np.testing.assert_array_equal(some.inputs[[0, -1]], whole.x[[0, -1]])
    np.testing.assert_array_equal(some.targets[[0, -1]], whole.y[[0, -1]])
    assert len(run_compare.rows_of_pair(pair, rows=999)["harmful"].inputs) == 20
    with pytest.raises(ValueError, match="rows must be >= 1"):
        run_compare.rows_of_pair(pair, rows=0)


def test_each_checkpoint_preprocesses_images_its_own_way(backbone, fields):
    pair = data.load("image_folder", **fields)
    rows = run_compare.rows_of_pair(pair, rows=12)
    other = models.Preprocess(
        size=SIZE, resize=SIZE, mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0)
    )

    def loaded(model):
        metadata = {"model": "mlp", "model_config": {}, "method": "none", "config": {}}
        return Immunised(model, None, metadata | {"content_hash": "x", "conditioning": None})

    scaled = dataclasses.replace(backbone, preprocess=other)
    found = run_compare.compare_checkpoints(
        loaded(backbone),
        loaded(scaled),
        primary=rows["primary"],
        harmful=rows["harmful"],
        attackers=(),
    )
    x = np.asarray(backbone.features(backbone.params, other(jnp.asarray(rows["harmful"].inputs))))
    singular = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    row = found["conditioning"]["pseudo_inverse"]["harmful"]
    kept = singular[singular > 1e-6 * singular[0]]
    assert row["after"]["log_kappa"] == pytest.approx(2 * np.log(kept[0] / kept[-1]), rel=1e-3)
    assert row["before"]["log_kappa"] != pytest.approx(row["after"]["log_kappa"], rel=1e-3)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["bare"], "exactly two checkpoints; got 1 checkpoint among 1 paths"),
        (["bare", "none-s0"], "got 1 checkpoint among 2 paths"),
        (["bare", "bare", "bare"], "got 3 checkpoints among 3 paths"),
        (["bare", "bare", "--csv", "t.csv"], "--csv is for runs"),
        (["bare", "bare", "--images", "nothing"], "unknown image pair 'nothing'"),
        (["bare", "bare", "--images", "image_folder", "--set", "colour=1"], "unknown key 'colour'"),
        (["bare", "bare", "--images", "image_folder", "--rows", "0"], "--rows must be at least 1"),
        (["none-s0", "--rows", "3"], "are for two checkpoints; these are runs"),
    ],
)
def test_wrong_paths_and_flags_are_one_clear_line(argv, words, runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    assert cli.main(["compare", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert words in line


def test_what_is_no_immunised_backbone_is_named(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd" / "record").mkdir(parents=True)
    assert is_checkpoint(tmp_path / "odd")
    assert not is_checkpoint(runs / "none-s0")
    argv = ["compare", "odd", str(runs / "limit-s0" / "backbone")]
    assert cli.main(argv) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "odd" in line


def test_a_failed_write_keeps_the_old_page(tmp_path, monkeypatch):
    place = tmp_path / "compare.html"
    place.write_text("old")
    monkeypatch.setattr(page, "render_comparison", lambda compared: "new")
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        page.write_comparison_page({}, place)
    assert place.read_text() == "old"
    assert list(tmp_path.iterdir()) == [place]


def test_comparisons_stay_plain_json(runs):
    found = run_compare.compare_checkpoints(
        runs / "bare",
        runs / "bare",
        primary=run_compare.TaskInputs(np.zeros((3, SIZE, SIZE, 3), np.uint8)),
        harmful=run_compare.TaskInputs(np.full((3, SIZE, SIZE, 3), 9, np.uint8)),
        attackers=(),
        data="three rows",
    )
    assert files.plain(found) == found
    assert "3 primary rows of three rows" in checkpoints.conditioning(found).note
