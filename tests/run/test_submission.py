"""Bundles: what makes one complete, what is refused, and that its numbers are what is attacked."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaximm.assessment import suites
from jaximm.carriers import MissingCarrierError
from jaximm.models.weights.errors import WeightFileError
from jaximm.records import submission as record
from jaximm.records.files import ResultError
from jaximm.run import submission
from jaximm.run.assess import params_of
from jaximm.run.cases import CASES, SUITE
from jaximm.run.prepare import prepare

SEEDS = (0, 1, 2)
CARD = {
    "schema": record.SCHEMA_VERSION,
    "name": "turned",
    "suite": "linear-1.0",
    "method": "a rotation",
    "threat_model": "nobody: a rotation changes no condition number",
    "data": {"harmful_rows": 0, "description": "none"},
    "compute": "none",
    "seeds": list(SEEDS),
    "adaptive_attack": {"attacker": "ridge", "result": "as before"},
}


def turned(seed, d):
    rng = np.random.default_rng(seed)
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "turned"
    for case in SUITE:
        (path / case).mkdir(parents=True)
        for seed in SEEDS:
            theta = turned(seed, 79 if case == "house_price" else 49)
            save_file({submission_key(): theta}, path / case / f"seed-{seed}.safetensors")
    (path / record.CARD).write_text(json.dumps(CARD))
    return path


def submission_key():
    from jaximm.immunisers import THETA

    return THETA


@pytest.fixture
def bundle(complete, tmp_path):
    return shutil.copytree(complete, tmp_path / "turned")


def test_a_complete_bundle_is_its_models(complete):
    assert submission.is_bundle(complete)
    assert submission.check(complete) == CARD
    (bench, models), (other, _) = (submission.bench_of(complete, case) for case in SUITE)
    assert [bench.name, other.name] == list(suites.load("linear-1.0").cases)
    labels = [(model.label, model.method, model.seed) for model in models]
    assert labels == [
        ("none", "none", 0),
        ("turned", "turned", 0),
        ("turned s1", "turned", 1),
        ("turned s2", "turned", 2),
    ]
    np.testing.assert_array_equal(models[3].params[submission_key()], turned(2, 79))
    x = bench.harmful.train.x
    np.testing.assert_allclose(
        bench.features_fn(models[3].params, x), x @ turned(2, 79), rtol=1e-12, atol=1e-12
    )


def edit_card(**changes):
    def edit(path):
        (path / record.CARD).write_text(json.dumps({**CARD, **changes}))

    return edit


def edit_weights(change):
    def edit(path):
        file = path / "house_price" / "seed-1.safetensors"
        arrays = change(load_file(file))
        save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, file)

    return edit


def drop(path):
    (path / "mnist_slant" / "seed-2.safetensors").unlink()


def add(path):
    shutil.copy(
        path / "mnist_slant" / "seed-2.safetensors", path / "mnist_slant" / "seed-7.safetensors"
    )


def cut(path):
    file = path / "house_price" / "seed-1.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


THETA = submission_key()
BAD = {
    "no card": (lambda path: (path / record.CARD).unlink(), "card.json"),
    "no attack of their own": (
        lambda path: (path / record.CARD).write_text(
            json.dumps({key: v for key, v in CARD.items() if key != "adaptive_attack"})
        ),
        "'adaptive_attack' is a required property",
    ),
    "two seeds": (edit_card(seeds=[0, 1]), "asks for 3 seeds"),
    "a seed twice": (edit_card(seeds=[0, 1, 1]), "seeds"),
    "another suite": (edit_card(suite="linear-7"), "unknown suite 'linear-7'"),
    "a file less": (drop, r"lacks mnist_slant/seed-2\.safetensors"),
    "a file more": (add, r"holds mnist_slant/seed-7\.safetensors"),
    "cut": (cut, r"seed-1\.safetensors"),
    "another path": (
        edit_weights(lambda found: {"theta": found[THETA]}),
        "what trains in house_price",
    ),
    "another shape": (
        edit_weights(lambda found: {THETA: found[THETA][1:]}),
        "must be finite real numbers",
    ),
    "an axis more": (
        edit_weights(lambda found: {THETA: found[THETA][..., None]}),
        r"\[79, 79, 1\]",
    ),
    "not finite": (edit_weights(lambda found: {THETA: found[THETA] * np.nan}), "must be finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_complete_is_refused(name, bundle):
    change, words = BAD[name]
    change(bundle)
    with pytest.raises((ValueError, ResultError), match=words):
        submission.check(bundle)


def test_runs_of_other_rows_make_no_bundle(tmp_path):
    from jaximm.run.cases import EXPERIMENTS

    with pytest.raises(ValueError, match="other rows or another model"):
        submission._case_of(EXPERIMENTS["mnist_slant"], tmp_path, "linear-1.0")
    with pytest.raises(ValueError, match=r"unknown suite 'sound-1\.0'"):
        submission._case_of(EXPERIMENTS["mnist_slant"], tmp_path, "sound-1.0")
    assert submission._case_of(EXPERIMENTS["house_price"], tmp_path, "linear-1.0") == "house_price"


@pytest.mark.slow
def test_finished_runs_make_a_bundle_that_a_suite_assesses(tmp_path):
    """From the command line's own functions, by one attacker of the suite."""
    import dataclasses

    from jaximm import report, run
    from jaximm.records import assessment

    for name, config in SUITE.items():
        config = dataclasses.replace(config, methods=("limit@t=1",), seeds=SEEDS)
        run.immunise(config, tmp_path / "runs" / name)
    card = {key: v for key, v in CARD.items() if key not in ("schema", "seeds")}
    path = submission.make(tmp_path / "limit", [tmp_path / "runs"], card | {"method": "limit@t=1"})
    documents = submission.assess(path, tmp_path / "out", level="quick")
    assert [document["name"] for document in documents] == list(SUITE)
    again = assessment.read(tmp_path / "out" / "house_price" / "assessment.json")
    board = report.suite_table([(again, record.read(path / record.CARD))], seeds=3)
    assert board.rows[0][:3] == ("house_price", "turned", "3")
    backbone = prepare(SUITE["house_price"]).backbone
    assert backbone.params[THETA].shape == (79, 79)


@pytest.mark.slow
def test_a_bundle_of_networks_holds_what_trains_and_a_classifier(tmp_path):
    path = tmp_path / "untouched"
    prepared = {}
    for case, config in CASES["vision-1.0"].items():
        try:
            prepared[case] = prepare(config)
        except MissingCarrierError as error:
            pytest.skip(str(error))
        arrays = params_of(prepared[case], None)
        arrays |= {f"head.{key}": value for key, value in prepared[case].head._asdict().items()}
        (path / case).mkdir(parents=True)
        for seed in SEEDS:
            content = {key: np.asarray(value) for key, value in arrays.items()}
            save_file(content, path / case / f"seed-{seed}.safetensors")
    (path / record.CARD).write_text(json.dumps({**CARD, "suite": "vision-1.0"}))
    assert submission.check(path)["suite"] == "vision-1.0"
    file = path / "lite0_animals" / "seed-1.safetensors"
    arrays, head = submission.read_seed(path, "lite0_animals", 1, prepared["lite0_animals"])
    assert head is not None
    assert head.kernel.shape == (1280, 4)
    whole = load_file(file)
    without = {key: value for key, value in whole.items() if key != "head.kernel"}
    save_file(without, file)
    with pytest.raises(WeightFileError, match=r"seed-1.*the primary task's classifier is head\.k"):
        submission.check(path)
    name = max(arrays, key=lambda key: arrays[key].size)
    save_file({**whole, name: whole[name][..., :7]}, file)
    with pytest.raises(WeightFileError, match=r"seed-1.*must be finite real numbers"):
        submission.check(path)
