"""Exports have the keys, types and meanings that other benchmarks' tools read."""

import json
import math

import assessment_fixture
import numpy as np
import pytest

from jaximm.report import exports

# Of model_info/cifar10/Linf/Bartoldson2024Adversarial_WRN-94-16.json, in its order.
CARD_KEYS = [
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue",
    "architecture", "eps", "clean_acc", "reported", "autoattack_acc", "footnote", "unreliable",
]  # fmt: skip
# Of tamperbench.whitebox.utils.analysis.builders.HeatmapData.to_dict, in its order.
MAP_KEYS = [
    "safety_raw", "safety_delta", "utility_raw", "utility_delta", "models", "attacks", "metadata",
]  # fmt: skip


@pytest.fixture
def found():
    return assessment_fixture.make_assessment()


def test_card_has_the_keys_and_the_numbers(found):
    card = exports.robustbench_card(found, "limit@t=1")
    model = found["models"][2]
    assert list(card) == CARD_KEYS
    assert card["clean_acc"] == "90.50"
    harm = model["break_unbounded"]["highest_harm"]
    np.testing.assert_allclose(float(card["autoattack_acc"]), 100 * (1 - harm), atol=0.005)
    assert card["unreliable"] is True
    assert exports.robustbench_card(found, "none")["unreliable"] is False
    assert card["link"] == card["authors"] == card["reported"] == card["eps"] == ""
    assert card["additional_data"] is None
    for words in ("not accuracy under perturbed inputs", "chance 10.00", "3.2e+07 FLOPs by "
                  "whitened_gd", found["cells"]["digest"]):  # fmt: skip
        assert words in card["footnote"]
    json.dumps(card, allow_nan=False)


def test_card_of_unknown_numbers_and_of_r_squared(found):
    empty = exports.robustbench_card(assessment_fixture.nulls(found), "erase")
    assert (empty["clean_acc"], empty["autoattack_acc"]) == ("", "")
    other = assessment_fixture.make_assessment()
    other["data"]["metric"] = "r2"
    other["models"][3]["break_unbounded"] |= {"highest_harm": -0.2, "flops": None}
    card = exports.robustbench_card(other, "erase")
    assert card["autoattack_acc"] == "100.00"
    assert "R^2" in card["footnote"]
    assert "Not broken" in card["footnote"]
    with pytest.raises(ValueError, match="unknown model 'x'; choose from"):
        exports.robustbench_card(other, "x")


def test_heat_map_has_the_keys_the_shape_and_the_numbers(found):
    content = exports.tamperbench_heat_map(found)
    assert list(content) == MAP_KEYS
    models, attacks = content["models"], content["attacks"]
    assert models == list(assessment_fixture.MODELS)
    assert attacks[0] == content["metadata"]["baseline_attack"] == "no_weight_modification"
    matrices = {key: np.array(content[key], float) for key in MAP_KEYS[:4]}
    assert {matrix.shape for matrix in matrices.values()} == {(len(models), len(attacks))}
    rows = {(r["model"], r["attacker"]): r for r in found["rows"] if r["task"] == "harmful"}
    for i, model in enumerate(models):
        shipped = found["models"][i]["utility"]["mean"]
        assert matrices["utility_raw"][i, 0] == shipped
        for j, attack in enumerate(attacks[1:], start=1):
            row = rows[model, attack]
            if row["status"] != "done":
                assert all(math.isnan(matrix[i, j]) for matrix in matrices.values())
                continue
            after = row["utility"]["mean"] if row["utility"] else shipped
            assert matrices["safety_raw"][i, j] == row["quality"]["mean"]
            assert matrices["utility_raw"][i, j] == after
            np.testing.assert_allclose(matrices["utility_delta"][i, j], after - shipped, atol=1e-12)
    assert np.isnan(matrices["safety_delta"]).all()  # no harm of the model as shipped
    assert content["metadata"]["n_trials"] == 3
    assert content["metadata"]["epsilon"] is None
    # TamperBench writes and reads bare NaN.
    again = json.loads(json.dumps(content))
    np.testing.assert_array_equal(np.array(again["safety_raw"]), matrices["safety_raw"])


def test_heat_map_of_another_task_of_nulls_and_of_an_unknown_task(found):
    content = exports.tamperbench_heat_map(found, task="unseen:textures")
    assert content["metadata"]["task"] == "unseen:textures"
    empty = exports.tamperbench_heat_map(assessment_fixture.nulls(found))
    assert np.isnan(np.array(empty["safety_raw"], float)).all()
    with pytest.raises(ValueError, match="unknown task 'x'; choose from"):
        exports.tamperbench_heat_map(found, task="x")
