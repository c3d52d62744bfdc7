"""The result file: what is written is read, and nothing else is."""

import copy
import errno
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
import result_fixture

from jaximm.records import files, result
from jaximm.records.files import ResultError


@pytest.fixture(scope="module")
def good():
    return files.plain(result_fixture.make_result("limit", 1))


def edited(record, place, value):
    """A copy of `record` with one entry replaced, or removed where value is `...`."""
    record = copy.deepcopy(record)
    node = record
    for key in place[:-1]:
        node = node[key]
    if value is ...:
        del node[place[-1]]
    else:
        node[place[-1]] = value
    return record


def test_round_trip_is_exact_and_leaves_no_other_file(tmp_path, good):
    path = tmp_path / "result.json"
    result.write(path, good)
    assert result.read(path) == good
    assert os.listdir(tmp_path) == ["result.json"]


def test_write_takes_arrays_and_stores_non_finite_numbers_as_null(tmp_path, good):
    path = tmp_path / "result.json"
    record = copy.deepcopy(good)
    row = record["conditioning"]["damped"]["train"]
    row["log_rir_upper"] = np.inf
    row["log_rir"] = jnp.float32(row["log_rir"])
    row["log_rir_lower"] = np.float64("nan")
    record["spectra"]["primary"]["after"] = np.array([2.0, 1.0, np.nan])
    record["trajectory"][0]["step"] = np.int32(record["trajectory"][0]["step"])
    result.write(path, record)
    text = path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    back = result.read(path)
    assert back["conditioning"]["damped"]["train"]["log_rir_upper"] is None
    assert back["conditioning"]["damped"]["train"]["log_rir_lower"] is None
    assert back["spectra"]["primary"]["after"] == [2.0, 1.0, None]
    assert back["trajectory"] == good["trajectory"]


def test_files_get_the_permissions_of_any_new_file(tmp_path, good):
    path, other = tmp_path / "result.json", tmp_path / "other"
    result.write(path, good)
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


DAMAGE = {
    "missing_key": (("method",), ..., "'method' is a required property"),
    "unknown_key": (("extra",), 1, "'extra'"),
    "wrong_type": (("seed",), "0", "seed: '0' is not of type 'integer'"),
    "wrong_split": (("conditioning", "damped", "test"), {}, "conditioning.damped"),
    "wrong_footing": (("conditioning", "plain"), {"train": {}}, "conditioning"),
    "attacks_of_version_1": (("attacks",), [], "'attacks' was unexpected"),
    "step_below_zero": (("trajectory", 0, "step"), -2, "trajectory[0].step"),
    "wrong_dominance": (
        ("conditioning", "damped", "train", "primary", "before", "dominated_by"),
        "noise",
        "conditioning.damped.train.primary.before.dominated_by",
    ),
    "rir_is_not_the_difference": (
        ("conditioning", "damped", "train", "log_rir"),
        1.0,
        "log_ratio_harmful - log_ratio_primary",
    ),
    "outside_its_interval": (
        ("conditioning", "damped", "held_out", "log_rir_upper"),
        -5.0,
        "outside",
    ),
    "wrong_metric": (("utility", "metric"), "loss", "utility"),
}


@pytest.mark.parametrize("case", sorted(DAMAGE))
def test_what_does_not_fit_is_refused_in_one_line_by_validate_write_and_read(tmp_path, good, case):
    place, value, words = DAMAGE[case]
    bad = edited(good, place, value)
    path = tmp_path / "result.json"
    with pytest.raises(ResultError) as validated:
        result.validate(bad)
    with pytest.raises(ResultError) as written:
        result.write(path, bad)
    assert os.listdir(tmp_path) == []
    path.write_text(json.dumps(bad))
    with pytest.raises(ResultError) as read:
        result.read(path)
    for error in (validated, written, read):
        assert words in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500
    for error in (written, read):
        assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("{", "half written"),
        ("[1, 2]", "a result is a JSON object, got list"),
        ("{}", "no schema version"),
        ('{"schema": "jaximm.result/9"}', "schema 'jaximm.result/9', this jaximm reads"),
        ('{"schema": "jaximm.result/1"}', "is a required property"),
        ('{"schema": "jaximm.result/1", "seed": NaN}', "NaN is not JSON"),
        ('{"schema": "jaximm.result/1", "seed": 1e999}', "1e999 is not JSON"),
        ('{"schema": "jaximm.result/1", "seed": -Infinity}', "-Infinity is not JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_damaged_files_are_named_with_what_is_wrong(tmp_path, text, words):
    path = tmp_path / "result.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ResultError) as error:
        result.read(path)
    assert words in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_half_written_file_is_refused(tmp_path, good, share):
    path = tmp_path / "result.json"
    result.write(path, good)
    text = path.read_text().rstrip()
    path.write_text(text[: int(share * len(text))])
    with pytest.raises(ResultError, match="damaged or half written"):
        result.read(path)


def test_missing_files_and_folders_are_refused(tmp_path, good):
    with pytest.raises(ResultError, match="No such file"):
        result.read(tmp_path / "result.json")
    with pytest.raises(ResultError, match="directory"):
        result.read(tmp_path)
    with pytest.raises(ResultError, match="not written: No such file"):
        result.write(tmp_path / "nowhere" / "result.json", good)


def test_a_full_disk_keeps_the_old_result(tmp_path, good, monkeypatch):
    path = tmp_path / "result.json"
    result.write(path, good)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResultError, match="No space left on device"):
        result.write(path, edited(good, ("seed",), 7))
    assert os.listdir(tmp_path) == ["result.json"]
    assert result.read(path)["seed"] == 1


def test_a_move_that_fails_keeps_the_old_result(tmp_path, good, monkeypatch):
    path = tmp_path / "result.json"
    result.write(path, good)

    def refused(source, target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(ResultError, match="not written: Permission denied"):
        result.write(path, edited(good, ("seed",), 7))
    assert os.listdir(tmp_path) == ["result.json"]
    assert result.read(path)["seed"] == 1


def test_paths_that_are_not_utf_8_come_back_as_they_are(tmp_path, good):
    path = tmp_path / "result.json"
    odd = good | {"command": os.fsdecode(b"jaximm --set data.path=caf\xe9.npz")}
    result.write(path, odd)
    assert result.read(path) == odd


def test_plain_refuses_what_json_does_not_know():
    with pytest.raises(ResultError, match="set"):
        files.plain({"a": {1, 2}})


def test_the_first_version_is_read_without_what_the_assessment_says_now(tmp_path, good):
    path = tmp_path / "result.json"
    kept = {"code": "kappa_damping", "severity": "info", "message": "of the run", "caps": False}
    gone = {"code": "still_falling", "severity": "info", "message": "of an attack", "caps": False}
    old = good | {
        "schema": result.EARLIER,
        "attacks": [{"attacker": "gd", "steps_to_loss_gap": {"1e-2": 49}}],
        "certificates": [{"name": "krylov_floor"}],
        "flags": [kept, gone],
        "timing": good["timing"] | {"attack_s": 2.0},
    }
    path.write_text(json.dumps(old))
    found = result.read(path)
    assert found["schema"] == result.EARLIER
    assert "attacks" not in found
    assert "certificates" not in found
    assert found["flags"] == [kept]
    assert {key: found[key] for key in ("conditioning", "utility", "config")} == {
        key: good[key] for key in ("conditioning", "utility", "config")
    }
    path.write_text(json.dumps(edited(old, ("seed",), "0")))
    with pytest.raises(ResultError, match="seed: '0' is not of type 'integer'"):
        result.read(path)


def test_runs_without_targets_are_valid(tmp_path, good):
    record = good | {"utility": None, "harmful_utility": None}
    result.write(tmp_path / "result.json", record)
    assert result.read(tmp_path / "result.json") == record


def test_the_schema_itself_is_a_valid_schema():
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(result.SCHEMA)
    assert result.SCHEMA["properties"]["schema"]["enum"] == [
        *result.UNSEALED,
        result.SCHEMA_VERSION,
    ]
